"""The three stages: JSON between them, their order, and what is logged where one fails."""

import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import mlflow
import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

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
from flataudit.models.registry import load_model, resolve, training_record
from flataudit.stages import Stages, run_audit
from tests.shells import content, make_models, untimed


@pytest.fixture
def models(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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
    assert set(loaded) == {"audit_id", "source", "train", "heldout", "training", "seconds"}
    assert loaded["source"]["uri"] == "models:/good/1"  # the alias may move; the version cannot
    result = through_json(stages.estimate(loaded, values))
    assert plain(result)
    assert set(result) == {"report", "display", "seconds", "fresh_labels", "resources"}
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
        training=training_record(resolve("models:/good/1"), len(models.y))[0].to_record(),
    )
    expected = untimed(direct.to_dict())
    known = ("uri", "name", "version", "model_id", "flavor")
    assert [report["model"].pop(key) for key in known][:3] == ["models:/good/1", "good", "1"]
    for key in known:
        expected["model"].pop(key)
    assert report == expected


def test_load_checks_the_record_that_is_given(models):
    def loaded(**values):
        return stages.load("models:/good/1", models.data, None, options(models, **values)
                           .model_dump())  # fmt: skip

    assert (loaded()["training"], loaded()["heldout"]) == (None, None)  # read with the data
    given = loaded(training="optimizer=adam,sum_lr=3,batch_size=8")
    assert given["training"]["sum_lr"] == 3.0
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
    assert "no training record: the model has no source run" in penalty["assumptions"]


def test_data_that_changed_since_training_are_warned_of(models, monkeypatch):
    """The logged data's own sha256 tells, whatever MLflow's digest says."""
    import flataudit.data

    values = options(models).model_dump()
    loaded = stages.load("models:/good/1", "mlflow", None, values)
    asked = {"loaded": loaded, "options": values, "memory_limit": None}
    codes = [w["code"] for w in stages.estimate_here(asked, print)["report"]["warnings"]]
    assert "data_mismatch" not in codes
    from_mlflow = flataudit.data._from_mlflow

    def changed(source, *more):
        found = from_mlflow(source, *more)
        found.x[0, 0] += 1.0
        return found

    monkeypatch.setattr(flataudit.data, "_from_mlflow", changed)
    report = stages.estimate_here(asked, print)["report"]
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
    assert caught.value.__cause__ is not caught.value  # which no process pool can send back
    if isinstance(error, FlatauditError):
        assert caught.value is error
    else:
        assert type(caught.value) is AuditFailedError
        assert "got ValueError: bad value" in str(caught.value)


# --- the child process --------------------------------------------------------------------------


CRASHES = {
    "os._exit(9)": "got exit code 9",
    "os.abort()": "got signal 6 (Aborted)",
    "ctypes.string_at(0)": "got signal 11 (Segmentation fault)",
    "sys.exit(0)": "got SystemExit: 0",
    "os.kill(os.getpid(), 9)": "likely out of memory",
    "time.sleep(1000)": "expected the audit to end within 3 s",
    "[b'x' * 10**8 for _ in range(1000)]": "expected the audit to stay within 1.50 GB",
}


@pytest.mark.parametrize("where", ["data", "model"])
@pytest.mark.parametrize("statement", CRASHES)
def test_foreign_code_that_breaks_is_on_record(models, tmp_path, where, statement):
    """In a data function, or in the code that came with the model, as it is unpickled."""
    name = f"fatal_{abs(hash((where, statement)))}"
    code = f"import ctypes, os, sys, time\ndef load(*_):\n    {statement}\n"
    Path(f"{name}.py").write_text(code)
    uri, data = "models:/good/2", f"{name}:load"
    if where == "model":
        uri, data = with_code(models, tmp_path / f"{name}.py"), models.data
    slow = statement.startswith("time")
    chosen = options(models, deadline=3 if slow else 300, memory_limit="1.5GB")
    client = MlflowClient(models.uri)
    with pytest.raises(FlatauditError) as caught:
        run_audit(uri, data, None, chosen)
    assert caught.value.exit_code == 3
    assert CRASHES[statement] in str(caught.value)
    tags = client.get_model_version(*uri.removeprefix("models:/").split("/")).tags
    assert tags["flataudit.verdict"] == "error"
    path = client.download_artifacts(
        tags["flataudit.run_id"], "flataudit/error.json", str(tmp_path)
    )
    assert json.loads(Path(path).read_text())["error"] == str(caught.value)
    assert name not in sys.modules


def with_code(models, file):
    """The URI of a version of the good network whose unpickling calls `load` of a module `file`,
    which comes with it."""
    folder = Path(stages.load("models:/good/1", models.data, None, options(models).model_dump())
                  ["source"]["local_path"])  # fmt: skip
    copy = Path(shutil.copytree(folder, file.parent / f"{file.stem}-model"))
    (copy / "code").mkdir()
    shutil.copy(file, copy / "code")
    described = yaml.safe_load((copy / "MLmodel").read_text())
    described["flavors"]["pytorch"]["code"] = "code"
    for key in ("model_id", "run_id"):
        described.pop(key, None)
    (copy / "MLmodel").write_text(yaml.safe_dump(described))
    call = f"c{file.stem}\nload\n(tR.".encode()  # protocol 0: the result of load()
    (weights,) = (copy / "data").glob("*.pth")
    weights.write_bytes(call)
    client = MlflowClient(models.uri)
    with suppress(MlflowException):
        client.create_registered_model("fatal")
    version = client.create_model_version("fatal", str(copy), run_id=None)
    return f"models:/fatal/{version.version}"


