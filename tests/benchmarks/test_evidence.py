"""docs/evidence.md says what the zoo's committed results say."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import evidence_page as page
from benchmarks.common.pages import BLOCK
from benchmarks.zoo import grid
from benchmarks.zoo import scores as sc
from benchmarks.zoo.measure import RESULTS


@pytest.fixture(scope="module")
def evidence():
    return page.load()


def test_page_matches_the_results(evidence):
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, evidence) == text


def test_page_shows_every_table_once():
    names = [name for _, name, _ in BLOCK.findall(page.PAGE.read_text(encoding="utf-8"))]
    assert sorted(names) == sorted(page.TABLES)


def test_a_changed_score_changes_the_page(evidence):
    scores = copy.deepcopy(evidence.scores)
    scores["linear"]["scores"][page.OURS]["kendall"]["value"] = 0.95
    changed = page.replace(evidence, scores=scores)
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, changed) != text
    before, after = (page.marks(each)[0] for each in (evidence, changed))
    assert (before.met, after.met) == (False, True)


def test_results_hold_the_whole_grid(evidence):
    assert [row["name"] for row in evidence.rows] == [cell.name for cell in grid.grid()]
    for row in evidence.rows:
        assert math.isfinite(row["gap"])
        assert row["gap_se"] > 0


def test_scores_are_those_of_the_rows(evidence):
    # Against scipy and plain numpy, on the whole zoo and on a regime.
    for regime, rows in (("all", evidence.rows), ("linear", page.kinds(evidence)[0][1])):
        found = evidence.scores[regime]
        assert found["n"] == len(rows)
        ours, gap, floor = (
            np.array([row[key] for row in rows], dtype=float) for key in (page.OURS, "gap", "floor")
        )
        score = found["scores"][page.OURS]
        tau = stats.kendalltau(ours, gap).statistic
        assert score["kendall"]["value"] == pytest.approx(tau, abs=1e-4)
        rho = stats.spearmanr(ours, gap).statistic
        assert score["spearman"]["value"] == pytest.approx(rho, abs=1e-4)
        with np.errstate(invalid="ignore", divide="ignore"):
            errors = np.where(ours / gap > 0, np.abs(np.log(ours / gap)), np.inf)
            excess = np.sqrt(np.maximum(errors**2 - (floor / gap) ** 2, 0.0))
        excess = np.where(
            np.isfinite(errors), excess, np.where(abs(ours - gap) <= floor, 0, np.inf)
        )
        for key, values in (("error", errors), ("excess", excess)):
            for label, q in (("median", 0.5), ("p90", 0.9)):
                expected = np.quantile(values, q, method="inverted_cdf")
                assert score[f"{key}_{label}"]["value"] == pytest.approx(expected, abs=1e-4)
        inside = [row[f"{page.OURS}_low"] <= row["gap"] <= row[f"{page.OURS}_high"] for row in rows]
        assert score["coverage"]["value"] == pytest.approx(np.mean(inside), abs=1e-4)
        for key in ("kendall", "error_median", "coverage"):
            assert score[key]["low"] <= score[key]["value"] <= score[key]["high"]


def test_accuracies_are_those_of_the_rows(evidence):
    rows = [row for row in evidence.rows if row["record_accuracy"] is not None]
    off = [100 * abs(row["record_accuracy"] - row["test_accuracy"]) for row in rows]
    expected = np.quantile(off, 0.5, method="inverted_cdf")
    found = evidence.scores["all"]["accuracies"]["record"]
    assert found["n"] == len(rows)
    assert found["accuracy"]["value"] == pytest.approx(expected, abs=1e-4)


def test_every_rival_was_measured(evidence):
    found = evidence.scores["all"]["scores"]
    for column in (*sc.RIVALS, "held_gap", page.OURS):
        assert column in found, column
        assert column in page.NAMES
    assert found["cv_gap"]["n"] == found["waic"]["n"] == len(evidence.rows)
    assert found["alpha"]["n"] > 200
    assert found["randalo"]["n"] >= 30


def test_behind_level_ahead():
    errors = {"ours": 0.1, "theirs": 0.3, "low": 0.05, "high": 0.3}
    assert page.verdict(errors, "excess_median") == "ahead"
    assert page.verdict(errors, "kendall") == "behind"  # of tau more is better
    assert page.verdict(errors | {"low": -0.1}, "excess_median") == "level"
    unsure = {"ours": 0.1, "theirs": None, "low": None, "high": None}
    assert page.verdict(unsure, "excess_median") == "ahead"  # theirs is infinite
    assert page.verdict(unsure | {"theirs": 0.05}, "excess_median") == "behind"


def test_behind_in_one_is_behind(evidence):
    row = {"n": 9, "kendall": {"ours": 0.9, "theirs": 0.1, "low": -0.9, "high": -0.7}}
    worse = {"excess_median": {"ours": 0.5, "theirs": 0.1, "low": -0.5, "high": -0.3}}
    scores = {"all": {"beside": {"cv_gap": row | worse, "sam": row}}}
    assert page.by_verdict(page.replace(evidence, scores=scores), "all") == {
        "behind": ["cv_gap"],
        "ahead": ["sam"],
    }


def test_the_results_describe_their_environment(evidence):
    for key in ("processor", "system", "python", "threads", "models"):
        assert evidence.environment[key]
    assert {"torch", "numpy", "scipy", "scikit-learn"} < set(evidence.environment["libraries"])


def test_results_name_no_host_and_no_path(evidence):
    assert b"/tmp/" not in RESULTS.read_bytes()
    assert "/home" not in json.dumps(evidence.scores)
