"""Directions whose part of a trace is summed exactly, although they are not quite invariant.

V (N, r) orthonormal, from a Krylov space with the next block Q: K V = V X + Q M, X diagonal, Q
orthogonal to V. With P = I - V V', D = I + X, L = (I + P K P)^-1 and f(x) = x/(1 + x), eliminating
V from (I + K)^-1 gives the blocks of f(K), in orders of M,

    V'f V = f(X) - D^-1 M'B M D^-1 - ...      B = Q'L Q (w, w)
    V'f P = D^-1 M'Q'L P - ...
    P f P = f(P K P) - L Q M D^-1 M'Q'L - ...

In tr f(K) the coupling is of second order; in tr(R f(K) R'), whose R mixes V with its complement,
of first. A probe z of the complement comes with L P z, the solution that its quadrature is made of,
so each term is estimated without a further product, B by the mean of (Q'L P z)(Q'z)'. What is left
is smaller by |M D^-1/2|^2 than what was added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flataudit.solvers.krylov import BlockLanczos, Ritz


class Deflation:
    """V, X, Q and M as above; `inner`: sum of (Q'L P z)(Q'z)' over `count` probes z."""

    NAMES = ("vectors", "values", "block", "outside", "inner", "count")

    def __init__(self, vectors: Tensor, values: Tensor, block: Tensor, outside: Tensor) -> None:
        self.vectors, self.values, self.block, self.outside = vectors, values, block, outside
        width = block.shape[1]
        self.inner, self.count = block.new_zeros(width, width), block.new_zeros(())

    @classmethod
    def none(cls, like: Tensor) -> Deflation:
        """No directions, of vectors of length len(like)."""
        empty = like.new_zeros(len(like), 0)
        return cls(empty, like.new_zeros(0), empty, like.new_zeros(0, 0))

    @classmethod
    def of(cls, lanczos: BlockLanczos, ritz: Ritz, within: float) -> Deflation:
        """The Ritz vectors of a space with residuals of at most `within` times sqrt(1 + x)."""
        keep = ritz.residuals <= within * (1.0 + ritz.values).sqrt()
        vectors = lanczos.basis @ ritz.vectors[:, keep]
        return cls(vectors, ritz.values[keep], lanczos.following, ritz.outside[:, keep])

    @property
    def _weighted(self) -> Tensor:
        """M D^-1 (w, r)."""
        return self.outside / (1.0 + self.values)

    @property
    def ratio(self) -> float:
        """|M D^-1/2|^2, by which each order is smaller than the one before."""
        if not self.outside.numel():
            return 0.0
        scaled = self.outside * (1.0 + self.values).rsqrt()
        return float(torch.linalg.matrix_norm(scaled, ord=2)) ** 2

    def probe(self, z: Tensor, left: Tensor) -> None:
        """Takes in probes z (N, m) of random signs and their L P z."""
        self.inner += (self.block.T @ left) @ (z.T @ self.block)
        self.count += z.shape[1]

    def excess(self, residuals: Tensor, z: Tensor, left: Tensor) -> Tensor:
        """tr(R'B R) as each probe z (N, m) tells it, from L P z: (m,).

        By that much quadratures of the same space with the residuals Q R, R (w, t), are too large;
        they are by tr(R'B (I - M D^-1 M'B)^-1 R), whose next order is smaller by `ratio`.
        """
        there, here = (residuals.T @ (self.block.T @ u) for u in (left, z))
        return (there * here).sum(dim=0)

    def across(self, left: Tensor) -> Tensor:
        """V D^-1 M'Q'L P z (N, m) from L P z: the first order, within V."""
        return self.vectors @ (self._weighted.T @ (self.block.T @ left))

    def beyond(self, left: Tensor) -> Tensor:
        """z'L Q M D^-1 M'Q'L z (m,) from L P z: the second order, in the complement."""
        scaled = self.outside * (1.0 + self.values).rsqrt()
        return (scaled.T @ (self.block.T @ left)).square().sum(dim=0)

    def within(self, rows: Tensor | None = None) -> float:
        """tr(T D^-1 M'B M D^-1 T') for T = rows (n, r), by default I: the second order, in V."""
        if not float(self.count):
            return 0.0
        t = self._weighted.T if rows is None else rows @ self._weighted.T
        return float((t * (t @ (self.inner + self.inner.T))).sum() / (2.0 * self.count))

    def state(self) -> dict[str, Tensor]:
        """What `restored` needs; clones of what goes on in place."""
        whole = {name: getattr(self, name) for name in self.NAMES}
        return whole | {"inner": self.inner.clone(), "count": self.count.clone()}

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> Deflation:
        found = cls(*(state[name] for name in cls.NAMES[:4]))
        found.inner, found.count = state["inner"].clone(), state["count"].clone()
        return found
