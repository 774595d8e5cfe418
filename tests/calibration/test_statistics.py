"""The tests of calibration: closed forms, slow oracles, type-I error and power."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from flataudit.calibration import tests as ct
from flataudit.calibration.metrics import checked_probabilities, top_label


def draw(n, n_classes=10, seed=0, scale=2.5, wrong=lambda logits: logits):
    """Log probabilities of softmax(wrong(logits)); labels drawn from softmax(logits)."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, n_classes))
    p = np.exp(log_softmax(logits, axis=1))
    labels = (rng.random((n, 1)) > p.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return log_softmax(wrong(logits), axis=1), labels


def log_likelihood(log_p, labels, slope):
    return log_softmax(slope * log_p, axis=1)[np.arange(len(labels)), labels].sum()


def three_p_values(log_p, labels):
    p = np.exp(log_p)
    confidence, hit = top_label(p, labels)
    return [
        ct.slope_score_test(log_p, labels).p_value,
        ct.bin_test(confidence, hit).p_value,
        ct.class_bias_test(p, labels).p_value,
    ]


# --- slope ---


def test_score_is_the_derivative_of_the_log_likelihood():
    log_p, labels = draw(300, 4)
    h = 1e-5
    derivative = (log_likelihood(log_p, labels, 1 + h) - log_likelihood(log_p, labels, 1 - h)) / (
        2 * h
    )
    p = np.exp(log_p)
    mean = (p * log_p).sum(axis=1, keepdims=True)
    variance = (p * (log_p - mean) ** 2).sum()
    z = ct.slope_score_test(log_p, labels)
    assert z.value == pytest.approx(derivative / math.sqrt(variance), rel=1e-6)
    assert z.p_value == pytest.approx(2 * stats.norm.sf(abs(z.value)), rel=1e-12)


@pytest.mark.parametrize(("p", "right"), [(0.9, 0.6), (0.6, 0.95), (0.999, 0.75), (0.8, 0.8)])
def test_slope_of_constant_probabilities_has_a_closed_form(p, right):
    """Two classes, p everywhere: logit(right) = a logit(p), information n f (1 - f) logit(p)^2."""
    log_p = np.log(np.tile([p, 1 - p], (1000, 1)))
    labels = (np.arange(1000) >= round(1000 * right)).astype(int)
    logit = math.log(p / (1 - p))
    fit = ct.fit_slope(log_p, labels)
    assert fit.value == pytest.approx(math.log(right / (1 - right)) / logit, rel=1e-9)
    assert fit.se == pytest.approx(1 / (math.sqrt(1000 * right * (1 - right)) * logit), rel=1e-8)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.5, 50.0])
