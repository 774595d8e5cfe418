"""docs/matrix.md is what the models give: every row is measured, and the page compared."""

from __future__ import annotations

import dataclasses

import pytest

from tests.matrix import PAGE, measured, refusal, render
from tests.matrix_rows import REFUSED, SKLEARN, TORCH, Row
from tests.sklearn_cases import CASES


@pytest.mark.parametrize("row", [*SKLEARN, *TORCH], ids=lambda row: row.kind)
def test_row(row):
    found = measured(row)
    assert found.within(), found


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.kind)
def test_refused(row):
    text = refusal(row)
    assert text.startswith("expected")
    assert row.part in text
    assert "\n" not in text


def test_the_page_is_what_was_measured():
    assert PAGE.read_text(encoding="utf-8") == render(), "write it anew: make matrix"


def test_a_wrong_penalty_is_seen():
    """The gradient's column can fail: with a D that is not the estimator's."""
    row = next(row for row in SKLEARN if row.kind == "Ridge")
    made = row.make()
    wrong = dataclasses.replace(made, options={"penalty": 0.07})
    found = measured(Row("Ridge with another penalty", "", lambda: wrong))
    assert found.gradient[0] > 0.01 > found.gradient[1]
    assert not found.within()


def test_kinds_are_named_once():
    kinds = [row.kind for row in (*SKLEARN, *TORCH, *REFUSED)]
    assert len(kinds) == len(set(kinds))
    assert len(SKLEARN) >= len(CASES)
