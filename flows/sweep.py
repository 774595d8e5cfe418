"""The sweep as a Prefect flow: one standing audit over every version that it matches.

Each version is one task, in which an audit's stages are tasks of their own; a version that fails
stops none of the others. What is audited already, by its key (`flataudit.audit_key`), is skipped:
the MLflow registry is asked, and nothing is taken from Prefect that MLflow does not have. A
finished estimate is kept by Prefect under the same key, so that a sweep that was stopped between
estimate and logging takes it from there (state Cached).
"""

from __future__ import annotations

import json
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import exponential_backoff
from prefect.transactions import CommitMode, transaction

from flataudit import stages, sweeps
from flataudit.audit_key import KEY_TAG, key_of
from flataudit.errors import AuditFailedError, FlatauditError, InputError
from flataudit.models.registry import ModelSource
from flataudit.pipeline import Pipeline, make_pipeline, read_pipeline
from flataudit.store import use_tracking
from flows.audit import estimate_task, load_task, log_task
from flows.runners import ended, task_runner

Json = dict[str, Any]

RETRY_DELAY = 5.0  # seconds before the first retry; doubled before each later one
POOLS = 3  # pools of processes that a sweep begins before it gives up what they took along
FAILED = "AuditsFailed"  # name of the completed state of a sweep in which an audit failed
COLUMNS = ["verdict", "gap", "low", "high", "confidence", "warnings", "seconds", "run_id", "error"]


@task(name="audit", task_run_name="audit {uri}")
def audit_version(uri: str, pipeline: Json, parent_run_id: str) -> Json:
    """Audits one version unless that is done already; returns its row of the table.

    Raises:
        FlatauditError: as `flataudit.stages.run_audit`.
    """
    # A finished estimate is kept at once, not only where the whole task succeeds.
    with transaction(commit_mode=CommitMode.EAGER):
        return _audited_or_skipped(uri, make_pipeline(pipeline), parent_run_id)


@flow(
    name="flataudit-sweep",
    flow_run_name=lambda: _run_name(flow_run.parameters.get("pipeline")),
    persist_result=True,
    result_serializer="json",
    validate_parameters=False,
    task_runner=task_runner(),
)
def sweep_flow(pipeline: str | Json) -> Any:
    """One standing audit: a pipeline file, or its content as a mapping.

    The store is MLFLOW_TRACKING_URI's. Ends Completed; named AuditsFailed where an audit failed.

    Returns:
        {pipeline, run_id, counts: {audited, skipped, failed}, rows}: one row per version, with
        model, state (audited|skipped|failed), verdict, gap, low, high, confidence, warnings,
        seconds, run_id, error.

    Raises:
        InputError: a bad pipeline file, or no such model.
        StoreError: the registry cannot be read, or the sweep's own run not be written.
    """
    asked = _read(pipeline)
    use_tracking()
    versions = sweeps.select_versions(asked.model)
    run_id = sweeps.start_sweep(asked, str(flow_run.id or ""))
    sweeps.close_ended(asked, run_id, _has_ended)
    try:
        rows = _audit_all([version.uri for version in versions], asked, run_id)
        counts = {
            state: sum(row["state"] == state for row in rows)
            for state in ("audited", "skipped", "failed")
        }
        note = f"**{asked.name}: {summary(counts)}**\n\n{sweeps.markdown(rows)}"
        _leave_table(f"sweep-{asked.name}", rows, f"{asked.name}: {summary(counts)}")
        sweeps.finish_sweep(run_id, rows, counts, note)
    except BaseException:
        sweeps.abandon_sweep(run_id)
        raise
    result = {"pipeline": asked.name, "run_id": run_id, "counts": counts, "rows": rows}
    if counts["failed"]:
        return Completed(name=FAILED, message=summary(counts), data=result)
    return result


def summary(counts: Json) -> str:
    """
    >>> summary({"audited": 3, "skipped": 0, "failed": 1})
    '3 audited, 0 skipped, 1 failed'
    """
    return ", ".join(f"{number} {state}" for state, number in counts.items())


