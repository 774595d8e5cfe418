"""A handful of models end to end: trained, registered, measured, compared and scored."""

import argparse
import logging
import warnings

import pytest

from benchmarks.zoo import grid as g
from benchmarks.zoo.baselines import baseline_cell
from benchmarks.zoo.measure import measure_cell, write_results
from benchmarks.zoo.scores import all_scores, read
from benchmarks.zoo.store import open_store, registered_uri
from benchmarks.zoo.train import train_cell

pytestmark = pytest.mark.zoo

BASE = {"architecture": "mlp", "n": 60, "weight_decay": 1e-2, "width": 4, "depth": 1,
        "activation": "relu", "pooling": 2, "optimizer": "sgd", "lr": 0.05,
        "epochs": 20}  # fmt: skip
TINY = (
    g.Block("tiny", ("digits",), BASE, {"n": (40, 80), "optimizer": ("adamw",)}),
    g.Block("tiny-glm", ("digits",), {"architecture": "glm", "n": 100, "weight_decay": 0.1}, {}),
    g.Block("tiny-missing", ("digits",), {"architecture": "glm", "n": 6, "weight_decay": 0.1}, {}),
)


@pytest.fixture
def options(monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setattr(g, "BLOCKS", TINY)
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MLflow's own imports
        yield {"store": str(tmp_path / "store"), "data": None, "download": False}
    mlflow.set_tracking_uri(None)


def run(call, options):
    return {cell.name: call(cell.name, options) for cell in g.grid()}


def test_train_measure_compare_score(options, tmp_path):
    trained = run(train_cell, options)
    bad = "zoo-tiny-missing-digits-n6-wd0.1-s0"
    assert trained[bad]["state"] == "failed"
    assert "classes among n = 6" in trained[bad]["error"]
    good = [name for name in trained if name != bad]
    assert {trained[name]["state"] for name in good} == {"done"}
    assert {row["state"] for row in run(train_cell, options).values()} == {"skipped", "failed"}

    measured = run(measure_cell, options)
    assert measured[bad]["state"] == "not trained"
    assert {measured[name]["state"] for name in good} == {"done"}
    assert measure_cell(good[0], options)["state"] == "skipped"
    assert {baseline_cell(name, options)["state"] for name in good} == {"done"}

    from pathlib import Path

    given = argparse.Namespace(quick=False, only="zoo-tiny*", store=Path(options["store"]))
    write_results(given)
    rows = {row["name"]: row for row in read(given.store / "results.parquet")}
    assert sorted(rows) == sorted(good)
    for row in rows.values():
        assert row["gap_se"] > 0
        assert row["floor"] > 0
        assert row["record_error"] is None
        assert row["evidence_loo"] is not None
        assert row["cv_gap"] is not None
        assert row["n_test"] == 718
        assert row["n_heldout"] == 200
    net, glm = (
        rows["zoo-tiny-digits-n60-wd0.01-w4-d1-relu-sgd-e20-s0"],
        rows["zoo-tiny-glm-digits-n100-wd0.1-s0"],
    )
    # 40 steps with momentum: the objective's own decay, and 1/T on top of it.
    assert net["decay_penalty"] == pytest.approx(1e-2, rel=1e-6)
    weights = sum(0.05 * (1 - 0.9**t) / 0.1 for t in range(1, 41))
    assert net["record_penalty"] == pytest.approx(1e-2 + 1 / weights, rel=1e-9)
    assert net["decay_loo"] > net["record_loo"]
    assert glm["record_penalty"] == pytest.approx(0.1)
    assert glm.get("decay_loo") is None
    assert all_scores(list(rows.values()), draws=5)["all"]["n"] == len(good)


def test_a_cell_that_was_defined_otherwise_is_trained_anew(options, monkeypatch):
    first = g.grid()[0]
    assert train_cell(first.name, options)["uri"].endswith("/1")
    changed = g.Block("tiny", ("digits",), BASE | {"lr": 0.01}, {})
    monkeypatch.setattr(g, "BLOCKS", (changed,))
    again = train_cell(first.name, options)
    assert again["state"] == "done"
    assert again["uri"].endswith("/2")
    client = open_store(options["store"])
    assert registered_uri(client, first).endswith("/1")


def test_what_cannot_be_had_is_said(options, monkeypatch):
    from benchmarks.zoo import data

    monkeypatch.setattr(data, "PLACES", dict.fromkeys(data.PLACES, data.Path("nowhere")))
    monkeypatch.setattr(g, "BLOCKS", (g.Block("tiny", ("letter",), BASE | {"pooling": 1}, {}),))
    row = train_cell(g.grid()[0].name, options)
    assert row["state"] == "unavailable"
    assert "r-cran-mlbench" in row["error"]
