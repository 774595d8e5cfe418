import copy
import dataclasses
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

import flataudit
from flataudit import retries, tracking, versions
from flataudit.errors import StoreError
from flataudit.models.registry import ModelSource, load_model, resolve, training_record
from flataudit.report import words
from flataudit.training import parse_training
from flataudit.versions import BEGIN, DESCRIPTION_LIMIT, END, merge_description
from tests.mlflow_store import make_store
from tests.mlflow_store import tracking as pointed_at
from tests.servers import SERVED

OPTIONS = {"train": "mlflow", "heldout": None, "penalty": 0.1, "tracking_uri": "http://me:pw@host"}


@pytest.fixture(params=["embedded", *SERVED])
def store(request):
    """The embedded store, and MLflow's server with each kind of database behind it."""
    embedded = request.param == "embedded"
    made = make_store(None if embedded else request.getfixturevalue(f"{request.param}_url"))
    with pointed_at(made.uri):
        yield made


@pytest.fixture
def client(store):
    return MlflowClient()


@pytest.fixture(scope="module")
def audited():
    """A real report of the registered network and its display, both as JSON gives them back."""
    made = make_store()
    with pointed_at(made.uri):
        source = resolve("models:/digits/1")
        found = flataudit.audit(load_model(source), (made.x, made.y), penalty=0.1)
    report = found.to_dict()
    report["model"] |= source.report_fields()
    return json.loads(json.dumps([report, dict(found.display)], allow_nan=False))


@pytest.fixture
def version(client):
    """A new version of the network, of a model of its own, with a description by people."""

    def make(name, description="Digits, for the sorter."):
        found = client.copy_model_version("models:/digits/1", name)
        client.update_model_version(name, found.version, description)
        return resolve(f"models:/{name}/{found.version}")

    return make


