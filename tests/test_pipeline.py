"""Pipeline files: what is read, what is refused and how, and the committed examples and schema."""

import json
from datetime import UTC, datetime
from pathlib import Path

import jsonschema
import pytest
import yaml

from flataudit.config import AuditOptions
from flataudit.errors import InputError
from flataudit.pipeline import (
    Options,
    Pipeline,
    Schedule,
    make_pipeline,
    read_folder,
    read_pipeline,
    schema_text,
)
from tests.shells import ROOT

FOLDER = ROOT / "pipelines"
EXAMPLES = sorted(FOLDER.glob("*.yaml"))
GOOD = """\
name: churn-nightly
model:
  name: churn
  select: latest
data:
  train: mlflow
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="churn.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def refused(write):
    """The error of a file, without the folder it is in."""

    def refused(text):
        path = write(text)
        with pytest.raises(InputError) as caught:
            read_pipeline(path)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{path.parent}/", "")

    return refused


# --- what is read -------------------------------------------------------------------------------


def test_smallest_file(write):
    found = read_pipeline(write(GOOD))
    assert found.audit_options() == AuditOptions()
    assert (found.schedule, found.deadline, found.retries, found.tags) == (None, None, 0, [])


def test_everything(write, tmp_path):
    (tmp_path / "gate.yaml").write_text("max_gap: 0.1\n")
    path = write(
        "name: all\n"
        "model: {name: 'churn-*', select: alias, alias: champion}\n"
        "data: {train: data/train.csv, heldout: /data/heldout.csv, target: churned}\n"
        "options: {penalty: 0.01, solver: dual, seed: 3, training: record.yaml}\n"
        "policy: gate.yaml\n"
        "schedule: {cron: 0 3 * * *, timezone: Europe/Berlin}\n"
        "deadline: 600\n"
        "retries: 2\n"
        "tags: [churn, 'nightly']\n"
    )
    found = read_pipeline(path)
    assert found.data.train == str(tmp_path / "data/train.csv")
    assert found.data.heldout == "/data/heldout.csv"
    assert found.policy == str(tmp_path / "gate.yaml")
    options = found.audit_options()
    assert options.training == str(tmp_path / "record.yaml")
    assert (options.penalty, options.solver, options.seed) == (0.01, "dual", 3)
    assert (options.target, options.deadline) == ("churned", 600.0)
    assert make_pipeline(found.to_dict()) == found
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


@pytest.mark.parametrize("train", ["mlflow", "package.data:load"])
def test_what_is_no_path_stays(write, train):
    assert read_pipeline(write(GOOD.replace("mlflow", train))).data.train == train


def test_options_are_those_of_an_audit():
    """A new option of an audit is one of a pipeline, unless it has a place of its own there."""
    schema = json.loads(schema_text())["$defs"]["Options"]["properties"]
    assert set(AuditOptions.model_fields) - set(schema) == {"target", "deadline", "tracking_uri"}
    assert set(Options.model_fields) == set(AuditOptions.model_fields)


def test_next_run_across_a_change_of_clocks():
    schedule = Schedule(cron="30 2 * * *", timezone="Europe/Berlin")
    winter = schedule.next_run(datetime(2026, 3, 27, 12, tzinfo=UTC))
    summer = schedule.next_run(datetime(2026, 3, 30, 12, tzinfo=UTC))
    assert winter.astimezone(UTC).hour == 1
    assert summer.astimezone(UTC).hour == 0


# --- what is refused ----------------------------------------------------------------------------

BAD = {
    "shedule: {cron: 0 3 * * *}": ("7: shedule:", "did you mean schedule?"),
    "schedule: {cron: nightly}": ("7: schedule.cron:", 'write for example `cron: "0 3 * * *"`'),
    "schedule: {cron: 61 * * * *}": ("7: schedule.cron:", "bad minute"),
    "schedule: {cron: 0 3 * * *, timezone: Mars}": ("7: schedule.timezone:", "Europe/Berlin"),
    "schedule:\n  timezone: UTC": ("7: schedule.cron:", "got none; write for example"),
    "options:\n  solver: dual\n  pennalty: 1": ("9: options.pennalty:", "did you mean penalty?"),
    "options: {penalty: [1]}": ("7: options.penalty:", "auto, a number, or numbers by parameter"),
    "options: {sensitivity: maybe}": ("7: options.sensitivity:", "auto, true or false"),
    "options: {deadline: 3}": ("7: options:", "write it at the top level"),
    "options: {target: y}": ("7: options:", "write it under data"),
    "options: {tracking_uri: x}": ("7: options:", "set MLFLOW_TRACKING_URI"),
    "options: 3": ("7: options:", "keys and values, indented below it, got 3"),
    "deadline: -1": ("7: deadline:", "greater than 0, got -1"),
    "deadline: soon": ("7: deadline:", "got 'soon'; write for example `deadline: 600`"),
    "retries: 99": ("7: retries:", "less than or equal to 10, got 99"),
    "tags: nightly": ("7: tags:", "write for example `tags: [churn]`"),
    "tags:\n  - a\n  - 2024": ("9: tags.1:", "text in quotes, got 2024"),
    "policy: nowhere.yaml": ("7: policy:", "got none at nowhere.yaml"),
    "name: again": ("7: name:", "got it before in line 1"),
    "deadline: 0\nretries: -1": ("7: deadline:", "(1 more after this one)"),
}


@pytest.mark.parametrize("line", BAD)
def test_bad_line_is_named(refused, line):
    where, told = BAD[line]
    message = refused(GOOD + line + "\n")
    assert message.startswith(f"churn.yaml:{where} expected ")
    assert told in message


@pytest.mark.parametrize(
    ("old", "new", "where", "told"),
    [
        ("select: latest", "select: newest", "4: model.select:", "'unaudited' or 'all'"),
        ("select: latest", "select: alias", "2: model:", "write for example `alias: champion`"),
        ("select: latest", "select: all\n  version: 3", "2: model:", "leave version out"),
        ("  select: latest\n", "", "2: model.select:", "`select: latest`"),
        ("name: churn-nightly", "name: Churn nightly", "1: name:", "lower-case letters"),
        ("name: churn-nightly\n", "", "1: name:", "got none"),
        ("data:\n  train: mlflow\n", "", "1: data:", "`data: {train: mlflow}`"),
        ("  train: mlflow\n", "", "5: data:", "keys and values"),
        ("train: mlflow", "train: ''", "6: data.train:", "`train: mlflow`"),
    ],
)
def test_bad_part_is_named(refused, old, new, where, told):
    message = refused(GOOD.replace(old, new))
    assert message.startswith(f"churn.yaml:{where} expected ")
    assert told in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "got nothing"),
        ("- a\n", "got list"),
        ("name: a\n\tmodel: b\n", "churn.yaml:2"),
        (GOOD + "schedule: {cron: * * * * *}\n", "churn.yaml:7"),
        (GOOD + "tags: !!python/object/apply:os.getcwd []\n", "churn.yaml:7"),
    ],
)
def test_not_a_pipeline(refused, text, told):
    assert told in refused(text)


def test_no_such_file(tmp_path):
    for path, told in ((tmp_path / "a.yaml", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"expected a pipeline file at .*{told}"):
            read_pipeline(path)


def test_a_bad_policy_is_named_by_its_own_line(write, tmp_path):
    (tmp_path / "gate.yaml").write_text("max_gap: 0.1\nmax_gapp: 0.1\n")
    with pytest.raises(InputError, match=r"gate\.yaml:2.*max_gapp"):
        read_pipeline(write(GOOD + "policy: gate.yaml\n"))


def test_plain_values_are_refused_by_field():
    with pytest.raises(InputError, match=r"the pipeline: model\.select: expected"):
        make_pipeline({"name": "a", "model": {"name": "b"}, "data": {"train": "mlflow"}})


def test_folder_needs_names_of_their_own(write, tmp_path):
    with pytest.raises(InputError, match=r"expected pipeline files in .*, got none"):
        read_folder(tmp_path)
    write(GOOD, "a.yaml")
    assert list(read_folder(tmp_path)) == [tmp_path / "a.yaml"]
    write(GOOD, "b.yaml")
    with pytest.raises(InputError, match=r"'churn-nightly' as in .*a\.yaml; rename one"):
        read_folder(tmp_path)


# --- what is committed --------------------------------------------------------------------------


def test_schema_is_the_model_s():
    """`python -m flataudit.pipeline > pipelines/schema.json` where this fails."""
    assert (FOLDER / "schema.json").read_text() == schema_text()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples(path):
    """Each reads, fits the schema as it stands, and tells editors where that is."""
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    found = read_pipeline(path)
    assert found.name == path.stem
    schema = json.loads((FOLDER / "schema.json").read_text())
    jsonschema.validate(yaml.safe_load(text), schema)


def test_three_examples_that_differ():
    found = [read_pipeline(path) for path in EXAMPLES]
    assert len({pipeline.model.select for pipeline in found}) >= 3
    assert any(pipeline.policy for pipeline in found)


def test_readme_has_every_key_and_its_blocks_are_pipelines(tmp_path):
    text = (FOLDER / "README.md").read_text()
    for name in Pipeline.model_fields:
        assert f"`{name}`" in text, name
    blocks = text.split("```yaml\n")[1:]
    assert blocks
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block.partition("```")[0])
        read_pipeline(path)


def test_readme_lists_the_examples():
    text = (FOLDER / "README.md").read_text()
    for path in EXAMPLES:
        assert f"({path.name})" in text
    assert Path(FOLDER / "policies").is_dir()


def test_without_a_deadline_that_of_every_audit_counts():
    values = {"name": "a", "model": {"name": "net", "select": "all"}, "data": {"train": "mlflow"}}
    assert make_pipeline(values).audit_options().deadline == 86400.0
    assert make_pipeline(values | {"deadline": 5}).audit_options().deadline == 5.0
