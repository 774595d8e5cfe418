"""Past audits, read back from MLflow as plain data: by model, newest first.

A list costs one paged search, whatever its length; a whole report is one artifact more. An audit
counts when its run is finished, or when it says that the audit failed; a run whose logging broke
off left the old verdict in force and does not count.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flataudit import keys
from flataudit.errors import InputError, StoreError
from flataudit.results import to_json
from flataudit.store import scratch_folder, store_errors

if TYPE_CHECKING:
    from mlflow.entities import Run

    from flataudit.models.registry import ModelSource

PAGE = 1000  # runs per request
_PLAIN = re.compile(r"[\w .:@/-]+")  # names that mean themselves in MLflow's filter strings
_URI = re.compile(r"models:/(?P<name>[^/]+)/(?P<version>\d+)")


@dataclass(frozen=True, slots=True)
class PastAudit:
    """One audit as its run shows it; gaps and losses in nats per example, None what it lacks.

    identity: what the audit is bound to (`ModelSource.identity`); error: the audit failed and
    there are no numbers; audited_at: ISO 8601, UTC; data_sha256: of the training data.
    """

    run_id: str
    audited_at: str
    uri: str
    name: str | None
    version: str | None
    identity: str
    error: bool
    verdict: str
    confidence: str | None
    calibration: str | None
    evidence: str | None
    estimator: str | None
    family: str | None
    warnings: tuple[str, ...]
    policy: str | None
    data_sha256: str | None
    gap: float | None
    gap_low: float | None
    gap_high: float | None
    train_nll: float | None
    predicted_test_nll: float | None
    predicted_accuracy: float | None
    heldout_gap: float | None
    heldout_gap_se: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = to_json(self)
        return found

    @property
    def when(self) -> datetime:
        """`audited_at` as a time with its zone."""
        return datetime.fromisoformat(self.audited_at)


def past_audits(
    name: str | None = None, *, identity: str | None = None, limit: int | None = None
) -> list[PastAudit]:
    """The audits of one registered model, of one identity, or all; newest first.

    Args:
        name: A registered model: its audited versions. Audits of models:/m-id or of a run's
            model belong to no name.
        identity: Audits of exactly this model.
        limit: At most so many.

    Raises:
        StoreError: MLflow cannot be read.
    """
    terms = [model_filter(name)] if name is not None else []
    if identity is not None and _PLAIN.fullmatch(identity):
        terms.append(f"tags.`{keys.MODEL_ID}` = '{identity}'")
    found = (
        audit
        for audit in map(
            _past_audit, search_runs(keys.EXPERIMENT, " and ".join(filter(None, terms)))
        )
        if audit is not None
        and (name is None or audit.name == name)
        and (identity is None or audit.identity == identity)
    )
    return list(islice(found, limit))


def model_filter(name: str) -> str:
    """Narrows a search to the runs of one registered model; more may be found, never fewer."""
    return f"tags.`{keys.URI_TAG}` LIKE 'models:/{name}/%'" if _PLAIN.fullmatch(name) else ""


def latest_audit(identity: str) -> PastAudit | None:
    """The newest audit of exactly this model, failed or not; None where there is none."""
    found = past_audits(identity=identity, limit=1)
    return found[0] if found else None


def required_audit(source: ModelSource) -> PastAudit:
    """The newest audit of exactly this model; InputError where there is none, or it failed."""
    found = latest_audit(source.identity)
    if found is None or found.error:
        got = "none" if found is None else "one that failed"
        raise InputError(
            f"expected an audit of {source.uri}, got {got}; run flataudit audit {source.uri} first"
        )
    # The same model may have been audited under another name: speak of what was asked for.
    return replace(found, uri=source.uri, name=source.name, version=source.version)


def audit_of_run(run_id: str) -> PastAudit:
    """The audit that this run holds; InputError where there is none."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    found = None
    with store_errors(f"read the run {run_id}"):
        try:
            found = _past_audit(MlflowClient().get_run(run_id))
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
    if found is None:
        raise InputError(
            f"expected the id of an audit run, got {run_id!r}, which is none in this store; see"
            " flataudit audits list"
        )
    return found


