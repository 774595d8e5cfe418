"""Class labels as text: mapped by the model's classes, else sorted, else refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from flataudit import audit
from flataudit.data import digest_of, load_data
from flataudit.errors import InputError
from flataudit.labels import ClassNames, few, text_labels, with_indices

G = torch.Generator().manual_seed(3)
X = torch.randn(40, 3, generator=G)
INDEX = torch.randint(0, 3, (40,), generator=G).numpy()
NAMES = np.array(["ant", "bee", "cat"])
Y = NAMES[INDEX]


def network(outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(3, outputs)


def same(a, b) -> bool:
    a, b = a.to_dict(), b.to_dict()
    for report in (a, b):
        del report["solver"]["seconds"], report["model"]["notes"], report["data"]["sha256"]
        for row in report["classes"]["rows"]:  # by name in one, by index in the other
            del row["value"]
    return a == b


@pytest.mark.parametrize(
    "y", [Y, Y.astype(object), Y.tolist(), pd.Series(Y), Y[:, None]], ids=lambda y: type(y).__name__
)
def test_text_counts_as_sorted_indices_and_the_report_says_so(y):
    held = (X[:20], Y[:20])
    found = audit(network(), (X, y), heldout=held, penalty=0.1)
    wanted = audit(network(), (X, INDEX), heldout=(X[:20], INDEX[:20]), penalty=0.1)
    assert same(found, wanted)
    assert not any("classes" in note for note in wanted.model.notes)
    (note,) = [note for note in found.model.notes if "classes" in note]
    assert "'ant', 'bee', 'cat', sorted" in note


def test_named_classes_set_the_order():
    order = ["cat", "ant", "bee"]
    found = audit(network(), (X, Y), penalty=0.1, classes=order)
    wanted = audit(network(), (X, np.array([1, 2, 0])[INDEX]), penalty=0.1)
    assert same(found, wanted)
    assert found.data.sha256 == digest_of(X, Y) != wanted.data.sha256
    assert not any("classes" in note for note in found.model.notes)


def test_one_logit_has_two_classes():
    found = audit(network(1), (X, np.where(INDEX > 0, "yes", "no")), penalty=0.1)
    assert found.family == "bernoulli"
    assert same(found, audit(network(1), (X, (INDEX > 0).astype(int)), penalty=0.1))


def test_a_class_without_samples_needs_names():
    y = np.where(INDEX > 0, "cat", "ant")
    with pytest.raises(InputError, match=r"expected 3 classes for 3 output.s., got 2 \('ant', 'c"):
        audit(network(), (X, y), penalty=0.1)
    found = audit(network(), (X, y), penalty=0.1, classes=list(NAMES))
    assert same(found, audit(network(), (X, np.where(INDEX > 0, 2, 0)), penalty=0.1))


BAD = [
    ({"classes": ["ant", "bee"]}, "expected labels among 'ant', 'bee' in train y, got 'cat' in"),
    ({"classes": ["ant", "bee", "cat", "dog"]}, "expected 3 classes for 3 output(s), got 4"),
    ({"classes": ["ant", "bee", "cat", "ant"]}, "expected classes that differ"),
    ({"classes": []}, "expected classes that differ, got none"),
    ({"heldout": (X[:4], ["ant", "cow", "bee", "cow"])}, "in heldout y, got 'cow' in 2 of 4"),
    ({"heldout": (X[:4], [0, 1, 2, 0])}, "expected heldout labels as text"),
    ({"family": "gaussian"}, "expected numbers as targets for family=gaussian, got text"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_refused(options, message):
    with pytest.raises(InputError) as caught:
        audit(network(), (X, Y), penalty=0.1, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_held_out_alone_is_refused():
    with pytest.raises(InputError, match="expected heldout labels as numbers"):
        audit(network(), (X, INDEX), heldout=(X, Y), penalty=0.1)


def test_what_is_no_text_passes_through():
    for y in (
        np.array("ant"),
        np.array([], dtype="U3"),
        INDEX,
        torch.from_numpy(INDEX),
        [[1], [2, 3]],
        np.array([None, "a"], dtype=object),
    ):
        assert text_labels(y) is None
        assert with_indices((X, y), None, None)[0][1] is y
    assert with_indices(None, None, None) == (None, None, None, ())


def test_few_names_are_shown():
    assert few(["a", "b"]) == "'a', 'b'"
    assert few([str(i) for i in range(20)]).endswith("'7' and 12 more")
    assert ClassNames.found_in(Y) == ("ant", "bee", "cat")


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_files_keep_text_labels(tmp_path, kind):
    path = tmp_path / f"data.{kind}"
    if kind == "npz":
        np.savez(path, x=X.numpy(), y=Y)
    else:
        frame = pd.DataFrame(X.numpy(), columns=["a", "b", "c"]).assign(kind=Y)
        frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    data = load_data(str(path), target=None if kind == "npz" else "kind")
    assert data.y.dtype.kind == "U"
    assert data.y.tolist() == Y.tolist()


def test_categories_of_a_table(tmp_path):
    frame = pd.DataFrame({"a": X[:, 0].numpy(), "kind": pd.Categorical(Y)})
    frame.to_parquet(tmp_path / "data.parquet")
    assert load_data(str(tmp_path / "data.parquet"), target="kind").y.tolist() == Y.tolist()


def test_dates_are_no_labels(tmp_path):
    frame = pd.DataFrame({"a": [1.0, 2.0], "day": pd.to_datetime(["2020-01-01", "2020-01-02"])})
    frame.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(InputError, match="expected numbers or class names in day"):
        load_data(str(tmp_path / "data.parquet"), target="day")


def test_missing_text_labels(tmp_path):
    (tmp_path / "gaps.csv").write_text("a,kind\n1,ant\n2,\n")
    with pytest.raises(InputError, match="expected a value of kind in each row"):
        load_data(str(tmp_path / "gaps.csv"), target="kind")


def test_digest_of_text_labels_is_that_of_sorted_indices():
    assert digest_of(X, Y) == digest_of(X, Y.astype(object)) == digest_of(X, INDEX)
