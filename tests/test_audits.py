"""Past audits, read back."""

import json

import pytest
from mlflow import MlflowClient

from flataudit import audits, tracking
from flataudit.audits import gap_changes, latest_audit, past_audits, read_report
from flataudit.errors import InputError, StoreError
from tests.audited_store import (
    SHA,
    STORES,
    log_report,
    make_report,
    pointed_at,
    register,
    store_of,
)


@pytest.fixture(scope="module", params=STORES)
def uri(request):
    with store_of(request) as found:
        yield found


@pytest.fixture(autouse=True)
def store(uri):
    with pointed_at(uri):
        yield uri


def test_an_audit_reads_back_as_it_was_logged():
    source = register("reads-back")
    report = make_report(gap=0.05, calibration__verdict="not_shown")
    run_id = log_report(source, report)
    (found,) = past_audits("reads-back")
    assert found.run_id == run_id
    assert (found.name, found.version, found.identity) == ("reads-back", "1", source.model_id)
    assert (found.gap, found.gap_low, found.gap_high) == tuple(
        report["gap"][key] for key in ("value", "low", "high")
    )
    assert found.predicted_test_nll == report["predicted_test_nll"]["value"]
    assert (found.verdict, found.confidence, found.calibration) == ("pass", "ok", "not_shown")
    assert (found.estimator, found.family, found.evidence) == ("soft_rank", "categorical", "loo")
    assert (found.warnings, found.data_sha256) == (("high_leverage",), SHA)
    assert (found.policy, found.error) == (tracking.policy_hash(), False)
    assert found.heldout_gap is None
    assert found.when.tzinfo is not None
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["warnings"] == ["high_leverage"]
    assert read_report(found)["gap"] == report["gap"]
    assert audits.audit_of_run(run_id) == found


def test_newest_first_by_name_and_by_identity():
    first, second = register("several"), register("several")
    runs = [log_report(s, make_report(gap=g)) for s, g in ((first, 0.1), (second, 0.2),
                                                           (first, 0.3))]  # fmt: skip
    assert [a.run_id for a in past_audits("several")] == runs[::-1]
    assert [a.run_id for a in past_audits("several", limit=2)] == runs[:0:-1]
    assert [a.run_id for a in past_audits(identity=first.identity)] == [runs[2], runs[0]]
    assert latest_audit(second.identity).run_id == runs[1]
    assert latest_audit("m-none") is None
    changes = gap_changes(past_audits("several"))
    assert changes == [pytest.approx(0.1), pytest.approx(0.1), None]


@pytest.mark.parametrize("name", ["a_b", "a-b", "it's", "50%", "[x]", "Ä b", 'two"'])
def test_names_mean_themselves(name):
    """`_` and `%` are wildcards in MLflow's filters, quotes end them."""
    log_report(register(name), make_report())
    other = name.replace("_", "x").replace("%", "xyz").replace("-", "_")
    if other != name:
        log_report(register(other), make_report())
    assert {audit.name for audit in past_audits(name)} == {name}


def test_a_run_whose_logging_broke_off_does_not_count_and_a_failed_audit_does():
    source = register("broken")
    good = log_report(source, make_report())
    broken = log_report(source, make_report(gap=0.9))
    client = MlflowClient()
    client.set_terminated(broken, "FAILED")
    assert latest_audit(source.identity).run_id == good
    client.update_run(broken, "RUNNING")
    assert latest_audit(source.identity).run_id == good
    failed = tracking.log_error(source, "out of memory")
    latest = latest_audit(source.identity)
    assert (latest.run_id, latest.error, latest.gap) == (failed, True, None)
    with pytest.raises(InputError, match="failed; audit it again"):
        read_report(latest)
    client.delete_run(failed)
    assert latest_audit(source.identity).run_id == good


def test_pages(monkeypatch):
    source = register("pages")
    runs = [log_report(source, make_report()) for _ in range(5)]
    monkeypatch.setattr(audits, "PAGE", 2)
    assert [a.run_id for a in past_audits("pages")] == runs[::-1]


def test_a_list_makes_one_request_a_page(monkeypatch):
    source = register("calls")
    for _ in range(3):
        log_report(source, make_report())
    calls = []
    original = MlflowClient.search_runs
    monkeypatch.setattr(
        MlflowClient, "search_runs", lambda *a, **k: calls.append(1) or original(*a, **k)
    )
    for name in ("get_run", "download_artifacts", "list_artifacts", "get_metric_history"):
        monkeypatch.setattr(MlflowClient, name, None)
    assert len(past_audits("calls")) == 3
    assert len(calls) == 1


def test_a_report_of_another_model_is_refused():
    first, second = register("swapped"), register("swapped")
    run_id = log_report(first, make_report())
    MlflowClient().set_tag(run_id, "flataudit.model_id", second.identity)
    with pytest.raises(StoreError, match="got that of"):
        read_report(latest_audit(second.identity))


def test_no_audit_at_all(tmp_path):
    from flataudit.store import embedded_store

    with pytest.raises(InputError, match="id of an audit run"):
        audits.audit_of_run("0" * 32)
    with pointed_at(embedded_store(tmp_path / "empty")):
        assert past_audits() == []


def test_a_time_that_is_none_falls_back_on_the_run_s_start():
    run_id = log_report(register("timeless"), make_report())
    MlflowClient().set_tag(run_id, "flataudit.audited_at", "yesterday")
    (found,) = past_audits("timeless")
    started = MlflowClient().get_run(run_id).info.start_time / 1000
    assert abs(found.when.timestamp() - started) <= 1
