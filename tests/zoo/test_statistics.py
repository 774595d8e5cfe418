"""The scores against values worked out by hand, and against scipy where it has them."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks.zoo import statistics as s

ESTIMATE = [1.0, 2.0, 3.0, 4.0]
GAP = [1.0, 3.0, 2.0, 4.0]


def test_kendall_counts_pairs():
    # Six pairs, one of them the wrong way round: (5 - 1)/6.
    assert s.kendall(ESTIMATE, GAP) == pytest.approx(4 / 6, abs=1e-15)


def test_kendall_and_spearman_agree_with_scipy_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 8, 40), rng.integers(0, 8, 40)
    assert s.kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic, abs=1e-12)
    assert s.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def test_weights_count_a_model_as_often_as_it_is_repeated():
    rng = np.random.default_rng(1)
    a, b, w = rng.normal(size=9), rng.normal(size=9), rng.integers(0, 4, 9)
    x, y = np.repeat(a, w), np.repeat(b, w)
    assert s.kendall(a, b, w) == pytest.approx(s.kendall(x, y), abs=1e-12)
    assert s.spearman(a, b, w) == pytest.approx(s.spearman(x, y), abs=1e-12)
    assert s.quantile(a, 0.9, w) == s.quantile(x, 0.9)
    assert s.coverage(a, a + 1, b, w) == pytest.approx(s.coverage(x, x + 1, y), abs=1e-12)


def test_ranking_a_constant_is_undefined():
    assert math.isnan(s.kendall([1, 1, 1], [1, 2, 3]))
    assert math.isnan(s.spearman([1, 1, 1], [1, 2, 3]))


def test_log_errors():
    found = s.log_errors([0.2, 0.05, -0.1, 0.1], [0.1, 0.1, 0.1, 0.0])
    assert found[:2] == pytest.approx([math.log(2), math.log(2)])
    assert found[2] == math.inf
    assert math.isnan(found[3])


def test_excess_takes_the_sampling_noise_off():
    # error .5, s/gap = .03/.1 = .3: sqrt(.25 - .09) = .4; error .2 is within .3.
    estimate = [0.1 * math.exp(0.5), 0.1 * math.exp(-0.2)]
    assert s.excess(estimate, [0.1, 0.1], [0.03, 0.03]) == pytest.approx([0.4, 0.0])
    # Of two signs: within s of each other, or not. A gap of 0 alike.
    assert s.excess([0.01, 0.05, 0.02], [-0.01, -0.01, 0.0], [0.03] * 3).tolist() == [
        0,
        math.inf,
        0,
    ]


def test_quantile_is_a_value_that_occurred():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert s.quantile(values, 0.5) == 3.0
    assert s.quantile(values, 0.9) == 5.0
    assert s.quantile([0.0, 1.0], 0.9, [9, 1]) == 0.0
    assert s.quantile([math.nan, 2.0], 0.5) == 2.0
    assert math.isnan(s.quantile([], 0.5))


@pytest.mark.parametrize("q", [0.05, 0.1, 0.5, 0.9, 0.95])
@pytest.mark.parametrize("n", [1, 7, 10, 40])
def test_quantile_is_numpys_inverted_cdf(q, n):
    values = np.random.default_rng(n).normal(size=n)
    assert s.quantile(values, q) == np.quantile(values, q, method="inverted_cdf")


def test_coverage():
    assert s.coverage([0, 0, 0, 0], [1, 1, 1, 1], [0.5, 1.0, 1.5, -1]) == 0.5


def test_sign_accuracy_by_hyper_parameter():
    # Pairs (0,1) and (2,3) differ in width, (0,2) in n; without noise every pair counts one.
    pairs = [(0, 1, "width"), (2, 3, "width"), (0, 2, "n")]
    found = s.sign_accuracy([1, 2, 3, 2], [1, 2, 3, 4], [0, 0, 0, 0], pairs)
    assert found == {"width": 0.5, "n": 1.0, "all": pytest.approx(2 / 3), "worst": 0.5}


def test_sign_accuracy_weighs_pairs_by_how_sure_the_truth_is():
    # Differences of 1 with se 0 (weight 1) and of one joint standard error (erf(1/sqrt 2) = .6827).
    pairs = [(0, 1, "n"), (2, 3, "n")]
    se = [0.0, 0.0, 0.6, 0.8]
    found = s.sign_accuracy([1, 2, 2, 1], [1, 2, 1, 2], se, pairs)
    sure = 2 * stats.norm.cdf(1.0) - 1
    assert found["n"] == pytest.approx(1 / (1 + sure), abs=1e-12)


def test_sign_accuracy_of_ties():
    pairs = [(0, 1, "n")]
    assert s.sign_accuracy([1, 1], [1, 2], [0, 0], pairs)["n"] == 0.5
    assert s.sign_accuracy([1, 2], [1, 1], [0, 0], pairs) == {}  # the truth has no sign


def test_information_of_a_perfect_and_of_a_useless_estimate():
    hyper = {"n": [1, 1, 2, 2]}
    assert s.conditional_information(GAP, GAP, hyper) == pytest.approx(100.0)
    # The opposite order says as much: information has no sign.
    assert s.conditional_information([-g for g in GAP], GAP, hyper) == pytest.approx(100.0)
    assert s.conditional_information([1, 1, 1, 1], GAP, hyper) == pytest.approx(0.0)


def test_information_by_hand():
    # Of the 12 ordered pairs 10 agree in sign: with p = 1/6, V and W uniform on -1, 1,
    # I = log 2 - H(p), H(W) = log 2.
    p = 1 / 6
    expected = 1 + (p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    assert s.conditional_information(ESTIMATE, GAP, {}) == pytest.approx(100 * expected)


def test_information_is_conditional_on_the_hyper_parameters():
    # The estimate knows n, on which the gap depends, and nothing within a value of n.
    n = [1, 1, 2, 2]
    gap, estimate = [1.0, 2.0, 11.0, 12.0], [1.0, 1.0, 2.0, 2.0]
    assert s.conditional_information(estimate, gap, {}) > 30
    assert s.conditional_information(estimate, gap, {"n": n}) == pytest.approx(0.0)


def test_information_averages_groups_by_their_pairs():
    # n = 1: three models, all pairs right (6 ordered pairs); n = 2: two, the estimate tied (2).
    n = [1, 1, 1, 2, 2]
    gap, estimate = [1, 2, 3, 1, 2], [1, 2, 3, 5, 5]
    found = s._normalised_information(
        s._signs(np.array(estimate, float)),
        s._signs(np.array(gap, float)),
        np.ones((5, 5)) - np.eye(5),
        np.array(n),
    )
    assert found == pytest.approx(6 / 8)


def test_bootstrap_of_groups():
    # A score that counts group "a"'s share: 2 of 4 models when both groups are drawn once.
    groups = ["a", "a", "b", "b"]
    low, high = s.bootstrap(lambda w: w[:2].sum() / w.sum(), groups, draws=400)
    assert (low, high) == (0.0, 1.0)
    seen = set()
    s.bootstrap(lambda w: seen.add(tuple(w)) or 0.0, groups, draws=50)
    assert seen == {(2, 2, 0, 0), (1, 1, 1, 1), (0, 0, 2, 2)}


def test_bootstrap_covers_a_mean():
    rng = np.random.default_rng(3)
    hits = 0
    for trial in range(100):
        values = rng.normal(size=40)
        low, high = s.bootstrap(
            lambda w, v=values: float((w * v).sum() / w.sum()),
            [str(i) for i in range(40)],
            seed=trial,
        )
        hits += low <= 0.0 <= high
    assert 83 <= hits <= 97


def test_bootstrap_of_one_group_says_nothing():
    assert all(math.isnan(v) for v in s.bootstrap(lambda w: 1.0, ["a", "a"]))


def test_unequal_lengths_are_named():
    with pytest.raises(ValueError, match="expected equal lengths, got 2, 3 and 2"):
        s.kendall([1, 2], [1, 2, 3])
