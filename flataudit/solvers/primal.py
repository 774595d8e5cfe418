"""Exact solver in parameter space: P x P, for P up to N.

With E = G11 + D1 the penalised block (positive definite) and C = G00 - G01 E^-1 G10 the Schur
complement of the free parameters,

    Q_i = B1 E^-1 B1' + R C^+ R',   R = B0 - B1 E^-1 G10        (rows of sample i)

so a null space among the free parameters (softmax's class shift, collinear columns) is met by the
pseudo-inverse of the small matrix C alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
        jacobian = 2 * JACOBIAN * rows * p  # twice: for G, and to be whitened
        # B'B, the triangular solve for every row, the blocks Q_i; the Cholesky.
        products = 2 * rows * p**2 + TRIANGULAR * rows * p**2 + 2 * rows * k * p
        return jacobian + products + cholesky_work(p)

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        n, k = problem.n_samples, problem.n_columns
        d = torch.cat([penalty[name].flatten() for name in problem.params])
        tied, free = torch.nonzero(d > 0).flatten(), torch.nonzero(d == 0).flatten()
        ggn = torch.zeros(len(d), len(d), dtype=torch.float64, device=problem.device)
        for at in problem.chunks(3 * k * problem.n_params):
            rows = problem.rows(at).flatten(0, 1)
            ggn.addmm_(rows.T, rows)
        trace = float(ggn.diagonal().sum())
        # Scaling by D1^-1/2 makes the penalty the identity and the spectrum the ratios.
        scale = d[tied].rsqrt()
        inner = scale[:, None] * ggn[tied][:, tied] * scale
        ratios = None
        if spectrum and len(tied) <= EIGENVALUE_LIMIT:
            ratios = spectrum_of(inner)[: problem.n_rows]
        inner.diagonal().add_(1.0)
        lower, info = torch.linalg.cholesky_ex(inner)
        if int(info):
            raise NumericalError(
                f"expected a positive definite penalised GGN, got a breakdown at row {int(info)};"
                " likely causes: weights near overflow or a penalty far below 1e-14 of the"
                " curvature; raise the penalty or use solver=dual"
            )
        cross = torch.linalg.solve_triangular(
            lower, scale[:, None] * ggn[tied][:, free], upper=False
        )
        root = pseudo_inverse_root(ggn[free][:, free] - cross.T @ cross)
        del ggn
        q = torch.empty(n, k, k, dtype=torch.float64, device=problem.device)
        mean = torch.zeros(len(tied) + root.shape[1], dtype=torch.float64, device=problem.device)
        for at in problem.chunks(3 * k * problem.n_params):
            rows = problem.rows(at).flatten(0, 1)
            z = _half(rows, lower, cross, root, scale, tied, free)
            mean += problem.factor.residual[at].reshape(-1) @ z
            blocks = z.view(at.stop - at.start, k, -1)
            q[at] = blocks @ blocks.mT
        eye = torch.eye(k, dtype=torch.float64, device=problem.device)
        return FunctionalVariance(q, eye - q, float(mean.square().sum()) / n, trace, ratios)


def _half(
    rows: Tensor,
    lower: Tensor,
    cross: Tensor,
    root: Tensor,
    scale: Tensor,
    tied: Tensor,
    free: Tensor,
) -> Tensor:
    """Z with Z Z' = B (G + D)^+ B' for these rows of B: [B1 E^-1/2, R C^(+1/2)]."""
    scaled = (rows[:, tied] * scale).T
    whitened: Tensor = torch.linalg.solve_triangular(lower, scaled, upper=False).T
    if not len(free):
        return whitened
    return torch.cat([whitened, (rows[:, free] - whitened @ cross) @ root], dim=1)


def _chunk(problem: Problem) -> int:
    first = next(problem.chunks(3 * problem.n_columns * problem.n_params))
    return int(first.stop)
