"""Real MLflow servers on free loopback ports, with sqlite and with PostgreSQL behind them.

PostgreSQL is Debian's (`apt-get install postgresql`): a cluster of its own in a temporary folder,
which runs as another user where the tests run as root, since it refuses root. Every process is
ended by the id it was started with.
"""

from __future__ import annotations

import base64
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common.servers import answers, free_port
from tests.shells import environment

START = 180  # seconds; a busy machine needs most of a minute to make MLflow's tables
BACKENDS = ("sqlite", "postgresql")


def program(name: str) -> str | None:
    """A program of PostgreSQL, which Debian keeps off the path, one folder per version."""
    found = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    newest = max(found, key=lambda path: int(path.parts[4].split(".")[0]), default=None)
    return shutil.which(name) if newest is None else str(newest)


def missing_postgresql() -> str | None:
    """What keeps PostgreSQL from being started here; None where nothing does."""
    if program("postgres") is None or program("initdb") is None:
        return "needs PostgreSQL (apt-get install postgresql)"
    if find_spec("psycopg2") is None:
        return "needs psycopg2 (pip install psycopg2-binary)"
    return None


@contextmanager
def postgresql() -> Iterator[str]:
    """A new, empty database; its URI."""
    postgres, initdb = program("postgres"), program("initdb")
    assert postgres
    assert initdb
    folder = Path(tempfile.mkdtemp(prefix="flataudit-postgresql-"))
    data, port = folder / "data", free_port()
    user = _other_user()
    if user:
        shutil.chown(folder, user["user"], user["group"])
    try:
        options = ["--auth=trust", "--username=flataudit", "--encoding=UTF8", "--locale=C"]
        made = subprocess.run(
            [initdb, "-D", str(data), "--no-sync", *options],
            capture_output=True, text=True, cwd=folder, **user,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        settings = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
        with _process(
            [postgres, "-D", str(data), "-p", str(port), "-k", str(folder), *settings],
            log=folder / "log",
            end=signal.SIGINT,  # "fast": closes the connections that are left
            cwd=folder,
            **user,
        ) as process:
            _wait(process, lambda: _listens(port), folder / "log")
            yield f"postgresql://flataudit@127.0.0.1:{port}/postgres"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def mlflow_server(database: str, folder: Path) -> Iterator[str]:
    """An MLflow server on `database` that serves the artifacts in `folder`; its URL."""
    port = free_port()
    with mlflow_process(database, folder, port):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def mlflow_process(database: str, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The same by its process, which may be killed and be started again on that port."""
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", database,
        "--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    env = environment(
        MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false",
        MLFLOW_DISABLE_TELEMETRY="true",
        # Webhooks to loopback, known at once, and a key for their secrets in the database.
        MLFLOW_WEBHOOK_CACHE_TTL="0",
        MLFLOW_WEBHOOK_ALLOWED_SCHEMES="http,https",
        MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS="true",
        MLFLOW_WEBHOOK_SECRET_ENCRYPTION_KEY=base64.urlsafe_b64encode(os.urandom(32)).decode(),
    )
    log = folder / "server.log"
    with _process(command, log=log, cwd=folder, env=env) as process:
        _wait(process, lambda: answers(f"{url}/health"), log)
        yield process


@contextmanager
def prefect_process(home: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A Prefect server with its database in `home`; its API is at /api on that port."""
    command = [
        sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1",
        "--port", str(port), "--no-ui",
    ]  # fmt: skip
    env = environment(PREFECT_HOME=str(home), PREFECT_SERVER_ANALYTICS_ENABLED="false")
    log = home / "server.log"
    with _process(command, log=log, cwd=home, env=env) as process:
        _wait(process, lambda: answers(f"http://127.0.0.1:{port}/api/health"), log)
        yield process


def kill(process: subprocess.Popen[bytes]) -> None:
    """kill -9 of a server and of its own children, which would keep its port."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def backend(name: str, folder: Path) -> Iterator[str]:
    """A new database of that kind; its URI. Skips the test where it cannot be had."""
    if name == "sqlite":
        yield f"sqlite:///{folder / 'mlflow.db'}"
        return
    missing = missing_postgresql()
    if missing:
        pytest.skip(missing)
    with postgresql() as database:
        yield database


@contextmanager
def _server(name: str, factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = factory.mktemp(name)
    with backend(name, folder) as database, mlflow_server(database, folder) as url:
        yield url


@pytest.fixture(scope="session")
def sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one MLflow server for all tests, on sqlite."""
    with _server("sqlite", tmp_path_factory) as url:
        yield url


@pytest.fixture(scope="session")
def postgresql_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of one MLflow server for all tests, on PostgreSQL."""
    with _server("postgresql", tmp_path_factory) as url:
        yield url


# MLflow's servers that tests run against: on PostgreSQL, as people have it; on sqlite slowly, as a
# cross-check, and in its place where there is none.
SERVED = [
    "postgresql",
    pytest.param("sqlite", marks=() if missing_postgresql() else pytest.mark.slow),
]


@pytest.fixture(params=SERVED)
def mlflow_url(request: pytest.FixtureRequest) -> str:
    """The URL of a server; the test runs once with each kind of database."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@contextmanager
def _process(
    command: list[str], *, log: Path, end: signal.Signals = signal.SIGTERM, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a group of its own, ended with its children."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, **options,
        )  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(end)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what is left of its own group
            process.wait()


def _wait(process: subprocess.Popen[bytes], ready: Any, log: Path) -> None:
    until = time.monotonic() + START
    while not ready():
        ended = process.poll() is not None
        if ended or time.monotonic() > until:
            text = log.read_text(errors="replace")[-3000:]
            pytest.fail(f"{process.args} {'ended' if ended else 'did not start'}:\n{text}")
        time.sleep(0.1)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _other_user() -> Mapping[str, Any]:
    """For subprocess, where this is root: the user that Debian's package made, else nobody."""
    if os.geteuid() != 0:
        return {}
    import pwd

    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = known.get("postgres") or known["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
