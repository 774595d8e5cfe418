"""Stores for what reads audits: registered models without networks, audits without computing.

Every version here is a real LoggedModel with an MLmodel file, and every audit is logged by
`tracking.log_audit`; only the report is made up and nothing is drawn.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient

from flataudit import keys, tracking
from flataudit.models.registry import ModelSource
from flataudit.results import (
    AuditReport,
    AuditWarning,
    Calibration,
    DataInfo,
    Estimate,
    Estimates,
    Fit,
    Gap,
    Interval,
    ModelInfo,
    PenaltyInfo,
    Samples,
    SolverInfo,
    to_json,
)
from flataudit.store import embedded_store, ensure_experiment, scratch_folder

SHA = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
ZEROS = np.zeros(3)


def make_report(
    gap: float = 0.05,
    se: float = 0.006,
    train_nll: float = 0.2,
    accuracy: float | None = 0.92,
    **changes: Any,
) -> dict[str, Any]:
    """A report's JSON; the interval is gap -+ 1.645 se. `changes`: fields of `AuditReport`, or
    of its parts as `calibration__verdict="miscalibrated"`."""
    margin = 1.6448536269514722 * se
    made = AuditReport(
        model=ModelInfo(n_params=200),
        data=DataInfo(n_samples=1000, n_outputs=3, sha256=SHA),
        family="categorical",
        dispersion=None,
        penalty=PenaltyInfo(
            value=1e-3, free_params=0, source="training", training=None, stationarity=0.1
        ),
        train=Fit(nll=train_nll, accuracy=None if accuracy is None else accuracy + 0.02),
        heldout=None,
        calibration=Calibration(
            evidence="loo", n=1000, verdict="calibrated", direction="none", severity="none",
            ece=0.01, mean_confidence=0.92, accuracy=accuracy, slope=0.98, slope_ci=(0.93, 1.03),
            confidence_gap=0.001, confidence_gap_ci=(-0.005, 0.007),
        ),
        estimates=Estimates(
            soft_rank=Estimate(gap=gap, se=se, rank=gap * 1000),
            tic=Estimate(gap=gap * 0.9, se=se),
        ),
        premise=None,
        gap=Gap(gap, gap - margin, gap + margin, 0.9, "soft_rank", "the model is calibrated"),
        predicted_test_nll=Interval(
            train_nll + gap, train_nll + gap - margin, train_nll + gap + margin
        ),
        predicted_accuracy=None
        if accuracy is None
        else Interval(accuracy, accuracy - 0.01, accuracy + 0.01),
        confidence="ok",
        warnings=(AuditWarning("high_leverage", "info", "3 samples have leverage above 1."),),
        solver=SolverInfo("primal", True, "P is small", "cpu", "float64", 0.1, 2**20),
        samples=Samples(nll=ZEROS, leverage=ZEROS, tic=ZEROS, loo=ZEROS),
    )  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            value = dataclasses.replace(getattr(made, part), **{field: value})
        made = dataclasses.replace(made, **{part: value})
    return made.to_dict()


def register(name: str, *, like_mlflow_2: bool = False) -> ModelSource:
    """A new version of the registered model `name` with a LoggedModel of its own."""
    client = MlflowClient()
    with suppress(mlflow.MlflowException):  # it exists
        client.create_registered_model(name)
    folder = Path(scratch_folder())
    lines = ["flavors:", "  pytorch:", "    model_data: data", "    pytorch_version: '2'"]
    if like_mlflow_2:
        (folder / "MLmodel").write_text("\n".join([*lines, f"utc_time_created: '{time.time()}'"]))
        run_id = client.create_run(ensure_experiment("training")).info.run_id
        client.log_artifacts(run_id, str(folder), "old")
        version = client.create_model_version(name, f"runs:/{run_id}/old", run_id=run_id)
        return _resolved(name, version.version)
    experiment = ensure_experiment("training")
    model = client.create_logged_model(experiment, name="model")
    lines += [f"model_id: {model.model_id}", f"artifact_path: {model.artifact_location}"]
    (folder / "MLmodel").write_text("\n".join(lines))
    client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    version = client.create_model_version(
        name, f"models:/{model.model_id}", model_id=model.model_id
    )
    return _resolved(name, version.version)


def _resolved(name: str, version: Any) -> ModelSource:
    from flataudit.models.registry import resolve

    return resolve(f"models:/{name}/{version}")


def log_report(
    source: ModelSource,
    report: Mapping[str, Any],
    *,
    run_tags: Mapping[str, str] | None = None,
    **options: Any,
) -> str:
    """Logs a made-up report as an audit of this model: everything but the pictures."""
    report = json.loads(json.dumps({**report, "model": {**report["model"],
                                                        **source.report_fields()}}))  # fmt: skip
    folder = Path(scratch_folder())
    (folder / Path(keys.REPORT).name).write_text(json.dumps(to_json(report)))
    with mock.patch.object(tracking, "rendered", return_value=str(folder)):
        options = {"train": "train.npz", **options}
        return tracking.log_audit(report, {}, source, options=options, run_tags=run_tags)


def backdate(run_id: str, audited_at: str) -> None:
    """Lets an audit run say that it was made at another time."""
    MlflowClient().set_tag(run_id, keys.AUDITED_AT, audited_at)


@contextmanager
def sqlite_uri() -> Iterator[str]:
    """The tracking URI of a new embedded store."""
    yield embedded_store(scratch_folder())


@contextmanager
def pointed_at(uri: str) -> Iterator[str]:
    """MLflow in this process pointed at a store, and at nothing afterwards."""
    from flataudit.store import use_tracking

    use_tracking(uri)
    try:
        yield uri
    finally:
        mlflow.set_tracking_uri(None)


# Where the tests of what reads audits run: on an embedded store; over HTTP, with MLflow's server on
# PostgreSQL, as people have it; and slowly, as a cross-check, with the server on sqlite.
STORES = [
    "sqlite",
    "postgresql",
    pytest.param("http", marks=pytest.mark.slow),
]
# For tests to which a store is where things stand, not what they are about.
EMBEDDED = [
    "sqlite",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("postgresql", "http")),
]


@contextmanager
def store_of(request: pytest.FixtureRequest) -> Iterator[str]:
    """The tracking URI of the store that `request.param` names, for a fixture over `STORES`.

    Servers are shared by all tests. Skips the test where there is no PostgreSQL.
    """
    if request.param == "sqlite":
        with sqlite_uri() as uri:
            yield uri
    else:
        fixture = {"http": "sqlite_url", "postgresql": "postgresql_url"}[request.param]
        yield str(request.getfixturevalue(fixture))


def gate_in_child(job: tuple[str, str, str, str]) -> dict[str, Any]:
    """One gate in a process of its own: its decision's JSON, or {"error": ...}."""
    from flataudit.gate import run_gate
    from flataudit.policy import parse_policy

    uri, model_uri, policy, alias = job
    try:
        decision = run_gate(model_uri, parse_policy(policy), alias=alias, tracking_uri=uri)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return decision.to_dict()
