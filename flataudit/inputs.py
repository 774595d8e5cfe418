"""What a network is called with: one tensor, several by position, or several by name.

The rest of the core slices, moves and vmaps `Inputs` as if it were one tensor with samples first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """The model's inputs for n samples, each tensor (n, ...).

    parts: the tensors, which vmap takes as they are (a tuple); names: the parameters of `forward`
    they belong to, None where they go by position. One tensor is one part without a name.

    >>> pair = Inputs.of({"ids": torch.arange(6).reshape(3, 2), "scale": torch.ones(3)})
    >>> len(pair), pair[1:].shapes
    (3, 'ids (2, 2), scale (2,)')
    """

    parts: tuple[Tensor, ...]
    names: tuple[str, ...] | None = None

    @classmethod
    def of(cls, x: Inputs | Tensor | Mapping[str, Tensor] | tuple[Tensor, ...]) -> Inputs:
        """A tensor, a tuple of tensors (by position) or a mapping (by name) as `Inputs`."""
        if isinstance(x, Inputs):
            return x
        if isinstance(x, Mapping):
            return cls(tuple(x.values()), tuple(x))
        return cls(x if isinstance(x, tuple) else (x,))

    def __len__(self) -> int:
        return len(self.parts[0])

    def __getitem__(self, at: slice | Tensor | Sequence[int]) -> Inputs:
        """The samples `at`."""
        return self.like(tuple(part[at] for part in self.parts))

    def like(self, parts: tuple[Tensor, ...]) -> Inputs:
        """Other tensors for the same parameters."""
        return Inputs(parts, self.names)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Inputs:
        """Floating parts in `dtype`; integers and booleans keep theirs."""
        return self.like(
            tuple(p.to(device, dtype if p.is_floating_point() else p.dtype) for p in self.parts)
        )

    def call(self, model: nn.Module, params: Mapping[str, Tensor] | None = None) -> Any:
        """What the model returns, at other parameters where given.

        Without the fused kernels of torch's transformer layers: they run only without gradients,
        and set padded positions to zero, so that outputs and derivatives would belong to two
        different functions.
        """
        args, kwargs = self.arguments
        with _differentiable_attention():
            if params is None:
                return model(*args, **kwargs)
            return torch.func.functional_call(model, dict(params), args, kwargs)

    @property
    def arguments(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """For a call: model(*args, **kwargs)."""
        if self.names is None:
            return self.parts, {}
        return (), dict(zip(self.names, self.parts, strict=True))

    def labelled(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) in an order that does not depend on the caller's; '' by position."""
        if self.names is None:
            return [("", part) for part in self.parts]
        return sorted(zip(self.names, self.parts, strict=True), key=lambda pair: pair[0])

    @property
    def values_per_sample(self) -> int:
        return sum(math.prod(part.shape[1:]) for part in self.parts)

    @property
    def flattened(self) -> Tensor:
        """All values of each sample (n, values); of several parts by name, as float64."""
        if len(self.parts) == 1:
            return self.parts[0]
        flat = [part.reshape(len(part), -1).to(torch.float64) for _, part in self.labelled()]
        return torch.cat(flat, dim=1)

    @property
    def sample_shapes(self) -> list[tuple[str, torch.Size]]:
        """Name and shape of one sample's parts: equal for data that fits the same model."""
        return [(name, part.shape[1:]) for name, part in self.labelled()]

    @property
    def shapes(self) -> str:
        """For messages: '(30, 4)', or 'ids (30, 6), mask (30, 6)'."""
        return self._text(lambda part: str(tuple(part.shape)))

    @property
    def shapes_of_any(self) -> str:
        """The same for any number of samples: '(m, 4)'."""
        return self._text(lambda part: f"({', '.join(map(str, ('m', *part.shape[1:])))})")

    @property
    def description(self) -> str:
        """Shapes and dtypes."""
        return self._text(lambda part: f"{tuple(part.shape)} {part.dtype}")

    def _text(self, of: Any) -> str:
        names = [""] * len(self.parts) if self.names is None else [f"{n} " for n in self.names]
        return ", ".join(name + of(part) for name, part in zip(names, self.parts, strict=True))


@contextmanager
def _differentiable_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
