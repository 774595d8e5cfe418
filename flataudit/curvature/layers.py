"""Modules whose rows of B follow from their input and their output's gradient.

For Linear and Conv2d a vector-Jacobian product is the output's gradient (the delta) times the
input: no Jacobian is needed. That holds for a module that runs once, on inputs with samples first,
and whose parameters belong to it alone; every other parameter takes the Jacobian route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import Problem, evaluate


@dataclass(frozen=True, slots=True)
class Layer:
    """A module whose rows follow from its input and its output's gradient."""

    module: nn.Linear | nn.Conv2d
    weight: str
    bias: str | None
    explicit: bool  # rows formed (convolutions, sequences); else the Hadamard form


def find_layers(problem: Problem) -> list[Layer]:
    """Linear and Conv2d modules whose parameters belong to them alone and which run once."""
    if problem.repeat != 1:  # an exported graph: its submodules are untyped
        return []
    owners = Counter(
        id(p) for module in problem.model.modules() for p in module.parameters(recurse=False)
    )
    names = {id(p): name for name, p in problem.params.items()}
    found = []
    calls: Counter[int] = Counter()
    shapes: dict[int, int] = {}
    handles = []

    def count(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        calls[id(module)] += 1
        fits = bool(args) and args[0].shape[:1] == (len(batch),)
        shapes[id(module)] = args[0].ndim if fits and shapes.get(id(module), 0) >= 0 else -1

    candidates = [m for m in problem.model.modules() if _supported(m)]
    for module in candidates:
        handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            for batch in (problem.x[:1], problem.x[:2]):  # two sizes: a sequence may be as long
                batch.call(problem.model)
    finally:
        for handle in handles:
            handle.remove()
    for module in candidates:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        own = [module.weight] + ([] if module.bias is None else [module.bias])
        ndim = shapes.get(id(module), -1)
        if calls[id(module)] != 2 or ndim < 0 or (isinstance(module, nn.Conv2d) and ndim != 4):
            continue
        if any(owners[id(p)] != 1 or id(p) not in names for p in own):
            continue
        bias = None if module.bias is None else names[id(module.bias)]
        explicit = isinstance(module, nn.Conv2d) or ndim != 2
        found.append(Layer(module, names[id(module.weight)], bias, explicit))
    return found


def _supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return type(module) is nn.Linear


class _Tape:
    """Records one call's input and output of each layer."""

    def __init__(self, layers: list[Layer]) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self._handles = [
            layer.module.register_forward_hook(self._hook(layer.weight)) for layer in layers
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            self.inputs[name], self.outputs[name] = args[0].detach(), out
            # The clone goes on: an in-place activation must not overwrite what is recorded.
            return out.clone()

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def backpropagate(
    problem: Problem, layers: list[Layer], at: slice
) -> Iterator[tuple[Layer, Tensor, Tensor]]:
    """Per layer its input (c, ...) and deltas (c, K', ...) for the rows of B at `at`."""
    tape = _Tape(layers)
    try:
        with torch.enable_grad():  # the caller may audit under no_grad
            out = evaluate(problem.model, problem.x[at])
    finally:
        tape.close()
    names = list(tape.outputs)
    root = problem.factor.root[at] * problem.n_samples**-0.5
    columns = []
    for j in range(problem.n_columns):
        last = j == problem.n_columns - 1
        columns.append(
            torch.autograd.grad(
                out,
                [tape.outputs[k] for k in names],
                root[:, :, j],
                retain_graph=not last,
                allow_unused=True,
                materialize_grads=True,
            )
        )
    for layer in layers:
        index = names.index(layer.weight)
        delta = torch.stack([column[index] for column in columns], dim=1).to(torch.float64)
        yield layer, tape.inputs[layer.weight].to(torch.float64), delta


def capture(problem: Problem, layers: list[Layer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All samples' inputs (n, in) and deltas (n, K', out) of the Hadamard layers."""
    inputs: dict[str, list[Tensor]] = {layer.weight: [] for layer in layers}
    deltas: dict[str, list[Tensor]] = {layer.weight: [] for layer in layers}
    if not layers:
        return {}, {}
    for at in forward_chunks(problem):
        for layer, a, delta in backpropagate(problem, layers, at):
            inputs[layer.weight].append(a)
            deltas[layer.weight].append(delta)
    return (
        {name: torch.cat(parts) for name, parts in inputs.items()},
        {name: torch.cat(parts) for name, parts in deltas.items()},
    )


def forward_chunks(problem: Problem) -> Iterator[slice]:
    """Chunks whose inputs, activations and deltas together stay near CHUNK_BYTES."""
    yield from problem.chunks(32 * (problem.x.values_per_sample + 64 * problem.n_columns))


def as_positions(module: nn.Linear | nn.Conv2d, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs as (c, in, t) patches and deltas as (c, K', out, t) over positions t."""
    if isinstance(module, nn.Conv2d):
        patches = torch.nn.functional.unfold(
            a,
            module.kernel_size,
            dilation=module.dilation,
            padding=module.padding,  # type: ignore[arg-type]  # strings are sorted out before
            stride=module.stride,
        )
        return patches, delta.flatten(3)
    return a.flatten(1, -2).mT, delta.flatten(2, -2).mT
