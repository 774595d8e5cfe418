"""Block Lanczos with full reorthogonalisation, and f(x) = x/(1 + x) of the operator on its start.

The basis Q of span{Z, KZ, ..., K^j Z} gives T = Q'KQ, and with Z = Q C

    z'f(K) z  ~  c'f(T) c            (Gauss quadrature with block nodes, exact for polynomials of
                                      degree 2 j + 1)
    z'f(K) z  =  c'f(T) c - r'(I + K)^-1 r,    r = z - (I + K) Q (I + T)^-1 c

so the quadrature is too large by at most |r|^2, which is known: K is positive semi-definite. That
is a bound, where the change of the quadrature between two sizes is an indication.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flataudit.errors import NumericalError

DEPENDENT = 1e-10  # a direction this small beside the operator's norm is rounding error
CANCELLED = 1e-2  # below this beside the block's largest it holds 1e-14 of the basis: cleaned


@dataclass(frozen=True, slots=True, eq=False)
class Ritz:
    """Ritz values x (J,), vectors Y (J, J) in the basis, residuals |K q - x q| (J,).

    coefficients: Y'C (J, m), the start's columns in the Ritz vectors; outside: M (w, J), with
    K q - x q = Q_next M_q, whose column norms are the residuals.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    coefficients: Tensor
    outside: Tensor


class BlockLanczos:
    """A growing block Krylov space of `apply` (symmetric, positive semi-definite) from `start`.

    start: (N, m); against: (N, r) orthonormal, kept out of the space, or None. The basis is
    (N, J) with J at most `capacity` columns.
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        start: Tensor,
        *,
        against: Tensor | None = None,
        capacity: int,
    ) -> None:
        self._apply = apply
        self._against = against
        n = len(start)
        self._capacity = min(n, max(capacity, start.shape[1]))
        self._store = start.new_empty(n, min(self._capacity, 4 * start.shape[1]))
        self.size = 0  # J, the columns of the basis that K has been applied to
        self.pending = 0  # columns of the next block, behind them
        self.steps = 0
        self.full = False  # another block does not fit; `coupling` tells what is left out
        self._norm = 0.0
        self.projected = start.new_zeros(0, 0)  # T (J, J)
        block, self.start = self._orthonormal(start, 1.0)
        self.following = block  # Q_next, also where it does not fit any more
        self.coupling = start.new_zeros(block.shape[1], 0)  # Q_next' K Q_last
        self._append(block)

    @property
    def basis(self) -> Tensor:
        """Q (N, J)."""
        return self._store[:, : self.size]

    @property
    def begun(self) -> Tensor:
        """Z (N, m), what the space started from."""
        return self.basis[:, : len(self.start)] @ self.start

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant: nothing is left out."""
        return self.pending == 0 and not self.full

    def extend(self) -> None:
        """Applies K to the last block and appends the next one."""
        width = self.pending
        block = self._store[:, self.size : self.size + width]
        image = self._apply(block)
        old, self.size = self.size, self.size + width
        self.steps += 1
        self._norm = max(self._norm, float(image.norm(dim=0).max()))
        if self._against is not None:
            image = image - self._against @ (self._against.T @ image)
        across = self.basis.T @ image
        projected = image.new_zeros(self.size, self.size)
        projected[:old, :old] = self.projected
        projected[:, old:] = across
        projected[old:, :] = across.T
        projected[old:, old:] = (across[old:] + across[old:].T) / 2
        self.projected = projected
        image = image - self.basis @ across
        following, self.coupling = self._orthonormal(image, self._norm)
        self.following = following
        self.full = self.size + following.shape[1] > self._capacity
        self._append(following[:, :0] if self.full else following)

    def solved(self) -> Tensor:
        """(I + T)^-1 C (J, m): the Galerkin solution of (I + K) x = z in the basis."""
        shifted = self.projected + torch.eye(
            self.size, dtype=self.projected.dtype, device=self.projected.device
        )
        right = shifted.new_zeros(self.size, self.start.shape[1])
        right[: len(self.start)] = self.start
        lower, info = torch.linalg.cholesky_ex(shifted)
        if int(info):
            raise NumericalError(
                "expected a positive semi-definite curvature, got a breakdown in its Krylov space;"
                " likely causes: weights near overflow, or a penalty far below 1e-14 of the"
                " curvature; raise the penalty"
            )
        solution: Tensor = torch.cholesky_solve(right, lower)
        return solution

    def quadratures(self) -> tuple[Tensor, Tensor]:
        """z'f(K)z per column (m,), and the bounds by which they may be too large (m,)."""
        solution = self.solved()
        values = self.start.square().sum(dim=0) - (self.start * solution[: len(self.start)]).sum(
            dim=0
        )
        return values, self._beyond(solution).square().sum(dim=0)

    def residuals(self) -> Tensor:
        """R (w, m) of the residuals r = Q_next R."""
        return self._beyond(self.solved())

    def _beyond(self, solution: Tensor) -> Tensor:
        width = self.coupling.shape[1]
        found: Tensor = self.coupling @ solution[self.size - width :]
        return found

    def ritz(self) -> Ritz:
        """Eigenvalues and vectors of T, with their residuals."""
        values, vectors = torch.linalg.eigh(self.projected)
        width = self.coupling.shape[1]
        outside = self.coupling @ vectors[self.size - width :]
        coefficients = vectors[: len(self.start)].T @ self.start
        return Ritz(values.clamp_min(0.0), vectors, outside.norm(dim=0), coefficients, outside)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here."""
        used = self.size + self.pending
        return {
            "basis": self._store[:, :used],
            "size": torch.tensor([self.size, self.pending, self.steps, int(self.full)]),
            "norm": torch.tensor(self._norm, dtype=torch.float64),
            "projected": self.projected,
            "coupling": self.coupling,
            "following": self.following,
            "start": self.start,
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from a saved state of the same operator and start."""
        device = self._store.device
        self._store = state["basis"].to(device)
        self.size, self.pending, self.steps, full = state["size"].tolist()
        self.full = bool(full)
        self._norm = float(state["norm"])
        self.projected = state["projected"].to(device)
        self.coupling = state["coupling"].to(device)
        self.following = state["following"].to(device)
        self.start = state["start"].to(device)

    def _orthonormal(self, block: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(Q, R) with block = Q R up to rounding, Q orthogonal to the basis and to `against`.

        Twice is enough (Kahan), and `extend` has been the first time; another pass cleans
        directions that cancelled almost entirely.
        """
        block = self._cleaned(block)
        q, r = torch.linalg.qr(block)
        u, s, _ = torch.linalg.svd(r, full_matrices=False)
        keep = s > DEPENDENT * max(scale, float(s[0]) if self.size == 0 else 0.0)
        q = q @ u[:, keep]
        if q.shape[1] and float(s[keep][-1] / s[0]) < CANCELLED:
            q = torch.linalg.qr(self._cleaned(q)).Q
        return q, q.T @ block

    def _cleaned(self, block: Tensor) -> Tensor:
        if self.size:
            block = block - self.basis @ (self.basis.T @ block)
        if self._against is not None:
            block = block - self._against @ (self._against.T @ block)
        return block

    def _append(self, block: Tensor) -> None:
        self.pending = block.shape[1]
        used = self.size + self.pending
        if used > self._store.shape[1]:
            # A multiple of two at most, so that planning the capacity covers the copy.
            wider = min(max(used, 2 * self._store.shape[1]), self._capacity)
            store = self._store.new_empty(self._store.shape[0], wider)
            store[:, : self.size] = self.basis
            self._store = store
        self._store[:, self.size : used] = block
