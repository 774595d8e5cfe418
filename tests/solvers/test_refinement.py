"""What the jackknife says of a gap, and the cheapest way to know it better."""

from __future__ import annotations

import math

import pytest
import torch

from flataudit.solvers.refinement import cheapest, uncertainty, widening

GROUPS, PER_GROUP, N = 20, 12, 30


def sampled(scale: torch.Tensor, statistic=lambda mean: mean, seed=0):
    """psi and replicates of a statistic of means of draws N(1, scale_i)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(GROUPS, PER_GROUP, N, generator=generator).double() * scale + 1.0
    parts = draws.mean(dim=1)
    total = parts.sum(dim=0)
    without = (total - parts) / (GROUPS - 1)
    return statistic(total / GROUPS), statistic(without)


def test_error_of_a_mean_is_the_textbook_s():
    scale = torch.ones(N).double()
    found = [uncertainty(*sampled(scale, seed=seed)) for seed in range(20)]
    errors = torch.stack([each.errors[0] for each in found])
    wanted = widening(GROUPS) / math.sqrt(GROUPS * PER_GROUP * N)
    assert float(errors.mean()) == pytest.approx(wanted, rel=0.15)
    for each in found:
        assert float(each.biases[0]) < 1e-12  # a mean has none
        assert each.now == float(each.errors[0])


def test_bias_of_a_convex_statistic():
    """exp of a mean is too large by half its variance, to first order."""
    scale = torch.full((N,), 2.0).double()
    found = [uncertainty(*sampled(scale, torch.exp, seed)) for seed in range(40)]
    bias = torch.stack([each.biases[0] for each in found]).mean()
    assert float(bias) == pytest.approx(0.5 * 4.0 / (GROUPS * PER_GROUP), rel=0.3)


def test_what_is_refined_first_and_what_remains():
    scale = torch.full((N,), 0.01).double()
    scale[[4, 17]] = torch.tensor([5.0, 20.0]).double()
    psi, parts = sampled(scale)
    found = uncertainty(psi, parts)
    assert found.order[:2].tolist() == [17, 4]
    assert found.errors[0] > found.errors[1] > 10 * found.errors[2]
    assert float(found.errors[-1]) == 0.0
    # as if those were known: their replicates do not move
    parts[:, [4, 17]] = psi[[4, 17]]
    torch.testing.assert_close(uncertainty(psi, parts).errors[0], found.errors[2], rtol=0.2, atol=0)


def test_a_given_order_is_kept():
    psi, parts = sampled(torch.ones(N).double())
    order = torch.arange(N).flip(0)
    assert torch.equal(uncertainty(psi, parts, order).order, order)


def test_no_uncertainty_without_finite_values():
    psi, parts = sampled(torch.ones(N).double())
    assert uncertainty(psi * 0.0, parts * 0.0) is None
    parts[3, 5] = math.inf
    assert uncertainty(psi, parts) is None


def test_cheapest_weighs_samples_against_refinement():
    few = torch.full((N,), 0.01).double()
    few[7] = 30.0
    found = uncertainty(*sampled(few))
    samples = GROUPS * PER_GROUP
    tolerance = 1.1 * float(found.errors[1])
    h, s = cheapest(found, tolerance, samples, columns=9)
    assert (h, s) == (1, samples)  # one large error: nine systems
    assert cheapest(found, tolerance, samples, columns=9, among=range(3, N + 1))[0] == 3
    h, s = cheapest(found, tolerance, samples, columns=9, among=range(1))
    assert h == 0  # none may be refined: many more samples
    assert s > 10 * samples
    even = uncertainty(*sampled(torch.ones(N).double()))
    h, s = cheapest(even, 0.9 * float(even.errors[0]), samples, columns=1000)
    assert h == 0  # even errors, dear refinement: more samples
    assert s == pytest.approx(samples / 0.81, rel=0.02)
    assert cheapest(even, 1.0, samples, columns=9) == (0, samples)
