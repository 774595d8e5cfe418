"""The zoo's passes as a Prefect flow: one task per model, each by its name.

What a task does is named as "module:function", so that nothing of the benchmarks is imported here.
Every pass keeps its own results and skips what is done: a flow that was stopped is started again.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from prefect import flow, task
from prefect.futures import wait

from flows.runners import ended, task_runner

Json = dict[str, Any]


@task(name="zoo", task_run_name="{name}", retries=1, retry_delay_seconds=2)
def zoo_task(call: str, name: str, options: Json) -> Json:
    """Calls "module:function" with the model's name and the options; returns its row."""
    module, function = call.split(":")
    row: Json = getattr(import_module(module), function)(name, options)
    return row


@flow(name="flataudit-zoo", flow_run_name="{call}", task_runner=task_runner())
def zoo_flow(call: str, names: list[str], options: Json) -> list[Json]:
    """One pass over the models; a row for each, with `state` and, where it failed, `error`."""
    futures = [zoo_task.submit(call, name, options) for name in names]
    wait(futures)
    return [_row(name, future) for name, future in zip(names, futures, strict=True)]


def _row(name: str, future: Any) -> Json:
    found = ended(future)
    if isinstance(found, dict):
        return found
    text = " ".join(f"{type(found).__name__}: {found}".split())[:1000]
    return {"name": name, "state": "failed", "error": text}
