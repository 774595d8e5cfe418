"""How well sampled leave-one-out gaps are known, and what would make them known better.

From the contributions psi_i of all samples and of those without one group each, the jackknife gives
the gap's standard error and its bias of order 1/s (s posterior samples). The bias is taken off, but
what remains is of the next order: small only where the bias itself is. So both have to be below
the tolerance. Refining a sample takes its part of either away; drawing more lets the error fall as
s^-1/2 and the bias as 1/s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Uncertainty:
    """Of the leave-one-out gap once the first h samples of `order` are refined, h = 0..n.

    errors, biases (n + 1,): relative to the gap; order (n,): the largest errors first.
    """

    order: Tensor
    errors: Tensor
    biases: Tensor

    @property
    def now(self) -> float:
        """The larger of error and bias as things stand."""
        return max(float(self.errors[0]), float(self.biases[0]))


def widening(groups: int) -> float:
    """By which a jackknife error from so few groups is wider: a normal 90 % interval is Student's.

    >>> round(widening(16), 3)
    1.066
    """
    return float(stats.t.ppf(0.95, groups - 1) / stats.norm.ppf(0.95))


def uncertainty(psi: Tensor, replicates: Tensor, order: Tensor | None = None) -> Uncertainty | None:
    """From psi (n,) and the replicates (groups, n); None where they are not finite, or zero.

    order: of refinement; by default that of the errors found here.
    """
    groups = len(replicates)
    centre = replicates.mean(dim=0)
    bias = (groups - 1) * (centre - psi)
    gap = float((psi - bias).sum().abs())
    moved = (replicates - centre) * ((groups - 1) / groups) ** 0.5 * widening(groups)
    own = moved.square().sum(dim=0)
    if not bool(torch.isfinite(own).all()) or gap == 0.0:
        return None
    if order is None:
        order = own.argsort(descending=True)
    return Uncertainty(
        order,
        _remaining(moved[:, order]).square().sum(dim=0).sqrt() / gap,
        _remaining(bias[order][None])[0].abs() / gap,
    )


def cheapest(
    found: Uncertainty, tolerance: float, samples: int, columns: int, among: range | None = None
) -> tuple[int, int]:
    """(h, s) that bring error and bias below the tolerance with the fewest systems.

    h samples refined in all, `columns` systems each, `among` those numbers; s posterior samples in
    all, at least `samples`.
    """
    times = torch.maximum((found.errors / tolerance).square(), found.biases / tolerance)
    wanted = (samples * times.clamp_min(1.0)).ceil()
    refined = torch.arange(len(times), device=times.device)
    among = among or range(len(times))
    h = among.start + int((wanted + columns * refined)[among.start : among.stop].argmin())
    return h, int(wanted[h])


def largest_ratio(numerator: Tensor, denominator: Tensor) -> float:
    """The largest eigenvalue of denominator^-1 numerator over a batch of symmetric matrices."""
    lower, info = torch.linalg.cholesky_ex(denominator)
    if bool((info != 0).any()):
        return math.inf
    half = torch.linalg.solve_triangular(lower, numerator, upper=False)
    whole = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return float(torch.linalg.eigvalsh(whole).max())


def _remaining(values: Tensor) -> Tensor:
    """(m, n) to sums over what comes after the first h columns, h = 0..n: (m, n + 1)."""
    ends = values.flip(1).cumsum(dim=1).flip(1)
    return torch.cat([ends, torch.zeros_like(values[:, :1])], dim=1)
