"""Rules and regimes row by row, and the whole table from rows whose scores are known."""

import dataclasses
import json
import math
from statistics import NormalDist

import pytest

from benchmarks.zoo import rules as r
from benchmarks.zoo import scores as sc
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import collect, without_time
from flataudit.selection import MODEL_ERROR
from flataudit.training import parse_training


def row(i, group=0, **change):
    cell = Cell("b", "digits", "mlp", 100 + i, 0.1, width=4, optimizer="sgd", epochs=3, seed=group)
    gap = 0.1 * (i + 1)
    return {
        **dataclasses.asdict(cell), "name": cell.name, "group": cell.group, "gap": gap,
        "gap_se": 0.001, "floor": 0.02, "n_params": 50, "n_rows": 900,
        "record_loo": 2 * gap, "record_loo_se": gap, "record_soft_rank": gap, "record_tic": -gap,
        "record_soft_rank_recalibrated": 0.5 * gap, "record_penalty": 0.3, "decay_penalty": 0.1,
        "by_loo_verdict": "calibrated", "by_loo_direction": "none", "by_loo_severity": "none",
        "by_loo_saturated": False, "by_loo_warnings": "", "by_loo_gap": gap,
        "record_soft_rank_se": gap, "record_soft_rank_recalibrated_se": gap, "record_scale": 0.9,
        "record_rank": 10.0, "n_train": 100 + i,
        "by_loo_low": 0.0, "by_loo_high": 0.35, "by_loo_confidence": "ok",
        "record_accuracy": 0.8, "record_mean_confidence": 0.9, "test_accuracy": 0.77,
        "test_mean_confidence": 0.86, "sam": -gap,
    } | change  # fmt: skip


ROWS = [row(i, group) for group in range(6) for i in range(6)]


def test_rules():
    one = row(0)
    assert r.paper(one) == one["record_soft_rank"]
    assert r.paper(one | {"by_loo_verdict": "miscalibrated"}) == one["record_tic"]
    assert r.geometric(one) == pytest.approx(math.sqrt(0.2 * 0.05))
    assert r.geometric(one | {"by_loo_direction": "under"}) == one["record_tic"]
    assert r.geometric(one | {"record_loo": None}) is None
    assert r.oracle(one) == one["record_soft_rank"]
    assert r.oracle(one | {"record_soft_rank": None}) in (0.2, 0.05)
    assert r.oracle(one | {"gap": -0.1}) is None


def test_the_decision_list_on_a_row():
    one = row(0)
    assert r.decided(one) == r.Decided("soft_rank", one["record_soft_rank"], one["gap"])
    assert r.decision_list(one) == one["record_soft_rank"]
    over = one | {"by_loo_verdict": "miscalibrated", "by_loo_direction": "over"}
    found = r.decided(over)
    assert found.estimator == "soft_rank_blend"
    assert found.gap == pytest.approx(math.sqrt(0.1 * 0.05))
    assert r.decided(over | {"record_scale": 1.2}).estimator == "soft_rank"
    assert r.decided(over | {"architecture": "glm"}).estimator == "loo"
    assert r.decided(over | {"architecture": "glm", "record_loo": None}).estimator == "soft_rank"
    held = {f"by_heldout_{key}": over[f"by_loo_{key}"] for key in ("verdict", "saturated")}
    held |= {"by_heldout_direction": "under", "by_heldout_severity": "none"}
    assert r.decision_list_heldout(over) is None
    told = r.decision_list_heldout(over | held | {"record_tic_se": 0.1})
    assert told == one["record_tic"]


def test_regimes():
    assert r.regimes(row(0)) == [
        "all",
        "nets",
        "early_stopped",
        "mlp",
        "calibrated",
        "P<N",
        "called_ok",
    ]
    settled = row(0, decay_penalty=0.2, by_loo_verdict="miscalibrated", by_loo_direction="over")
    assert {"at_minimum", "over_confident"} <= set(r.regimes(settled))
    glm = row(0, architecture="glm", n_params=1000, by_loo_confidence=None)
    assert r.regimes(glm) == ["all", "linear", "calibrated", "P>N"]


