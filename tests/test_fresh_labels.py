"""The e-process from audit to audit of real models: what counts, what goes on, and the alarm."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

import flataudit
from flataudit import fresh_labels, keys, stages, tracking
from flataudit.audits import read_report, required_audit
from flataudit.calibration.eprocess import SLOPES
from flataudit.config import AuditOptions
from flataudit.errors import StoreError
from flataudit.identity import identify
from flataudit.observe import observe
from flataudit.report import html, terminal, words
from flataudit.results import UnseenLabels
from flataudit.store import ensure_experiment
from flataudit.tensors import sample_keys
from tests.audited_store import EMBEDDED, pointed_at, store_of
from tests.mlflow_store import REQUIREMENTS, toy_data, trained_net

N_TRAIN = 80
RECORD = "optimizer=sgd,lr=0.5,steps=200,weight_decay=0.01,batch_size=80"
names = itertools.count()


@pytest.fixture(scope="module", params=EMBEDDED)
def store(request):
    with store_of(request) as uri, pointed_at(uri):
        yield uri


@pytest.fixture
def client(store):
    with pointed_at(store):
        yield MlflowClient()


@pytest.fixture(scope="module")
def data():
    """x, y of 80 samples to train on and 400 others, and the network."""
    x, y = toy_data(480)
    return x, y, trained_net(x[:N_TRAIN], y[:N_TRAIN])


@pytest.fixture
def model(client, data):
    """A new registered model of the network; its URI."""
    import mlflow

    name = f"labels-{next(names)}"
    logging.getLogger("mlflow.pytorch").setLevel(logging.ERROR)
    with mlflow.start_run(experiment_id=ensure_experiment("training")):
        mlflow.pytorch.log_model(
            data[2],
            name="model",
            serialization_format="pickle",
            pip_requirements=REQUIREMENTS,
            registered_model_name=name,
        )
    return f"models:/{name}/1"


@pytest.fixture
def saved(tmp_path, data):
    """Writes rows, with other labels where given, to a file; its name."""
    x, y, _ = data

    def save(rows, labels=None):
        path = tmp_path / f"{next(names)}.npz"
        np.savez(path, x=x[rows], y=y[rows] if labels is None else labels)
        return str(path)

    return save


@pytest.fixture
def audit(saved):
    """Audits a model with held-out rows; the whole result."""
    train = saved(slice(N_TRAIN))

    def run(uri, heldout=None, **kwargs):
        return stages.run_audit(uri, train, heldout, AuditOptions(training=RECORD), **kwargs)

    return run


def counted(result):
    found = result["report"]["fresh_labels"]
    return None if found is None else (found["n"], found["looks"], found["fresh"], found["known"])


def overconfident(data, rows):
    """Labels that the network thinks least likely."""
    x, _, net = data
    with torch.no_grad():
        return net(torch.from_numpy(x[rows])).argmin(dim=1).numpy()


def test_fresh_labels_count_once_and_many_audits_are_one(client, model, audit, saved, data):
    x, y, net = data
    first, longer = slice(80, 200), slice(80, 330)
    assert counted(audit(model)) is None
    one = audit(model, saved(first))
    assert counted(one) == (120, 1, 120, 0)
    again = audit(model, saved(first))
    assert counted(again) == (120, 1, 0, 120)
    assert (
        again["report"]["fresh_labels"]["log_ratios"] == one["report"]["fresh_labels"]["log_ratios"]
    )
    grown = audit(model, saved(longer))
    assert counted(grown) == (250, 2, 130, 120)
    assert counted(audit(model)) == (250, 2, 0, 0)
    other_labels = audit(model, saved(first, labels=(y[first] + 1) % 3))
    assert counted(other_labels) == (250, 2, 0, 120)
    # All at once, in Python.
    pair = (x[longer], y[longer])
    whole = flataudit.audit(net, (x[:N_TRAIN], y[:N_TRAIN]), heldout=pair, training=RECORD)
    found = grown["report"]["fresh_labels"]
    assert found["log_ratios"] == pytest.approx(whole.fresh_labels["log_ratios"], abs=1e-9)
    assert found["log_e"] == pytest.approx(whole.fresh_labels["log_e"], abs=1e-9)
    # As it is stored, and shown.
    run = client.get_run(grown["run_id"])
    assert run.data.metrics[keys.LABELS_COUNTED] == 250
    assert run.data.metrics[keys.LOG_E] == pytest.approx(found["log_e"])
    assert json.loads(json.dumps(read_report(required_audit(identify(model)))))["fresh_labels"]
    path = client.download_artifacts(run.info.run_id, keys.FRESH_LABELS)
    assert json.loads(Path(path).read_text())["slopes"] == list(SLOPES)


def test_observations_and_audits_go_on_from_each_other(client, model, audit, saved):
    audit(model, saved(slice(80, 120)))
    seen = observe(model, saved(slice(100, 160)))
    assert [seen["fresh_labels"][k] for k in ("n", "looks", "fresh", "known")] == [80, 2, 40, 20]
    run = client.get_run(seen["observation_run_id"])
    assert run.data.metrics[keys.LABELS_COUNTED] == 80
    assert counted(audit(model, saved(slice(80, 160)))) == (80, 2, 0, 80)
    assert observe(model, saved(slice(80, 200)))["fresh_labels"]["n"] == 120


def test_an_audit_that_broke_off_does_not_count(model, audit, saved, monkeypatch):
    audit(model, saved(slice(80, 120)))
    real = tracking.set_run_tags

    def broken(*args):
        real(*args)  # all but the end of the run is written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tracking, "set_run_tags", broken)
    with pytest.raises(StoreError):
        audit(model, saved(slice(120, 200)))
    monkeypatch.setattr(tracking, "set_run_tags", real)
    assert counted(audit(model, saved(slice(120, 200)))) == (120, 2, 80, 0)


def test_another_model_and_another_family_start_anew(client, model, audit, saved, data):
    file = saved(slice(80, 120))
    assert counted(audit(model, file)) == (40, 1, 40, 0)
    copied = client.copy_model_version(model, f"copy-{next(names)}")
    uri = f"models:/{copied.name}/{copied.version}"
    assert counted(audit(uri, file)) == (40, 1, 0, 40)  # the same model by another name
    source = identify(model)
    assert fresh_labels.last_run(source.identity, "categorical") is not None
    assert fresh_labels.last_run(source.identity, "gaussian") is None
    assert fresh_labels.last_run("m-other", "categorical") is None


def test_an_estimate_that_is_older_than_another_audit_counts_nothing(model, audit, saved):
    """As Prefect keeps one: its labels stay out, and the other audit's state goes on."""
    kept = {}

    def estimate(loaded, options):
        kept.setdefault("result", stages.estimate(loaded, options))
        return kept["result"]

    old = stages.Stages(estimate=estimate)
    audit(model, saved(slice(80, 120)), stages=old, write=False)
    observed = audit(model, saved(slice(110, 200)))
    late = audit(model, saved(slice(80, 120)), stages=old)
    assert counted(late) == (90, 1, 0, 40)
    before, after = (r["report"]["fresh_labels"] for r in (observed, late))
    assert after["log_ratios"] == before["log_ratios"]
    assert after["continues"] == observed["run_id"]
    assert counted(audit(model, saved(slice(80, 120)))) == (120, 2, 30, 10)


