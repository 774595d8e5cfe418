"""The sweep on a real Prefect server: the healthy audited, the failed named, nothing twice."""

import json
import subprocess
import sys

import pytest
from mlflow import MlflowClient

from flataudit import cli, stages, tracking
from flataudit.errors import AuditFailedError, InputError, StoreError
from tests.prefect_api import newest_run
from tests.shells import endless_data, environment
from tests.sweep_store import HEALTHY, PLANTED, make_fleet, table

ALL = sorted([*HEALTHY, *PLANTED])


@pytest.fixture
def fleet(monkeypatch):
    fleet = make_fleet()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fleet.uri)
    return fleet


@pytest.fixture
def client(fleet):
    return MlflowClient(fleet.uri)


@pytest.fixture
def sweep(server, monkeypatch):
    """Runs the sweep and gives its final state and result, without a delay before retries."""
    from flows import sweep

    monkeypatch.setattr(sweep, "RETRY_DELAY", 0.01)

    def run(pipeline):
        state = sweep.sweep_flow(pipeline, return_state=True)
        return state, state.result()

    return run


def by_model(result):
    assert [row["model"] for row in result["rows"]] == sorted(
        row["model"] for row in result["rows"]
    )
    return {row["model"]: row for row in result["rows"]}


def audits(client, **tags):
    """The finished audit runs in the store, those of sweeps left out."""
    experiment = client.get_experiment_by_name("flataudit")
    if experiment is None:
        return []
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
    return [run for run in runs if "flataudit.model_uri" in run.data.tags]


def task_runs(server, name, tasks):
    """Final states of the newest sweep's tasks of one name, once there are so many."""

    def states(found):
        return sorted(task.state.name for task in found
                      if task.name.startswith(name) and task.state.is_final())  # fmt: skip

    run, found = newest_run(server, "flataudit-sweep", lambda found: len(states(found)) >= tasks)
    return run, states(found)


def test_failures_are_named_and_stop_nobody(sweep, fleet, client, server):
    state, result = sweep(fleet.pipeline(tags=["night"]))
    assert state.is_completed()
    assert (state.name, state.message) == ("AuditsFailed", "3 audited, 0 skipped, 3 failed")
    rows = by_model(result)
    assert sorted(rows) == ALL
    for uri in HEALTHY:
        row = rows[uri]
        assert (row["state"], row["error"]) == ("audited", None)
        assert row["verdict"] in ("pass", "warn", "fail")
        assert row["low"] < row["gap"] < row["high"]
        version = client.get_model_version(*uri.removeprefix("models:/").split("/"))
        assert version.tags["flataudit.run_id"] == row["run_id"]
    for uri, told in (("missing", "train.npz"), ("nan", "NaN"), ("pickle", "loads from")):
        row = rows[f"models:/fleet-{uri}/1"]
        assert row["state"] == "failed"
        assert told in row["error"]
        assert row["error"].startswith("expected")
        assert client.get_model_version(f"fleet-{uri}", "1").tags == {}  # bad input: nothing logged
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    # MLflow: the sweep's run with the table, the audits below it.
    run = client.get_run(result["run_id"])
    assert run.info.status == "FAILED"
    assert run.data.metrics["flataudit/failed"] == 3
    assert table(client, result["run_id"]) == result["rows"]
    children = {r.info.run_id: r for r in audits(client)}
    assert set(children) == {rows[uri]["run_id"] for uri in HEALTHY}
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == result["run_id"]
        assert child.data.tags["flataudit.pipeline"] == "fleet"
        assert len(child.data.tags["flataudit.audit_key"]) == 64
    # Prefect: the table, and a failed task for each failure.
    from prefect.client.orchestration import SyncPrefectClient

    with SyncPrefectClient(server) as api:
        (artifact,) = (a for a in api.read_artifacts() if a.key == "sweep-fleet")
    assert artifact.type == "table"
    assert json.loads(artifact.data) == result["rows"]
    assert "3 failed" in artifact.description
    flow_run, states = task_runs(server, "audit", 6)
    assert states == ["Completed"] * 3 + ["Failed"] * 3
    assert flow_run.name == "sweep fleet"


