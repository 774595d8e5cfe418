"""The audit key: what changes it, and what does not."""

import numpy as np
import pytest

from flataudit import audit_key, stages
from flataudit.audit_key import code_version, key_of
from flataudit.config import AuditOptions, make_options
from tests.shells import make_models

MODEL, RECORD = "m-1", {"optimizer": "sgd", "sum_lr": 1.0}
DATA = {"train": "aa", "heldout": None}


def key(identity=MODEL, data=DATA, training=RECORD, **options):
    return audit_key.audit_key(identity, data, training, AuditOptions(**options))


def test_is_a_sha256_and_repeatable():
    assert key() == key()
    assert len(key()) == 64
    assert int(key(), 16) >= 0


def test_what_changes_a_number_changes_it():
    others = [
        key(identity="m-2"),
        key(data={"train": "ab", "heldout": None}),
        key(data={"train": "aa", "heldout": "aa"}),
        key(training=None),
        key(training=RECORD | {"sum_lr": 1.0000000001}),
        key(penalty=0.1),
        key(seed=1),
        key(solver="dual"),
        key(recalibrate=True),
        key(sensitivity=False),
    ]
    assert len({key(), *others}) == len(others) + 1


def test_where_and_when_does_not_count():
    assert key(tracking_uri="sqlite:///x", deadline=3) == key()
    assert key(training=RECORD) == audit_key.audit_key(
        MODEL, DATA, RECORD, AuditOptions(training="optimizer=sgd,sum_lr=1")
    )


def test_code_counts(monkeypatch):
    before = key()
    monkeypatch.setattr(audit_key, "code_version", lambda: "of another release")
    assert key() != before
    assert len(code_version()) == 64


def test_every_source_that_measures_counts(monkeypatch, tmp_path):
    """Of a package in another folder: its sources, but not those of the pages."""
    for name in ("audit.py", "solvers/dual.py", "report/html.py", "cli/run.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(audit_key, "__file__", str(tmp_path / "audit_key.py"))
    version = code_version.__wrapped__
    before = version()
    for name in ("report/html.py", "cli/run.py"):
        (tmp_path / name).write_text("2")
    assert version() == before
    for name in ("audit.py", "solvers/dual.py"):
        (tmp_path / name).write_text("2")
        assert version() != before
        before = version()


@pytest.fixture
def models():
    import mlflow

    yield make_models()
    mlflow.set_tracking_uri(None)


def test_of_what_was_loaded(models, tmp_path):
    """By the content of the data, wherever they lie; by the record that was read."""
    options = make_options({"tracking_uri": models.uri})

    def loaded(train, heldout=None, **more):
        asked = make_options({"tracking_uri": models.uri} | more)
        return stages.load("models:/good/1", train, heldout, asked.model_dump())

    np.savez(tmp_path / "copy.npz", x=models.x, y=models.y)
    first = key_of(loaded(models.data), options)
    assert key_of(loaded(str(tmp_path / "copy.npz")), options) == first
    assert key_of(loaded("mlflow"), options) == first
    np.savez(tmp_path / "copy.npz", x=models.x[::-1], y=models.y[::-1])
    assert key_of(loaded(str(tmp_path / "copy.npz")), options) != first
    assert key_of(loaded(models.data, models.heldout), options) != first
    given = {"tracking_uri": models.uri, "training": "optimizer=converged"}
    assert key_of(loaded(models.data, **given), make_options(given)) != first