def test_scores_of_a_perfect_and_of_a_doubled_estimate():
    found = sc.all_scores(ROWS, draws=20)["all"]["scores"]
    right, double = found["record_soft_rank"], found["record_loo"]
    for name in ("kendall", "spearman", "sign", "sign_worst"):
        assert right[name] == {
            "value": pytest.approx(1),
            "low": pytest.approx(1),
            "high": pytest.approx(1),
        }
    assert right["error_median"]["value"] == 0.0
    assert double["error_p90"]["value"] == pytest.approx(math.log(2))
    # The smallest gap is .1, where sampling noise of .02 counts most.
    assert double["excess_median"]["value"] < math.log(2)
    assert double["coverage"]["value"] == 1.0  # 2 gap -+ 1.645 gap
    assert found["record_tic"]["error_median"]["value"] is None  # never of one sign
    assert found["record_tic"]["kendall"]["value"] == pytest.approx(-1)
    # 90 % intervals of 0 to .35 hold the gaps .1, .2 and .3 of six.
    assert found["rule_audit_loo"]["coverage"]["value"] == 0.5
    assert "error_median" not in found["sam"]
    assert found["sam"]["kendall"]["value"] == pytest.approx(-1)
    json.dumps(found, allow_nan=False)


def test_the_list_as_it_is_now_judges_a_row():
    found = sc.listed(row(0))
    assert found["rule_list_estimator"] == "soft_rank"  # calibrated
    assert found["by_loo_confidence"] == "ok"
    z, tau = NormalDist().inv_cdf(0.95), MODEL_ERROR["soft_rank"]
    margin, factor = z * 0.1, 0.1 * math.expm1(z * tau)  # of the gap .1 with its se
    assert found["rule_list_high"] == pytest.approx(0.1 + math.hypot(margin, factor))
    vanished = sc.with_rules([row(0, by_loo_saturated=True, by_loo_confidence="ok")])[0]
    assert vanished["by_loo_confidence"] == "low"
    assert "called_low" in r.regimes(vanished)
    assert sc.listed(row(0, by_loo_verdict=None)) == {}


def test_pairs_are_within_a_group():
    assert len(sc.one_apart(ROWS)) == 6 * 15
    assert {name for _, _, name in sc.one_apart(ROWS)} == {"n"}


def test_information_is_averaged_over_tasks():
    rows = [row(i, group) for group in range(2) for i in range(8)]
    for one in rows:
        one["useless"] = one["gap"] if one["group"].endswith("s0") else 1.0
    estimate, gap = (sc.np.array([one[key] for one in rows]) for key in ("useless", "gap"))
    found = sc.information(rows, estimate, gap, 20)
    assert found["tasks"] == 2
    assert found["value"] == pytest.approx(50.0)
    assert sc.information(rows[:7], estimate[:7], gap[:7], 20)["value"] is None


def test_models_without_an_estimate_are_left_out_and_counted():
    rows = [dict(one) for one in ROWS]
    for one in rows[:10]:
        one["record_loo"] = None
    found = sc.all_scores(rows, draws=5)["all"]
    assert found["n"] == 36
    assert found["groups"] == 6
    assert found["scores"]["record_loo"]["n"] == 26
    rows = [dict(one, record_loo=math.nan) for one in ROWS]
    assert "record_loo" not in sc.all_scores(rows, draws=5)["all"]["scores"]


def test_accuracy_and_confidence_gap_in_points():
    rows = [
        dict(one, by_heldout_calibration_accuracy=0.78, by_heldout_calibration_mean_confidence=0.8)
        for one in ROWS
    ]
    found = sc.accuracies(rows, draws=20)
    assert found["record"]["n"] == 36
    for who, points, confidence in (("record", 3.0, 1.0), ("heldout", 1.0, 7.0)):
        for name, value in (("accuracy", points), ("confidence_gap", confidence)):
            assert found[who][name] == {
                "value": pytest.approx(value),
                "low": pytest.approx(value),
                "high": pytest.approx(value),
            }
    assert found["decay"] == {
        "n": 0,
        "accuracy": {"value": None, "low": None, "high": None},
        "confidence_gap": {"value": None, "low": None, "high": None},
    }


