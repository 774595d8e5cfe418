"""The decision list, the confidence and every warning: tables of pure functions."""

from __future__ import annotations

import dataclasses

import pytest

from flataudit.results import (
    Calibration,
    Estimate,
    Estimates,
    Gap,
    HeldoutFit,
    PenaltyInfo,
    Premise,
)
from flataudit.selection import (
    Observations,
    SelectionPolicy,
    choose_confidence,
    choose_estimator,
    collect_warnings,
    needs_recalibration,
)


def judged(verdict="calibrated", direction="none", severity="none", **fields) -> Calibration:
    return Calibration(
        evidence="loo", n=500, verdict=verdict, direction=direction, severity=severity, **fields
    )


# Each row is a rule; rows further down must lose to those above, which `ORDER` shows.
#   verdict, direction, linear, saturated -> estimator, word of the reason
DECISIONS = [
    # too few samples
    ("insufficient", "none", False, False, "loo", "too few"),
    ("insufficient", "under", False, False, "loo", "too few"),
    ("insufficient", "over", False, True, "loo", "too few"),
    ("insufficient", "none", True, False, "loo", "too few"),
    # calibrated, or within tolerance
    ("calibrated", "none", False, False, "soft_rank", "calibrated"),
    ("calibrated", "none", True, False, "soft_rank", "calibrated"),
    ("calibrated", "over", False, True, "soft_rank", "calibrated"),
    ("calibrated", "under", False, False, "soft_rank", "calibrated"),
    ("within_tolerance", "over", False, False, "soft_rank", "within tolerance"),
    ("within_tolerance", "under", True, False, "soft_rank", "within tolerance"),
    # under-confident
    ("miscalibrated", "under", False, False, "tic", "under-confident"),
    ("miscalibrated", "under", True, False, "tic", "under-confident"),
    ("miscalibrated", "under", False, True, "tic", "under-confident"),
    ("not_shown", "under", False, False, "tic", "under-confident"),
    # linear in the parameters
    ("miscalibrated", "over", True, False, "loo", "linear"),
    ("miscalibrated", "mixed", True, True, "loo", "linear"),
    ("not_shown", "over", True, False, "loo", "linear"),
    ("not_shown", "none", True, True, "loo", "linear"),
    # over-confident, mixed or saturated
    ("miscalibrated", "over", False, False, "soft_rank_recalibrated", "over-confident"),
    ("miscalibrated", "mixed", False, False, "soft_rank_recalibrated", "over- and under-"),
    ("miscalibrated", "none", False, True, "soft_rank_recalibrated", "saturated"),
    ("not_shown", "over", False, False, "soft_rank_recalibrated", "over-confident"),
    ("not_shown", "none", False, True, "soft_rank_recalibrated", "saturated"),
    ("unknown", "none", False, True, "soft_rank_recalibrated", "saturated"),
    # not shown
    ("not_shown", "none", False, False, "loo", "not shown"),
    ("unknown", "none", False, False, "loo", "not shown"),
]


@pytest.mark.parametrize(
    ("verdict", "direction", "linear", "saturated", "wanted", "word"), DECISIONS
)
def test_decision_list(verdict, direction, linear, saturated, wanted, word):
    calibration = judged(verdict, direction)
    name, reason = choose_estimator(
        calibration, linear=linear, saturated=saturated, has_loo=True, has_recalibrated=True
    )
    assert name == wanted
    assert word in reason
    assert needs_recalibration(calibration, linear=linear, saturated=saturated) is (
        wanted == "soft_rank_recalibrated"
    )


@pytest.mark.parametrize(
    ("verdict", "direction", "has_loo", "has_recalibrated", "wanted", "word"),
    [
        ("miscalibrated", "over", True, False, "loo", "recalibration is undefined"),
        ("miscalibrated", "over", False, False, "soft_rank", "stands in"),
        ("miscalibrated", "over", False, True, "soft_rank_recalibrated", "over-confident"),
        ("not_shown", "none", False, True, "soft_rank", "stands in"),
        ("insufficient", "none", False, True, "soft_rank", "stands in"),
        ("miscalibrated", "under", False, False, "tic", "under-confident"),
    ],
)
def test_the_next_best_stands_in_and_says_so(
    verdict, direction, has_loo, has_recalibrated, wanted, word
):
    name, reason = choose_estimator(
        judged(verdict, direction),
        linear=False,
        saturated=False,
        has_loo=has_loo,
        has_recalibrated=has_recalibrated,
    )
    assert name == wanted
    assert word in reason


