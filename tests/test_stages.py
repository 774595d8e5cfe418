"""The three stages: JSON between them, their order, and what is logged where one fails."""

import json
import os
import shutil
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

import flataudit
from flataudit import stages
from flataudit.config import make_options
from flataudit.errors import (
    AuditFailedError,
    DeadlineError,
    FlatauditError,
    InputError,
    MemoryPlanError,
    NumericalError,
    StoreError,
)
from flataudit.models.registry import load_model, resolve
from flataudit.stages import Stages, run_audit
from tests.shells import ROOT, content, make_models, untimed


@pytest.fixture
def models(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for the child of a deadline
    yield make_models()
    mlflow.set_tracking_uri(None)


def options(models, **values):
    return make_options({"tracking_uri": models.uri} | values)


def through_json(value):
    """What comes back from JSON, which must be what went in: no tuple, no number as a key."""
    back = json.loads(json.dumps(value, allow_nan=False))
    assert back == value
    return back


def plain(value):
    """Whether `value` is JSON's own types through and through: no numpy, no tensor."""
    if type(value) is dict:
        return all(type(key) is str and plain(item) for key, item in value.items())
    if type(value) is list:
        return all(plain(item) for item in value)
    return type(value) in (str, int, float, bool, type(None))


# --- what the stages pass on --------------------------------------------------------------------


def test_every_stage_gives_plain_json(models):
    values = options(models).model_dump()
    assert plain(values)
    loaded = through_json(stages.load("models:/good@champion", "mlflow", models.heldout, values))
    assert plain(loaded)
    assert set(loaded) == {"source", "train", "heldout", "training", "training_origin"}
    assert loaded["source"]["uri"] == "models:/good/1"  # the alias may move; the version cannot
    assert loaded["training"]["optimizer"] == "sgd"
    result = through_json(stages.estimate(loaded, values))
    assert plain(result)
    assert set(result) == {"report", "display", "seconds"}
    assert result["seconds"] > 0
    run_id = stages.log(loaded, result, values)
    assert MlflowClient(models.uri).get_run(run_id).info.status == "FINISHED"


def test_the_report_is_that_of_the_python_function(models):
    """Stages add what the registry knows, and change no number."""
    values = options(models).model_dump()
    loaded = stages.load("models:/good/1", models.data, models.heldout, values)
    report = untimed(stages.estimate(loaded, values)["report"])
    heldout = np.load(models.heldout)
    direct = flataudit.audit(
        load_model(resolve("models:/good/1")),
        (models.x, models.y),
        heldout=(heldout["x"], heldout["y"]),
        training=loaded["training"],
    )
    expected = untimed(direct.to_dict())
    known = ("uri", "name", "version", "model_id", "flavor")
    assert [report["model"].pop(key) for key in known][:3] == ["models:/good/1", "good", "1"]
    for key in known:
        expected["model"].pop(key)
    assert report == expected


def test_load_checks_the_record_and_finds_where_it_is_from(models):
    def loaded(**values):
        return stages.load("models:/good/1", models.data, None, options(models, **values)
                           .model_dump())  # fmt: skip

    from_run = loaded()
    assert (from_run["training"]["steps"], from_run["heldout"]) == (200, None)
    assert "flataudit/training.json" in from_run["training_origin"]
    given = loaded(training="optimizer=adam,sum_lr=3,batch_size=8")
    assert (given["training"]["sum_lr"], given["training_origin"]) == (3.0, "argument")
    given = loaded(training={"optimizer": "converged"})
    assert given["training"]["optimizer"] == "converged"
    with pytest.raises(InputError, match="optimizer"):
        loaded(training={"optimizer": "rmsprop"})


def test_without_a_record_the_reason_is_among_the_assumptions(models):
    """A folder outside the store has no run to ask."""
    values = options(models).model_dump()
    original = stages.load("models:/good/1", models.data, None, values)["source"]["local_path"]
    bare = Path(shutil.copytree(original, "copied"))
    lines = (bare / "MLmodel").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("run_id", "model_id"))]
    (bare / "MLmodel").write_text("\n".join(kept))
    loaded = stages.load(str(bare), models.data, None, values)
    assert loaded["training"] is None
    penalty = stages.estimate(loaded, values)["report"]["penalty"]
    assert penalty["source"] == "evidence"
    assert f"no training record: {loaded['training_origin']}" in penalty["assumptions"]


