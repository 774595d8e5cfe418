"""`mlflow.models.evaluate(..., evaluators="flataudit")` on a real store, for each form of model."""

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.models import MetricThreshold
from mlflow.models.evaluation.validation import ModelValidationFailedException
from sklearn.linear_model import LogisticRegression

import flataudit
from flataudit import audit_run, tracking
from flataudit.data import digest_of
from flataudit.errors import AuditFailedError, InputError
from flataudit.evaluator import FlatauditEvaluator
from flataudit.models.registry import load_model, resolve
from flataudit.store import embedded_store
from tests.mlflow_store import tracking as pointed_at
from tests.shells import ROOT, content, environment, make_models

RECORD = {"optimizer": "sgd", "lr": 0.5, "steps": 200, "weight_decay": 0.01, "batch_size": 80}
COLUMNS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def models():
    """The store; `frame/1` is a logistic regression on columns, its classes named by text."""
    made = make_models()
    with pointed_at(made.uri):
        frame = table(made.x, made.y)
        fitted = LogisticRegression(C=1.0).fit(frame[COLUMNS], frame["kind"])
        with mlflow.start_run():
            mlflow.sklearn.log_model(
                fitted, name="frame", registered_model_name="frame", pip_requirements=["skops"]
            )
    return made


@pytest.fixture(autouse=True)
def _pointed(models):
    with pointed_at(models.uri):
        yield


@pytest.fixture
def client(models):
    return MlflowClient()


@pytest.fixture(scope="module")
def heldout(models):
    with np.load(models.heldout) as file:
        return file["x"], file["y"]


@pytest.fixture(scope="module")
def wanted(models, heldout):
    """What `flataudit.audit` itself says of the network and the same data."""
    with pointed_at(models.uri):
        network = load_model(resolve("models:/good/1"))
    pair = (models.x, models.y)
    return flataudit.audit(network, pair, heldout=heldout, training=RECORD).to_dict()


def table(x, y):
    names = np.array(["left", "middle", "right"])
    return pd.DataFrame(x.astype(np.float64), columns=COLUMNS).assign(kind=names[y])


def evaluate(model, data, targets, config, **more):
    more = {"model_type": "classifier", "evaluators": "flataudit"} | more
    return mlflow.models.evaluate(model, data, targets=targets, evaluator_config=config, **more)


def state(client, name="good", version="1"):
    found = client.get_model_version(name, version)
    model_id = resolve(f"models:/{name}/{version}").model_id
    audits = client.get_experiment_by_name(tracking.EXPERIMENT)  # of other tests' audits too
    runs = [] if audits is None else client.search_runs([audits.experiment_id])
    tags = client.get_logged_model(model_id).tags
    return found.tags, found.description, tags, {run.info.run_id for run in runs}


FORMS = {
    "version": lambda m, source: "models:/good/1",
    "alias": lambda m, source: "models:/good@champion",
    "model id": lambda m, source: f"models:/{source.model_id}",
    "run": lambda m, source: f"runs:/{m.run_id}/good",
    "folder": lambda m, source: source.local_path,
    "pyfunc of a version": lambda m, source: mlflow.pyfunc.load_model("models:/good/1"),
    "pyfunc of a folder": lambda m, source: mlflow.pyfunc.load_model(source.local_path),
}


