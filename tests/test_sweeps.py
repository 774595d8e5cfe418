"""The registry's side of a sweep, on real stores: which versions, and what is audited already."""

from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flataudit import processes, sweeps, tracking
from flataudit.audit_key import KEY_TAG
from flataudit.errors import InputError
from flataudit.keys import AUDIT_ID
from flataudit.models.registry import resolve
from flataudit.pipeline import Models, make_pipeline
from flataudit.store import embedded_store, use_tracking
from flataudit.sweeps import select_versions
from tests.sweep_store import HEALTHY, make_fleet, make_registry, table


@pytest.fixture
def fleet():
    fleet = make_fleet()
    use_tracking(fleet.uri)
    yield fleet
    mlflow.set_tracking_uri(None)


@pytest.fixture
def client(fleet):
    return MlflowClient(fleet.uri)


@pytest.fixture
def many(tmp_path):
    """1,000 versions, and which of them are unaudited."""
    uri, unaudited = make_registry(tmp_path, 1000, tracking.policy_hash())
    use_tracking(uri)
    yield unaudited
    mlflow.set_tracking_uri(None)


def uris(**models):
    return [version.uri for version in select_versions(Models(**models))]


def test_each_way_to_select(client):
    client.set_registered_model_alias("fleet-a", "champion", "1")
    assert uris(name="fleet-a", select="all") == HEALTHY[:2]
    assert uris(name="fleet-a", select="latest") == ["models:/fleet-a/2"]
    assert uris(name="fleet-a", select="version", version=1) == ["models:/fleet-a/1"]
    assert uris(name="fleet-a", select="alias", alias="champion") == ["models:/fleet-a/1"]
    # Of several models those without it are left out.
    assert uris(name="fleet-*", select="alias", alias="champion") == ["models:/fleet-a/1"]
    assert uris(name="fleet-[ab]", select="latest") == ["models:/fleet-a/2", "models:/fleet-b/1"]
    assert uris(name="fleet-?", select="all") == HEALTHY
    assert len(uris(name="*", select="all")) == 6


def test_versions_are_in_the_order_of_their_numbers(many):
    found = select_versions(Models(name="many", select="all"))
    assert [int(version.version) for version in found] == list(range(1, 1001))
    assert uris(name="many", select="latest") == ["models:/many/1000"]


@pytest.mark.usefixtures("fleet")
@pytest.mark.parametrize(
    ("models", "told"),
    [
        ({"name": "float-*", "select": "all"}, "a pattern of such, got 'float-*'"),
        ({"name": "fleet", "select": "all"}, "got 'fleet'"),
        ({"name": "it's", "select": "all"}, 'got "it\'s"'),
        ({"name": "a'\"", "select": "all"}, "rename the model"),
        ({"name": "fleet-a", "select": "version", "version": 3}, "expected version 3 of fleet-a"),
        ({"name": "fleet-*", "select": "alias", "alias": "x"}, "expected alias x of fleet-*"),
    ],
)
def test_nothing_to_select(models, told):
    with pytest.raises(InputError) as caught:
        uris(**models)
    assert told in str(caught.value)


def test_unaudited_of_a_thousand(many):
    """Exactly those without a verdict of these rules and weights; no request per version."""
    found = select_versions(Models(name="many", select="unaudited"))
    assert [version.version for version in found] == many
    assert len(many) == 400


def test_a_copy_is_audited_where_its_original_is(client):
    """`copy_model_version` copies the verdict, which is about the same weights."""
    source = resolve("models:/fleet-a/1")
    tags = {
        "flataudit.policy": tracking.policy_hash(),
        "flataudit.model_id": source.identity,
        "flataudit.verdict": "pass",
    }
    for key, value in tags.items():
        client.set_model_version_tag("fleet-a", "1", key, value)
    client.copy_model_version("models:/fleet-a/1", "prod")
    client.copy_model_version("models:/prod/1", "prod")
    assert uris(name="prod", select="unaudited") == []
    client.delete_model_version_tag("prod", "2", "flataudit.verdict")
    assert uris(name="prod", select="unaudited") == ["models:/prod/2"]


