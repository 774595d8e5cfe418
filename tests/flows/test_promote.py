"""The promotion flow: the command line's gate, and a flow that fails where it refuses."""

import json

import pytest
from mlflow import MlflowClient

from flataudit.gate import GateRefusedError
from tests.audited_store import log_report, make_report, pointed_at, register, sqlite_uri


@pytest.fixture(scope="module")
def uri():
    with sqlite_uri() as found:
        yield found


def test_promotion_and_refusal(server, uri, tmp_path):
    from flows.promote import promote_flow

    with pointed_at(uri):
        good, bad = register("flow"), register("flow")
        log_report(good, make_report(gap=0.05))
        log_report(bad, make_report(gap=0.5))
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_gap: 0.1")
    decision = promote_flow(good.uri, str(policy), tracking_uri=uri)
    assert (decision["outcome"], decision["alias_set"]) == ("pass", True)
    assert json.loads(json.dumps(decision)) == decision
    assert decision["policy"]["file"] == str(policy)
    with pytest.raises(GateRefusedError, match="got a refusal by max_gap"):
        promote_flow(bad.uri, {"max_gap": 0.1}, tracking_uri=uri)
    version = MlflowClient(uri).get_model_version_by_alias("flow", "champion").version
    assert str(version) == good.version
    # A decision is never taken from a cache: the same call decides again.
    again = promote_flow(good.uri, str(policy), tracking_uri=uri)
    assert again["gate_run_id"] != decision["gate_run_id"]
