"""An audit as it is written to MLflow; `keys` has every name.

One audit is one run in the experiment `flataudit`. The model's verdict (version tags and the
description's block) is written last, after the run is complete, and undone where that fails: a
failing store leaves the old verdict as it was. Every call is tried again where its failure may
pass (`retries`), and every write is idempotent: the same audit, logged again by its id, completes
the run that it began (`audit_run`). Only the client API is used: a run that is active in this
process, or named by MLFLOW_RUN_ID, is neither resumed nor written to.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flataudit import __version__, keys
from flataudit.audit_run import (
    DIGEST,
    audit_run,
    log_inputs,
    log_metrics,
    params_of,
    rendered,
    set_run_tags,
)
from flataudit.data import CONTEXTS, as_features, digest_of
from flataudit.errors import InputError, StoreError
from flataudit.history import earlier_audits
from flataudit.keys import ARTIFACTS, DURATION, EXPERIMENT, METRICS, VERDICT
from flataudit.labels import text_labels
from flataudit.models.registry import ModelSource
from flataudit.report import words
from flataudit.results import to_json
from flataudit.retries import patient
from flataudit.store import scratch_folder, store_errors
from flataudit.training import TRAINING_ARTIFACT
from flataudit.versions import markdown_text, set_verdict, update_model_table

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flataudit.training import TrainingRecord

_OF_A_REPORT = tuple(
    f"flataudit.{name}" for name in ("gap", "calibration", "confidence", "warnings", "policy")
)
_TAKEN = {"x", "y", "file", "allow_pickle"}  # names that inputs in an npz file cannot have


def metrics_of(report: Mapping[str, Any]) -> dict[str, float]:
    """The report's metrics by MLflow key; what is null or not finite is left out.

    MLflow stores a NaN as 0 and infinity as 1.8e308 where a model is given: never log those.
    """
    found = {}
    for key, path in METRICS.items():
        value: Any = report
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if isinstance(value, int | float) and math.isfinite(value):
            found[key] = float(value)
    return found


def tags_of(report: dict[str, Any], source: ModelSource, run_id: str) -> dict[str, str]:
    """The tags of an audited version; the policy last, which `versions.set_verdict` takes off
    first: a version with it has all the others from one audit under these rules."""
    return {
        "flataudit.gap": words.gap_text(report),
        "flataudit.calibration": str(report["calibration"]["verdict"]),
        "flataudit.confidence": str(report["confidence"]),
        "flataudit.warnings": ", ".join(w["code"] for w in words.sorted_warnings(report)),
        **_bound_to(source, run_id),
        VERDICT: words.verdict(report),
        keys.POLICY: policy_hash(),
    }


def _kind_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What a list of audits shows beside the version's tags, without reading each report."""
    return {
        keys.ESTIMATOR: str(report["gap"]["estimator"]),
        keys.FAMILY: str(report["family"]),
        keys.EVIDENCE: str(report["calibration"]["evidence"]),
    }


