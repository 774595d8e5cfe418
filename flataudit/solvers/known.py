"""TIC's part of the few samples that carry most of it: known by quadrature, without a probe.

For n TIC = sum_i v_i'f(K)_ii v_i the variance over probes of random signs is the sum of
2 (v_i'f(K)_ij v_j)^2 over i /= j, and |v_i| is heavy-tailed: the samples that a fitted model gets
wrong are few. A Krylov space that starts from R'e_i of these, R = blockdiag(v_i'), gives each its
part; probes are then zero on them.

Such a quadrature is too large, by at most the squared residual of its linear system, and where the
space is full before that is small, by half a percent of TIC. The probes of the soft rank tell by
how much (`flataudit.solvers.deflation.Deflation.excess`).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flataudit.solvers.base import Trace
from flataudit.solvers.deflation import Deflation


class KnownSamples:
    """The `most` samples with the largest |v_i|, at most half of them.

    index (t,); tic: v_i'f(K)_ii v_i of these, zero elsewhere (n,); residuals R (w, t) of their
    systems, in the next block of the space; excess: sum over probes of what each tells about the
    excess of all together, and of its square (2,).
    """

    NAMES = ("tic", "residuals", "excess")

    def __init__(self, v: Tensor, most: int) -> None:
        n = len(v)
        size = v.square().sum(dim=1)
        self.index = size.argsort(descending=True, stable=True)[: min(most, n // 2)]
        self.tic, self.residuals = v.new_zeros(n), v.new_zeros(0, len(self.index))
        self.excess = v.new_zeros(2)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def units(self) -> Tensor:
        """e_i of these samples, (n, t)."""
        return one_hot(self.index, len(self.tic)).T

    def without(self, rows: Tensor) -> Tensor:
        """rows (n, ...) with zeros at these samples."""
        return rows.index_fill(0, self.index, 0.0)

    def take(self, values: Tensor, residuals: Tensor) -> None:
        """Their quadratures (t,) and R (w, t)."""
        self.tic[self.index] = values
        self.residuals = residuals

    def probe(self, deflation: Deflation, z: Tensor, left: Tensor) -> None:
        """Takes in probes z (N, m) of random signs and their L P z."""
        found = deflation.excess(self.residuals, z, left)
        self.excess += torch.stack([found.sum(), found.square().sum()])

    def less_excess(self, tic: Trace, deflation: Deflation, widening: float) -> Trace:
        """TIC without what these quadratures are too large by.

        widening: of a standard error from so few probes (`flataudit.solvers.probes`).
        """
        bounds = self.residuals.square().sum(dim=0)
        bound, m = float(bounds.sum()), float(deflation.count)
        if not bound:
            return tic
        mean, square = (float(t) / m for t in self.excess)
        excess, ratio = min(max(mean, 0.0), bound), min(deflation.ratio, 0.5)
        se = widening * math.sqrt(max(square - mean**2, 0.0) / (m - 1.0))
        return replace(
            tic,
            value=tic.value - excess,
            monte_carlo_se=math.hypot(tic.monte_carlo_se, se),
            truncation=tic.truncation + ratio / (1.0 - ratio) * excess,
            rough=tic.rough.index_add(0, self.index, bounds, alpha=-excess / bound),
        )

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes; clones, as all goes on in place."""
        return {name: getattr(self, name).clone() for name in self.NAMES}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes on from where `state` was."""
        for name in self.NAMES:
            setattr(self, name, state[name].clone())
