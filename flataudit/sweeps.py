"""The registry's side of a sweep: which versions, which are audited already, and its own run.

Versions are searched page by page and filtered here: MLflow's filter `tags.x != 'pass'` leaves out
versions without the tag, which are the very ones that are looked for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from flataudit import processes
from flataudit.audit_key import KEY_TAG
from flataudit.errors import InputError
from flataudit.keys import (
    AUDIT_ID,
    AUDITED_AT,
    DURATION,
    EXPERIMENT,
    POLICY,
    RUN_ID,
    URI_TAG,
    VERDICT,
)
from flataudit.models.registry import ModelSource, resolve
from flataudit.pipeline import Models, Pipeline
from flataudit.retries import patient
from flataudit.store import ensure_experiment, store_errors
from flataudit.tracking import policy_hash
from flataudit.versions import markdown_cell, quoted, search_versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

Json = dict[str, Any]

PARENT_TAG = "mlflow.parentRunId"  # MLflow's own: its UI shows the audits below their sweep
PIPELINE_TAG = "flataudit.pipeline"  # on a sweep's run and on its audits'
# On a sweep's run: who runs it, and the later sweep that closed it because it was killed.
PROCESS_TAG, FLOW_RUN_TAG = "flataudit.process", "flataudit.flow_run_id"
CONTINUED_TAG = "flataudit.continued_by"
TABLE = "flataudit/sweep.json"  # artifact of a sweep's run


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a registered model."""

    name: str
    version: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def select_versions(models: Models) -> list[Version]:
    """The versions that a pipeline names, by name and then by number.

    Raises:
        InputError: no such model, alias or version; of several models by a pattern those without
            the alias or the version are left out.
        StoreError: the registry cannot be read.
    """
    with store_errors(f"look up the versions of {models.name}"):
        client = _client()
        found: dict[str, list[ModelVersion]] = {}
        for version in _search(client, models.name):
            found.setdefault(version.name, []).append(version)
        for versions in found.values():
            versions.sort(key=lambda v: int(v.version))
        chosen = [v for name in sorted(found) for v in _chosen(client, models, found[name])]
    if not found:
        raise InputError(
            f"expected model.name to be a registered model with versions, or a pattern of such,"
            f" got {models.name!r}; check the name and the tracking URI"
        )
    if not chosen and models.select in ("alias", "version"):
        wanted = getattr(models, models.select)
        raise InputError(
            f"expected {models.select} {wanted} of {models.name}, got none; check model.select"
        )
    return [Version(v.name, str(v.version)) for v in chosen]


def audited_run(key: str, source: ModelSource) -> str | None:
    """The run of a finished audit with this key whose verdict this version has or had since.

    None where there is none, where its verdict was not written (the process ended in between), or
    where the version's verdict is an error since then.

    Raises:
        StoreError: the store cannot be read.
    """
    with store_errors(f"look for an earlier audit of {source.uri}"):
        client = _client()
        finished = f"tags.`{KEY_TAG}` = '{key}' and attributes.status = 'FINISHED'"
        run = _newest_run(client, source, finished)
        if run is None:
            return None
        if source.kind == "registry":
            tags = client.get_model_version(str(source.name), str(source.version)).tags
            if _unwritten(tags, run) or not _is_whole(tags):
                return None
        return str(run.info.run_id)


def audit_id(key: str, source: ModelSource) -> str:
    """The id of the audit with this key that is due now.

    Of one whose logging broke off; else it follows from the key, the version and its newest run.
    Two processes that audit a version at the same time, as where a cluster's worker goes on after
    its sweep was killed, so have one id, and therefore one run (`flataudit.tracking`).

    Raises:
        StoreError: the store cannot be read.
    """
    begun = broken_off(key, source)
    if begun is not None:
        return begun
    with store_errors(f"look for an earlier audit of {source.uri}"):
        newest = _newest_run(_client(), source)
    before = "" if newest is None else newest.info.run_id
    return hashlib.sha256(f"{key} {source.uri} {before}".encode()).hexdigest()[:32]


def broken_off(key: str, source: ModelSource) -> str | None:
    """The audit id of an audit with this key whose logging broke off, which can be completed.

    It has to be the newest run of this model: to complete an older one would let it appear older
    than the audits made since.

    Raises:
        StoreError: the store cannot be read.
    """
    with store_errors(f"look for an earlier audit of {source.uri}"):
        client = _client()
        run = _newest_run(client, source)
        if run is None or run.data.tags.get(KEY_TAG) != key:
            return None
        audit_id = run.data.tags.get(AUDIT_ID)
        if audit_id is None or audit_id.endswith("-error"):
            return None
        if run.info.status == "FINISHED":
            if source.kind != "registry":
                return None
            tags = client.get_model_version(str(source.name), str(source.version)).tags
            return str(audit_id) if _unwritten(tags, run) or not _is_whole(tags) else None
        return str(audit_id)


