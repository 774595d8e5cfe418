"""The command line against real MLflow servers, on sqlite and on PostgreSQL."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flataudit import tracking
from tests.mlflow_store import make_store
from tests.servers import free_port, missing_postgresql, program
from tests.shells import environment


@pytest.fixture
def command(mlflow_url, tmp_path):
    """Runs `flataudit` in a process of its own, which knows the server by its environment."""

    def run(*args):
        return subprocess.run(
            [sys.executable, "-m", "flataudit", *args],
            env=environment(MLFLOW_TRACKING_URI=mlflow_url),
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    return run


def test_an_audit_from_end_to_end(command, mlflow_url, tmp_path):
    """Model, data and record come from the server; report, tags and description go there."""
    store, client = make_store(mlflow_url), MlflowClient(mlflow_url)
    found = client.copy_model_version("models:/digits/1", "by-command-line")
    uri = f"models:/by-command-line/{found.version}"
    done = command("audit", uri, "--train", "mlflow", "--json", "-")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    version = client.get_model_version(found.name, found.version)
    run = client.get_run(version.tags["flataudit.run_id"])
    assert run.data.metrics.items() >= tracking.metrics_of(report).items()
    assert version.tags["flataudit.model_id"] == store.pickle_id
    assert "flataudit: " + version.tags["flataudit.verdict"] in version.description
    # Downloaded from the server, not read from its disk.
    path = Path(client.download_artifacts(run.info.run_id, "flataudit/report.json", str(tmp_path)))
    assert json.loads(path.read_text()) == report
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    on_model = {m.key for m in client.get_logged_model(store.pickle_id).metrics
                if m.run_id == run.info.run_id}  # fmt: skip
    assert on_model == set(tracking.metrics_of(report))

    before = client.get_model_version(found.name, found.version)
    refused = command("audit", uri, "--train", "none.npz")
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    after = client.get_model_version(found.name, found.version)
    assert (after.tags, after.description) == (before.tags, before.description)


def test_a_server_that_is_not_there(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "flataudit", "audit", "models:/digits/1", "--train", "mlflow"],
        env=environment(
            MLFLOW_TRACKING_URI=f"http://127.0.0.1:{free_port()}",
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
        ),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1


def test_postgresql_is_skipped_only_where_it_is_missing(monkeypatch):
    if program("postgres") is not None:
        assert missing_postgresql() is None
    monkeypatch.setattr("tests.servers.program", lambda name: None)
    assert "apt-get install postgresql" in missing_postgresql()
