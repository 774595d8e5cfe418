"""Standing audits as deployments: prefect.yaml, serving, and a schedule that really fires."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml

from flataudit.errors import InputError
from flataudit.pipeline import read_folder
from tests.servers import BACKENDS, backend
from tests.shells import ROOT, environment
from tests.sweep_store import make_fleet

PREFECT = [sys.executable, "-m", "prefect"]


def test_prefect_yaml_is_made_from_the_pipelines(monkeypatch):
    """`python -m flows.deployments` where this fails."""
    from flows.deployments import prefect_yaml

    monkeypatch.chdir(ROOT)
    assert (ROOT / "prefect.yaml").read_text() == prefect_yaml()


def test_every_pipeline_is_deployed_with_its_schedule(monkeypatch):
    monkeypatch.chdir(ROOT)
    pipelines = read_folder(Path("pipelines"))
    found = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    assert [item["parameters"]["pipeline"] for item in found] == [str(path) for path in pipelines]
    for item, pipeline in zip(found, pipelines.values(), strict=True):
        assert item["name"] == pipeline.name
        assert item["tags"] == ["flataudit", *pipeline.tags]
        assert (ROOT / item["entrypoint"].partition(":")[0]).is_file()
        given = [(s["cron"], s["timezone"]) for s in item["schedules"]]
        wanted = pipeline.schedule
        assert given == ([] if wanted is None else [(wanted.cron, wanted.timezone)])


def test_serving_needs_a_server(monkeypatch):
    import flows  # noqa: F401
    from flows.deployments import serve_all

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(InputError, match="run `prefect server start`"),
    ):
        serve_all(read_folder(ROOT / "pipelines"))


# --- a real server, and a minute's wait ---------------------------------------------------------


@pytest.fixture(params=BACKENDS)
def real(request, tmp_path):
    """A Prefect server as a process of its own, with each kind of database; the environment that
    finds it, and a fleet."""
    (tmp_path / "database").mkdir()
    with backend(request.param, tmp_path / "database") as uri:
        scheme, _, place = uri.partition("://")
        driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}[scheme]
        with real_server(f"{driver}://{place}", tmp_path) as found:
            yield found


@contextlib.contextmanager
def real_server(database, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fleet = make_fleet()
    env = environment(
        PREFECT_API_URL=f"http://127.0.0.1:{port}/api", PREFECT_HOME=str(tmp_path / "prefect"),
        MLFLOW_TRACKING_URI=fleet.uri, PREFECT_SERVER_ANALYTICS_ENABLED="false",
        PREFECT_RUNNER_HEARTBEAT_FREQUENCY="30", PREFECT_API_DATABASE_CONNECTION_URL=database,
    )  # fmt: skip
    with running([*PREFECT, "server", "start", "--port", str(port), "--host", "127.0.0.1"], env,
                 tmp_path / "server.log"):  # fmt: skip
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"), 120)
        yield env, fleet


@contextlib.contextmanager
def running(command, env, log, cwd=None):
    with log.open("w") as file:
        child = subprocess.Popen(command, env=env, cwd=cwd, stdout=file, stderr=file)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(30)


def answers(url):
    try:
        return urllib.request.urlopen(url, timeout=5).status == 200
    except OSError:
        return False


def wait_for(found, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(1)
    raise AssertionError("nothing within the time")


def finished(env):
    """The finished flow runs on the server that a schedule created."""
    body = {"flow_runs": {"state": {"type": {"any_": ["COMPLETED", "FAILED", "CRASHED"]}}}}
    request = urllib.request.Request(
        f"{env['PREFECT_API_URL']}/flow_runs/filter", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    runs = json.loads(urllib.request.urlopen(request, timeout=10).read())
    return [run for run in runs if run["auto_scheduled"]]


def project(folder, fleet):
    """A project of its own, with a standing audit for every minute."""
    folder.mkdir()
    for name in ("flows", "flataudit"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "pipelines").mkdir()
    (folder / "pipelines" / "minutely.yaml").write_text(
        json.dumps(
            fleet.pipeline(
                name="minutely",
                model={"name": "fleet-[ab]", "select": "unaudited"},
                schedule={"cron": "* * * * *", "timezone": "Europe/Berlin"},
            )
        )
    )
    return folder


def check(env, fleet, child, log):
    """The first finished run is a sweep of all healthy versions, started by the schedule."""
    from mlflow import MlflowClient

    runs = wait_for(lambda: child.poll() is not None or finished(env), 300)
    assert child.poll() is None, log.read_text()
    assert [run["state_name"] for run in runs][-1] == "Completed", runs
    assert runs[-1]["created_by"]["type"] == "SCHEDULE"
    client = MlflowClient(fleet.uri)
    for name, version in (("fleet-a", "1"), ("fleet-a", "2"), ("fleet-b", "1")):
        assert client.get_model_version(name, version).tags["flataudit.verdict"] != "error"


@pytest.mark.slow
def test_a_worker_picks_up_a_cron_run(real, tmp_path):
    env, fleet = real
    folder = project(tmp_path / "project", fleet)
    env = env | {"PYTHONPATH": str(folder)}

    def done(*command):
        ran = subprocess.run(
            command, env=env, cwd=folder, capture_output=True, text=True, timeout=300
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    done(sys.executable, "-m", "flows.deployments")
    done(*PREFECT, "work-pool", "create", "--type", "process", "flataudit")
    done(*PREFECT, "deploy", "--all", "--no-prompt")
    worker = [*PREFECT, "worker", "start", "--pool", "flataudit"]
    log = tmp_path / "worker.log"
    with running(worker, env, log, folder) as child:
        check(env, fleet, child, log)


@pytest.mark.slow
def test_serve_does_the_same_in_one_process(real, tmp_path):
    env, fleet = real
    folder = project(tmp_path / "project", fleet)
    env = env | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "flataudit", "serve", "pipelines"]
    log = tmp_path / "serve.log"
    with running(command, env, log, folder) as child:
        check(env, fleet, child, log)
