"""The demo, run as a user runs it: what it registers, what it predicts, and what comes true."""

import dataclasses
import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flataudit.data import load_data
from flataudit.models.registry import resolve, training_record
from flataudit.store import embedded_store
from tests.shells import ROOT

NAMES = ["digits-calibrated", "digits-underconfident", "digits-overconfident"]
SHORT = [name.removeprefix("digits-") for name in NAMES]


@dataclasses.dataclass(frozen=True)
class Demo:
    """A finished demo: its folder, its rows by model, what it printed, where it ran."""

    folder: Path
    rows: dict
    printed: str
    here: Path


@pytest.fixture(scope="module")
def demo(server, tmp_path_factory):
    """One run in an empty working folder, with its store elsewhere."""
    from flows.demo import run_demo

    with pytest.MonkeyPatch.context() as patch:
        here = tmp_path_factory.mktemp("here")
        folder = tmp_path_factory.mktemp("demo") / "store"
        patch.chdir(here)
        patch.setenv("COLUMNS", "100")
        lines = []
        patch.setattr("rich.console.Console.print", lambda _, *args, **__: lines.extend(args))
        rows = run_demo(folder)
        import mlflow

        mlflow.set_tracking_uri(None)
    return Demo(
        folder,
        {row["model"].removeprefix("models:/digits-").rpartition("/")[0]: row for row in rows},
        "\n".join(line for line in lines if isinstance(line, str)),
        here,
    )


@pytest.fixture
def client(demo):
    return MlflowClient(embedded_store(demo.folder))


def test_writes_into_its_folder_alone(demo):
    assert list(demo.here.iterdir()) == []
    assert {path.name for path in demo.folder.iterdir()} == {"mlflow.db", "artifacts", "demo.json"}


def test_three_models_with_their_data_and_record(demo, client):
    import mlflow

    assert sorted(model.name for model in client.search_registered_models()) == sorted(NAMES)
    mlflow.set_tracking_uri(embedded_store(demo.folder))
    for name in NAMES:
        source = resolve(f"models:/{name}/1")
        record, origin = training_record(source, 1200)
        assert record is not None, origin
        assert record.assumptions == ()  # nothing about the training had to be guessed
        assert (record.optimizer, record.momentum) == ("sgd", 0.9)
        data = load_data("mlflow", source=source)
        assert (data.x.shape, data.y.shape) == ((1200, 64), (1200,))


def test_each_version_has_its_verdict(demo, client):
    tags = {
        short: client.get_model_version(name, "1").tags
        for short, name in zip(SHORT, NAMES, strict=True)
    }
    for short in SHORT:
        assert tags[short]["flataudit.run_id"] == demo.rows[short]["run_id"]
        assert tags[short]["flataudit.confidence"] == demo.rows[short]["confidence"]
    assert tags["overconfident"]["flataudit.verdict"] in ("warn", "fail")
    codes = {short: tags[short]["flataudit.warnings"].split(", ") for short in SHORT}
    assert "overconfident" in codes["overconfident"]
    assert "underconfident" in codes["underconfident"]
    assert not {"overconfident", "underconfident"} & set(codes["calibrated"])
    assert not any("penalty_unknown" in found for found in codes.values())


def test_the_calibrated_network(demo):
    row = demo.rows["calibrated"]
    assert row["gap"]["estimator"] == "soft_rank"
    assert row["verdict"] in ("calibrated", "within_tolerance")
    assert row["confidence"] == "ok"


def test_the_underconfident_network(demo):
    row = demo.rows["underconfident"]
    assert row["gap"]["estimator"] == "tic"
    assert (row["verdict"], row["direction"]) == ("miscalibrated", "under")
    assert row["true_confidence_gap"] < 0


def test_the_overconfident_network(demo):
    row = demo.rows["overconfident"]
    assert row["gap"]["estimator"] == "soft_rank_blend"
    assert (row["direction"], row["confidence"]) == ("over", "low")
    assert row["true_confidence_gap"] > 0


@pytest.mark.parametrize("name", ["calibrated", "underconfident"])
def test_what_may_be_relied_on_comes_true(demo, name):
    """The prediction's interval, widened by the standard error of the truth it is held against."""
    row = demo.rows[name]
    gap, se = row["gap"], row["true_gap_se"]
    assert gap["low"] - se <= row["true_gap"] <= gap["high"] + se
    held_out = 1797 - 1200
    spread = math.sqrt(row["true_accuracy"] * (1 - row["true_accuracy"]) / held_out)
    accuracy = row["predicted_accuracy"]
    assert accuracy["low"] - spread <= row["true_accuracy"] <= accuracy["high"] + spread


def test_gaps_are_ordered_as_they_come_true(demo):
    order = ["underconfident", "calibrated", "overconfident"]
    for key in (lambda row: row["true_gap"], lambda row: row["gap"]["value"]):
        values = [key(demo.rows[name]) for name in order]
        assert values == sorted(values)


def test_rows_are_kept_and_the_command_for_the_ui_is_told(demo):
    kept = json.loads((demo.folder / "demo.json").read_text())
    assert kept == list(demo.rows.values())
    (command,) = [line for line in demo.printed.splitlines() if " ui " in line]
    program, *arguments = shlex.split(command)
    assert shutil.which(program)
    uri = arguments[arguments.index("--backend-store-uri") + 1]
    path = demo.here / uri.removeprefix("sqlite:///")
    assert path.resolve() == demo.folder / "mlflow.db"


@pytest.mark.parametrize(
    ("label", "value"),
    [
        ("estimator", lambda row: row["gap"]["estimator"]),
        ("calibration", lambda row: row["verdict"]),
        ("direction", lambda row: row["direction"]),
        ("rely on it", lambda row: row["confidence"]),
    ],
)
def test_readme_shows_what_the_demo_finds(demo, label, value):
    """Its words; its numbers may differ in the last digit from machine to machine."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines if line.strip().startswith(label)]
    assert [label, *(value(demo.rows[name]) for name in SHORT)] in rows


def test_the_program_is_called_as_the_shell_finds_it(monkeypatch, tmp_path):
    from flows.demo import _program

    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "mlflow").touch(mode=0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert _program("mlflow") == str(folder / "mlflow")
    monkeypatch.chdir(tmp_path)
    assert _program("mlflow") == ".venv/bin/mlflow"
    monkeypatch.setenv("PATH", str(folder))
    assert _program("mlflow") == "mlflow"
    assert _program("other") == "other"


def test_again_in_the_same_folder_makes_the_next_version(demo, client, monkeypatch):
    """With one network alone, for time; after the tests of the first run."""
    from flows import demo as module

    x, cases = module.make_cases()
    quick = dataclasses.replace(cases[1], settings=dict(cases[1].settings) | {"epochs": 2})
    monkeypatch.setattr(module, "make_cases", lambda: (x, [quick]))
    (row,) = module.run_demo(demo.folder)
    assert row["model"] == "models:/digits-underconfident/2"
    assert (
        client.get_model_version("digits-underconfident", "2").tags["flataudit.run_id"]
        == (row["run_id"])
    )
    first = client.get_model_version("digits-underconfident", "1").tags
    assert first["flataudit.run_id"] == demo.rows["underconfident"]["run_id"]
    assert list(Path.cwd().iterdir()) == []