@pytest.mark.parametrize("source", ["argument", "estimator", "training", "evidence"])
@pytest.mark.parametrize(
    ("direction", "saturated", "doubtful"),
    [
        ("none", False, False),
        ("under", False, False),
        ("over", False, True),
        ("mixed", False, True),
        ("none", True, True),
        ("under", True, True),
    ],
)
def test_confidence(source, direction, saturated, doubtful):
    found = choose_confidence(
        judged("miscalibrated", direction), penalty_source=source, saturated=saturated
    )
    if source == "evidence":
        assert found == ("refused" if doubtful else "low")
    else:
        assert found == ("low" if doubtful else "ok")


def test_confidence_without_a_verdict_is_low():
    assert choose_confidence(judged("unknown"), penalty_source="argument", saturated=False) == "low"


# --- warnings -----------------------------------------------------------------------------------


def chosen(estimator: str) -> Gap:
    """The gap 0.10 with its 90 % interval 0.08 to 0.12, by `estimator`."""
    return Gap(0.10, 0.08, 0.12, 0.9, estimator, "the reason")


def measured(gap: float, se: float) -> HeldoutFit:
    return HeldoutFit(nll=0.5 + gap, accuracy=0.9, gap=gap, gap_se=se)


def observed(**changes) -> Observations:
    """An audit that gives no reason for any warning."""
    quiet = Observations(
        calibration=judged(),
        estimates=Estimates(Estimate(0.10, 0.01), Estimate(0.09, 0.01), Estimate(0.11, 0.01)),
        premise=Premise(1.0, 0.0, "loo"),
        penalty=PenaltyInfo(0.01, 0, "argument", None, 0.0),
        gap=chosen("soft_rank"),
        heldout=None,
        saturated=False,
        gradient_noise=0.0,
        max_leverage=0.5,
        training_time=False,
    )
    return dataclasses.replace(quiet, **changes)


def penalty(source="argument", stationarity=0.0) -> PenaltyInfo:
    return PenaltyInfo(0.01, 0, source, None, stationarity)


def gaps(*values) -> Estimates:
    return Estimates(*(None if v is None else Estimate(v, 0.01) for v in values))


