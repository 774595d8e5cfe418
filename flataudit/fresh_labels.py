"""Labels that were never counted before, and the e-process over them: from audit to audit.

Each audit with held-out labels, and each `flataudit observe`, adds what is new to the e-process of
exactly this model (`ModelSource.identity`) and family (`flataudit.calibration.eprocess`). A label
is new where its sample's inputs have not been counted before (`flataudit.tensors.sample_keys`):
the same held-out set counts once, and of a file that grows the new rows alone. The labels have no
say in it, which keeps the e-process valid. Another model, as is another version, starts anew.

The state lies on the runs of audits and observations, as artifact `flataudit/fresh_labels.json`.
The finished run on which most labels are counted is the last one; a run that broke off does not
count.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flataudit import keys
from flataudit.calibration.eprocess import EProcess
from flataudit.errors import FlatauditError
from flataudit.results import UnseenLabels
from flataudit.retries import patient
from flataudit.store import one_line, scratch_folder, store_errors
from flataudit.versions import quoted

Json = dict[str, Any]
Keys = NDArray[np.uint64]

CODE = "calibration_refuted"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """What is counted so far: the state, the keys of its samples, and the run that holds it."""

    state: EProcess = field(default_factory=EProcess)
    keys: Keys = field(default_factory=lambda: np.empty(0, np.uint64))
    run_id: str | None = None


def last_run(identity: str, family: str) -> str | None:
    """The finished run with the last state of this model's e-process; None before the first.

    Raises:
        StoreError: MLflow cannot be read.
    """
    with store_errors(f"look for earlier labels of {identity}"):
        from mlflow import MlflowClient

        client = patient(MlflowClient())
        terms = [
            f"tags.`{keys.MODEL_ID}` = {quoted(identity)}",
            f"tags.`{keys.FAMILY}` = '{family}'",
            f"metrics.`{keys.LABELS_COUNTED}` > 0",
            "attributes.status = 'FINISHED'",
        ]
        known = (client.get_experiment_by_name(n) for n in (keys.EXPERIMENT, keys.OBSERVATIONS))
        runs = client.search_runs(
            [experiment.experiment_id for experiment in known if experiment is not None],
            " and ".join(terms),
            max_results=1,
            order_by=[f"metrics.`{keys.LABELS_COUNTED}` DESC", "attributes.start_time DESC"],
        )
    return str(runs[0].info.run_id) if runs else None


def read_counted(identity: str, family: str) -> Counted:
    """The last state of this model's e-process; a new one before the first label.

    Raises:
        StoreError: MLflow cannot be read, or the state is damaged.
        InputError: the state is of another version of flataudit.
    """
    run_id = last_run(identity, family)
    if run_id is None:
        return Counted()
    with store_errors(f"read the labels counted in run {run_id}"):
        from mlflow import MlflowClient

        client = patient(MlflowClient())
        path = client.download_artifacts(run_id, keys.FRESH_LABELS, scratch_folder())
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        counted = np.frombuffer(base64.b64decode(found["keys"]), "<u8").astype(np.uint64)
        return Counted(EProcess.from_dict(found), counted, run_id)


def counted_with(before: Counted, labels: UnseenLabels | None) -> Json:
    """The record after one more look: the state, what was new in it, and the keys.

    Args:
        before: What was counted before.
        labels: Of this held-out set; None where there is none.

    Returns:
        {n, looks, log_e, log_e_max, threshold, alarm, slope, slopes, log_ratios, fresh, known,
        continues, keys}: fresh, known: labels of this set that are new, and that are not;
        continues: the run of the state before.
    """
    fresh = np.empty(0, bool) if labels is None else ~np.isin(labels.keys, before.keys)
    state, known = before.state, before.keys
    if labels is not None and fresh.any():
        state = state.extended(labels.log_ratios[fresh])
        known = np.union1d(known, labels.keys[fresh])
    return {
        **state.to_dict(),
        "fresh": int(fresh.sum()),
        "known": int((~fresh).sum()),
        "continues": before.run_id,
        "keys": base64.b64encode(known.astype("<u8").tobytes()).decode(),
    }


def look(identity: str, family: str, labels: UnseenLabels | None) -> Json | None:
    """`counted_with` for this model; None where nothing was counted yet, or where that is unknown.

    A state that cannot be read is logged: to start anew would count labels twice.
    """
    try:
        before = read_counted(identity, family)
    except FlatauditError as error:
        log.warning("labels of %s are not counted: %s", identity, one_line(error))
        return None
    record = counted_with(before, labels)
    return record if record["n"] else None


def looked_again(record: Json | None, identity: str, family: str) -> Json | None:
    """The record, or, where another run has counted labels since it was made, that run's state.

    An estimate may be older than that run, as one that Prefect kept. Its labels are then left
    out, which they may be, because that is decided without them.

    Raises:
        StoreError: MLflow cannot be read.
    """
    if not (record and record["fresh"]) or last_run(identity, family) == record["continues"]:
        return record
    left_out = record["fresh"] + record["known"]
    now = look(identity, family, None)
    return None if now is None else {**now, "known": left_out}


def shown(record: Mapping[str, Any] | None) -> Json | None:
    """The record as the report shows it: without the keys."""
    return None if record is None else {k: v for k, v in record.items() if k != "keys"}


def warnings_of(found: Mapping[str, Any] | None) -> list[Json]:
    """The warning `calibration_refuted` where the e-process has raised its alarm.

    Severity: high where the slope that fits best is below .8, warn for other slopes below 1 (the
    model is over-confident), info where the model is under-confident, as elsewhere.
    """
    from flataudit.calibration import CalibrationPolicy
    from flataudit.report import words

    if not found or not found["alarm"]:
        return []
    slope = float(found["slope"])
    severity = "info"
    if slope < 1.0:
        severity = "high" if slope < CalibrationPolicy().high_slope else "warn"
    return [{"code": CODE, "severity": severity, "message": words.fresh_labels_message(found)}]
