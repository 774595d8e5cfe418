"""The run of an audit in MLflow: found or made, and what is written to it.

Writes may be repeated: a run is known by its audit id, a metric that is logged again with the same
time stays one, and files, params and tags replace themselves.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flataudit import keys
from flataudit.data import CONTEXTS, training_input
from flataudit.errors import StoreError
from flataudit.keys import URI_TAG
from flataudit.models.registry import ModelSource
from flataudit.results import to_json
from flataudit.retries import patient, retried
from flataudit.store import ensure_experiment, one_line, scratch_folder, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Run

PARAM_LIMIT = 6000  # characters, of MLflow's column
DIGEST = 16  # characters of the sha256 that MLflow shows as a dataset's digest

_NOT_OPTIONS = ("tracking_uri", "json", "config")  # may hold a password, or only name files


@contextmanager
def audit_run(
    source: ModelSource,
    options: Mapping[str, Any],
    experiment: str,
    more_tags: Mapping[str, str] | None,
    audit_id: str | None,
) -> Iterator[tuple[MlflowClient, Run, str]]:
    """A client, the audit's run and its link inside the MLflow UI; FAILED where the block fails."""
    with store_errors(f"log the audit of {source.uri}"):
        from mlflow import MlflowClient
        from mlflow.entities import Param

        experiment_id = retried(lambda: ensure_experiment(experiment))
        client = MlflowClient()
        name = f"{source.name} v{source.version}" if source.name else Path(source.uri).name
        tags = {**(more_tags or {}), URI_TAG: source.uri, "mlflow.source.name": "flataudit"}
        tags[keys.AUDIT_ID] = audit_id or uuid.uuid4().hex
        run = _own_run(client, experiment_id, tags, f"audit {name}")
        run_id, client = run.info.run_id, patient(client)
        try:
            known = run.data.params
            params = [Param(k, v) for k, v in params_of(options).items() if k not in known]
            client.log_batch(run_id, params=params)
            yield client, run, f"#/experiments/{experiment_id}/runs/{run_id}"
        except BaseException:
            with suppress(Exception):
                client.set_terminated(run_id, "FAILED")
            raise


def _own_run(client: MlflowClient, experiment_id: str, tags: Mapping[str, str], name: str) -> Run:
    """The one run with the audit id among `tags`: an earlier try's, else a new one.

    Runs are made without a key of the client's own, so that a try whose answer was lost, here or
    inside MLflow's HTTP client, leaves a run behind: after making one it is looked whether there
    are more, and all keep the same.
    """

    def known() -> list[Run]:
        query = f"tags.`{keys.AUDIT_ID}` = '{tags[keys.AUDIT_ID]}'"
        runs = list(client.search_runs([experiment_id], query))
        return sorted(
            runs, key=lambda r: (r.info.status != "FINISHED", r.info.start_time, r.info.run_id)
        )

    def make() -> list[Run]:
        return known() or [client.create_run(experiment_id, tags=dict(tags), run_name=name)]

    made = retried(make)
    kept, *others = retried(known) or made
    for run in others:
        retried(lambda of=run.info.run_id: client.delete_run(of))  # type: ignore[misc]
    return kept


def rendered(
    report: dict[str, Any],
    display: dict[str, Any],
    history: list[dict[str, Any]],
    fresh_labels: Mapping[str, Any] | None = None,
) -> str:
    """A folder with the run's artifacts; made before anything is written to the store."""
    from flataudit.report import figures, html

    rows = display.get("influence") or []
    columns = list(rows[0]) if rows else []
    table = {"columns": columns, "data": [[row[name] for name in columns] for row in rows]}
    files: dict[str, bytes] = {
        "report.html": html.render(report, display, history).encode(),
        "reliability.png": figures.reliability_png(report, display),
        "spectrum.png": figures.spectrum_png(report, display),
    }
    tables = {"report": report, "influence": table}
    if fresh_labels is not None:
        tables[Path(keys.FRESH_LABELS).stem] = dict(fresh_labels)
    for name, value in tables.items():
        text = json.dumps(to_json(value), indent=1, allow_nan=False)
        files[f"{name}.json"] = text.encode()
    try:
        folder = Path(scratch_folder())
        for name, content in files.items():
            (folder / name).write_bytes(content)
    except OSError as error:
        raise StoreError(
            f"could not write the report's files to {tempfile.gettempdir()}: {one_line(error)};"
            " make room there, or let TMPDIR name another folder"
        ) from error
    return str(folder)


def params_of(options: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: str(value)[:PARAM_LIMIT]
        for name, value in options.items()
        if value is not None and name not in _NOT_OPTIONS
    }


def log_inputs(
    client: MlflowClient,
    run_id: str,
    data: Mapping[str, Any],
    source: ModelSource,
    options: Mapping[str, Any],
    model_id: str | None,
) -> Dataset:
    """Logs data and model as the run's inputs; returns the training data's entity."""
    from mlflow.entities import DatasetInput, InputTag, LoggedModelInput

    spec = str(options.get("train") or "train")
    sha = str(data["sha256"])
    train = (
        retried(lambda: training_input(source)).dataset if spec == "mlflow" else _dataset(spec, sha)
    )
    tags = [InputTag("mlflow.data.context", CONTEXTS[0]), InputTag("sha256", sha)]
    inputs = [DatasetInput(train, tags)]
    heldout = options.get("heldout")
    if heldout:
        other = _dataset(str(heldout), hashlib.sha256(str(heldout).encode()).hexdigest())
        inputs.append(DatasetInput(other, [InputTag("mlflow.data.context", "heldout")]))
    models = None if model_id is None else [LoggedModelInput(model_id)]
    client.log_inputs(run_id, inputs, models)
    return train


def _dataset(spec: str, sha: str) -> Dataset:
    """MLflow's record of a file, or of a function or of arrays given in Python."""
    from mlflow.entities import Dataset

    path = Path(spec).expanduser()
    if path.is_file():
        where = json.dumps({"uri": str(path.absolute())})
        return Dataset(path.name, sha[:DIGEST], "local", where)
    return Dataset(spec, sha[:DIGEST], "code", json.dumps({"tags": {"mlflow.source.name": spec}}))


def log_metrics(
    client: MlflowClient,
    run: Run,
    metrics: Mapping[str, float],
    own: Mapping[str, float | None],
    model_id: str | None,
    data: Dataset,
) -> None:
    """One batch: each metric on the run and, by model_id, on the logged model; `own` on the run.

    MLflow keeps a metric once that is logged again with the same time: the run's start.
    """
    from mlflow.entities import Metric

    run_id, then = run.info.run_id, run.info.start_time
    known = {"model_id": model_id, "dataset_name": data.name, "dataset_digest": data.digest}
    batch = [Metric(key, value, then, 0, run_id=run_id, **known) for key, value in metrics.items()]
    for key, value in own.items():
        found = run.data.metrics.get(key, value)  # a second try may have taken longer
        if found is not None and math.isfinite(found):
            batch.append(Metric(key, float(found), then, 0))
    client.log_batch(run_id, metrics=batch)


def set_run_tags(client: MlflowClient, run_id: str, tags: Mapping[str, str]) -> None:
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
