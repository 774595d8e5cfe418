"""The gate against real stores: what it reads, what it records, what it sets.

What is read from a store and written there runs on each of `tests.audited_store.STORES`; the rest
on the embedded one, and on the others slowly.
"""

import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flataudit import gate, keys, records, turns
from flataudit.audits import latest_audit
from flataudit.errors import InputError, StoreError
from flataudit.gate import Audit, run_gate
from flataudit.identity import identify
from flataudit.models.registry import load_model, resolve
from flataudit.policy import parse_policy
from flataudit.tracking import log_error
from tests.audited_store import (
    EMBEDDED,
    STORES,
    backdate,
    gate_in_child,
    log_report,
    make_report,
    pointed_at,
    register,
    sqlite_uri,
    store_of,
)
from tests.mlflow_store import REQUIREMENTS
from tests.shells import ROOT, environment, make_models

POLICY = parse_policy("max_gap: 0.1\nmax_age_days: 30\nbaseline: champion\nmax_regression: 0.02")
GOOD, BAD = make_report(gap=0.05), make_report(gap=0.5)


each_store = pytest.mark.parametrize("store_uri", STORES, indirect=True, scope="module")


@pytest.fixture(scope="module", params=EMBEDDED)
def store_uri(request):
    with store_of(request) as uri:
        yield uri


@pytest.fixture
def store(store_uri):
    with pointed_at(store_uri):
        yield store_uri


@pytest.fixture
def client(store):
    return MlflowClient()