def test_nothing_is_audited_twice(sweep, fleet, client):
    healthy = fleet.pipeline(model={"name": "fleet-[ab]", "select": "all"})
    _, first = sweep(healthy)
    before = {run.info.run_id for run in audits(client)}
    state, again = sweep(healthy)
    assert state.name == "Completed"
    assert again["counts"] == {"audited": 0, "skipped": 3, "failed": 0}
    assert {run.info.run_id for run in audits(client)} == before
    for one, other in zip(first["rows"], again["rows"], strict=True):
        assert other == one | {"state": "skipped"}
    # Another option is another audit.
    _, other = sweep(healthy | {"options": {"seed": 1}})
    assert other["counts"]["audited"] == 3
    # What `unaudited` leaves are those without a verdict.
    _, rest = sweep(fleet.pipeline(model={"name": "fleet-*", "select": "unaudited"}))
    assert sorted(by_model(rest)) == sorted(PLANTED)


def test_a_kept_estimate_is_taken_over(sweep, fleet, client, server, monkeypatch):
    """Logging fails; the next sweep takes the estimate from Prefect (Cached) and logs it."""
    from flows import sweep as module

    monkeypatch.setattr(stages, "log", stages.log)
    real = tracking.log_audit

    def fails(*args, **kwargs):
        raise StoreError("could not log: disk full")

    one = fleet.pipeline(model={"name": "fleet-a", "select": "version", "version": 1},
                         options={"seed": 7})  # fmt: skip
    monkeypatch.setattr(tracking, "log_audit", fails)
    _, result = sweep(one)
    assert result["rows"][0]["error"] == "could not log: disk full"
    assert client.get_model_version("fleet-a", "1").tags == {}
    assert task_runs(server, "estimate", 1)[1] == ["Completed"]
    monkeypatch.setattr(tracking, "log_audit", real)
    _, result = sweep(one)
    assert result["rows"][0]["state"] == "audited"
    assert task_runs(server, "estimate", 1)[1] == ["Cached"]
    first = client.get_run(result["rows"][0]["run_id"])
    # The other version has the same weights: its estimate is the same, its verdict its own.
    _, result = sweep(one | {"model": {"name": "fleet-a", "select": "version", "version": 2}})
    assert result["rows"][0]["state"] == "audited"
    assert task_runs(server, "estimate", 1)[1] == ["Cached"]
    second = client.get_run(result["rows"][0]["run_id"])
    assert second.data.tags["flataudit.model_uri"] == "models:/fleet-a/2"
    metrics = [run.data.metrics for run in (first, second)]
    for own in metrics:
        assert own.pop("flataudit/load_seconds") > 0  # of its own; the rest is the estimate's
    assert metrics[0] == metrics[1]
    path = client.download_artifacts(second.info.run_id, "flataudit/report.json")
    with open(path) as file:
        assert json.load(file)["model"]["version"] == "2"
    assert module.FAILED == "AuditsFailed"


def test_retries_are_for_what_may_pass(sweep, fleet, client, monkeypatch):
    """A failing estimate is tried again, and on record once; bad input is not tried again."""
    calls = []
    real = stages.estimate

    def flaky(loaded, options, progress=None):
        calls.append(loaded["source"]["uri"])
        if loaded["source"]["name"] == "fleet-b" and calls.count("models:/fleet-b/1") < 3:
            raise AuditFailedError("expected luck, got none")
        if loaded["source"]["name"] == "fleet-pickle":
            raise InputError("expected a model, got none")
        if loaded["source"]["name"] == "fleet-nan":
            raise AuditFailedError("expected luck, got none ever")
        return real(loaded, options, progress)

    monkeypatch.setattr(stages, "estimate", flaky)
    _, result = sweep(fleet.pipeline(retries=2, options={"seed": 8}))
    rows = by_model(result)
    assert rows["models:/fleet-b/1"]["state"] == "audited"
    assert calls.count("models:/fleet-b/1") == 3
    assert calls.count("models:/fleet-pickle/1") == 1
    assert calls.count("models:/fleet-nan/1") == 3
    assert client.get_model_version("fleet-nan", "1").tags["flataudit.verdict"] == "error"
    experiment = client.get_experiment_by_name("flataudit").experiment_id
    failed = client.search_runs([experiment], "attributes.status = 'FAILED'")
    assert [r.data.tags.get("flataudit.model_uri") for r in failed if
            "flataudit.model_uri" in r.data.tags] == ["models:/fleet-nan/1"]  # fmt: skip


