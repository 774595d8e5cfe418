"""The e-process: a martingale exactly, few false alarms ever, soon an alarm where p is wrong."""

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, special, stats

from flataudit.calibration import eprocess
from flataudit.calibration.eprocess import (
    SLOPES,
    THRESHOLD,
    EProcess,
    count_ratios,
    label_ratios,
    residual_ratios,
)
from flataudit.errors import InputError


def drawn(rng, log_p):
    """Labels from log_p (n, K)."""
    steps = np.exp(log_p).cumsum(axis=1)[:, :-1]
    return (rng.random(len(log_p))[:, None] > steps).sum(axis=1)


def first_alarm(seed, slope, looks, m, n_classes):
    """The look of the first alarm where the labels are the model's at that slope; None without."""
    rng = np.random.default_rng(seed)
    f = rng.normal(scale=2.0, size=(looks * m, n_classes))
    y = drawn(rng, special.log_softmax(slope * f, axis=1))
    ratios = label_ratios(special.log_softmax(f, axis=1), y)
    state = EProcess()
    for look in range(looks):
        state = state.extended(ratios[look * m : (look + 1) * m])
        if state.alarm:
            return look + 1
    return None


def test_the_expectation_is_one_over_all_labels_of_three_audits():
    """E[E] = 1 and E[E | the past] = E, exactly: every sequence of labels with its probability."""
    rng = np.random.default_rng(0)
    log_p = special.log_softmax(rng.normal(size=(5, 3)), axis=1)
    audits = [slice(0, 2), slice(2, 3), slice(3, 5)]
    expected = np.zeros(3)
    after = {}
    for y in itertools.product(range(3), repeat=5):
        weight = math.exp(sum(log_p[i, k] for i, k in enumerate(y)))
        state, path = EProcess(), []
        for audit in audits:
            state = state.extended(label_ratios(log_p[audit], np.array(y)[audit]))
            path.append(math.exp(state.log_e))
        expected += weight * np.array(path)
        after.setdefault(y[:3], []).append((weight, path[1], path[2]))
    assert expected == pytest.approx(np.ones(3), abs=1e-12)
    for found in after.values():
        weights, before, later = map(np.array, zip(*found, strict=True))
        assert (weights * later).sum() / weights.sum() == pytest.approx(before[0], rel=1e-12)


@pytest.mark.parametrize("z", [np.zeros(1), np.zeros((1, 2))])
def test_gaussian_ratios_have_expectation_one(z):
    """Per output: by quadrature over y of p(y) p_a(y)/p(y)."""
    for at, a in enumerate(SLOPES):

        def density(value, at=at):
            one = residual_ratios(np.array([value]))[0, at]
            return stats.norm.pdf(value) * math.exp(one)

        total, _ = integrate.quad(density, -30, 30, points=[0.0])
        assert total == pytest.approx(1.0, abs=1e-9)
        both = residual_ratios(z)[0, at]
        assert both == pytest.approx(0.5 * z.size * math.log(a))


@pytest.mark.parametrize("rate", [1e-3, 0.7, 12.0, 149.0, 151.0, 900.0])
def test_poisson_ratios_have_expectation_one(rate):
    counts = np.arange(0.0, rate + 40 * math.sqrt(rate) + 60)
    ratios = count_ratios(counts, np.full_like(counts, rate))
    expected = np.exp(ratios + stats.poisson.logpmf(counts, rate)[:, None]).sum(axis=0)
    assert expected == pytest.approx(np.ones(len(SLOPES)), abs=2e-9)


def test_ratios_are_those_of_the_tempered_model():
    rng = np.random.default_rng(1)
    f = rng.normal(scale=3.0, size=(40, 4))
    y = rng.integers(0, 4, 40)
    found = label_ratios(special.log_softmax(f, axis=1), y)
    for at, a in enumerate(SLOPES):
        tempered = special.log_softmax(a * f, axis=1) - special.log_softmax(f, axis=1)
        assert found[:, at] == pytest.approx(tempered[np.arange(40), y], abs=1e-12)
    z = rng.normal(size=(40, 2))
    wider = [stats.norm.logpdf(z, scale=a**-0.5) - stats.norm.logpdf(z) for a in SLOPES]
    assert residual_ratios(z) == pytest.approx(np.stack(wider, axis=1).sum(axis=2), abs=1e-12)