@pytest.fixture
def name(request, store):
    """A registered model of this test's own."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def alias_of(client):
    """Text, though a sqlite store gives numbers."""

    def found(name):
        version = client.get_registered_model(name).aliases.get("champion")
        return None if version is None else str(version)

    return found


def decisions(client):
    experiment = client.get_experiment_by_name(keys.GATES)
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def recorded(client, run_id):
    path = client.download_artifacts(run_id, keys.DECISION)
    return json.loads(Path(path).read_text())


def named(decision):
    return {rule.name: rule for rule in decision.rules}


def with_mode(mode):
    return POLICY.model_copy(update={"mode": mode})


# --- what it decides on -------------------------------------------------------------------------


@each_store
def test_a_pass_sets_the_alias_and_is_recorded(client, name, alias_of):
    source = register(name)
    audit_run = log_report(source, GOOD)
    decision = run_gate(source.uri, POLICY, alias="champion", policy_file="p.yaml")
    assert (decision.outcome, decision.exit_code, decision.alias_set) == ("pass", 0, True)
    assert (decision.model_id, decision.audit_run_id) == (source.model_id, audit_run)
    assert alias_of(name) == source.version
    assert decision.alias == {"name": "champion", "before": None, "after": "1", "waited_for": 0}

    run = client.get_run(decision.gate_run_id)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "flataudit-gates"
    assert recorded(client, decision.gate_run_id) == decision.to_dict()
    tags = run.data.tags
    assert (tags[keys.GATE], tags[keys.GATE_STATE]) == ("pass", "set")
    assert (tags[keys.MODEL_ID], tags[keys.RUN_ID]) == (source.model_id, audit_run)
    assert run.data.metrics["flataudit/gate_max_gap"] == GOOD["gap"]["high"]
    version = client.get_model_version(name, "1").tags
    assert (version[keys.GATE], version[keys.GATE_RUN]) == ("pass", decision.gate_run_id)
    assert keys.GATE_OVERRIDE not in version


def test_the_json_is_the_contract_s(name):
    source = register(name)
    log_report(source, GOOD)
    found = json.loads(json.dumps(run_gate(source.uri, POLICY).to_dict(), allow_nan=False))
    assert {"outcome", "mode", "rules", "model_id", "audit_run_id", "alias_set"} <= set(found)
    assert {"name", "value", "threshold", "passed"} <= set(found["rules"][0])
    assert found["alias_set"] is False
    assert found["policy"]["sha256"] == POLICY.sha256


@each_store
def test_a_refusal_leaves_the_alias_and_is_recorded(client, name, alias_of):
    first, second = register(name), register(name)
    log_report(first, GOOD)
    log_report(second, BAD)
    run_gate(first.uri, POLICY, alias="champion")
    decision = run_gate(second.uri, POLICY, alias="champion")
    assert (decision.outcome, decision.exit_code, decision.alias_set) == ("refuse", 1, False)
    assert alias_of(name) == "1"
    assert [r.name for r in decision.rules if not r.passed] == ["max_gap", "baseline"]
    assert decision.baseline["version"] == "1"
    assert recorded(client, decision.gate_run_id)["outcome"] == "refuse"
    assert client.get_run(decision.gate_run_id).info.status == "FINISHED"
    assert client.get_model_version(name, "2").tags[keys.GATE] == "refuse"


def test_without_an_alias_nothing_is_set(name, alias_of):
    source = register(name)
    log_report(source, GOOD)
    assert run_gate(source.uri, POLICY).exit_code == 0
    assert alias_of(name) is None


@each_store
def test_only_the_latest_audit_counts(name):
    source = register(name)
    log_report(source, BAD)
    log_report(source, GOOD)
    assert run_gate(source.uri, POLICY).outcome == "pass"
    log_report(source, BAD)
    assert run_gate(source.uri, POLICY).outcome == "refuse"


def test_a_failed_audit_after_a_good_one_refuses(name):
    source = register(name)
    log_report(source, GOOD)
    log_error(source, "out of memory")
    decision = run_gate(source.uri, POLICY)
    assert (decision.outcome, decision.exit_code) == ("refuse", 1)
    assert "failed" in named(decision)["audit"].message


def test_tags_copied_to_another_model_do_not_pass(client, name):
    """As `copy_model_version` copies them, and as people do by hand."""
    good, other = register(name), register(name)
    log_report(good, GOOD)
    for key, value in client.get_model_version(name, good.version).tags.items():
        client.set_model_version_tag(name, other.version, key, value)
    assert client.get_model_version(name, other.version).tags[keys.VERDICT] == "pass"
    decision = run_gate(other.uri, POLICY)
    assert (decision.outcome, decision.exit_code) == ("refuse", 2)
    assert decision.audit_run_id is None


def test_a_copy_of_the_same_model_has_the_same_audit(client, name):
    source = register(name)
    audit_run = log_report(source, GOOD)
    copied = client.copy_model_version(source.uri, f"{name}-copy")
    decision = run_gate(f"models:/{copied.name}/{copied.version}", POLICY)
    assert (decision.outcome, decision.audit_run_id) == ("pass", audit_run)


def test_mlflow_2_models_by_name_version_and_files(client, name, tmp_path):
    first, second = register(name, like_mlflow_2=True), register(name, like_mlflow_2=True)
    assert first.model_id is None
    audit_run = log_report(first, GOOD)
    decision = run_gate(first.uri, POLICY)
    assert (decision.outcome, decision.audit_run_id) == ("pass", audit_run)
    assert (decision.model_id, decision.identity) == (None, first.identity)
    assert run_gate(second.uri, POLICY).exit_code == 2
    (tmp_path / "more").write_text("other files, same name and version")
    client.log_artifact(first.run_id, str(tmp_path / "more"), "old")
    assert run_gate(first.uri, POLICY).exit_code == 2


@each_store
@pytest.mark.parametrize("form", ["models:/{name}/1", "models:/{name}@now", "models:/{model_id}"])
def test_every_form_of_a_uri_finds_the_audit(client, name, form):
    source = register(name)
    log_report(source, GOOD)
    client.set_registered_model_alias(name, "now", "1")
    uri = form.format(name=name, model_id=source.model_id)
    assert identify(uri).identity == resolve(uri).identity == source.identity
    assert run_gate(uri, parse_policy("max_gap: 0.1")).outcome == "pass"


def test_identity_needs_no_files(monkeypatch, client, name):
    source = register(name)
    copied = client.copy_model_version(source.uri, f"{name}-copy")
    monkeypatch.setattr("flataudit.models.registry._located", None)
    assert identify(source.uri).identity == source.identity
    assert identify(f"models:/{name}-copy/{copied.version}").identity == source.identity


def test_age(client, name):
    source = register(name)
    run_id = log_report(source, GOOD)
    old = datetime.now(UTC) - timedelta(days=31)
    backdate(run_id, old.isoformat(timespec="seconds"))
    decision = run_gate(source.uri, POLICY)
    assert decision.exit_code == 1
    assert named(decision)["max_age_days"].value == pytest.approx(31, abs=0.01)
    backdate(run_id, (old + timedelta(days=2)).isoformat(timespec="seconds"))
    assert run_gate(source.uri, POLICY).exit_code == 0


def test_a_report_with_missing_values_fails_closed(name):
    source = register(name)
    log_report(source, {**GOOD, "gap": {**GOOD["gap"], "high": None}, "predicted_test_nll": None})
    rules = named(run_gate(source.uri, parse_policy("max_gap: 9\nmax_predicted_test_nll: 9")))
    assert [(r.value, r.passed) for r in rules.values()] == [(None, False)] * 2


def test_a_champion_without_an_audit_fails_closed_and_the_champion_itself_is_skipped(client, name):
    first, second = register(name), register(name)
    client.set_registered_model_alias(name, "champion", "1")
    log_report(second, GOOD)
    decision = run_gate(second.uri, POLICY, alias="champion")
    assert decision.exit_code == 1
    assert named(decision)["baseline"].message == "no predicted_test_nll for champion, version 1;" \
        " audit it"  # fmt: skip
    log_report(first, GOOD)
    assert run_gate(second.uri, POLICY, alias="champion").exit_code == 0
    decision = run_gate(second.uri, POLICY, alias="champion")
    assert named(decision)["baseline"].skipped


def test_an_audit_by_other_rules_is_named(client, name):
    source = register(name)
    run_id = log_report(source, GOOD)
    assert run_gate(source.uri, POLICY).notes == ()
    client.set_tag(run_id, keys.POLICY, "0" * 64)
    decision = run_gate(source.uri, POLICY)
    assert decision.exit_code == 0
    (note,) = decision.notes
    assert note.startswith(f"the audit (run {run_id}) was made by other rules")


def test_no_audit_is_a_recorded_refusal(client, name):
    source = register(name)
    decision = run_gate(source.uri, POLICY, alias="champion")
    assert (decision.outcome, decision.exit_code) == ("refuse", 2)
    assert recorded(client, decision.gate_run_id)["rules"][0]["name"] == "audit"


# --- modes and overrides ------------------------------------------------------------------------


@pytest.mark.parametrize("report", [GOOD, BAD, None], ids=["good", "bad", "none"])
@pytest.mark.parametrize("how", ["option", "policy"])
def test_a_dry_run_sets_nothing_and_exits_0(client, name, alias_of, report, how):
    source = register(name)
    if report is not None:
        log_report(source, report)
    client.update_model_version(name, source.version, "As it was.")
    before = client.get_model_version(name, source.version)
    policy, dry = (POLICY, True) if how == "option" else (with_mode("dry_run"), False)
    decision = run_gate(source.uri, policy, alias="champion", dry_run=dry, override="no effect")
    assert (decision.mode, decision.exit_code, decision.alias_set) == ("dry_run", 0, False)
    assert decision.outcome == ("pass" if report is GOOD else "refuse")
    assert decision.override is None
    after = client.get_model_version(name, source.version)
    assert (after.tags, after.description) == (before.tags, before.description)
    assert alias_of(name) is None
    assert recorded(client, decision.gate_run_id)["mode"] == "dry_run"


def test_disabled_checks_nothing_and_sets_nothing(client, name, alias_of):
    source = register(name)
    decision = run_gate(source.uri, with_mode("disabled"), alias="champion")
    assert (decision.mode, decision.exit_code, decision.rules) == ("disabled", 0, ())
    assert decision.alias_set is False
    assert alias_of(name) is None
    assert client.get_run(decision.gate_run_id).data.tags[keys.GATE] == "disabled"


@each_store
def test_an_override_is_never_a_silent_pass(client, name, alias_of):
    source = register(name)
    log_report(source, BAD)
    client.update_model_version(name, "1", "Ask Ann.")
    decision = run_gate(
        source.uri, POLICY, alias="champion", override="the old one\n is  down: TICKET-7"
    )
    assert (decision.outcome, decision.exit_code, decision.alias_set) == ("refuse", 0, True)
    assert alias_of(name) == "1"
    assert decision.override["reason"] == "the old one is down: TICKET-7"
    assert decision.override["by"]
    assert datetime.fromisoformat(decision.override["at"]).tzinfo
    assert decision.override["rules"] == ["max_gap"]
    assert client.get_run(decision.gate_run_id).data.tags[keys.GATE] == "overridden"
    version = client.get_model_version(name, "1")
    assert version.tags[keys.GATE] == "overridden"
    assert "TICKET-7" in version.tags[keys.GATE_OVERRIDE]
    assert "passed by override.** the old one is down: TICKET-7" in version.description
    assert version.description.startswith("Ask Ann.")

    log_report(source, GOOD)
    run_gate(source.uri, POLICY, alias="champion")
    version = client.get_model_version(name, "1")
    assert version.tags[keys.GATE] == "pass"
    assert keys.GATE_OVERRIDE not in version.tags
    assert "override" not in version.description
    assert version.description.startswith("Ask Ann.")


def test_an_override_that_was_not_needed_is_none(client, name):
    source = register(name)
    log_report(source, GOOD)
    decision = run_gate(source.uri, POLICY, override="just in case")
    assert (decision.outcome, decision.override) == ("pass", None)
    assert decision.notes == ("the override was not needed",)
    assert client.get_model_version(name, "1").tags[keys.GATE] == "pass"


def test_an_override_without_any_audit(name, alias_of):
    source = register(name)
    decision = run_gate(source.uri, POLICY, alias="champion", override="first release")
    assert (decision.outcome, decision.exit_code) == ("refuse", 0)
    assert "audit" in decision.override["rules"]
    assert alias_of(name) == "1"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"override": "  "}, "expected a reason for --override"),
        ({"override": "x" * 501}, "got 501 characters"),
        ({"alias": "latest"}, "which MLflow reserves"),
        ({"alias": "V12"}, "which MLflow reserves"),
        ({"alias": "two words"}, "letters, digits"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(client, name, more, said):
    source = register(name)
    before = len(decisions(client))
    with pytest.raises(InputError, match=said):
        run_gate(source.uri, POLICY, **more)
    assert len(decisions(client)) == before


def test_an_alias_needs_a_registered_version(name):
    source = register(name)
    with pytest.raises(InputError, match="expected a registered version for --alias"):
        run_gate(f"models:/{source.model_id}", POLICY, alias="champion")


# --- the alias ----------------------------------------------------------------------------------


@each_store
def test_no_record_no_alias(monkeypatch, name, alias_of):
    source = register(name)
    log_report(source, GOOD)
    for broken in ("log_dict", "log_batch", "create_run"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, broken, _raise)
            with pytest.raises(StoreError) as caught:
                run_gate(source.uri, POLICY, alias="champion")
        assert caught.value.exit_code == 3
        assert alias_of(name) is None


def _raise(*_, **__):
    raise OSError("disk full")


@each_store
def test_a_gate_that_broke_off_holds_up_nobody(monkeypatch, name, alias_of):
    source = register(name)
    log_report(source, GOOD)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", _raise)
        with pytest.raises(StoreError):
            run_gate(source.uri, POLICY, alias="champion")
    assert run_gate(source.uri, POLICY, alias="champion").alias["waited_for"] == 0


@each_store
@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("set_terminated", "disk full.*; the alias champion of {name} is set, to version 1$"),
        ("log_dict", "could not record that champion of {name} is now version 1 .it is set.: disk"),
        ("get_registered_model", "could not read whether the alias champion of {name} is now"),
    ],
)
def test_what_fails_after_the_alias_is_set_says_that_it_is(
    monkeypatch, name, alias_of, broken, said
):
    """Whatever write or reading fails from then on; the exit code alone cannot say it."""
    source = register(name)
    log_report(source, GOOD)
    original = MlflowClient.set_registered_model_alias
    with monkeypatch.context() as patch:

        def sets_and_then_the_store_breaks(*args):
            original(*args)
            patch.setattr(MlflowClient, broken, _raise)

        patch.setattr(MlflowClient, "set_registered_model_alias", sets_and_then_the_store_breaks)
        with pytest.raises(StoreError, match=said.format(name=name)) as caught:
            run_gate(source.uri, POLICY, alias="champion")
    assert caught.value.exit_code == 3
    assert alias_of(name) == "1"


@each_store
def test_a_lost_answer_is_no_lost_alias(monkeypatch, client, name, alias_of):
    """The store sets the alias, and the connection breaks before it says so."""
    source = register(name)
    log_report(source, GOOD)
    original = MlflowClient.set_registered_model_alias

    def breaks(*args):
        original(*args)
        _raise()

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", breaks)
    decision = run_gate(source.uri, POLICY, alias="champion")
    assert (decision.alias_set, decision.alias["after"]) == (True, "1")
    assert recorded(client, decision.gate_run_id) == decision.to_dict()


@each_store
def test_an_alias_that_cannot_be_set(monkeypatch, client, name, alias_of):
    first, second = register(name), register(name)
    for source in (first, second):
        log_report(source, GOOD)
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", _raise)
    with pytest.raises(StoreError, match=r"could not set .* \(it is not set\): disk full"):
        run_gate(first.uri, POLICY, alias="champion")
    monkeypatch.undo()
    run_gate(first.uri, POLICY, alias="champion")
    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", _raise)
    with pytest.raises(StoreError, match=r"could not set .* \(it names version 1\): disk full"):
        run_gate(second.uri, POLICY, alias="champion")
    assert alias_of(name) == "1"


@each_store
def test_who_loses_the_alias_at_once_says_so(monkeypatch, client, name):
    """Someone who takes no turns, such as a person in the UI, between writing and reading."""
    first, second = register(name), register(name)
    log_report(first, GOOD)
    original = MlflowClient.set_registered_model_alias

    def contested(self, model, alias, version):
        original(self, model, alias, version)
        original(self, model, alias, second.version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", contested)
    with pytest.raises(StoreError, match="got version 2, set by someone else"):
        run_gate(first.uri, POLICY, alias="champion")
    (run,) = [r for r in decisions(client) if r.data.tags[keys.MODEL_ID] == first.model_id]
    assert (run.info.status, run.data.tags[keys.GATE_STATE]) == ("FAILED", "lost")
    assert recorded(client, run.info.run_id)["alias_set"] is False


@each_store
def test_other_grounds_at_the_last_moment_are_decided_on_again(monkeypatch, client, name, alias_of):
    """The champion moves, or the model is audited again, while the decision is written down."""
    first, second = register(name), register(name)
    log_report(first, make_report(gap=0.01))
    log_report(second, GOOD)
    original = records.log_decision
    moves = [lambda: client.set_registered_model_alias(name, "champion", "1")]

    def slow(*args):
        original(*args)
        if moves:
            moves.pop()()

    monkeypatch.setattr(records, "log_decision", slow)
    decision = run_gate(second.uri, POLICY, alias="champion")
    assert decision.exit_code == 1  # 0.04 worse than the champion that came in between
    assert alias_of(name) == "1"
    assert decision.alias["before"] == "1"
    assert recorded(client, decision.gate_run_id)["outcome"] == "refuse"

    moves.append(lambda: log_report(first, BAD))
    assert run_gate(first.uri, POLICY, alias="best").exit_code == 1


@each_store
def test_a_gate_waits_for_the_one_ahead_and_then_meets_its_champion(client, name, alias_of):
    first, second = register(name), register(name)
    log_report(first, make_report(gap=0.01))
    log_report(second, GOOD)
    experiment = client.get_experiment_by_name(keys.GATES)
    queue = turns.queue_of(name, "champion")
    tags = {keys.GATE_QUEUE: queue, keys.GATE_TICKET: "1"}
    ahead = client.create_run(experiment.experiment_id, tags=tags).info.run_id
    found = []
    thread = threading.Thread(
        target=lambda: found.append(run_gate(second.uri, POLICY, alias="champion"))
    )
    thread.start()
    time.sleep(1)
    assert thread.is_alive()
    client.set_registered_model_alias(name, "champion", "1")
    client.set_terminated(ahead)
    thread.join(60)
    (decision,) = found
    assert (decision.exit_code, decision.alias["waited_for"]) == (1, 1)
    assert alias_of(name) == "1"


@each_store
@pytest.mark.parametrize("ticket", ["1", None], ids=["ticket", "undecided"])
def test_a_gate_that_died_is_given_up(monkeypatch, client, name, alias_of, ticket):
    monkeypatch.setattr(turns, "PATIENCE", 0.3)
    source = register(name)
    log_report(source, GOOD)
    experiment = client.get_experiment_by_name(keys.GATES)
    tags = {keys.GATE_QUEUE: turns.queue_of(name, "champion")}
    tags |= {keys.GATE_TICKET: ticket} if ticket else {}
    dead = client.create_run(experiment.experiment_id, tags=tags).info.run_id
    assert run_gate(source.uri, POLICY, alias="champion").alias_set
    run = client.get_run(dead)
    assert run.info.status == "KILLED"
    assert run.data.tags[keys.GATE_STATE].startswith("given up by ")


@each_store
def test_who_was_given_up_sets_nothing(monkeypatch, client, name, alias_of):
    source = register(name)
    log_report(source, GOOD)
    original = records.log_decision

    def suspended(client, run_id, decision):
        original(client, run_id, decision)
        client.set_terminated(run_id, "KILLED")

    monkeypatch.setattr(records, "log_decision", suspended)
    with pytest.raises(StoreError, match="no alias was set"):
        run_gate(source.uri, POLICY, alias="champion")
    assert alias_of(name) is None


@each_store
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all-good", "each-must-be-better"])
def test_fifty_gates_at_once(store, client, alias_of, kind):
    """One alias, no decision lost, and the decisions follow one another in one order."""
    count, name = 50, f"fifty-{kind}"
    sources = [register(name) for _ in range(count)]
    gaps = [0.05 if kind == "all-good" else 0.05 + 0.0005 * (i * 17 % count) for i in range(count)]
    for source, gap_value in zip(sources, gaps, strict=True):
        log_report(source, make_report(gap=gap_value))
    text = "max_gap: 0.2\nbaseline: champion\nmax_regression: 0"
    context = multiprocessing.get_context("forkserver")
    stores = ("tracking", "model_registry")
    context.set_forkserver_preload(
        ["tests.audited_store", *(f"mlflow.store.{name}.sqlalchemy_store" for name in stores)]
    )
    jobs = [(store, source.uri, text, "champion") for source in sources]
    with context.Pool(count, maxtasksperchild=1) as pool:
        found = pool.map(gate_in_child, jobs, chunksize=1)
    assert [job["error"] for job in found if "error" in job] == []

    runs = {run.info.run_id: run for run in decisions(client)}
    assert {job["gate_run_id"] for job in found} <= set(runs)
    for job in found:
        assert runs[job["gate_run_id"]].info.status == "FINISHED"
        assert recorded(client, job["gate_run_id"]) == job

    winners = [job for job in found if job["alias_set"]]
    before = [job["alias"]["before"] for job in winners]
    after = [job["alias"]["after"] for job in winners]
    assert len(set(before)) == len(before)  # no two replaced the same champion
    chain, at = [], None
    steps = dict(zip(before, after, strict=True))
    while at in steps:
        at = steps[at]
        chain.append(at)
    assert len(chain) == len(winners)
    assert list(client.get_registered_model(name).aliases) == ["champion"]
    assert alias_of(name) == chain[-1]
    if kind == "all-good":
        assert len(winners) == count
    else:
        won = [gaps[int(version) - 1] for version in chain]
        assert won == sorted(won, reverse=True)
        assert won[-1] == min(gaps)


# --- what it imports, and an audit on the way ---------------------------------------------------


def test_a_gate_on_a_stored_audit_needs_neither_torch_nor_netcal(store, name, tmp_path):
    source = register(name)
    log_report(source, GOOD)
    (tmp_path / "p.yaml").write_text("max_gap: 0.1\nbaseline: champion\nmax_age_days: 3")
    code = (
        "import sys; from flataudit.cli import main\n"
        f"sys.argv = ['flataudit', 'gate', {source.uri!r}, '--policy', 'p.yaml',"
        f" '--alias', 'champion', '--tracking-uri', {store!r}]\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'netcal', 'prefect', 'matplotlib', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert b"champion is now version 1 (was not set)" in done.stdout


@pytest.mark.slow
def test_mlflow_run_gates_too(tmp_path):
    """`mlflow run . -e gate`: a pass is the project's success, a refusal its failure."""
    (tmp_path / "policy.yaml").write_text("max_gap: 0.1\nbaseline: champion")
    bin_ = Path(sys.executable).parent
    with sqlite_uri() as uri, pointed_at(uri):
        client, sources = MlflowClient(), [register("project"), register("project")]
        for source, report in zip(sources, (GOOD, BAD), strict=True):
            log_report(source, report)

        def run(source):
            return subprocess.run(
                [bin_ / "mlflow", "run", ROOT, "-e", "gate", "--env-manager=local",
                 "-P", f"model_uri={source.uri}", "-P", "alias=champion",
                 "-P", f"policy={tmp_path / 'policy.yaml'}", "-P", f"json={tmp_path / 'd.json'}"],
                env=environment(
                    PATH=os.pathsep.join([str(bin_), os.environ["PATH"]]), MLFLOW_TRACKING_URI=uri
                ),
                cwd=tmp_path, capture_output=True, text=True,
            )  # fmt: skip

        done = run(sources[0])
        assert done.returncode == 0, done.stderr
        decision = json.loads((tmp_path / "d.json").read_text())
        assert (decision["outcome"], decision["alias_set"]) == ("pass", True)
        assert recorded(client, decision["gate_run_id"]) == decision
        refused = run(sources[1])
        assert refused.returncode == 1, refused.stderr
        assert "models:/project/2: REFUSED" in refused.stdout + refused.stderr
        decision = json.loads((tmp_path / "d.json").read_text())
        assert (decision["outcome"], decision["alias_set"]) == ("refuse", False)
        assert str(client.get_model_version_by_alias("project", "champion").version) == "1"
        projects = client.search_runs(["0"], order_by=["attributes.start_time"])
        assert [run.info.status for run in projects] == ["FINISHED", "FAILED"]
        assert {run.data.tags["mlflow.project.entryPoint"] for run in projects} == {"gate"}


