"""The three stages that every shell runs: load, estimate, log. JSON in, JSON out.

The command line calls them in order; the Prefect flow wraps each into a task. Nothing is written
before the estimate is complete, and a failure that is not the user's leaves an error on record.
The code of models and of data functions runs in a child process only (`flataudit.isolation`).
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flataudit import isolation, keys
from flataudit.config import AuditOptions, make_options
from flataudit.errors import AuditFailedError, FlatauditError, InputError, StoreError
from flataudit.logs import stage

if TYPE_CHECKING:
    from flataudit.data import Dataset
    from flataudit.models.registry import ModelSource

Json = dict[str, Any]
Progress = Callable[..., None]

GRACE = 0.7  # seconds that a stopped audit has to write its checkpoint
MEMORY_VARIABLE = "FLATAUDIT_MEMORY_LIMIT"
# What an audit imports, and what takes long among that which its libraries import only when used.
PRELOAD = (
    "flataudit.stages",
    "flataudit.audit",
    "flataudit.data",
    "flataudit.models.classes",
    "flataudit.models.registry",
    "flataudit.provenance",
    "alembic.command",
    "netcal.metrics",
    "mlflow",
    "mlflow.pytorch",
    "mlflow.sklearn",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.store.model_registry.sqlalchemy_store",
    "pandas",
    "pyarrow.parquet",
    "scipy.linalg",
    "scipy.optimize",
    "scipy.special",
    "scipy.stats",
    "skops.io",
    "sqlalchemy.dialects.sqlite",
    "torch.export",
    "torch.func",
    "torch.nn.attention",
)


def prestart() -> None:
    """Starts the imports of the audit's process while this one looks the model up."""
    isolation.prestart(PRELOAD)


def load(model_uri: str, train: str, heldout: str | None, options: Json) -> Json:
    """Resolves the model, downloads it where needed, and checks what costs nothing to check.

    Returns {audit_id, source, train, heldout, training, seconds}; training is the record given,
    None where it is read from the source run. The data are read once, by `estimate`. By audit_id
    `log`, called again, finds the run that it began.

    Raises:
        InputError: no such model, version or file, or a training record that is not one.
        StoreError: MLflow cannot be reached.
    """
    from flataudit.data import check_data
    from flataudit.models import registry
    from flataudit.store import use_tracking
    from flataudit.training import parse_training

    started = time.perf_counter()
    with stage("load", model_uri):
        chosen = AuditOptions(**options)
        _memory_limit(chosen)
        use_tracking(chosen.tracking_uri)
        source = registry.resolve(model_uri)
        for data in filter(None, (train, heldout)):
            check_data(data)
        given = chosen.training if chosen.training != "auto" else None
        return {
            "audit_id": uuid.uuid4().hex,
            "source": source.to_dict(),
            "train": train,
            "heldout": heldout or None,
            "training": None if given is None else parse_training(given).to_record(),
            "seconds": time.perf_counter() - started,
        }


def estimate(loaded: Json, options: Json, progress: Progress | None = None) -> Json:
    """Audits the loaded model in a child process.

    Returns {report, display, seconds, fresh_labels, resources}. fresh_labels: the e-process over
    all held-out labels of this model, these among them (`flataudit.fresh_labels`), None without
    any. resources: `flataudit/estimate_seconds`, the start of the child included, and
    `flataudit/peak_bytes`, the most RAM that it held; by the names of their metrics.
    loaded["gpu"]: the index of the GPU to use, where there are several.

    Raises:
        DeadlineError: load and estimate together took longer than `deadline`; the child and all
            processes that it started were killed.
        MemoryLimitError: they held more than `memory_limit`, else FLATAUDIT_MEMORY_LIMIT.
        AuditFailedError: the child crashed.
    """
    chosen = AuditOptions(**options)
    request = {"loaded": loaded, "options": options, "memory_limit": _memory_limit(chosen)}
    used: dict[str, int] = {}
    started = time.perf_counter()
    with stage("estimate", loaded["source"]["uri"]) as told:
        found = in_child(
            "flataudit.stages:estimate_here",
            request,
            chosen,
            spent=loaded["seconds"],
            progress=progress,
            used=used,
        )
        told.update(used)
    resources: Json = {keys.ESTIMATE_SECONDS: time.perf_counter() - started}
    if "peak_bytes" in used:
        resources[keys.PEAK_BYTES] = used["peak_bytes"]
    return found | {"resources": resources}


