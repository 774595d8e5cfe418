"""Calls that are tried again: which errors pass, and that no failing call makes anything twice."""

import errno
import logging
from types import SimpleNamespace

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from flataudit import keys, retries, stages, sweeps, tracking
from flataudit.audit_key import KEY_TAG
from flataudit.errors import InputError, StoreError
from flataudit.pipeline import Models
from flataudit.report import words
from flataudit.retries import patient, retried, transient
from flataudit.store import embedded_store, ensure_experiment
from tests.audited_store import make_report, pointed_at, register

TRIES = 3


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(retries, "DELAYS", (0.0,) * (TRIES - 1))


def response(status):
    answer = requests.Response()
    answer.status_code = status
    return requests.HTTPError("answered", response=answer)


def mlflow_error(text, code):
    from mlflow.protos import databricks_pb2

    return MlflowException(text, getattr(databricks_pb2, code))


PASSING = [
    ConnectionError("reset"), TimeoutError(), OSError(errno.ESTALE, "stale"),
    requests.ConnectionError("refused"), requests.exceptions.ChunkedEncodingError("broke off"),
    response(503), response(429),
    mlflow_error("(sqlite3.OperationalError) database is locked", "TEMPORARILY_UNAVAILABLE"),
]  # fmt: skip
LASTING = [
    OSError(errno.ENOSPC, "No space left on device"), PermissionError("read-only"),
    NotADirectoryError("a file"), ValueError("a bug"), response(403), InputError("bad"),
    mlflow_error("no such run", "RESOURCE_DOES_NOT_EXIST"),
    mlflow_error("(sqlite3.OperationalError) database or disk is full", "TEMPORARILY_UNAVAILABLE"),
    mlflow_error("attempt to write a readonly database", "TEMPORARILY_UNAVAILABLE"),
    # MLflow's HTTP client has tried for minutes when it says so.
    MlflowException("API request to http://x failed with exception Max retries exceeded"),
]  # fmt: skip


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_what_may_pass(error):
    assert transient(error)
    wrapped = StoreError("could not log")
    wrapped.__cause__ = error
    assert transient(wrapped)


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_stays(error):
    assert not transient(error)


