"""Exact solver in parameter space: P x P, for P up to N.

With E = G11 + D1 the penalised block (positive definite) and C = G00 - G01 E^-1 G10 the Schur
complement of the free parameters,

    Q_i = Z_i Z_i',  Z_i = [B1 E^-1/2, R C^(+1/2)],  R = B0 - B1 E^-1 G10     (rows of sample i)

so a null space among the free parameters (softmax's class shift, collinear columns) is met by the
pseudo-inverse of the small matrix C alone. For a model that is one Linear layer Z = B T with
T T' = (G + D)^+, and neither G nor B T needs the rows of B (`flataudit.curvature.linear`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flataudit.curvature.linear import is_linear_layer, linear_model
from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError
from flataudit.solvers.base import (
    EIGENVALUE_LIMIT,
    JACOBIAN,
    TRIANGULAR,
    FunctionalVariance,
    Penalty,
    cholesky_work,
    pseudo_inverse_root,
    spectrum_of,
)
from flataudit.solvers.triangular import cholesky_, invert_lower_


class Primal:
    """Cholesky of the P x P penalised GGN, two passes over the data."""

    name = "primal"
    exact = True

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        p, k = problem.n_params, problem.n_columns
        chunk = 8 * k * p * min(problem.n_samples, _chunk(problem))
        return 8 * 3 * p * p + 3 * chunk + 8 * 2 * problem.n_rows * k

    def work(self, problem: Problem, penalty: Penalty) -> float:
        p, rows, k = float(problem.n_params), float(problem.n_rows), problem.n_columns
        if is_linear_layer(problem):
            # G by pairs of outputs; the triangular inverse; B T, of which half is zero, and S_i'.
            n, outputs = float(problem.n_samples), problem.n_outputs
            products = n * p**2 * (1 + 1 / outputs) + TRIANGULAR * p**3 / 3
            products += n * p**2 + 2 * rows * outputs * p
        else:
            products = 2 * JACOBIAN * rows * p  # twice: for G, and to be whitened
            # B'B and the triangular solve for every row.
            products += 2 * rows * p**2 + TRIANGULAR * rows * p**2
        return products + 2 * rows * k * p + cholesky_work(p)  # with the blocks Q_i

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        n, k = problem.n_samples, problem.n_columns
        d = torch.cat([penalty[name].flatten() for name in problem.params])
        tied, free = torch.nonzero(d > 0).flatten(), torch.nonzero(d == 0).flatten()
        model = linear_model(problem)
        ggn = _ggn(problem) if model is None else model.ggn()
        trace = float(ggn.diagonal().sum())
        # Scaling by D1^-1/2 makes the penalty the identity and the spectrum the ratios.
        scale = d[tied].rsqrt()
        cross, schur = scale[:, None] * ggn[:, free][tied], ggn[free][:, free]
        inner = ggn if not len(free) else ggn[tied][:, tied]
        del ggn
        inner.mul_(scale[:, None]).mul_(scale)
        ratios = None
        if spectrum and len(tied) <= EIGENVALUE_LIMIT:
            ratios = spectrum_of(inner)[: problem.n_rows]
        inner.diagonal().add_(1.0)
        lower, row = cholesky_(inner)
        if row:
            raise NumericalError(
                f"expected a positive definite penalised GGN, got a breakdown at row {row};"
                " likely causes: weights near overflow or a penalty far below 1e-14 of the"
                " curvature; raise the penalty or use solver=dual"
            )
        cross = torch.linalg.solve_triangular(lower, cross, upper=False)
        root = pseudo_inverse_root(schur - cross.T @ cross)
        factor = _Factor(lower, cross, root, scale, tied, free)
        q = torch.zeros(n, k, k, dtype=torch.float64, device=problem.device)
        mean = torch.zeros(len(tied) + root.shape[1], dtype=torch.float64, device=problem.device)
        tiles = _tiles(problem, factor) if model is None else model.times(factor.dense())
        for at, columns, z in tiles:
            mean[columns] += torch.einsum("ik,ikp->p", problem.factor.residual[at], z)
            q[at] += z @ z.mT
        eye = torch.eye(k, dtype=torch.float64, device=problem.device)
        return FunctionalVariance(q, eye - q, float(mean.square().sum()) / n, trace, ratios)


@dataclass(frozen=True, slots=True, eq=False)
class _Factor:
    """T with T T' = (G + D)^+: lower L of the scaled E = L L'; cross L^-1 G10; root C^(+1/2)."""

    lower: Tensor
    cross: Tensor
    root: Tensor
    scale: Tensor
    tied: Tensor
    free: Tensor

    def times(self, rows: Tensor) -> Tensor:
        """Z = B T for these rows of B."""
        scaled = (rows[:, self.tied] * self.scale).T
        whitened: Tensor = torch.linalg.solve_triangular(self.lower, scaled, upper=False).T
        if not len(self.free):
            return whitened
        rest = rows[:, self.free] - whitened @ self.cross
        return torch.cat([whitened, rest @ self.root], dim=1)

    def dense(self) -> Tensor:
        """T itself (P, P1 + rank C), upper triangular but for the last columns; L is used up."""
        invert_lower_(self.lower)
        inverse = self.lower.mT.mul_(self.scale[:, None])
        if not len(self.free):
            return inverse
        tied, rank = len(self.tied), self.root.shape[1]
        t = inverse.new_zeros(tied + len(self.free), tied + rank)
        t[self.tied, :tied] = inverse
        t[self.tied, tied:] = -(inverse @ (self.cross @ self.root))
        t[self.free, tied:] = self.root
        return t


def _ggn(problem: Problem) -> Tensor:
    """G = B'B (P, P), row by row."""
    p = problem.n_params
    ggn = torch.zeros(p, p, dtype=torch.float64, device=problem.device)
    for at in problem.chunks(3 * problem.n_columns * p):
        rows = problem.rows(at).flatten(0, 1)
        ggn.addmm_(rows.T, rows)
    return ggn


def _tiles(problem: Problem, factor: _Factor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Z = B T, chunk by chunk: the samples, all columns, and (c, K', P1 + rank C)."""
    for at in problem.chunks(3 * problem.n_columns * problem.n_params):
        z = factor.times(problem.rows(at).flatten(0, 1))
        yield at, slice(None), z.view(at.stop - at.start, problem.n_columns, -1)


def _chunk(problem: Problem) -> int:
    first = next(problem.chunks(3 * problem.n_columns * problem.n_params))
    return int(first.stop)
