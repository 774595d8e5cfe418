"""Calibration errors against a ten-line oracle and torchmetrics; input checks; pictures."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import binom
from torchmetrics.functional.classification import multiclass_calibration_error

from flataudit.calibration import (
    calibration_errors,
    ece_if_calibrated,
    expected_calibration_error,
    gaussian_pit,
    pit_display,
    poisson_pit,
    reliability_display,
    top_label,
)
from flataudit.calibration.metrics import checked_probabilities, quantile_bins
from flataudit.errors import InputError


def draw(n, n_classes, seed=0, scale=2.5, temperature=1.0):
    """Log probabilities at the temperature, labels drawn at temperature 1."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(n, n_classes))
    p = np.exp(log_softmax(logits, axis=1))
    labels = (rng.random((n, 1)) > p.cumsum(axis=1)[:, :-1]).sum(axis=1)
    return log_softmax(logits / temperature, axis=1), labels


def oracle(confidence, hit, n_bins=15):
    """ECE and MCE, sample by sample."""
    bins = {}
    for c, h in zip(confidence, hit, strict=True):
        bins.setdefault(min(int(c * n_bins), n_bins - 1), []).append((c, h))
    gaps, weights = [], []
    for members in bins.values():
        c, h = np.mean(members, axis=0)
        gaps.append(abs(c - h))
        weights.append(len(members) / len(confidence))
    return np.dot(weights, gaps), max(gaps)


@pytest.mark.parametrize("n_classes", [2, 3, 10])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_ece_and_mce_agree_with_the_oracle_and_torchmetrics(n_classes, temperature):
    log_p, labels = draw(1500, n_classes, temperature=temperature)
    p = np.exp(log_p)
    confidence, hit = top_label(p, labels)
    errors = calibration_errors(confidence, hit)
    ece, mce = oracle(confidence, hit)
    assert errors.ece == pytest.approx(ece, abs=1e-12)
    assert errors.mce == pytest.approx(mce, abs=1e-12)
    assert expected_calibration_error(confidence, hit) == pytest.approx(ece, abs=1e-12)
    for norm, ours in (("l1", errors.ece), ("max", errors.mce)):
        theirs = multiclass_calibration_error(
            torch.from_numpy(p), torch.from_numpy(labels), n_classes, n_bins=15, norm=norm
        )
        assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_ace_is_the_mean_gap_over_bins_of_equal_size():
    log_p, labels = draw(1500, 4, temperature=0.7)
    confidence, hit = top_label(np.exp(log_p), labels)
    order = np.argsort(confidence)
    gaps = [abs((confidence[part] - hit[part]).mean()) for part in np.split(order, 15)]
    assert calibration_errors(confidence, hit).ace == pytest.approx(np.mean(gaps), abs=1e-12)


@pytest.mark.parametrize("confidence", [np.ones(300), np.repeat([0.5, 0.7, 0.9], 100)])
def test_tied_confidences_have_no_ace_and_the_right_ece(confidence):
    hit = np.arange(300) % 4 > 0
    errors = calibration_errors(confidence, hit)
    assert errors.ace is None
    assert (errors.ece, errors.mce) == pytest.approx(oracle(confidence, hit), abs=1e-12)


@pytest.mark.parametrize("n", [1, 2, 14, 40])
def test_few_samples_have_the_errors_of_the_oracle(n):
    log_p, labels = draw(n, 3)
    confidence, hit = top_label(np.exp(log_p), labels)
    errors = calibration_errors(confidence, hit)
    assert (errors.ece, errors.mce) == pytest.approx(oracle(confidence, hit), abs=1e-12)


def test_without_netcal_the_three_errors_are_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "netcal", None)
    monkeypatch.setitem(sys.modules, "netcal.metrics", None)
    errors = calibration_errors(np.array([0.5, 0.9]), np.array([True, False]))
    assert (errors.ece, errors.mce, errors.ace) == (None, None, None)