def test_the_floor_is_the_noise_of_a_normal():
    # Log errors near noise over gap: .01 times the quantiles of |N(0, 1)|, .674 and 1.645.
    rows = [dict(one, gap=1.0 + 0.0001 * i, floor=0.01) for i, one in enumerate(ROWS * 20)]
    found = sc.floor(rows)
    assert found["n"] == 720
    assert found["error_median"] == pytest.approx(0.00674, rel=0.05)
    assert found["error_p90"] == pytest.approx(0.01645, rel=0.05)
    exact = sc.floor([dict(one, floor=1e-9) for one in ROWS])
    # Of 630 pairs 90 have one gap: all others are right, and tau-b divides by sqrt(630 * 540).
    assert exact["kendall"] == pytest.approx(math.sqrt(540 / 630))


def test_rivals_are_compared_on_common_models():
    rows = [dict(one, rule_list=one["gap"], cv_gap=one["gap"] * 2) for one in ROWS]
    for one in rows[:4]:
        one["cv_gap"] = None
    found = sc.beside(rows, "cv_gap", draws=20)
    assert found["n"] == 32
    assert found["kendall"]["ours"] == found["kendall"]["theirs"] == pytest.approx(1.0)
    assert found["excess_median"]["ours"] == 0.0
    assert found["excess_median"]["low"] > 0  # the rival's error is larger in every draw
    opposite = sc.beside([dict(one, sam=-one["gap"]) for one in rows], "sam", draws=20)
    assert opposite["kendall"]["theirs"] == pytest.approx(-1.0)
    assert set(opposite) == {"n", "kendall"}
    assert sc.beside(rows[:4], "cv_gap") is None


def test_few_groups_have_no_interval():
    few = [one for one in ROWS if one["seed"] < sc.FEWEST_GROUPS - 1]
    tau = sc.all_scores(few, draws=5)["all"]["scores"]["record_loo"]["kendall"]
    assert tau == {"value": pytest.approx(1), "low": None, "high": None}


def test_scores_are_written_a_line_each_and_read_back():
    found = sc.all_scores(ROWS, draws=5)
    text = sc.dump(found)
    back = json.loads(text)
    assert set(back) == set(found)
    for regime, parts in found.items():
        assert set(back[regime]) == set(parts)
        for name, scores in parts["scores"].items():
            assert back[regime]["scores"][name]["n"] == scores["n"]
            value = scores["kendall"]["value"]
            assert back[regime]["scores"][name]["kendall"]["value"] == (
                None if value is None else pytest.approx(value, abs=1e-4)
            )
    assert len(text.splitlines()) < 60 * len(found)


def test_rows_survive_the_parquet(tmp_path):
    rows = [dict(ROWS[0]), dict(ROWS[1], record_loo=None)]
    path = tmp_path / "results.parquet"
    collect(rows, path)
    back = sc.read(path)
    assert [one["name"] for one in back] == [one["name"] for one in rows]
    assert r.number(back[1], "record_loo") is None
    assert back[0]["record_loo"] == rows[0]["record_loo"]
    assert "sign" in sc.table(sc.all_scores(ROWS, draws=5))


def test_a_record_without_its_time_keeps_the_decay():
    record = {"optimizer": "sgd", "sum_lr": 2.0, "lr": 0.1, "steps": 20, "momentum": 0.9,
              "time": 12.0, "weight_decay": 0.01, "batch_size": 5}  # fmt: skip
    endless = parse_training(without_time(record))
    assert endless.weight_decay == 0.01
    assert endless.momentum == 0.9
    assert 1.0 / endless.training_time() < 1e-8
    with pytest.raises(ValueError, match="one learning rate"):
        without_time(record | {"groups": [{"parameters": ["a"], "lr": 0.2}]})
