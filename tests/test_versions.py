"""The registered model's table of its versions' latest audits."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient

from flataudit import versions
from flataudit.models.registry import resolve
from flataudit.versions import (
    BEGIN,
    DESCRIPTION_LIMIT,
    END,
    TITLE,
    markdown_cell,
    merge_table,
    update_model_table,
)
from tests.mlflow_store import make_store
from tests.mlflow_store import tracking as pointed_at


def version(number, verdict="pass", *, run="r1", link=True, **tags):
    """A version as MLflow gives it back; verdict None: never audited."""
    values = {"gap": "0.052 [0.041, 0.064]", "confidence": "ok", "run_id": run,
              "audited_at": "2026-11-24T11:42:07+00:00"} | tags  # fmt: skip
    shown = {} if verdict is None else {"verdict": verdict} | values
    url = f"[Audit run and full report](<#/experiments/2/runs/{run}>)" if link else None
    return SimpleNamespace(
        version=str(number),
        tags={f"flataudit.{key}": value for key, value in shown.items()},
        description=url,
    )


def rows(text):
    return [line for line in text.splitlines() if line.startswith("| ") and "Version" not in line]


def test_one_line_per_audited_version_newest_first():
    text = merge_table("Churn.", [version(9), version(10, "fail", run="r2"), version(11, None)])
    assert text.startswith(f"Churn.\n\n{TITLE}{BEGIN}\n\n| Version |")
    assert rows(text) == [
        "| 10 | **fail** | 0.052 [0.041, 0.064] | ok | 2026-11-24 11:42"
        " | [run](<#/experiments/2/runs/r2>) |",
        "| 9 | **pass** | 0.052 [0.041, 0.064] | ok | 2026-11-24 11:42"
        " | [run](<#/experiments/2/runs/r1>) |",
    ]
    assert text.endswith(f"Not audited: 11.\n{END}")


def test_what_people_wrote_survives():
    text = merge_table("Before.", [version(1)]) + " After | `x`."
    again = merge_table(text, [version(1, "fail"), version(2)])
    assert again.startswith(f"Before.\n\n{TITLE}{BEGIN}\n\n| Version |")
    assert again.endswith(END + " After | `x`.")
    assert again.count(BEGIN) == again.count(END) == 1
    assert [row[:16] for row in rows(again)] == ["| 2 | **pass** |", "| 1 | **fail** |"]
    assert merge_table(again, [version(1, None), version(2, None)]) == "Before.\n\n After | `x`."
    assert merge_table("Mine.  ", [version(1, None)]) == "Mine.  "


def test_as_many_rows_as_fit():
    people = "p" * 3000
    text = merge_table(people, [version(n) for n in range(1, 201)])
    assert len(text) <= DESCRIPTION_LIMIT
    assert text.startswith(people)
    shown = len(rows(text))
    assert shown > 5
    assert rows(text)[0].startswith("| 200 |")
    assert f"{200 - shown} older audited version(s) are not shown." in text
    longer = merge_table(people, [version(n) for n in range(200 - shown, 201)])
    assert len(rows(longer)) == shown  # one more would not have fitted
    full = "p" * (DESCRIPTION_LIMIT - 100)
    assert merge_table(full, [version(1)]) == full


def test_tags_cannot_break_the_table():
    evil = "x | y\n| 9 | <script> [a](http://b) `c` " + END
    text = merge_table("", [version(1, evil, gap=evil, confidence=evil, run="r9", link=False)])
    (row,) = rows(text)
    assert "<script>" not in text
    assert "[a](" not in text
    assert text.count(END) == 1
    assert row.replace("\\|", "").count("|") == 7
    assert markdown_cell("not_shown, -0.01") == "not_shown, -0.01"
    assert markdown_cell("[a][b]") == r"\[a\]\[b\]"


def test_a_link_of_another_run_is_not_used():
    found = version(1, run="new")
    found.description = "[Audit run and full report](<#/experiments/2/runs/old>)"
    (row,) = rows(merge_table("", [found]))
    assert row.endswith("| new |")


# --- in a real store ----------------------------------------------------------------------------


@pytest.fixture
def client():
    with pointed_at(make_store().uri):
        yield MlflowClient()


@pytest.fixture
def model(client):
    """Makes a registered model with so many versions; returns their sources."""

    def make(name, count=1):
        for _ in range(count):
            client.copy_model_version("models:/digits/1", name)
        client.update_registered_model(name, "Digits, for the sorter.")
        return [resolve(f"models:/{name}/{n + 1}") for n in range(count)]

    return make


def audited(client, source, verdict="pass"):
    run = f"run{source.version}"
    tags = {"flataudit.gap": "0.05 [0.04, 0.06]", "flataudit.confidence": "ok",
            "flataudit.run_id": run, "flataudit.audited_at": "2026-11-24T11:42:07+00:00",
            "flataudit.verdict": verdict}  # fmt: skip
    block = f"{verdict}\n\n- [Audit run and full report](<#/experiments/2/runs/{run}>)"
    versions.set_verdict(client, source, None, tags, block)
    update_model_table(client, source)


def described(client, name):
    return client.get_registered_model(name).description


def test_the_table_follows_the_audits(client, model):
    first, second = model("table", 2)
    audited(client, first)
    assert described(client, "table").startswith(f"Digits, for the sorter.\n\n{TITLE}{BEGIN}")
    assert len(rows(described(client, "table"))) == 1
    assert "Not audited: 2." in described(client, "table")
    audited(client, second, "fail")
    audited(client, first, "warn")
    assert [row[:16] for row in rows(described(client, "table"))] == [
        "| 2 | **fail** |",
        "| 1 | **warn** |",
    ]
    assert "[run](<#/experiments/2/runs/run2>)" in described(client, "table")


def test_an_unchanged_table_is_not_written(client, model, monkeypatch):
    (source,) = model("table-unchanged")
    audited(client, source)
    before = client.get_registered_model("table-unchanged").last_updated_timestamp
    monkeypatch.setattr(MlflowClient, "update_registered_model", None)
    update_model_table(client, source)
    assert client.get_registered_model("table-unchanged").last_updated_timestamp == before


def test_a_failure_is_logged_and_breaks_nothing(client, model, monkeypatch, caplog):
    (source,) = model("table-fails")

    def fails(*_, **__):
        raise RuntimeError("disk\nfull")

    monkeypatch.setattr(MlflowClient, "update_registered_model", fails)
    with caplog.at_level(logging.WARNING):
        audited(client, source)
    assert client.get_model_version("table-fails", "1").tags["flataudit.verdict"] == "pass"
    (record,) = caplog.records
    assert "the description of table-fails could not be updated: disk full" in record.message


def test_an_audit_that_lands_in_between_is_not_lost(client, model, monkeypatch):
    """The other audit's tags come after the versions were read and its table before ours."""
    first, second = model("table-between", 2)
    write, done = MlflowClient.update_registered_model, []

    def slow(self, name, description=None, **more):
        if not done:
            done.append(True)
            audited(client, second, "fail")
        return write(self, name, description, **more)

    monkeypatch.setattr(MlflowClient, "update_registered_model", slow)
    audited(client, first)
    assert len(rows(described(client, "table-between"))) == 2


def test_audits_of_all_versions_at_once(client, model):
    sources = model("table-at-once", 6)
    together = threading.Barrier(len(sources))

    def run(source):
        together.wait()
        audited(MlflowClient(), source)

    threads = [threading.Thread(target=run, args=(source,)) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = described(client, "table-at-once")
    assert len(rows(text)) == 6
    assert text.startswith("Digits, for the sorter.")