def _newest_run(client: MlflowClient, source: ModelSource, more: str = "") -> Run | None:
    """The audit run of this model that was begun last, of those that also match `more`."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    this_model = f"tags.`{URI_TAG}` = {quoted(source.uri)}"
    runs = client.search_runs(
        [experiment.experiment_id],
        f"{this_model} and {more}" if more else this_model,
        max_results=1,
        order_by=["attributes.start_time DESC"],
    )
    return runs[0] if runs else None


def _unwritten(tags: Mapping[str, str], run: Run) -> bool:
    """Whether the version's tags are older than this run, or not all of it were written yet."""
    of_run = run.data.tags
    if tags.get(RUN_ID) == run.info.run_id:
        return tags.get(VERDICT) != of_run.get(VERDICT) or not _is_whole(tags)
    # Of the same second it is not known which came first: to write it again does no harm.
    return tags.get(AUDITED_AT, "") <= of_run.get(AUDITED_AT, "")


def _is_whole(tags: Mapping[str, str]) -> bool:
    """Whether the version has a verdict, none that says error, and all tags of its audit: the
    policy's is the first to go and the last to come (`flataudit.versions.set_verdict`)."""
    return tags.get(VERDICT, "error") != "error" and POLICY in tags


def start_sweep(pipeline: Pipeline, flow_run: str = "") -> str:
    """A new MLflow run for the sweep; returns its id.

    flow_run: the id of Prefect's run. With this process it is what a later sweep goes by to see
    whether this one has ended (`close_ended`).

    Raises:
        StoreError: the store cannot be written.
    """
    with store_errors(f"start the run of the sweep {pipeline.name}"):
        from mlflow import MlflowClient

        client = _client()
        tags = {PIPELINE_TAG: pipeline.name, "mlflow.source.name": "flataudit"}
        known = {PROCESS_TAG: processes.identity(), FLOW_RUN_TAG: flow_run}
        tags |= {key: value for key, value in known.items() if value}
        if pipeline.tags:
            tags["flataudit.pipeline_tags"] = ", ".join(pipeline.tags)
        experiment = ensure_experiment(EXPERIMENT)
        # Not tried again: if only the answer was lost, there would be two.
        run = MlflowClient().create_run(experiment, tags=tags, run_name=f"sweep {pipeline.name}")
        run_id = str(run.info.run_id)
        client.log_dict(run_id, pipeline.to_dict(), "flataudit/pipeline.json")
        return run_id


def close_ended(
    pipeline: Pipeline, run_id: str, flow_has_ended: Callable[[str], bool]
) -> list[str]:
    """Ends the runs of this pipeline's earlier sweeps that were killed: status KILLED, and
    `flataudit.continued_by`, the run of this sweep. Returns them.

    A sweep has ended where its process is gone (`flataudit.processes.is_gone`), or where
    `flow_has_ended` says so of its Prefect run. One that may still run, here or on another
    machine, is left alone; so is one that cannot be written to.
    """
    closed = []
    with suppress(Exception):
        client = _client()
        experiment = ensure_experiment(EXPERIMENT)
        ours = f"tags.`{PIPELINE_TAG}` = {quoted(pipeline.name)}"
        running = "attributes.status = 'RUNNING'"
        for run in client.search_runs([experiment], f"{ours} and {running}"):
            tags, other = run.data.tags, run.info.run_id
            if other == run_id or URI_TAG in tags:  # an audit is completed by its own key
                continue
            flow_run = tags.get(FLOW_RUN_TAG, "")
            gone = processes.is_gone(tags.get(PROCESS_TAG, ""))
            if gone or (flow_run and flow_has_ended(flow_run)):
                client.set_tag(other, CONTINUED_TAG, run_id)
                client.set_terminated(other, "KILLED")
                closed.append(other)
    return closed