def test_a_model_of_mlflow_2_is_known_by_its_files(client):
    run_id = client.get_model_version("fleet-a", "1").run_id
    files = resolve("models:/fleet-a/1").local_path
    client.log_artifacts(run_id, files, "old")
    described = Path(client.download_artifacts(run_id, "old/MLmodel"))
    lines = described.read_text().splitlines()
    described.write_text("\n".join(x for x in lines if not x.startswith("model_id")) + "\n")
    client.log_artifact(run_id, str(described), "old")
    client.create_registered_model("classic")
    client.create_model_version("classic", f"runs:/{run_id}/old", run_id=run_id)
    assert uris(name="classic", select="unaudited") == ["models:/classic/1"]
    for key, value in {
        "flataudit.policy": tracking.policy_hash(),
        "flataudit.model_id": resolve("models:/classic/1").identity,
        "flataudit.verdict": "warn",
    }.items():
        client.set_model_version_tag("classic", "1", key, value)
    assert uris(name="classic", select="unaudited") == []


# --- what is audited already --------------------------------------------------------------------


@pytest.fixture
def audited(client):
    """Logs a finished audit run with the key `abc`, and its verdict, without auditing."""

    def audited(at="2026-01-02T00:00:00+00:00", status="FINISHED", written=None, verdict="pass"):
        experiment = sweeps.ensure_experiment(tracking.EXPERIMENT)
        tags = {
            KEY_TAG: "abc",
            "flataudit.model_uri": "models:/fleet-a/1",
            "flataudit.audited_at": at,
            "flataudit.verdict": verdict,
        }
        run_id = client.create_run(experiment, tags=tags).info.run_id
        client.set_terminated(run_id, status)
        shown = {"audited_at": written or at, "verdict": verdict, "policy": tracking.policy_hash()}
        if written is None:
            shown["run_id"] = run_id
        for key, value in shown.items():
            client.set_model_version_tag("fleet-a", "1", f"flataudit.{key}", value)
        return run_id

    return audited


def found(key="abc", uri="models:/fleet-a/1"):
    return sweeps.audited_run(key, resolve(uri))


@pytest.mark.usefixtures("fleet")
def test_nothing_is_audited_in_a_new_store():
    assert found() is None


def test_an_audit_is_found_by_its_key_and_version(audited):
    run_id = audited()
    assert found() == run_id
    assert found(key="other") is None
    assert found(uri="models:/fleet-a/2") is None  # the same weights, but no verdict of its own


def test_a_later_audit_of_the_version_leaves_it_found(audited):
    run_id = audited(written="2026-01-03T00:00:00+00:00")
    assert found() == run_id


@pytest.mark.parametrize(
    "broken",
    [
        {"status": "FAILED"},
        {"status": "RUNNING"},
        {"written": "2026-01-01T00:00:00+00:00"},  # killed between the run's end and the verdict
        {"verdict": "error"},
    ],
)
def test_half_an_audit_is_none(audited, broken):
    audited(**broken)
    assert found() is None


# --- the sweep's own run ------------------------------------------------------------------------


def test_the_run_of_a_sweep(client, fleet):
    run_id = sweeps.start_sweep(make_pipeline(fleet.pipeline(tags=["a", "b"])))
    assert client.get_run(run_id).info.status == "RUNNING"
    row = {"model": "m", "state": "audited", "gap": 0.1, "low": 0.0, "high": 0.2, "error": None,
           "verdict": "pass"}  # fmt: skip
    bad = row | {"model": "n", "state": "failed", "gap": None, "error": "expected | got"}
    rows = [row, bad] + [row | {"model": f"m{i}"} for i in range(40)]
    sweeps.finish_sweep(run_id, rows, {"audited": 41, "failed": 1}, sweeps.markdown(rows))
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.metrics == {"flataudit/audited": 41.0, "flataudit/failed": 1.0}
    assert run.data.tags["flataudit.pipeline"] == "fleet"
    assert run.data.tags["flataudit.pipeline_tags"] == "a, b"
    note = run.data.tags["mlflow.note.content"].splitlines()
    assert note[2] == "| n | failed | expected / got |  |"  # the failed first
    assert note[-1] == "17 more in flataudit/sweep.json."
    assert table(client, run_id) == rows


def sweep_of(client, fleet, process, flow_run=""):
    """The run of an earlier sweep, as that process made it."""
    run_id = sweeps.start_sweep(make_pipeline(fleet.pipeline()), flow_run)
    client.set_tag(run_id, sweeps.PROCESS_TAG, process)
    return run_id


