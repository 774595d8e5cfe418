"""Traces from probes of random signs: the mean, and its standard error from few of them.

For tr(F) = E z'F z the variance of one probe is 2 sum_{i != j} F_ij^2 = 2 sum_i Var(z_i (F z)_i):
the per-coordinate variances over m probes tell it far better than the m values themselves.
"""

from __future__ import annotations

import math

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from flataudit.solvers.base import Trace

CONFIDENCE = 1.96  # standard errors in an error that is held against a tolerance
_LEVEL = float(ndtr(CONFIDENCE))  # as a quantile


class ProbeSums:
    """Sums over the probes of one kind, of which only sums over probes are kept."""

    def __init__(self, rows: int, samples: int, device: torch.device) -> None:
        zero = torch.zeros((), dtype=torch.float64, device=device)
        self.count, self.total, self.bound = zero.clone(), zero.clone(), zero.clone()
        self.coupling = zero.clone()
        self.row, self.row_square = (zero.new_zeros(rows) for _ in range(2))
        self.sample, self.sample_square = (zero.new_zeros(samples) for _ in range(2))

    NAMES = ("count", "total", "bound", "coupling", "row", "row_square", "sample", "sample_square")

    def add(self, values: Tensor, bounds: Tensor, parts: Tensor, coupling: Tensor) -> None:
        """values, bounds (m,); parts z_i (F z)_i (rows, m), whose sums are the values; coupling
        (m,): what the deflated directions take off a value beyond that."""
        self.count += len(values)
        self.total += values.sum() - coupling.sum()
        self.coupling += coupling.sum()
        self.bound += bounds.sum()
        self.row += parts.sum(dim=1)
        self.row_square += parts.square().sum(dim=1)
        samples = parts.view(len(self.sample), -1, parts.shape[1]).sum(dim=1)
        self.sample += samples.sum(dim=1)
        self.sample_square += samples.square().sum(dim=1)

    @property
    def variance(self) -> float:
        """Of one probe's value: 2 sum_i Var(z_i (F z)_i) = 2 sum_{i != j} F_ij^2."""
        return 2.0 * float(_variances(self.row, self.row_square, self.count).sum())

    @property
    def widening(self) -> float:
        """Student's t over the normal quantile: the variance is known from `count` probes alone.

        Pooled over the rows it is known better than that, so intervals are wider than they need
        be, if anything.
        """
        return float(stdtrit(float(self.count) - 1.0, _LEVEL)) / CONFIDENCE

    def trace(self, exact: Tensor, within: float, ratio: float) -> Trace:
        """exact: the samples' part that no probe estimates (n,), and what is taken off their sum;
        ratio: of what is left out to the coupling that was taken off."""
        m = float(self.count)
        left_out = ratio / (1.0 - min(ratio, 0.5)) * (within + float(self.coupling) / m)
        noise = float(_variances(self.sample, self.sample_square, self.count).mean()) / m
        half = float(self.bound) / m / 2.0
        return Trace(
            value=float(exact.sum() + self.total / m) - half - within,
            monte_carlo_se=self.widening * math.sqrt(self.variance / m),
            truncation=half + left_out,
            rough=exact + self.sample / m,
            noise=noise,
        )


def _variances(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    return ((squares - total.square() / count) / (count - 1)).clamp_min(0.0)