@pytest.fixture
def undrawn(monkeypatch, tmp_path):
    """Nothing is drawn, which takes the longest: one small file stands for the artifacts."""
    monkeypatch.setattr(tracking, "rendered", lambda *_: str(tmp_path))
    (tmp_path / "report.json").write_text("{}")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No waiting before a call is tried again."""
    monkeypatch.setattr(retries, "DELAYS", (0.0, 0.0))


def runs(client):
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def read(client, run_id, name):
    return Path(client.download_artifacts(run_id, f"flataudit/{name}"))


# --- an audit of a version ----------------------------------------------------------------------


def test_an_audit_is_one_finished_run(client, version, audited, store):
    report, display = audited
    source = version("one-run")
    run_id = tracking.log_audit(report, display, source, options=OPTIONS, duration=1.5)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert client.get_experiment(run.info.experiment_id).name == "flataudit"
    assert run.data.tags["flataudit.model_uri"] == source.uri
    assert run.data.tags["flataudit.verdict"] == words.verdict(report)
    assert run.data.metrics == tracking.metrics_of(report) | {"flataudit/duration_seconds": 1.5}
    assert run.data.params == {"train": "mlflow", "penalty": "0.1"}

    logged = client.get_logged_model(store.pickle_id).metrics
    on_model = {m.key: m for m in logged if m.run_id == run_id}  # others audit this model too
    for key, value in tracking.metrics_of(report).items():
        assert on_model[key].value == value
    assert "flataudit/duration_seconds" not in on_model

    assert [item.model_id for item in run.inputs.model_inputs] == [store.pickle_id]
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "train"
    tags = {tag.key: tag.value for tag in data.tags}
    assert tags == {"mlflow.data.context": "training", "sha256": report["data"]["sha256"]}
    assert on_model["flataudit/gap"].dataset_digest == data.dataset.digest


def test_the_artifacts(client, version, audited):
    report, display = audited
    run_id = tracking.log_audit(report, display, version("artifacts"))
    names = {item.path for item in client.list_artifacts(run_id, "flataudit")}
    assert names == {
        f"flataudit/{name}"
        for name in (
            "report.html",
            "report.json",
            "reliability.png",
            "spectrum.png",
            "influence.json",
        )
    }
    assert json.loads(read(client, run_id, "report.json").read_text()) == report
    assert "<html" in read(client, run_id, "report.html").read_text()
    for name in ("reliability.png", "spectrum.png"):
        assert read(client, run_id, name).read_bytes().startswith(b"\x89PNG")
    table = json.loads(read(client, run_id, "influence.json").read_text())
    assert table["columns"][:2] == ["index", "label"]
    first = dict(zip(table["columns"], table["data"][0], strict=True))
    assert first == display["influence"][0]
    shown = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "flataudit/influence.json", "type": "table"}]
    experiment = client.get_run(run_id).info.experiment_id
    frame = client.load_table(experiment, "flataudit/influence.json", run_ids=[run_id])
    assert list(frame.columns) == table["columns"]
    assert len(frame) == len(display["influence"])


def test_the_version_s_tags_and_description(client, version, audited):
    report, display = audited
    source = version("marked")
    run_id = tracking.log_audit(report, display, source)
    found = client.get_model_version("marked", source.version)
    audited_at = datetime.fromisoformat(found.tags["flataudit.audited_at"])
    assert timedelta() <= datetime.now(UTC) - audited_at < timedelta(minutes=2)
    assert found.tags == {
        "flataudit.verdict": words.verdict(report),
        "flataudit.gap": words.gap_text(report),
        "flataudit.calibration": report["calibration"]["verdict"],
        "flataudit.confidence": report["confidence"],
        "flataudit.warnings": ", ".join(w["code"] for w in words.sorted_warnings(report)),
        "flataudit.run_id": run_id,
        "flataudit.model_id": source.model_id,
        "flataudit.policy": tracking.policy_hash(),
        "flataudit.audited_at": found.tags["flataudit.audited_at"],
    }
    experiment = client.get_run(run_id).info.experiment_id
    block = words.description_block(report, f"#/experiments/{experiment}/runs/{run_id}")
    shown = block.replace("\n", f"{BEGIN}\n", 1)  # the UI's list of versions shows the beginning
    assert found.description == f"Digits, for the sorter.\n\n{shown}\n{END}"


@pytest.mark.usefixtures("undrawn")
def test_a_second_audit_replaces_its_own_words_only(client, version, audited):
    report, display = audited
    source = version("twice", "")
    first = tracking.log_audit(report, display, source)
    name, number = "twice", source.version
    people = client.get_model_version(name, number).description.replace(END, f"{END}\nAsk Ann.")
    client.update_model_version(name, number, f"Before.\n{people}")
    client.set_model_version_tag(name, number, "owner", "Ann")
    second = tracking.log_audit(report, display, source)
    found = client.get_model_version(name, number)
    assert found.description.startswith(f"Before.\n**flataudit: {words.verdict(report)}.** Expect")
    assert found.description.endswith(f"{END}\nAsk Ann.")
    assert found.description.count(BEGIN) == 1
    assert second in found.description
    assert first not in found.description
    assert found.tags["flataudit.run_id"] == second
    assert found.tags["owner"] == "Ann"


@pytest.mark.usefixtures("undrawn")
def test_a_run_of_others_is_not_touched(client, store, version, audited, monkeypatch):
    report, display = audited
    experiment = client.get_experiment_by_name("training").experiment_id
    other = client.create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", other)
    before = client.get_run(other).to_dictionary()
    assert tracking.log_audit(report, display, version("project")) != other
    with mlflow.start_run() as active:  # resumes the one in the environment
        assert active.info.run_id == other
        tracking.log_audit(report, display, version("project"))
        assert mlflow.active_run().info.run_id == other
        assert client.get_run(other).to_dictionary()["data"]["metrics"] == {}
    assert client.get_run(other).data.tags == before["data"]["tags"]


def test_what_is_not_finite_is_never_logged(client, version, audited, store):
    report, display = copy.deepcopy(audited)
    report["estimates"]["loo"] = None
    report["premise"] = None
    report["gap"]["high"] = math.nan
    report["train"]["nll"] = math.inf
    report["calibration"]["ece"] = None
    report["penalty"]["stationarity"] = -math.inf
    metrics = tracking.metrics_of(report)
    absent = {
        "flataudit/gap_loo",
        "flataudit/information_ratio",
        "flataudit/gap_high",
        "flataudit/train_nll",
        "flataudit/ece",
        "flataudit/stationarity",
    }
    assert set(metrics) == set(tracking.metrics_of(audited[0])) - absent
    run_id = tracking.log_audit(report, display, version("finite"), duration=math.nan)
    assert client.get_run(run_id).data.metrics == metrics
    of_run = [m for m in client.get_logged_model(store.pickle_id).metrics if m.run_id == run_id]
    assert {m.key for m in of_run} == set(metrics)
    json.loads(read(client, run_id, "report.json").read_text(), parse_constant=pytest.fail)


def test_the_metrics_are_the_contract_s(audited):
    report = copy.deepcopy(audited[0])
    report["heldout"] = {"nll": 1.0, "accuracy": 0.5, "gap": 0.25, "gap_se": 0.1}
    report["estimates"]["soft_rank_recalibrated"] = {"gap": 0.5, "se": 0.1, "rank": 3, "scale": 1}
    report["estimates"]["soft_rank_blend"] = {"gap": 0.3, "se": 0.1}
    report["premise"] = {"information_ratio": 1.5, "z": 0.1, "evidence": "loo"}
    report["calibration"]["ece"] = 0.125
    report["calibration"]["slope"] = 0.75
    report["fresh_labels"] = {"n": 300, "log_e": 1.25}
    names = (
        "gap gap_low gap_high predicted_test_nll predicted_accuracy gap_soft_rank"
        " gap_soft_rank_recalibrated gap_soft_rank_blend gap_tic gap_loo soft_rank train_nll ece"
        " confidence_gap slope information_ratio stationarity heldout_gap heldout_gap_se"
        " fresh_labels log_e_value"
    )
    metrics = tracking.metrics_of(report)
    assert set(metrics) == {f"flataudit/{name}" for name in names.split()}
    assert metrics["flataudit/gap_low"] == report["gap"]["low"]
    assert metrics["flataudit/soft_rank"] == report["estimates"]["soft_rank"]["rank"]
    assert metrics["flataudit/heldout_gap"] == 0.25


# --- models without a version -------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["models:/{0.pt2_id}", "runs:/{0.run_id}/pt2"])
@pytest.mark.usefixtures("undrawn")
def test_a_logged_model_gets_the_tags(client, store, audited, uri):
    source = resolve(uri.format(store))
    run_id = tracking.log_audit(*audited, source, options={"train": "arrays"})
    model = client.get_logged_model(store.pt2_id)
    assert model.tags["flataudit.verdict"] == words.verdict(audited[0])
    assert model.tags["flataudit.run_id"] == run_id
    assert "flataudit/gap" in {m.key for m in model.metrics if m.run_id == run_id}
    assert client.get_model_version("digits", "2").tags == {}

    tracking.log_error(source, "out of memory")
    tags = client.get_logged_model(store.pt2_id).tags
    assert tags["flataudit.verdict"] == "error"
    assert "flataudit.gap" not in tags


@pytest.mark.usefixtures("undrawn")
def test_an_mlflow_2_version(client, store, audited):
    source = resolve("models:/classic/1")
    run_id = tracking.log_audit(*audited, source, options={"train": str(store.folder / "no.npz")})
    tags = client.get_model_version("classic", "1").tags
    assert tags["flataudit.model_id"] == f"classic/1/{source.artifact_sha256}"
    assert client.get_run(run_id).data.metrics == tracking.metrics_of(audited[0])


@pytest.mark.usefixtures("undrawn")
def test_a_folder_and_a_model_of_another_store_get_a_run_only(client, store, audited, version):
    folder = dataclasses.replace(resolve("models:/digits/1"), kind="folder", uri="/models/net")
    before = client.get_logged_model(store.pickle_id)
    run_id = tracking.log_audit(*audited, folder, options={"train": __file__, "heldout": "a:b"})
    run = client.get_run(run_id)
    assert run.data.metrics == tracking.metrics_of(audited[0])
    assert run.inputs.model_inputs == []
    assert client.get_logged_model(store.pickle_id).to_dictionary() == before.to_dictionary()
    contexts = {
        item.dataset.name: [t.value for t in item.tags if t.key == "mlflow.data.context"]
        for item in run.inputs.dataset_inputs
    }
    assert contexts == {"test_tracking.py": ["training"], "a:b": ["heldout"]}

    foreign = dataclasses.replace(version("foreign"), model_id="m-" + "0" * 32)
    run_id = tracking.log_audit(*audited, foreign)
    assert client.get_run(run_id).data.metrics == tracking.metrics_of(audited[0])
    tags = client.get_model_version("foreign", foreign.version).tags
    assert tags["flataudit.model_id"] == foreign.model_id


# --- a store that fails -------------------------------------------------------------------------


def fail_at(monkeypatch, method, call=1):
    """Lets the client's `method` fail from its `call`-th call on."""
    calls, works = [], getattr(MlflowClient, method)

    def failing(self, *args, **kwargs):
        calls.append(method)
        if len(calls) >= call:
            raise ConnectionError("the store is gone")
        return works(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, method, failing)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("get_experiment_by_name", 1),
        ("create_run", 1),
        ("log_artifacts", 1),
        ("log_inputs", 1),
        ("log_batch", 1),
        ("log_batch", 2),
        ("log_batch", 3),
        ("set_terminated", 1),
        ("get_model_version", 1),
        ("update_model_version", 1),
        ("set_model_version_tag", 1),
        ("set_model_version_tag", 4),
        ("set_model_version_tag", 8),  # the verdict
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_failing_store_leaves_the_old_verdict(
    client, version, audited, monkeypatch, method, call
):
    report, display = audited
    source = version("old-verdict")
    tracking.log_audit(report, display, source)
    before = client.get_model_version("old-verdict", source.version)
    known = {run.info.run_id for run in runs(client)}
    worse = copy.deepcopy(report) | {"confidence": "refused"}
    assert words.verdict(worse) != words.verdict(report)
    with monkeypatch.context() as patch:
        fail_at(patch, method, call)
        with pytest.raises(StoreError, match=r"could not .*: the store is gone"):
            tracking.log_audit(worse, display, source)
    after = client.get_model_version("old-verdict", source.version)
    assert after.tags["flataudit.verdict"] == before.tags["flataudit.verdict"]
    new = [run for run in runs(client) if run.info.run_id not in known]
    if method in ("set_terminated",):
        assert [run.info.status for run in new] == ["RUNNING"]  # could not be written either
    elif method in ("get_experiment_by_name", "create_run"):
        assert new == []
    else:
        assert [run.info.status for run in new] == ["FAILED"]
    if method != "set_model_version_tag":
        assert (after.tags, after.description) == (before.tags, before.description)