def test_runs_of_killed_sweeps_are_closed(client, fleet):
    """By evidence alone: a process that is gone, or a flow run that Prefect knows as ended."""
    here = processes.identity()
    gone = " ".join([*here.split()[:3], "1"])  # the pid is taken, by a process of another start
    elsewhere = "another-boot " + here.partition(" ")[2]
    pipeline = make_pipeline(fleet.pipeline())
    runs = {
        "gone": sweep_of(client, fleet, gone),
        "alive": sweep_of(client, fleet, here, "running"),
        "elsewhere": sweep_of(client, fleet, elsewhere, "running"),
        "crashed": sweep_of(client, fleet, elsewhere, "ended"),
        "unknown": sweep_of(client, fleet, "", ""),
    }
    other = sweeps.start_sweep(make_pipeline(fleet.pipeline(name="other")))
    client.set_tag(other, sweeps.PROCESS_TAG, gone)
    audit = client.create_run(
        client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id,
        tags={sweeps.PIPELINE_TAG: "fleet", "flataudit.model_uri": "models:/fleet-a/1",
              sweeps.PROCESS_TAG: gone},
    ).info.run_id  # fmt: skip
    now = sweeps.start_sweep(pipeline, "now")
    closed = sweeps.close_ended(pipeline, now, lambda flow_run: flow_run == "ended")
    assert set(closed) == {runs["gone"], runs["crashed"]}
    for run_id in (*runs.values(), other, audit, now):
        run = client.get_run(run_id)
        assert run.info.status == ("KILLED" if run_id in closed else "RUNNING")
        assert run.data.tags.get(sweeps.CONTINUED_TAG) == (now if run_id in closed else None)


def test_a_store_that_cannot_be_read_closes_nothing(client, fleet, monkeypatch):
    pipeline = make_pipeline(fleet.pipeline())
    run_id = sweeps.start_sweep(pipeline)
    monkeypatch.setattr(MlflowClient, "search_runs", lambda *_, **__: 1 / 0)
    assert sweeps.close_ended(pipeline, run_id, lambda _: True) == []


# --- an audit whose logging broke off -----------------------------------------------------------


def test_what_broke_off_is_completed(tmp_path):
    """The newest run of a version, if it has the key and the version not its verdict."""
    from tests.audited_store import log_report, make_report, pointed_at, register

    with pointed_at(embedded_store(tmp_path / "store")):
        client = MlflowClient()
        source = register("net")
        report = make_report()
        tags = {"run_tags": {"flataudit.audit_key": "k" * 64}}
        assert sweeps.broken_off("k" * 64, source) is None
        run_id = log_report(source, report, **tags)
        audit_id = client.get_run(run_id).data.tags["flataudit.audit_id"]
        assert sweeps.broken_off("k" * 64, source) is None
        assert sweeps.audited_run("k" * 64, source) == run_id

        client.set_model_version_tag("net", "1", "flataudit.verdict", "warn")  # all but the last
        assert sweeps.audited_run("k" * 64, source) is None
        assert sweeps.broken_off("k" * 64, source) == audit_id
        client.set_model_version_tag("net", "1", "flataudit.verdict", "pass")
        for status in ("RUNNING", "FAILED"):
            client.update_run(run_id, status)
            assert sweeps.broken_off("k" * 64, source) == audit_id
            assert sweeps.broken_off("l" * 64, source) is None
        log_report(source, report)  # by hand, since then
        assert sweeps.broken_off("k" * 64, source) is None


def test_two_at_once_have_one_audit_id(tmp_path):
    """Until a run of the model is logged: whoever asks for the same audit gets the same id."""
    from tests.audited_store import log_report, make_report, pointed_at, register

    with pointed_at(embedded_store(tmp_path / "store")):
        first, second = register("net"), register("net")
        ids = [sweeps.audit_id("k" * 64, first) for _ in range(2)]
        assert ids[0] == ids[1]
        others = {sweeps.audit_id("l" * 64, first), sweeps.audit_id("k" * 64, second)}
        assert len({ids[0], *others}) == 3
        run_id = log_report(first, make_report(), run_tags={KEY_TAG: "k" * 64})
        later = sweeps.audit_id("k" * 64, first)
        assert later not in ids
        # Its logging broke off: that run's own id.
        client = MlflowClient()
        client.update_run(run_id, "RUNNING")
        assert sweeps.audit_id("k" * 64, first) == client.get_run(run_id).data.tags[AUDIT_ID]
