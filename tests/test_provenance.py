"""Are the data the training data: by sha256, and by the loss that the source run logged."""

from __future__ import annotations

import dataclasses

import mlflow
import numpy as np
import pytest

from flataudit import provenance, stages
from flataudit.config import make_options
from flataudit.data import Dataset, digest_of
from flataudit.models.classes import class_names, parse_names
from flataudit.models.registry import ModelSource, load_model, resolve
from tests.mlflow_store import REQUIREMENTS, make_store, toy_data, tracking, trained_net

X, Y = toy_data()
NAMES = np.array(["ant", "bee", "cat"])


@pytest.fixture
def store():
    made = make_store()
    with tracking(made.uri):
        yield made


@pytest.fixture
def run_with(store):
    """A new run with these metrics, as the source run of the store's model."""

    def make(params=None, **metrics):
        client = mlflow.MlflowClient()
        run = client.create_run(client.get_experiment_by_name("training").experiment_id)
        for name, values in metrics.items():
            for step, value in enumerate(values):
                client.log_metric(run.info.run_id, name, value, step=step)
        for name, value in (params or {}).items():
            client.log_param(run.info.run_id, name, value)
        return dataclasses.replace(resolve("models:/digits/1"), run_id=run.info.run_id)

    return make


def report(nll: float, family: str = "categorical"):
    return {"family": family, "train": {"nll": nll}}


def messages(nll: float, source: ModelSource, family: str = "categorical"):
    found = provenance.data_warnings(report(nll, family), Dataset(X, Y, "x"), source)
    assert all((w["code"], w["severity"]) == ("data_mismatch", "high") for w in found)
    return [w["message"] for w in found]


@pytest.mark.parametrize("name", provenance.LOSS_METRICS)
def test_the_last_logged_loss_counts(run_with, name):
    source = run_with(**{name: [2.0, 0.7, 0.3]})
    assert provenance.logged_loss(source) == (name, 0.3)
    assert messages(0.25, source) == []
    (message,) = messages(1.2, source)
    assert "1.2 nats" in message
    assert f"{name} = 0.3" in message


@pytest.mark.parametrize(
    ("logged", "nll", "warns"),
    [
        (0.3, 0.69, False),  # within a factor 2 and 0.1 nats
        (0.3, 0.71, True),
        (0.001, 0.1, False),  # an interpolating network's epoch average
        (0.001, 0.11, True),
        (1.5, 0.2, False),  # dropout, augmentation, a penalty: the logged loss may be larger
    ],
)
def test_tolerance(run_with, logged, nll, warns):
    assert bool(messages(nll, run_with(train_loss=[logged]))) is warns


def test_only_where_the_loss_is_the_families_nll(run_with):
    source = run_with(train_loss=[0.1])
    assert messages(5.0, source, "bernoulli")
    assert messages(5.0, source, "gaussian") == messages(5.0, source, "poisson") == []


def test_no_loss_no_run(run_with):
    gone = dataclasses.replace(run_with(), run_id="0" * 32)
    bare = dataclasses.replace(gone, run_id=None)
    folder = dataclasses.replace(run_with(loss=[0.1]), kind="folder")
    others = (run_with(), run_with(val_loss=[0.1]), run_with(loss=[0.0]))
    for source in (*others, gone, bare, folder):
        assert messages(5.0, source) == []


def test_sha256_of_the_logged_data(run_with):
    source = run_with()
    for tag, warns in ((None, False), (digest_of(X, Y), False), ("0" * 64, True)):
        found = provenance.data_warnings(report(1.0), Dataset(X, Y, "x", tag), source)
        assert bool(found) is warns
    assert "the sha256 of the training data differs" in found[0]["message"]


# --- the names of the classes -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),
        ("a,b , c", ["a", "b", "c"]),
        ({0: "a", 1: "b"}, ["a", "b"]),
        ('{"1": "b", "0": "a"}', ["a", "b"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, None),
        ({1: "a", 2: "b"}, None),
        ("[a, b", None),
        ("3", None),
        ("", None),
        ([0, 1], None),
        (["a"], None),
        (None, None),
        (7, None),
    ],
)
def test_parse_names(value, names):
    assert parse_names(value) == names


def test_where_names_are_found(run_with, tmp_path):
    nothing = run_with()
    assert class_names(nothing, load_model(nothing)) is None
    from_run = run_with(params={"classes": "cat,bee,ant"})
    assert class_names(from_run) == ["cat", "bee", "ant"]
    assert class_names(dataclasses.replace(from_run, kind="folder")) is None
    network = trained_net(X, Y, steps=1)
    path = tmp_path / "model"
    mlflow.pytorch.save_model(
        network,
        str(path),
        serialization_format="pickle",
        pip_requirements=REQUIREMENTS,
        metadata={"class_names": ["bee", "cat", "ant"]},
    )
    in_metadata = dataclasses.replace(from_run, local_path=str(path))
    assert class_names(in_metadata) == ["bee", "cat", "ant"]
    network.classes = ["ant", "cat", "bee"]
    assert class_names(in_metadata, network) == ["ant", "cat", "bee"]
    gone = dataclasses.replace(nothing, run_id="0" * 32, model_id="m-" + "0" * 32)
    assert class_names(gone) is None


def test_params_of_a_logged_model(store):
    model = mlflow.initialize_logged_model(params={"classes": '["x", "y"]'})
    source = dataclasses.replace(resolve("models:/digits/1"), model_id=model.model_id, run_id=None)
    assert class_names(source) == ["x", "y"]


# --- through the stages -------------------------------------------------------------------------


def test_text_labels_of_a_registered_model(store, run_with, tmp_path):
    """The run's classes give the order; without them it is sorted, and the report says so."""
    np.savez(tmp_path / "text.npz", x=store.x, y=NAMES[store.y])
    np.savez(tmp_path / "numbers.npz", x=store.x, y=store.y)
    options = make_options({"tracking_uri": store.uri, "penalty": "0.01"}).model_dump()

    def audited(name, source):
        loaded = stages.load("models:/digits/1", str(tmp_path / name), None, options)
        loaded["source"] = source.to_dict()
        return stages.estimate(loaded, options)["report"]

    plain = audited("numbers.npz", run_with())
    by_name = audited("text.npz", run_with(params={"classes": ",".join(NAMES)}))
    assert by_name["estimates"] == plain["estimates"]
    assert by_name["data"]["sha256"] == plain["data"]["sha256"]
    assert not any("classes" in note for note in by_name["model"]["notes"])
    assumed = audited("text.npz", run_with())
    assert assumed["estimates"] == plain["estimates"]
    assert any("classes" in note for note in assumed["model"]["notes"])
    other = audited("text.npz", run_with(params={"classes": "cat,bee,ant"}, train_loss=[0.3]))
    assert other["train"]["nll"] > plain["train"]["nll"]
    assert other["warnings"][0]["code"] == "data_mismatch"