def in_child(
    function: str,
    request: Json,
    options: AuditOptions,
    *,
    spent: float = 0.0,
    progress: Progress | None = None,
    used: dict[str, int] | None = None,
) -> Json:
    """Runs `module:function` of the package, JSON in and JSON out, within deadline and memory.

    spent: seconds of the deadline that are gone already.
    """
    found: Json = isolation.run(
        function,
        request,
        deadline=options.deadline,
        spent=spent,
        memory_limit=_memory_limit(options),
        grace=GRACE if options.checkpoint else 0.0,
        progress=progress,
        preload=PRELOAD,
        name="the audit",
        used=used,
    )
    return found


def log(loaded: Json, result: Json, options: Json) -> str:
    """Writes run, metrics, artifacts and, last, the version's verdict; returns the run id."""
    from flataudit import tracking

    source = open_source(loaded, AuditOptions(**options))
    with stage("log", source.uri) as told:
        run_id = tracking.log_audit(
            result["report"],
            result["display"],
            source,
            options=_asked(loaded, options),
            duration=result["seconds"],
            resources={keys.LOAD_SECONDS: loaded.get("seconds"), **result.get("resources", {})},
            run_tags=loaded.get("run_tags"),
            audit_id=loaded.get("audit_id"),
            history=result.get("history"),
            fresh_labels=result.get("fresh_labels"),
        )
        told["run_id"] = run_id
    return run_id


def log_failure(loaded: Json, error: str, options: Json) -> None:
    """Records that the audit failed: an error run and the verdict `error`."""
    from flataudit import tracking

    source = open_source(loaded, AuditOptions(**options))
    asked, tags = _asked(loaded, options), loaded.get("run_tags")
    tracking.log_error(source, error, options=asked, run_tags=tags, audit_id=loaded.get("audit_id"))


@dataclass(frozen=True, slots=True)
class Stages:
    """The stage functions; the flow replaces each by a task around it."""

    load: Callable[[str, str, str | None, Json], Json] = load
    estimate: Callable[[Json, Json], Json] = estimate
    log: Callable[[Json, Json, Json], str] = log


def run_audit(
    model_uri: str,
    train: str,
    heldout: str | None,
    options: AuditOptions,
    *,
    stages: Stages | None = None,
    write: bool = True,
) -> Json:
    """One audit from URI to MLflow: {report, display, seconds, resources, run_id}.

    run_id is None where write=False.

    Raises:
        InputError: bad input; nothing was written.
        StoreError: MLflow failed, in whichever stage; the old verdict stands.
        AuditFailedError, DeadlineError, NumericalError: the error is on record in MLflow.
    """
    stages = stages or Stages()
    values = options.model_dump()
    loaded = stages.load(model_uri, train, heldout, values)
    try:
        result = stages.estimate(loaded, values)
    except (InputError, StoreError):  # a store's failure says nothing about the model
        raise
    except Exception as error:
        failure = error if isinstance(error, FlatauditError) else _failed(error)
        if write:
            log_failure(loaded, str(failure), values)
        if failure is error:
            raise
        raise failure from error
    history = _history(loaded, options)
    result = _compared(_with_all_labels(result, loaded, options), history)
    run_id = stages.log(loaded, {**result, "history": history}, values) if write else None
    # The report has the labels' e-process, without the keys of the samples.
    shown = {key: value for key, value in result.items() if key != "fresh_labels"}
    return {**shown, "run_id": run_id}


def _with_all_labels(result: Json, loaded: Json, options: AuditOptions) -> Json:
    """The result with the e-process over the labels of all audits of this model, and its alarm."""
    report, record = result["report"], result.get("fresh_labels")
    if record is None and not report.get("fresh_labels"):
        return result
    if record is None:  # the earlier ones cannot be read: these alone would be misread
        return {**result, "report": {**report, "fresh_labels": None}}
    from flataudit import fresh_labels

    source = open_source(loaded, options)
    record = fresh_labels.looked_again(record, source.identity, report["family"])
    shown = fresh_labels.shown(record)
    found = fresh_labels.warnings_of(shown)
    report = {**report, "fresh_labels": shown, "warnings": [*found, *report["warnings"]]}
    return {**result, "report": report, "fresh_labels": record}


def _history(loaded: Json, options: AuditOptions) -> list[Json]:
    """The earlier audits of the registered model, newest first."""
    name = loaded["source"].get("name")
    if name is None:
        return []
    from flataudit.history import earlier_audits
    from flataudit.store import use_tracking

    use_tracking(options.tracking_uri)
    return earlier_audits(name)


