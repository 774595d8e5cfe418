"""Sums over probes: what they make of a mean, its standard error and a quadrature's bound."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import t

from flataudit.solvers.probes import ProbeSums


def test_few_probes_widen_the_stated_error():
    """1.96 of it are Student's t standard errors of as many probes; a quadrature's bound is halved
    on either side of the middle."""
    generator = torch.Generator().manual_seed(3)
    matrix = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    matrix = matrix @ matrix.T
    signs = 2.0 * torch.randint(0, 2, (30, 5), generator=generator).double() - 1.0
    parts = signs * (matrix @ signs)
    sums = ProbeSums(30, 10, torch.device("cpu"))
    bounds = torch.full((5,), 0.4, dtype=torch.float64)
    sums.add(parts.sum(dim=0), bounds, parts, torch.zeros(5, dtype=torch.float64))
    trace = sums.trace(torch.zeros(10, dtype=torch.float64), within=0.0, ratio=0.0)
    plain = math.sqrt(2.0 * float(parts.var(dim=1).sum()) / 5)
    assert 1.96 * trace.monte_carlo_se == pytest.approx(t.ppf(0.975, 4) * plain, rel=1e-4)
    assert trace.value == pytest.approx(float(parts.sum()) / 5 - 0.2)
    assert trace.truncation == pytest.approx(0.2)
