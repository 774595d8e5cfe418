"""The command line: exit codes, what is printed where, and what is left in the registry."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from flataudit import cli, stages, tracking
from flataudit.errors import NumericalError
from tests.shells import DESCRIPTION, content, environment, make_models, untimed


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stderr of a command that failed and printed nothing else."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("flataudit: ")
        return line.removeprefix("flataudit: ")

    @property
    def report(self) -> dict:
        """The JSON that is all of stdout, from a command that has nothing to complain of."""
        assert (self.code, self.err) == (0, "")
        return json.loads(self.out)


@pytest.fixture
def models():
    return make_models()


@pytest.fixture
def client(models):
    return MlflowClient(models.uri)


@pytest.fixture
def run(models, monkeypatch, tmp_path, capfd):
    """Runs the command line in this process, in an empty folder; `Done`."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(cli, "_quiet", lambda: None)  # warnings would be errors, as in all tests

    def command(*args, store=models.uri):
        capfd.readouterr()
        where = ["--tracking-uri", store] if store else []
        monkeypatch.setattr(sys, "argv", ["flataudit", *map(str, args), *where])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Done(caught.value.code, *capfd.readouterr())

    yield command
    mlflow.set_tracking_uri(None)


@pytest.fixture
def audit(run, models):
    """`flataudit audit` of the good network on its data, with more options."""

    def command(*args, uri="models:/good/1", train=models.data, **more):
        return run("audit", uri, "--train", train, *args, **more)

    return command


@pytest.fixture
def broken(models, run):
    """Data whose loading makes the audit itself, in its process, raise `error`."""

    def make(error):
        Path("broken_data.py").write_text(
            "import importlib, numpy\n"
            "from flataudit.errors import *\n"
            "def raises(*_, **__):\n"
            f"    raise {type(error).__name__}(*{error.args!r})\n"
            "def load():\n"
            "    importlib.import_module('flataudit.audit').with_indices = raises\n"
            f"    data = numpy.load({models.data!r})\n"
            "    return data['x'], data['y']\n"
        )
        return "broken_data:load"

    return make


def state(client, version="1"):
    """Tags, description and time of last change of a version."""
    found = client.get_model_version("good", version)
    return found.tags, found.description, found.last_updated_timestamp


def runs(client):
    """The audit runs, newest first."""
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


# --- bad input: exit 2, one line, nothing written -----------------------------------------------


def files(folder, models):
    """Bad data by name."""
    x, y = models.x, models.y
    with_nan = x.copy()
    with_nan[3, 1] = np.nan
    far = y.copy()
    far[5] = 7
    arrays = {
        "short": (x, y[:-1]),
        "nan": (with_nan, y),
        "far": (x, far),
        "negative": (x, y - 1),
        "one": (x[:1], y[:1]),
        "none": (x[:0], y[:0]),
        "wide": (np.hstack([x, x]), y),
        "halves": (x, y + 0.5),
    }
    for name, (a, b) in arrays.items():
        np.savez(folder / f"{name}.npz", x=a, y=b)
    (folder / "empty.npz").write_bytes(b"")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "header.csv").write_text("a,b,c,label\n")
    (folder / "options.yaml").write_text("pennalty: 0.1\n")
    (folder / "list.yaml").write_text("- penalty\n")
    (folder / "record.yaml").write_text("optimizer: sgd\nsum_lr: 4\nmomentun: 0.9\n")