@pytest.fixture
def models():
    made = make_models()
    with pointed_at(made.uri):
        yield made


def test_with_train_an_unaudited_version_is_audited_once(models):
    client = MlflowClient()
    with mlflow.start_run():
        mlflow.pytorch.log_model(
            load_model(resolve("models:/good/1")), name="gated", serialization_format="pickle",
            pip_requirements=REQUIREMENTS, registered_model_name="gated",
        )  # fmt: skip
    uri = "models:/gated/1"
    lenient = parse_policy("max_gap: 100\nmax_age_days: 1")
    audit = Audit(models.data, models.heldout)
    dry = run_gate(uri, lenient, dry_run=True, audit=audit)
    assert (dry.outcome, dry.audit_run_id) == ("pass", None)
    assert keys.VERDICT not in client.get_model_version("gated", "1").tags
    assert latest_audit(resolve(uri).identity) is None
    first = run_gate(uri, lenient, audit=audit)
    assert (first.outcome, first.exit_code) == ("pass", 0)
    assert first.audit_run_id
    assert run_gate(uri, lenient, audit=audit).audit_run_id == first.audit_run_id
    old = datetime.now(UTC) - timedelta(days=2)
    backdate(first.audit_run_id, old.isoformat(timespec="seconds"))
    assert run_gate(uri, lenient).exit_code == 1
    renewed = run_gate(uri, lenient, audit=audit)
    assert renewed.exit_code == 0
    assert renewed.audit_run_id not in (None, first.audit_run_id)


def test_the_user_is_mlflow_s_or_the_machine_s(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    assert gate._user() == "ann"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.setenv("LOGNAME", "bob")
    assert gate._user() == "bob"
