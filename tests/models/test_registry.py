import json
import logging
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

import flataudit
from flataudit.errors import InputError, StoreError
from flataudit.models.registry import ModelSource, load_model, resolve
from flataudit.tracking import log_training_data
from tests.mlflow_store import REQUIREMENTS, make_store, toy_data, tracking


@pytest.fixture
def store():
    made = make_store()
    with tracking(made.uri):
        yield made


@pytest.fixture(autouse=True)
def _quiet():
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)


def saved(folder, model, serialization_format="pickle", **more):
    """A local MLflow folder of the pytorch flavor, as a source."""
    shutil.rmtree(folder, ignore_errors=True)
    mlflow.pytorch.save_model(
        model,
        str(folder),
        serialization_format=serialization_format,
        pip_requirements=REQUIREMENTS,
        **more,
    )
    return resolve(str(folder))


def message(call):
    """The one line of the InputError that `call` raises."""
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("expected")
    return text


# --- resolve ------------------------------------------------------------------------------------


def test_version_alias_model_id_and_run_name_the_same_model(store):
    version = resolve("models:/digits/1")
    assert version == ModelSource(
        uri="models:/digits/1",
        kind="registry",
        flavor="pytorch",
        local_path=version.local_path,
        name="digits",
        version="1",
        model_id=store.pickle_id,
        run_id=store.run_id,
    )
    assert Path(version.local_path).is_relative_to(store.folder / "artifacts")  # read in place
    assert resolve("models:/digits@champion") == version
    assert resolve("models:/digits/2").model_id == store.pt2_id
    logged = resolve(f"models:/{store.pickle_id}")
    assert (logged.kind, logged.model_id, logged.run_id, logged.name) == (
        "logged_model",
        store.pickle_id,
        store.run_id,
        None,
    )
    of_run = resolve(f"runs:/{store.run_id}/pickle")
    assert (of_run.kind, of_run.model_id, of_run.run_id) == ("run", store.pickle_id, store.run_id)
    assert version.identity == logged.identity == of_run.identity == store.pickle_id


def test_a_copy_is_the_same_model(store):
    copy = mlflow.MlflowClient().copy_model_version("models:/digits/1", "promoted")
    found = resolve(f"models:/promoted/{copy.version}")
    assert (found.name, found.model_id, found.run_id) == (
        "promoted",
        store.pickle_id,
        store.run_id,
    )


def test_mlflow_2_models_are_known_by_their_files(store, tmp_path):
    version = resolve("models:/classic/1")
    assert version.model_id is None
    assert version.run_id == store.run_id
    assert version.identity == f"classic/1/{version.artifact_sha256}"
    assert resolve(f"runs:/{store.run_id}/old").artifact_sha256 == version.artifact_sha256

    shutil.copytree(version.local_path, tmp_path / "copy")
    (tmp_path / "copy" / "registered_model_meta").write_text("added by MLflow")
    copied = resolve(str(tmp_path / "copy"))
    assert (copied.kind, copied.artifact_sha256) == ("folder", version.artifact_sha256)
    assert resolve((tmp_path / "copy").as_uri()) == copied
    with (tmp_path / "copy" / "data" / "model.pth").open("ab") as file:
        file.write(b"x")
    assert resolve(str(tmp_path / "copy")).artifact_sha256 != version.artifact_sha256


def test_a_source_survives_json(store):
    source = resolve("models:/classic/1")
    again = ModelSource.from_dict(json.loads(json.dumps(source.to_dict() | {"new": 1})))
    assert again == source
    assert source.report_fields() == {
        "uri": "models:/classic/1",
        "name": "classic",
        "version": "1",
        "model_id": None,
        "flavor": "pytorch",
    }


