import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

from flataudit import store
from flataudit.errors import InputError, StoreError
from tests.shells import environment


@pytest.fixture
def free(monkeypatch, tmp_path):
    """An empty working folder and no URI from outside; MLflow is pointed at nothing afterwards."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "FLATAUDIT_STORE"):
        monkeypatch.delenv(name, raising=False)
    mlflow.set_tracking_uri(None)
    yield tmp_path
    mlflow.set_tracking_uri(None)


def test_embedded_store_keeps_all_in_its_folder(free):
    uri = store.use_tracking()
    folder = free / "flataudit-store"
    assert uri == f"sqlite:///{folder}/mlflow.db"
    assert mlflow.get_tracking_uri() == mlflow.get_registry_uri() == uri
    client = mlflow.MlflowClient()
    made = store.ensure_experiment("team/flataudit")
    assert store.ensure_experiment("team/flataudit") == made
    for experiment in (made, "0"):  # ours, and the one named Default
        run = client.create_run(experiment)
        client.log_text(run.info.run_id, "x", "note.txt")
        written = Path(run.info.artifact_uri.removeprefix("file://")) / "note.txt"
        assert written.is_file()
        assert (folder / "artifacts") in written.parents
    assert os.listdir(free) == ["flataudit-store"]

    client.delete_experiment(made)
    with pytest.raises(StoreError, match="got a deleted one; restore it"):
        store.ensure_experiment("team/flataudit")


def test_which_store(free, monkeypatch):
    (free / "given.db").touch()
    (free / "named.db").touch()
    monkeypatch.setattr(store, "embedded_store", lambda folder: f"https://{folder}")
    assert store.use_tracking() == "https://flataudit-store"
    mlflow.set_tracking_uri(None)
    monkeypatch.setenv("FLATAUDIT_STORE", "elsewhere")
    assert store.use_tracking() == "https://elsewhere"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///named.db?timeout=5")
    assert store.use_tracking() == f"sqlite:///{free}/named.db?timeout=5"
    assert store.use_tracking("sqlite:///given.db") == f"sqlite:///{free}/given.db"
    assert mlflow.get_tracking_uri() == f"sqlite:///{free}/given.db"
    assert store.use_tracking("http://host:5000") == "http://host:5000"


def test_a_mistyped_database_is_not_made(free):
    with pytest.raises(StoreError, match="got no such file"):
        store.use_tracking("sqlite:///no/such.db")
    assert os.listdir(free) == []


def test_a_store_that_cannot_be_made(free):
    (free / "file").touch()
    with pytest.raises(StoreError, match=r"could not open the embedded store in .*/file: "):
        store.embedded_store(free / "file")


MAKES = """
import sys
import mlflow
from flataudit.store import embedded_store, ensure_experiment
import mlflow.store.tracking.sqlalchemy_store
print("ready", flush=True)
sys.stdin.readline()
mlflow.set_tracking_uri(embedded_store(sys.argv[1]))
print(ensure_experiment("flataudit"))
"""


def test_made_by_several_processes_at_once(tmp_path):
    """All get the same whole store, with its artifacts beside it."""
    folder = tmp_path / "store"
    pipe = subprocess.PIPE
    children = [
        subprocess.Popen(
            [sys.executable, "-c", MAKES, str(folder)], stdin=pipe, stdout=pipe, stderr=pipe,
            text=True, env=environment(), cwd=tmp_path,
        )
        for _ in range(3)
    ]  # fmt: skip
    for child in children:
        assert child.stdout.readline() == "ready\n", child.communicate()
    for child in children:  # all have imported what they need
        child.stdin.write("go\n")
        child.stdin.flush()
    said = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    assert len({out for out, _ in said}) == 1
    assert sorted(os.listdir(folder)) == ["mlflow.db"]
    client = mlflow.MlflowClient(store.embedded_store(folder))
    where = (folder / "artifacts").as_uri()
    assert client.get_experiment("0").artifact_location == f"{where}/0"
    assert client.get_experiment_by_name("flataudit").artifact_location == f"{where}/flataudit"


def test_a_store_made_meanwhile_is_kept(tmp_path):
    """Another process was faster, between the look for the database and its making."""
    client = mlflow.MlflowClient(store.embedded_store(tmp_path))
    made = client.create_experiment("of the other")
    store._make_database(tmp_path)
    assert client.get_experiment_by_name("of the other").experiment_id == made
    assert os.listdir(tmp_path) == ["mlflow.db"]


def test_store_errors_are_one_line_without_passwords():
    with (
        pytest.raises(StoreError) as caught,
        store.store_errors("read run 1"),
    ):
        raise ValueError("cannot reach https://me:secret@host/x\nsecond line")
    text = str(caught.value)
    assert text.startswith("could not read run 1: cannot reach https://host/x; check")
    assert "secret" not in text
    assert "\n" not in text
    assert caught.value.exit_code == 3


def test_store_errors_let_ours_through():
    with pytest.raises(InputError, match="mine"), store.store_errors("read"):
        raise InputError("mine")


def test_scratch_folders_differ():
    assert store.scratch_folder() != store.scratch_folder()