def finish_sweep(run_id: str, rows: list[Json], counts: Mapping[str, int], note: str) -> None:
    """Writes the sweep's table, its counts and its description, and ends its run.

    Raises:
        StoreError: the store cannot be written.
    """
    from mlflow.entities import Metric, RunTag

    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = {"columns": columns, "data": [[row.get(name) for name in columns] for row in rows]}
    with store_errors(f"log the sweep to run {run_id}"):
        client = _client()
        client.log_dict(run_id, table, TABLE)
        client.log_batch(
            run_id,
            metrics=[Metric(f"flataudit/{name}", float(n), 0, 0) for name, n in counts.items()],
            tags=[
                RunTag("mlflow.note.content", note),
                RunTag("mlflow.loggedArtifacts", f'[{{"path": "{TABLE}", "type": "table"}}]'),
            ],
        )
        client.set_terminated(run_id, "FAILED" if counts.get("failed") else "FINISHED")


def abandon_sweep(run_id: str) -> None:
    """Marks the run of a sweep that could not be finished."""
    with suppress(Exception):
        _client().set_terminated(run_id, "FAILED")


def recorded(run_id: str) -> Json:
    """What an audit run says of its model: verdict, gap, low, high, confidence, warnings, seconds.

    Raises:
        StoreError: the store cannot be read.
    """
    with store_errors(f"read the audit run {run_id}"):
        data = _client().get_run(run_id).data
    metrics, tags = data.metrics, data.tags
    return {
        "verdict": tags.get(VERDICT),
        "gap": metrics.get("flataudit/gap"),
        "low": metrics.get("flataudit/gap_low"),
        "high": metrics.get("flataudit/gap_high"),
        "confidence": tags.get("flataudit.confidence"),
        "warnings": tags.get("flataudit.warnings"),
        "seconds": metrics.get(DURATION),
        "run_id": run_id,
    }


def markdown(rows: list[Json], limit: int = 25) -> str:
    """The table for a run's description, the failed first; at most `limit` rows."""
    order = {"failed": 0, "audited": 1, "skipped": 2}
    lines = ["| model | state | verdict | gap |", "| --- | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: order[row["state"]])[:limit]:
        gap = (
            "" if row["gap"] is None else f"{row['gap']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        )
        told = (row["error"] or row["verdict"] or "").replace("|", "/")
        model, told = markdown_cell(row["model"], 150), markdown_cell(told, 150)
        lines.append(f"| {model} | {row['state']} | {told} | {gap} |")
    if len(rows) > limit:
        lines.append(f"\n{len(rows) - limit} more in {TABLE}.")
    return "\n".join(lines)


# --- the choice ---------------------------------------------------------------------------------


def _search(client: MlflowClient, pattern: str) -> Iterator[ModelVersion]:
    """All versions of the models whose name matches; LIKE narrows, fnmatch decides."""
    if re.search(r"[*?\[]", pattern):
        like = re.sub(r"\[[^\]]*\]|\*+", "%", pattern).replace("?", "_")
        query = f"name LIKE {quoted(like)}"
    else:
        query = f"name = {quoted(pattern)}"
    for version in search_versions(client, query):
        if version.name == pattern or fnmatchcase(version.name, pattern):
            yield version


def _chosen(
    client: MlflowClient, models: Models, versions: list[ModelVersion]
) -> list[ModelVersion]:
    """Of one model's versions, ascending, those that are asked for."""
    match models.select:
        case "all":
            return versions
        case "latest":
            return versions[-1:]
        case "version":
            return [v for v in versions if int(v.version) == models.version]
        case "alias":
            aliases = client.get_registered_model(versions[0].name).aliases
            wanted = aliases.get(str(models.alias))
            return [v for v in versions if str(v.version) == str(wanted)]
        case "unaudited":
            rules = policy_hash()
            return [v for v in versions if not _is_audited(client, v, rules)]


def _is_audited(client: MlflowClient, version: ModelVersion, rules: str) -> bool:
    """Whether its verdict is about these very weights, by this release and its rules."""
    tags = version.tags
    if not _is_whole(tags) or tags.get(POLICY) != rules:
        return False
    return tags.get("flataudit.model_id") == _identity(client, version)


def _identity(client: MlflowClient, version: ModelVersion) -> str:
    """`ModelSource.identity`, from the version's source alone where that says it."""
    seen = version
    while True:
        source = str(seen.source)
        if re.fullmatch(r"models:/m-\w+", source):
            return source.removeprefix("models:/")
        copied = re.fullmatch(r"models:/(.+)/(\d+)", source)
        if copied is None:  # as MLflow 2 registers: the files have to be looked at
            return resolve(f"models:/{version.name}/{version.version}").identity
        seen = client.get_model_version(copied[1], copied[2])


def _client() -> MlflowClient:
    from mlflow import MlflowClient

    return patient(MlflowClient())