def test_ece_if_calibrated_is_the_mean_ece_of_labels_drawn_from_the_model():
    log_p, _ = draw(400, 5)
    p = np.exp(log_p)
    rng = np.random.default_rng(1)
    eces = []
    for _ in range(300):
        labels = (rng.random((400, 1)) > p.cumsum(axis=1)[:, :-1]).sum(axis=1)
        eces.append(oracle(*top_label(p, labels))[0])
    # Both are means of a few hundred draws.
    tolerance = 4 * np.std(eces) * np.sqrt(1 / 300 + 1 / 200)
    assert ece_if_calibrated(p.max(axis=1)) == pytest.approx(np.mean(eces), abs=tolerance)


def test_ece_if_calibrated_has_the_published_size_and_is_seeded():
    means = []
    for n in (500, 2000, 10000):
        confidence = np.exp(draw(n, 10)[0]).max(axis=1)
        means.append(ece_if_calibrated(confidence))
        assert ece_if_calibrated(confidence, seed=0) == means[-1]
        assert ece_if_calibrated(confidence, seed=1) != means[-1]
    assert means == pytest.approx([0.05, 0.025, 0.011], rel=0.15)


def test_equal_size_bins_keep_ties_together():
    confidence = np.array([0.2] * 7 + [0.5] * 50 + [0.9] * 43)
    index = quantile_bins(confidence)
    for value in (0.2, 0.5, 0.9):
        assert len(set(index[confidence == value])) == 1
    sizes = np.bincount(quantile_bins(np.random.default_rng(0).random(1500)))
    assert sizes.tolist() == [100] * 15


def test_probabilities_are_normalised_and_log_zero_is_finite():
    log_p, labels = checked_probabilities(
        [[np.log(0.50003), np.log(0.5), -np.inf], [0.0, -900.0, -np.inf]], [0.0, 1.0]
    )
    assert np.exp(log_p).sum(axis=1) == pytest.approx([1.0, 1.0], abs=1e-15)
    assert log_p[0, 2] == -745.0
    assert log_p[1].tolist() == [0.0, -900.0, -745.0]
    assert labels.dtype == np.int64


