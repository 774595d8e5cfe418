"""What every solver returns and how it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError

Penalty = Mapping[str, Tensor]  # D by parameter name, the parameter's shape

# Operations, at the speed of a matrix product, that one entry of the Jacobian costs: it is
# differentiated, not computed. Measured on networks of 63 to 25,000 parameters; a chunk of rows by
# reverse mode waits for memory and dispatch, so that this is rough, and matters for small P alone.
JACOBIAN = 1500.0
# What an operation of a Cholesky, and of a triangular solve or inverse, takes beside one of a
# matrix product: at side 3,000 in float64, 2.05 and 1.36 on one core (docs/performance.md).
CHOLESKY, TRIANGULAR = 2.0, 1.4
EIGENVALUE_LIMIT = 4000  # side of a matrix up to which its spectrum is computed
SPECTRUM = 14.0  # Choleskys that the eigenvalues of one matrix cost
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

    Where Q_i is sampled, `complement` is scaled so that Q_i complement_i^-1 is unbiased for
    Q_i (I - Q_i)^-1; replicates: the same object without one group of samples each, for the
    jackknife; truncation: relative error that the linear solves leave; notes: what went otherwise
    than planned.
    """

    q: Tensor
    complement: Tensor
    mean_gradient: float
    trace_ggn: float
    ratios: Tensor | None = None
    sampled: bool = False
    replicates: tuple[FunctionalVariance, ...] = ()
    truncation: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """A sum over samples known up to a stated error.

    value: the sum; monte_carlo_se: its standard error over probes; truncation: a bound on what the
    iteration leaves out; rough: unbiased but noisy contributions (n,), of noise variance `noise`
    on average, from which a spread over samples can be had.
    """

    value: float
    monte_carlo_se: float
    truncation: float
    rough: Tensor
    noise: float


@dataclass(frozen=True, slots=True, eq=False)
class CurvatureTraces:
    """What a solver without per-sample values knows: the two traces and the spectral density.

    soft_rank: tr(G (G + D)^-1) = sum_i tr(Q_i); tic: n tr(C (G + D)^-1)/n = sum_i v_i'Q_i v_i;
    nodes, weights: sum_j w_j f(c x_j) is the soft rank at the penalty D/c, less free_rank, the
    unpenalised directions' part; mean_gradient, trace_ggn, notes: as in `FunctionalVariance`.
    """

    soft_rank: Trace
    tic: Trace
    mean_gradient: float
    trace_ggn: float
    nodes: Tensor
    weights: Tensor
    free_rank: int
    notes: tuple[str, ...] = ()
    ratios: Tensor | None = None

    def rank_at(self, scale: float) -> float:
        """The soft rank with K times `scale`: at the penalty D/scale."""
        x = self.nodes * scale
        return self.free_rank + float((self.weights * (x / (1.0 + x))).sum())


Curvature = FunctionalVariance | CurvatureTraces


class Checkpoint(Protocol):
    """Keeps a solver's state where the caller wants it; the key names problem and settings."""

    def load(self, key: str) -> dict[str, Tensor] | None:
        """The state saved under this key, or None."""
        ...

    def save(self, key: str, state: Callable[[], dict[str, Tensor]], *, last: bool = False) -> None:
        """Offers the state; whether it is time to write it is the keeper's decision.

        last: the solver ends here, finished or interrupted.
        """
        ...


def _silent(done: int, expected: int) -> None:
    """No one watches."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """How a solver runs, apart from what it computes.

    seed: of the probes and samples; tick: called with the matrix products done and expected;
    checkpoint: where a killed run goes on from.
    """

    seed: int = 0
    tick: Callable[[int, int], None] = _silent
    checkpoint: Checkpoint | None = field(default=None)


class MatrixFree(Protocol):
    """A strategy that never forms a matrix: an approximation with a stated error."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        """Peak bytes of the solver's own arrays, before any is allocated."""
        ...

    def solve(self, problem: Problem, penalty: Penalty, work: Work) -> Curvature:
        """The curvature; NumericalError where the iteration breaks down."""
        ...


class Solver(Protocol):
    """One strategy: `plan` states the peak memory, `solve` does the work."""

    @property
    def name(self) -> str: ...

    @property
    def exact(self) -> bool: ...

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        """Peak bytes of the solver's own arrays, before any is allocated."""
        ...

    def work(self, problem: Problem, penalty: Penalty) -> float:
        """Floating-point operations of `solve`, about, at the speed of a matrix product."""
        ...

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        """The functional variance; NumericalError where a factorisation breaks down."""
        ...


def cholesky_work(side: float) -> float:
    """Operations of a Cholesky, at the speed of a matrix product."""
    return CHOLESKY * side**3 / 3


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