def test_slope_maximises_the_likelihood(temperature):
    log_p, labels = draw(400, 5, wrong=lambda logits: logits / temperature)
    fit = ct.fit_slope(log_p, labels)
    best = minimize_scalar(
        lambda a: -log_likelihood(log_p, labels, a),
        bounds=(0.0, 100.0),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert fit.value == pytest.approx(best.x, rel=1e-5)
    assert fit.value == pytest.approx(temperature, abs=4 * fit.se)


def test_chunks_do_not_change_the_slope(monkeypatch):
    log_p, labels = draw(500, 5)
    whole = ct.fit_slope(log_p, labels), ct.slope_score_test(log_p, labels)
    monkeypatch.setattr(ct, "_CHUNK", 35)
    parts = ct.fit_slope(log_p, labels), ct.slope_score_test(log_p, labels)
    assert parts[0].value == pytest.approx(whole[0].value, rel=1e-12)
    assert parts[1].value == pytest.approx(whole[1].value, rel=1e-10)


def test_no_finite_slope_where_every_label_is_right_or_nothing_is_said():
    log_p, _ = draw(100, 3)
    for table, labels in (
        (log_p, log_p.argmax(axis=1)),
        (np.full((100, 3), -math.log(3)), np.arange(100) % 3),
    ):
        fit = ct.fit_slope(table, labels)
        assert (fit.value, fit.se) == (math.inf, math.inf)
        assert fit.interval(2.0) == (-math.inf, math.inf)


def test_slope_is_zero_where_flat_probabilities_fit_best():
    log_p = np.log(np.tile([0.9, 0.1], (100, 1)))
    fit = ct.fit_slope(log_p, np.ones(100, dtype=int))
    assert fit.value == 0.0
    assert fit.se == pytest.approx(1 / (5 * math.log(9)))


def test_impossible_labels_leave_finite_slopes():
    """log 0 counts as -745, so 20 % impossible labels fit at logit(.8)/745."""
    raw = np.tile([0.0, -np.inf], (1000, 1))
    log_p, labels = checked_probabilities(raw, np.arange(1000) % 5 == 0)
    assert ct.fit_slope(log_p, labels).value == pytest.approx(math.log(4) / 745, rel=1e-9)
    score = ct.slope_score_test(log_p, labels)
    assert score.value < -1e10
    assert score.p_value == 0.0
    bins = ct.bin_test(*top_label(np.exp(log_p), labels))
    assert (bins.value, bins.p_value) == (math.inf, 0.0)


def test_a_saturated_model_that_is_right_is_not_rejected():
    for low in (-50.0, -745.0, -1000.0, -np.inf):
        log_p, labels = checked_probabilities(np.tile([0.0, low, low], (300, 1)), np.zeros(300))
        assert min(three_p_values(log_p, labels)) > 0.99


# --- bins, bias, equivalence: the formulas of their docstrings, written slowly ---


def bin_oracle(confidence, hit):
    edges = sorted(set(np.quantile(confidence, [j / 15 for j in range(1, 15)])))
    groups = [[] for _ in range(len(edges) + 1)]
    for c, h in zip(confidence, hit, strict=True):
        groups[sum(c >= edge for edge in edges)].append((c, h))
    return groups


@pytest.mark.parametrize("scale", [0.5, 2.5, 12.0])
def test_bin_test_is_the_merged_chi_square(scale):
    log_p, labels = draw(700, 4, scale=scale)
    confidence, hit = top_label(np.exp(log_p), labels)
    merged, current = [], []
    for group in bin_oracle(confidence, hit):
        current += group
        if sum(c * (1 - c) for c, _ in current) >= 2:
            merged.append(current)
            current = []
    merged[-1] += current
    value = sum(
        sum(h - c for c, h in part) ** 2 / sum(c * (1 - c) for c, _ in part) for part in merged
    )
    result = ct.bin_test(confidence, hit)
    assert result.dof == len(merged)
    assert result.value == pytest.approx(value, rel=1e-10)
    assert result.p_value == pytest.approx(stats.chi2.sf(value, len(merged)), rel=1e-10)


def test_too_little_variance_is_one_bin():
    confidence = np.linspace(0.99, 0.999, 100)
    result = ct.bin_test(confidence, np.arange(100) > 2)
    excess = 97 - confidence.sum()
    assert result.dof == 1
    assert result.value == pytest.approx(excess**2 / (confidence * (1 - confidence)).sum())


def test_class_bias_is_the_quadratic_form_and_names_no_class():
    log_p, labels = draw(600, 5)
    p = np.exp(log_p)
    result = ct.class_bias_test(p, labels)
    excess = np.bincount(labels, minlength=5) - p.sum(axis=0)
    covariance = np.diag(p.sum(axis=0)) - p.T @ p
    assert result.dof == 4
    for dropped in (0, 3):
        keep = np.arange(5) != dropped
        value = excess[keep] @ np.linalg.solve(covariance[np.ix_(keep, keep)], excess[keep])
        assert result.value == pytest.approx(value, rel=1e-6)


def test_class_bias_of_two_classes_is_a_squared_z():
    log_p, labels = draw(300, 2)
    p1 = np.exp(log_p[:, 1])
    z = (labels - p1).sum() / math.sqrt((p1 * (1 - p1)).sum())
    result = ct.class_bias_test(np.exp(log_p), labels)
    assert result.value == pytest.approx(z * z, rel=1e-6)
    assert result.p_value == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-6)


def test_class_bias_with_impossible_classes():
    p = np.tile([0.0, 0.5, 0.5, 0.0], (100, 1))
    assert ct.class_bias_test(p, np.arange(100) % 2 + 1).value == pytest.approx(0.0, abs=1e-6)
    assert ct.class_bias_test(p, np.arange(100) % 3).p_value == 0.0


