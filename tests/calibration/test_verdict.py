"""The verdict: its table, direction, severity, evidence, and what does not depend on netcal."""

from __future__ import annotations

import dataclasses
import math
import sys

import numpy as np
import pytest
from scipy import stats
from scipy.special import log_softmax

from flataudit.calibration import (
    CalibrationPolicy,
    assess_classification,
    assess_gaussian,
    assess_poisson,
    verdict,
)
from flataudit.calibration import tests as ct
from flataudit.calibration.metrics import CalibrationErrors
from flataudit.errors import InputError


@pytest.fixture
def no_netcal(monkeypatch):
    """Simulations skip netcal's numbers, which no verdict uses."""
    monkeypatch.setattr(
        verdict.metrics, "calibration_errors", lambda confidence, hit: CalibrationErrors()
    )


def draw(n, n_classes=10, seed=0, scale=2.5, temperature=1.0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, n_classes))
    p = np.exp(log_softmax(logits, axis=1))
    labels = (rng.random((n, 1)) > p.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return log_softmax(logits / temperature, axis=1), labels


def exact(n, slope=1.0, levels=(0.55, 0.65, 0.75, 0.85, 0.95)):
    """Two classes at given p_1, half of them mirrored; frequencies follow slope * logit exactly."""
    p1, labels = [], []
    each = n // (2 * len(levels))
    for level in levels:
        p = 1 / (1 + ((1 - level) / level) ** slope)
        right = np.arange(each) < round(each * p)
        p1 += [level] * each + [1 - level] * each
        labels += [right, ~right]
    p1 = np.array(p1)
    return np.log(np.stack([1 - p1, p1], axis=1)), np.concatenate(labels).astype(int)


def heldout(data, **kwargs):
    return assess_classification(*data, evidence="heldout", **kwargs)


# --- the table ---

TABLE = {
    "calibrated": (exact(5000), "none", "none"),
    "not_shown": (exact(300), "none", "none"),
    "within_tolerance": (exact(100_000, slope=0.93), "over", "info"),
    "miscalibrated": (exact(5000, slope=0.6), "over", "high"),
    "insufficient": (exact(190), "none", "none"),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table_of_verdicts(name):
    data, direction, severity = TABLE[name]
    result = heldout(data)
    assert (result.verdict, result.direction, result.severity) == (name, direction, severity)
    assert result.n == len(data[1])


@pytest.mark.parametrize(
    ("n", "slope", "direction", "severity"),
    [
        (4000, 0.25, "over", "critical"),
        (4000, 0.6, "over", "high"),
        (2000, 0.85, "over", "warn"),
        (4000, 1.0, "none", "none"),
        (4000, 1.6, "under", "none"),
    ],
)
def test_direction_and_severity_follow_the_slope(n, slope, direction, severity):
    result = heldout(exact(n, slope=slope))
    assert result.slope == pytest.approx(slope, abs=0.02)
    assert (result.direction, result.severity) == (direction, severity)


def test_mixed_where_slope_and_gap_disagree():
    """Sure predictions too sure, unsure ones better than stated: slope below 1, gap below 0."""
    p = np.repeat([[0.995, 0.005], [0.55, 0.45]], [1000, 4000], axis=0)
    labels = np.concatenate([np.arange(1000) >= 950, np.arange(4000) >= 2600]).astype(int)
    result = heldout((np.log(p), labels))
    assert result.slope_ci[1] < 1
    assert result.confidence_gap_ci[1] < 0
    assert result.direction == "mixed"
    assert result.verdict == "miscalibrated"


def test_slope_alone_can_be_high():
    result = heldout(exact(20_000, slope=0.75))
    assert 0 < result.confidence_gap_ci[0] < 0.05
    assert 0.7 < result.slope_ci[1] < 0.8
    assert result.severity == "high"


def test_gap_alone_can_be_high():
    p = np.repeat([[0.9, 0.05, 0.05]], 300, axis=0)
    result = heldout((np.log(p), np.repeat([0, 1, 2], [237, 32, 31])))
    assert 0.05 < result.confidence_gap_ci[0] < 0.12
    assert result.slope_ci[1] > 0.8
    assert result.severity == "high"


def test_gap_alone_can_set_the_direction():
    """Unsure predictions too sure: the gap shows it, the slope hardly depends on them."""
    p = np.repeat([[0.97, 0.03], [0.55, 0.45]], [1000, 3000], axis=0)
    labels = np.concatenate([np.arange(1000) >= 970, np.arange(3000) >= 1500]).astype(int)
    result = heldout((np.log(p), labels))
    assert result.slope_ci[0] < 1 < result.slope_ci[1]
    assert result.direction == "over"


def test_gap_alone_can_be_critical():
    p = np.repeat([[0.9, 0.05, 0.05]], 500, axis=0)
    result = heldout((np.log(p), np.repeat([0, 1, 2], [340, 80, 80])))
    assert result.confidence_gap == pytest.approx(0.9 - 0.68)
    assert result.confidence_gap_ci[0] > 0.15
    assert result.slope_ci[1] > 0.5
    assert result.severity == "critical"


def test_numbers_of_a_result():
    log_p, labels = draw(1000, 4, temperature=0.7)
    result = heldout((log_p, labels))
    p = np.exp(log_p)
    assert result.mean_confidence == pytest.approx(p.max(axis=1).mean())
    assert result.accuracy == pytest.approx((p.argmax(axis=1) == labels).mean())
    assert result.confidence_gap == pytest.approx(result.mean_confidence - result.accuracy)
    fit = ct.fit_slope(log_p, labels)
    assert result.slope == pytest.approx(fit.value)
    assert result.slope_ci == pytest.approx(fit.interval(2.2414027276))
    assert set(result.p_values) == {"slope", "bins", "bias"}
    assert result.ece > 2 * result.ece_if_calibrated > 0


def test_two_classes_are_tested_on_class_1_and_their_gap_is_the_top_labels():
    log_p, labels = draw(1000, 2, temperature=0.8)
    p = np.exp(log_p)
    result = heldout((log_p, labels))
    hit = p.argmax(axis=1) == labels
    bins = ct.bin_test(p[:, 1], labels == 1)
    assert result.p_values["bins"] == pytest.approx(bins.p_value)
    assert result.p_values["bins"] != ct.bin_test(p.max(axis=1), hit).p_value
    assert result.confidence_gap == pytest.approx((p.max(axis=1) - hit).mean())


def test_training_data_gives_numbers_but_no_verdict():
    data = exact(5000, slope=0.4)
    held, train = heldout(data), assess_classification(*data, evidence="train")
    assert (train.verdict, train.direction, train.severity) == ("unknown", "none", "none")
    assert (held.verdict, held.direction) == ("miscalibrated", "over")
    same = dataclasses.replace(
        train,
        evidence="heldout",
        verdict=held.verdict,
        direction=held.direction,
        severity=held.severity,
    )
    assert same == held


def test_leave_one_out_is_judged_like_held_out_data():
    data = exact(5000, slope=0.6)
    loo = assess_classification(*data, evidence="loo")
    assert dataclasses.replace(loo, evidence="heldout") == heldout(data)


def test_few_errors_are_insufficient_and_have_no_direction():
    """9 wrong of 3000: the labels contradict the probabilities, but no interval would hold."""
    p = np.repeat([[0.95, 0.05]], 3000, axis=0)
    nine = heldout((np.log(p), np.arange(3000) < 9))
    ten = heldout((np.log(p), np.arange(3000) < 10))
    assert (nine.verdict, nine.direction) == ("insufficient", "none")
    assert (ten.verdict, ten.direction) == ("miscalibrated", "under")


def test_few_samples_with_many_errors_are_insufficient_but_tell_a_direction():
    result = heldout(exact(100, slope=0.05))
    assert (result.verdict, result.direction, result.severity) == (
        "insufficient",
        "over",
        "critical",
    )


def test_the_policy_moves_the_thresholds():
    data = exact(100_000, slope=0.93)
    assert heldout(data, policy=CalibrationPolicy(delta=0.005)).verdict == "miscalibrated"
    assert heldout(data, policy=CalibrationPolicy(slope_band=(0.95, 1.05))).verdict == (
        "miscalibrated"
    )
    assert heldout(data, policy=CalibrationPolicy(min_samples=200_000)).verdict == "insufficient"
    assert heldout(data, policy=CalibrationPolicy(alpha=1e-200)).verdict == "calibrated"
    assert heldout(exact(190), policy=CalibrationPolicy(min_samples=100)).verdict == "not_shown"
    assert heldout(exact(4000, slope=0.85), policy=CalibrationPolicy(high_slope=0.95)).severity == (
        "high"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"delta": 0.0},
        {"alpha": 1.0},
        {"slope_band": (1.1, 1.3)},
        {"min_samples": 0},
        {"direction_z": -1.0},
        {"high_gap": 0.2},
        {"critical_slope": 0.9},
    ],
)
def test_a_policy_without_sense_is_refused(change):
    with pytest.raises(InputError, match="policy"):
        CalibrationPolicy(**change)