class Failing:
    """Callable that raises the errors in turn, then returns how often it was called."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return self.calls


def test_as_often_as_there_are_delays(monkeypatch):
    slept = []
    monkeypatch.setattr(retries, "DELAYS", (1.0, 2.0))
    monkeypatch.setattr(retries.time, "sleep", slept.append)
    assert retried(Failing(ConnectionError(), ConnectionError())) == 3
    assert 0.5 <= slept[0] <= 1.0 <= slept[1] <= 2.0
    always = Failing(*[ConnectionError("gone")] * 9)
    with pytest.raises(ConnectionError, match="gone"):
        retried(always)
    assert always.calls == 3
    bad = Failing(ValueError())
    with pytest.raises(ValueError):  # noqa: PT011 (has no text)
        retried(bad)
    assert bad.calls == 1


def test_no_further_try_once_patience_is_over(monkeypatch):
    monkeypatch.setattr(retries, "PATIENCE", -1.0)
    late = Failing(ConnectionError())
    with pytest.raises(ConnectionError):
        retried(late)
    assert late.calls == 1


def test_a_store_that_is_gone_is_not_waited_for_again():
    """After a call that was given up the next are tried once, until one succeeds."""

    class Store:
        failing = 0

        def read(self):
            self.failing -= 1
            if self.failing >= 0:
                raise ConnectionError
            return "read"

    store = Store()
    client = patient(store)
    store.failing = TRIES + 1
    for _ in range(2):
        with pytest.raises(ConnectionError):
            client.read()
    assert store.failing == 0
    assert client.read() == "read"
    store.failing = TRIES - 1
    assert client.read() == "read"


# --- every single call of a logged audit --------------------------------------------------------


class Killed(BaseException):
    """Nothing catches it and goes on."""


class Faults:
    """Counts the calls of the MLflow client, and lets some fail before or after they are done."""

    def __init__(self, monkeypatch):
        self.names, self.which, self.after, self.depth = [], set(), False, 0
        self.error = ConnectionError
        for name in dir(MlflowClient):
            works = getattr(MlflowClient, name)
            if not name.startswith("_") and callable(works):
                monkeypatch.setattr(MlflowClient, name, self.around(name, works))

    def around(self, name, works):
        def call(client, *args, **kwargs):
            if self.depth:  # one method of the client inside another
                return works(client, *args, **kwargs)
            number = len(self.names)
            self.names.append(name)
            if number in self.which and not self.after:
                raise self.error("the request was lost")
            self.depth += 1
            try:
                found = works(client, *args, **kwargs)
            finally:
                self.depth -= 1
            if number in self.which:
                raise ConnectionError("the answer was lost")
            return found

        return call

    def now(self, which=(), after=False):
        self.names.clear()
        self.error = ConnectionError
        self.which, self.after = which, after


@pytest.fixture
def store(tmp_path, monkeypatch):
    with pointed_at(embedded_store(tmp_path / "store")):
        (tmp_path / "drawn").mkdir()
        (tmp_path / "drawn" / "report.json").write_text("{}")
        monkeypatch.setattr(tracking, "rendered", lambda *_: str(tmp_path / "drawn"))
        ensure_experiment(keys.EXPERIMENT)
        yield MlflowClient()


@pytest.fixture
def faults(store, monkeypatch):
    with monkeypatch.context() as patch:
        yield Faults(patch)


def audits(client):
    where = client.get_experiment_by_name(keys.EXPERIMENT).experiment_id
    return client.search_runs([where], order_by=["attributes.start_time ASC"])


def report_of(source, **changes):
    report = make_report(**changes)
    return report | {"model": report["model"] | source.report_fields()}


def log(source, audit_id, **changes):
    report = report_of(source, **changes)
    options = {"train": "train.npz", "penalty": 0.1}
    return tracking.log_audit(report, {}, source, options=options, duration=1.5, audit_id=audit_id)


def seen(client, source):
    version = client.get_model_version(source.name, source.version)
    tags = {k: v for k, v in version.tags.items() if k not in (keys.AUDITED_AT, keys.RUN_ID)}
    return tags, version.description


def check_once(client, source, run_id):
    """Everything is there, and once."""
    (run,) = [r for r in audits(client) if r.data.tags[keys.URI_TAG] == source.uri]
    run = client.get_run(run.info.run_id)  # with its models
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    report = report_of(source)
    assert run.data.metrics == tracking.metrics_of(report) | {keys.DURATION: 1.5}
    assert all(len(client.get_metric_history(run_id, key)) == 1 for key in run.data.metrics)
    model = client.get_logged_model(source.model_id)
    assert len(model.metrics) == len(tracking.metrics_of(report))
    assert (len(run.inputs.dataset_inputs), len(run.inputs.model_inputs)) == (1, 1)
    assert run.data.params == {"train": "train.npz", "penalty": "0.1"}
    version = client.get_model_version(source.name, source.version)
    for key in (keys.RUN_ID, keys.VERDICT, keys.GAP, keys.AUDITED_AT):
        assert version.tags[key] == run.data.tags[key]
    assert version.tags[keys.VERDICT] == words.verdict(report)
    assert version.description.count("flataudit:begin") == 1


def tags_set(names):
    """Which calls set a version's tag."""
    return [number for number, name in enumerate(names) if name == "set_model_version_tag"]


@pytest.mark.parametrize("after", [False, True], ids=["request", "answer"])
def test_each_call_may_fail_once(store, faults, after):
    """With the request lost, and with it done and only the answer lost."""
    source = register("first")
    faults.now()
    log(source, "id-first")
    names = list(faults.names)
    assert {"create_run", "log_artifacts", "log_batch", "set_model_version_tag"} <= set(names)
    for number, name in enumerate(names):
        source = register(f"{name}-{number}")
        faults.now({number}, after)
        run_id = log(source, f"id-{number}")
        faults.now()
        check_once(store, source, run_id)