MOVED = {"penalty": penalty(stationarity=0.5), "gradient_noise": 0.5}
#   what was seen -> the warnings as {code: severity}
WARNINGS = [
    ({}, {}),
    # overconfident: the calibration's own severity, at least info
    ({"calibration": judged("miscalibrated", "over", "warn")}, {"overconfident": "warn"}),
    ({"calibration": judged("miscalibrated", "over", "high")}, {"overconfident": "high"}),
    ({"calibration": judged("miscalibrated", "over", "critical")}, {"overconfident": "critical"}),
    ({"calibration": judged("within_tolerance", "over", "info")}, {"overconfident": "info"}),
    ({"calibration": judged("not_shown", "over", "none")}, {"overconfident": "info"}),
    (
        {"calibration": judged("miscalibrated", "mixed", "high")},
        {"overconfident": "high", "underconfident": "info"},
    ),
    ({"calibration": judged("miscalibrated", "under")}, {"underconfident": "info"}),
    # train_saturated, few_calibration_samples
    ({"saturated": True}, {"train_saturated": "critical"}),
    ({"calibration": judged("insufficient")}, {"few_calibration_samples": "warn"}),
    # penalty_unknown
    ({"penalty": penalty("evidence")}, {"penalty_unknown": "high"}),
    ({"penalty": penalty("training")}, {}),
    ({"penalty": penalty("estimator")}, {}),
    # not_at_minimum: both the share of the gradient and its sampling error, strictly beyond .1
    (MOVED, {"not_at_minimum": "warn"}),
    (MOVED | {"training_time": True}, {"not_at_minimum": "info"}),
    (MOVED | {"penalty": penalty(stationarity=0.1)}, {}),
    (MOVED | {"penalty": penalty(stationarity=0.1001)}, {"not_at_minimum": "warn"}),
    (MOVED | {"penalty": penalty(stationarity=None)}, {}),
    (MOVED | {"gradient_noise": 0.1}, {}),
    (MOVED | {"gradient_noise": 0.1001}, {"not_at_minimum": "warn"}),
    # premise_violated: beyond 1.5 either way and significant at 1 %
    ({"premise": Premise(1.6, 3.0, "loo")}, {"premise_violated": "warn"}),
    ({"premise": Premise(0.6, -3.0, "loo")}, {"premise_violated": "warn"}),
    ({"premise": Premise(1.5, 9.0, "loo")}, {}),
    ({"premise": Premise(1 / 1.49, -9.0, "loo")}, {}),
    ({"premise": Premise(1.6, 2.57, "loo")}, {}),
    ({"premise": Premise(1.6, 2.58, "loo")}, {"premise_violated": "warn"}),
    ({"premise": Premise(0.0, -9.0, "loo")}, {"premise_violated": "warn"}),
    ({"premise": None}, {}),
    ({"premise": Premise(1.6, 3.0, "loo"), "gap": chosen("loo")}, {"premise_violated": "info"}),
    # estimators_disagree: more than a factor 2 between the largest and the smallest
    ({"estimates": gaps(0.2, 0.1, 0.15)}, {}),
    ({"estimates": gaps(0.201, 0.1, 0.15)}, {"estimators_disagree": "warn"}),
    ({"estimates": gaps(0.1, 0.1, 0.201)}, {"estimators_disagree": "warn"}),
    ({"estimates": gaps(0.201, 0.1, 0.15), "gap": chosen("tic")}, {"estimators_disagree": "info"}),
    ({"estimates": gaps(0.1, 0.1, -0.01)}, {"estimators_disagree": "warn"}),
    # high_leverage
    ({"max_leverage": 0.9}, {}),
    ({"max_leverage": 0.901}, {"high_leverage": "info"}),
    ({"max_leverage": 0.901, "gap": chosen("loo")}, {"high_leverage": "warn"}),
    ({"estimates": gaps(0.1, 0.1, None)}, {"high_leverage": "warn"}),
    # prediction_contradicted: the two 90 % intervals, 0.08..0.12 and gap +- 1.645 SE, are disjoint
    ({"heldout": measured(0.10, 0.001)}, {}),
    ({"heldout": measured(0.1364, 0.01)}, {}),
    ({"heldout": measured(0.1365, 0.01)}, {"prediction_contradicted": "high"}),
    ({"heldout": measured(0.0636, 0.01)}, {}),
    ({"heldout": measured(0.0635, 0.01)}, {"prediction_contradicted": "high"}),
    ({"heldout": measured(0.5, 1.0)}, {}),
]


@pytest.mark.parametrize(("changes", "wanted"), WARNINGS)
def test_warnings(changes, wanted):
    found = collect_warnings(observed(**changes))
    assert {w.code: w.severity for w in found} == wanted
    assert len({w.code for w in found}) == len(found)
    for warning in found:
        assert "\n" not in warning.message
        assert "None" not in warning.message
        assert "nan" not in warning.message


def test_the_gravest_come_first():
    found = collect_warnings(
        observed(
            calibration=judged("miscalibrated", "mixed", "high"),
            saturated=True,
            premise=Premise(1.6, 3.0, "loo"),
            max_leverage=0.95,
        )
    )
    order = ["critical", "high", "warn", "info"]
    ranks = [order.index(w.severity) for w in found]
    assert ranks == sorted(ranks)
    assert found[0].code == "train_saturated"
    assert len(found) == 5


def test_policy_moves_the_thresholds():
    seen = observed(max_leverage=0.6)
    assert collect_warnings(seen) == ()
    (found,) = collect_warnings(seen, SelectionPolicy(leverage=0.5))
    assert found.code == "high_leverage"