def test_the_alarm_is_a_warning_that_stays(client, model, audit, saved, data):
    wrong = slice(80, 120)
    found = audit(model, saved(wrong, labels=overconfident(data, wrong)))
    report = found["report"]
    assert report["fresh_labels"]["alarm"]
    (warning,) = [w for w in report["warnings"] if w["code"] == "calibration_refuted"]
    assert warning["severity"] == "high"
    assert "however often it is audited" in warning["message"]
    tags = client.get_run(found["run_id"]).data.tags
    assert "calibration_refuted" in tags["flataudit.warnings"]
    assert tags["flataudit.verdict"] != "pass"
    for page in (html.render(report, found["display"]), terminal.render(report)):
        text = " ".join(page.split())
        assert "40 labels that the training did not see (one round) contradict" in text
    # Later labels, and audits without any, do not take it back; observing says it as well.
    later = audit(model)["report"]
    assert "calibration_refuted" in [w["code"] for w in later["warnings"]]
    seen = observe(model, saved(slice(120, 200)))
    assert [w["code"] for w in seen["warnings"]] == ["calibration_refuted"]
    tags = client.get_run(seen["observation_run_id"]).data.tags
    assert tags["flataudit.warnings"] == "calibration_refuted"


def test_a_state_that_cannot_be_read_counts_nothing(client, model, audit, saved, monkeypatch):
    """To start anew would count labels twice."""
    audit(model, saved(slice(80, 120)))
    identity = identify(model).identity
    labels = UnseenLabels(np.arange(3, dtype=np.uint64), np.zeros((3, len(SLOPES))))
    run_id = fresh_labels.last_run(identity, "categorical")
    folder = Path(client.download_artifacts(run_id, "flataudit"))
    damaged = folder / "fresh_labels.json"
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"slopes": [0.5]}))
    client.log_artifact(run_id, str(damaged), "flataudit")
    assert fresh_labels.look(identity, "categorical", labels) is None
    assert audit(model, saved(slice(120, 160)))["report"]["fresh_labels"] is None


@pytest.mark.parametrize(
    ("slope", "severity"), [(0.6, "high"), (0.8, "warn"), (0.95, "warn"), (1.25, "info")]
)
def test_severities(slope, severity):
    found = {"alarm": True, "slope": slope, "n": 5, "looks": 2, "log_e": 3.0, "log_e_max": 4.0,
             "threshold": 20.0}  # fmt: skip
    (warning,) = fresh_labels.warnings_of(found)
    assert warning["severity"] == severity
    assert "E was 55 at its highest and is 20 now" in warning["message"]
    assert fresh_labels.warnings_of(found | {"alarm": False}) == []
    assert fresh_labels.warnings_of(None) == []
    assert words.fresh_labels_text({}) == ""


def test_the_keys_of_samples():
    x = torch.tensor([[0.1, 0.0], [0.1, -0.0], [0.2, 0.0]], dtype=torch.float64)
    one, same, other = sample_keys(x)
    assert one == same != other
    assert (sample_keys(x.float()) == sample_keys(x)).all()
    assert (
        sample_keys(torch.tensor([[1], [2]])) != sample_keys(torch.tensor([[1.0], [2.0]]))
    ).all()
    from flataudit.inputs import Inputs

    pair = {"a": torch.ones(2, 1), "b": torch.zeros(2, 1)}
    there, back = Inputs.of(pair), Inputs.of(dict(reversed(pair.items())))
    assert (sample_keys(there) == sample_keys(back)).all()
    swapped = Inputs.of({"a": pair["b"], "b": pair["a"]})
    assert (sample_keys(there) != sample_keys(swapped)).all()
