"""Arrays in, checked tensors out: the core's only contact with the caller's data."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flataudit.errors import InputError


def as_pair(data: Any, name: str) -> tuple[Tensor, Tensor]:
    """(x, y) as CPU tensors; floats become float64, integers stay integer, booleans too.

    Raises:
        InputError: not a pair, fewer than 2 samples, lengths that differ, NaN or infinity in x.
    """
    try:
        x, y = data
    except (TypeError, ValueError):
        raise InputError(
            f"expected {name} to be a pair (x, y), got {type(data).__name__}; give both arrays"
        ) from None
    x, y = _tensor(x, f"{name} x"), _tensor(y, f"{name} y")
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
        raise InputError(
            f"expected {name} x and y of the same length, got shapes {tuple(x.shape)} and"
            f" {tuple(y.shape)}; give one target per sample"
        )
    if len(x) < 2:
        raise InputError(
            f"expected at least 2 samples in {name}, got {len(x)}; a gap needs a sample's spread"
        )
    if x.numel() == 0:
        raise InputError(
            f"expected at least one feature in {name} x, got shape {tuple(x.shape)}; give inputs"
        )
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(dim=1).sum() if x.ndim > 1 else 1)
        raise InputError(
            f"expected finite values in {name} x, got NaN or infinity in {bad} of {len(x)} samples;"
            " drop or impute those rows"
        )
    return x, y


def digest(x: Tensor, y: Tensor) -> str:
    """sha256 over dtype, shape and bytes of x and y: the identity of the training data."""
    sha = hashlib.sha256()
    for t in (x, y):
        array = np.ascontiguousarray(t.numpy())
        sha.update(f"{array.dtype.str}{array.shape}".encode())
        sha.update(array.data.cast("B"))
    return sha.hexdigest()


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
