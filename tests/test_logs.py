"""One line per stage, as text or JSON; silent until something listens; no password in any."""

import json
import logging
import sys

import pytest
from mlflow import MlflowClient

from flataudit import keys, logs, stages
from flataudit.config import make_options
from flataudit.errors import InputError
from flataudit.logs import stage
from tests.shells import make_models


@pytest.fixture
def lines(caplog):
    """The messages of the stages' logger."""
    caplog.set_level(logging.INFO, logger="flataudit")

    def read():
        return [r.getMessage() for r in caplog.records if r.name == "flataudit.stages"]

    return read


@pytest.fixture(autouse=True)
def _unset(monkeypatch):
    monkeypatch.delenv(logs.VARIABLE, raising=False)


def test_as_text(lines):
    with stage("log", "models:/net/1") as told:
        told["run_id"] = "r1"
    first, last = lines()
    assert first == "log start models:/net/1"
    assert last.startswith("log end models:/net/1 seconds=")
    assert last.endswith(" run_id=r1")


def test_as_json(lines, monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "json")
    with stage("log", "models:/net/1") as told:
        told["run_id"] = "r1"
    first, last = map(json.loads, lines())
    assert first == {"stage": "log", "event": "start", "uri": "models:/net/1"}
    assert last.pop("seconds") >= 0
    assert last == {"stage": "log", "event": "end", "uri": "models:/net/1", "run_id": "r1"}


def test_a_stage_that_fails(lines, caplog):
    with pytest.raises(ValueError, match="no"), stage("load", "models:/net/1"):
        raise ValueError("no http://me:secret@host/x\nat all")
    assert lines()[-1].endswith(" error=no http://host/x")
    assert caplog.records[-1].levelno == logging.ERROR


def test_one_line_whatever_the_name(lines):
    with stage("load", "models:/a\nb\x1b[31m/1"):
        pass
    assert all("\n" not in line and "\x1b" not in line for line in lines())


def test_silent_where_nothing_listens(capfd):
    with stage("load", "models:/net/1"):
        pass
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("asked", ["text", "json", None])
def test_the_command_line_listens_where_it_is_asked_to(asked, monkeypatch, capsys):
    package = logging.getLogger("flataudit")
    before = package.handlers[:], package.level, package.propagate
    if asked:
        monkeypatch.setenv(logs.VARIABLE, asked)
    try:
        logs.listen()
        with stage("load", "models:/net/1"):
            pass
    finally:
        package.handlers[:], package.level, package.propagate = before[0], before[1], before[2]
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == (2 if asked else 0)
    if asked == "json":
        assert [json.loads(line)["event"] for line in err.splitlines()] == ["start", "end"]


def test_another_word_is_refused(monkeypatch):
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(InputError, match="FLATAUDIT_LOG to be text or json, got 'xml'"):
        logs.listen()


def test_the_stages_of_a_real_audit(lines, monkeypatch, tmp_path):
    """Lines, durations and the child's peak memory, as log and as metrics of the run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(logs.VARIABLE, "json")
    models = make_models()
    chosen = make_options({"tracking_uri": models.uri})
    found = stages.run_audit("models:/good/1", models.data, None, chosen)
    told = [json.loads(line) for line in lines()]
    assert [(t["stage"], t["event"]) for t in told] == [
        (name, event) for name in ("load", "estimate", "log") for event in ("start", "end")
    ]
    assert {t["uri"] for t in told} == {"models:/good/1"}
    assert told[-1]["run_id"] == found["run_id"]
    metrics = MlflowClient(models.uri).get_run(found["run_id"]).data.metrics
    assert metrics[keys.PEAK_BYTES] == told[3]["peak_bytes"]
    assert 50e6 < metrics[keys.PEAK_BYTES] < 20e9  # a Python with torch
    assert 0 < metrics[keys.DURATION] < metrics[keys.ESTIMATE_SECONDS]
    assert metrics[keys.LOAD_SECONDS] > 0
    on_model = MlflowClient(models.uri).get_logged_model(found["report"]["model"]["model_id"])
    assert not {keys.PEAK_BYTES, keys.ESTIMATE_SECONDS} & {m.key for m in on_model.metrics}


def test_unasked_no_line_reaches_what_libraries_set_up(monkeypatch, capsys, caplog):
    """As MLflow does where Lightning is installed: logging.basicConfig, with a handler."""
    caplog.set_level(logging.INFO, logger="flataudit")  # as where the flows are imported
    monkeypatch.setattr(logging.getLogger("flataudit"), "handlers", [])
    root, handler = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(handler)
    try:
        logs.listen()
        with stage("load", "models:/net/1"):
            pass
    finally:
        root.removeHandler(handler)
    assert capsys.readouterr() == ("", "")


def test_unasked_a_command_shows_warnings_alone(monkeypatch, capsys):
    """No line of a stage, not even of one that failed: the command says what came of it."""
    package = logging.getLogger("flataudit")
    monkeypatch.delenv(logs.VARIABLE, raising=False)
    monkeypatch.setattr(package, "handlers", [])
    logs.listen()
    logs.listen()  # twice is once
    with pytest.raises(ValueError, match="broke"), stage("log", "models:/net/1"):
        raise ValueError("broke")
    logging.getLogger("flataudit.versions").info("a detail")
    logging.getLogger("flataudit.versions").warning("the table is old")
    assert capsys.readouterr() == ("", "the table is old\n")