# --- saturation and ties ---


def test_a_model_saturated_and_wrong_is_critical():
    log_p = np.tile([0.0, -np.inf, -np.inf], (1000, 1))
    result = heldout((log_p, np.arange(1000) % 5 == 0))
    assert (result.verdict, result.direction, result.severity) == (
        "miscalibrated",
        "over",
        "critical",
    )
    assert result.confidence_gap == pytest.approx(0.2)
    assert result.ace is None
    assert result.ece == pytest.approx(0.2, abs=1e-12)
    assert result.ece_if_calibrated == 0.0


def test_a_model_without_errors_has_no_slope():
    log_p, _ = draw(500, 3)
    result = heldout((log_p, log_p.argmax(axis=1)))
    assert (result.verdict, result.slope, result.slope_ci) == ("insufficient", None, None)
    assert result.accuracy == 1.0


@pytest.mark.parametrize("n", [1, 2])
def test_one_or_two_samples_have_no_intervals_where_none_exist(n):
    result = heldout((np.log(np.full((n, 2), 0.5)), np.zeros(n)))
    assert result.verdict == "insufficient"
    assert (result.confidence_gap_ci is None) == (n == 1)


def test_the_verdict_does_not_depend_on_netcal(monkeypatch):
    data = exact(5000, slope=0.6)
    with_netcal = heldout(data)
    monkeypatch.setitem(sys.modules, "netcal", None)
    monkeypatch.setitem(sys.modules, "netcal.metrics", None)
    without = heldout(data)
    assert with_netcal.ece is not None
    assert (without.ece, without.mce, without.ace) == (None, None, None)
    assert without == dataclasses.replace(with_netcal, ece=None, mce=None, ace=None)