NO_RUN = "0" * 32
BAD = {
    "unknown model": ({"uri": "models:/nothing/1"}, "a registered model 'nothing', got none"),
    "unknown version": ({"uri": "models:/good/9"}, "version 9 of good, got no such version"),
    "unknown alias": ({"uri": "models:/good@best"}, "an alias 'best' of good, got only: champion"),
    "unknown id": ({"uri": f"models:/m-{NO_RUN}"}, "a logged model"),
    "unknown run": ({"uri": f"runs:/{NO_RUN}/good"}, "expected a run"),
    "not a URI": ({"uri": "good"}, "expected a model as models:/name/version"),
    "missing file": ({"train": "{}/missing.npz"}, "expected a data file at"),
    "missing held-out file": ({"more": ["--heldout", "{}/missing.npz"]}, "expected a data file at"),
    "another format": ({"train": "{}/train.mat"}, "expected data as a .npz, .csv or .parquet"),
    "no such module": ({"train": "no_such_module:load"}, "to import no_such_module"),
    "x longer than y": ({"train": "{}/short.npz"}, "x and y of the same length"),
    "NaN in x": ({"train": "{}/nan.npz"}, "expected finite values in train x"),
    "NaN in held-out x": ({"more": ["--heldout", "{}/nan.npz"]}, "finite values in heldout x"),
    "label out of range": ({"train": "{}/far.npz"}, "7"),
    "held-out label out of range": ({"more": ["--heldout", "{}/far.npz"]}, "7"),
    "negative label": ({"train": "{}/negative.npz"}, "-1"),
    "classes that are not whole": (
        {"train": "{}/halves.npz", "more": ["--family", "categorical"]},
        "expected",
    ),
    "outputs not finite": ({"uri": "models:/infinite/1"}, "expected finite"),
    "one sample": ({"train": "{}/one.npz"}, "at least 2 samples in train, got 1"),
    "no samples": ({"train": "{}/none.npz"}, "expected"),
    "no parameters": ({"uri": "models:/bare/1"}, "a model with trained parameters, got none"),
    "trees": ({"uri": "models:/forest/1"}, "got RandomForestClassifier (scikit-learn)"),
    "negative penalty": ({"more": ["--penalty", "-0.1"]}, "at least 0, got -0.1"),
    "penalty that is no number": ({"more": ["--penalty", "much"]}, "at least 0, got 'much'"),
    "NaN as penalty": ({"more": ["--penalty", "nan"]}, "at least 0, got nan"),
    "unknown solver": ({"more": ["--solver", "kfca"]}, "unknown solver 'kfca'; choose one of: "),
    "unknown family": ({"more": ["--family", "normal"]}, "unknown family 'normal'; choose one of"),
    "unknown curvature": ({"more": ["--curvature", "fisher"]}, "unknown curvature 'fisher'"),
    "unknown device": ({"more": ["--device", "tpu"]}, "unknown device 'tpu'; choose one of: auto"),
    "empty npz": ({"train": "{}/empty.npz"}, "got an empty file"),
    "empty csv": ({"train": "{}/empty.csv", "more": ["--target", "label"]}, "got an empty file"),
    "table without rows": (
        {"train": "{}/header.csv", "more": ["--target", "label"]},
        "expected rows and feature columns",
    ),
    "table without target": ({"train": "{}/header.csv"}, "expected --target to name a column"),
    "wrong input width": ({"train": "{}/wide.npz"}, "expected x that the model accepts, got shape"),
    "wrong held-out width": ({"more": ["--heldout", "{}/wide.npz"]}, "expected heldout x of shape"),
    "unknown config key": ({"more": ["--config", "{}/options.yaml"]}, "unknown option 'pennalty'"),
    "config that is a list": ({"more": ["--config", "{}/list.yaml"]}, "got list"),
    "missing config": ({"more": ["--config", "{}/none.yaml"]}, "expected a YAML file, got none"),
    "record without equals": ({"more": ["--training", "sgd"]}, "a training record as KEY=VALUE"),
    "unknown record key": ({"more": ["--training", "{}/record.yaml"]}, "training key 'momentun'"),
    "unknown optimizer": (
        {"more": ["--training", "optimizer=rmsprop,sum_lr=4"]},
        "one of sgd, adam, adamw, converged, got 'rmsprop'",
    ),
    "Adam without batch size": (
        {"more": ["--training", "optimizer=adam,sum_lr=4"]},
        "expected batch_size in the training record of adam",
    ),
    "missing record": ({"more": ["--training", "{}/none.yaml"]}, "got no file at"),
    "deadline of zero": ({"more": ["--deadline", "0"]}, "greater than 0, got 0"),
    "deadline that is no number": ({"more": ["--deadline", "soon"]}, "'--deadline'"),
    "unknown option": ({"more": ["--pennalty", "1"]}, "--pennalty"),
    "one argument too many": ({"more": ["and", "more"]}, "unexpected extra argument"),
    "json in a missing folder": ({"more": ["--json", "{}/no/a.json"]}, "expected --json to name"),
    "json that is a folder": ({"more": ["--json", "{}"]}, "expected --json to name a file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(audit, models, tmp_path, name):
    files(tmp_path, models)
    changed, expected = BAD[name]
    filled = {
        key: [part.format(tmp_path) for part in value] if key == "more" else value.format(tmp_path)
        for key, value in changed.items()
    }
    before, kept = content(models), sorted(tmp_path.rglob("*"))
    done = audit(*filled.pop("more", []), **filled)
    assert done.code == 2
    assert expected in done.line
    assert "Traceback" not in done.err
    assert content(models) == before
    assert sorted(tmp_path.rglob("*")) == kept


def test_a_missing_command_argument_or_option(run):
    for args, expected in {
        ("audit",): "model_uri",
        ("audit", "models:/good/1"): "--train",
        ("audit", "models:/good/1", "--train"): "--train",
        ("adit", "models:/good/1"): "'adit'",
    }.items():
        done = run(*args, store=None)
        assert done.code == 2
        assert expected in done.line
        assert "--help" in done.line


def test_help(run):
    for args in ((), ("--help",), ("audit", "--help"), ("demo", "--help")):
        done = run(*args, store=None)
        assert (done.code, done.err) == (0, "")
        assert "Usage: flataudit" in done.out


# --- the audit failed: exit 3 -------------------------------------------------------------------


def test_a_store_that_cannot_be_reached(audit, models, client, tmp_path, monkeypatch):
    before = content(models)
    for store in (f"sqlite:///{tmp_path}/none.db", "http://me:secret@127.0.0.1:1"):
        done = audit(store=store)
        assert done.code == 3
        assert "check the tracking" in done.line
        assert "secret" not in done.line
    assert not (tmp_path / "none.db").exists()
    assert content(models) == before


def test_a_store_that_fails_while_the_result_is_written(audit, client, monkeypatch):
    assert audit("--json", "-").code == 0
    before = state(client)[:2]
    assert before[0]["flataudit.verdict"] in ("pass", "warn", "fail")

    def fails(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "log_batch", fails)
    done = audit("--penalty", "0.5")
    assert done.code == 3
    assert "disk full" in done.line
    assert state(client)[:2] == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("the GPU\nis on fire"), "got RuntimeError: the GPU is on fire"),
        (MemoryError(), "got MemoryError"),
        (NumericalError("expected a positive definite matrix, got none"), "positive definite"),
    ],
)
def test_an_audit_that_breaks(audit, client, broken, tmp_path, error, expected):
    assert audit("--json", "-").code == 0
    assert "flataudit.gap" in state(client)[0]
    done = audit(train=broken(error))
    assert done.code == 3
    assert expected in done.line
    tags, description, _ = state(client)
    newest = runs(client)[0]
    assert tags["flataudit.verdict"] == "error"
    assert tags["flataudit.run_id"] == newest.info.run_id
    assert "flataudit.gap" not in tags  # of the audit before
    assert description.startswith(DESCRIPTION)
    assert expected in description
    assert newest.info.status == "FAILED"
    path = client.download_artifacts(newest.info.run_id, "flataudit/error.json", str(tmp_path))
    assert expected in json.loads(Path(path).read_text())["error"]