@pytest.mark.usefixtures("undrawn")
def test_a_store_that_fails_once_is_set_back_entirely(client, version, audited, monkeypatch):
    report, display = audited
    source = version("set-back")
    tracking.log_audit(report, display, source)
    before = client.get_model_version("set-back", source.version)
    works, calls = MlflowClient.set_model_version_tag, []

    def once(self, *args, **kwargs):
        calls.append(args)
        if 6 <= len(calls) <= 8:  # as often as it is tried
            raise ConnectionError("a hiccup")
        return works(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "set_model_version_tag", once)
    with pytest.raises(StoreError, match="a hiccup"):
        tracking.log_audit(copy.deepcopy(report) | {"confidence": "refused"}, display, source)
    after = client.get_model_version("set-back", source.version)
    assert (after.tags, after.description) == (before.tags, before.description)


@pytest.mark.usefixtures("undrawn")
def test_a_first_audit_that_fails_leaves_no_tags(client, version, audited, monkeypatch):
    source = version("untouched")
    with monkeypatch.context() as patch:
        fail_at(patch, "set_model_version_tag", 8)
        with pytest.raises(StoreError):
            tracking.log_audit(*audited, source)
    after = client.get_model_version("untouched", source.version)
    assert (after.tags, after.description) == ({}, "Digits, for the sorter.")


