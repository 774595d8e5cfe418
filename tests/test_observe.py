"""Observations of real models: the loss that an audit would measure, and what is recorded."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from flataudit import keys, stages
from flataudit.audits import read_report, required_audit
from flataudit.config import AuditOptions
from flataudit.errors import InputError
from flataudit.identity import identify
from flataudit.models.registry import resolve
from flataudit.observe import measure_here, observe
from flataudit.track_record import read_outcomes
from tests.audited_store import STORES, pointed_at, store_of
from tests.shells import make_models


@pytest.fixture(scope="module", params=STORES)
def made(request):
    with store_of(request) as uri, pointed_at(uri):
        yield make_models(uri)


@pytest.fixture
def models(made):
    with pointed_at(made.uri):
        yield made


@pytest.fixture
def client(models):
    return MlflowClient()


def audited(client, models, name, heldout=None):
    """A version of a registered model of its own, audited without pictures."""
    found = client.copy_model_version("models:/good/1", name)
    uri = f"models:/{name}/{found.version}"
    result = stages.run_audit(uri, models.data, heldout, AuditOptions())
    return uri, result["run_id"], result["report"]


def test_the_observed_gap_is_the_one_an_audit_with_these_data_reports(client, models):
    uri, run_id, report = audited(client, models, "observed")
    assert report["heldout"] is None
    found = observe(uri, models.heldout)
    _, _, with_heldout = audited(client, models, "observed", models.heldout)
    expected = with_heldout["heldout"]
    seen = found["observed"]
    assert seen["nll"] == pytest.approx(expected["nll"], abs=1e-13)
    assert seen["gap"] == pytest.approx(expected["gap"], abs=1e-13)
    assert seen["se"] == pytest.approx(expected["gap_se"], abs=1e-13)
    assert seen["accuracy"] == expected["accuracy"]
    assert (seen["n"], found["audit_run_id"]) == (40, run_id)
    assert found["predicted"]["gap"] == report["gap"]["value"]


def test_what_is_recorded(client, models):
    uri, audit_run, report = audited(client, models, "noted")
    found = observe(uri, models.heldout)
    run = client.get_run(found["observation_run_id"])
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "flataudit-observations"
    assert run.data.metrics[keys.OBSERVED_GAP] == found["observed"]["gap"]
    assert run.data.metrics["flataudit/gap"] == report["gap"]["value"]
    assert run.data.tags[keys.RUN_ID] == audit_run
    path = client.download_artifacts(run.info.run_id, "flataudit/observation.json")
    assert json.loads(Path(path).read_text())["observed"] == found["observed"]
    model = client.get_logged_model(resolve(uri).model_id)
    linked = [m for m in model.metrics if m.run_id == run.info.run_id]
    assert {m.key for m in linked} == {
        keys.OBSERVED_GAP, keys.OBSERVED_GAP_SE, keys.OBSERVED_NLL, keys.OBSERVED_ACCURACY,
        keys.OBSERVED_SAMPLES, keys.LABELS_COUNTED, keys.LOG_E,
    }  # fmt: skip
    for tags in (client.get_run(audit_run).data.tags, client.get_model_version("noted", "1").tags):
        assert tags[keys.OBSERVED_RUN] == run.info.run_id
        assert tags[keys.OBSERVED_TEXT].startswith(f"{found['observed']['gap']:.4f} +- ")
    assert [o.run_id for o in read_outcomes("noted")] == [run.info.run_id]


def test_an_older_audit_by_its_run(client, models):
    uri, first, _ = audited(client, models, "twice")
    _, second, _ = audited(client, models, "other-name")
    # The same logged model: its audits are audits of one identity.
    assert observe(uri, models.heldout)["audit_run_id"] == second
    assert observe(uri, models.heldout, audit_run_id=first)["audit_run_id"] == first
    with pytest.raises(InputError, match="expected the id of an audit run"):
        observe(uri, models.heldout, audit_run_id=models.run_id)


def test_refusals_record_nothing(client, models, tmp_path):
    uri, _, _ = audited(client, models, "refusals")
    np.savez(tmp_path / "wide.npz", x=np.zeros((5, 9), np.float32), y=np.zeros(5, np.int64))
    np.savez(tmp_path / "labels.npz", x=models.x[:5], y=np.full(5, 7))

    def count():
        experiment = client.get_experiment_by_name(keys.OBSERVATIONS)
        return len(client.search_runs([experiment.experiment_id])) if experiment else 0

    before = count()
    for bad, data, said in (
        ("models:/infinite/1", models.heldout, "expected an audit of models:/infinite/1"),
        (uri, models.data, "got the training data"),
        (uri, str(tmp_path / "wide.npz"), "expected x that the model accepts"),
        (uri, str(tmp_path / "labels.npz"), "expected labels 0..2"),
        (uri, str(tmp_path / "none.npz"), "got none"),
    ):
        with pytest.raises(InputError, match=said):
            observe(bad, data)
    assert count() == before


def test_measure_is_json_in_json_out(client, models):
    uri, _, _ = audited(client, models, "plain")
    report = read_report(required_audit(identify(uri)))
    request = {"source": resolve(uri).to_dict(), "heldout": models.heldout, "target": None,
               "family": report["family"], "dispersion": None, "device": "cpu",
               "tracking_uri": models.uri}  # fmt: skip
    found = measure_here(json.loads(json.dumps(request)))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