def read_report(audit: PastAudit) -> dict[str, Any]:
    """The report's JSON of an audit that did not fail.

    Raises:
        InputError: the audit failed, so there is no report.
        StoreError: the artifact cannot be read, or is not the report of this model.
    """
    from mlflow import MlflowClient

    if audit.error:
        raise InputError(
            f"expected a report of audit run {audit.run_id}, got an audit of {audit.uri} that"
            " failed; audit it again"
        )
    with store_errors(f"read the report of audit run {audit.run_id}"):
        path = MlflowClient().download_artifacts(audit.run_id, keys.REPORT, scratch_folder())
        report: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        of = report["model"]["model_id"]
    if of is not None and of != audit.identity:
        raise StoreError(
            f"expected the report of {audit.identity} in audit run {audit.run_id}, got that of"
            f" {of}; audit {audit.uri} again"
        )
    return report


def gap_changes(audits: Sequence[PastAudit]) -> list[float | None]:
    """For audits newest first: the gap minus that of the same model's audit before it.

    The same model is the same registered name, or the same identity where there is no name.
    """
    changes: list[float | None] = []
    before: dict[str, float] = {}
    for audit in reversed(audits):
        key = audit.name or audit.identity
        known = audit.gap is not None and key in before
        changes.append(audit.gap - before[key] if audit.gap is not None and known else None)
        if audit.gap is not None:
            before[key] = audit.gap
    return changes[::-1]


def search_runs(experiment: str, filter_string: str = "") -> Iterator[Run]:
    """All active runs of an experiment that match, newest first, page by page.

    Raises:
        StoreError: MLflow cannot be read.
    """
    from mlflow import MlflowClient

    with store_errors(f"read the experiment {experiment!r}"):
        client = MlflowClient()
        where = client.get_experiment_by_name(experiment)
    token: str | None = ""
    while where is not None and token is not None:
        with store_errors(f"read the experiment {experiment!r}"):
            page = client.search_runs(
                [where.experiment_id],
                filter_string,
                max_results=PAGE,
                order_by=["attributes.start_time DESC"],
                page_token=token or None,
            )
        yield from page
        token = page.token or None


def parse_uri(uri: str) -> tuple[str | None, str | None]:
    """Name and version of models:/name/version; None and None for every other form."""
    parts = _URI.fullmatch(uri)
    return (parts["name"], parts["version"]) if parts else (None, None)


def metric(run: Run, key: str) -> float | None:
    """A run's metric, None where it has none or where it is not finite."""
    value = run.data.metrics.get(key)
    return None if value is None or not math.isfinite(value) else float(value)


def _past_audit(run: Run) -> PastAudit | None:
    tags = run.data.tags
    verdict, identity, uri = (tags.get(k) for k in (keys.VERDICT, keys.MODEL_ID, keys.URI_TAG))
    error = verdict == "error"
    complete = run.info.status == ("FAILED" if error else "FINISHED")
    if not (verdict and identity and uri and complete):
        return None
    name, version = parse_uri(uri)
    data = [] if run.inputs is None else run.inputs.dataset_inputs
    contexts = [{tag.key: tag.value for tag in item.tags} for item in data]
    shas = [c.get("sha256") for c in contexts if c.get("mlflow.data.context") == "training"]
    audited = _time(tags.get(keys.AUDITED_AT), run.info.start_time)
    return PastAudit(
        run_id=run.info.run_id,
        audited_at=audited.isoformat(timespec="seconds"),
        uri=uri,
        name=name,
        version=version,
        identity=identity,
        error=error,
        verdict=verdict,
        confidence=tags.get(keys.CONFIDENCE),
        calibration=tags.get(keys.CALIBRATION),
        evidence=tags.get(keys.EVIDENCE),
        estimator=tags.get(keys.ESTIMATOR),
        family=tags.get(keys.FAMILY),
        warnings=tuple(filter(None, tags.get(keys.WARNINGS, "").split(", "))),
        policy=tags.get(keys.POLICY),
        data_sha256=shas[0] if shas else None,
        gap=metric(run, "flataudit/gap"),
        gap_low=metric(run, "flataudit/gap_low"),
        gap_high=metric(run, "flataudit/gap_high"),
        train_nll=metric(run, "flataudit/train_nll"),
        predicted_test_nll=metric(run, "flataudit/predicted_test_nll"),
        predicted_accuracy=metric(run, "flataudit/predicted_accuracy"),
        heldout_gap=metric(run, "flataudit/heldout_gap"),
        heldout_gap_se=metric(run, "flataudit/heldout_gap_se"),
    )


def _time(text: str | None, instead: int) -> datetime:
    """The time that a tag names, else that of `instead`, milliseconds since 1970."""
    try:
        found = datetime.fromisoformat(text or "")
    except ValueError:
        found = datetime.fromtimestamp(instead / 1000, UTC)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
