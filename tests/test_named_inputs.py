"""Several inputs by name, from the arrays in Python through the store to the stages of an audit."""

from __future__ import annotations

import mlflow
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import flataudit
from flataudit import InputError, stages, tracking
from flataudit.config import AuditOptions
from flataudit.data import load_data
from tests.layer_cases import Towers
from tests.mlflow_store import make_store
from tests.mlflow_store import tracking as pointed_at

WIDE = np.ones((3, 2))


@pytest.fixture(scope="module")
def store():
    made = make_store()
    with pointed_at(made.uri):
        yield made


@pytest.fixture(scope="module")
def x(store):
    return {"b": store.x[:, :2], "a": store.x.astype(np.float64), "scale": 1.0 + store.y}


@pytest.fixture(scope="module")
def logged(store, x):
    """URI of a registered-like model whose source run logged its training data."""
    torch.manual_seed(0)
    experiment = MlflowClient().get_experiment_by_name("training").experiment_id
    with mlflow.start_run(experiment_id=experiment) as run:
        model = mlflow.pytorch.log_model(
            Towers(), name="towers", serialization_format="pickle", pip_requirements=["torch"]
        )
    tracking.log_training_data(run.info.run_id, x, store.y, name="towers")
    return model.model_uri


def test_logged_arrays_are_audited_by_name(store, x, logged, tmp_path):
    held = str(tmp_path / "held.npz")
    np.savez(held, y=store.y[:9], **{name: array[:9] for name, array in x.items()})
    values = AuditOptions(penalty=0.1, tracking_uri=store.uri).model_dump()
    loaded = stages.load(logged, "mlflow", held, values)
    result = stages.estimate(loaded, values)
    report = result["report"]
    model = mlflow.pytorch.load_model(logged)
    direct = flataudit.audit(model, (x, store.y), penalty=0.1)
    assert report["data"] == direct.to_dict()["data"] | {"heldout_samples": 9}
    assert report["estimates"]["loo"]["gap"] == pytest.approx(direct.estimates.loo.gap, rel=1e-12)
    assert "data_mismatch" not in [warning["code"] for warning in report["warnings"]]
    run = MlflowClient().get_run(stages.log(loaded, result, values))
    assert run.info.status == "FINISHED"


def test_names_that_forward_does_not_know(store, x, logged, tmp_path):
    data = str(tmp_path / "wrong.npz")
    np.savez(data, y=store.y, left=x["a"], b=x["b"])
    values = AuditOptions(penalty=0.1, tracking_uri=store.uri).model_dump()
    with pytest.raises(InputError, match=r"forward\(a, b, scale\), got left, b: missing a"):
        stages.estimate(stages.load(logged, data, None, values), values)


@pytest.mark.parametrize(
    "x",
    [{"x": WIDE, "b": WIDE}, {"a": WIDE, "y": WIDE}, {"a": WIDE}, (WIDE, WIDE)],
    ids=["named x", "named y", "one", "tuple"],
)
def test_inputs_that_an_npz_file_cannot_hold(x):
    with pytest.raises(InputError, match="expected x as one array, or as a dict of several"):
        tracking.log_training_data("no-run", x, np.arange(3))


def test_what_is_logged_is_what_is_loaded(store, x, logged):
    from flataudit.models.registry import resolve

    data = load_data("mlflow", source=resolve(logged))
    assert set(data.x) == set(x)
    for name, array in x.items():
        np.testing.assert_array_equal(data.x[name], array)
        assert data.x[name].dtype == array.dtype