def _audit_all(uris: list[str], asked: Pipeline, run_id: str) -> list[Json]:
    """The row of each version.

    A process that dies takes its whole pool along, with audits that did nothing wrong and those
    that had not begun: they are given to a new pool.
    """
    given = asked.to_dict()
    futures = [audit_version.submit(uri, given, run_id) for uri in uris]
    found = {uri: ended(future) for uri, future in zip(uris, futures, strict=True)}
    for _ in range(POOLS - 1):
        lost = [uri for uri in uris if isinstance(found[uri], BrokenExecutor)]
        if not lost:
            break
        with task_runner() as pool:
            parameters = {"pipeline": given, "parent_run_id": run_id}
            futures = [pool.submit(audit_version, {"uri": uri} | parameters) for uri in lost]
            found |= {uri: ended(future) for uri, future in zip(lost, futures, strict=True)}
    return [_outcome(uri, found[uri]) for uri in uris]


def _has_ended(flow_run_id: str) -> bool:
    """Whether Prefect knows that flow run, and as ended."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run_id)).state
    except Exception:  # of another server, or no id
        return False
    return state is not None and state.is_final()


def _audited_or_skipped(uri: str, asked: Pipeline, parent_run_id: str) -> Json:
    options = asked.audit_options()
    values = options.model_dump()
    run = _with_retries(asked.retries)
    loaded = run.load(uri, asked.data.train, asked.data.heldout, values)
    key = key_of(loaded, options)
    source = ModelSource.from_dict(loaded["source"])
    done = sweeps.audited_run(key, source)
    if done is not None:
        return _row(uri, "skipped", **sweeps.recorded(done))
    tags = {KEY_TAG: key, sweeps.PIPELINE_TAG: asked.name, sweeps.PARENT_TAG: parent_run_id}
    loaded = loaded | {"run_tags": tags, "audit_id": sweeps.audit_id(key, source)}

    def log(loaded: Json, result: Json, options: Json) -> str:
        # A kept estimate may be of another version with the same weights.
        model = result["report"]["model"] | source.report_fields()
        return run.log(loaded, result | {"report": result["report"] | {"model": model}}, options)

    again = stages.Stages(load=lambda *_: loaded, estimate=run.estimate, log=log)
    found = stages.run_audit(uri, asked.data.train, asked.data.heldout, options, stages=again)
    return _row(uri, "audited", **sweeps.recorded(found["run_id"]))


def _leave_table(key: str, rows: list[Json], description: str) -> None:
    """The rows as an artifact of the flow run; by a client that is closed, which Prefect's own
    `create_table_artifact` leaves open in a synchronous flow."""
    with get_client(sync_client=True) as client:
        client.create_artifact(
            ArtifactCreate(
                key=key,
                type="table",
                data=json.dumps(rows, allow_nan=False),
                description=description,
                flow_run_id=flow_run.id,
            )
        )


def _run_name(pipeline: Any) -> str:
    name = pipeline.get("name") if isinstance(pipeline, dict) else Path(str(pipeline)).stem
    return f"sweep {name}"


def _read(pipeline: str | Json) -> Pipeline:
    if isinstance(pipeline, str | Path):
        return read_pipeline(pipeline)
    return make_pipeline(pipeline, "the flow's parameter pipeline")


def _with_retries(retries: int) -> stages.Stages:
    """The stages as tasks. Each is tried again by itself, so that an estimate is not repeated
    because its logging failed, and an error is on record only after the last try."""
    again: Json = {
        "retries": retries,
        "retry_delay_seconds": exponential_backoff(RETRY_DELAY) if retries else 0,
        "retry_condition_fn": _worth_a_retry,
    }
    estimate = estimate_task.with_options(cache_key_fn=_by_key, **again)
    return stages.Stages(
        load=load_task.with_options(**again),
        estimate=estimate,
        log=log_task.with_options(**again),
    )


def _by_key(context: Any, parameters: Json) -> str:
    return f"flataudit-estimate-{parameters['loaded']['run_tags'][KEY_TAG]}"


def _worth_a_retry(task: Any, run: Any, state: Any) -> bool:
    """Bad input stays bad."""
    error = state.result(raise_on_failure=False)
    return not isinstance(error, InputError)


def _outcome(uri: str, found: Any) -> Json:
    """The row of a task by what it returned, or by the exception with which it ended."""
    if isinstance(found, dict):
        return found
    if isinstance(found, BrokenExecutor):
        found = AuditFailedError(
            f"expected the processes of the pool to live, got the end of {POOLS} pools (kill -9, or"
            " no memory left); set FLATAUDIT_WORKERS lower and run the sweep again"
        )
    text = str(found) if isinstance(found, FlatauditError) else f"{type(found).__name__}: {found}"
    return _row(uri, "failed", error=" ".join(text.split())[:1000])


def _row(uri: str, state: str, **found: Any) -> Json:
    return {"model": uri, "state": state} | dict.fromkeys(COLUMNS) | found