THIRD = np.full((4, 3), -np.log(3.0))
BAD = {
    "a vector": (THIRD[0], [0, 1, 2], "expected shape"),
    "one class": (np.zeros((4, 1)), [0] * 4, "expected shape"),
    "no samples": (np.zeros((0, 3)), [], "expected shape"),
    "NaN": (np.where(np.eye(4, 3) > 0, np.nan, THIRD), [0] * 4, "NaN"),
    "logits": (np.full((4, 3), 1000.0), [0] * 4, "log_softmax"),
    "negative logits": (np.full((4, 3), -5.0), [0] * 4, "sum to 1"),
    "probabilities": (np.exp(THIRD), [0] * 4, "log_softmax"),
    "all impossible": (np.full((4, 3), -np.inf), [0] * 4, "sum to 1"),
    "too few labels": (THIRD, [0, 1], r"shape \(4,\)"),
    "one-hot labels": (THIRD, np.eye(4, 3), r"shape \(4,\)"),
    "labels from 1": (THIRD, [1, 2, 3, 1], r"0\.\.2"),
    "negative labels": (THIRD, [-1, 0, 1, 2], r"0\.\.2"),
    "fractional labels": (THIRD, [0.5, 1, 2, 0], "whole numbers"),
    "NaN labels": (THIRD, [np.nan, 1, 2, 0], "whole numbers"),
    "string labels": (THIRD, ["a", "b", "c", "a"], "whole numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_line(name):
    log_p, labels, match = BAD[name]
    with pytest.raises(InputError, match=match) as caught:
        checked_probabilities(log_p, labels)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)
    assert "got" in str(caught.value)


def test_importing_the_package_loads_no_heavy_library():
    code = (
        "import sys, flataudit.calibration as c; assert c.assess_classification; "
        "heavy = {'netcal', 'torch', 'sklearn', 'matplotlib', 'scipy.stats', 'scipy.optimize'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_reliability_display_counts_every_sample_and_is_json():
    log_p, labels = draw(3000, 5, temperature=0.6)
    shown = json.loads(json.dumps(reliability_display(log_p, labels), allow_nan=False))
    confidence, hit = top_label(np.exp(log_p), labels)
    bins = shown["bins"]
    assert shown["kind"] == "classification"
    assert [b["count"] for b in bins] == [200] * 15
    assert np.mean([b["confidence"] for b in bins]) == pytest.approx(confidence.mean())
    assert np.mean([b["accuracy"] for b in bins]) == pytest.approx(hit.mean())
    assert shown["mean_confidence"] == pytest.approx(confidence.mean())
    assert shown["accuracy"] == pytest.approx(hit.mean())
    assert sum(row["right_count"] for row in shown["histogram"]) == hit.sum()
    assert sum(row["wrong_count"] for row in shown["histogram"]) == 3000 - hit.sum()
    for row in shown["histogram"]:
        inside = (confidence >= row["left"]) & (confidence < row["right"])
        assert row["right_count"] == (inside & hit).sum()
    # Over-confident by T = .6: most bins lie below a band that does not follow them.
    assert sum(b["accuracy"] < b["low"] for b in bins) > 7


def test_reliability_band_covers_95_percent_of_calibrated_bins():
    inside = []
    for seed in range(40):
        for b in reliability_display(*draw(1500, 10, seed=seed))["bins"]:
            assert b["low"] <= b["confidence"] <= b["high"]
            inside.append(b["low"] <= b["accuracy"] <= b["high"])
    # Exact binomial limits are discrete, so they cover a little more than 95 %.
    assert 0.945 < np.mean(inside) < 0.985


def test_bands_are_binomial_quantiles():
    log_p = np.log(np.tile([0.9, 0.1], (80, 1)))
    (only,) = reliability_display(log_p, np.arange(80) % 8 == 0)["bins"]
    limits = binom.ppf([0.025, 0.975], 80, 0.9) / 80
    assert (only["low"], only["high"]) == pytest.approx(tuple(limits))
    first = pit_display(np.full(200, 0.05))["bins"][0]
    assert (first["low"], first["high"]) == tuple(binom.ppf([0.025, 0.975], 200, 0.1))
    assert (first["left"], first["right"], first["count"]) == (0.0, 0.1, 200)


def test_reliability_display_of_a_saturated_model():
    log_p = np.tile([0.0, -np.inf], (50, 1))
    shown = reliability_display(log_p, np.arange(50) % 10 == 0)
    assert shown["bins"] == [
        {"confidence": 1.0, "accuracy": 0.9, "low": 1.0, "high": 1.0, "count": 50}
    ]
    assert shown["histogram"][-1] == pytest.approx(
        {"left": 0.95, "right": 1.0, "right_count": 45, "wrong_count": 5}
    )


def test_pit_display_is_flat_for_the_true_model_and_u_shaped_for_a_narrow_one():
    rng = np.random.default_rng(0)
    z = rng.normal(size=4000)
    true = pit_display(gaussian_pit(z))
    assert true["kind"] == "regression"
    assert json.loads(json.dumps(true, allow_nan=False)) == true
    assert sum(b["count"] for b in true["bins"]) == 4000
    assert sum(b["low"] <= b["count"] <= b["high"] for b in true["bins"]) >= 8
    narrow = [b["count"] for b in pit_display(gaussian_pit(1.5 * z))["bins"]]
    assert min(narrow[0], narrow[-1]) > true["bins"][0]["high"] > max(narrow[3:7])
    rate = rng.uniform(0.2, 8.0, size=4000)
    poisson = pit_display(poisson_pit(rng.poisson(rate).astype(float), rate))["bins"]
    assert sum(b["low"] <= b["count"] <= b["high"] for b in poisson) >= 8


@pytest.mark.parametrize("pit", [[], [0.5, np.nan], [-0.1], [1.1]])
def test_pit_display_refuses_what_is_no_probability(pit):
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        pit_display(pit)
