"""The gap that occurred: a model's loss on held-out data that became known after its audit.

`observe` links the observation to the latest audit of exactly this model, so that predictions can
be held against what came true (`flataudit.track_record`).
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flataudit import fresh_labels, keys, records, stages
from flataudit.audits import PastAudit, read_report, required_audit
from flataudit.config import AuditOptions
from flataudit.errors import InputError, NumericalError
from flataudit.store import use_tracking
from flataudit.track_record import agree

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flataudit.models.registry import ModelSource

Json = dict[str, Any]


def measure_here(request: Json, progress: stages.Progress | None = None) -> Json:
    """The model's mean loss on data, as an audit measures it; the model's code runs here.

    Args:
        request: {source (of `ModelSource.to_dict`), heldout, target, family, dispersion, device,
            tracking_uri}: family and dispersion those of the audit.

    Returns:
        {nll, nll_se, accuracy, n, sha256, fresh_labels}: nats per example, with its standard error
        sd/sqrt(n); accuracy null for regression; sha256 of the data as given; fresh_labels: the
        e-process over all labels of this model, these among them (`flataudit.fresh_labels`).

    Raises:
        InputError: data that do not fit the model.
        NumericalError: outputs or losses that are not finite.
    """
    from flataudit.data import digest_of, load_data
    from flataudit.estimates import mean_and_se
    from flataudit.families import log_probabilities, make_family
    from flataudit.judgement import class_labels, hit_rate, likelihood_ratios
    from flataudit.labels import with_indices
    from flataudit.models.classes import class_names
    from flataudit.models.registry import ModelSource, load_model
    from flataudit.models.sklearn import as_network
    from flataudit.models.torch import prepare
    from flataudit.preparation import heldout_outputs
    from flataudit.results import UnseenLabels
    from flataudit.tensors import as_pair, resolve_device, sample_keys

    use_tracking(request["tracking_uri"])
    source = ModelSource.from_dict(request["source"])
    data = load_data(request["heldout"], target=request["target"], source=source)
    model = load_model(source)
    classes = class_names(source, model) if data.y.dtype.kind == "U" else None
    subject = as_network(model, data.pair, None, request["family"])
    pair, _, names, _ = with_indices(subject.train, None, classes)
    x, y = as_pair(pair, "heldout")
    device = resolve_device(request["device"])
    prepared = prepare(subject.model, x, device)
    outputs = heldout_outputs(prepared.module, x.to(prepared.dtype, device))
    dispersion = request["dispersion"] or 1.0
    family = make_family(request["family"], y, outputs.shape[1], dispersion)
    if names is not None:
        names.check(outputs.shape[1], family.name)
    y = family.check(y, outputs.shape[1]).to(device)
    nll, se = mean_and_se(family.nll(outputs, y))
    if not (math.isfinite(nll) and math.isfinite(se)):
        raise NumericalError(
            f"expected finite losses on the heldout data, got a mean of {nll}; check the labels and"
            " the scale of the outputs"
        )
    log_p = log_probabilities(family, outputs)
    ratios = likelihood_ratios(family, outputs, y, dispersion)
    labels = None if ratios is None else UnseenLabels(sample_keys(x), ratios)
    return {
        "nll": nll,
        "nll_se": se,
        "accuracy": None if log_p is None else hit_rate(log_p, class_labels(y)),
        "n": len(y),
        "sha256": digest_of(data.x, data.y),
        "fresh_labels": fresh_labels.look(source.identity, family.name, labels),
    }


def observe(
    model_uri: str,
    heldout: str,
    *,
    target: str | None = None,
    device: str = "auto",
    audit_run_id: str | None = None,
    tracking_uri: str | None = None,
) -> Json:
    """Measures the held-out loss and records the observed gap beside the prediction.

    The observed gap is the held-out loss minus the audit's training loss, which counts as known;
    its standard error is that of the held-out loss, sd/sqrt(n).

    Args:
        model_uri: The model; the record is bound to its identity.
        heldout: Data as for `flataudit audit --heldout`.
        target: The target column of a table.
        device: auto, cpu or cuda.
        audit_run_id: An older audit of the same model to hold it against.
        tracking_uri: As for an audit.

    Returns:
        {uri, name, version, identity, audit_run_id, observation_run_id, predicted: {gap, low,
        high, estimator, confidence}, observed: {gap, se, nll, accuracy, n, sha256}, inside,
        fresh_labels, warnings}: fresh_labels as in an audit's report, warnings its alarm.

    Raises:
        InputError: no such model, no audit of it, data that do not fit it or are its training data.
        StoreError: MLflow cannot be read or written.
        AuditFailedError: the model's code crashed, which a child process runs.
    """
    from flataudit.models.registry import resolve

    use_tracking(tracking_uri)
    source = resolve(model_uri)
    audit = _audit_of(source, audit_run_id)
    report = read_report(audit)
    predicted = report["gap"]
    train_nll = report["train"]["nll"]
    if train_nll is None or predicted["value"] is None:
        raise InputError(
            f"expected a predicted gap in audit run {audit.run_id}, got none; audit {source.uri}"
            " again"
        )
    dispersion = report["dispersion"]
    request = {
        "source": source.to_dict(),
        "heldout": heldout,
        "target": target,
        "family": report["family"],
        "dispersion": None if dispersion is None else dispersion["value"],
        "device": device,
        "tracking_uri": tracking_uri,
    }
    found = stages.in_child("flataudit.observe:measure_here", request, AuditOptions())
    if found["sha256"] == report["data"]["sha256"]:
        raise InputError(
            f"expected data never used in training, got the training data of {source.uri} in"
            f" {heldout}; give other data"
        )
    record = found.pop("fresh_labels")
    gap, se = found["nll"] - train_nll, found["nll_se"]
    result: Json = {
        "uri": source.uri,
        "name": source.name,
        "version": source.version,
        "identity": source.identity,
        "audit_run_id": audit.run_id,
        "predicted": {
            "gap": predicted["value"],
            "low": predicted["low"],
            "high": predicted["high"],
            "estimator": predicted["estimator"],
            "confidence": report["confidence"],
        },
        "observed": {"gap": gap, "se": se, **{k: found[k] for k in found if k != "nll_se"}},
        "inside": _inside(predicted, gap, se),
        "fresh_labels": fresh_labels.shown(record),
        "warnings": fresh_labels.warnings_of(record),
        "observed_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    tags = {
        keys.RUN_ID: audit.run_id,
        keys.OBSERVED_SHA256: found["sha256"],
        keys.OBSERVED_AT: result["observed_at"],
        keys.FAMILY: report["family"],
        keys.ESTIMATOR: predicted["estimator"],
        keys.CONFIDENCE: report["confidence"],
        keys.WARNINGS: ", ".join(w["code"] for w in result["warnings"]),
    }
    with records.record_run(keys.OBSERVATIONS, source, "observe", tags) as (client, run_id):
        _log(client, run_id, source, audit, result, heldout)
        if record is not None:
            client.log_dict(run_id, record, keys.FRESH_LABELS)
    return result | {"observation_run_id": run_id}


def _audit_of(source: ModelSource, run_id: str | None) -> PastAudit:
    if run_id is None:
        return required_audit(source)
    from flataudit.audits import audit_of_run

    found = audit_of_run(run_id)
    if found.identity != source.identity:
        raise InputError(
            f"expected an audit of {source.uri} ({source.identity}), got run {run_id} of"
            f" {found.uri} ({found.identity}); see flataudit audits list"
        )
    return found


def _inside(predicted: Json, gap: float, se: float) -> bool | None:
    """Whether prediction and observation agree, at the level of the prediction's interval."""
    low, high = predicted["low"], predicted["high"]
    if low is None or high is None:
        return None
    return agree(float(predicted["value"]), low, high, gap, se)


