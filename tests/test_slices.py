"""Slices: means of per-sample values over groups, and how a column becomes groups."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch

import flataudit
from flataudit.errors import InputError
from flataudit.slices import MAX_TEXTS, MISSING, group, wilson


def grouped(values, **more):
    """{name: positions} of a column's groups."""
    names, codes = group(values, len(values), "column", **more)
    return {name: np.flatnonzero(codes == k).tolist() for k, name in enumerate(names)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["b", "a", "b"], {"a": [1], "b": [0, 2]}),
        (np.array([True, False]), {"False": [1], "True": [0]}),
        ([3, 1, 3], {"1": [1], "3": [0, 2]}),
        ([0.5, 2.0, math.nan], {"0.5": [0], "2": [1], MISSING: [2]}),
        (["a", None, "b"], {"a": [0], "b": [2], MISSING: [1]}),
        ([None, None], {MISSING: [0, 1]}),
        ([1, "a", 1], {"1": [0, 2], "a": [1]}),
        (np.array([[1], [2]]), {"1": [0], "2": [1]}),
        (torch.tensor([2, 2, 7]), {"2": [0, 1], "7": [2]}),
        (pd.Series([1, None, 2], dtype="Int64"), {"1": [0], "2": [2], MISSING: [1]}),
        (pd.Series(["x", pd.NA, "y"]), {"x": [0], "y": [2], MISSING: [1]}),
        (pd.Series(["x", "y", "x"], dtype="category"), {"x": [0, 2], "y": [1]}),
        ([1.00001, 1.00002], {"1.00001": [0], "1.00002": [1]}),
        ([math.inf, -math.inf], {"-inf": [1], "inf": [0]}),
    ],
)  # fmt: skip
def test_groups(values, expected):
    assert grouped(values) == expected


def test_many_numbers_fall_into_bins_of_equal_size():
    values = np.random.default_rng(0).permutation(1000) / 7
    names, codes = group(values, 1000, "v")
    assert np.bincount(codes).tolist() == [200] * 5
    for name, k in zip(names, range(5), strict=True):
        low, high = (float(part) for part in name.split(" to "))
        inside = values[codes == k]
        assert low == pytest.approx(inside.min(), rel=1e-3)
        assert high == pytest.approx(inside.max(), rel=1e-3)


def test_bins_of_tied_numbers_overlap_nowhere():
    values = np.r_[np.zeros(900), np.arange(1, 101)]
    names, codes = group(values, 1000, "v")
    assert names[0] == "0"
    ends = [(values[codes == k].min(), values[codes == k].max()) for k in range(len(names))]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
    assert np.bincount(codes).sum() == 1000


@pytest.mark.parametrize(
    ("values", "n", "message"),
    [
        ([1, 2], 3, r"one value of shop for each of the 3 training samples .* got shape \(2,\)"),
        (np.zeros((3, 2)), 3, r"got shape \(3, 2\)"),
        ([f"id {i}" for i in range(MAX_TEXTS + 1)], MAX_TEXTS + 1, "at most 100 different .* 101"),
        (np.array(["2026-01-01"], dtype="datetime64[D]"), 1, "numbers or text in shop"),
    ],
)
def test_what_cannot_be_sliced_by(values, n, message):
    with pytest.raises(InputError, match=message):
        group(values, n, "shop")


@pytest.mark.parametrize(("k", "n"), [(0, 5), (5, 5), (3, 10), (90, 100)])
def test_wilson_is_the_inverted_score_test(k, n):
    found = wilson(np.arange(n) < k)
    assert found.value == k / n
    assert 0.0 <= found.low <= found.value <= found.high <= 1.0
    for p in (found.low, found.high):
        if 0.0 < p < 1.0:  # |p_hat - p| is exactly z standard errors at p
            assert abs(k / n - p) == pytest.approx(1.6448536 * math.sqrt(p * (1 - p) / n), rel=1e-6)


