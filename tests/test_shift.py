"""The two-sample test of the inputs: its level on real data, its power, and what it says."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from scipy.stats import binom, ks_2samp
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from flataudit import audit
from flataudit.selection import is_shifted
from flataudit.shift import LEVEL, MAX_FEATURES, input_shift

DIGITS, LABELS = load_digits(return_X_y=True)
DIABETES = load_diabetes().data


def halves(x, seed: int, m: int | None = None):
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    cut = len(x) // 2 if m is None else len(x) - m
    x = torch.as_tensor(x)
    return x[order[:cut]], x[order[cut:]]


@pytest.mark.parametrize(
    ("x", "m"),
    [(DIGITS[:600], None), (DIGITS[:600], 50), (DIABETES, None), (DIABETES, 50)],
    ids=["digits", "digits50", "diabetes", "diabetes50"],
)
def test_random_splits_of_real_data_raise_no_alarm(x, m):
    """At the stated level, and with the size that counts as material almost never."""
    repeats = 100
    found = [input_shift(*halves(x, seed, m), seed=seed) for seed in range(repeats)]
    alarms = sum(shift.p_value < LEVEL for shift in found)
    assert alarms <= binom.ppf(0.999, repeats, LEVEL)
    assert sum(map(is_shifted, found)) <= 1
    # p-values are spread as under the null hypothesis, not piled up anywhere.
    assert ks_2samp([s.p_value for s in found], np.linspace(0, 1, 1001)).pvalue > 1e-3


def null_pairs(kind: str, seed: int):
    g = torch.Generator().manual_seed(seed)
    if kind == "tokens":
        x = torch.randint(0, 500, (120, 12), generator=g)
    elif kind == "flags":
        x = torch.rand(120, 80, generator=g) < 0.02
    elif kind == "images":
        x = torch.randint(0, 256, (120, 1, 6, 6), generator=g, dtype=torch.uint8)
    else:
        x = torch.randn(120, 3, generator=g, dtype=torch.float64) ** 5
    return x[:70], x[70:]


@pytest.mark.parametrize("kind", ["tokens", "flags", "images", "heavy"])
def test_level_for_every_kind_of_input(kind):
    alarms = sum(input_shift(*null_pairs(kind, s), seed=s).p_value < LEVEL for s in range(100))
    assert alarms <= binom.ppf(0.999, 100, LEVEL)


def test_one_shifted_feature_is_named():
    a, b = halves(DIGITS, 0)
    b[:, 20] += 0.5 * float(b[:, 20].std())
    found = input_shift(a, b)
    assert (found.worst_feature, found.n_features) == (20, 64)
    assert 1 <= found.n_features_shifted <= 2
    assert found.worst_distance == ks_2samp(a[:, 20], b[:, 20]).statistic
    assert is_shifted(found)


@pytest.mark.parametrize(
    ("change", "features"),
    [
        (lambda b: b + 0.3 * torch.as_tensor(DIABETES.std(axis=0)), 2),
        (lambda b: b * 1.5, 2),
        (lambda b: b[b[:, 0] > 0], 1),
    ],
    ids=["mean", "scale", "older"],
)
def test_shifts_that_matter_are_found(change, features):
    a, b = halves(DIABETES, 1)
    found = input_shift(a, change(b))
    assert is_shifted(found)
    assert found.n_features_shifted >= features


def test_missing_classes_are_found():
    rows = np.random.default_rng(3).permutation(len(DIGITS))
    held = DIGITS[rows[900:]][LABELS[rows[900:]] < 7]
    assert is_shifted(input_shift(torch.as_tensor(DIGITS[rows[:900]]), torch.as_tensor(held)))


def test_dependence_alone_is_found_jointly():
    """Each feature has the same distribution; together they do not."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(500, 2, generator=g)
    b = torch.randn(500, 1, generator=g).expand(-1, 2) + 0.2 * torch.randn(500, 2, generator=g)
    found = input_shift(a, b / b.std(dim=0))
    assert found.n_features_shifted == 0
    assert found.p_value < LEVEL
    assert found.joint_distance > 0.1


def test_token_frequencies_are_found_wherever_they_stand():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 400, (300, 16), generator=g) for _ in range(2))
    b = torch.where((b > 40) & (b < 80), 41 + 300 * (b % 2), b)
    found = input_shift(a, b)
    assert found.p_value < LEVEL
    assert found.joint_distance > 0.1


def test_immaterial_differences_are_not_warned_of():
    g = torch.Generator().manual_seed(1)
    a, b = (torch.randn(2000, 1, generator=g) for _ in range(2))
    found = input_shift(a, b + 0.15)
    assert found.p_value < LEVEL
    assert found.worst_distance < 0.1
    assert not is_shifted(found)


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("constant", [False, True])
def test_tiny_and_constant_samples(n, constant):
    g = torch.Generator().manual_seed(n)
    x = torch.ones(2 * n, 3) if constant else torch.randn(2 * n, 3, generator=g)
    found = input_shift(x[:n], x[n:])
    assert 0 < found.p_value <= 1
    assert np.isfinite([found.statistic, found.worst_distance, found.joint_distance]).all()
    if constant:
        assert (found.p_value, found.statistic, found.n_features_shifted) == (1.0, 0.0, 0)


def test_huge_values_do_not_overflow():
    a, b = halves(DIABETES * 1e300, 4)
    assert input_shift(a, b).p_value > LEVEL
    assert input_shift(a, b * 1.7).p_value < LEVEL


def test_seeded_and_fast():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 784, generator=g)
    start = time.process_time()
    first = input_shift(x[:2000], x[2000:], seed=3)
    assert time.process_time() - start < 5  # 0.8 s on an idle core
    assert first == input_shift(x[:2000], x[2000:], seed=3)


def test_more_features_than_are_looked_at_one_by_one():
    x = torch.randn(60, MAX_FEATURES + 500, generator=torch.Generator().manual_seed(0))
    found = input_shift(x[:30], x[30:] + 3.0)
    assert found.n_features == MAX_FEATURES
    assert 0 <= found.worst_feature < x.shape[1]
    assert found.p_value < LEVEL


# --- in the audit -------------------------------------------------------------------------------


def audited(moved: float):
    g = torch.Generator().manual_seed(5)
    x = torch.randn(300, 3, generator=g, dtype=torch.float64)
    y = torch.randint(0, 2, (300,), generator=g)
    model = nn.Linear(3, 2).double()
    held = x[150:].clone()
    held[:, 1] += moved
    return audit(model, (x[:150], y[:150]), heldout=(held, y[150:]), penalty=0.1)


def test_the_report_holds_the_test_and_warns():
    report = audited(1.0).to_dict()
    assert {"p_value", "statistic", "n_features_shifted", "worst_feature"} <= report["shift"].keys()
    (warning,) = [w for w in report["warnings"] if w["code"] == "outside_theory"]
    assert warning["severity"] == "warn"
    assert "feature 1 most" in warning["message"]
    assert f"{report['shift']['worst_distance']:.2f} of 1 apart; 1 of 3" in warning["message"]
    assert "\n" not in warning["message"]


def test_no_warning_and_no_test_without_reason():
    report = audited(0.0)
    assert report.shift.p_value > LEVEL
    assert "outside_theory" not in {w.code for w in report.warnings}
    x, y = torch.randn(30, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    assert audit(nn.Linear(3, 2), (x, y), penalty=0.1).to_dict()["shift"] is None
