"""`gate`, `compare`, `audits`, `observe`, `track-record` as people type them."""

import csv
import json
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flataudit import cli, keys
from tests.audited_store import log_report, make_report, pointed_at, register, sqlite_uri
from tests.shells import make_models

POLICY = "max_gap: 0.1\nbaseline: champion\nmax_regression: 0.02"


@pytest.fixture(scope="module")
def store():
    """`churn` with versions 1 (good, audited twice), 2 (bad) and 3 (without audit)."""
    with sqlite_uri() as uri, pointed_at(uri):
        sources = [register("churn") for _ in range(3)]
        log_report(sources[0], make_report(gap=0.04))
        log_report(sources[0], make_report(gap=0.05, train_nll=0.2))
        log_report(sources[1], make_report(gap=0.5))
        log_report(register("spam"), make_report(accuracy=None, confidence="low"))
        yield uri


@pytest.fixture
def run(monkeypatch, tmp_path, capfd, store):
    """Runs the command line in this process in a folder with policy.yaml: (code, out, err)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_quiet", lambda: None)
    Path("policy.yaml").write_text(POLICY)

    def command(*args, uri=store):
        capfd.readouterr()
        argv = ["flataudit", *map(str, args), "--tracking-uri", uri]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, *capfd.readouterr()

    yield command
    mlflow.set_tracking_uri(None)


@pytest.fixture
def gate(run):
    return lambda version, *args: run("gate", f"models:/churn/{version}", "--policy",
                                      "policy.yaml", *args)  # fmt: skip


def test_gate_passes(gate, store):
    code, out, err = gate(1, "--alias", "live", "--json", "decision.json")
    assert (code, err) == (0, "")
    assert out.startswith("models:/churn/1: PASS")
    assert "live is now version 1 (was not set)" in out
    found = json.loads(Path("decision.json").read_text())
    assert (found["outcome"], found["alias_set"]) == ("pass", True)
    assert found["policy"]["file"] == "policy.yaml"
    assert found["gate_run_id"] in out
    assert str(MlflowClient(store).get_model_version_by_alias("churn", "live").version) == "1"


def test_gate_refuses(gate):
    code, out, err = gate(2)
    assert (code, err) == (1, "")
    assert out.startswith("models:/churn/2: REFUSED")
    assert "FAILED" in out


def test_gate_json_alone_on_stdout(gate):
    code, out, err = gate(2, "--json", "-")
    assert (code, json.loads(out)["outcome"]) == (1, "refuse")
    assert "REFUSED" in err


def test_gate_without_an_audit(gate):
    code, out, err = gate(3)
    assert (code, out) == (2, "")
    assert err.splitlines() == [
        "flataudit: expected an audit of models:/churn/3, got none, so the gate refused; run"
        " flataudit audit first, or give --train"
    ]
    code, out, err = gate(3, "--dry-run")
    assert (code, err) == (0, "")
    assert "REFUSED (dry run)" in out


def test_gate_override(gate):
    code, out, err = gate(2, "--override", "TICKET-7 [urgent]")
    assert (code, err) == (0, "")
    assert "REFUSED, let through by override" in out
    assert "TICKET-7 [urgent]" in out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "none.yaml"], "expected a policy file at none.yaml"),
        (["--target", "y"], "expected --train beside --target"),
        (["--heldout", "x.npz"], "expected --train beside --heldout"),
        (["--json", "no/such/folder.json"], "expected --json to name a writable file"),
        (["--alias", "v1"], "which MLflow reserves"),
        (["--override", " "], "expected a reason for --override"),
    ],
)
def test_gate_bad_input(gate, args, said):
    code, out, err = gate(1, *args)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert said in line


def test_gate_store_errors_are_3(gate, monkeypatch):
    def broken(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(MlflowClient, "create_run", broken)
    code, out, err = gate(1, "--alias", "never")
    assert (code, out) == (3, "")
    assert "could not record the gate of models:/churn/1: disk full" in err


def test_compare(run):
    uris = ("models:/churn/1", "models:/churn/2")
    code, out, err = run("compare", *uris, "--html", "page.html", "--json", "found.json")
    assert (code, err) == (0, "")
    assert "models:/churn/1 is predicted better, at the 90 % level" in out
    found = json.loads(Path("found.json").read_text())
    assert (found["names"], found["difference"]["better"]) == (list(uris), uris[0])
    assert len(found["audit_run_ids"]) == 2
    assert Path("page.html").read_text().startswith("<!doctype html>")
    code, out, err = run("compare", *uris, "--json", "-")
    assert json.loads(out) == found


def test_compare_needs_two_audits(run):
    code, out, err = run("compare", "models:/churn/1", "models:/churn/3")
    assert (code, out) == (2, "")
    assert "expected an audit of models:/churn/3, got none" in err
    code, _, err = run("compare", "models:/churn/1", "models:/churn/2", "--html", "no/page.html")
    assert code == 2
    assert "expected --html to name a writable file" in err


def test_audits_list(run):
    code, out, err = run("audits", "list")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[2:4] for line in lines[1:]] == [
        ["spam", "v1"], ["churn", "v2"], ["churn", "v1"], ["churn", "v1"],
    ]  # fmt: skip
    assert "+0.010" in lines[3]
    code, out, _ = run("audits", "list", "--model", "churn", "--limit", "1", "--json", "-")
    (row,) = json.loads(out)
    assert (row["version"], row["gap_change"]) == ("2", pytest.approx(0.45))
    code, out, _ = run("audits", "list", "--limit", "1")
    assert "3 older ones not shown" in out
    assert run("audits", "list", "--model", "none")[1].startswith("no audits of none")


def test_audits_show(run, store):
    code, out, err = run("audits", "show", "models:/churn/2")
    assert (code, err) == (0, "")
    assert "models:/churn/2: PASS" in out
    run_id = out.split()[2].rstrip(",")
    code, out, _ = run("audits", "show", run_id, "--json", "-")
    assert json.loads(out)["gap"]["value"] == 0.5
    code, _, err = run("audits", "show", "0" * 32)
    assert (code, "expected the id of an audit run" in err) == (2, True)


def test_audits_export(run):
    assert run("audits", "export", "all.csv")[:2] == (0, "4 audits in all.csv\n")
    assert run("audits", "export", "churn.json", "--model", "churn")[0] == 0
    with Path("all.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = json.loads(Path("churn.json").read_text())
    assert [float(row["gap"]) for row in rows if row["name"] == "churn"] == [
        row["gap"] for row in found
    ]
    assert rows[0]["predicted_accuracy"] == ""
    assert rows[0]["warnings"] == "high_leverage"
    code, _, err = run("audits", "export", "all.xlsx")
    assert (code, "expected FILE.json or FILE.csv" in err) == (2, True)


def test_track_record_of_nothing(run):
    code, out, err = run("track-record", "--plot", "record.svg")
    assert (code, err) == (0, "")
    assert out.startswith("No gap has been observed yet")
    assert b"<svg" in Path("record.svg").read_bytes()
    code, _, err = run("track-record", "--plot", "record.pdf")
    assert (code, "expected --plot FILE.png or FILE.svg" in err) == (2, True)


def test_observe_and_track_record(run):
    models = make_models()
    with pointed_at(models.uri):
        MlflowClient().copy_model_version("models:/good/1", "watched")
    audit = ("audit", "models:/watched/1", "--train", models.data)
    assert run(*audit, uri=models.uri)[0] == 0
    where = {"uri": models.uri}
    code, out, err = run("observe", "models:/watched/1", "--heldout", models.heldout, **where)
    assert (code, err) == (0, "")
    assert "observed on 40 samples" in out
    code, out, _ = run("track-record", "--model", "watched", "--plot", "r.png", **where)
    assert code == 0
    assert "of 1 gaps came out as predicted" in out
    assert "observed later" in out
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run("track-record", "--model", "watched", "--json", "-", **where)
    (outcome,) = json.loads(out)["outcomes"]
    assert outcome["uri"] == "models:/watched/1"
    experiment = MlflowClient(models.uri).get_experiment_by_name(keys.OBSERVATIONS)
    assert outcome["run_id"] in [
        r.info.run_id for r in MlflowClient(models.uri).search_runs([experiment.experiment_id])
    ]
