"""`flataudit run --dry-run`: the plan of each version, of the examples and of failures."""

import importlib
import json
import os
import sys

import mlflow
import pytest

from flataudit import cli, planning, stages
from flataudit.models import registry
from flataudit.store import embedded_store
from tests.shells import ROOT, content, make_models
from tests.sweep_store import make_fleet

EXAMPLES = sorted((ROOT / "pipelines").glob("*.yaml"))


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Runs the command line in this process: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(cli, "_quiet", lambda: None)

    def command(*words):
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["flataudit", "run", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capfd.readouterr()

    yield command
    mlflow.set_tracking_uri(None)
    os.environ.pop("MLFLOW_TRACKING_URI", None)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo's three models, trained and registered as the demo does, without its audits."""
    from flows import demo

    uri = embedded_store(tmp_path_factory.mktemp("demo"))
    x, cases = demo.make_cases()
    for case in cases:
        demo._register(case, x, uri)
    mlflow.set_tracking_uri(None)
    return uri


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_examples_plan_on_the_demo_s_store(run, demo, path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", demo)
    code, out, err = run(path, "--dry-run", "--json", "-")
    assert (code, err) == (0, "")
    (result,) = json.loads(out)
    assert result["pipeline"] == path.stem
    assert len(result["rows"]) == (1 if path.stem == "digits-release" else 3)
    for row in result["rows"]:
        assert (row["state"], row["error"]) == ("planned", None)
        plan = row["plan"]
        assert plan["n_samples"] == 1200
        assert plan["n_params"] in (610, 1210)
        assert plan["n_rows"] == 1200 * 9
        assert plan["solver"] == "primal"
        assert plan["bytes"] >= 8 * plan["n_params"] ** 2
        assert 0 < plan["minutes"] < 60


def test_printed(run, demo, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", demo)
    code, out, _ = run(ROOT / "pipelines/digits-new.yaml", "--dry-run")
    assert code == 0
    first, *_, last = out.splitlines()
    assert first.startswith("digits-new: 3 to audit; next by schedule 20")
    assert last.startswith("about ")
    assert last.endswith("nothing was run")
    (line,) = [line for line in out.splitlines() if "digits-calibrated/1" in line]
    assert "1,200" in line
    assert "primal" in line


def test_weights_are_loaded_once_and_nothing_is_written(run, monkeypatch, tmp_path):
    models = make_models()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", models.uri)
    before, loads = content(models), []
    real = registry.load_model
    monkeypatch.setattr(registry, "load_model", lambda s: loads.append(s.uri) or real(s))

    def in_this_process(function, request, *_, **__):
        module, _, name = function.partition(":")
        return getattr(importlib.import_module(module), name)(request, print)

    monkeypatch.setattr(stages, "in_child", in_this_process)
    path = tmp_path / "good.yaml"
    path.write_text("name: good\nmodel: {name: good, select: all}\ndata: {train: mlflow}\n")
    code, _, err = run(path, "--dry-run")
    assert (code, err) == (0, "")
    assert loads == ["models:/good/1", "models:/good/2"]
    assert content(models) == before


def test_failures_are_rows(run, tmp_path):
    fleet = make_fleet()
    path = tmp_path / "fleet.yaml"
    path.write_text(json.dumps(fleet.pipeline()))
    code, out, _ = run(path, "--dry-run", "--tracking-uri", fleet.uri, "--json", "-")
    assert code == 3
    rows = {row["model"]: row for row in json.loads(out)[0]["rows"]}
    failed = {uri for uri, row in rows.items() if row["state"] == "failed"}
    assert failed == {f"models:/fleet-{name}/1" for name in ("missing", "nan", "pickle")}
    assert all(rows[uri]["error"].startswith("expected") for uri in failed)
    code, out, _ = run(path, "--dry-run", "--tracking-uri", fleet.uri)
    assert code == 3
    assert "fleet: 3 failed, 3 to audit" in out


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "expected a pipeline file at"),
        (
            {"a": "name: a\nmodel: {}\ndata: {train: mlflow}\n"},
            "a.yaml:2: model.name: expected a value",
        ),
        ({"a": "name: x", "b": "name: x"}, "b.yaml"),
    ],
)
def test_bad_files_are_one_line_before_any_work(run, tmp_path, files, told):
    rest = "\nmodel: {name: m, select: all}\ndata: {train: mlflow}\n"
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text + ("" if "model" in text else rest))
    paths = [tmp_path / f"{name}.yaml" for name in files or {"none": ""}]
    code, out, err = run(*paths, "--dry-run", "--tracking-uri", "sqlite:////nowhere/mlflow.db")
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert told in line


def test_no_registry_is_exit_3(run, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("name: a\nmodel: {name: m, select: all}\ndata: {train: mlflow}\n")
    code, _, err = run(path, "--dry-run", "--tracking-uri", f"sqlite:///{tmp_path}/none.db")
    assert code == 3
    assert "expected an MLflow database" in err


# --- the estimate of the time -------------------------------------------------------------------


class Sizes:
    """A problem's sizes, which are all that the estimate looks at beside the solver's own work."""

    def __init__(self, n_params, n_rows):
        self.n_params, self.n_rows = n_params, n_rows


def work(monkeypatch, solver, n_params, n_rows, *, once=1e9, varied=False, evidence=False):
    monkeypatch.setattr(planning, "SOLVERS", {"dual": Counted(once), "primal": Counted(once)})
    problem = Sizes(n_params, n_rows)
    return planning.operations(solver, problem, {}, varied=varied, evidence=evidence)


class Counted:
    def __init__(self, once):
        self.once = once

    def work(self, problem, penalty):
        return self.once


def test_work_is_that_of_the_factorisations(monkeypatch):
    def large(**options):
        return work(monkeypatch, "dual", 80_000, 5000, **options)

    assert large() == 2e9
    assert large(varied=True) == 4e9
    assert large(evidence=True) > 5 * large()
    assert large(once=3e9) == 6e9
    # the eigenvalues of a small matrix
    assert work(monkeypatch, "dual", 80_000, 4000) == pytest.approx(2e9 + 14 * 2 * 4000**3 / 3)
    assert work(monkeypatch, "kfac", 10, 10) is None  # a solver whose cost is not known here


def test_speed_is_measured():
    assert planning.operations_per_second() > 1e8
