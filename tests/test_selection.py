"""The decision list, the confidence and every warning: tables of pure functions."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from flataudit.results import (
    Calibration,
    Estimate,
    Estimates,
    EstimatorName,
    Gap,
    HeldoutFit,
    PenaltyInfo,
    Premise,
    SolverInfo,
)
from flataudit.selection import (
    MODEL_ERROR,
    Observations,
    SelectionPolicy,
    choose_confidence,
    choose_estimator,
    collect_warnings,
    needs_recalibration,
    widened,
)

ZOO = Path(__file__).parents[1] / "benchmarks/zoo/results.parquet"
FITTED = Path(__file__).parents[1] / "benchmarks/zoo/rule_fit.json"


def judged(verdict="calibrated", direction="none", severity="none", **fields) -> Calibration:
    return Calibration(
        evidence="loo", n=500, verdict=verdict, direction=direction, severity=severity, **fields
    )


# Each row is a rule; rows further down must lose to those above.
#   verdict, direction, linear, saturated -> estimator, word of the reason
DECISIONS = [
    # calibrated, or within tolerance
    ("calibrated", "none", False, False, "soft_rank", "calibrated"),
    ("calibrated", "none", True, False, "soft_rank", "calibrated"),
    ("calibrated", "over", False, True, "soft_rank", "calibrated"),
    ("calibrated", "under", False, False, "soft_rank", "calibrated"),
    ("within_tolerance", "over", False, False, "soft_rank", "within tolerance"),
    ("within_tolerance", "under", True, False, "soft_rank", "within tolerance"),
    # shown under-confident, with gradients left
    ("miscalibrated", "under", False, False, "tic", "under-confident"),
    ("miscalibrated", "under", True, False, "tic", "under-confident"),
    # linear in the parameters, or nothing known of the calibration
    ("miscalibrated", "under", True, True, "loo", "linear"),
    ("miscalibrated", "over", True, False, "loo", "linear"),
    ("miscalibrated", "mixed", True, True, "loo", "linear"),
    ("not_shown", "under", True, False, "loo", "linear"),
    ("not_shown", "none", True, True, "loo", "linear"),
    ("insufficient", "none", True, False, "loo", "linear"),
    ("unknown", "none", False, False, "loo", "unknown"),
    ("unknown", "none", False, True, "loo", "unknown"),
    # every other network
    ("miscalibrated", "over", False, False, "soft_rank_blend", "over-confident"),
    ("miscalibrated", "mixed", False, False, "soft_rank_blend", "over- and under-"),
    ("miscalibrated", "none", False, True, "soft_rank_blend", "saturated"),
    ("miscalibrated", "under", False, True, "soft_rank_blend", "saturated"),
    ("miscalibrated", "none", False, False, "soft_rank_blend", "without a direction"),
    ("not_shown", "over", False, False, "soft_rank_blend", "over-confident"),
    ("not_shown", "none", False, True, "soft_rank_blend", "saturated"),
    ("not_shown", "under", False, False, "soft_rank_blend", "not shown"),
    ("not_shown", "none", False, False, "soft_rank_blend", "not shown"),
    ("insufficient", "none", False, False, "soft_rank_blend", "too few"),
    ("insufficient", "under", False, False, "soft_rank_blend", "too few"),
    ("insufficient", "over", False, True, "soft_rank_blend", "over-confident"),
]


@pytest.mark.parametrize(
    ("verdict", "direction", "linear", "saturated", "wanted", "word"), DECISIONS
)
def test_decision_list(verdict, direction, linear, saturated, wanted, word):
    calibration = judged(verdict, direction)
    name, reason = choose_estimator(
        calibration, linear=linear, saturated=saturated, has_loo=True, scale=0.9
    )
    assert name == wanted
    assert word in reason
    assert needs_recalibration(calibration, linear=linear, saturated=saturated) is (
        wanted == "soft_rank_blend"
    )


@pytest.mark.parametrize(
    ("verdict", "direction", "has_loo", "scale", "wanted", "word"),
    [
        ("miscalibrated", "over", True, None, "loo", "recalibration is undefined"),
        ("miscalibrated", "over", False, None, "soft_rank", "stands in"),
        ("miscalibrated", "over", False, 0.9, "soft_rank_blend", "over-confident"),
        ("not_shown", "none", True, 1.0, "soft_rank", "would sharpen"),
        ("insufficient", "none", True, 1.2, "soft_rank", "would sharpen"),
        ("unknown", "none", False, 0.9, "soft_rank", "stands in"),
        ("miscalibrated", "under", False, None, "tic", "under-confident"),
    ],
)
def test_the_next_best_stands_in_and_says_so(verdict, direction, has_loo, scale, wanted, word):
    name, reason = choose_estimator(
        judged(verdict, direction), linear=False, saturated=False, has_loo=has_loo, scale=scale
    )
    assert name == wanted
    assert word in reason


def test_a_linear_model_without_leave_one_out_takes_the_soft_rank():
    name, reason = choose_estimator(
        judged("not_shown"), linear=True, saturated=False, has_loo=False, scale=None
    )
    assert (name, "stands in" in reason) == ("soft_rank", True)


# --- intervals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [0.3, 0.0, -0.3])
@pytest.mark.parametrize("margin", [0.0, 0.1, 2.0])
@pytest.mark.parametrize("error", [0.0, 0.3, 0.6])
def test_the_interval_is_never_narrower_than_sampling_and_holds_the_gap(gap, margin, error):
    low, high = widened(gap, margin, error, 1.645)
    assert low <= gap - margin
    assert high >= gap + margin


def test_without_sampling_error_the_interval_is_a_factor_either_way():
    low, high = widened(0.3, 0.0, 0.4, 1.5)
    assert low == pytest.approx(0.3 * math.exp(-0.6), rel=1e-12)
    assert high == pytest.approx(0.3 * math.exp(0.6), rel=1e-12)
    assert widened(-0.3, 0.0, 0.4, 1.5) == (pytest.approx(-high), pytest.approx(-low))


def test_margin_and_model_error_add_in_quadrature():
    low, high = widened(1.0, 0.3, 0.5, 1.0)
    assert high == pytest.approx(1.0 + math.sqrt(0.09 + math.expm1(0.5) ** 2), rel=1e-12)
    assert low == pytest.approx(1.0 - math.sqrt(0.09 + math.expm1(-0.5) ** 2), rel=1e-12)


def test_without_model_error_the_interval_is_the_sampling_one():
    assert widened(0.3, 0.1, 0.0, 1.645) == (pytest.approx(0.2), pytest.approx(0.4))


def test_the_model_errors_are_those_that_the_zoo_gave():
    """benchmarks/zoo/rule_fit.json, rounded; the list's open branches are its choice too."""
    fitted = json.loads(FITTED.read_text(encoding="utf-8"))
    for family, members in {
        "loo": ["loo"],
        "tic": ["tic"],
        "soft_rank": ["soft_rank", "soft_rank_recalibrated", "soft_rank_blend"],
    }.items():
        for name in members:
            assert MODEL_ERROR[name] == round(fitted["model_error"][family], 2)
    assert fitted["choice"] == {"linear": "loo", "network": "blend"}
    assert set(MODEL_ERROR) == set(get_args(EstimatorName))