@pytest.mark.slow
def test_a_call_that_fails_for_ever_leaves_the_old_verdict(store, faults):
    """From any call on; and the same audit, logged again later, completes its own run."""
    source = register("probe")
    log(source, "old-probe")
    faults.now()
    log(source, "new-probe", confidence="low")
    *written, _ = tags_set(faults.names)  # all but the mark that the verdict is whole
    for number in range(written[-1] + 1):
        source = register(f"gone-{number}")
        log(source, f"old-{number}")
        before = seen(store, source)
        faults.now(range(number, 10**6))
        with pytest.raises(StoreError, match="the request was lost"):
            log(source, f"new-{number}", confidence="low")
        faults.now()
        tags, _ = seen(store, source)
        assert tags[keys.VERDICT] == before[0][keys.VERDICT]
        run_id = log(source, f"new-{number}", confidence="low")
        runs = [r for r in audits(store) if r.data.tags[keys.URI_TAG] == source.uri]
        assert [r.info.status for r in runs] == ["FINISHED"] * 2
        assert run_id in {r.info.run_id for r in runs}
        assert all(len(store.get_metric_history(run_id, key)) == 1
                   for key in runs[0].data.metrics)  # fmt: skip
        version = store.get_model_version(source.name, source.version)
        assert (version.tags[keys.VERDICT], version.tags[keys.RUN_ID]) == ("warn", run_id)


@pytest.mark.slow
def test_while_a_call_cannot_be_repeated_everything_is_set_back(store, faults):
    """One call fails as often as it is tried; the store works again when it is tidied up."""
    source = register("probe")
    log(source, "old")
    faults.now()
    log(source, "new", confidence="low")
    *written, _ = tags_set(faults.names)
    for number in written:
        source = register(f"back-{number}")
        log(source, f"old-{number}")
        before = store.get_model_version(source.name, source.version)
        faults.now(range(number, number + TRIES))
        with pytest.raises(StoreError):
            log(source, f"new-{number}", confidence="low")
        after = store.get_model_version(source.name, source.version)
        assert (after.tags, after.description) == (before.tags, before.description)


@pytest.mark.slow
def test_killed_between_any_two_calls(store, faults):
    """What a kill -9 leaves: not even the tidying up happens. Logging again completes the run."""
    probe = register("probe")
    faults.now()
    log(probe, "probe")
    for number in range(len(faults.names)):
        source = register(f"killed-{number}")
        faults.now(range(number, 10**6))
        faults.error = Killed
        with pytest.raises(Killed):
            log(source, f"id-{number}")
        faults.now()
        check_once(store, source, log(source, f"id-{number}"))


@pytest.mark.parametrize("rules", ["new rules", "the same rules"])
def test_killed_in_a_second_audit_the_version_is_unaudited(store, faults, monkeypatch, rules):
    """Until its tags are all of one audit: neither selected as audited nor skipped by the key."""

    def log_again(source, key):
        with monkeypatch.context() as patch:
            if rules == "new rules":
                patch.setattr(tracking, "policy_hash", lambda: "new")
            return tracking.log_audit(
                report_of(source, confidence="low"), {}, source, audit_id=key,
                run_tags={KEY_TAG: key},
            )  # fmt: skip

    def unaudited(source):
        with monkeypatch.context() as patch:
            if rules == "new rules":
                patch.setattr(sweeps, "policy_hash", lambda: "new")
            return sweeps.select_versions(Models(name=source.name, select="unaudited")) != []

    probe = register("probe")
    log(probe, "old")
    faults.now()
    log_again(probe, "new")
    names = list(faults.names)
    first, last = names.index("delete_model_version_tag"), tags_set(names)[-1]
    assert last - first >= 9
    for number in range(first, last + 1):
        source = register(f"half-{number}")
        log(source, "old-" + source.name)
        faults.now(range(number, 10**6))
        faults.error = Killed
        with pytest.raises(Killed):
            log_again(source, source.name)
        faults.now()
        untouched = number == first
        assert unaudited(source) == (not untouched or rules == "new rules")
        assert sweeps.audited_run(source.name, source) is None
        assert sweeps.broken_off(source.name, source) == source.name
        run_id = log_again(source, source.name)
        assert not unaudited(source)
        assert sweeps.audited_run(source.name, source) == run_id