@pytest.mark.usefixtures("undrawn")
def test_a_logged_model_keeps_its_verdict_too(client, store, audited, monkeypatch):
    source = resolve(f"models:/{store.pt2_id}")
    tracking.log_audit(*audited, source)
    before = client.get_logged_model(store.pt2_id).tags
    works, calls = MlflowClient.set_logged_model_tags, []

    def once(self, *args, **kwargs):
        calls.append(args)
        if len(calls) <= 3:  # as often as it is tried
            raise ConnectionError("a hiccup")
        return works(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "set_logged_model_tags", once)
    assert tracking.log_error(source, "out of memory") is None
    assert client.get_logged_model(store.pt2_id).tags == before


def test_a_report_that_cannot_be_drawn_writes_nothing(client, version, audited, monkeypatch):
    source = version("undrawn")
    before = len(runs(client))
    with monkeypatch.context() as patch:
        patch.setattr("flataudit.report.html.render", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tracking.log_audit(*audited, source)
    assert len(runs(client)) == before
    assert client.get_model_version("undrawn", source.version).tags == {}


# --- errors of the audit ------------------------------------------------------------------------


@pytest.mark.usefixtures("undrawn")
def test_an_error_replaces_an_earlier_report(client, version, audited):
    source = version("failed")
    tracking.log_audit(*audited, source)
    run_id = tracking.log_error(source, "ran past its deadline of 5 s", options=OPTIONS)
    run = client.get_run(run_id)
    assert run.info.status == "FAILED"
    assert run.data.tags["flataudit.model_uri"] == source.uri
    assert run.data.metrics == {}
    found = json.loads(read(client, run_id, "error.json").read_text())
    assert found["error"] == "ran past its deadline of 5 s"
    assert found["model"]["uri"] == source.uri
    assert found["options"] == {"train": "mlflow", "penalty": "0.1"}
    after = client.get_model_version("failed", source.version)
    assert set(after.tags) == {
        "flataudit.verdict",
        "flataudit.run_id",
        "flataudit.model_id",
        "flataudit.audited_at",
    }
    assert after.tags["flataudit.verdict"] == "error"
    assert after.tags["flataudit.run_id"] == run_id
    assert after.description.startswith(
        "Digits, for the sorter.\n\n**flataudit: error.** The audit failed: ran past"
    )
    assert run_id in after.description

    tracking.log_audit(*audited, source)
    again = client.get_model_version("failed", source.version)
    assert again.tags["flataudit.verdict"] == words.verdict(audited[0])
    assert "error" not in again.description


@pytest.mark.usefixtures("undrawn")
def test_an_error_that_cannot_be_written_is_none(client, version, audited, monkeypatch):
    source = version("failed-store")
    tracking.log_audit(*audited, source)
    before = client.get_model_version("failed-store", source.version)
    with monkeypatch.context() as patch:
        fail_at(patch, "log_dict")
        assert tracking.log_error(source, "out of memory") is None
    after = client.get_model_version("failed-store", source.version)
    assert (after.tags, after.description) == (before.tags, before.description)


# --- the description ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        (None, "{new}"),
        ("", "{new}"),
        ("Mine.", "Mine.\n\n{new}"),
        ("Mine.\n\n\n", "Mine.\n\n{new}"),
        (f"{BEGIN}\nold\n{END}", "{new}"),
        (f"a\n{BEGIN}\nold\n{END}\nb", "a\n{new}\nb"),
        (f"a\r\n{BEGIN}old, edited{END}\r\nb", "a\r\n{new}\r\nb"),
        (f"a {BEGIN}1{END} b {BEGIN}2{END} c", "a {new} b  c"),
        (f"a {BEGIN} b", "a  b\n\n{new}"),
        (f"a {END} b", "a  b\n\n{new}"),
        (f"{BEGIN} a {BEGIN}old{END} b {END}", " a {new} b "),
        (f"{END}a{BEGIN}", "a\n\n{new}"),
    ],
)
def test_merged_descriptions(old, expected):
    merged = merge_description(old, "new")
    assert merged == expected.format(new=f"{BEGIN}\nnew\n{END}")
    again = merge_description(merged, "newer")
    assert again == expected.format(new=f"{BEGIN}\nnewer\n{END}")