# --- the marks the method was measured by ---


@pytest.mark.usefixtures("no_netcal")
def test_a_calibrated_model_is_called_calibrated_and_raises_no_warning():
    results = [heldout(draw(2000, seed=seed)) for seed in range(100)]
    verdicts = [r.verdict for r in results]
    assert verdicts.count("calibrated") >= 85
    assert verdicts.count("miscalibrated") <= 5
    # Two intervals at 1.25 % a side: at most 5 % have any direction in the long run.
    assert sum(r.direction != "none" for r in results) <= 11
    assert sum(r.severity in ("high", "critical") for r in results) == 0


@pytest.mark.usefixtures("no_netcal")
def test_temperature_07_is_miscalibrated_and_mostly_high():
    results = [heldout(draw(2000, seed=seed, temperature=0.7)) for seed in range(50)]
    assert {r.verdict for r in results} == {"miscalibrated"}
    assert {r.direction for r in results} == {"over"}
    assert np.mean([r.severity in ("high", "critical") for r in results]) >= 0.81


@pytest.mark.usefixtures("no_netcal")
def test_temperature_09_at_ten_thousand_is_found_and_tolerated():
    results = [heldout(draw(10000, seed=seed, temperature=0.9)) for seed in range(15)]
    verdicts = [r.verdict for r in results]
    assert set(verdicts) <= {"within_tolerance", "miscalibrated"}
    assert verdicts.count("within_tolerance") >= 13
    assert all(r.direction == "over" and r.severity in ("info", "warn") for r in results)


# --- regression and counts ---


def standard(n, seed=0):
    """Normal residuals with mean exactly 0 and mean square exactly 1."""
    z = np.random.default_rng(seed).normal(size=n)
    z -= z.mean()
    return z / math.sqrt((z * z).mean())


def gaussian(z, evidence="heldout", *, sigma_from_residuals=False, **kwargs):
    return assess_gaussian(
        z, evidence=evidence, sigma_from_residuals=sigma_from_residuals, **kwargs
    )


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (standard(2000), ("calibrated", "none", "none")),
        (1.05 * standard(300), ("not_shown", "none", "none")),
        (standard(199), ("insufficient", "none", "none")),
        (1.05 * standard(20000), ("within_tolerance", "over", "info")),
        (1.3 * standard(2000), ("miscalibrated", "over", "high")),
        (2.0 * standard(2000), ("miscalibrated", "over", "critical")),
        (0.7 * standard(2000), ("miscalibrated", "under", "none")),
        (0.3 + standard(2000) * math.sqrt(0.91), ("miscalibrated", "none", "none")),
    ],
    ids=["true", "few", "fewer", "a little", "narrow", "very narrow", "wide", "shifted"],
)
def test_gaussian_verdicts(z, expected):
    result = gaussian(z)
    assert (result.verdict, result.direction, result.severity) == expected
    assert result.slope == pytest.approx(1 / (z * z).mean())
    assert set(result.p_values) == {"slope", "bins", "bias"}
    assert result.ece is result.mce is result.ace is result.ece_if_calibrated is None
    assert result.accuracy is result.mean_confidence is result.confidence_gap is None


def test_sigma_from_training_residuals_says_nothing_about_training_data():
    z = standard(2000)
    train = gaussian(z, "train", sigma_from_residuals=True)
    assert (train.verdict, train.slope, train.slope_ci) == ("unknown", None, None)
    assert train.p_values["slope"] == pytest.approx(1.0)
    assert gaussian(z, "train").slope == pytest.approx(1.0)
    assert gaussian(1.5 * z, "loo", sigma_from_residuals=True).direction == "over"