def _log(
    client: MlflowClient,
    run_id: str,
    source: ModelSource,
    audit: PastAudit,
    result: Json,
    heldout: str,
) -> None:
    """Metrics on the observation's run and the logged model; the audit's run and the version."""
    from mlflow.entities import LoggedModelInput, Metric, Param, RunTag

    from flataudit.tracking import logged_model_id

    observed, predicted = result["observed"], result["predicted"]
    model_id = logged_model_id(client, source)
    now = int(time.time() * 1000)
    values = {
        keys.OBSERVED_GAP: observed["gap"],
        keys.OBSERVED_GAP_SE: observed["se"],
        keys.OBSERVED_NLL: observed["nll"],
        keys.OBSERVED_ACCURACY: observed["accuracy"],
        keys.OBSERVED_SAMPLES: float(observed["n"]),
    }
    labels = result["fresh_labels"]
    if labels is not None:
        values |= {keys.LABELS_COUNTED: float(labels["n"]), keys.LOG_E: labels["log_e"]}
    batch = [
        Metric(key, value, now, 0, model_id=model_id, run_id=run_id)
        for key, value in values.items()
        if value is not None
    ]
    ends = {"gap": "gap", "gap_low": "low", "gap_high": "high"}
    batch += [
        Metric(f"flataudit/{key}", predicted[name], now, 0)
        for key, name in ends.items()
        if predicted[name] is not None
    ]
    client.log_batch(run_id, metrics=batch, params=[Param("heldout", heldout[:500])])
    client.log_dict(run_id, result, f"{keys.ARTIFACTS}/observation.json")
    if model_id is not None:
        client.log_inputs(run_id, models=[LoggedModelInput(model_id)])
    text = f"{observed['gap']:.4f} +- {observed['se']:.4f} (n = {observed['n']})"
    shown = {keys.OBSERVED_TEXT: text, keys.OBSERVED_RUN: run_id}
    client.log_batch(audit.run_id, tags=[RunTag(key, value) for key, value in shown.items()])
    if source.name is not None and source.version is not None:
        for key, value in shown.items():
            client.set_model_version_tag(source.name, source.version, key, value)
