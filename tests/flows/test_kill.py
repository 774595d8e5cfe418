"""kill -9 in mid-sweep, of real processes: after a restart all is audited, and logged once."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from mlflow import MlflowClient

from benchmarks.common.servers import dask_cluster
from flataudit.processes import descendants
from tests.servers import free_port, kill, mlflow_process, prefect_process
from tests.shells import environment
from tests.sweep_store import HEALTHY, make_fleet

pytestmark = pytest.mark.slow
PATIENCE = 240  # seconds


@pytest.fixture
def fleet():
    return make_fleet()


@contextmanager
def running(fleet, tmp_path, api, uri=None, **settings):
    """`flataudit run` of the healthy models, as a process."""
    path = tmp_path / "fleet.yaml"
    path.write_text(json.dumps(fleet.pipeline(model={"name": "fleet-[ab]", "select": "all"})))
    env = environment(
        PREFECT_API_URL=api, PREFECT_HOME=str(tmp_path / "home"),
        MLFLOW_TRACKING_URI=uri or fleet.uri, **settings,
    )  # fmt: skip
    command = [sys.executable, "-m", "flataudit", "run", str(path), "--json", "-"]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ended(process):
    """Its one result, once it has ended well."""
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, (out, err)
    (result,) = json.loads(out)
    return result


def runs(fleet):
    """All runs of the experiment, straight from the database."""
    client = MlflowClient(fleet.uri)
    where = client.get_experiment_by_name("flataudit")
    return [] if where is None else list(client.search_runs([where.experiment_id]))


def audits(fleet):
    return [run for run in runs(fleet) if "flataudit.model_uri" in run.data.tags]


def wait_for(found, fleet, process):
    """Until `found(fleet)` is true, while the process still runs."""
    until = time.monotonic() + PATIENCE
    while not found(fleet):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def check_once(fleet):
    """One run for each healthy version, finished, with each metric once; its verdict is theirs."""
    client = MlflowClient(fleet.uri)
    found = audits(fleet)
    assert sorted(run.data.tags["flataudit.model_uri"] for run in found) == HEALTHY
    for run in found:
        assert run.info.status == "FINISHED"
        for key in run.data.metrics:
            assert len(client.get_metric_history(run.info.run_id, key)) == 1
        uri = run.data.tags["flataudit.model_uri"]
        version = client.get_model_version(*uri.removeprefix("models:/").split("/"))
        assert version.tags["flataudit.run_id"] == run.info.run_id
        assert version.tags["flataudit.verdict"] == run.data.tags["flataudit.verdict"]
        names = {file.path for file in client.list_artifacts(run.info.run_id, "flataudit")}
        assert "flataudit/report.html" in names


@pytest.mark.parametrize("moment", [runs, audits], ids=["begun", "logging"])
def test_of_the_flow(server, fleet, tmp_path, moment):
    with running(fleet, tmp_path, server) as process:
        wait_for(moment, fleet, process)
        os.kill(process.pid, signal.SIGKILL)
    before = {run.info.run_id for run in audits(fleet)}
    with running(fleet, tmp_path, server) as process:
        counts = ended(process)["counts"]
    assert counts["failed"] == 0
    assert counts["audited"] + counts["skipped"] == 3
    check_once(fleet)
    assert before <= {run.info.run_id for run in audits(fleet)}  # what was begun is completed
    with running(fleet, tmp_path, server) as process:
        assert ended(process)["counts"] == {"audited": 0, "skipped": 3, "failed": 0}


def sweeps_of(fleet):
    """The runs of sweeps by id: status, and the sweep that closed it."""
    return {
        run.info.run_id: (run.info.status, run.data.tags.get("flataudit.continued_by"))
        for run in runs(fleet)
        if "flataudit.model_uri" not in run.data.tags
    }


def pool_workers(pid):
    """Processes of a pool, or of a Dask worker below its nanny."""
    return [child for child in descendants(pid) if b"spawn_main" in command_of(child)]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # of a zombie too


def wait_until_gone(pids):
    until = time.monotonic() + PATIENCE
    while left := [pid for pid in pids if command_of(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.1)


PROCESSES = {"FLATAUDIT_TASK_RUNNER": "processes", "FLATAUDIT_WORKERS": "2"}


def test_of_the_flow_with_a_pool(server, fleet, tmp_path):
    """Its workers end with it; the next sweep closes the run that it left."""
    with running(fleet, tmp_path, server, **PROCESSES) as process:
        wait_for(audits, fleet, process)
        below = descendants(process.pid)
        assert pool_workers(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        wait_until_gone(below)
    (first,) = sweeps_of(fleet)
    with running(fleet, tmp_path, server, **PROCESSES) as process:
        result = ended(process)
    assert result["counts"]["failed"] == 0
    check_once(fleet)
    last = result["run_id"]
    assert sweeps_of(fleet) == {first: ("KILLED", last), last: ("FINISHED", None)}


def test_of_a_worker_of_the_pool(server, fleet, tmp_path):
    """It takes its pool along, and the sweep begins another: nothing fails."""
    with running(fleet, tmp_path, server, **PROCESSES) as process:
        wait_for(audits, fleet, process)
        killed = pool_workers(process.pid)[0]
        os.kill(killed, signal.SIGKILL)
        result = ended(process)
    assert result["counts"]["failed"] == 0
    assert result["counts"]["audited"] + result["counts"]["skipped"] == 3
    check_once(fleet)
    wait_until_gone([killed])


def test_of_a_dask_worker(server, fleet, tmp_path):
    """Its nanny starts another, and the scheduler gives its audit to one that lives."""
    pytest.importorskip("prefect_dask", reason="prefect-dask is not installed")
    env = environment(
        PREFECT_API_URL=server, PREFECT_HOME=str(tmp_path / "workers"),
        MLFLOW_TRACKING_URI=fleet.uri,
    )  # fmt: skip
    address, (scheduler, *workers) = dask_cluster(tmp_path, env, 2)
    dask = {"FLATAUDIT_TASK_RUNNER": "dask", "FLATAUDIT_DASK_ADDRESS": address}
    try:
        with running(fleet, tmp_path, server, **dask) as process:
            wait_for(audits, fleet, process)
            # The worker whose audit is being logged: it holds the forking server of the audits.
            busy = [w for of in workers for w in pool_workers(of.process.pid) if descendants(w)]
            os.kill(busy[0], signal.SIGKILL)
            result = ended(process)
        assert scheduler.running()
    finally:
        for child in (*workers, scheduler):
            child.end()
    assert result["counts"]["failed"] == 0  # killed after its verdict, an audit counts as skipped
    assert result["counts"]["audited"] + result["counts"]["skipped"] == 3
    check_once(fleet)


def test_of_the_mlflow_server(server, fleet, tmp_path):
    """Restarted on the same port, the sweep that was running goes on by itself."""
    port, folder = free_port(), tmp_path / "server"
    folder.mkdir()
    url = f"http://127.0.0.1:{port}"
    with (
        mlflow_process(fleet.uri, folder, port) as store,
        running(fleet, tmp_path, server, url) as process,
    ):
        wait_for(audits, fleet, process)
        kill(store)
        with mlflow_process(fleet.uri, folder, port):
            result = ended(process)
            assert result["counts"] == {"audited": 3, "skipped": 0, "failed": 0}
            client = MlflowClient(url)
            for row in result["rows"]:
                assert client.list_artifacts(row["run_id"], "flataudit")
    found = audits(fleet)
    assert sorted(run.data.tags["flataudit.model_uri"] for run in found) == HEALTHY
    assert {run.info.status for run in found} == {"FINISHED"}
    for run in found:
        for key in run.data.metrics:
            assert len(MlflowClient(fleet.uri).get_metric_history(run.info.run_id, key)) == 1


def test_of_the_prefect_server(fleet, tmp_path):
    """The sweep may end with an error; after a restart it is completed."""
    port, home = free_port(), tmp_path / "prefect"
    home.mkdir()
    api = f"http://127.0.0.1:{port}/api"
    with prefect_process(home, port) as prefect, running(fleet, tmp_path, api) as process:
        wait_for(audits, fleet, process)
        kill(prefect)
        with prefect_process(home, port):
            process.communicate(timeout=PATIENCE)
            with running(fleet, tmp_path, api) as again:
                counts = ended(again)["counts"]
    assert counts["failed"] == 0
    assert counts["audited"] + counts["skipped"] == 3
    check_once(fleet)