def test_unknown_models(store, tmp_path):
    missing_run = "0" * 32
    cases = {
        "models:/digits/9": "version 9 of digits, got no such version; the newest is 2",
        "models:/nothing/1": "a registered model 'nothing', got none of that name",
        "models:/digits@latest-ok": "an alias 'latest-ok' of digits, got only: champion",
        "models:/nothing@champion": "a registered model 'nothing', got none of that name",
        f"models:/m-{missing_run}": "got none; check the id",
        f"runs:/{missing_run}/model": f"a run {missing_run} in this store, got none",
        f"runs:/{store.run_id}/model": "got no such model; the run logged: pickle, pt2",
        f"runs:/{store.run_id}/data": "got no such model",
        f"runs:/{store.run_id}": "add the path of the model",
        "models:/digits": "models:/name/version, models:/name@alias",
        "models:/digits/Production": "models:/name/version, models:/name@alias",
        "models:/": "models:/name/version, models:/name@alias",
        "model:/digits/1": "no such folder; check the spelling",
        "s3://bucket/model": "no such folder; check the spelling",
        str(tmp_path): "a folder without an MLmodel file",
        "": "models:/name/version",
    }
    for uri, expected in cases.items():
        assert expected in message(lambda uri=uri: resolve(uri)), uri


def test_a_damaged_model_folder(store, tmp_path):
    (tmp_path / "MLmodel").write_text("flavors: [not, a, mapping")
    assert "a readable MLmodel file" in message(lambda: resolve(str(tmp_path)))


def test_a_store_that_does_not_answer(store, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri in ("http://me:secret@localhost:1", (tmp_path / "mlruns").as_uri(), "ftp://host"):
        mlflow.set_tracking_uri(uri)
        for model in ("models:/digits/1", "models:/m-12", f"runs:/{store.run_id}/pickle"):
            with pytest.raises(StoreError) as caught:
                resolve(model)
            assert str(caught.value).startswith(f"could not look up {model}: ")
            assert "\n" not in str(caught.value)
            assert "secret" not in str(caught.value)


def test_files_that_are_gone(store):
    client = mlflow.MlflowClient()
    run = client.create_run(client.get_experiment_by_name("training").experiment_id)
    client.log_artifacts(run.info.run_id, str(store.folder / "old"), "model")
    uri = f"runs:/{run.info.run_id}/model"
    client.create_registered_model("gone")
    client.create_model_version("gone", uri, run_id=run.info.run_id)
    source = resolve("models:/gone/1")
    shutil.rmtree(source.local_path)
    with pytest.raises(InputError, match="got no such model"):
        load_model(source)


# --- load ---------------------------------------------------------------------------------------


def test_pickle_and_pt2_give_the_same_audit(store):
    reports = [
        flataudit.audit(load_model(resolve(f"models:/digits/{v}")), (store.x, store.y), penalty=0.1)
        for v in (1, 2)
    ]
    first, second = (report.estimates for report in reports)
    for name in ("soft_rank", "tic", "loo"):
        assert getattr(first, name).gap == pytest.approx(getattr(second, name).gap, rel=1e-10)
    assert reports[0].train.nll == pytest.approx(reports[1].train.nll, rel=1e-12)
    assert reports[0].solver.dtype == reports[1].solver.dtype == "float64"


class Conv(nn.Module):
    """Two convolutions with padding, stride and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2, stride=2)
        )
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).flatten(1))


def dense(middle):
    return nn.Sequential(nn.Linear(3, 6), middle, nn.Tanh(), nn.Linear(6, 3))


NETS = {
    "conv": (Conv, (1, 4, 4)),
    "dropout": (lambda: dense(nn.Dropout(0.5)), (3,)),
    "batch_norm": (lambda: dense(nn.BatchNorm1d(6)), (3,)),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_layers_as_pickle_and_pt2(store, tmp_path, name, solver):
    make, shape = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = make()
        x = torch.randn(30, *shape)
    y = toy_data(30)[1]
    net(x)  # in training mode: moves the running averages of a batch norm
    pickled = load_model(saved(tmp_path / "pickle", net))  # logged in training mode
    exported = load_model(saved(tmp_path / "pt2", net.eval(), "pt2", input_example=x[:4].numpy()))
    one, two = (
        flataudit.audit(model, (x, y), penalty=0.1, solver=solver) for model in (pickled, exported)
    )
    for estimate in ("soft_rank", "tic", "loo"):
        expected = getattr(one.estimates, estimate).gap
        assert getattr(two.estimates, estimate).gap == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(one.samples.leverage, two.samples.leverage, rtol=1e-9)
    assert one.train.nll == pytest.approx(two.train.nll, rel=1e-12)


@pytest.mark.parametrize("name", ["dropout", "batch_norm"])
def test_an_export_in_training_mode_is_refused(store, tmp_path, name):
    make, shape = NETS[name]
    x = torch.randn(30, *shape)
    source = saved(tmp_path / "pt2", make().train(), "pt2", input_example=x[:4].numpy())
    model = load_model(source)
    text = message(lambda: flataudit.audit(model, (x, toy_data(30)[1]), penalty=0.1))
    assert "exported in eval mode" in text


def test_pickles_can_be_forbidden(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    text = message(lambda: load_model(resolve("models:/digits/1")))
    assert "got a pickle in models:/digits/1" in text
    assert "serialization_format='pt2'" in text
    assert isinstance(load_model(resolve("models:/digits/2")), nn.Module)


def module_with_net(folder, name, width):
    """Writes a module with a class Net and returns an instance of it."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        f"    width = {width}\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.line = nn.Linear(3, self.width)\n"
        "    def forward(self, x): return self.line(x)\n"
    )
    sys.path.insert(0, str(folder))
    try:
        return __import__(name).Net()
    finally:
        sys.path.remove(str(folder))


