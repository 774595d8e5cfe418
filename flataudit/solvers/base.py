"""What every solver returns and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError

Penalty = Mapping[str, Tensor]  # D by parameter name, the parameter's shape

EIGENVALUE_LIMIT = 4000  # a spectrum costs about 14 Choleskys; above this size it is left out
_NO_EIGENVALUES = (
    "expected a curvature with finite eigenvalues, got a breakdown; likely causes: weights or"
    " inputs near overflow, or a penalty far below 1e-14 of the curvature; raise the penalty"
)


@dataclass(frozen=True, slots=True, eq=False)
class FunctionalVariance:
    """A_i = (1/n) J_i (G + D)^-1 J_i', whitened: Q_i = S_i' A_i S_i.

    q: Q_i (n, K', K'); complement: I - Q_i, computed without cancellation where the solver can;
    mean_gradient: gbar'(G + D)^-1 gbar, gbar = (1/n) sum J_i' r_i; trace_ggn: tr(G);
    ratios: eigenvalues of D^-1/2 G D^-1/2 over the penalised parameters, descending, or None.
    """

    q: Tensor
    complement: Tensor
    mean_gradient: float
    trace_ggn: float
    ratios: Tensor | None = None


class Solver(Protocol):
    """One strategy: `plan` states the peak memory, `solve` does the work."""

    name: str
    exact: bool

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        """Peak bytes of the solver's own arrays, before any is allocated."""
        ...

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        """The functional variance; NumericalError where a factorisation breaks down."""
        ...


def spectrum_of(matrix: Tensor) -> Tensor:
    """Eigenvalues of a symmetric positive semi-definite matrix (its upper triangle), descending.

    Raises:
        NumericalError: they cannot be had, as where the matrix holds what overflowed.
    """
    try:
        values: Tensor = torch.linalg.eigvalsh(matrix, UPLO="U").flip(0).clamp_min(0.0)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its __all__
        raise NumericalError(_NO_EIGENVALUES) from error
    return values


def pseudo_inverse_root(c: Tensor) -> Tensor:
    """C^(+1/2) of a symmetric positive semi-definite matrix, (m, rank).

    The free directions can hold a null space (softmax's class shift is one): eigenvalues below
    m * eps * max are zero in exact arithmetic and are left out.
    """
    if not len(c):
        return c
    # Unit diagonal first: features of very different scale are no null space.
    scale = c.diagonal().clamp_min(0.0).sqrt()
    scale = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    try:
        values, vectors = torch.linalg.eigh(scale[:, None] * c * scale)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # not in its __all__
        raise NumericalError(_NO_EIGENVALUES) from error
    floor = len(values) * torch.finfo(values.dtype).eps * values[-1].clamp_min(0.0)
    keep = values > 8 * floor
    root: Tensor = scale[:, None] * vectors[:, keep] * values[keep].rsqrt()
    return root
