"""Cholesky and triangular inverse where the matrix stands: one N x N array, from start to end.

In place by views: the transpose of a C-ordered matrix is column-major, as LAPACK and cuSOLVER want
it. scipy's own routines were slower by half for the inverse, and its Cholesky crashed at N = 18,000
with two threads (OpenBLAS).
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 512  # columns per product: wide enough for full speed, small beside the matrix


def cholesky_(matrix: Tensor) -> tuple[Tensor, int]:
    """M = L L' from the upper triangle of M (n, n), which L replaces.

    Returns L as a column-major view of `matrix`, and 0, or else the row (from 1) at which M proved
    not to be positive definite.
    """
    lower = matrix.mT
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower, int(info)


def invert_lower_(lower: Tensor) -> None:
    """In-place inverse of a lower triangular matrix by halves, n^3/3 flops as the Cholesky.

    [[A, 0], [B, C]]^-1 = [[A^-1, 0], [-C^-1 B A^-1, C^-1]]. The products skip the zero blocks of
    both triangles, and go panel by panel from the left: a panel of B A^-1 needs only columns of B
    that still stand.
    """
    n = len(lower)
    if n <= PANEL:
        eye = torch.eye(n, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, eye, upper=False))
        return
    half = PANEL * (n // PANEL + 1 >> 1)
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    invert_lower_(first)
    invert_lower_(second)
    for start in range(0, half, PANEL):
        stop = min(start + PANEL, half)
        panel = below[:, start:] @ first[start:, start:stop]
        for top in range(0, n - half, PANEL):
            end = min(top + PANEL, n - half)
            below[top:end, start:stop] = second[top:end, :end] @ panel[:end]
        below[:, start:stop].neg_()