@pytest.fixture(scope="module")
def audited():
    """A softmax regression, audited with two columns; its (x, y) and the report."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(4, 3, generator=generator, dtype=torch.float64)).argmax(dim=1)
    noise = torch.rand(300, generator=generator) < 0.2
    y = torch.where(noise, torch.randint(0, 3, (300,), generator=generator), y)
    net = torch.nn.Linear(4, 3).double()
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        penalty = 0.01 / 2 * sum((p**2).sum() for p in net.parameters())
        loss = torch.nn.functional.cross_entropy(net(x), y) + penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    columns = {"half": (x[:, 0] > 0).numpy(), "few": ["one"] + ["many"] * 299}
    return x, y, net, flataudit.audit(net, (x, y), penalty=0.01, slices=columns)


def test_the_tables_are_means_of_the_per_sample_values(audited):
    x, y, net, report = audited
    samples = report.samples
    assert report.classes.estimator == "loo"
    assert report.classes.gap == pytest.approx(report.estimates.loo.gap, rel=1e-12)
    assert [table.column for table in report.slices] == ["half", "few"]
    for table, of in (
        (report.classes, {str(k): (y == k).numpy() for k in range(3)}),
        (report.slices[0], {str(b): (x[:, 0] > 0).numpy() == b for b in (True, False)}),
    ):
        assert {row.value for row in table.rows} == set(of)
        assert sum(row.n for row in table.rows) == 300
        total = sum(row.n * row.gap for row in table.rows) / 300
        assert total == pytest.approx(table.gap, rel=1e-12)
        gaps = [row.gap for row in table.rows]
        assert gaps == sorted(gaps, reverse=True)
        for row in table.rows:
            part = of[row.value]
            losses = samples.nll[part] + samples.loo[part]
            assert row.gap == pytest.approx(samples.loo[part].mean(), rel=1e-12)
            assert row.train_nll == pytest.approx(samples.nll[part].mean(), rel=1e-12)
            se = losses.std(ddof=1) / math.sqrt(part.sum())
            assert row.gap_se == pytest.approx(se, rel=1e-12)
            with torch.no_grad():
                hit = (net(x).argmax(dim=1) == y).numpy()[part]
            assert row.train_accuracy == hit.mean()
    accuracy = sum(row.n * row.predicted_accuracy.value for row in report.classes.rows) / 300
    assert accuracy == pytest.approx(report.estimates.loo.accuracy, rel=1e-12)


def test_one_sample_has_no_standard_error_and_comes_last(audited):
    table = audited[3].slices[1]
    assert [row.value for row in table.rows] == ["many", "one"]
    assert table.rows[1].gap_se is None
    assert audited[3].to_dict()["slices"][1]["rows"][1]["gap_se"] is None


def test_slices_change_no_other_number(audited):
    x, y, net, report = audited
    plain = flataudit.audit(net, (x, y), penalty=0.01).to_dict()
    assert plain["slices"] == []
    found = report.to_dict()
    for one in (plain, found):
        one.pop("slices")
        one["solver"].pop("seconds")
    assert plain == found


def test_bad_slices_are_refused_before_any_work(audited, monkeypatch):
    x, y, net, _ = audited
    from flataudit import fitting

    monkeypatch.setattr(fitting, "penalised_fit", None)
    with pytest.raises(InputError, match="for each of the 300 training samples"):
        flataudit.audit(net, (x, y), penalty=0.01, slices={"half": [1, 2]})


def test_classes_by_name_and_none_for_regression(audited):
    x, y, net, _ = audited
    names = np.array(["ant", "bee", "cat"])
    report = flataudit.audit(net, (x, names[y.numpy()]), penalty=0.01)
    assert {row.value for row in report.classes.rows} == set(names)
    assert {row["label"] for row in report.display["influence"]} <= set(names)
    line = torch.nn.Linear(4, 1).double()
    found = flataudit.audit(line, (x, x[:, 0]), penalty=0.01, slices={"sign": (x[:, 1] > 0)})
    assert found.classes is None
    (table,) = found.slices
    assert all(row.train_accuracy is None for row in table.rows)
    assert all(row.predicted_accuracy is None for row in table.rows)
    assert dataclasses.asdict(table)["column"] == "sign"