@pytest.mark.parametrize("active", [False, True], ids=["own run", "active run"])
@pytest.mark.parametrize("form", FORMS)
def test_each_form_logs_each_metric_once(models, client, heldout, wanted, form, active):
    source = resolve("models:/good/1")
    model, before = FORMS[form](models, source), state(client)
    started = mlflow.start_run() if active else None
    try:
        found = evaluate(model, *heldout, {"train": (models.x, models.y)})
    finally:
        mlflow.end_run()
    if started:
        assert found.run_id == started.info.run_id
    assert found.metrics == pytest.approx(tracking.metrics_of(wanted), rel=1e-9)
    assert client.get_run(found.run_id).data.metrics == found.metrics
    for key, value in found.metrics.items():
        assert [m.value for m in client.get_metric_history(found.run_id, key)] == [value]
    logged = client.get_logged_model(source.model_id).metrics
    on_model = [m for m in logged if m.run_id == found.run_id]
    assert {m.key: m.value for m in on_model} == found.metrics
    assert len(on_model) == len(found.metrics)
    data = client.get_run(found.run_id).inputs.dataset_inputs
    (evaluated,) = [item.dataset for item in data if item.dataset.name == "dataset"]
    assert {(m.dataset_name, m.dataset_digest) for m in on_model} == {("dataset", evaluated.digest)}
    assert state(client) == before


def test_report_and_figures(models, client, heldout, wanted, tmp_path):
    found = evaluate("models:/good/1", *heldout, {"train": (models.x, models.y)})
    names = ["influence.json", "reliability.png", "report.html", "report.json", "spectrum.png"]
    listed = {item.path for item in client.list_artifacts(found.run_id, "flataudit")}
    assert set(found.artifacts) == listed
    assert listed >= {f"flataudit/{name}" for name in names}
    report = found.artifacts["flataudit/report.json"].content
    source = resolve("models:/good/1")
    assert report["gap"]["value"] == pytest.approx(wanted["gap"]["value"], rel=1e-9)
    assert report["heldout"]["gap"] == pytest.approx(wanted["heldout"]["gap"], rel=1e-9)
    assert report["model"]["model_id"] == source.model_id
    assert report["penalty"]["source"] == "training"  # of the source run
    for name, artifact in found.artifacts.items():
        assert artifact.uri.endswith(f"/artifacts/{name}")
        path = mlflow.artifacts.download_artifacts(artifact.uri, dst_path=str(tmp_path))
        if name.endswith(".json"):
            with open(path, encoding="utf-8") as file:
                assert json.load(file) == artifact.content
    assert "<html" in found.artifacts["flataudit/report.html"].content
    assert found.artifacts["flataudit/spectrum.png"].content.format in ("PNG", None)
    found.save(str(tmp_path / "saved"))
    again = mlflow.models.EvaluationResult.load(str(tmp_path / "saved"))
    assert again.metrics == found.metrics
    assert set(again.artifacts) == set(found.artifacts)
    inputs = client.get_run(found.run_id).inputs.dataset_inputs
    tags = [{t.key: t.value for t in i.tags} for i in inputs if i.dataset.name == "train"]
    assert tags == [{"mlflow.data.context": "training", "sha256": digest_of(models.x, models.y)}]


def test_gates_by_mlflow_s_own_thresholds(models, heldout):
    found = evaluate("models:/good/1", *heldout, {"train": (models.x, models.y)})
    gap = found.metrics["flataudit/gap_high"]

    def gate(name, threshold):
        limit = MetricThreshold(threshold=threshold, greater_is_better=False)
        mlflow.validate_evaluation_results({name: limit}, found)

    gate("flataudit/gap_high", gap + 1e-6)
    with pytest.raises(ModelValidationFailedException):
        gate("flataudit/gap_high", gap - 1e-6)
    with pytest.raises(ModelValidationFailedException):
        gate("flataudit/gap_soft_rank_recalibratted", 1.0)


# --- data ---------------------------------------------------------------------------------------


