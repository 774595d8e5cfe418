"""One real MLflow store per test process: small networks, trained, logged and registered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

REQUIREMENTS = ["torch"]  # a given list spares MLflow the inference, which takes 12 s and more


@dataclass(frozen=True)
class Store:
    """Where it is and what is in it; `digits` has versions 1 (pickle) and 2 (pt2) of one network.

    Alias `champion` is version 1. `old` is a model as MLflow 2 logged it, version 1 of `classic`.
    """

    uri: str
    folder: Path
    run_id: str
    pickle_id: str
    pt2_id: str
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]


def toy_data(n: int = 80) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Three noisy classes of three features."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 3)).astype(np.float32)
    scores = x @ rng.normal(size=(3, 3)) + rng.gumbel(size=(n, 3))
    return x, scores.argmax(axis=1).astype(np.int64)


def trained_net(x: Any, y: Any, steps: int = 200) -> Any:
    """A small network after full-batch SGD with lr 0.5 and weight decay 0.01."""
    import torch
    from torch import nn

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, weight_decay=0.01)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    return net


@cache
def make_store(url: str | None = None) -> Store:
    """Fills the store of an MLflow server, else an embedded one; later calls return the same."""
    import mlflow

    from flataudit.store import embedded_store, ensure_experiment, scratch_folder
    from flataudit.tracking import log_training_data

    folder = Path(scratch_folder())
    uri = url or embedded_store(folder)
    with tracking(uri):
        client = mlflow.MlflowClient()
        x, y = toy_data()
        net = trained_net(x, y)
        experiment = ensure_experiment("training")
        with mlflow.start_run(experiment_id=experiment) as run:
            mlflow.log_params({"optimizer": "SGD", "batch_size": 80, "weight_decay": 0.01})
            mlflow.log_metric("lr", 0.5, step=0)
            for step in range(1, 4):
                mlflow.log_metric("lr", 0.5 - 0.1 * step, step=step)
            logged = [
                mlflow.pytorch.log_model(
                    net,
                    name=name,
                    serialization_format=name,
                    pip_requirements=REQUIREMENTS,
                    input_example=x[:4] if name == "pt2" else None,
                )
                for name in ("pickle", "pt2")
            ]
        run_id = run.info.run_id
        log_training_data(run_id, x, y)
        for model in logged:
            mlflow.register_model(model.model_uri, "digits")
        client.set_registered_model_alias("digits", "champion", "1")
        old = folder / "old"
        mlflow.pytorch.save_model(
            net, str(old), serialization_format="pickle", pip_requirements=REQUIREMENTS
        )
        client.log_artifacts(run_id, str(old), "old")
        client.create_registered_model("classic")
        client.create_model_version("classic", f"runs:/{run_id}/old", run_id=run_id)
        return Store(uri, folder, run_id, logged[0].model_id, logged[1].model_id, x, y)


@contextmanager
def tracking(uri: str) -> Iterator[None]:
    """MLflow pointed at a store, and at nothing afterwards."""
    import mlflow

    from flataudit.store import use_tracking

    use_tracking(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(None)
