"""What the tests of the shells share: a store with one model of each kind, and how to compare."""

from __future__ import annotations

import atexit
import copy
import json
import os
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.mlflow_store import REQUIREMENTS, toy_data, tracking, trained_net

ROOT = Path(__file__).parents[1]
DESCRIPTION = "Sorts parcels. Ask Ann."


@dataclass(frozen=True)
class Models:
    """A store: `good` can be audited; `bare`, `infinite` and `forest` cannot.

    `good` has versions 1 and 2 of one network, its training data and its record logged;
    `data` and `heldout` are npz files of the same data and of 40 other samples.
    """

    uri: str
    folder: Path
    run_id: str
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    data: str
    heldout: str


@cache
def make_models(url: str | None = None) -> Models:
    """Fills the store of an MLflow server, else an embedded one; later calls return the same."""
    import mlflow
    import torch
    from sklearn.ensemble import RandomForestClassifier
    from torch import nn

    from flataudit.store import embedded_store, ensure_experiment
    from flataudit.tracking import log_training_data
    from flataudit.training import parse_training

    folder = Path(tempfile.mkdtemp(prefix="flataudit-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    uri = url or embedded_store(folder / "store")
    x, y = toy_data(120)
    for name, part in (("train", slice(80)), ("heldout", slice(80, None))):
        np.savez(folder / f"{name}.npz", x=x[part], y=y[part])
    x, y = x[:80], y[:80]
    net = trained_net(x, y)
    infinite = copy.deepcopy(net)
    with torch.no_grad():
        infinite[2].bias[0] = torch.inf
    forest = RandomForestClassifier(n_estimators=3, random_state=0).fit(x, y)
    with tracking(uri):
        experiment = ensure_experiment("training")
        with mlflow.start_run(experiment_id=experiment) as run:
            networks = {"good": net, "bare": nn.Flatten(), "infinite": infinite}
            for name, network in networks.items():
                mlflow.pytorch.log_model(
                    network,
                    name=name,
                    serialization_format="pickle",
                    pip_requirements=REQUIREMENTS,
                    registered_model_name=name,
                )
            mlflow.sklearn.log_model(
                forest,
                name="forest",
                pip_requirements=["scikit-learn"],
                registered_model_name="forest",
                skops_trusted_types=["sklearn.tree._tree.Tree"],
            )
        record = parse_training("optimizer=sgd,lr=0.5,steps=200,weight_decay=0.01,batch_size=80")
        log_training_data(run.info.run_id, x, y, record=record)
        client = mlflow.MlflowClient()
        client.update_model_version("good", "1", DESCRIPTION)
        client.set_registered_model_alias("good", "champion", "1")
        client.copy_model_version("models:/good/1", "good")
    return Models(
        uri=uri,
        folder=folder,
        run_id=run.info.run_id,
        x=x,
        y=y,
        data=str(folder / "train.npz"),
        heldout=str(folder / "heldout.npz"),
    )


def content(models: Models) -> list[str]:
    """All that the store holds: every row of its database, and the names of its artifacts."""
    path = models.uri.removeprefix("sqlite:///")
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        rows = list(connection.iterdump())
    finally:
        connection.close()
    return rows + sorted(str(file) for file in Path(path).parent.rglob("*") if file.is_file())


def untimed(report: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON gives it back, without its time and which labels were new to it."""
    found = json.loads(json.dumps(report, allow_nan=False))
    found.pop("fresh_labels")
    assert found["solver"].pop("seconds") >= 0
    return found


def environment(**more: str) -> dict[str, str]:
    """For child processes: this tree first, no store or server but those given."""
    names = ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "PREFECT_API_URL", "FLATAUDIT_STORE")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    return kept | {"PYTHONPATH": path} | more


def endless_data(name: str) -> str:
    """Data that never come, as `module:function` of a module in the working folder."""
    code = "import time\n\n\ndef load():\n    while True:\n        time.sleep(1)\n"
    Path(f"{name}.py").write_text(code)
    return f"{name}:load"
