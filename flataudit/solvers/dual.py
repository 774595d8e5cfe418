"""Exact solver in output space: N x N with N = n K', for N below P.

With B1 the penalised and B0 the free columns of B = S'J/sqrt(n), M = I + B1 D1^-1 B1' and
W = M^-1, the matrix B (G + D)^+ B' whose diagonal blocks are the Q_i is

    I - W + W B0 (B0' W B0)^+ B0' W                       (universal kriging's explicit basis)

Everything follows from X = L^-1, M = L L': W_ii = X_i'X_i needs only the columns X_i. One
Cholesky and one triangular inverse in place, N^3/3 flops each, then O(N^2 (K' + P0)).
"""

from __future__ import annotations

import numpy as np
import scipy.linalg.lapack as lapack
import torch
from torch import Tensor

from flataudit.curvature.gram import gram, gram_bytes
from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError
from flataudit.solvers.base import (
    EIGENVALUE_LIMIT,
    FunctionalVariance,
    Penalty,
    pseudo_inverse_root,
)

SAMPLES_PER_BLOCK = 64
SMALL = 512  # below this a triangular inverse is one call


class Dual:
    """Cholesky and triangular inverse of the N x N Gram matrix."""

    name = "dual"
    exact = True

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        # On a GPU the factor is a second N x N matrix; LAPACK works in place.
        copies = 0 if problem.device.type == "cpu" else 1
        return gram_bytes(problem, penalty) + 8 * copies * problem.n_rows**2

    def solve(
        self, problem: Problem, penalty: Penalty, *, spectrum: bool = False
    ) -> FunctionalVariance:
        n, k = problem.n_samples, problem.n_columns
        parts = gram(problem, penalty)
        matrix, b0 = parts.matrix, parts.b0
        ratios = None
        if spectrum and problem.n_rows <= EIGENVALUE_LIMIT:
            # Only as many as there are penalised parameters differ from zero.
            values = torch.linalg.eigvalsh(matrix, UPLO="U").flip(0).clamp_min(0.0)
            ratios = values[: problem.n_params - b0.shape[1]]
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
    """X' = L^-T (upper triangular, C order) of M = L L' from M's upper triangle, in place.

    On the CPU by LAPACK dpotrf and dtrtri on the transposed view, which is Fortran order: in C
    order the triangular inverse costs three times as much.
    """
    if matrix.device.type == "cpu":
        fortran = matrix.numpy().T
        factor, info = lapack.dpotrf(fortran, lower=1, clean=1, overwrite_a=1)
        _check(info)
        inverse, info = lapack.dtrtri(factor, lower=1, overwrite_c=1)
        _check(info)
        transposed: Tensor = torch.from_numpy(np.asarray(inverse).T)
        return transposed
    lower, code = torch.linalg.cholesky_ex(matrix.mT)
    _check(int(code))
    invert_lower_(lower)
    upper: Tensor = lower.mT
    return upper


def invert_lower_(lower: Tensor) -> None:
    """In-place inverse of a lower triangular matrix by halves, in matrix products.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]].
    """
    n = len(lower)
    if n <= SMALL:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = n // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    below.copy_(-(second @ (below @ first)))


def _check(info: int) -> None:
    if info:
        raise NumericalError(
            f"expected a positive definite Gram matrix, got a breakdown at row {info}; likely"
            " causes: a penalty far below 1e-14 of the curvature, or weights near overflow;"
            " raise the penalty or use solver=primal"
        )


def _diagonal_blocks(x: Tensor, n: int, k: int) -> Tensor:
    """W_ii = X_i' X_i (n, K', K'); rows of x are zero before their own diagonal."""
    blocks: Tensor = torch.empty(n, k, k, dtype=x.dtype, device=x.device)
    for start in range(0, n, SAMPLES_PER_BLOCK):
        stop = min(start + SAMPLES_PER_BLOCK, n)
        rows = x[start * k : stop * k, start * k :].view(stop - start, k, -1)
        torch.bmm(rows, rows.mT, out=blocks[start:stop])
    return blocks