def test_past_its_deadline_one_fails_alone(sweep, fleet, client, monkeypatch):
    real = stages.estimate
    endless = endless_data("sweep_never_comes")

    def slow(loaded, options, progress=None):
        assert options["deadline"] == 100.0
        if loaded["source"]["uri"] != "models:/fleet-a/1":
            return real(loaded, options | {"deadline": None}, progress)
        return real(loaded | {"train": endless}, options | {"deadline": 2}, progress)

    monkeypatch.setattr(stages, "estimate", slow)
    healthy = fleet.pipeline(model={"name": "fleet-[ab]", "select": "latest"}, deadline=100)
    _, result = sweep(healthy)
    assert result["counts"] == {"audited": 2, "skipped": 0, "failed": 0}
    _, result = sweep(healthy | {"model": {"name": "fleet-a", "select": "version", "version": 1},
                                 "options": {"seed": 9}})  # fmt: skip
    assert "to end within 2 s" in result["rows"][0]["error"]
    assert client.get_model_version("fleet-a", "1").tags["flataudit.verdict"] == "error"


def test_a_pipeline_by_its_file(sweep, fleet, tmp_path):
    path = tmp_path / "one.yaml"
    path.write_text("name: one\nmodel: {name: fleet-b, select: latest}\ndata: {train: mlflow}\n")
    _, result = sweep(str(path))
    assert (result["pipeline"], result["counts"]["audited"]) == ("one", 1)


def test_bad_input_ends_the_sweep_before_it_begins(sweep, fleet, client):
    from flows.sweep import sweep_flow

    for pipeline, told in (
        ("nowhere.yaml", "expected a pipeline file at nowhere.yaml"),
        (fleet.pipeline(name="A b"), "the flow's parameter pipeline: name: expected lower-case"),
        (fleet.pipeline(model={"name": "none", "select": "all"}), "got 'none'"),
    ):
        with pytest.raises(InputError, match=told):
            sweep_flow(pipeline)
    assert client.get_experiment_by_name("flataudit") is None


def test_no_version_left_is_a_finished_sweep(sweep, fleet, client, monkeypatch):
    from flataudit import sweeps

    monkeypatch.setattr(sweeps, "select_versions", lambda models: [])
    state, result = sweep(fleet.pipeline())
    assert (state.name, result["rows"]) == ("Completed", [])
    assert client.get_run(result["run_id"]).info.status == "FINISHED"


# --- the command line ---------------------------------------------------------------------------