def test_two_models_with_modules_of_one_name(models, tmp_path, monkeypatch):
    """Each gets its own; nothing of either stays here."""
    found = []
    stages.load("models:/good/1", models.data, None, options(models).model_dump())  # sets the store
    before = list(sys.path), os.getcwd(), dict(os.environ)
    for factor in (1.0, 2.0):
        folder = tmp_path / str(factor)
        folder.mkdir()
        (folder / "shipped_net.py").write_text(
            "import os, torch\n"
            "class Net(torch.nn.Linear):\n"
            "    def forward(self, x):\n"
            "        os.environ['SHIPPED'] = 'leaked'\n"
            "        os.chdir('/')\n"
            f"        return {factor} * super().forward(x)\n"
        )
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(folder))
            import shipped_net
            import torch

            torch.manual_seed(0)
            mlflow.pytorch.save_model(
                shipped_net.Net(3, 3), str(folder / "model"), serialization_format="pickle",
                code_paths=[str(folder / "shipped_net.py")], pip_requirements=["torch"],
            )  # fmt: skip
            del sys.modules["shipped_net"], shipped_net
        report = run_audit(
            str(folder / "model"), models.data, None, options(models, penalty=0.1), write=False
        )["report"]
        found.append(report["train"]["nll"])
    assert found[0] != found[1]
    assert "shipped_net" not in sys.modules
    assert (list(sys.path), os.getcwd(), dict(os.environ)) == before


def test_pickles_are_refused_by_the_variable_as_it_is_now(models, monkeypatch):
    """Also where the child's server was started before it was set."""
    run_audit("models:/good/1", models.data, None, options(models), write=False)
    before = content(models)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    with pytest.raises(InputError, match="MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false, got a pi"):
        run_audit("models:/good/1", models.data, None, options(models))
    assert content(models) == before
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", models.uri)
    assert run_audit("models:/good/1", models.data, None, make_options({}), write=False)


def test_data_functions_are_imported_from_the_working_folder(models):
    Path("own_data.py").write_text(
        "import numpy, own_helper\n"
        "def load():\n"
        "    print('not on stdout')\n"
        "    data = numpy.load(own_helper.PATH)\n"
        "    return data['x'], data['y']\n"
    )
    Path("own_helper.py").write_text(f"PATH = {models.data!r}\n")
    values = options(models).model_dump()
    told = []
    reports = []
    for data in ("own_data:load", models.data):
        loaded = stages.load("models:/good/1", data, None, values)
        found = stages.estimate(loaded, values, lambda *step: told.append(step))
        reports.append(untimed(found["report"]))
    assert reports[0] == reports[1]
    assert told
    assert not {"own_data", "own_helper"} & set(sys.modules)


def test_the_memory_limit_counts_in_the_choice_of_the_solver(models, monkeypatch):
    """An audit that does not fit is refused before any work, with exit code 2."""
    np.savez("wide.npz", x=np.zeros((20000, 3), np.float32), y=np.arange(20000) % 3)
    values = options(models, solver="dual", memory_limit="4GB").model_dump()
    with pytest.raises(MemoryPlanError, match="to fit into 3"):
        stages.estimate(stages.load("models:/good/1", "wide.npz", None, values), values)
    monkeypatch.setenv("FLATAUDIT_MEMORY_LIMIT", "4GB")
    values = options(models, solver="dual").model_dump()
    with pytest.raises(MemoryPlanError, match="to fit into 3"):
        stages.estimate(stages.load("models:/good/1", "wide.npz", None, values), values)
    monkeypatch.setenv("FLATAUDIT_MEMORY_LIMIT", "much")
    with pytest.raises(InputError, match="expected memory_limit in FLATAUDIT_MEMORY_LIMIT"):
        stages.load("models:/good/1", models.data, None, values)


def test_the_time_to_find_the_model_counts(models):
    values = options(models, deadline=5).model_dump()
    loaded = stages.load("models:/good/1", models.data, None, values)
    assert loaded["seconds"] > 0
    with pytest.raises(DeadlineError, match="to end within 5 s"):
        stages.estimate(loaded | {"seconds": 6.0}, values)


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


# --- progress and checkpoints -------------------------------------------------------------------


def test_an_interrupted_audit_goes_on_from_its_checkpoint(models, tmp_path):
    """Ctrl-C reaches the solver in the child process, which writes what it has."""
    folder = tmp_path / "kept"
    given = {"solver": "lanczos", "penalty": 1e-3, "sensitivity": False}
    whole = options(models, **given).model_dump()
    loaded = stages.load("models:/good/1", models.data, None, whole)
    seen = []
    expected = stages.estimate(loaded, whole, lambda *values: seen.append(values))["report"]
    counted = [values for values in seen if len(values) == 3]
    assert {text for text, _, _ in counted} == {"factorising the curvature"}

    def interrupt(text, done=0, expected=0):
        if expected:
            raise KeyboardInterrupt

    values = options(models, checkpoint=str(folder), **given).model_dump()
    with pytest.raises(KeyboardInterrupt):
        stages.estimate(loaded, values, interrupt)
    (kept,) = folder.iterdir()
    assert kept.suffix == ".pt"
    again = []
    found = stages.estimate(loaded, values, lambda *values: again.append(values))["report"]
    for key in ("value", "low", "high"):
        assert found["gap"][key] == pytest.approx(expected["gap"][key], rel=1e-9)
    assert 0 < len(again) < len(seen)


def test_the_history_is_read_once(models, monkeypatch):
    """For the warning of a regression and for the report's page."""
    import flataudit.history
    import flataudit.tracking

    reads, real = [], flataudit.history.earlier_audits
    for module in (flataudit.history, flataudit.tracking):
        monkeypatch.setattr(module, "earlier_audits", lambda name: reads.append(name) or real(name))
    run_audit("models:/good/1", models.data, None, options(models, sensitivity=False))
    assert reads == ["good"]