@pytest.mark.parametrize("n", [30, 800])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_error_bound_is_the_formula(n, temperature):
    log_p, labels = draw(n, 4, wrong=lambda logits: logits / temperature)
    confidence, hit = top_label(np.exp(log_p), labels)
    t = variance = 0.0
    for group in bin_oracle(confidence, hit):
        r = np.array([h - c for c, h in group])
        d, w = r.mean(), len(r) / n
        v = r.var() / (len(r) - 1)
        t += w * (d * d - v)
        variance += w * w * (2 * v * v + 4 * max(d * d - v, 0) * v)
    bound = ct.calibration_error_bound(confidence, hit)
    assert bound.squared == pytest.approx(t, rel=1e-9)
    assert bound.se == pytest.approx(math.sqrt(variance), rel=1e-9)
    assert bound.upper == pytest.approx(math.sqrt(max(t + 1.645 * math.sqrt(variance), 0)))


def test_error_bound_is_unbiased():
    """A known error: every confidence .1 above the truth; the squared error is .01."""
    bounds = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.5, 1.0, size=600)
        bounds.append(ct.calibration_error_bound(confidence, rng.random(600) < confidence - 0.1))
    squared = np.array([b.squared for b in bounds])
    assert squared.mean() == pytest.approx(0.01, abs=4 * squared.std() / math.sqrt(300))
    assert np.mean([b.se for b in bounds]) == pytest.approx(squared.std(), rel=0.15)


def test_a_model_at_the_tolerance_is_rarely_called_equivalent():
    """A normal bound on a skewed sum: the nominal 5 % may double, not more."""
    equivalent = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        confidence = rng.uniform(0.5, 1.0, size=2000)
        bound = ct.calibration_error_bound(confidence, rng.random(2000) < confidence - 0.05)
        equivalent.append(bound.upper <= 0.05)
    assert np.mean(equivalent) < 0.10


def test_error_bound_needs_two_samples_in_a_bin():
    assert ct.calibration_error_bound(np.array([0.9]), np.array([True])).upper == math.inf


def test_confidence_gap_and_its_error():
    gap = ct.confidence_gap(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, False, True, True]))
    values = [-0.1, 0.8, -0.3, -0.4]
    assert gap.value == pytest.approx(0.0, abs=1e-15)
    assert gap.se == pytest.approx(np.std(values, ddof=1) / 2)
    assert gap.interval(2.0) == pytest.approx((-2 * gap.se, 2 * gap.se))
    one = ct.confidence_gap(np.array([0.9]), np.array([True]))
    assert one.interval(2.0) == (-math.inf, math.inf)


# --- type-I error and power ---

SIMULATIONS = 600
# Three standard errors of a rate around the nominal 5 %.
SLACK = 3 * math.sqrt(0.05 * 0.95 / SIMULATIONS)


@pytest.mark.parametrize("n_classes", [2, 10])
def test_type_one_error_is_nominal(n_classes):
    p_values = []
    for seed in range(SIMULATIONS):
        log_p, labels = draw(500, n_classes, seed=seed)
        p_values.append(three_p_values(log_p, labels))
    rates = (np.array(p_values) <= 0.05).mean(axis=0)
    assert (rates < 0.05 + SLACK).all(), rates
    assert (rates > 0.05 - SLACK).all(), rates
    together = (np.min(p_values, axis=1) <= 0.05 / 3).mean()
    assert 0.05 - SLACK < together < 0.05 + SLACK


def half_and_half(logits):
    wrong = logits.copy()
    wrong[::2] /= 0.7
    wrong[1::2] *= 0.7
    return wrong


def favour_class_0(logits):
    return logits + 0.5 * (np.arange(logits.shape[1]) == 0)


@pytest.mark.parametrize(
    ("wrong", "finds"),
    [
        (lambda logits: logits / 0.7, 0),
        (half_and_half, 1),
        (favour_class_0, 2),
    ],
    ids=["temperature", "mixture", "class"],
)
def test_each_test_finds_what_another_misses(wrong, finds):
    p_values = np.array([three_p_values(*draw(2000, seed=seed, wrong=wrong)) for seed in range(60)])
    power = (p_values <= 0.05 / 3).mean(axis=0)
    assert power[finds] > 0.9
    assert power.min() < 0.5


