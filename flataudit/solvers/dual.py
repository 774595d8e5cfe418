"""Exact solver in output space: N x N with N = n K', for N below P.

With B1 the penalised and B0 the free columns of B = S'J/sqrt(n), M = I + B1 D1^-1 B1' and
W = M^-1, the matrix B (G + D)^+ B' whose diagonal blocks are the Q_i is

    I - W + W B0 (B0' W B0)^+ B0' W                       (universal kriging's explicit basis)

Everything follows from X = L^-1, M = L L': W_ii = X_i'X_i needs only the columns X_i. One
Cholesky and one triangular inverse in place, N^3/3 flops each, then O(N^2 (K' + P0)).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flataudit.curvature.gram import gram, gram_bytes, gram_work
from flataudit.curvature.problem import Problem
from flataudit.errors import BreakdownError
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

SAMPLES_PER_BLOCK = 64


class Dual:
    """Cholesky and triangular inverse of the N x N Gram matrix."""

    name = "dual"
    exact = True

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        return gram_bytes(problem, penalty)

    def work(self, problem: Problem, penalty: Penalty) -> float:
        counted = gram_work(problem, penalty)
        rows, k = float(problem.n_rows), problem.n_columns
        # The Cholesky and the triangular inverse; blocks X_i'X_i; X'B0 and what follows from it.
        factor = cholesky_work(rows) + TRIANGULAR * rows**3 / 3
        factor += rows**2 * k + 2 * rows**2 * counted.free
        return counted.products + JACOBIAN * counted.entries + factor

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        n, k = problem.n_samples, problem.n_columns
        parts = gram(problem, penalty)
        matrix, b0 = parts.matrix, parts.b0
        ratios = None
        if spectrum and problem.n_rows <= EIGENVALUE_LIMIT:
            # Only as many as there are penalised parameters differ from zero.
            ratios = spectrum_of(matrix)[: problem.n_params - b0.shape[1]]
        matrix.diagonal().add_(1.0)
        # x is X' = L^-T, upper triangular in C order: row i is the column X_i.
        x = inverse_factor(matrix)
        v = problem.factor.residual.reshape(-1)
        xv = x.T @ v
        energy = float(v @ v - xv @ xv)
        complement = _diagonal_blocks(x, n, k)
        if b0.shape[1]:
            xb0 = x.T @ b0
            t = x @ (xb0 @ pseudo_inverse_root(xb0.T @ xb0))
            blocks = t.view(n, k, -1)
            complement -= blocks @ blocks.mT
            energy += float((t.T @ v).square().sum())
        eye = torch.eye(k, dtype=torch.float64, device=problem.device)
        return FunctionalVariance(eye - complement, complement, energy / n, parts.trace_ggn, ratios)


def inverse_factor(matrix: Tensor) -> Tensor:
    """X' = L^-T (upper triangular, C order) of M = L L' from M's upper triangle, in place."""
    lower, row = cholesky_(matrix)
    if row:
        raise BreakdownError(
            f"expected a positive definite Gram matrix, got a breakdown at row {row}; likely"
            " causes: a penalty far below 1e-14 of the curvature, or weights near overflow;"
            " raise the penalty or use solver=primal"
        )
    invert_lower_(lower)
    return matrix


def _diagonal_blocks(x: Tensor, n: int, k: int) -> Tensor:
    """W_ii = X_i' X_i (n, K', K'); rows of x are zero before their own diagonal."""
    blocks: Tensor = torch.empty(n, k, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, SAMPLES_PER_BLOCK):
        stop = min(start + SAMPLES_PER_BLOCK, n)
        rows = x[start * k : stop * k, start * k :].view(stop - start, k, -1)
        torch.bmm(rows, rows.mT, out=blocks[start:stop])
    return blocks