def test_data_that_changed_since_training_are_warned_of(models, monkeypatch):
    """The logged data's own sha256 tells, whatever MLflow's digest says."""
    import flataudit.data

    values = options(models).model_dump()
    loaded = stages.load("models:/good/1", "mlflow", None, values)
    codes = [w["code"] for w in stages.estimate(loaded, values)["report"]["warnings"]]
    assert "data_mismatch" not in codes
    from_mlflow = flataudit.data._from_mlflow

    def changed(source, *more):
        found = from_mlflow(source, *more)
        found.x[0, 0] += 1.0
        return found

    monkeypatch.setattr(flataudit.data, "_from_mlflow", changed)
    report = stages.estimate(loaded, values)["report"]
    assert "data_mismatch" in [w["code"] for w in report["warnings"]]


# --- the order, and failures --------------------------------------------------------------------


class Fake:
    """Stages that only note that they were called; `estimate` raises `error` where given."""

    def __init__(self, error=None):
        self.error, self.calls = error, []
        self.stages = Stages(load=self.load, estimate=self.estimate, log=self.log)

    def load(self, model_uri, train, heldout, values):
        self.calls.append(("load", model_uri, train, heldout))
        return {"source": {}, "train": train, "heldout": heldout}

    def estimate(self, loaded, values):
        self.calls.append(("estimate",))
        if self.error:
            raise self.error
        return {"report": {"schema": 1}, "display": {}, "seconds": 1.0}

    def log(self, loaded, result, values):
        self.calls.append(("log",))
        return "run"


@pytest.fixture
def failures(monkeypatch):
    """What is logged about failed audits."""
    logged = []
    monkeypatch.setattr(stages, "log_failure", lambda loaded, text, values: logged.append(text))
    return logged


def test_in_order(failures):
    fake = Fake()
    found = run_audit("models:/a/1", "x.npz", None, make_options({}), stages=fake.stages)
    assert found == {"report": {"schema": 1}, "display": {}, "seconds": 1.0, "run_id": "run"}
    assert fake.calls == [("load", "models:/a/1", "x.npz", None), ("estimate",), ("log",)]
    assert failures == []


def test_unlogged(failures):
    fake = Fake()
    options = make_options({})
    found = run_audit("models:/a/1", "x.npz", None, options, stages=fake.stages, write=False)
    assert found["run_id"] is None
    assert fake.calls[-1] == ("estimate",)


@pytest.mark.parametrize("error", [InputError("expected a"), MemoryPlanError("expected b")])
def test_bad_input_is_not_on_record(failures, error):
    fake = Fake(error)
    with pytest.raises(InputError) as caught:
        run_audit("models:/a/1", "x.npz", None, make_options({}), stages=fake.stages)
    assert caught.value is error
    assert failures == []
    assert fake.calls[-1] == ("estimate",)


@pytest.mark.parametrize(
    "error", [DeadlineError("expected c"), NumericalError("expected d"), ValueError("bad\n value")]
)
@pytest.mark.parametrize("write", [True, False])
def test_failures_are_on_record(failures, error, write):
    fake = Fake(error)
    with pytest.raises(FlatauditError) as caught:
        run_audit("models:/a/1", "x.npz", None, make_options({}), stages=fake.stages, write=write)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert failures == ([str(caught.value)] if write else [])
    if isinstance(error, FlatauditError):
        assert caught.value is error
    else:
        assert type(caught.value) is AuditFailedError
        assert "got ValueError: bad value" in str(caught.value)


# --- the child process --------------------------------------------------------------------------


def test_a_child_that_dies_says_how(models):
    """The data load in this process and end the child, as the kernel does when memory is out."""
    Path("fatal_data.py").write_text(
        "import os, numpy\n"
        "def load():\n"
        f"    if os.getpid() != {os.getpid()}:\n"
        "        os._exit(9)\n"
        f"    data = numpy.load({models.data!r})\n"
        "    return data['x'], data['y']\n"
    )
    client = MlflowClient(models.uri)
    with pytest.raises(AuditFailedError, match="got exit code 9"):
        run_audit("models:/good/2", "fatal_data:load", None, options(models, deadline=300))
    assert client.get_model_version("good", "2").tags["flataudit.verdict"] == "error"