def test_an_audit_that_breaks_unlogged(audit, models, broken):
    before = content(models)
    assert audit("--no-log", train=broken(RuntimeError("no"))).code == 3
    assert content(models) == before


def test_a_bug_is_one_line_too(audit, models, monkeypatch):
    """Where even loading raises what nobody foresaw: not a traceback with the gate's exit code."""

    def raises(*_, **__):
        raise KeyError("bug")

    monkeypatch.setattr(cli.audit, "check_writable", raises)
    before = content(models)
    done = audit("--json", "a.json")
    assert done.code == 3
    assert "got KeyError: 'bug'; set FLATAUDIT_DEBUG=1" in done.line
    assert content(models) == before


# --- the deadline -------------------------------------------------------------------------------


def test_past_the_deadline_the_audit_is_killed(audit, client):
    done = audit("--deadline", "0.5", "--json", "report.json", train=busy("time.sleep(1)"))
    assert done.code == 3
    assert "expected the audit to end within 0.5 s" in done.line
    assert not Path("report.json").exists()
    tags, _, _ = state(client)
    assert tags["flataudit.verdict"] == "error"
    assert runs(client)[0].info.status == "FAILED"


def busy(statement):
    """Data that write the pid of the process that loads them, and never come."""
    Path("busy_data.py").write_text(
        "import os, pathlib, time, torch\n"
        "def load():\n"
        "    pathlib.Path('part').write_text(str(os.getpid()))\n"
        "    os.replace('part', 'pid')\n"
        "    a = torch.eye(3000)\n"
        "    while True:\n"
        f"        {statement}\n"
    )
    return "busy_data:load"