def policy_hash() -> str:
    """sha256 of the package's version and the defaults of the selection and calibration policies.

    An audit made under other rules has another hash.
    """
    from flataudit.calibration.verdict import CalibrationPolicy
    from flataudit.selection import SelectionPolicy

    rules = {
        "version": __version__,
        "selection": asdict(SelectionPolicy()),
        "calibration": asdict(CalibrationPolicy()),
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def log_audit(
    report: dict[str, Any],
    display: dict[str, Any],
    source: ModelSource,
    *,
    options: Mapping[str, Any] | None = None,
    duration: float | None = None,
    resources: Mapping[str, float | None] | None = None,
    experiment: str = EXPERIMENT,
    run_tags: Mapping[str, str] | None = None,
    audit_id: str | None = None,
    history: list[dict[str, Any]] | None = None,
    fresh_labels: Mapping[str, Any] | None = None,
) -> str:
    """Logs a finished audit and sets the model's verdict.

    Args:
        report: `AuditReport.to_dict()`.
        display: `AuditReport.display`, for the figures and the influence table.
        source: The audited model. A version gets tags and a block in its description, a model
            without a version (models:/m-id, runs:/...) tags on the logged model, a folder neither.
        options: What the audit was called with, by the command line's names: they become the
            run's params, `train` and `heldout` its inputs.
        duration: Seconds the audit took.
        resources: More metrics of the run alone, by name: seconds of the stages, peak memory.
        experiment: Where the run goes.
        run_tags: More tags of the run, set as it is made: a sweep's `flataudit.audit_key` and
            `mlflow.parentRunId`.
        audit_id: Of this audit. Where a run with it exists, logging broke off: that run is
            completed, and nothing in it is logged twice.
        history: What `flataudit.history.earlier_audits` gave, where it was read already.
        fresh_labels: What `flataudit.fresh_labels` counted, for the model's next audit.

    Returns:
        The id of the audit run.

    Raises:
        StoreError: the store failed; the old verdict stands, and the run is marked FAILED where
            that could be written.
    """
    options = dict(options or {})
    history = earlier_audits(source.name) if history is None else history
    folder = rendered(report, display, history, fresh_labels)
    metrics = metrics_of(report)
    with audit_run(source, options, experiment, run_tags, audit_id) as (client, run, link):
        run_id = str(run.info.run_id)
        tags, block = tags_of(report, source, run_id), words.description_block(report, link)
        model_id = logged_model_id(client, source)
        if run.info.status == "FINISHED":  # only the verdict was not written
            tags = {key: run.data.tags.get(key, value) for key, value in tags.items()}
            block = run.data.tags.get("mlflow.note.content", block)
        else:
            client.log_artifacts(run_id, folder, ARTIFACTS)
            data = log_inputs(client, run_id, report["data"], source, options, model_id)
            own = {**(resources or {}), DURATION: duration}
            log_metrics(client, run, metrics, own, model_id, data)
            table = [{"path": f"{ARTIFACTS}/influence.json", "type": "table"}]
            shown = {"mlflow.loggedArtifacts": json.dumps(table), "mlflow.note.content": block}
            set_run_tags(client, run_id, {**(run_tags or {}), **tags, **_kind_of(report), **shown})
            client.set_terminated(run_id, "FINISHED")
        set_verdict(client, source, model_id, tags, block, clear=_OF_A_REPORT)
    update_model_table(client, source)
    return run_id


def log_error(
    source: ModelSource,
    error: str,
    *,
    options: Mapping[str, Any] | None = None,
    experiment: str = EXPERIMENT,
    run_tags: Mapping[str, str] | None = None,
    audit_id: str | None = None,
) -> str | None:
    """Logs an audit that failed or ran past its deadline (exit code 3): verdict `error`.

    The run is FAILED and holds `flataudit/error.json`; the numbers of an earlier audit are taken
    off the model. Bad input (exit code 2) is never logged. audit_id: as for `log_audit`; an error
    never goes into the run of a result.

    Returns:
        The id of the run; None where the store failed too, which leaves the old verdict.
    """
    options = dict(options or {})
    found = {"error": error, "model": source.report_fields(), "options": params_of(options)}
    own = audit_id and f"{audit_id}-error"
    try:
        with audit_run(source, options, experiment, run_tags, own) as (client, run, link):
            run_id = str(run.info.run_id)
            client.log_dict(run_id, found, f"{ARTIFACTS}/error.json")
            tags = {**_bound_to(source, run_id), VERDICT: "error"}
            block = f"**flataudit: error.** The audit failed: {markdown_text(error)}"
            set_run_tags(client, run_id, tags | {"mlflow.note.content": block})
            client.set_terminated(run_id, "FAILED")
            model_id = logged_model_id(client, source)
            block += f"\n\n[Audit run](<{link}>)"
            set_verdict(client, source, model_id, tags, block, clear=_OF_A_REPORT)
    except StoreError:
        return None
    update_model_table(client, source)
    return run_id


def log_evaluation(
    report: dict[str, Any],
    display: dict[str, Any],
    source: ModelSource,
    *,
    run_id: str,
    train: str,
    data: tuple[str, str] | None,
) -> tuple[Path, str]:
    """Logs an audit that is part of somebody's run: `mlflow.models.evaluate`. No verdict is set.

    Args:
        run_id: The run; its report, figures and training data are added to what it holds.
        train: The training data by name, for the run's inputs.
        data: Name and digest of the data that the metrics are logged with; None: no metrics.

    Returns:
        The folder with the artifacts, and their URI in the run.

    Raises:
        StoreError: the store failed.
    """
    folder = Path(rendered(report, display, earlier_audits(source.name)))
    with store_errors(f"log the audit to run {run_id}"):
        from mlflow import MlflowClient
        from mlflow.entities import Dataset

        client = patient(MlflowClient())
        client.log_artifacts(run_id, str(folder), ARTIFACTS)
        log_inputs(client, run_id, report["data"], source, {"train": train}, None)
        if data is not None:
            model_id = logged_model_id(client, source)
            known = Dataset(*data, "code", "{}")
            run = client.get_run(run_id)
            log_metrics(client, run, metrics_of(report), {}, model_id, known)
        where = str(client.get_run(run_id).info.artifact_uri).rstrip("/")
    return folder, f"{where}/{ARTIFACTS}"


def log_training_data(
    run_id: str, x: Any, y: Any, *, name: str = "train", record: TrainingRecord | None = None
) -> None:
    """Logs to a training run what its audit needs: `--train mlflow` and `--training auto`.

    The arrays become the artifact `data/NAME.npz` and the run's input with the context "training"
    and the tag `sha256`; the record becomes `flataudit/training.json`. x is one array, or a dict
    of at least two by the names of forward's parameters.

    Raises:
        InputError: x and y do not fit together, or x does not fit into an npz file.
        StoreError: the store failed.
    """
    import numpy as np

    if not re.fullmatch(r"\w[\w .=-]*", name):
        raise InputError(
            f"expected a name of letters, digits, spaces, points and dashes for the file, got"
            f" {name!r}; choose another"
        )
    sha = digest_of(x, y)
    labels = text_labels(y)
    arrays, y = _npz_arrays(x), np.asarray(y) if labels is None else labels
    path = Path(scratch_folder()) / f"{name}.npz"
    np.savez(path, y=y, **arrays)
    with store_errors(f"log the training data to run {run_id}"):
        from mlflow import MlflowClient
        from mlflow.data.dataset_source_registry import get_dataset_source_from_json
        from mlflow.data.numpy_dataset import from_numpy
        from mlflow.entities import Dataset, DatasetInput, InputTag

        client = MlflowClient()
        client.log_artifact(run_id, str(path), "data")
        # MLflow has no source type for a run's own artifacts; "local" downloads them all the same.
        uri = json.dumps({"uri": f"runs:/{run_id}/data/{path.name}"})
        source = get_dataset_source_from_json(uri, "local")
        dataset = from_numpy(
            arrays.get("x", arrays), targets=y, source=source, name=name, digest=sha[:DIGEST]
        )
        tags = [InputTag("mlflow.data.context", CONTEXTS[0]), InputTag("sha256", sha)]
        client.log_inputs(run_id, [DatasetInput(Dataset(**dataset.to_dict()), tags)])
        if record is not None:
            client.log_dict(run_id, to_json(record.to_record()), TRAINING_ARTIFACT)


def _npz_arrays(x: Any) -> dict[str, Any]:
    """The arrays of an npz file in which `load_data` finds x again: x alone, or several by name."""
    found = as_features(x, "x")
    if not isinstance(found, dict | tuple):
        return {"x": found}
    if isinstance(found, tuple) or len(found) < 2 or _TAKEN & set(found):
        got = "a tuple" if isinstance(found, tuple) else ", ".join(found) or "none"
        raise InputError(
            "expected x as one array, or as a dict of several arrays with other names than"
            f" {', '.join(sorted(_TAKEN))}, got {got}; name the inputs as forward does"
        )
    return found


def _bound_to(source: ModelSource, run_id: str) -> dict[str, str]:
    """What binds a verdict to this audit of exactly this model."""
    return {
        "flataudit.run_id": run_id,
        "flataudit.model_id": source.identity,
        "flataudit.audited_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def logged_model_id(client: MlflowClient, source: ModelSource) -> str | None:
    """The model_id where this store knows that model; not for a folder, whose store may differ."""
    if source.model_id is None or source.kind == "folder":
        return None
    from mlflow.exceptions import MlflowException

    try:
        return str(client.get_logged_model(source.model_id).model_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