def test_errors_keep_their_class_across_the_process(models, monkeypatch, tmp_path):
    import importlib

    module = importlib.import_module("flataudit.audit")
    answers = {}
    request = tmp_path / "request.json"
    request.write_text(json.dumps({
        "loaded": stages.load("models:/good/1", models.data, None, options(models).model_dump()),
        "options": options(models).model_dump(),
    }))  # fmt: skip
    for error in (InputError("a"), MemoryPlanError("b"), NumericalError("c"), KeyError("d")):

        def raises(*_, error=error, **__):
            raise error

        monkeypatch.setattr(module, "audit", raises)
        answer = tmp_path / "answer.json"
        stages._child(request, answer)
        answers[type(error).__name__] = json.loads(answer.read_text())
    assert answers["InputError"] == {"error": "InputError", "message": "a"}
    assert answers["MemoryPlanError"]["error"] == "MemoryPlanError"
    assert answers["NumericalError"]["error"] == "NumericalError"
    assert answers["KeyError"]["error"] == "AuditFailedError"
    assert "KeyError" in answers["KeyError"]["message"]


def test_a_store_that_fails_at_any_stage_leaves_it_as_it_was(models, monkeypatch):
    """Also where the failure of an audit cannot be put on record: the audit's error is told."""
    before = content(models)
    with pytest.raises(StoreError):
        run_audit("models:/good/1", models.data, None,
                  make_options({"tracking_uri": "sqlite:///none.db"}))  # fmt: skip

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "create_run", fails)
    with pytest.raises(StoreError, match="disk full"):
        run_audit("models:/good/1", models.data, None, options(models))
    broken = Stages(estimate=lambda loaded, values: 1 / 0)
    with pytest.raises(AuditFailedError, match="ZeroDivisionError"):
        run_audit("models:/good/1", models.data, None, options(models), stages=broken)
    changed = set(content(models)) ^ set(before)
    assert not any("model_version" in row or "runs" in row for row in changed), changed


# --- slices -------------------------------------------------------------------------------------


def sliced(models, tmp_path):
    """The training data with a column beside them, and the column."""
    shop = np.array(["north", "south"])[np.arange(len(models.y)) % 2]
    np.savez(tmp_path / "sliced.npz", x=models.x, y=models.y, shop=shop)
    return str(tmp_path / "sliced.npz"), shop


@pytest.mark.parametrize("deadline", [None, 300])
def test_slices_of_the_data_s_own_column(models, tmp_path, deadline):
    data, shop = sliced(models, tmp_path)
    asked = options(models, slices="shop", deadline=deadline)
    report = run_audit("models:/good/1", data, None, asked, write=False)["report"]
    (table,) = report["slices"]
    assert table["column"] == "shop"
    assert {row["value"]: row["n"] for row in table["rows"]} == {
        name: int((shop == name).sum()) for name in ("north", "south")
    }
    assert sum(row["n"] for row in report["classes"]["rows"]) == len(models.y)


@pytest.mark.parametrize(
    ("rows", "message"),
    [(3, "for each of the 80 training samples"), (0, "choose from: 'x', 'y', 'other'")],
)
def test_bad_slices_are_bad_input_and_nothing_is_written(models, tmp_path, rows, message):
    before = content(models)
    name = "shop" if rows else "other"
    np.savez(tmp_path / "sliced.npz", x=models.x, y=models.y, **{name: np.arange(rows)})
    with pytest.raises(InputError, match=message):
        run_audit(
            "models:/good/1", str(tmp_path / "sliced.npz"), None, options(models, slices="shop")
        )
    assert content(models) == before


def test_the_registered_model_s_table_and_the_report_s_history(models):
    runs = [
        run_audit("models:/good/1", "mlflow", None, options(models))["run_id"] for _ in range(2)
    ]
    client = MlflowClient(models.uri)
    table = client.get_registered_model("good").description
    assert table.count(f"/runs/{runs[1]}>)") == 1
    assert runs[0] not in table
    path = client.download_artifacts(runs[1], "flataudit/report.html")
    page = Path(path).read_text(encoding="utf-8")
    assert "Audits of all versions of this registered model" in page
    assert "this audit" in page
