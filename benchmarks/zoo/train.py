"""Trains the grid's cells and registers each in MLflow, with its training record and its data.

    python -m benchmarks.zoo.train [--quick] [--store FOLDER] [--data FOLDER] [--download]

A cell that is registered is skipped, so that a stopped run goes on where it was. What comes out is
a registry of models to audit: `flataudit audit models:/NAME/1 --train mlflow`, from this folder,
where the networks' classes are found.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks.zoo.data import Unavailable
from benchmarks.zoo.draw import draw
from benchmarks.zoo.fit import TrainingFailed, fit, flat
from benchmarks.zoo.grid import Cell, by_name
from benchmarks.zoo.store import (
    CELL_TAG,
    EXPERIMENT,
    fields,
    open_store,
    registered_uri,
    sources_of,
)

Json = dict[str, Any]


def train_cell(name: str, options: Json) -> Json:
    """Trains and registers one cell; {name, state: done|skipped|unavailable|failed, ...}."""
    import torch

    torch.set_num_threads(1)  # the same sums in the same order, wherever it runs
    cell = by_name()[name]
    client = open_store(options["store"])
    found = registered_uri(client, cell)
    if found is not None:
        return {"name": name, "state": "skipped", "uri": found}
    started = time.perf_counter()
    try:
        drawn = draw(cell, sources_of(options))
        fitted = fit(cell, drawn)
    except Unavailable as missing:
        return {"name": name, "state": "unavailable", "error": str(missing)}
    except (TrainingFailed, ValueError) as error:
        return {"name": name, "state": "failed", "error": str(error)}
    trained = time.perf_counter() - started
    uri = _register(cell, fitted, drawn.train)
    client.set_model_version_tag(cell.name, uri.rsplit("/", 1)[1], CELL_TAG, cell.digest())
    seconds = time.perf_counter() - started
    return {"name": name, "state": "done", "uri": uri, "seconds": seconds, "training": trained}


def _register(cell: Cell, fitted: Any, train: Any) -> str:
    """Logs run, record, data and model; the version's URI."""
    import mlflow

    from flataudit.store import ensure_experiment
    from flataudit.tracking import log_training_data

    is_glm = cell.architecture == "glm"
    with mlflow.start_run(experiment_id=ensure_experiment(EXPERIMENT), run_name=cell.name) as run:
        # "epochs" is the plan; what early stopping made of it has a name of its own.
        mlflow.log_params({k: v for k, v in fields(cell).items() if k != "name"})
        if fitted.epochs is not None:
            mlflow.log_param("epochs_trained", fitted.epochs)
        x = flat(train.x) if is_glm else train.x
        log_training_data(run.info.run_id, x, train.y, record=fitted.record)
        common = {"name": "model", "registered_model_name": cell.name}
        if is_glm:
            info = mlflow.sklearn.log_model(
                fitted.model, serialization_format="cloudpickle",
                pip_requirements=["scikit-learn"], **common,
            )  # fmt: skip
        else:
            info = mlflow.pytorch.log_model(
                fitted.model, serialization_format="pickle", pip_requirements=["torch"], **common
            )
    return f"models:/{cell.name}/{info.registered_model_version}"


if __name__ == "__main__":
    from benchmarks.zoo.command import main

    main(__doc__, "benchmarks.zoo.train:train_cell")
