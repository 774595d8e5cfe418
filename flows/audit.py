"""The audit as a Prefect flow: load -> calibrate and estimate -> log, three tasks, JSON results.

Runs on the embedded server by default, against another by PREFECT_API_URL alone. The stages and
their order are those of the command line (`flataudit.stages.run_audit`).
"""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.events import emit_event

from flataudit import stages
from flataudit.config import make_options
from flataudit.report import words
from flataudit.store import without_password
from flows.gpu import gpu_slot

Json = dict[str, Any]


@task(name="load", persist_result=True, result_serializer="json")
def load_task(model_uri: str, train: str, heldout: str | None, options: Json) -> Json:
    """Resolves model, data and training record."""
    return stages.load(model_uri, train, heldout, options)


@task(name="estimate", persist_result=True, result_serializer="json")
def estimate_task(loaded: Json, options: Json) -> Json:
    """Audits the model: report and display. One that may use a GPU waits until one is free."""
    with gpu_slot(options["device"]) as gpu:
        return stages.estimate(loaded | {"gpu": gpu}, options)


@task(name="log", persist_result=True, result_serializer="json")
def log_task(loaded: Json, result: Json, options: Json) -> str:
    """Writes the result to MLflow, emits the verdict as an event; returns the run id."""
    run_id = stages.log(loaded, result, options)
    emit_verdict(loaded["source"]["uri"], result["report"], run_id)
    return run_id


def emit_verdict(uri: str, report: Json, run_id: str) -> None:
    """Prefect events about the resource `flataudit.model.URI`: `flataudit.verdict.VERDICT`, and
    `flataudit.warning.CODE` for each warning above info.

    For automations, which alert on them; an event that cannot be sent is no reason to fail.
    """
    name = without_password(uri)
    resource = {"prefect.resource.id": f"flataudit.model.{name}", "prefect.resource.name": name}
    found = words.sorted_warnings(report)
    payload = {
        "run_id": run_id,
        "gap": words.gap_text(report),
        "confidence": report["confidence"],
        "warnings": ", ".join(w["code"] for w in found),
    }
    emit_event(
        event=f"flataudit.verdict.{words.verdict(report)}", resource=resource, payload=payload
    )
    for warning in found:
        if warning["severity"] not in ("none", "info"):
            emit_event(
                event=f"flataudit.warning.{warning['code']}",
                resource=resource,
                payload={**payload, "message": without_password(warning["message"])},
            )


@flow(
    name="flataudit-audit", persist_result=True, result_serializer="json", validate_parameters=False
)
def audit_flow(
    model_uri: str,
    train: str,
    heldout: str | None = None,
    target: str | None = None,
    family: str = "auto",
    penalty: float | str | dict[str, float] = "auto",
    dispersion: float | str = "auto",
    training: str | dict[str, Any] | None = "auto",
    curvature: str = "ggn",
    solver: str = "auto",
    device: str = "auto",
    seed: int = 0,
    recalibrate: bool = False,
    sensitivity: str | bool = "auto",
    slices: str | None = None,
    deadline: float = 86400.0,
    memory_limit: int | str | None = None,
    checkpoint: str | None = None,
    tracking_uri: str | None = None,
) -> Json:
    """One audit; options and errors as on the command line.

    Returns:
        {report, display, seconds, resources, run_id}: the contract's report JSON, what the figures
        show, the audit's time and memory, and the MLflow run.
    """
    options = make_options(
        {
            "target": target,
            "family": family,
            "penalty": penalty,
            "dispersion": dispersion,
            "training": training,
            "curvature": curvature,
            "solver": solver,
            "device": device,
            "seed": seed,
            "recalibrate": recalibrate,
            "sensitivity": sensitivity,
            "slices": slices,
            "deadline": deadline,
            "memory_limit": memory_limit,
            "checkpoint": checkpoint,
            "tracking_uri": tracking_uri,
        },
        "flow parameters",
    )
    as_tasks = stages.Stages(load=load_task, estimate=estimate_task, log=log_task)
    return stages.run_audit(model_uri, train, heldout, options, stages=as_tasks)
