"""A second device on a machine that has only its processor.

Tensors on it say that they are elsewhere (torch's device `meta`) and hold their values in memory;
every operation is one of the processor's, after a check that a GPU would make: no operand from the
other device, but for numbers without dimensions and indices, and no numpy. A tensor that was made
on the wrong device is an error here as it would be there. By `__torch_dispatch__`, the extension
point of torch's notes on extending it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MOVES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Within it tensors can be moved to the device and made there."""
    # Module.to() would otherwise keep the old parameter and exchange what it shows, not what it
    # holds. (Parameters that are one tensor come apart by it: no case has such.)
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Calls(), _Operations():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


class _Elsewhere(Tensor):
    """A tensor of the second device; `held` has its values."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> _Elsewhere:
        made: _Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """What torch does before it dispatches, and what this device cannot be shown otherwise."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]  # torch would make it there, without the values
            return func(*args, **kwargs).to(DEVICE)
        if func is Tensor.__getitem__ and isinstance(args[1], list):
            return func(args[0], torch.tensor(args[1]))
        if func is torch.nn.functional.linear and args[0].dim() == 1:
            # The squeeze in place within would not be seen.
            return func(args[0].unsqueeze(0), *args[1:], **kwargs).squeeze(0)
        return func(*args, **kwargs)


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the values held, after the check of devices."""
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, _Elsewhere)]
    name = func._schema.name
    if there and name not in MOVES:
        _check(name, args, tensors)
    if there and torch.Tag.inplace_view in func.tags:
        raise RuntimeError(f"{name}: expected no change of shape in place; the shape shown stays")
    values, options = _mapped(_held, args), _mapped(_held, kwargs)
    to = options.get("device")
    if to is not None:
        options["device"] = torch.device("cpu")
    result = func(*values, **options)
    stays = bool(there) if to is None else torch.device(to).type == DEVICE.type
    if name == "aten::copy_":
        return args[0]
    same = {id(t.held): t for t in there}  # in-place operations return what they were given

    def shown(value: Any) -> Any:
        if id(value) in same:
            return same[id(value)]
        return _Elsewhere(value) if stays and isinstance(value, Tensor) else value

    return _mapped(shown, result)


def _check(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    here = [t for t in tensors if not isinstance(t, _Elsewhere) and t.dim()]
    if here and not (name in INDEXED and isinstance(args[0], _Elsewhere)):
        raise RuntimeError(f"{name}: expected all tensors on one device, got both")


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _Elsewhere) else value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` on everything within tuples, lists and dicts."""
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(change, part) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return change(value)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value
