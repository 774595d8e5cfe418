"""A password in the tracking URI is in nothing that an audit writes, prints or logs."""

import json
import logging
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flataudit import logs, stages
from flataudit.config import make_options
from flataudit.errors import StoreError
from tests.mlflow_store import make_store
from tests.servers import free_port, mlflow_process

PASSWORD = "hunter2-of-the-store"


@pytest.fixture
def said(caplog, monkeypatch):
    """What was logged, by whomever, and what was printed."""
    monkeypatch.setenv(logs.VARIABLE, "json")
    caplog.set_level(logging.DEBUG, logger="flataudit")
    yield caplog
    mlflow.set_tracking_uri(None)


def files(*folders):
    found = [path for folder in folders for path in Path(folder).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in found}


def test_it_is_nowhere(said, tmp_path, monkeypatch, capfd):
    """After a real audit and a failed one: database, artifacts, log lines, reports, output."""
    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    database = f"sqlite:///{folder / 'mlflow.db'}"
    with mlflow_process(database, folder, port):
        make_store(f"http://127.0.0.1:{port}")
        uri = f"http://me:{PASSWORD}@127.0.0.1:{port}"
        options = make_options({"tracking_uri": uri})
        found = stages.run_audit("models:/digits/1", "mlflow", None, options)
        loaded = stages.load("models:/digits/2", "mlflow", None, options.model_dump())
        stages.log_failure(loaded, "expected the audit to complete", options.model_dump())
        run = MlflowClient(f"http://127.0.0.1:{port}").get_run(found["run_id"])
    assert run.info.status == "FINISHED"
    assert PASSWORD not in json.dumps(found)
    written = files(folder)
    assert any(path.name == "report.json" for path in written)
    assert any(found["run_id"].encode() in content for content in written.values())
    assert [path for path, content in written.items() if PASSWORD.encode() in content] == []
    assert "estimate" in said.text
    assert PASSWORD not in said.text
    assert PASSWORD not in "".join(capfd.readouterr())


def test_nor_in_the_error_of_a_store_that_cannot_be_reached(said, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    options = make_options({"tracking_uri": f"http://me:{PASSWORD}@127.0.0.1:{free_port()}"})
    with pytest.raises(StoreError) as caught:
        stages.run_audit("models:/digits/1", "mlflow", None, options)
    assert PASSWORD not in str(caught.value)
    assert '"event": "failed"' in said.text
    assert PASSWORD not in said.text
    assert PASSWORD not in "".join(capfd.readouterr())