# --- confidence ---------------------------------------------------------------------------------

GUESSED = "the penalty is a guess"
VANISHED = "gradients have vanished"
#   what was seen -> confidence, a word of each reason
CONFIDENCE = [
    ({}, "ok", []),
    ({"calibration": ("miscalibrated", "under", "none")}, "ok", []),
    ({"calibration": ("miscalibrated", "over", "warn")}, "ok", []),
    ({"calibration": ("miscalibrated", "mixed", "warn")}, "ok", []),
    ({"calibration": ("within_tolerance", "over", "info")}, "ok", []),
    ({"calibration": ("miscalibrated", "over", "critical"), "linear": True}, "ok", []),
    ({"calibration": ("insufficient", "none", "none")}, "ok", []),
    ({"calibration": ("miscalibrated", "over", "high")}, "low", ["strongly over-confident"]),
    ({"calibration": ("miscalibrated", "over", "critical")}, "low", ["strongly over-confident"]),
    ({"calibration": ("miscalibrated", "mixed", "critical")}, "low", ["strongly"]),
    ({"calibration": ("unknown", "none", "none")}, "low", ["training data only"]),
    ({"saturated": True}, "low", [VANISHED]),
    ({"penalty": "evidence"}, "low", [GUESSED]),
    ({"penalty": "evidence", "saturated": True}, "refused", [GUESSED, VANISHED]),
    (
        {"penalty": "evidence", "calibration": ("miscalibrated", "over", "warn")},
        "refused",
        [GUESSED, "is over-confident"],
    ),
    ({"penalty": "evidence", "calibration": ("miscalibrated", "under", "none")}, "low", [GUESSED]),
    ({"penalty": "training"}, "ok", []),
    ({"penalty": "estimator"}, "ok", []),
    # outlying leverage, where leave-one-out is what is believed
    ({"max_leverage": 0.95, "gap": "loo"}, "low", ["extrapolates"]),
    ({"max_leverage": 0.95}, "ok", []),
    ({"max_leverage": 0.9, "gap": "loo"}, "ok", []),
    ({"max_leverage": None, "gap": "loo"}, "ok", []),
    # what held-out data say
    ({"heldout": (0.5, 0.01)}, "low", ["contradicts"]),
    ({"heldout": (0.1, 0.01)}, "ok", []),
]