def test_a_long_tensor_operation_is_killed_too(audit, client):
    assert audit("--json", "-").code == 0  # the process's imports are done
    done = audit("--deadline", "5", train=busy("a = a @ a"))
    assert done.code == 3
    child = int(Path("pid").read_text())
    assert child != os.getpid()
    assert soon(lambda: ended(child), 20)
    assert state(client)[0]["flataudit.verdict"] == "error"


def test_beyond_the_memory_limit_the_audit_is_killed(audit, client):
    done = audit("--memory-limit", "1.5GB", train=busy("a = torch.cat([a, a])"))
    assert done.code == 3
    assert "expected the audit to stay within 1.50 GB of memory, got" in done.line
    assert state(client)[0]["flataudit.verdict"] == "error"
    done = audit("--memory-limit", "lots")
    assert done.code == 2
    assert "expected memory_limit in the options to be" in done.line


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="reads /proc")
def test_the_child_does_not_outlive_a_command_that_is_ended(models, tmp_path):
    """As a scheduler ends it, by SIGTERM, while the child still has most of its deadline."""
    (tmp_path / "waiting_data.py").write_text(
        "import os, pathlib, time\n"
        "def load():\n"
        "    pathlib.Path('part').write_text(str(os.getpid()))\n"
        "    os.replace('part', 'pid')\n"
        "    time.sleep(500)\n"
    )
    command = [sys.executable, "-m", "flataudit", "audit", "models:/good/1", "--train",
               "waiting_data:load", "--deadline", "600", "--tracking-uri", models.uri]  # fmt: skip
    parent = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    try:
        assert soon((tmp_path / "pid").exists, 120)
        child = int((tmp_path / "pid").read_text())
        os.kill(child, 0)
    finally:
        parent.terminate()
        parent.wait(60)
    assert soon(lambda: ended(child), 20)


def soon(holds, seconds):
    """Whether `holds()` comes true within so many seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.1)
    return holds()


def ended(pid):
    """Whether a process is gone, or only waits for its new parent to ask for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_deadline_that_is_kept_changes_nothing(audit):
    within = audit("--deadline", "500", "--no-log", "--json", "-").report
    assert untimed(within) == untimed(audit("--no-log", "--json", "-").report)


def test_bad_input_within_a_deadline(audit, models, tmp_path):
    files(tmp_path, models)
    before = content(models)
    done = audit("--deadline", "500", train=tmp_path / "far.npz")
    assert done.code == 2
    assert "7" in done.line
    assert content(models) == before


# --- what is printed and written ----------------------------------------------------------------

KEYS = {
    "schema": None,
    "model": {"uri", "name", "version", "model_id", "flavor", "n_params"},
    "data": {"n_samples", "n_outputs", "sha256", "heldout_samples"},
    "family": None,
    "dispersion": None,
    "penalty": {"value", "free_params", "source", "training", "stationarity"},
    "train": {"nll", "accuracy"},
    "heldout": {"nll", "accuracy", "gap", "gap_se"},
    "calibration": {
        "evidence", "n", "ece", "ece_if_calibrated", "mce", "ace", "mean_confidence", "accuracy",
        "slope", "slope_ci", "confidence_gap", "confidence_gap_ci", "p_values", "verdict",
        "direction", "severity",
    },
    "estimates": {"soft_rank", "tic", "loo", "soft_rank_recalibrated", "soft_rank_blend"},
    "premise": {"information_ratio", "z", "evidence"},
    "gap": {"value", "low", "high", "level", "estimator", "reason"},
    "predicted_test_nll": {"value", "low", "high"},
    "predicted_accuracy": {"value", "low", "high"},
    "confidence": None,
    "warnings": None,
    "solver": {"name", "exact", "reason", "device", "dtype", "seconds", "peak_bytes"},
}  # fmt: skip


def test_json_alone_on_stdout(audit, models, client):
    before = state(client)[2]
    report = audit("--heldout", models.heldout, "--json", "-").report
    for key, fields in KEYS.items():
        assert key in report
        assert fields is None or fields <= set(report[key]), key
    assert report["schema"] == 1
    assert (report["model"]["name"], report["model"]["version"]) == ("good", "1")
    assert (report["data"]["n_samples"], report["data"]["heldout_samples"]) == (80, 40)
    assert report["calibration"]["evidence"] == "heldout"
    assert report["heldout"]["gap"] == pytest.approx(
        report["heldout"]["nll"] - report["train"]["nll"]
    )
    assert report["penalty"]["source"] == "training"
    assert report["penalty"]["training"]["weight_decay"] == 0.01
    assert state(client)[2] > before  # and it was logged


