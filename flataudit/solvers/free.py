"""The unpenalised directions: an orthonormal basis Q0 of the range of B0, held or streamed.

Held, it is N x P0 numbers, three times. Where that is too much it is Z = B0 R, of which only
R (P0, rank) is held, and every projection goes through the network once more each way; R is made
orthonormal twice (as in Cholesky QR2, Yamamoto et al. 2015), since B0'B0 squares the condition.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flataudit.curvature.problem import CHUNK_BYTES, Problem
from flataudit.solvers.base import pseudo_inverse_root
from flataudit.solvers.passes import Passes

HELD_BYTES = 2 * 2**30  # of Q0 with QR's work, beyond which it is streamed


class FreeDirections(Protocol):
    """rank: of B0, what the unpenalised parameters add to the soft rank; trace: |B0|^2.

    leverage: sum of Q0's squares by sample (n,); tic: |v_i'Q0_i|^2 (n,); energy: |v'Q0|^2.
    """

    rank: int
    trace: float
    leverage: Tensor
    tic: Tensor
    energy: float

    def project(self, v: Tensor) -> Tensor:
        """v less its part in the range of B0."""
        ...


def free_directions(
    problem: Problem, names: Sequence[str], *, dtype: torch.dtype | None = None
) -> FreeDirections:
    """Those of the parameters `names`, held where that is small enough."""
    size = sum(problem.params[name].numel() for name in names)
    if _held_bytes(problem, size) <= HELD_BYTES:
        return Held(problem, names)
    return Streamed(problem, names, dtype=dtype)


class Held:
    """`basis` Q0 (N, rank)."""

    def __init__(self, problem: Problem, names: Sequence[str]) -> None:
        n_free = sum(problem.params[name].numel() for name in names)
        columns = torch.zeros(problem.n_rows, n_free, dtype=torch.float64, device=problem.device)
        for at, rows in _rows(problem, names):
            columns[at] = rows
        self.trace = float(columns.square().sum())
        basis = columns @ pseudo_inverse_root(columns.T @ columns)
        del columns  # before QR, which takes two arrays more
        if basis.shape[1]:
            basis = torch.linalg.qr(basis).Q
        self.basis, self.rank = basis, basis.shape[1]
        v = problem.factor.residual
        blocks = basis.view(*v.shape, self.rank)
        along = torch.einsum("nk,nkr->nr", v, blocks)
        self.leverage = blocks.square().sum(dim=(1, 2))
        self.tic = along.square().sum(dim=1)
        self.energy = float(along.sum(dim=0).square().sum())

    def project(self, v: Tensor) -> Tensor:
        # Twice is enough.
        v = v - self.basis @ (self.basis.T @ v)
        return v - self.basis @ (self.basis.T @ v)


class Streamed:
    """`root` R (P0, rank) with Z = B0 R orthonormal; three sweeps over B0's rows to begin with."""

    def __init__(
        self, problem: Problem, names: Sequence[str], *, dtype: torch.dtype | None = None
    ) -> None:
        self._passes = Passes(problem, names, dtype=dtype)
        size, device = self._passes.size, problem.device
        gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        for _, rows in _rows(problem, names):
            gram.addmm_(rows.T, rows)
        self.trace = float(gram.diagonal().sum())
        root = pseudo_inverse_root(gram)
        del gram
        again = torch.zeros(root.shape[1], root.shape[1], dtype=torch.float64, device=device)
        for _, rows in _rows(problem, names):
            z = rows @ root
            again.addmm_(z.T, z)
        lower = torch.linalg.cholesky(again)
        self.root = torch.linalg.solve_triangular(lower, root.T, upper=False).T
        self.rank = self.root.shape[1]
        k, v = problem.n_columns, problem.factor.residual
        leverage, tic, total = [], [], torch.zeros(self.rank, dtype=torch.float64, device=device)
        for at, rows in _rows(problem, names):
            z = (rows @ self.root).view(-1, k, self.rank)
            along = torch.einsum("nk,nkr->nr", v[at.start // k : at.stop // k], z)
            leverage.append(z.square().sum(dim=(1, 2)))
            tic.append(along.square().sum(dim=1))
            total += along.sum(dim=0)
        self.leverage, self.tic = torch.cat(leverage), torch.cat(tic)
        self.energy = float(total.square().sum())

    def project(self, v: Tensor) -> Tensor:
        pulled = self._passes.pull(v)
        flat = torch.cat([pulled[name].flatten(1) for name in self._passes.names], dim=1)
        back = (flat @ self.root) @ self.root.T
        sizes = [pulled[name][0].numel() for name in self._passes.names]
        parts = zip(self._passes.names, back.split(sizes, dim=1), strict=True)
        return v - self._passes.push({k: part.view(pulled[k].shape) for k, part in parts})


def free_parameters(problem: Problem, penalty: Mapping[str, Tensor]) -> int:
    """P0, the number of unpenalised parameters."""
    return sum(p.numel() for name, p in problem.params.items() if not bool(penalty[name].any()))


def free_bytes(problem: Problem, penalty: Mapping[str, Tensor], m: int = 0) -> int:
    """Planned bytes for the free directions, held or streamed; m: vectors projected together."""
    n_free = free_parameters(problem, penalty)
    held = _held_bytes(problem, n_free)
    small = 8 * 4 * n_free**2
    if held <= HELD_BYTES:
        return held + small
    return small + 8 * m * (4 * n_free + 2 * problem.n_rows) + 4 * CHUNK_BYTES


def _held_bytes(problem: Problem, n_free: int) -> int:
    return 8 * 3 * problem.n_rows * n_free


def _rows(problem: Problem, names: Sequence[str]) -> Iterator[tuple[slice, Tensor]]:
    """B0's rows (c K', P0) chunk by chunk, with where they stand."""
    if not names:
        return
    k = problem.n_columns
    size = sum(problem.params[name].numel() for name in names)
    for at in problem.chunks(2 * k * size):
        yield slice(at.start * k, at.stop * k), problem.rows(at, names).flatten(0, 1)