def test_heavy_tails_are_not_taken_for_a_wrong_variance():
    """Laplace residuals of variance 1: their shape is rejected, their direction is none."""
    directions = []
    for seed in range(200):
        result = gaussian(np.random.default_rng(seed).laplace(size=2000) / math.sqrt(2))
        assert result.p_values["bins"] < 0.05 / 3
        directions.append(result.direction)
    assert directions.count("none") >= 190 - 3 * math.sqrt(200 * 0.025 * 0.975)


def test_several_outputs_count_together():
    z = standard(600)
    flat, table = gaussian(z), gaussian(z.reshape(300, 2))
    assert (table.n, flat.n) == (300, 600)
    assert table.p_values == pytest.approx(flat.p_values)
    assert table.slope_ci == pytest.approx(flat.slope_ci)


def counts(n, rate, dispersion=1.0, seed=0):
    rng = np.random.default_rng(seed)
    rates = rate * np.exp(0.5 * rng.normal(size=n))
    mean = rates
    if dispersion > 1:
        mean = rng.gamma(rates / (dispersion - 1), dispersion - 1)
    return rng.poisson(mean), rates


@pytest.mark.parametrize("rate", [0.5, 3.0, 30.0])
def test_poisson_verdicts(rate):
    calls = [assess_poisson(*counts(2000, rate, seed=s), evidence="heldout") for s in range(40)]
    assert [c.verdict for c in calls].count("calibrated") >= 33
    assert sum(c.direction != "none" for c in calls) <= 5
    over = assess_poisson(*counts(2000, rate, dispersion=2.0), evidence="heldout")
    assert (over.verdict, over.direction) == ("miscalibrated", "over")
    assert over.severity in ("high", "critical")
    assert over.slope == pytest.approx(0.5, abs=0.1)
    assert over.ece_if_calibrated is None


def test_small_rates_widen_the_interval():
    """No event where 20 were expected: z^2 = rate everywhere, with dof 2 n/(2 + 1/rate)."""
    rate = np.full(400, 0.05)
    low, high = assess_poisson(np.zeros(400), rate, evidence="heldout").slope_ci
    dof, tail = 2 * 400 / (2 + 1 / 0.05), 0.0125
    assert low == pytest.approx(stats.chi2.ppf(tail, dof) / (dof * 0.05), rel=1e-9)
    assert high == pytest.approx(stats.chi2.isf(tail, dof) / (dof * 0.05), rel=1e-9)


def test_poisson_is_seeded_and_unknown_on_training_data():
    y, rate = counts(500, 2.0)
    first = assess_poisson(y, rate, evidence="heldout")
    assert assess_poisson(y, rate, evidence="heldout", seed=0) == first
    assert assess_poisson(y, rate, evidence="heldout", seed=1).p_values != first.p_values
    assert assess_poisson(y, rate, evidence="train").verdict == "unknown"


def test_a_handful_of_events_is_insufficient():
    y, rate = np.zeros(5000), np.full(5000, 0.001)
    assert assess_poisson(y, rate, evidence="heldout").verdict == "insufficient"
    many = assess_poisson(y, 100 * rate, evidence="heldout")
    assert many.verdict == "miscalibrated"
    assert many.p_values["bias"] < 1e-10


BAD = {
    "evidence": lambda: assess_classification(*exact(100), evidence="test"),
    "labels": lambda: assess_classification(exact(100)[0], [7] * 100, evidence="heldout"),
    "logits": lambda: assess_classification(
        np.full((100, 2), 3.0), np.zeros(100), evidence="heldout"
    ),
    "empty z": lambda: gaussian([]),
    "scalar z": lambda: gaussian(1.0),
    "NaN z": lambda: gaussian([0.0, np.nan]),
    "infinite z": lambda: gaussian([0.0, np.inf]),
    "shapes": lambda: assess_poisson([1, 2], [1.0], evidence="heldout"),
    "no counts": lambda: assess_poisson([], [], evidence="heldout"),
    "fraction": lambda: assess_poisson([1.5], [1.0], evidence="heldout"),
    "negative": lambda: assess_poisson([-1], [1.0], evidence="heldout"),
    "NaN count": lambda: assess_poisson([np.nan], [1.0], evidence="heldout"),
    "zero rate": lambda: assess_poisson([1], [0.0], evidence="heldout"),
    "log rate": lambda: assess_poisson([1], [-2.0], evidence="heldout"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    with pytest.raises(InputError, match=r"expected .*; ") as caught:
        BAD[name]()
    assert "\n" not in str(caught.value)