def test_on_a_terminal_the_report_is_text(audit, client):
    done = audit("--json", "report.json")
    assert (done.code, done.err) == (0, "")
    newest = runs(client)[0].info.run_id
    assert done.out.startswith("models:/good/1: ")
    assert done.out.splitlines()[-1] == f"logged to MLflow: run {newest} in experiment flataudit"
    report = json.loads(Path("report.json").read_text())
    assert report["model"]["uri"] == "models:/good/1"
    assert [path.name for path in Path.cwd().iterdir()] == ["report.json"]
    logged = Path(client.download_artifacts(newest, "flataudit/report.json"))
    assert json.loads(logged.read_text()) == report


def test_a_report_of_before_stays_where_the_audit_fails(audit, broken):
    Path("report.json").write_text("of before")
    assert audit("--json", "report.json", "--penalty", "-1").code == 2
    train = broken(RuntimeError("no"))
    assert audit("--json", "report.json", train=train).code == 3
    assert Path("report.json").read_text() == "of before"
    left = {path.name for path in Path.cwd().iterdir()} - {"__pycache__"}
    assert left == {"report.json", "broken_data.py"}


def test_an_unwritable_place_is_found_before_any_work(audit, monkeypatch):
    def started(*_, **__):
        raise AssertionError("the audit has begun")

    monkeypatch.setattr(stages, "load", started)
    Path("file").write_text("")
    for place in ("none/report.json", "file/report.json", "."):
        done = audit("--json", place)
        assert done.code == 2
        assert "expected --json to name" in done.line


def test_no_log_writes_nothing(audit, models):
    before = content(models)
    done = audit("--no-log")
    assert (done.code, done.err) == (0, "")
    assert "logged" not in done.out
    assert audit("--no-log", "--json", "-").report["gap"]["value"] > 0
    assert content(models) == before
    assert list(Path.cwd().iterdir()) == []


def test_config_file_and_the_command_line_wins(audit):
    Path("options.yaml").write_text("penalty: 3e-1\nsolver: dual\ntraining: ''\n")
    config = ("--config", "options.yaml", "--no-log", "--json", "-")
    report = audit(*config).report
    assert (report["penalty"]["value"], report["solver"]["name"]) == (0.3, "dual")
    report = audit(*config, "--penalty", "0.2").report
    assert (report["penalty"]["value"], report["solver"]["name"]) == (0.2, "dual")
    report = audit(*config, "--solver", "auto", "--penalty", "auto").report
    assert (report["penalty"]["source"], report["solver"]["name"]) == ("training", "primal")


def test_empty_values_count_as_not_given(audit):
    names = ("heldout", "target", "family", "penalty", "dispersion", "training", "curvature",
             "solver", "device", "config")  # fmt: skip
    empty = [part for name in names for part in (f"--{name}", "")]
    assert untimed(audit(*empty, "--no-log", "--json", "-").report) == untimed(
        audit("--no-log", "--json", "-").report
    )
    assert audit("--json", "", "--no-log").out.startswith("models:/good/1: ")


def test_options_reach_the_audit(audit, models):
    quiet = ("--no-log", "--json", "-")
    report = audit(*quiet, "--penalty", "0.25", "--solver", "dual", "--device", "cpu").report
    assert report["penalty"]["value"] == 0.25
    assert report["penalty"]["source"] == "argument"
    assert (report["solver"]["name"], report["solver"]["device"]) == ("dual", "cpu")
    report = audit(*quiet, "--training", "optimizer=converged,weight_decay=0.05").report
    assert (report["penalty"]["value"], report["penalty"]["source"]) == (0.05, "training")


def test_tables_and_logged_data_give_what_the_arrays_give(audit, models):
    names = ["a", "b", "c", "label"]
    rows = np.column_stack([models.x.astype(np.float64), models.y])
    lines = [",".join(names)] + [",".join(repr(float(v)) for v in row[:-1]) + f",{int(row[-1])}"
                                 for row in rows]  # fmt: skip
    Path("train.csv").write_text("\n".join(lines) + "\n")
    quiet = ("--no-log", "--json", "-")
    reports = [
        untimed(audit(*quiet).report),
        untimed(audit(*quiet, train="mlflow").report),
        untimed(audit(*quiet, "--target", "label", train="train.csv").report),
    ]
    assert reports[0] == reports[1] == reports[2]