def test_a_class_that_cannot_be_imported(store, tmp_path):
    net = module_with_net(tmp_path / "code", "net_of_a_test", 3)
    source = saved(tmp_path / "model", net)
    module = sys.modules.pop("net_of_a_test")
    text = message(lambda: load_model(source))
    assert "got no module 'net_of_a_test'" in text
    assert "log the model with code_paths or as pt2" in text
    del module.Net
    sys.modules["net_of_a_test"] = module
    assert "Net" in message(lambda: load_model(source))
    del sys.modules["net_of_a_test"]


def test_two_models_with_code_of_the_same_name(store, tmp_path):
    sources, before = [], list(sys.path)
    for width in (3, 5):
        folder = tmp_path / f"code{width}"
        net = module_with_net(folder, "net_of_a_test", width)
        code = [str(folder / "net_of_a_test.py")]
        sources.append(saved(tmp_path / f"model{width}", net, code_paths=code))
        del sys.modules["net_of_a_test"]
    assert [load_model(source).width for source in (*sources, sources[0])] == [3, 5, 3]
    sys.path[:] = before
    sys.modules.pop("net_of_a_test", None)


def test_files_that_do_not_load(store, tmp_path):
    source = saved(tmp_path / "model", nn.Linear(3, 2))
    (tmp_path / "model" / "data" / "model.pth").write_bytes(b"not a network")
    assert "a PyTorch model that loads" in message(lambda: load_model(source))
    torch.save({"weight": torch.ones(2)}, tmp_path / "model" / "data" / "model.pth")
    assert message(lambda: load_model(source)).startswith("expected")


def saved_estimator(folder, model, serialization_format):
    """A local MLflow folder of the sklearn flavor, as a source."""
    mlflow.sklearn.save_model(
        model,
        str(folder),
        serialization_format=serialization_format,
        pip_requirements=["scikit-learn"],
        skops_trusted_types=["numpy.dtype", "sklearn.tree._tree.Tree"],
    )
    return resolve(str(folder))


@pytest.mark.parametrize("serialization_format", ["skops", "cloudpickle"])
def test_scikit_learn_estimators_load_and_are_audited(store, tmp_path, serialization_format):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = toy_data(60)
    for name, model in {
        "alone": LogisticRegression(C=0.5, tol=1e-10),
        "in_pipeline": make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-10)),
    }.items():
        model.fit(x, y)
        source = saved_estimator(tmp_path / name, model, serialization_format)
        assert source.flavor == "sklearn"
        found = flataudit.audit(load_model(source), (x, y))
        wanted = flataudit.audit(model, (x, y))
        assert found.gap == wanted.gap
        assert found.penalty == wanted.penalty
        assert found.penalty.value == pytest.approx(1 / (0.5 * 60))
        assert found.penalty.source == "estimator"


