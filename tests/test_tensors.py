"""Arrays in, checked tensors out."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from flataudit.errors import InputError
from flataudit.tensors import as_pair, digest, resolve_device

X = np.arange(12.0).reshape(4, 3)
Y = np.array([0, 1, 0, 1])


def pair_of(x, y) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensors of a single input."""
    inputs, y = as_pair((x, y), "train")
    (x,) = inputs.parts
    assert inputs.names is None
    return x, y


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "longdouble", ">f4", ">f8", "<f8"]
)
def test_any_float_array(dtype):
    x, y = pair_of(X.astype(dtype), Y)
    assert x.dtype == torch.float64
    assert y.dtype == torch.int64
    assert x.tolist() == X.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_float_tensor(dtype):
    x, _ = pair_of(torch.tensor(X, dtype=dtype, requires_grad=True), torch.tensor(Y))
    assert x.dtype == torch.float64
    assert not x.requires_grad


@pytest.mark.parametrize("dtype", ["int8", "int32", "int64", "uint8", "uint16", "uint32", ">i4"])
def test_integers_stay_integers(dtype):
    x, _ = pair_of(X.astype(dtype), Y)
    assert not x.is_floating_point()
    assert x.tolist() == X.astype(int).tolist()


def test_booleans_stay_booleans():
    _, y = as_pair((X, Y.astype(bool)), "train")
    assert y.dtype == torch.bool


def test_lists_views_and_read_only_arrays():
    backwards = X[::-1]
    fixed = X.copy()
    fixed.flags.writeable = False
    for given in (X.tolist(), backwards[::-1], fixed, np.asfortranarray(X)):
        x, _ = pair_of(given, Y.tolist())
        assert x.tolist() == X.tolist()


def test_the_callers_array_is_copied():
    mine = X.copy()
    x, _ = pair_of(mine, Y)
    x[0, 0] = 99.0
    assert mine[0, 0] == 0.0


BAD = [
    (None, "pair (x, y)"),
    (3, "pair (x, y)"),
    ((X,), "pair (x, y)"),
    ((X, Y, Y), "pair (x, y)"),
    ((X, Y[:3]), "same length"),
    ((X[:0], Y[:0]), "at least 2 samples"),
    ((X[:1], Y[:1]), "at least 2 samples"),
    ((np.array(1.0), np.array(1)), "same length"),
    ((np.where(X == 4, np.nan, X), Y), "1 of 4 samples"),
    ((np.where(X > 7, np.inf, X), Y), "2 of 4 samples"),
    ((np.array(["a", "b"]), np.array([0, 1])), "numbers in"),
    ((X, np.array([None, "b", 0, 1], dtype=object)), "numbers in"),
    ((X.astype(complex), Y), "numbers in"),
]


@pytest.mark.parametrize(("data", "part"), BAD)
def test_bad_data(data, part):
    with pytest.raises(InputError) as caught:
        as_pair(data, "heldout")
    message = str(caught.value)
    assert all(word in message for word in ("expected", "got", "heldout", ";", part))
    assert "\n" not in message


def test_one_dimensional_x():
    x, _ = pair_of(X[:, 0], Y)
    assert x.shape == (4,)
    with pytest.raises(InputError, match=r"NaN or infinity in 1 of 4"):
        as_pair((np.array([1.0, np.nan, 2.0, 3.0]), Y), "train")


def test_digest_is_of_dtype_shape_and_bytes():
    x, y = pair_of(X, Y)
    sha = hashlib.sha256()
    for array in (X, Y):
        sha.update(f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
    assert digest(x, y) == sha.hexdigest()


def test_digest_tells_data_apart():
    x, y = pair_of(X, Y)
    others = [
        (x.clone().index_put_((torch.tensor(0), torch.tensor(0)), torch.tensor(1.0).double()), y),
        (x.flip(0), y),
        (x.reshape(4, 3, 1), y),
        (x, y.flip(0)),
        (x, y.double()),
    ]
    assert len({digest(x, y), *(digest(*other) for other in others)}) == 6
    assert digest(x.T.contiguous().T, y) == digest(x, y)


def test_devices():
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(InputError, match="unknown device 'tpu'; choose one of: auto, cpu, cuda"):
        resolve_device("tpu")


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match=r"expected a CUDA device .* got none; use device=auto"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"