def test_tables_with_named_classes(models, client, heldout):
    train, test = table(models.x, models.y), table(*heldout)
    by_frame = evaluate("models:/frame/1", test, "kind", {"train": train})
    pair = (train[COLUMNS].to_numpy(), train["kind"].to_numpy())
    by_arrays = evaluate("models:/frame/1", test, "kind", {"train": pair, "solver": "primal"})
    assert by_frame.metrics == pytest.approx(by_arrays.metrics, rel=1e-9)
    fitted = load_model(resolve("models:/frame/1"))
    wanted = flataudit.audit(fitted, pair, heldout=(test[COLUMNS].to_numpy(), test["kind"]))
    assert by_frame.metrics == pytest.approx(tracking.metrics_of(wanted.to_dict()), rel=1e-9)
    dataset = mlflow.data.from_pandas(test, targets="kind")
    assert evaluate("models:/frame/1", dataset, None, {"train": train}).metrics == pytest.approx(
        by_frame.metrics
    )


def test_data_by_name(models, client, heldout, wanted):
    """The logged data set, and held-out data that do not come through evaluate."""
    x, y = models.x[:9], models.y[:9]
    config = {"train": "mlflow", "heldout": models.heldout}
    found = evaluate("models:/good/1", x, y, config)
    assert found.metrics == pytest.approx(tracking.metrics_of(wanted), rel=1e-9)
    inputs = client.get_run(found.run_id).inputs.dataset_inputs
    digests = {i.dataset.name: i.dataset.digest for i in inputs}
    assert digests["train"] == digest_of(models.x, models.y)[: audit_run.DIGEST]


def test_no_held_out_data(models, heldout, wanted):
    config = {"train": models.data, "heldout": False}
    found = evaluate("models:/good/1", models.x, models.y, config)
    assert "flataudit/heldout_gap" not in found.metrics
    assert found.artifacts["flataudit/report.json"].content["heldout"] is None
    key = "flataudit/gap_soft_rank"
    assert found.metrics[key] == pytest.approx(tracking.metrics_of(wanted)[key], rel=1e-9)


# --- opt-in -------------------------------------------------------------------------------------


def test_is_a_plugin_of_mlflow():
    (found,) = entry_points(group="mlflow.model_evaluator", name="flataudit")
    assert found.load() is FlatauditEvaluator
    assert "flataudit" in mlflow.models.list_evaluators()


@pytest.mark.parametrize(
    ("config", "expected"),
    [(None, False), ({}, False), ({"penalty": 0.1}, False), ({"train": "a.npz"}, True)],
)
def test_needs_the_training_data_in_its_config(config, expected):
    asked = FlatauditEvaluator.can_evaluate(model_type="classifier", evaluator_config=config)
    assert asked is expected


@pytest.mark.filterwarnings("ignore::UserWarning")  # MLflow's, on its own defaults
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_is_audited_unasked(models, heldout):
    test = table(*heldout)
    config = {"default": {"log_model_explainability": False}}
    found = evaluate("models:/frame/1", test, "kind", config, evaluators=None)
    assert "accuracy_score" in found.metrics
    assert not [key for key in found.metrics if key.startswith("flataudit")]
    both = {"flataudit": {"train": table(models.x, models.y)}, **config}
    found = evaluate("models:/frame/1", test, "kind", both, evaluators=["default", "flataudit"])
    assert {"accuracy_score", "flataudit/gap"} <= set(found.metrics)


