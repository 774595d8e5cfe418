"""A registry of small models on real data, each trained for itself, some of them broken.

Five data sets of scikit-learn (digits, breast cancer, wine, iris, diabetes), networks and linear
models; every model has its own sample of the data, its own start and its own registered name. The
planted failures are those that a sweep has to survive.
"""

from __future__ import annotations

import pickle
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = "soak-"
PLANTS = ("pickle", "hang", "nan", "missing")
TOLD = {
    "pickle": "loads from",
    "hang": "to end within",
    "nan": "NaN",
    "missing": "train.npz",
}  # what a failure's line says


@dataclass(frozen=True)
class Kind:
    """What one model of the fleet is trained on, and how."""

    data: str
    samples: int
    hidden: int  # 0: scikit-learn's linear model

    @property
    def label(self) -> str:
        return f"{self.data}, {'linear' if not self.hidden else f'{self.hidden} hidden units'}"


KINDS = (
    Kind("digits", 200, 4),
    Kind("breast_cancer", 300, 5),
    Kind("wine", 120, 6),
    Kind("diabetes", 300, 0),
    Kind("iris", 110, 4),
    Kind("breast_cancer", 350, 0),
    Kind("wine", 130, 0),
    Kind("iris", 120, 8),
)


def planted(n_models: int, share: float, seed: int) -> dict[str, str]:
    """Name of each model that is to fail, and how: that share of all, each way in turn."""
    number = max(len(PLANTS), round(n_models * share))
    places = sorted(random.Random(seed).sample(range(n_models), number))
    return {name_of(at): PLANTS[i % len(PLANTS)] for i, at in enumerate(places)}


def name_of(number: int) -> str:
    return f"{PREFIX}{number:03d}"


def make_fleet(
    uri: str,
    artifacts: Path,
    n_models: int,
    failures: dict[str, str],
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Trains, logs and registers the models on the MLflow server at `uri`.

    artifacts: the folder that the server keeps artifacts in; what is planted is broken there.
    """
    import mlflow

    from flataudit.tracking import log_training_data

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    experiment = mlflow.set_experiment("training").experiment_id
    for number in range(n_models):
        name, kind = name_of(number), KINDS[number % len(KINDS)]
        plant = failures.get(name)
        if plant is not None:
            kind = KINDS[number % 3]  # networks alone
        x, y = sample(kind, number)
        with mlflow.start_run(experiment_id=experiment, run_name=name) as run:
            model, record = train(kind, x, y, number)
            if plant == "nan":
                spoil(model)
            info = log_model(model, name)
            log_training_data(run.info.run_id, x, y, record=record)
        if plant in ("pickle", "hang"):
            (path,) = artifacts.rglob(f"{info.model_id}/artifacts/data/model.pth")
            path.write_bytes(b"not a pickle" if plant == "pickle" else pickle.dumps(_Hang()))
        if plant == "missing":
            (path,) = artifacts.rglob(f"{run.info.run_id}/artifacts/data/train.npz")
            path.unlink()
        say(f"{number + 1} of {n_models} models: {kind.label}")
    assert len(client.search_registered_models(max_results=1000)) == n_models


def sample(kind: Kind, seed: int) -> tuple[Any, Any]:
    """A sample of its own: MLflow keeps one record per digest, and one of them gets lost."""
    from sklearn import datasets

    found = getattr(datasets, f"load_{kind.data}")()
    x = (found.data - found.data.mean(0)) / (found.data.std(0) + 1e-9)
    chosen = np.random.default_rng(seed).permutation(len(x))[: kind.samples]
    y = found.target[chosen]
    if kind.data == "diabetes":
        return x[chosen], (y - y.mean()) / y.std()
    return x[chosen], y.astype(np.int64)


def train(kind: Kind, x: Any, y: Any, seed: int) -> tuple[Any, Any]:
    """The trained model and its training record."""
    if kind.hidden == 0:
        from sklearn.linear_model import LogisticRegression, Ridge

        linear = Ridge(alpha=1.0) if kind.data == "diabetes" else LogisticRegression(C=1.0)
        return linear.fit(x, y), None
    import torch
    from torch import nn

    from flataudit.training import parse_training

    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(x.shape[1], kind.hidden), nn.Tanh(), nn.Linear(kind.hidden, int(y.max()) + 1)
    ).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3, weight_decay=0.01)
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), labels).backward()
        optimizer.step()
    record = f"optimizer=sgd,lr=0.3,steps=150,weight_decay=0.01,batch_size={len(x)}"
    return net, parse_training(record)


def spoil(model: Any) -> None:
    import torch

    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan


def log_model(model: Any, name: str) -> Any:
    import mlflow

    if type(model).__module__.startswith("sklearn"):
        return mlflow.sklearn.log_model(
            model, name=name, pip_requirements=["scikit-learn"], registered_model_name=name
        )
    return mlflow.pytorch.log_model(
        model,
        name=name,
        serialization_format="pickle",
        pip_requirements=["torch"],
        registered_model_name=name,
    )


class _Hang:
    """A pickle that never finishes loading."""

    def __reduce__(self) -> tuple[Any, ...]:
        return time.sleep, (86400,)
