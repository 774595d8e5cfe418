"""The three stages that every shell runs: load, estimate, log. JSON in, JSON out.

The command line calls them in order; the Prefect flow wraps each into a task. Nothing is written
before the estimate is complete, and a failure that is not the user's leaves an error on record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flataudit import errors
from flataudit.config import AuditOptions
from flataudit.errors import AuditFailedError, DeadlineError, FlatauditError, InputError

Json = dict[str, Any]
Progress = Callable[[str], None]


def load(model_uri: str, train: str, heldout: str | None, options: Json) -> Json:
    """Resolves the model and checks the data and the training record; downloads what is needed.

    Returns {source, train, heldout, training, training_origin}.

    Raises:
        InputError: no such model, version, file or column.
        StoreError: MLflow cannot be reached.
    """
    from flataudit.data import load_data
    from flataudit.models import registry
    from flataudit.store import use_tracking
    from flataudit.training import parse_training

    chosen = AuditOptions(**options)
    use_tracking(chosen.tracking_uri)
    source = registry.resolve(model_uri)
    data = load_data(train, target=chosen.target, source=source)
    if heldout:
        load_data(heldout, target=chosen.target, source=source)
    training: Json | None = None
    origin = "argument"
    if chosen.training == "auto":
        record, origin = registry.training_record(source, len(data.y))
        training = None if record is None else record.to_record()
    elif chosen.training is not None:
        training = parse_training(chosen.training).to_record()
    return {
        "source": source.to_dict(),
        "train": train,
        "heldout": heldout or None,
        "training": training,
        "training_origin": origin,
    }


def estimate(loaded: Json, options: Json, progress: Progress | None = None) -> Json:
    """Audits the loaded model: {report, display, seconds}; in a child process under a deadline.

    Raises:
        DeadlineError: the audit ran past `deadline` seconds and its process was killed (torch
            does not stop on a timeout from within).
    """
    deadline = AuditOptions(**options).deadline
    return (
        _estimate(loaded, options, progress)
        if deadline is None
        else _estimate_within(deadline, loaded, options)
    )


def log(loaded: Json, result: Json, options: Json) -> str:
    """Writes run, metrics, artifacts and, last, the version's verdict; returns the run id."""
    from flataudit import tracking
    from flataudit.models.registry import ModelSource
    from flataudit.store import use_tracking

    use_tracking(AuditOptions(**options).tracking_uri)
    source = ModelSource.from_dict(loaded["source"])
    return tracking.log_audit(
        result["report"],
        result["display"],
        source,
        options=_asked(loaded, options),
        duration=result["seconds"],
        run_tags=loaded.get("run_tags"),
    )


def log_failure(loaded: Json, error: str, options: Json) -> None:
    """Records that the audit failed: an error run and the verdict `error`."""
    from flataudit import tracking
    from flataudit.models.registry import ModelSource
    from flataudit.store import use_tracking

    use_tracking(AuditOptions(**options).tracking_uri)
    source = ModelSource.from_dict(loaded["source"])
    asked, tags = _asked(loaded, options), loaded.get("run_tags")
    tracking.log_error(source, error, options=asked, run_tags=tags)


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
    """One audit from URI to MLflow: {report, display, run_id}; run_id is None where write=False.

    Raises:
        InputError: bad input; nothing was written.
        StoreError: MLflow failed; the old verdict stands.
        AuditFailedError, DeadlineError, NumericalError: the error is on record in MLflow.
    """
    stages = stages or Stages()
    values = options.model_dump()
    loaded = stages.load(model_uri, train, heldout, values)
    try:
        result = stages.estimate(loaded, values)
    except InputError:
        raise
    except Exception as error:
        failure = error if isinstance(error, FlatauditError) else _failed(error)
        if write:
            log_failure(loaded, str(failure), values)
        raise failure from error
    run_id = stages.log(loaded, result, values) if write else None
    return {**result, "run_id": run_id}


