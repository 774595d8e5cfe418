"""What a report shows of earlier audits."""

from __future__ import annotations

import mlflow
import pytest
from mlflow import MlflowClient

from flataudit import history, keys
from flataudit.store import embedded_store, ensure_experiment, use_tracking


@pytest.fixture
def client(tmp_path):
    use_tracking(embedded_store(tmp_path / "store"))
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


def past(client, uri, gap=0.05, *, status="FINISHED", **metrics):
    """One audit's run."""
    experiment = ensure_experiment(keys.EXPERIMENT)
    tags = {"flataudit.model_uri": uri, "flataudit.verdict": "pass", "flataudit.confidence": "ok",
            "flataudit.model_id": f"m-{uri}"}  # fmt: skip
    run_id = client.create_run(experiment, tags=tags).info.run_id
    for key, value in ({"gap": gap} | metrics).items():
        if value is not None:
            client.log_metric(run_id, f"flataudit/{key}", value)
    client.set_terminated(run_id, status)
    return run_id


def test_the_history_has_every_version_of_this_model_only(client):
    wanted = [
        past(client, "models:/past_1/1", 0.05, gap_low=0.04, gap_high=0.06),
        past(client, "models:/past_1/2", 0.04, heldout_gap=0.045),
    ]
    past(client, "models:/past_12/1")
    past(client, "models:/pastx1/1")  # _ is a wildcard in MLflow's filters
    past(client, "models:/past_1/3", None)  # failed before it had a gap
    past(client, "models:/past_1/3", status="FAILED")
    found = history.earlier_audits("past_1")
    assert [row["run_id"] for row in found] == wanted[::-1]
    assert [row["version"] for row in found] == ["2", "1"]
    new, old = found
    assert (old["gap"], old["gap_low"], old["gap_high"], old["heldout_gap"]) == (
        0.05, 0.04, 0.06, None)  # fmt: skip
    assert (new["heldout_gap"], new["gap_low"], new["verdict"]) == (0.045, None, "pass")
    assert new["audited_at"] > "2000"


def test_no_history_without_a_registered_model_or_experiment(client):
    assert history.earlier_audits(None) == []
    assert history.earlier_audits("digits") == []
    assert client.get_experiment_by_name(keys.EXPERIMENT) is None  # a reader makes nothing


def test_a_gap_measured_later_stands_beside_the_prediction(client):
    """The newest observation of an audit counts."""
    run_id = past(client, "models:/seen/1", 0.05, gap_low=0.04, gap_high=0.06)
    experiment = ensure_experiment(keys.OBSERVATIONS)
    for gap in (0.01, 0.045):
        tags = {keys.RUN_ID: run_id, keys.URI_TAG: "models:/seen/1"}
        seen = client.create_run(experiment, tags=tags).info.run_id
        measured = {"flataudit/gap": 0.05, "flataudit/gap_low": 0.04, "flataudit/gap_high": 0.06,
                    keys.OBSERVED_GAP: gap, keys.OBSERVED_GAP_SE: 0.01}  # fmt: skip
        for key, value in measured.items():
            client.log_metric(seen, key, value)
        client.set_terminated(seen)
    (row,) = history.earlier_audits("seen")
    assert (row["run_id"], row["observed_gap"], row["heldout_gap"]) == (run_id, 0.045, None)


def test_an_unreadable_history_is_logged_and_empty(client, monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("no")

    monkeypatch.setattr(MlflowClient, "search_runs", fails)
    past(client, "models:/past-unread/1")
    assert history.earlier_audits("past-unread") == []
    assert "could not read the earlier audits of past-unread: could not read the" in caplog.text
    assert ": no;" in caplog.text


def test_names_with_quotes(client):
    past(client, "models:/o'past/1")
    assert len(history.earlier_audits("o'past")) == 1