def test_calibrated_models_raise_few_false_alarms_over_all_looks():
    """Ville: at most 1 in 20 ever; here 30 audits of 100 labels. (At 5 % each: 3 in 4.)"""
    alarms = [first_alarm(seed, 1.0, looks=30, m=100, n_classes=3) for seed in range(200)]
    assert sum(look is not None for look in alarms) <= 10


@pytest.mark.parametrize("temperature", [0.9, 1 / 0.9])
def test_a_mild_temperature_is_found_by_about_the_fourth_audit_of_300_labels(temperature):
    """Ten classes: half by the fourth, nearly all by the eighth. Fewer classes tell less."""
    looks = [first_alarm(seed, 1 / temperature, 16, 300, 10) for seed in range(40)]
    assert None not in looks
    assert np.median(looks) <= 5
    assert np.mean(np.array(looks) <= 8) >= 0.9


def test_slopes_near_one_are_let_pass():
    """Nearer to 1 than to .95: E shrinks, however many labels there are."""
    rng = np.random.default_rng(2)
    f = rng.normal(scale=2.0, size=(200_000, 3))
    y = drawn(rng, special.log_softmax(0.985 * f, axis=1))
    assert EProcess().extended(label_ratios(special.log_softmax(f, axis=1), y)).log_e < 0


def test_one_pass_or_many_are_the_same():
    rng = np.random.default_rng(3)
    log_p = special.log_softmax(rng.normal(size=(500, 5)), axis=1)
    ratios = label_ratios(log_p, drawn(rng, log_p))
    whole = EProcess().extended(ratios)
    parts = EProcess()
    for part in np.split(ratios, [1, 7, 130, 131, 400]):
        parts = EProcess.from_dict(parts.extended(part).to_dict())
    assert parts.log_ratios == pytest.approx(whole.log_ratios, abs=1e-11)
    assert (parts.n, parts.looks, whole.looks) == (500, 6, 1)
    assert parts.log_e == pytest.approx(whole.log_e, abs=1e-11)
    assert parts.extended(np.empty((0, len(SLOPES)))) is parts


def test_an_alarm_stays_one():
    up = np.full((1, len(SLOPES)), math.log(THRESHOLD))
    state = EProcess().extended(up * 0.999)
    assert not state.alarm
    state = EProcess().extended(up * 1.001)
    assert state.alarm
    state = state.extended(-up)
    assert state.alarm
    assert state.log_e == pytest.approx(math.log(THRESHOLD) * 0.001)
    assert EProcess.from_dict(state.to_dict()) == state


def test_impossible_labels_and_extreme_residuals_stay_finite():
    log_p = np.array([[0.0, -np.inf], [0.0, -np.inf]])
    state = EProcess().extended(label_ratios(log_p, [0, 1]))
    assert state.alarm
    assert state.slope == 0.5
    state = EProcess().extended(residual_ratios(np.array([1e200, -3.0])))
    assert all(map(math.isfinite, (*state.log_ratios, state.log_e)))
    assert state.alarm
    assert count_ratios(np.array([3.0]), np.array([2.0 * eprocess.RATE_LIMIT])) is None


@pytest.mark.parametrize(
    "change",
    [{"slopes": [0.5]}, {"log_ratios": [1.0]}, {"log_ratios": None}, {"log_e_max": math.nan}],
)
def test_a_damaged_state_is_refused(change):
    with pytest.raises(InputError, match="expected the state of an e-process"):
        EProcess.from_dict(EProcess().to_dict() | change)
    with pytest.raises(InputError, match="expected finite log ratios"):
        EProcess().extended(np.full((1, len(SLOPES)), np.nan))
