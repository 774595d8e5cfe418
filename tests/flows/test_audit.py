"""The flow on a real Prefect server: the command line's result, three tasks, its errors."""

import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from flataudit import cli, stages
from flataudit.config import AuditOptions
from flataudit.errors import DeadlineError, InputError
from tests.prefect_api import newest_run
from tests.shells import ROOT, content, endless_data, environment, make_models, untimed

TAGS = {
    "flataudit.verdict", "flataudit.gap", "flataudit.calibration", "flataudit.confidence",
    "flataudit.warnings", "flataudit.run_id", "flataudit.model_id", "flataudit.policy",
    "flataudit.audited_at",
}  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return make_models()


@pytest.fixture
def client(models):
    return MlflowClient(models.uri)


@pytest.fixture
def audit_flow(server):
    from flows.audit import audit_flow

    return audit_flow


def by_command_line(monkeypatch, capfd, *args):
    """The report that the command line prints for the same arguments."""
    capfd.readouterr()
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["flataudit", "audit", *args, "--no-log", "--json", "-"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    return json.loads(capfd.readouterr().out)


def newest(server, tasks=0):
    """The newest run of the audit flow and its final task runs by name, once there are `tasks`."""

    def final(found):
        return {task.name.rpartition("-")[0]: task.state for task in found
                if task.state and task.state.is_final()}  # fmt: skip

    run, found = newest_run(server, "flataudit-audit", lambda found: len(final(found)) >= tasks)
    assert len(found) == tasks, found
    return run, final(found)


def test_parameters_are_the_options():
    from flows.audit import audit_flow

    parameters = inspect.signature(audit_flow.fn).parameters
    assert list(parameters)[:3] == ["model_uri", "train", "heldout"]
    assert set(parameters) == {"model_uri", "train", "heldout"} | set(AuditOptions.model_fields)
    for name, field in AuditOptions.model_fields.items():
        assert parameters[name].default == field.default, name


def test_gives_what_the_command_line_gives(audit_flow, models, client, server, monkeypatch, capfd):
    found = audit_flow("models:/good/1", "mlflow", heldout=models.heldout, solver="dual",
                       tracking_uri=models.uri)  # fmt: skip
    assert set(found) == {"report", "display", "run_id", "seconds", "resources"}
    printed = by_command_line(
        monkeypatch, capfd, "models:/good/1", "--train", "mlflow", "--heldout", models.heldout,
        "--solver", "dual", "--tracking-uri", models.uri,
    )  # fmt: skip
    assert untimed(found["report"]) == untimed(printed)
    tags = client.get_model_version("good", "1").tags
    assert set(tags) >= TAGS
    assert tags["flataudit.run_id"] == found["run_id"]
    assert tags["flataudit.verdict"] in ("pass", "warn", "fail")
    run, tasks = newest(server, tasks=3)
    assert run.state.is_completed()
    assert set(tasks) == {"load", "estimate", "log"}
    assert all(state.is_completed() for state in tasks.values())
    assert list(Path.cwd().iterdir()) == []


def test_results_on_the_server_are_json(audit_flow, models, server, tmp_path):
    """What each task left in Prefect's storage reads back as JSON, and nothing is a pickle."""
    from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

    storage = PREFECT_LOCAL_STORAGE_PATH.value()
    before = set(storage.glob("*"))
    found = audit_flow("models:/good/1", models.data, tracking_uri=models.uri)
    kept = []
    for file in set(storage.glob("*")) - before:
        text = file.read_text()
        assert "__class__" not in text  # how Prefect's JSON marks a type that is not JSON's
        stored = json.loads(text)
        wrapped = set(stored) == {"metadata", "result"}
        kept.append(json.loads(stored["result"]) if wrapped else stored)
    assert len(kept) == 4  # three tasks and the flow
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found in kept
    assert found["run_id"] in kept


def test_bad_input_fails_the_flow_with_its_own_error(audit_flow, models, server, tmp_path):
    y = models.y.copy()
    y[0] = 9
    np.savez(tmp_path / "far.npz", x=models.x, y=y)
    before = content(models)
    for uri, train, ran in (
        ("models:/good/9", models.data, ["load"]),
        ("models:/good/1", str(tmp_path / "far.npz"), ["load", "estimate"]),
    ):
        with pytest.raises(InputError, match="expected"):
            audit_flow(uri, train, tracking_uri=models.uri)
        run, tasks = newest(server, tasks=len(ran))
        assert run.state.is_failed()
        assert "expected" in run.state.message
        assert [name for name, state in tasks.items() if state.is_failed()] == ran[-1:]
    with pytest.raises(InputError, match="greater than 0"):
        audit_flow("models:/good/1", models.data, deadline=-1, tracking_uri=models.uri)
    assert content(models) == before


def test_past_its_deadline_the_version_says_error(audit_flow, models, client, server):
    data = endless_data("never_come")
    with pytest.raises(DeadlineError):
        audit_flow("models:/good/2", data, deadline=2, tracking_uri=models.uri)
    assert newest(server, tasks=2)[0].state.is_failed()
    tags = client.get_model_version("good", "2").tags
    assert tags["flataudit.verdict"] == "error"


def test_runs_against_a_server_by_its_url_alone(models, client, server, tmp_path):
    """Another process, which knows nothing of this one but PREFECT_API_URL."""
    code = (
        "import json, sys\n"
        "from flows.audit import audit_flow\n"
        "def tell(flow, run, state):\n"
        "    print(run.name)\n"
        "flow = audit_flow.with_options(on_completion=[tell])\n"
        "found = flow(sys.argv[1], sys.argv[2])\n"
        "print(json.dumps(found['report'], allow_nan=False))\n"
    )
    env = environment(
        PREFECT_API_URL=server, PREFECT_HOME=str(tmp_path / "home"),
        PREFECT_LOGGING_LEVEL="ERROR", MLFLOW_TRACKING_URI=models.uri,
    )  # fmt: skip
    command = [sys.executable, "-c", code, "models:/good/1", models.data]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["model"]["uri"] == "models:/good/1"
    run, _ = newest(server, tasks=3)
    assert run.name == done.stdout.splitlines()[0]
    assert run.state.is_completed()
    assert run.parameters["model_uri"] == "models:/good/1"
    assert list(Path.cwd().iterdir()) == []


def test_mlflow_run_audits_too(models, client, tmp_path):
    """`mlflow run . -e main`: the project's run is MLflow's own, the audit's is another."""
    bin_ = str(Path(sys.executable).parent)
    env = environment(
        PATH=os.pathsep.join([bin_, os.environ["PATH"]]), MLFLOW_TRACKING_URI=models.uri
    )
    command = [
        str(Path(bin_) / "mlflow"), "run", str(ROOT), "-e", "main", "--env-manager=local",
        "-P", "model_uri=models:/good/1", "-P", f"train={models.data}",
        "-P", f"json={tmp_path / 'report.json'}",
    ]  # fmt: skip
    done = subprocess.run(
        command, env=env, cwd=Path.cwd(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["model"]["uri"] == "models:/good/1"
    projects = [
        run
        for run in client.search_runs(["0"])
        if run.data.tags.get("mlflow.project.entryPoint") == "main"
    ]
    (project,) = projects
    assert project.info.status == "FINISHED"
    assert project.data.metrics == {}
    assert [key for key in project.data.tags if "flataudit" in key] == []
    assert client.list_artifacts(project.info.run_id) == []
    tags = client.get_model_version("good", "1").tags
    audit = client.get_run(tags["flataudit.run_id"])
    assert audit.info.run_id != project.info.run_id
    assert audit.info.status == "FINISHED"
    assert "flataudit/gap" in audit.data.metrics
    assert list(Path.cwd().iterdir()) == []
    values = AuditOptions(tracking_uri=models.uri).model_dump()
    loaded = stages.load("models:/good/1", models.data, None, values)
    assert untimed(stages.estimate(loaded, values)["report"]) == untimed(report)


def test_the_lines_of_the_stages_reach_prefect(server, models):
    """Each among the logs of its task, whatever Prefect's own level is."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import LogFilter

    from flows.audit import audit_flow

    state = audit_flow("models:/good/1", models.data, tracking_uri=models.uri, return_state=True)
    assert state.is_completed()
    run_id = state.state_details.flow_run_id
    with SyncPrefectClient(server) as api:
        for _ in range(60):  # they are sent in batches
            found = api.read_logs(LogFilter(flow_run_id={"any_": [run_id]}))
            lines = {log.message: log for log in found if log.name == "flataudit.stages"}
            if len(lines) >= 6:
                break
            time.sleep(0.5)
    starts = [f"{stage} {event} models:/good/1" for stage in ("load", "estimate", "log")
              for event in ("start", "end")]  # fmt: skip
    for start in starts:
        (line,) = [log for text, log in lines.items() if text.startswith(start)]
        assert line.task_run_id is not None
    assert any(state.result()["run_id"] in text for text in lines)