@pytest.mark.parametrize(
    "old",
    [
        f"{BEGIN}\n**flataudit: pass.** as older versions wrote it\n{END}",
        f"**flataudit: warn.** Expect a loss.{BEGIN}\n\n- more\n{END}",
        f"**flataudit: warn.** Edited by people. {BEGIN} - more\n{END}",
        f"flataudit: warn. \n{BEGIN} edited by people\n{END}",
        f"**flataudit: latest audit of each version**{BEGIN}\n\n| a |\n{END}",
    ],
)
@pytest.mark.parametrize(
    "before", ["", "Ask Ann.\n", "flataudit: pass is what I expect\n\n", "**flataudit:** "]
)
def test_a_block_s_first_line_stands_before_its_marker_and_is_replaced_with_it(old, before):
    merged = merge_description(f"{before}{old}\nBye.", "**flataudit: fail.** Do not.\n\n- a")
    assert merged == f"{before}**flataudit: fail.** Do not.{BEGIN}\n\n- a\n{END}\nBye."


def test_a_block_cannot_break_out_of_its_markers():
    assert merge_description("a", f"x{END}y{BEGIN}") == f"a\n\n{BEGIN}\nxy\n{END}"


@pytest.mark.parametrize(
    ("room", "block"), [(150, "first line"), (0, None), (DESCRIPTION_LIMIT, "whole")]
)
def test_a_long_description_keeps_what_people_wrote(client, version, room, block):
    source = version("long", "x" * (DESCRIPTION_LIMIT - room))
    text = "**flataudit: pass.** Fine.\n" + "More. " * 50
    versions.set_verdict(client, source, None, {"flataudit.verdict": "pass"}, text)
    found = client.get_model_version("long", source.version)
    assert found.description.startswith("x" * (DESCRIPTION_LIMIT - room))
    assert len(found.description) <= DESCRIPTION_LIMIT
    assert found.tags["flataudit.verdict"] == "pass"
    assert ("Fine." in found.description) == (block is not None)
    assert ("More." in found.description) == (block == "whole")


# --- policy, training data ----------------------------------------------------------------------


def test_the_policy_hash_follows_policies_and_version(monkeypatch):
    before = tracking.policy_hash()
    assert len(before) == 64
    assert tracking.policy_hash() == before
    with monkeypatch.context() as patch:
        patch.setattr(tracking, "__version__", "99")
        assert tracking.policy_hash() != before
    with monkeypatch.context() as patch:
        from flataudit import selection

        stricter = dataclasses.replace(selection.SelectionPolicy(), leverage=0.5)
        patch.setattr(selection, "SelectionPolicy", lambda: stricter)
        assert tracking.policy_hash() != before


def test_a_logged_record_is_read_back(client, store):
    experiment = client.get_experiment_by_name("training").experiment_id
    run_id = client.create_run(experiment).info.run_id
    record = parse_training(
        "optimizer=adam,lr=0.1,schedule=cosine,steps=50,batch_size=20,weight_decay=0.01,loss=mse"
    )
    tracking.log_training_data(run_id, store.x, store.y, name="other", record=record)
    source = ModelSource("models:/x/1", "registry", "pytorch", "/x", run_id=run_id)
    found, _ = training_record(source, 80)
    assert found == record