@pytest.mark.parametrize("serialization_format", ["skops", "cloudpickle"])
def test_forests_are_refused_without_loading(store, tmp_path, serialization_format, monkeypatch):
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = toy_data(30)
    forest = RandomForestClassifier(n_estimators=2)
    pipeline = make_pipeline(StandardScaler(), forest).fit(x, y)
    alone = saved_estimator(tmp_path / "alone", forest, serialization_format)
    nested = saved_estimator(tmp_path / "pipeline", pipeline, serialization_format)
    model = load_model(nested)
    monkeypatch.setattr(mlflow.sklearn, "load_model", None)
    for call in (lambda: load_model(alone), lambda: flataudit.audit(model, (x, y))):
        text = message(call)
        assert "got RandomForestClassifier (scikit-learn)" in text
        assert "flatness is undefined" in text


@pytest.mark.parametrize("serialization_format", ["skops", "cloudpickle"])
def test_scikit_learn_files_run_code_too(store, tmp_path, serialization_format, monkeypatch):
    from sklearn.linear_model import LogisticRegression

    x, y = toy_data(30)
    source = saved_estimator(tmp_path / "m", LogisticRegression().fit(x, y), serialization_format)
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    assert "got a scikit-learn model in" in message(lambda: load_model(source))


def test_scikit_learn_files_that_do_not_load(store, tmp_path):
    from sklearn.linear_model import LogisticRegression

    x, y = toy_data(30)
    source = saved_estimator(tmp_path / "m", LogisticRegression().fit(x, y), "cloudpickle")
    (tmp_path / "m" / "model.pkl").write_bytes(b"not an estimator")
    assert "a scikit-learn model that loads" in message(lambda: load_model(source))


@pytest.mark.parametrize("serialization_format", ["skops", "cloudpickle"])
def test_a_registered_estimator_is_audited_with_its_own_penalty(store, serialization_format):
    """From version to verdict: other labels, a pipeline in a search; not the run's record."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from flataudit.config import AuditOptions
    from flataudit.stages import run_audit

    x, y = store.x, store.y * 10 - 5
    inner = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-10))
    search = GridSearchCV(inner, {"logisticregression__C": [0.1, 0.5]}, cv=3).fit(x, y)
    name = f"estimator_{serialization_format}"
    experiment = mlflow.get_experiment_by_name("training").experiment_id
    with mlflow.start_run(experiment_id=experiment) as run:
        mlflow.log_params({"optimizer": "adam", "lr": 0.1, "steps": 9, "batch_size": 8})
        mlflow.sklearn.log_model(
            search,
            name=name,
            registered_model_name=name,
            serialization_format=serialization_format,
            pip_requirements=["scikit-learn"],
            skops_trusted_types=[
                "numpy.dtype",
                "sklearn.metrics._scorer._PassthroughScorer",
                "sklearn.model_selection._split.StratifiedKFold",
            ],
        )
    log_training_data(run.info.run_id, x, y)
    found = run_audit(f"models:/{name}/1", "mlflow", None, AuditOptions(training="auto"))
    report = found["report"]
    wanted = flataudit.audit(search, (x, y))
    assert report["gap"]["value"] == pytest.approx(wanted.gap.value, rel=1e-9)
    assert report["model"]["flavor"] == "sklearn"
    assert report["penalty"]["source"] == "estimator"
    assert report["data"]["sha256"] == wanted.data.sha256
    assert "data_mismatch" not in [w["code"] for w in report["warnings"]]
    tags = mlflow.MlflowClient().get_model_version(name, "1").tags
    assert tags["flataudit.verdict"] in ("pass", "warn")


@pytest.mark.parametrize(
    ("flavor", "expected"),
    [
        ("xgboost", "flatness is undefined"),
        ("onnx", "got onnx; log the"),
        ("transformers", "got no model's class: what it was fitted to"),
    ],
)
def test_other_flavors_are_refused(store, tmp_path, flavor, expected):
    (tmp_path / "MLmodel").write_text(
        f"flavors:\n  {flavor}: {{}}\n  python_function: {{loader_module: x}}\n"
    )
    source = resolve(str(tmp_path))
    assert source.flavor == flavor
    assert expected in message(lambda: load_model(source))