@pytest.mark.parametrize(
    ("code", "loaded"),
    [("import mlflow", False), ("import mlflow.models as m; m.list_evaluators()", True)],
)
def test_being_installed_costs_nothing(code, loaded, tmp_path):
    code += (
        "; import sys; print('flataudit.evaluator' in sys.modules,"
        " 'torch' in sys.modules, 'flataudit.audit' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(loaded), "False", "False"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_document_s_example(tmp_path, monkeypatch, capsys):
    """docs/evaluate.md is one script; it prints what it says, and its gate refuses."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    script = "\n".join(block for language, block in blocks if language == "python")
    (shown,) = (block for language, block in blocks if not language)
    with pointed_at(embedded_store(tmp_path / "store")):
        exec(compile(script, "docs/evaluate.md", "exec"), {"__name__": "example"})
    printed = capsys.readouterr().out
    number = re.compile(r"-?\d+\.\d+")
    for line in shown.splitlines():
        (found,) = (p for p in printed.splitlines() if number.sub("", p) == number.sub("", line))
        assert [float(n) for n in number.findall(found)] == pytest.approx(
            [float(n) for n in number.findall(line)], abs=0.002
        )
    assert "flataudit/gap_high" in printed.splitlines()[-1]


# --- bad input ----------------------------------------------------------------------------------

BAD = {
    "a function": (lambda x: x, {}, "a model URI or mlflow.pyfunc.load_model"),
    "trees": ("models:/forest/1", {}, "got RandomForestClassifier"),
    "no parameters": ("models:/bare/1", {}, "trained parameters"),
    "unknown option": ("models:/good/1", {"pennalty": 1}, "unknown option 'pennalty' in eval"),
    "an option of the shells": ("models:/good/1", {"deadline": 9}, "unknown option 'deadline'"),
    "another's option": ("models:/good/1", {"pos_label": 1}, "into a dict of their own"),
    "negative penalty": ("models:/good/1", {"penalty": -1}, "at least 0, got -1"),
    "no such file": ("models:/good/1", {"train": "none.npz"}, "a data file at none.npz, got none"),
    "not data": ("models:/good/1", {"train": 3}, "train in evaluator_config as (x, y)"),
    "a table without a target": (
        "models:/good/1",
        {"train": pd.DataFrame({"a": [1.0]})},
        "add 'target' to evaluator_config",
    ),
    "a table of lists": (
        "models:/good/1",
        {"train": pd.DataFrame({"a": [[1], "b"], "y": [0, 1]}), "target": "y"},
        "a table of numbers and text in train",
    ),
    "a target that is no column": (
        "models:/good/1",
        {"train": pd.DataFrame({"a": [1.0], "y": [0]}), "target": "z"},
        "got --target z; choose from: a, y",
    ),
    "held-out data that are no data": ("models:/good/1", {"heldout": True}, "got bool"),
    "the training data as held-out data": ("models:/good/1", {"train": "data"}, "not trained on"),
    "no targets": ("models:/good/1", {"targets": None}, "'heldout': False"),
    "unknown solver": ("models:/good/1", {"solver": "kfca"}, "unknown solver 'kfca'"),
    "wrong width": ("models:/good/1", {"train": "wide"}, "expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(models, client, heldout, name):
    model, changed, expected = BAD[name]
    config = {"train": (models.x, models.y)} | changed
    x, y = heldout
    more = {}
    made = {"data": heldout, "wide": (np.hstack([models.x, models.x]), models.y)}
    if isinstance(config["train"], str):
        config["train"] = made.get(config["train"], config["train"])
    if "targets" in config:
        y = config.pop("targets")
        more = {"model_type": None, "extra_metrics": [mlflow.metrics.mse()]}
    before = state(client)
    with pytest.raises(InputError) as caught:
        evaluate(model, x, y, config, **more)
    assert expected in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert state(client) == before
    (run,) = client.search_runs(["0"], max_results=1)
    assert (run.info.status, run.data.metrics) == ("FAILED", {})


def test_a_bug_is_one_line_too(models, heldout, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("flataudit.provenance.data_warnings", fails)
    with pytest.raises(AuditFailedError) as caught:
        evaluate("models:/good/1", *heldout, {"train": (models.x, models.y)})
    assert "RuntimeError: first line; run it with flataudit.audit" in str(caught.value)


def test_a_model_of_another_store(models, heldout, tmp_path):
    """A folder whose model_id this store has never seen: metrics on the run alone."""
    folder, before = resolve("models:/good/1").local_path, content(models)
    with pointed_at(embedded_store(tmp_path / "other")):
        config = {"train": (models.x, models.y), "training": RECORD}
        found = evaluate(folder, *heldout, config)
        assert MlflowClient().get_run(found.run_id).data.metrics == found.metrics
    assert content(models) == before
