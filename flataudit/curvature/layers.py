"""Modules whose rows of B follow from their input and their output's gradient.

For Linear and Conv2d a vector-Jacobian product is the output's gradient (the delta) times the
input, for a normalisation with a scale and a shift the delta times the normalised input: no
Jacobian is needed. That holds for a module that runs once, on inputs with samples first, and whose
parameters belong to it alone; every other parameter takes the Jacobian route.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from flataudit.curvature.problem import Problem, evaluate

Norm = nn.LayerNorm | nn.GroupNorm | nn.BatchNorm1d | nn.BatchNorm2d


@dataclass(frozen=True, slots=True)
class Layer:
    """A module whose rows follow from its input and its output's gradient."""

    module: nn.Linear | nn.Conv2d | Norm
    weight: str
    bias: str | None
    explicit: bool  # rows formed (convolutions, sequences, norms); else the Hadamard form

    @property
    def outs(self) -> int:
        """Output channels, or the features of a norm, each with a bias of its own."""
        weight = self.module.weight
        return weight.shape[0] if isinstance(self.module, nn.Linear | nn.Conv2d) else weight.numel()


def find_layers(problem: Problem) -> list[Layer]:
    """Linear, Conv2d and norm modules whose parameters are theirs alone and which run once."""
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
        assert isinstance(module, nn.Linear | nn.Conv2d | Norm)
        own = [module.weight] + ([] if module.bias is None else [module.bias])
        ndim = shapes.get(id(module), -1)
        if calls[id(module)] != 2 or ndim < 0 or (isinstance(module, nn.Conv2d) and ndim != 4):
            continue
        if any(owners[id(p)] != 1 or id(p) not in names for p in own):
            continue
        bias = None if module.bias is None else names[id(module.bias)]
        explicit = not isinstance(module, nn.Linear) or ndim != 2
        found.append(Layer(module, names[id(module.weight)], bias, explicit))
    return found


def _supported(module: nn.Module) -> bool:
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):  # with the statistics of training
        fixed = not module.training and module.running_mean is not None
        return fixed and module.weight is not None
    if type(module) in (nn.LayerNorm, nn.GroupNorm):
        return module.weight is not None
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


def rows_of(layer: Layer, a: Tensor, delta: Tensor, cut: slice) -> tuple[Tensor, Tensor]:
    """Rows of the weight (c, K', columns) and of the bias (c, K', outs), of the outs in `cut`."""
    module = layer.module
    if isinstance(module, nn.Linear | nn.Conv2d):
        patches, delta = _as_positions(module, a, delta)
        delta = delta[..., cut, :]
        return torch.einsum("ckot,cit->ckoi", delta, patches).flatten(2), delta.sum(dim=3)
    scaled, delta = _normalised(module, a, delta)
    delta = delta[..., cut, :]
    return (delta * scaled[:, None, cut]).sum(dim=3), delta.sum(dim=3)


def _as_positions(module: nn.Linear | nn.Conv2d, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
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


def _normalised(module: Norm, a: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs before scale and shift (c, outs, t), deltas (c, K', outs, t), over positions t."""
    if isinstance(module, nn.LayerNorm):
        outs = module.weight.numel()
        a = functional.layer_norm(a, module.normalized_shape, eps=module.eps)
        return a.reshape(len(a), -1, outs).mT, delta.reshape(*delta.shape[:2], -1, outs).mT
    if isinstance(module, nn.GroupNorm):
        a = functional.group_norm(a, module.num_groups, eps=module.eps)
    else:
        assert module.running_mean is not None
        assert module.running_var is not None
        statistics = module.running_mean.to(a.dtype), module.running_var.to(a.dtype)
        a = functional.batch_norm(a, *statistics, eps=module.eps)
    outs = a.shape[1]
    return a.reshape(len(a), outs, -1), delta.reshape(*delta.shape[:2], outs, -1)
