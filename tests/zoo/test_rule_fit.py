"""The cross-validation over data sets: nothing of a data set decides what is said of it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.zoo import rule_fit as f
from benchmarks.zoo.rules import Decided
from flataudit.selection import widened

COMMITTED = Path(f.OUT)


def row(i, data, **change):
    """A network whose blend is right and whose other estimates are far off."""
    gap = 0.1 * (1 + i % 7)
    return {
        "name": f"{data}-{i}", "group": f"{data}-{i % 4}", "data": data, "architecture": "mlp",
        "gap": gap, "floor": 0.001, "n_train": 300, "record_rank": 60.0,
        "record_soft_rank": gap / 1.4, "record_soft_rank_se": 0.001,
        "record_soft_rank_recalibrated": 1.4 * gap, "record_soft_rank_recalibrated_se": 0.001,
        "record_tic": gap / 9, "record_tic_se": 0.001, "record_loo": 3 * gap,
        "record_loo_se": 0.001, "record_scale": 0.8, "by_loo_verdict": "miscalibrated",
        "by_loo_direction": "over", "by_loo_severity": "warn", "by_loo_saturated": False,
        "by_loo_gap": gap, "by_loo_warnings": "", "held_gap": gap,
    } | change  # fmt: skip


def glm(i, data, **change):
    """A linear model whose leave-one-out is right."""
    right = row(i, data)["gap"]
    return row(i, data, architecture="glm", record_loo=right) | change


ROWS = [make(i, data) for data in "abc" for i in range(8) for make in (row, glm)]


def named(rows):
    return [dict(one, name=f"{k}-{one['name']}") for k, one in enumerate(rows)]


def test_the_best_estimate_of_each_branch_is_chosen():
    assert f.choose(ROWS) == {"linear": "loo", "network": "blend"}


def test_a_data_set_has_no_say_in_what_is_chosen_for_it():
    """In data set a the soft rank is right: with a among those chosen on it would matter."""
    odd = [row(i, "a", record_soft_rank=row(i, "a")["gap"]) for i in range(8)]
    rows = named(odd + [r for r in ROWS if r["data"] != "a"] + [glm(i, "a") for i in range(8)])
    folds = f.cross_validate(rows)["folds"]
    assert folds["a"]["choice"]["network"] == "blend"
    wild = named([dict(r, record_loo=50.0 * r["gap"]) if r["data"] == "a" else r for r in ROWS])
    fitted = f.cross_validate(wild)["folds"]
    assert fitted["a"]["model_error"]["loo"] < 0.5 < fitted["b"]["model_error"]["loo"]


@pytest.mark.parametrize("truth", [0.02, 0.05, 0.09, 0.1, 0.12, 0.2, 0.9])
def test_the_needed_error_just_reaches_the_truth(truth):
    found = Decided("loo", 0.1, 0.01)
    need = f.needed_error(found, truth)
    low, high = widened(found.gap, f.Z_LEVEL * found.se, need, f.Z_LEVEL)
    assert low - 1e-12 <= truth <= high + 1e-12
    if need > 0:
        low, high = widened(found.gap, f.Z_LEVEL * found.se, 0.999 * need, f.Z_LEVEL)
        assert not low <= truth <= high


def test_no_error_reaches_a_gap_far_below_zero():
    assert math.isinf(f.needed_error(Decided("loo", 0.1, 0.001), -1.0))
    assert math.isinf(f.needed_error(Decided("loo", -0.1, 0.001), 1.0))


def test_model_error_is_the_split_conformal_quantile():
    ratios = np.linspace(1.0, 3.0, 19)  # (19 + 1) .9 = 18th smallest
    rows = [glm(i, "a", record_loo=0.1, gap=0.1 * c, record_loo_se=0.0)
            for i, c in enumerate(ratios)]  # fmt: skip
    assert f.model_errors(rows)["loo"] == pytest.approx(math.log(ratios[17]) / f.Z_LEVEL)
    assert f.model_errors(rows)["tic"] == 0.0


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({}, "record_soft_rank_recalibrated"),
        ({"record_soft_rank_recalibrated": None}, "record_loo"),
        ({"architecture": "glm"}, "record_loo"),
        ({"by_loo_direction": "under", "by_loo_saturated": True}, "record_tic"),
        ({"by_loo_verdict": "insufficient"}, "record_loo"),
        ({"by_loo_verdict": "within_tolerance"}, "record_soft_rank"),
        ({"by_loo_verdict": "not_shown", "by_loo_direction": "none"}, "record_loo"),
        (
            {"by_loo_verdict": "not_shown", "by_loo_direction": "none", "by_loo_saturated": True},
            "record_soft_rank_recalibrated",
        ),
    ],
)
def test_the_list_that_this_one_replaced(change, wanted):
    one = row(3, "a", **change)
    assert f.first_list(one) == one[wanted]


def test_criterion_weighs_data_sets_alike_and_caps_each_model():
    rows = [row(0, "a", record_loo=math.e * row(0, "a")["gap"], floor=0.0)] * 9
    rows.append(row(0, "b", record_loo=-1.0, floor=0.0))
    assert f.criterion(rows, f.LOO) == pytest.approx((1.0 + f.CAP) / 2)
    assert f.criterion(rows, lambda one: None) == pytest.approx(f.CAP)


def test_the_whole_of_it():
    found = f.fit(named(ROWS), draws=5)
    json.dumps(found, allow_nan=False)
    scores = found["scores"]["networks"]["decision list, out of data set"]
    assert scores["excess_median"]["value"] == pytest.approx(0.0, abs=1e-9)
    assert scores["kendall"]["value"] == pytest.approx(1.0)
    assert found["scores"]["networks"]["always LOO"]["error_median"]["value"] == pytest.approx(
        math.log(3.0)
    )
    assert found["confidence"]["ok"] == {"n": len(ROWS), "share": 1.0, "right": 1.0}
    assert found["intervals"]["all"]["widened"] == 1.0
    assert "always LOO" in f.table(found, "all")


def test_low_where_the_gradients_have_vanished():
    rows = named([*ROWS, row(1, "a", by_loo_saturated=True, by_loo_direction="none")])
    found = f.fit(rows, draws=5)["confidence"]
    assert found["low"]["n"] == 1
    assert any("vanished" in why for why in found["reasons"])


def test_the_committed_results_keep_what_the_issue_asks_of_intervals_and_ok():
    found = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert found["models"] >= 300
    assert 0.85 <= found["intervals"]["all"]["widened"] <= 0.95
    assert found["confidence"]["ok"]["share"] >= 0.5
    assert found["confidence"]["ok"]["right"] >= 0.9
    scores = found["scores"]["all"]
    ours = scores["decision list, out of data set"]["excess_mean_capped"]["value"]
    rivals = [name for name in scores if name.startswith(("always", "paper", "decision list of"))]
    assert len(rivals) == 6, rivals
    assert all(scores[name]["excess_mean_capped"]["value"] > ours for name in rivals)