def flataudit(server, fleet, tmp_path, *words, **more):
    env = environment(
        PREFECT_API_URL=server, PREFECT_HOME=str(tmp_path / "home"),
        MLFLOW_TRACKING_URI=fleet.uri, **more,
    )  # fmt: skip
    command = [sys.executable, "-m", "flataudit", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


def write(tmp_path, fleet, **more):
    path = tmp_path / "fleet.yaml"
    path.write_text(json.dumps(fleet.pipeline(**more)))  # JSON is YAML
    return path


def test_by_the_command_line(sweep, fleet, client, tmp_path, monkeypatch, capfd):
    """In this process, against the server of the tests: table, JSON and exit codes."""
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def run(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["flataudit", "run", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capfd.readouterr().out

    path = write(tmp_path, fleet)
    code, out = run(path, "--json", tmp_path / "out.json")
    assert code == 3
    assert "fleet: 3 audited, 3 failed" in out
    (result,) = json.loads((tmp_path / "out.json").read_text())
    assert sorted(row["model"] for row in result["rows"]) == ALL
    assert len(audits(client)) == 3
    for uri in PLANTED:
        assert f"\n{uri}: expected" in out
    assert f"run {result['run_id']} in experiment flataudit" in out
    path = write(tmp_path, fleet, model={"name": "fleet-[ab]", "select": "all"})
    code, out = run(path, "--json", "-")
    assert code == 0
    assert json.loads(out)[0]["counts"] == {"audited": 0, "skipped": 3, "failed": 0}


# --- processes and Dask -------------------------------------------------------------------------


def check_by_setting(server, fleet, client, tmp_path, **settings):
    """The same sweep in another process, where nothing but the settings differ."""
    path = write(tmp_path, fleet)
    done = flataudit(server, fleet, tmp_path, "run", path, "--json", "-", **settings)
    assert done.returncode == 3, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["counts"] == {"audited": 3, "skipped": 0, "failed": 3}
    assert len(audits(client)) == 3
    rows = by_model(result)
    for uri, told in (("missing", "train.npz"), ("nan", "NaN"), ("pickle", "loads from")):
        assert told in rows[f"models:/fleet-{uri}/1"]["error"]


@pytest.mark.slow
def test_processes_by_setting(server, fleet, client, tmp_path):
    check_by_setting(
        server, fleet, client, tmp_path, FLATAUDIT_TASK_RUNNER="processes", FLATAUDIT_WORKERS="2"
    )


@pytest.mark.slow
def test_dask_by_address(server, fleet, client, tmp_path):
    """A scheduler and two workers as processes of their own, which know the two URLs alone."""
    pytest.importorskip("prefect_dask", reason="prefect-dask is not installed")
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{s.getsockname()[1]}"
    env = environment(
        PREFECT_API_URL=server, PREFECT_HOME=str(tmp_path / "workers"),
        MLFLOW_TRACKING_URI=fleet.uri,
    )  # fmt: skip
    python = [sys.executable, "-m", "distributed.cli"]
    commands = [
        [*python[:2], "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port",
         address.rpartition(":")[2], "--no-dashboard"],
        *([[*python[:2], "distributed.cli.dask_worker", address, "--nthreads", "1",
            "--no-dashboard", "--local-directory", str(tmp_path)]] * 2),
    ]  # fmt: skip
    children = [
        subprocess.Popen(c, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for c in commands
    ]
    try:
        check_by_setting(
            server, fleet, client, tmp_path, FLATAUDIT_TASK_RUNNER="dask",
            FLATAUDIT_DASK_ADDRESS=address,
        )  # fmt: skip
        assert all(child.poll() is None for child in children)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait(30)


def test_settings_are_checked(monkeypatch):
    from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

    from flows.runners import task_runner

    for name in ("FLATAUDIT_TASK_RUNNER", "FLATAUDIT_WORKERS", "FLATAUDIT_DASK_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    assert isinstance(task_runner(), ThreadPoolTaskRunner)
    monkeypatch.setenv("FLATAUDIT_WORKERS", "many")
    with pytest.raises(InputError, match="FLATAUDIT_WORKERS to be a number of audits"):
        task_runner()
    monkeypatch.setenv("FLATAUDIT_WORKERS", "3")
    monkeypatch.setenv("FLATAUDIT_TASK_RUNNER", "processes")
    assert isinstance(task_runner(), ProcessPoolTaskRunner)
    monkeypatch.setenv("FLATAUDIT_TASK_RUNNER", "ray")
    with pytest.raises(InputError, match="'ray'; choose one of: threads, processes, dask"):
        task_runner()
    monkeypatch.setenv("FLATAUDIT_TASK_RUNNER", "dask")
    monkeypatch.setitem(sys.modules, "prefect_dask", None)
    with pytest.raises(InputError, match=r"pip install 'flataudit\[dask\]'"):
        task_runner()


@pytest.mark.slow
def test_no_stage_is_said_unasked(server, fleet, tmp_path):
    """The table says what came of it; the lines are at the Prefect server, or where asked for."""
    one = {"name": "fleet-a", "select": "version", "version": 1}
    path = write(tmp_path, fleet, model=one, options={"seed": 10})
    done = flataudit(server, fleet, tmp_path, "run", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 audited" in done.stdout
    done = flataudit(server, fleet, tmp_path, "run", path, FLATAUDIT_LOG="text")
    assert "load end models:/fleet-a/1" in done.stderr
    assert "1 audited already" in done.stdout
