"""Arrays in, checked tensors out: the core's only contact with the caller's data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flataudit.errors import InputError
from flataudit.inputs import Inputs


def as_pair(data: Any, name: str) -> tuple[Inputs, Tensor]:
    """(x, y) as CPU tensors; floats become float64, integers stay integer, booleans too.

    x: one array, a tuple of arrays (inputs by position) or a mapping of arrays (by name).

    Raises:
        InputError: not a pair, fewer than 2 samples, lengths that differ, NaN or infinity in x.
    """
    try:
        x, y = data
    except (TypeError, ValueError):
        raise InputError(
            f"expected {name} to be a pair (x, y), got {type(data).__name__}; give both arrays"
        ) from None
    x, y = _inputs(x, f"{name} x"), _tensor(y, f"{name} y")
    if y.ndim == 0 or any(part.shape[:1] != y.shape[:1] for part in x.parts):
        raise InputError(
            f"expected {name} x and y of the same length, got shapes {x.shapes} and"
            f" {tuple(y.shape)}; give one target per sample"
        )
    if len(x) < 2:
        raise InputError(
            f"expected at least 2 samples in {name}, got {len(x)}; a gap needs a sample's spread"
        )
    if x.values_per_sample == 0:
        raise InputError(
            f"expected at least one feature in {name} x, got shape {x.shapes}; give inputs"
        )
    for label, part in x.labelled():
        if part.is_floating_point() and not bool(torch.isfinite(part).all()):
            bad = int((~torch.isfinite(part)).reshape(len(part), -1).any(dim=1).sum())
            raise InputError(
                f"expected finite values in {name} {label or 'x'}, got NaN or infinity in {bad} of"
                f" {len(x)} samples; drop or impute those rows"
            )
    return x, y


def digest(x: Inputs | Tensor, y: Tensor) -> str:
    """sha256 over names, dtype, shape and bytes of x and y: the identity of the training data."""
    sha = hashlib.sha256()
    for label, t in (*Inputs.of(x).labelled(), ("", y)):
        array = np.ascontiguousarray(t.numpy())
        sha.update(f"{label}\0".encode() if label else b"")
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(array.data.cast("B"))
    return sha.hexdigest()


def sample_keys(x: Inputs | Tensor) -> NDArray[np.uint64]:
    """A key for each sample's inputs, (n,): equal inputs have equal keys.

    The first 64 bits of BLAKE2b over the values in float32, integers in int64: what differs in the
    last digits only, as between machines, is the same sample. Labels do not count.

    >>> one, two, other = sample_keys(torch.tensor([[0.1, 2.0], [0.1, 2.0], [0.1, 3.0]]))
    >>> one == two, one == other
    (np.True_, np.False_)
    """
    parts = []
    for label, t in Inputs.of(x).labelled():
        array = t.detach().cpu().numpy()
        kind = np.float32 if array.dtype.kind == "f" else np.int64
        with np.errstate(over="ignore"):
            values: NDArray[Any] = array.astype(kind).reshape(len(array), -1)
        parts.append((label.encode(), values + 0))  # -0.0 is 0.0
    keys = np.empty(len(parts[0][1]), np.uint64)
    for at in range(len(keys)):
        found = hashlib.blake2b(digest_size=8)
        for label_bytes, values in parts:
            found.update(label_bytes + values[at].tobytes())
        keys[at] = int.from_bytes(found.digest(), "little")
    return keys


def resolve_device(name: str) -> torch.device:
    """The device by name; `auto` is CUDA where there is one.

    Raises:
        InputError: unknown name, or cuda on a machine without it.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise InputError(f"unknown device {name!r}; choose one of: auto, cpu, cuda")
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise InputError("expected a CUDA device for device=cuda, got none; use device=auto or cpu")
    return torch.device("cuda" if has_cuda and name != "cpu" else "cpu")


def _inputs(value: Any, name: str) -> Inputs:
    """Several inputs where x is a mapping or a tuple of arrays; everything else is one array."""
    if isinstance(value, Mapping) and value:
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise InputError(
                f"expected {name} as a mapping of parameter names to arrays, got the key"
                f" {strange[0]!r}; use the names of the model's forward"
            )
        return Inputs.of({key: _tensor(item, f"{name}[{key!r}]") for key, item in value.items()})
    if isinstance(value, tuple) and value and all(hasattr(item, "__array__") for item in value):
        return Inputs.of(tuple(_tensor(item, f"{name}[{i}]") for i, item in enumerate(value)))
    return Inputs.of(_tensor(value, name))


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
    else:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise InputError(
                f"expected numbers in {name}, got dtype {array.dtype}; encode text and objects"
            )
        # torch knows few unsigned types; a copy also drops read-only and negative strides.
        native = {"u": np.int64, "f": np.float64}.get(array.dtype.kind)
        array = array.astype(native or array.dtype.newbyteorder("="))
        tensor = torch.from_numpy(array)
    return tensor.to(torch.float64) if tensor.is_floating_point() else tensor
