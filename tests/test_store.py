import os
from pathlib import Path

import mlflow
import pytest

from flataudit import store
from flataudit.errors import InputError, StoreError


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
