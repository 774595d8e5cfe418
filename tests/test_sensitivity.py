"""The estimates at D/3, D and 3D, against audits at those penalties."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch

import flataudit
from flataudit import InputError, audit
from flataudit.errors import NumericalError
from flataudit.sensitivity import LIMIT, wants_sensitivity
from flataudit.solvers import SOLVERS
from tests.cases import BY_NAME, build
from tests.test_audit import X, Y, network, shown

PENALTY = 0.02


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_points_are_the_audits_at_those_penalties(solver):
    model = network()
    report = audit(model, (X, Y), penalty=PENALTY, solver=solver, sensitivity=True)
    assert [point.factor for point in report.sensitivity] == [pytest.approx(1 / 3), 1.0, 3.0]
    for point in report.sensitivity:
        there = audit(model, (X, Y), penalty=PENALTY * point.factor, solver=solver)
        assert point.soft_rank == pytest.approx(there.estimates.soft_rank.gap, rel=1e-9)
        assert point.tic == pytest.approx(there.estimates.tic.gap, rel=1e-9)
        assert point.loo == pytest.approx(there.estimates.loo.gap, rel=1e-9)
    ranks = [point.soft_rank for point in report.sensitivity]
    assert ranks == sorted(ranks, reverse=True)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))["sensitivity"]
    assert {"factor", "soft_rank", "tic", "loo"} <= found[0].keys()


def test_recalibrated_at_the_same_scale():
    report = audit(network(), (X, Y), penalty=PENALTY, recalibrate=True)
    here = report.estimates.soft_rank_recalibrated
    low, middle, high = (point.soft_rank_recalibrated for point in report.sensitivity)
    assert middle == here.gap
    assert low > middle > high > 0
    assert report.estimates.soft_rank_recalibrated.scale < 1
    assert report.sensitivity[1].soft_rank_blend == report.estimates.soft_rank_blend.gap
    for point in report.sensitivity:
        product = point.soft_rank * point.soft_rank_recalibrated
        assert point.soft_rank_blend == pytest.approx(math.sqrt(product), rel=1e-9)


def test_a_model_that_is_not_recalibrated_is_not_at_other_penalties_either():
    point = audit(torch.nn.Linear(4, 3), (X, Y), penalty=PENALTY).sensitivity[0]
    assert point.loo is not None
    assert point.soft_rank_recalibrated is point.soft_rank_blend is None


def test_gaussian_dispersion_stays_as_it_was():
    case = BY_NAME["gaussian_outputs"]
    built = build(case)
    data = (built.x, built.y)
    report = audit(built.model, data, family=case.family, penalty=PENALTY)
    low = audit(
        built.model, data, family=case.family, penalty=PENALTY / 3,
        dispersion=report.dispersion.value,
    )  # fmt: skip
    assert report.sensitivity[0].tic == pytest.approx(low.estimates.tic.gap, rel=1e-9)


def test_off_changes_nothing_else():
    on = shown(audit(network(), (X, Y), penalty=PENALTY, sensitivity=True))
    off = shown(audit(network(), (X, Y), penalty=PENALTY, sensitivity=False))
    assert off.pop("sensitivity") is None
    assert len(on.pop("sensitivity")) == 3
    assert on == off


def test_auto_is_on_for_small_problems_alone():
    class Size:
        n_params, n_rows = LIMIT + 1, LIMIT

    assert wants_sensitivity("auto", Size())
    Size.n_rows = LIMIT + 1
    assert not wants_sensitivity("auto", Size())
    assert wants_sensitivity(True, Size())
    assert not wants_sensitivity(False, Size())
    with pytest.raises(InputError, match="'auto', True or False, got 'on'"):
        wants_sensitivity("on", Size())


def test_no_penalty_no_sensitivity():
    assert audit(network(), (X, Y), penalty=0.0).sensitivity is None


def test_two_more_factorisations_and_none_when_off(monkeypatch):
    calls = Counter()
    solver = SOLVERS["primal"]
    solve = type(solver).solve

    def counted(self, *args, **kwargs):
        calls["solve"] += 1
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(type(solver), "solve", counted)
    asked = {"penalty": PENALTY, "solver": "primal"}
    off = audit(network(), (X, Y), sensitivity=False, **asked)
    base = calls.pop("solve")
    audit(network(), (X, Y), **asked)
    again = 2 if off.estimates.soft_rank_recalibrated is None else 4
    assert calls["solve"] == base + again


def test_a_breakdown_nearby_does_not_fail_the_audit(monkeypatch):
    solver = SOLVERS["primal"]
    solve = type(solver).solve

    def brittle(self, problem, penalty, **kwargs):
        if float(next(iter(penalty.values())).min()) < PENALTY * 0.9:
            raise NumericalError("expected a factorisation, got a breakdown")
        return solve(self, problem, penalty, **kwargs)

    monkeypatch.setattr(type(solver), "solve", brittle)
    report = audit(network(), (X, Y), penalty=PENALTY, solver="primal")
    first, _, last = report.sensitivity
    assert (first.soft_rank, first.tic, first.loo) == (None, None, None)
    assert last.soft_rank > 0
    assert flataudit.AuditReport is type(report)


def test_penalties_by_parameter_scale_together():
    penalty = {"0.weight": 0.1, "0.bias": 0.0, "2.weight": 0.01, "2.bias": 0.05}
    report = audit(network(), (X, Y), penalty=penalty)
    third = audit(network(), (X, Y), penalty={k: v / 3 for k, v in penalty.items()})
    torch.testing.assert_close(
        report.sensitivity[0].soft_rank, third.estimates.soft_rank.gap, rtol=1e-9, atol=0
    )