def _asked(loaded: Json, options: Json) -> Json:
    """What was asked for, as the audit run's params and inputs show it."""
    return options | {"train": loaded["train"], "heldout": loaded["heldout"]}


def _estimate(loaded: Json, options: Json, progress: Progress | None = None) -> Json:
    from flataudit.audit import audit
    from flataudit.data import load_data
    from flataudit.models.classes import class_names
    from flataudit.models.registry import ModelSource, load_model
    from flataudit.provenance import data_warnings
    from flataudit.store import use_tracking

    started = time.perf_counter()
    chosen = AuditOptions(**options)
    use_tracking(chosen.tracking_uri)
    source = ModelSource.from_dict(loaded["source"])
    model = load_model(source)
    train = load_data(loaded["train"], target=chosen.target, source=source)
    heldout = None
    if loaded["heldout"]:
        heldout = load_data(loaded["heldout"], target=chosen.target, source=source)
    classes = class_names(source, model) if train.y.dtype.kind == "U" else None
    found = audit(
        model,
        train.pair,
        heldout=None if heldout is None else heldout.pair,
        family=chosen.family,
        penalty=chosen.penalty,
        dispersion=chosen.dispersion,
        training=loaded["training"],
        curvature=chosen.curvature,
        solver=chosen.solver,
        device=chosen.device,
        seed=chosen.seed,
        recalibrate=chosen.recalibrate,
        sensitivity=chosen.sensitivity,
        progress=progress,
        classes=classes,
    )
    report = found.to_dict()
    report["model"] |= source.report_fields()
    report["warnings"] = data_warnings(report, train, source) + report["warnings"]
    if report["penalty"]["source"] == "evidence":
        report["penalty"]["assumptions"].append(f"no training record: {loaded['training_origin']}")
    seconds = time.perf_counter() - started
    return {"report": report, "display": dict(found.display), "seconds": seconds}


def _estimate_within(deadline: float, loaded: Json, options: Json) -> Json:
    with tempfile.TemporaryDirectory(prefix="flataudit-") as folder:
        request, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        request.write_text(json.dumps({"loaded": loaded, "options": options}), encoding="utf-8")
        files = [str(request), str(answer)]
        command = [sys.executable, "-m", "flataudit.stages", *files, str(os.getpid())]
        try:
            child = subprocess.run(
                command, timeout=deadline, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except subprocess.TimeoutExpired:
            raise DeadlineError(
                f"expected the audit to end within {deadline:g} s, got no result by then and"
                " stopped it; raise --deadline or audit fewer samples"
            ) from None
        if not answer.exists():
            last = child.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise AuditFailedError(
                f"expected a result from the audit's process, got exit code {child.returncode}"
                f" ({' '.join(last)[:200]}); likely out of memory: audit fewer samples"
            )
        result: Json = json.loads(answer.read_text(encoding="utf-8"))
    if "error" in result:
        raise getattr(errors, result["error"])(result["message"])
    return result


def _failed(error: Exception) -> AuditFailedError:
    reason = " ".join(str(error).split())[:300]
    return AuditFailedError(
        f"expected the audit to complete, got {type(error).__name__}: {reason}; run it in Python"
        " with flataudit.audit for the traceback"
    )


def _child(request: Path, answer: Path) -> None:
    """The child of `_estimate_within`: writes the answer, or the error by its class."""
    asked = json.loads(request.read_text(encoding="utf-8"))
    result: Json
    try:
        result = _estimate(asked["loaded"], asked["options"])
    except FlatauditError as error:
        result = {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        result = {"error": "AuditFailedError", "message": str(_failed(error))}
    part = answer.with_suffix(".part")
    part.write_text(json.dumps(result, allow_nan=False), encoding="utf-8")
    os.replace(part, answer)


def _end_after(parent: int) -> None:
    """Ends this process when its parent has gone, who alone keeps the deadline."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_after, args=(int(sys.argv[3]),), daemon=True).start()
    _child(Path(sys.argv[1]), Path(sys.argv[2]))
