"""Two reports side by side: what differs, and what may be said about which is better."""

import copy
import json
import math
import re

import numpy as np
import pytest

from flataudit.report.compare import compare, render_html
from tests.audited_store import make_report

NAMES = ("models:/a/1", "models:/a/2")
OTHER = "0" * 64


def found(first, second):
    made = compare(first, second, NAMES)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    return made


def row(made, name):
    (cells,) = [r for r in made["rows"] if r["name"] == name]
    return cells


def test_the_difference_and_its_two_intervals():
    made = found(make_report(gap=0.05, se=0.003), make_report(gap=0.08, se=0.004))
    difference = made["difference"]
    assert difference["value"] == pytest.approx(0.03)
    assert difference["se"] == pytest.approx(0.005)
    assert difference["se_any"] == pytest.approx(0.007)
    z = 1.6448536269514722
    assert (difference["low"], difference["high"]) == pytest.approx((0.03 - z * 0.005,
                                                                     0.03 + z * 0.005))  # fmt: skip
    assert difference["low_any"] == pytest.approx(0.03 - z * 0.007)
    assert (made["same_data"], made["comparable"], difference["level"]) == (True, True, 0.9)


@pytest.mark.parametrize(
    ("step", "other_data", "better", "certainty"),
    [
        (0.030, False, NAMES[0], "whatever_the_correlation"),  # 1.645 x 0.007 = 0.0115
        (-0.030, False, NAMES[1], "whatever_the_correlation"),
        (0.010, False, NAMES[0], "if_not_negatively_correlated"),  # above 1.645 x 0.005 = 0.0082
        (0.005, False, None, "none"),
        (0.010, True, NAMES[0], "independent"),
        (0.030, True, NAMES[0], "independent"),
        (0.005, True, None, "none"),
        (0.0, False, None, "none"),
    ],
)
def test_which_is_better_and_how_surely(step, other_data, better, certainty):
    second = make_report(gap=0.05 + step, se=0.004)
    if other_data:
        second["data"]["sha256"] = OTHER
    made = found(make_report(gap=0.05, se=0.003), second)
    difference = made["difference"]
    assert (difference["better"], difference["certainty"]) == (better, certainty)
    assert (better or "No difference is shown") in difference["sentence"]
    assert made["same_data"] is not other_data
    if other_data:
        assert made["reason"].startswith("the training data differ")


def test_the_wide_interval_holds_for_every_correlation():
    """Simulated losses of two models on the same samples, by the correlation of their errors."""
    rng = np.random.default_rng(0)
    n, trials, z = 200, 2000, 1.6448536269514722
    for correlation in (-1.0, -0.5, 0.0, 0.9):
        spread = math.sqrt(max(0.0, 1 - correlation**2))
        a = rng.normal(size=(trials, n))
        b = correlation * a + spread * rng.normal(size=(trials, n))
        errors = a.std(axis=1, ddof=1) / n**0.5, b.std(axis=1, ddof=1) / n**0.5
        misses = np.abs(b.mean(axis=1) - a.mean(axis=1)) > z * (errors[0] + errors[1])
        assert misses.mean() <= 0.1 + 3 * math.sqrt(0.09 / trials)


def test_other_families_are_not_compared():
    made = found(make_report(), make_report(family="poisson"))
    assert (made["comparable"], made["difference"]) == (False, None)
    assert "poisson family have no common unit" in made["reason"]
    assert "Not comparable" in render_html(made)


def test_without_a_loss_or_an_interval():
    first, second = make_report(), make_report()
    second["predicted_test_nll"] = {"value": None, "low": None, "high": None}
    assert found(first, second)["difference"] is None
    second["predicted_test_nll"] = {"value": 0.3, "low": None, "high": None}
    difference = found(first, second)["difference"]
    assert (difference["se"], difference["better"]) == (None, None)
    render_html(found(first, second))


def test_the_rows_say_what_differs():
    second = make_report(gap=0.08, calibration__verdict="not_shown", confidence="low")
    made = found(make_report(), second)
    assert row(made, "calibration") == {
        "name": "calibration", "first": "calibrated", "second": "not_shown", "differs": True,
    }  # fmt: skip
    assert row(made, "verdict")["second"] == "warn"
    assert not row(made, "data (sha256)")["differs"]
    for name in ("gap", "predicted loss", "predicted accuracy", "rely on it", "penalty",
                 "warnings", "direction", "observed gap", "training loss"):  # fmt: skip
        assert row(made, name)["first"]


def test_the_same_model_is_named():
    first = make_report(model__model_id="m-1")
    assert found(first, copy.deepcopy(first))["same_model"]
    assert not found(first, make_report(model__model_id="m-2"))["same_model"]
    assert not found(make_report(), make_report())["same_model"]


def test_the_page_stands_alone_and_escapes_names():
    made = compare(make_report(), make_report(gap=0.2), ("<b>x</b>", "y"))
    page = render_html(made)
    assert "<b>x</b>" not in page
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=|<script|url\(", page)
    assert "&lt;b&gt;x&lt;/b&gt; is predicted better, at the 90 % level" in page
