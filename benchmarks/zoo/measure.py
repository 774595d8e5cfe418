"""Measures every registered model: its true gap, and what each estimate says at each penalty.

    python -m benchmarks.zoo.measure [--quick] [--store FOLDER] [--data FOLDER]

One row per model, written as soon as it is known, so that a stopped run goes on where it was; at
the end all rows become one parquet, with the environment in its metadata. Columns:

    the cell's fields; n_params, n_train, n_rows, train_nll, train_accuracy
    gap, gap_se, test_accuracy, test_mean_confidence   the truth, from the test pool; gap_se is its
        standard error from the test samples, floor that of what n training samples allow,
        sd(l_loo)/sqrt(n)
    SOURCE_ESTIMATE, SOURCE_ESTIMATE_se           soft_rank, tic, loo, soft_rank_recalibrated;
        SOURCE: record (what training did), decay (the objective's weight decay alone), evidence
    EVIDENCE_verdict, _direction, ...             calibration by heldout and by loo samples, and
        the gap that the audit chose with it: EVIDENCE_gap, _low, _high, _estimator, _confidence
    held_gap, held_gap_se                         what the held-out labels alone say of the gap
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.machine import machine
from benchmarks.zoo.data import Pool, Unavailable
from benchmarks.zoo.draw import Drawn, draw
from benchmarks.zoo.fit import flat
from benchmarks.zoo.grid import Cell, by_name
from benchmarks.zoo.store import (
    fields,
    open_store,
    read_rows,
    registered_uri,
    row_path,
    sources_of,
    write_row,
)
from flataudit import AuditReport, FlatauditError, audit
from flataudit.calibration import is_saturated
from flataudit.families import Family, log_probabilities, make_family
from flataudit.models.sklearn import as_network

Json = dict[str, Any]

KIND = "measured"
RESULTS = Path(__file__).parent / "results.parquet"
LONG_AGO = 1e9  # a training time whose 1/T is no penalty: what is left is the weight decay
ESTIMATES = ("soft_rank", "tic", "loo", "soft_rank_recalibrated")
SOURCES = ("record", "decay", "evidence")
FAMILY = {"classification": "auto", "regression": "gaussian", "counts": "poisson"}


def measure_cell(name: str, options: Json) -> Json:
    """Measures one registered cell and writes its row; {name, state, seconds}."""

    def row(cell: Cell, uri: str, model: Any, record: Json | None, drawn: Drawn) -> Json:
        return fields(cell) | {"uri": uri} | measure(cell, model, record, drawn)

    return registered_cell(name, options, KIND, row, "seconds")


def registered_cell(
    name: str, options: Json, kind: str, row_of: Callable[..., Json], seconds: str
) -> Json:
    """Writes the row that `row_of(cell, uri, model, record, drawn)` gives of a registered cell.

    The row also holds its time under the name `seconds`. What is done is skipped.

    Returns:
        {name, state: done|skipped|not trained|unavailable, seconds|error}.
    """
    torch.set_num_threads(1)
    cell = by_name()[name]
    path = row_path(options["store"], kind, cell)
    if path.is_file():
        return {"name": name, "state": "skipped"}
    client = open_store(options["store"])
    uri = registered_uri(client, cell)
    if uri is None:
        return {"name": name, "state": "not trained"}
    started = time.perf_counter()
    try:
        drawn = draw(cell, sources_of(options))
    except Unavailable as missing:
        return {"name": name, "state": "unavailable", "error": str(missing)}
    row = row_of(cell, uri, *load(client, uri), drawn)
    row[seconds] = time.perf_counter() - started
    write_row(path, row)
    return {"name": name, "state": "done", "seconds": row[seconds]}


def load(client: Any, uri: str) -> tuple[Any, Json | None]:
    """The registered model and its training record (None for scikit-learn's)."""
    import mlflow

    from flataudit.models.registry import load_model, resolve
    from flataudit.training import TRAINING_ARTIFACT

    source = resolve(uri)
    model = load_model(source)
    if not isinstance(model, torch.nn.Module):
        return model, None
    version = client.get_model_version(*uri.removeprefix("models:/").rsplit("/", 1))
    record: Json = mlflow.artifacts.load_dict(f"runs:/{version.run_id}/{TRAINING_ARTIFACT}")
    return model, record


def measure(cell: Cell, model: Any, record: Json | None, drawn: Drawn) -> Json:
    """The row of one model, apart from its cell."""
    family = FAMILY[drawn.pools.task]
    train, heldout, test = (pair(cell, part) for part in (drawn.train, drawn.heldout, drawn.test))
    reports = {source: attempt(asked) for source, asked in
               audits(model, record, train, family).items()}  # fmt: skip
    report = reports["record"][0]
    row: Json = {"record_error": reports["record"][1]}
    if report is None:  # nothing to compare the truth with, which needs the dispersion too
        return row
    n = report.data.n_samples
    held = attempt(lambda: with_heldout(report, model, record, train, heldout, family))
    row |= {
        "task": drawn.pools.task,
        "n_params": report.model.n_params,
        "n_train": n,
        "n_outputs": report.data.n_outputs,
        "n_rows": n * (report.data.n_outputs - (report.family == "categorical")),
        "dispersion": None if report.dispersion is None else report.dispersion.value,
        "n_test": len(drawn.test),
        "n_heldout": len(drawn.heldout),
        "train_nll": report.train.nll,
        "train_accuracy": report.train.accuracy,
        "floor": float(np.std(report.samples.nll + report.samples.loo, ddof=1)) / math.sqrt(n),
        "heldout_error": held[1],
        "solver": report.solver.name,
        "audit_seconds": report.solver.seconds,
    }
    row |= truth(model, train, test, family, report)
    for source, (found, error) in reports.items():
        row |= _estimates(source, found, error)
    row |= _judged("loo", report)
    if held[0] is not None and held[0].heldout is not None:
        row |= _judged("heldout", held[0])
        row |= {"held_gap": held[0].heldout.gap, "held_gap_se": held[0].heldout.gap_se}
    return {key: _plain(value) for key, value in row.items()}


def audits(
    model: Any, record: Json | None, train: Any, family: str
) -> dict[str, Callable[[], AuditReport]]:
    """An audit for each source of the penalty.

    The weight decay alone is the record after an endless training; for the evidence an estimator
    is audited as its torch twin, which has no penalty of its own. A GLM's record is its penalty.
    """
    twin, x = model, train
    given = family
    if record is None:
        subject = as_network(model, train, None, family)
        twin, x, given = subject.model, subject.train, subject.family

    def asked(which: Any, data: Any, name: str, **options: Any) -> Callable[[], AuditReport]:
        return lambda: audit(
            which, data, family=name, recalibrate=True, sensitivity=False, **options
        )

    first = asked(model, train, family, training=record)
    endless = None if record is None else asked(model, train, family, training=without_time(record))
    return {"record": first} | ({"decay": endless} if endless else {}) | {
        "evidence": asked(twin, x, given)
    }  # fmt: skip


def without_time(record: Json) -> Json:
    """The record with a training time of LONG_AGO in place of its own."""
    kept = {
        k: v
        for k, v in record.items()
        if k not in ("lr", "steps", "schedule", "time", "warmup_steps")
    }
    if any("lr" in g or "sum_lr" in g or "time" in g for g in kept.get("groups") or ()):
        raise ValueError("expected one learning rate for all parameters, got groups of them")
    return kept | {"sum_lr": LONG_AGO}


def with_heldout(
    report: AuditReport, model: Any, record: Json | None, train: Any, unseen: Any, family: str
) -> AuditReport:
    """The audit at the record's penalty with `unseen` as held-out data.

    The dispersion is the first audit's, so that both speak of the same loss.
    """
    given = "auto" if report.dispersion is None else report.dispersion.value
    return audit(
        model,
        train,
        heldout=unseen,
        family=family,
        training=record,
        dispersion=given,
        sensitivity=False,
    )


def truth(model: Any, train: Any, test: Any, family: str, report: AuditReport) -> Json:
    """The gap on the test pool with its standard error, accuracy and mean confidence there."""
    dispersion = 1.0 if report.dispersion is None else report.dispersion.value
    outputs, y = outputs_of(model, test, train, family)
    likelihood = make_family(report.family, y, outputs.shape[1], dispersion)
    nll = likelihood.nll(outputs, likelihood.check(y, outputs.shape[1]))
    row: Json = {
        "gap": float(nll.mean()) - report.train.nll,
        "gap_se": float(nll.std(correction=1)) / math.sqrt(len(nll)),
    }
    log_p = log_probabilities(likelihood, outputs)
    if log_p is not None:
        confidence, top = log_p.exp().max(dim=1)
        row["test_accuracy"] = float((top == y.reshape(-1)).double().mean())
        row["test_mean_confidence"] = float(confidence.mean())
    return row


def nll_of(model: Any, data: Any, train: Any, family: str, likelihood: Family) -> Any:
    """The NLL of each sample of `data` under a model fitted to `train`, (m,)."""
    outputs, y = outputs_of(model, data, train, family)
    return likelihood.nll(outputs, likelihood.check(y, outputs.shape[1])).numpy()


def outputs_of(model: Any, data: Any, train: Any, family: str) -> tuple[Tensor, Tensor]:
    """The outputs in float64 (an estimator's: of its twin) and the targets as the twin has them."""
    subject = as_network(model, train, data, family)
    x, y = (torch.as_tensor(np.asarray(part)) for part in subject.heldout)
    network = copy.deepcopy(subject.model).double().eval()
    with torch.no_grad():
        return torch.cat([network(part) for part in x.double().split(1000)]), y


def attempt(run: Callable[[], AuditReport]) -> tuple[AuditReport | None, str | None]:
    """The report, or why there is none."""
    try:
        return run(), None
    except FlatauditError as error:
        return None, str(error)


def pair(cell: Cell, pool: Pool) -> tuple[Any, Any]:
    """(x, y) as the audit of this cell's kind of model takes it."""
    return (flat(pool.x) if cell.architecture == "glm" else pool.x), pool.y


def _estimates(source: str, report: AuditReport | None, error: str | None) -> Json:
    row: Json = {f"{source}_error": error}
    if report is None:
        return row
    for name in ESTIMATES:
        found = getattr(report.estimates, name)
        row[f"{source}_{name}"] = None if found is None else found.gap
        row[f"{source}_{name}_se"] = None if found is None else found.se
    loo, again = report.estimates.loo, report.estimates.soft_rank_recalibrated
    low, high = report.penalty.low, report.penalty.high
    return row | {
        f"{source}_rank": report.estimates.soft_rank.rank,
        f"{source}_scale": None if again is None else again.scale,
        f"{source}_accuracy": None if loo is None else loo.accuracy,
        f"{source}_mean_confidence": None if loo is None else loo.mean_confidence,
        # Geometric middle of the penalised parameters' D.
        f"{source}_penalty": report.penalty.value
        if report.penalty.value is not None or not low or not high
        else math.sqrt(low * high),
        f"{source}_stationarity": report.penalty.stationarity,
        f"{source}_information_ratio": None
        if report.premise is None
        else report.premise.information_ratio,
    }


def _judged(evidence: str, report: AuditReport) -> Json:
    c, gap = report.calibration, report.gap
    return {
        f"by_{evidence}_verdict": c.verdict,
        f"by_{evidence}_direction": c.direction,
        f"by_{evidence}_severity": c.severity,
        f"by_{evidence}_ece": c.ece,
        f"by_{evidence}_slope": c.slope,
        f"by_{evidence}_saturated": is_saturated(c.saturation),
        f"by_{evidence}_calibration_accuracy": c.accuracy,
        f"by_{evidence}_calibration_mean_confidence": c.mean_confidence,
        f"by_{evidence}_gap": gap.value,
        f"by_{evidence}_low": gap.low,
        f"by_{evidence}_high": gap.high,
        f"by_{evidence}_estimator": gap.estimator,
        f"by_{evidence}_confidence": report.confidence,
        f"by_{evidence}_warnings": ",".join(warning.code for warning in report.warnings),
    }


def _plain(value: Any) -> Any:
    """JSON's null for what is not finite."""
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


LIBRARIES = (
    "torch", "numpy", "scipy", "scikit-learn", "mlflow", "prefect", "statsmodels",
    "curvlinops-for-pytorch", "randalo", "weightwatcher",
)  # fmt: skip


def environment() -> Json:
    """What the numbers depend on beside the code: machine, versions, dtypes."""
    return machine(1, LIBRARIES) | {"models": "float32, audited in float64"}


def collect(rows: list[Json], path: Path) -> None:
    """The rows as one parquet; the environment is in its metadata, under b"flataudit.zoo"."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False)
    about = {b"flataudit.zoo": json.dumps(environment()).encode()}
    pq.write_table(table.replace_schema_metadata((table.schema.metadata or {}) | about), path)


def write_results(given: argparse.Namespace) -> None:
    """Joins what was measured with the baselines; the whole grid's parquet is the committed one."""
    from benchmarks.zoo.command import chosen

    cells = chosen(given)
    rows = {row["name"]: row for row in read_rows(given.store, KIND, cells)}
    for kind in ("baselines", "rivals"):
        for more in read_rows(given.store, kind, cells):
            if more["name"] in rows:
                rows[more["name"]] |= more
    path = RESULTS if not (given.quick or given.only) else given.store / "results.parquet"
    if rows:
        collect(list(rows.values()), path)
        print(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    from benchmarks.zoo.command import main

    main(__doc__, "benchmarks.zoo.measure:measure_cell", write_results)