@pytest.mark.parametrize(("changes", "wanted", "words"), CONFIDENCE)
def test_confidence(changes, wanted, words):
    make = {
        "calibration": lambda v: judged(*v),
        "penalty": penalty,
        "gap": chosen,
        "heldout": lambda v: measured(*v),
    }
    seen = observed(**{key: make.get(key, lambda v: v)(value) for key, value in changes.items()})
    found, reasons = choose_confidence(seen)
    assert found == wanted
    assert len(reasons) == len(words)
    for reason, word in zip(reasons, words, strict=True):
        assert word in reason


def test_a_gap_whose_error_is_unknown_is_not_relied_on():
    solver = SolverInfo("kfac", False, "asked for", "cpu", "float64", 1.0, 0)
    found, (reason,) = choose_confidence(observed(solver=solver))
    assert (found, "solver's error" in reason) == ("low", True)
    known = Estimates(*(Estimate(0.1, 0.01, monte_carlo_se=0.001) for _ in range(3)))
    assert choose_confidence(observed(solver=solver, estimates=known)) == ("ok", ())
    assert choose_confidence(observed(solver=dataclasses.replace(solver, exact=True)))[0] == "ok"


def test_policy_moves_the_leverage_that_counts_as_outlying():
    seen = observed(max_leverage=0.6, gap=chosen("loo"))
    assert choose_confidence(seen)[0] == "ok"
    assert choose_confidence(seen, SelectionPolicy(leverage=0.5))[0] == "low"


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


def test_the_warning_of_an_unknown_penalty_quotes_the_zoo():
    """Soft rank of its networks with the evidence's penalty: the median ratio and the 90th one."""
    zoo = pd.read_parquet(ZOO)
    networks = zoo[(zoo.architecture != "glm") & (zoo.gap > 0)]
    ratios = (networks.evidence_soft_rank / networks.gap).dropna()
    (warning,) = collect_warnings(observed(penalty=penalty("evidence")))
    assert "half by a third or more, one in ten by a factor of 2.8 or more" in warning.message
    assert len(ratios) > 200
    assert ratios.median() == pytest.approx(4 / 3, abs=0.03)
    assert ratios.quantile(0.9) == pytest.approx(2.8, abs=0.05)


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