def test_other_names_of_the_model(audit, models, client):
    """An alias is its version; a folder is audited, and no version is touched."""
    quiet = ("--no-log", "--json", "-")
    plain = untimed(audit(*quiet).report)
    assert untimed(audit(*quiet, uri="models:/good@champion").report) == plain
    before = [state(client, version) for version in ("1", "2")]
    folder = client.get_model_version("good", "1").source
    folder = mlflow.artifacts.download_artifacts(folder, tracking_uri=models.uri)
    count = len(runs(client))
    report = untimed(audit("--json", "-", "--training", "optimizer=sgd,lr=0.5,steps=200,"
                           "weight_decay=0.01,batch_size=80", uri=folder).report)  # fmt: skip
    assert report["estimates"] == plain["estimates"]
    assert report["model"]["name"] is None
    assert [state(client, version) for version in ("1", "2")] == before
    assert len(runs(client)) == count + 1


def test_a_version_audited_beside_another_is_the_only_one_that_changes(audit, client):
    before = state(client, "1")
    assert audit("--json", "-", uri="models:/good/2").report["model"]["version"] == "2"
    assert state(client, "1") == before
    assert state(client, "2")[0]["flataudit.verdict"] in ("pass", "warn", "fail")


# --- as a process of its own --------------------------------------------------------------------


def process(*args, folder, **more):
    """`python -m flataudit` as a user starts it."""
    command = [sys.executable, "-m", "flataudit", *map(str, args)]
    found = subprocess.run(
        command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=300
    )
    return Done(found.returncode, found.stdout, found.stderr)


def test_process_json_alone_on_stdout(models, tmp_path):
    """The store by MLFLOW_TRACKING_URI alone; MLflow's notices do not mix with the JSON."""
    before = content(models)
    done = process("audit", "models:/good/1", "--train", models.data, "--json", "-", "--no-log",
                   folder=tmp_path, MLFLOW_TRACKING_URI=models.uri)  # fmt: skip
    report = done.report
    assert all(math.isfinite(report["gap"][key]) for key in ("value", "low", "high"))
    assert content(models) == before
    assert list(tmp_path.iterdir()) == []


def test_process_bad_input_is_one_line(models, tmp_path):
    files(tmp_path, models)
    before = content(models)
    done = process("audit", "models:/good/1", "--train", tmp_path / "nan.npz",
                   folder=tmp_path, MLFLOW_TRACKING_URI=models.uri)  # fmt: skip
    assert done.code == 2
    assert "NaN or infinity in 1 of 80 samples" in done.line
    assert content(models) == before


def test_process_in_a_folder_without_a_store(tmp_path):
    """The embedded store is made in its own folder, and MLflow's making of it is not told."""
    done = process("audit", "models:/digits/1", "--train", "train.npz", folder=tmp_path)
    assert done.code == 2
    assert "a registered model 'digits', got none" in done.line
    assert [path.name for path in tmp_path.iterdir()] == ["flataudit-store"]


# --- slices -------------------------------------------------------------------------------------


def test_slices_in_the_json_and_on_the_run(audit, models, tmp_path):
    path = tmp_path / "column.csv"
    path.write_text("size\n" + "\n".join(str(i) for i in range(len(models.y))) + "\n")
    done = audit("--slices", f"{path}:size", "--json", "-")
    assert done.code == 0
    (table,) = json.loads(done.out)["slices"]
    assert [row["n"] for row in table["rows"]] == [16] * 5
    assert {row["value"] for row in table["rows"]} >= {"0 to 15", "64 to 79"}
    (run, *_) = runs(mlflow.MlflowClient(models.uri))
    assert run.data.params["slices"] == f"{path}:size"


def test_an_unknown_column_is_one_line(audit):
    done = audit("--slices", "shop")
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("flataudit: expected --slices to name a column of ")
    assert done.err.count("\n") == 1


# --- the process -----------------------------------------------------------------------------


def test_process_does_not_import_what_its_child_does(models, tmp_path):
    """The imports are made once, in parallel; and what was not asked for is not imported."""
    code = (
        "import sys\n"
        "from flataudit import cli\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    print(end.code, *sorted({'torch', 'netcal', 'sklearn', 'skops'} & set(sys.modules)))\n"
    )
    arguments = ["audit", "models:/good/1", "--train", models.data, "--no-log", "--json", "a.json"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True,
        env=environment(MLFLOW_TRACKING_URI=models.uri), timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "0", done.stderr
