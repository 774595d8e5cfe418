"""A registry for sweeps: healthy models, and one of each failure that a sweep has to survive."""

from __future__ import annotations

import atexit
import copy
import json
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tests.mlflow_store import REQUIREMENTS, toy_data, tracking, trained_net

HEALTHY = ["models:/fleet-a/1", "models:/fleet-a/2", "models:/fleet-b/1"]
PLANTED = {
    "models:/fleet-missing/1": "missing data",
    "models:/fleet-nan/1": "NaN weights",
    "models:/fleet-pickle/1": "broken pickle",
}


@dataclass(frozen=True)
class Fleet:
    """An embedded store. `fleet-a` has two versions with the same weights (one logged model)."""

    uri: str
    folder: Path

    def pipeline(self, **more: Any) -> dict[str, Any]:
        """A standing audit of all its models, as plain values."""
        base = {
            "name": "fleet",
            "model": {"name": "fleet-*", "select": "all"},
            "data": {"train": "mlflow"},
        }
        return base | more


def make_fleet() -> Fleet:
    """A copy of its own: sweeps write into it."""
    folder = Path(tempfile.mkdtemp(prefix="flataudit-fleet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    first = _first()
    # The store holds absolute paths to its artifacts, which no sweep changes.
    shutil.copy(first.folder / "mlflow.db", folder / "mlflow.db")
    return Fleet(f"sqlite:///{folder / 'mlflow.db'}", folder)


@cache
def _first() -> Fleet:
    import mlflow
    import torch

    from flataudit.store import embedded_store, ensure_experiment
    from flataudit.tracking import log_training_data
    from flataudit.training import parse_training

    folder = Path(tempfile.mkdtemp(prefix="flataudit-fleet-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    uri = embedded_store(folder)
    x, y = toy_data()
    net = trained_net(x, y)
    other = trained_net(x, y, steps=150)
    nan = copy.deepcopy(net)
    with torch.no_grad():
        nan[0].weight[0, 0] = torch.nan
    record = parse_training("optimizer=sgd,lr=0.5,steps=200,weight_decay=0.01,batch_size=80")
    with tracking(uri):
        experiment = ensure_experiment("training")
        client = mlflow.MlflowClient()
        for name, network in (("a", net), ("b", other), ("missing", net), ("nan", nan),
                              ("pickle", net)):  # fmt: skip
            with mlflow.start_run(experiment_id=experiment) as run:
                info = mlflow.pytorch.log_model(
                    network,
                    name=name,
                    serialization_format="pickle",
                    pip_requirements=REQUIREMENTS,
                    registered_model_name=f"fleet-{name}",
                )
            # MLflow keeps one record of a dataset per experiment, name and digest, with the first
            # run's source: the one that gets lost has to differ.
            n = 79 if name == "missing" else 80
            log_training_data(run.info.run_id, x[:n], y[:n], record=record)
            if name == "a":
                mlflow.register_model(info.model_uri, "fleet-a")
            if name == "missing":
                _path(client.get_run(run.info.run_id).info.artifact_uri, "data/train.npz").unlink()
            if name == "pickle":
                where = client.get_logged_model(info.model_id).artifact_location
                _path(where, "data/model.pth").write_bytes(b"not a pickle")
    return Fleet(uri, folder)


def make_registry(folder: Path, n_versions: int, rules: str) -> tuple[str, list[str]]:
    """A registry with one model `many` of so many versions; its URI, and the unaudited versions.

    Written straight into the database, since MLflow takes 20 ms for each. Of ten versions six are
    audited under `rules`; the others have no tag, an error, older rules, and a copied verdict.
    """
    from flataudit.store import embedded_store

    uri = embedded_store(folder)
    unaudited, versions, tags = [], [], []
    for number in range(1, n_versions + 1):
        model_id = f"m-{number:032x}"
        versions.append((number, f"models:/{model_id}"))
        verdict = {"flataudit.verdict": "pass", "flataudit.policy": rules,
                   "flataudit.model_id": model_id}  # fmt: skip
        changed = {
            0: None,
            1: {"flataudit.verdict": "error"},
            2: {"flataudit.policy": "older"},
            3: {"flataudit.model_id": "m-of-another"},
        }
        if number % 10 in changed:
            unaudited.append(str(number))
            change = changed[number % 10]
            verdict = {} if change is None else verdict | change
        tags += [(key, value, number) for key, value in verdict.items()]
    with sqlite3.connect(folder / "mlflow.db") as db:
        db.execute("insert into registered_models (name, creation_time) values ('many', 0)")
        db.executemany(
            "insert into model_versions (name, version, creation_time, last_updated_time,"
            " current_stage, source, status) values ('many', ?, 0, 0, 'None', ?, 'READY')",
            versions,
        )
        db.executemany(
            "insert into model_version_tags (key, value, name, version) values (?, ?, 'many', ?)",
            tags,
        )
    db.close()
    return uri, unaudited


def _path(uri: str, name: str) -> Path:
    return Path(uri.removeprefix("file://")) / name


def table(client: Any, run_id: str) -> list[dict[str, Any]]:
    """The rows of the table on a sweep's run."""
    path = client.download_artifacts(run_id, "flataudit/sweep.json")
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]
