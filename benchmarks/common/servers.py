"""Servers and workers as processes of their own, on free loopback ports, ended by their own ids."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

PATIENCE = 180.0  # seconds; a busy machine needs most of a minute to make MLflow's tables


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Process:
    """A command in a process group of its own; it can be killed and started again."""

    def __init__(
        self, command: list[str], log: Path, env: Mapping[str, str], ready: str | None = None
    ) -> None:
        self.command, self.log, self.env, self.ready = command, log, dict(env), ready
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True, env=self.env, cwd=self.log.parent,
            )  # fmt: skip
        until = time.monotonic() + PATIENCE
        while self.ready is not None and not answers(self.ready):
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{self.command} did not start: {self.tail()}")
            time.sleep(0.1)

    def running(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        """kill -9 of the process and its group."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        self.kill()

    def tail(self, length: int = 2000) -> str:
        return self.log.read_text(errors="replace")[-length:]


def mlflow_server(folder: Path, env: Mapping[str, str]) -> tuple[str, Process]:
    """On `folder`/mlflow.db, with the artifacts in `folder`/artifacts, served by itself."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri",
        f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "artifacts"),
        "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    own = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return url, Process(command, folder / "mlflow.log", {**env, **own}, f"{url}/health")


def prefect_server(folder: Path, env: Mapping[str, str]) -> tuple[str, Process]:
    """With its database in `folder`."""
    port = free_port()
    command = [
        sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port",
        str(port), "--no-ui",
    ]  # fmt: skip
    api = f"http://127.0.0.1:{port}/api"
    own = {"PREFECT_HOME": str(folder), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    return api, Process(command, folder / "prefect.log", {**env, **own}, f"{api}/health")


def dask_cluster(folder: Path, env: Mapping[str, str], workers: int) -> tuple[str, list[Process]]:
    """The address of a scheduler, and it and its workers, one thread each."""
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    python = [sys.executable, "-m"]
    scheduler = Process(
        [*python, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port),
         "--no-dashboard"],
        folder / "scheduler.log", env,
    )  # fmt: skip
    command = [
        *python, "distributed.cli.dask_worker", address, "--nthreads", "1", "--no-dashboard",
        "--local-directory", str(folder),
    ]  # fmt: skip
    # `--nanny` is the default: a worker that dies is started again, as systemd or Kubernetes would.
    found = [Process(command, folder / f"worker-{i}.log", env) for i in range(workers)]
    return address, [scheduler, *found]


def answers(url: str) -> bool:
    """Whether the address is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
