"""Where a sweep's audits run: threads, processes or a Dask cluster, by environment variables alone.

FLATAUDIT_TASK_RUNNER: threads (default), processes or dask.
FLATAUDIT_WORKERS: audits at once; 1 by default, since each plans with all of the free memory.
FLATAUDIT_DASK_ADDRESS: of a running Dask scheduler; without it a cluster on this machine.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable
from typing import Any

from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from flataudit.errors import InputError

RUNNER, WORKERS, ADDRESS = (
    "FLATAUDIT_TASK_RUNNER",
    "FLATAUDIT_WORKERS",
    "FLATAUDIT_DASK_ADDRESS",
)


def ended(future: Any) -> Any:
    """What a task that has ended returned, or the exception with which it ended."""
    try:
        return future.result(raise_on_failure=False)
    except Exception as error:  # the worker itself is gone
        return error


def task_runner() -> Any:
    """The task runner that the environment names.

    Raises:
        InputError: an unknown name, a number of workers that is none, or no prefect-dask.
    """
    name = os.environ.get(RUNNER) or "threads"
    if name not in RUNNERS:
        raise InputError(f"unknown {RUNNER} {name!r}; choose one of: {', '.join(RUNNERS)}")
    return RUNNERS[name](_workers())


def _workers() -> int:
    text = os.environ.get(WORKERS) or "1"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"expected {WORKERS} to be a number of audits at once, got {text!r}")
    return int(text)


def _threads(workers: int) -> Any:
    return ThreadPoolTaskRunner(max_workers=workers)


def _processes(workers: int) -> Any:
    return ProcessPoolTaskRunner(max_workers=workers, initializer=end_with_the_parent)


def end_with_the_parent() -> None:
    """In a worker of a pool: it ends as soon as the sweep's process has.

    It would finish its audit, while the restarted sweep makes the same one, and then wait for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_wait_for, args=(parent.sentinel,), daemon=True).start()


def _wait_for(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _dask(workers: int) -> Any:
    try:
        runner = importlib.import_module("prefect_dask").DaskTaskRunner
    except ModuleNotFoundError as error:
        raise InputError(
            f"expected prefect-dask for {RUNNER}=dask, got no module {error.name!r}; pip install"
            " 'flataudit[dask]'"
        ) from None
    address = os.environ.get(ADDRESS)
    if address:
        return runner(address=address)
    local = {"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None,
             "silence_logs": "ERROR"}  # fmt: skip
    return runner(cluster_kwargs=local)


RUNNERS: dict[str, Callable[[int], Any]] = {
    "threads": _threads,
    "processes": _processes,
    "dask": _dask,
}
