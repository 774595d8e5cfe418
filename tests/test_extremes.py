"""What the property tests found, each as the smallest case: overflow and underflow in float64."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from torch import nn

from flataudit import audit
from flataudit.errors import BreakdownError, FlatauditError, InputError, NumericalError
from flataudit.penalty import norm
from flataudit.solvers.base import pseudo_inverse_root, spectrum_of

X = torch.tensor([[1.5], [-0.3]], dtype=torch.float64)


def line(weight: float, outputs: int = 1, inputs: int = 1) -> nn.Module:
    model = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(weight)
    return model


def test_norm_of_numbers_whose_squares_overflow():
    parts = [torch.tensor(t, dtype=torch.float64) for t in ([3e300], [[4e300]])]
    assert norm(parts) == pytest.approx(5e300)
    assert norm([torch.zeros(3)]) == 0.0
    assert norm([torch.tensor([1.0, -math.inf])]) == math.inf
    assert norm([torch.tensor([3e-300, 4e-300], dtype=torch.float64)]) == pytest.approx(5e-300)


@pytest.mark.parametrize("weight", [1.0, 1e20])
def test_stationarity_under_a_huge_penalty_is_a_number(weight):
    report = audit(line(weight), (X, torch.tensor([[0.0], [1.0]])), penalty=1e300, dispersion=1.0)
    assert 1e200 < report.penalty.stationarity <= sys.float_info.max


def test_training_record_whose_penalty_overflows_is_refused():
    y = torch.tensor([[1e-10], [0.0]], dtype=torch.float64)
    with pytest.raises(InputError, match="expected a training record that gives a finite penalty"):
        audit(line(1e-9), (X, y), training="optimizer=sgd,sum_lr=1e-300")


def test_leave_one_out_step_without_a_standard_error_is_none():
    """Each sample alone decides its own direction: the step is finite, its square is not."""
    words = nn.Sequential(nn.Embedding(2, 1), nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        words[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    data = (torch.tensor([[0], [1]]), torch.tensor([0, 1]))
    report = audit(words, data, penalty=1e-200)
    assert report.estimates.loo is None
    assert math.isfinite(report.gap.high)


@pytest.mark.parametrize("output", [-1300.0, -800.0, 300.0])
def test_poisson_rates_out_of_range_are_judged(output):
    """exp underflows to 0, or its square overflows; the audit says so by its verdict alone."""
    x = torch.ones(3, 1, dtype=torch.float64)
    y = torch.tensor([9000, 8000, 7000])
    report = audit(line(output), (x, y), family="poisson", penalty=1.0, heldout=(x, y))
    assert math.isfinite(report.heldout.nll)
    assert math.isfinite(report.estimates.tic.gap)
    assert math.isfinite(report.estimates.tic.centred)
    assert all(math.isfinite(p) for p in report.calibration.p_values.values())


def test_a_factorisation_that_breaks_down_is_followed_by_the_other():
    x = torch.zeros(3, 9, dtype=torch.float64)  # P above N, all of it in one direction
    x[:, 0] = 1.0
    data = (x, torch.tensor([9000, 8000, 7000]))
    report = audit(line(300.0, inputs=9), data, family="poisson", penalty=1.0)
    assert report.solver.name == "primal"
    assert report.solver.reason.endswith(", dual broke down")
    with pytest.raises(BreakdownError, match="use solver=primal"):
        audit(line(300.0, inputs=9), data, family="poisson", penalty=1.0, solver="dual")


def test_estimates_out_of_range_are_a_named_error():
    data = (torch.ones(2, 1, dtype=torch.float64), torch.tensor([3, 4]))
    with pytest.raises(FlatauditError, match="expected"):
        audit(line(700.0), data, family="poisson", penalty=0.0)


def test_eigenvalues_that_cannot_be_had_are_a_named_error():
    broken = torch.full((3, 3), torch.inf, dtype=torch.float64)
    for call in (spectrum_of, pseudo_inverse_root):
        with pytest.raises(NumericalError, match="expected a curvature with finite eigenvalues"):
            call(broken)
    with pytest.raises(NumericalError):
        audit(line(0.0, 3), (X * 1e30, torch.zeros(2, 3)), family="poisson", penalty=1e-300)
