"""Stores that cannot be written: full, read-only, or no folder at all. The old verdict stands.

Real file systems where this may mount them (as root), else skipped; a file in the place of the
folder works everywhere.
"""

import errno
import os
import subprocess
from pathlib import Path

import pytest
from mlflow import MlflowClient

from flataudit import keys, retries, tracking
from flataudit.errors import StoreError
from flataudit.store import embedded_store
from tests.audited_store import make_report, pointed_at, register


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(retries, "DELAYS", (0.0,))


@pytest.fixture
def small(tmp_path):
    """An empty file system of 4 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder):
    """Not a byte is left."""
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017


def remount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """The folder that stands for the report's files."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    (folder / "report.html").write_text("x" * 10_000)
    monkeypatch.setattr(tracking, "rendered", lambda *_: str(folder))
    return folder


def audited_in(artifacts):
    """A version with a verdict, in a store whose audits keep their artifacts in that folder."""
    client = MlflowClient()
    client.create_experiment(keys.EXPERIMENT, artifact_location=artifacts.as_uri())
    source = register("small")
    log(source)
    return client, source


def log(source, **changes):
    report = make_report(**changes)
    report = report | {"model": report["model"] | source.report_fields()}
    return tracking.log_audit(report, {}, source, options={"train": "train.npz"})


def check_refused(client, source, told):
    version = client.get_model_version(source.name, source.version)
    with pytest.raises(StoreError, match=told) as caught:
        log(source, confidence="low")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("could not log the audit of models:/small/1")
    after = client.get_model_version(source.name, source.version)
    assert (after.tags, after.description) == (version.tags, version.description)
    assert after.tags[keys.VERDICT] == "pass"


def statuses(client):
    where = client.get_experiment_by_name(keys.EXPERIMENT).experiment_id
    return sorted(run.info.status for run in client.search_runs([where]))


@pytest.mark.usefixtures("drawn")
def test_a_full_artifact_store(tmp_path, small):
    with pointed_at(embedded_store(tmp_path / "store")):
        client, source = audited_in(small)
        fill(small)
        check_refused(client, source, "No space left on device")
        assert statuses(client) == ["FAILED", "FINISHED"]
        os.remove(small / "filler")
        log(source, confidence="low")
        assert statuses(client) == ["FAILED", "FINISHED", "FINISHED"]


@pytest.mark.usefixtures("drawn")
def test_a_read_only_artifact_store(tmp_path, small):
    with pointed_at(embedded_store(tmp_path / "store")):
        client, source = audited_in(small)
        remount(small, "ro")
        check_refused(client, source, "Read-only file system")
        assert statuses(client) == ["FAILED", "FINISHED"]


@pytest.mark.usefixtures("drawn")
def test_a_full_database(tmp_path, small):
    with pointed_at(embedded_store(small)):
        client, source = audited_in(tmp_path / "artifacts")
        fill(small)
        check_refused(client, source, "disk")  # sqlite: "disk is full", or "disk I/O error"
        os.remove(small / "filler")
        assert log(source, confidence="low")


@pytest.mark.usefixtures("drawn")
def test_a_file_in_the_place_of_the_artifacts(tmp_path):
    with pointed_at(embedded_store(tmp_path / "store")):
        artifacts = tmp_path / "artifacts"
        client, source = audited_in(artifacts)
        artifacts.rename(tmp_path / "moved")
        artifacts.write_text("no folder")
        check_refused(client, source, "Not a directory|File exists")


def test_no_room_for_the_report_s_own_files(tmp_path, monkeypatch):
    """They are made before anything is written to the store."""
    from flataudit.report import figures, html

    monkeypatch.setattr(html, "render", lambda *_: "page")
    for name in ("reliability_png", "spectrum_png"):
        monkeypatch.setattr(figures, name, lambda *_: b"picture")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pointed_at(embedded_store(tmp_path / "store")):
        source = register("small")
        monkeypatch.setattr(Path, "write_bytes", full)
        with pytest.raises(
            StoreError, match=r"report's files to .*No space left.*TMPDIR"
        ) as caught:
            log(source)
        assert caught.value.exit_code == 3
        client = MlflowClient()
        assert client.get_experiment_by_name(keys.EXPERIMENT) is None
        assert client.get_model_version("small", "1").tags == {}