def test_without_the_last_mark_the_verdict_stands(store, faults, caplog):
    """All but the policy's tag is written: the audit counts as logged, the version as unaudited."""
    source, probe = register("unmarked"), register("probe")
    faults.now()
    log(probe, "probe")
    last = tags_set(faults.names)[-1]
    faults.now(range(last, last + TRIES))
    with caplog.at_level(logging.WARNING):
        run_id = log(source, "id")
    assert "unmarked version 1 is written, but not that it is whole" in caplog.text
    tags = store.get_model_version("unmarked", "1").tags
    assert (tags[keys.RUN_ID], tags[keys.VERDICT], keys.POLICY in tags) == (run_id, "pass", False)
    assert sweeps.select_versions(Models(name="unmarked", select="unaudited")) != []
    assert log(source, "id") == run_id
    assert sweeps.select_versions(Models(name="unmarked", select="unaudited")) == []


def test_an_error_is_on_record_once_and_apart(store, faults):
    source = register("failed")
    faults.now()
    first = tracking.log_error(source, "out of memory", audit_id="same")
    assert tracking.log_error(source, "out of memory", audit_id="same") == first
    run_id = log(source, "same")
    assert run_id != first
    statuses = {r.info.run_id: r.info.status for r in audits(store)}
    assert statuses == {first: "FAILED", run_id: "FINISHED"}


def test_a_second_run_of_the_same_id_is_taken_away(store, monkeypatch):
    """As MLflow's HTTP client leaves behind that repeats a request whose answer was lost."""
    works = MlflowClient.create_run

    def twice(client, *args, **kwargs):
        works(client, *args, **kwargs)
        return works(client, *args, **kwargs)

    source = register("twice")
    monkeypatch.setattr(MlflowClient, "create_run", twice)
    check_once(store, source, log(source, "twice"))


def test_the_stages_pass_the_id_on(monkeypatch):
    given = []
    monkeypatch.setattr(tracking, "log_audit", lambda *a, **k: given.append(k["audit_id"]))
    monkeypatch.setattr(tracking, "log_error", lambda *a, **k: given.append(k["audit_id"]))
    monkeypatch.setattr("flataudit.store.use_tracking", lambda uri: uri)
    source = dict.fromkeys(("name", "version", "model_id", "run_id", "flavor", "local_path"))
    loaded = {"audit_id": "made-once", "source": source, "train": "x", "heldout": None}
    read = SimpleNamespace(uri="models:/a/1")
    monkeypatch.setattr("flataudit.models.registry.ModelSource.from_dict", lambda _: read)
    stages.log(loaded, {"report": {}, "display": {}, "seconds": 1.0}, {})
    stages.log_failure(loaded, "broke", {})
    assert given == ["made-once", "made-once"]


def test_a_store_that_fails_in_the_estimate_says_nothing_about_the_model(store, monkeypatch):
    logged = []
    monkeypatch.setattr(stages, "log_failure", lambda *found: logged.append(found))

    def estimate(loaded, options):
        raise StoreError("could not read the training data")

    broken = stages.Stages(load=lambda *_: {}, estimate=estimate)
    with pytest.raises(StoreError):
        stages.run_audit("models:/a/1", "x.npz", None, stages.AuditOptions(), stages=broken)
    assert logged == []