@pytest.mark.parametrize("temperature", [0.9, 1.1])
def test_a_mild_temperature_is_always_found_at_ten_thousand(temperature):
    for seed in range(10):
        log_p, labels = draw(10000, seed=seed, wrong=lambda logits: logits / temperature)
        score = ct.slope_score_test(log_p, labels)
        assert score.p_value <= 0.05 / 3
        assert (score.value < 0) == (temperature < 1)


# --- regression and counts ---


def test_dispersion_and_bias_closed_forms():
    z = np.array([2.0, -2.0, 1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    assert ct.dispersion_test(z).value == pytest.approx(2 / 4)
    assert ct.mean_bias_test(z + 1, 8.0).value == pytest.approx(8 / math.sqrt(8))
    counts, rate = np.array([0.0, 3.0]), np.array([1.0, 2.0])
    assert ct.poisson_dispersion_test(counts, rate).value == pytest.approx((1 - 1) / 2)


def test_poisson_dispersion_terms_have_mean_0_and_variance_2():
    for rate in (0.1, 1.0, 7.0):
        y = np.arange(60.0)
        term = ((y - rate) ** 2 - y) / rate
        pmf = stats.poisson.pmf(y, rate)
        assert pmf @ term == pytest.approx(0.0, abs=1e-12)
        assert pmf @ term**2 == pytest.approx(2.0, rel=1e-10)


def test_dispersion_interval_is_the_chi_square_interval():
    z = np.random.default_rng(0).normal(size=400)
    mean_square = float((z * z).mean())
    low, high = ct.dispersion_interval(mean_square, 400, 1.96)
    tail = stats.norm.sf(1.96)
    assert low == pytest.approx(400 * mean_square / stats.chi2.isf(tail, 400), rel=1e-10)
    assert high == pytest.approx(400 * mean_square / stats.chi2.ppf(tail, 400), rel=1e-10)


def test_dispersion_interval_covers_under_normal_and_heavy_tails():
    for sample, variance in (
        (lambda rng: rng.normal(size=500), 1.0),
        (lambda rng: rng.laplace(size=500), 2.0),
    ):
        covered = []
        for seed in range(400):
            square = sample(np.random.default_rng(seed)) ** 2
            dof = ct.dispersion_dof(square, 2 / 500)
            low, high = ct.dispersion_interval(float(square.mean()), dof, 1.96)
            covered.append(low <= variance <= high)
        assert np.mean(covered) > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 400)


def test_pit_is_the_distribution_function():
    z = np.array([-40.0, -1.0, 0.0, 2.0, 40.0])
    assert ct.gaussian_pit(z) == pytest.approx(stats.norm.cdf(z))
    counts = np.array([0.0, 0.0, 3.0, 50.0])
    rate = np.array([0.1, 9.0, 2.5, 50.0])
    u = ct.poisson_pit(counts, rate)
    assert (u >= stats.poisson.cdf(counts - 1, rate) - 1e-12).all()
    assert (u <= stats.poisson.cdf(counts, rate) + 1e-12).all()
    assert (u == ct.poisson_pit(counts, rate, seed=0)).all()
    assert (u != ct.poisson_pit(counts, rate, seed=1)).all()


def test_pit_test_is_the_chi_square_of_equal_bins():
    counts = np.array([3, 5, 9, 1, 4, 4, 4, 8, 0, 2])
    pit = np.repeat(np.arange(10) / 10 + 0.05, counts)
    pit[-1] = 1.0
    result = ct.pit_test(pit)
    expected = stats.chisquare(counts)
    assert result.dof == 9
    assert result.value == pytest.approx(expected.statistic)
    assert result.p_value == pytest.approx(expected.pvalue)


def test_type_one_error_of_regression_and_counts_is_nominal():
    p_values = []
    for seed in range(SIMULATIONS):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=500)
        rate = np.exp(rng.normal(size=500))
        y = rng.poisson(rate).astype(float)
        p_values.append(
            [
                ct.dispersion_test(z).p_value,
                ct.pit_test(ct.gaussian_pit(z)).p_value,
                ct.mean_bias_test(z, 500.0).p_value,
                ct.poisson_dispersion_test(y, rate).p_value,
                ct.pit_test(ct.poisson_pit(y, rate, seed=seed)).p_value,
                ct.mean_bias_test(y - rate, float(rate.sum())).p_value,
            ]
        )
    rates = (np.array(p_values) <= 0.05).mean(axis=0)
    assert (np.abs(rates - 0.05) < SLACK).all(), rates