def _compared(result: Json, history: list[Json]) -> Json:
    """The result with the warning of a regression against the registered model's last audit."""
    if not history:
        return result
    from flataudit.regression import regression_warnings

    report = result["report"]
    found = regression_warnings(report, history)
    return {**result, "report": {**report, "warnings": [*found, *report["warnings"]]}}


def _asked(loaded: Json, options: Json) -> Json:
    """What was asked for, as the audit run's params and inputs show it."""
    return options | {"train": loaded["train"], "heldout": loaded["heldout"]}


def _memory_limit(chosen: AuditOptions) -> int | None:
    """The option, else the environment of the machine that audits."""
    if chosen.memory_limit is not None:
        return chosen.memory_limit
    given = os.environ.get(MEMORY_VARIABLE)
    return make_options({"memory_limit": given}, MEMORY_VARIABLE).memory_limit


def _failed(error: Exception) -> AuditFailedError:
    reason = " ".join(str(error).split())[:300]
    return AuditFailedError(
        f"expected the audit to complete, got {type(error).__name__}: {reason}; run it in Python"
        " with flataudit.audit for the traceback"
    )


# --- in the child process -------------------------------------------------------------------------


def gpus_here(request: Json, progress: Progress) -> Json:
    """{gpus: how many torch sees}."""
    import torch

    return {"gpus": torch.cuda.device_count()}


def _use_gpu(index: int) -> None:
    """Lets "cuda" mean that GPU in this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(index)


def open_source(loaded: Json, options: AuditOptions) -> ModelSource:
    """The model that `load` found, with MLflow pointed at its store."""
    from flataudit.models.registry import ModelSource
    from flataudit.store import use_tracking

    use_tracking(options.tracking_uri)
    return ModelSource.from_dict(loaded["source"])


def read_data(data: str, options: AuditOptions, source: ModelSource) -> Dataset:
    """The data of that name, as these options mean it."""
    from flataudit.columns import own_column
    from flataudit.data import load_data

    own = own_column(options.slices)
    return load_data(data, target=options.target, source=source, slices=own)


def read_record(
    loaded: Json, options: AuditOptions, source: ModelSource, n_samples: int
) -> tuple[Json | None, str]:
    """The training record, given or read from the source run, and where it came from."""
    from flataudit.models.registry import training_record

    if options.training != "auto":
        return loaded["training"], "argument"
    record, origin = training_record(source, n_samples)
    return None if record is None else record.to_record(), origin


def estimate_here(asked: Json, progress: Progress) -> Json:
    """`estimate` in this process: the model's code runs here, and whatever it does stays done."""
    from flataudit import fresh_labels
    from flataudit.audit import audit
    from flataudit.columns import read_slices
    from flataudit.memory import limited_to
    from flataudit.models.classes import class_names
    from flataudit.models.registry import load_model
    from flataudit.provenance import data_warnings

    started = time.perf_counter()
    loaded, chosen = asked["loaded"], AuditOptions(**asked["options"])
    if loaded.get("gpu") is not None:
        _use_gpu(loaded["gpu"])
    source = open_source(loaded, chosen)
    model = load_model(source)
    train = read_data(loaded["train"], chosen, source)
    heldout = read_data(loaded["heldout"], chosen, source) if loaded["heldout"] else None
    training, origin = read_record(loaded, chosen, source, len(train.y))
    classes = class_names(source, model) if train.y.dtype.kind == "U" else None
    stage = [""]

    def say(text: str) -> None:
        stage.append(text)
        progress(text)

    with limited_to(asked["memory_limit"]):
        found = audit(
            model,
            train.pair,
            heldout=None if heldout is None else heldout.pair,
            family=chosen.family,
            penalty=chosen.penalty,
            dispersion=chosen.dispersion,
            training=training,
            curvature=chosen.curvature,
            solver=chosen.solver,
            device=chosen.device,
            seed=chosen.seed,
            recalibrate=chosen.recalibrate,
            sensitivity=chosen.sensitivity,
            progress=say,
            steps=lambda done, expected: progress(stage[-1], done, expected),
            checkpoint=chosen.checkpoint,
            classes=classes,
            slices=read_slices(chosen.slices, train),
        )
    report = found.to_dict()
    report["model"] |= source.report_fields()
    report["warnings"] = data_warnings(report, train, source) + report["warnings"]
    labels = fresh_labels.look(source.identity, found.family, found.unseen)
    if report["penalty"]["source"] == "evidence":
        report["penalty"]["assumptions"].append(f"no training record: {origin}")
    seconds = time.perf_counter() - started
    return {
        "report": report,
        "display": dict(found.display),
        "seconds": seconds,
        "fresh_labels": labels,
    }
