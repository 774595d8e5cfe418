"""The column to slice by: of the data's own file, or of another one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from flataudit.columns import own_column, read_slices
from flataudit.data import load_data
from flataudit.errors import InputError

X = np.arange(12.0).reshape(6, 2)
Y = np.array([0, 1, 0, 1, 0, 1])
SHOP = np.array(["a", "b", "c", "a", "b", "c"])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The files that the tests name, in the working folder."""
    monkeypatch.chdir(tmp_path)
    np.savez("data.npz", x=X, y=Y, shop=SHOP)
    np.savez("named.npz", ids=X, mask=X[:, :1], y=Y, shop=SHOP, age=Y)
    table = pd.DataFrame({"u": X[:, 0], "v": X[:, 1], "shop": SHOP, "label": Y})
    table.to_csv("data.csv", index=False)
    table.to_parquet("data.parquet")
    table.drop(columns="shop").to_csv("plain.csv", index=False)
    return tmp_path


def loaded(spec, slices):
    target = None if spec.endswith(".npz") else "label"
    data = load_data(spec, target=target, slices=own_column(slices))
    return data, read_slices(slices, data)


@pytest.mark.parametrize("spec", ["data.npz", "data.csv", "data.parquet"])
def test_a_text_column_of_the_data_is_no_feature(spec):
    data, found = loaded(spec, "shop")
    np.testing.assert_array_equal(data.x, X)
    assert list(found) == ["shop"]
    assert list(found["shop"]) == list(SHOP)


def test_a_number_stays_a_feature():
    data, found = loaded("plain.csv", "u")
    np.testing.assert_array_equal(data.x, X)
    assert list(found["u"]) == list(X[:, 0])


def test_the_target_can_be_sliced_by():
    data, found = loaded("plain.csv", "label")
    assert data.y.tolist() == found["label"].tolist() == Y.tolist()


def test_an_array_beside_named_inputs_is_none_of_them():
    data, found = loaded("named.npz", "shop")
    assert set(data.x) == {"ids", "mask", "age"}
    assert list(found["shop"]) == list(SHOP)
    data, _ = loaded("named.npz", "age")
    assert "age" not in data.x


@pytest.mark.parametrize("file", ["data.npz", "data.csv", "data.parquet"])
def test_a_column_of_another_file(file):
    data, found = loaded("plain.csv", f"{file}:shop")
    np.testing.assert_array_equal(data.x, X)
    assert list(found["shop"]) == list(SHOP)


def test_heldout_data_may_lack_the_column():
    assert load_data("plain.csv", target="label", slices="shop").x.shape == (6, 2)


@pytest.mark.parametrize(
    ("spec", "slices", "message"),
    [
        ("plain.csv", "shop", "expected --slices to name a column of plain.csv, got 'shop'"),
        ("data.npz", "shoe", "choose from: 'x', 'y', 'shop'"),
        ("data.npz", "none.csv:shop", "expected a file for --slices at none.csv, got none"),
        ("data.npz", "empty.csv:shop", "expected a readable file for --slices at empty.csv"),
        ("data.npz", "empty.npz:shop", "expected a readable file for --slices at empty.npz"),
    ],
)
def test_what_is_missing_is_named(spec, slices, message, folder):
    for name in ("empty.csv", "empty.npz"):
        (folder / name).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        loaded(spec, slices)


def test_data_from_a_function_need_a_file(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "rows_of_mine.py").write_text(
        "import numpy as np\ndef train():\n    return np.ones((6, 2)), np.arange(6) % 2\n"
    )
    data = load_data("rows_of_mine:train")
    with pytest.raises(InputError, match="expected --slices FILE:COLUMN for data that are no file"):
        read_slices("shop", data)
    assert list(read_slices("data.csv:shop", data)["shop"]) == list(SHOP)
