"""The Gram matrix M = B D^-1 B' layer by layer, without forming the Jacobian.

For a Linear layer called once on (n, in) activations a with backpropagated deltas
(one per column of S), row i of B restricted to its weight is delta_i (x) a_i, so

    M_ij += (a_i . a_j) (delta_i . delta_j) / d            one penalty for the tensor
    M_ij += sum_o delta_io delta_jo sum_k a_ik a_jk / d_ok  one penalty per element

which costs N^2 out instead of N^2 in out. Conv2d, and Linear on sequences, form their own rows
sum_t delta_t (x) a_t; every other parameter, and every parameter that two modules share or one
module uses twice, takes the Jacobian route (`Problem.rows`): a layered sum would drop the cross
terms. A check on three samples against the Jacobian route guards against what hooks cannot see.

Only the upper triangle (C order) of M is filled: LAPACK reads it as the lower one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import CHUNK_BYTES, Problem, evaluate

TILE_ROWS = 1152  # rows of M per tile: a tile of float64 stays near the last-level cache
GROUP_BYTES = 2 * 2**30  # explicit rows held at once, N x columns


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """M = B1 D1^-1 B1' (N, N), upper triangle; b0 (N, P0) the free columns; trace tr(G)."""

    matrix: Tensor
    b0: Tensor
    trace_ggn: float


@dataclass(frozen=True, slots=True)
class _Layer:
    """A module whose rows follow from its input and its output's gradient."""

    module: nn.Linear | nn.Conv2d
    weight: str
    bias: str | None
    explicit: bool  # rows formed (convolutions, sequences); else the Hadamard form


def gram_bytes(problem: Problem, penalty: Mapping[str, Tensor]) -> int:
    """Planned peak bytes of `gram`: M, free columns, one group of rows, the layers' inputs."""
    free = [name for name in problem.params if not bool(penalty[name].any())]
    hadamard = [layer for layer in _layers(problem) if not layer.explicit]
    names = {name for layer in hadamard for name in (layer.weight, layer.bias)}
    in_rows = [problem.params[name].numel() for name in problem.params if name not in names]
    group = min(GROUP_BYTES, 8 * problem.n_rows * sum(in_rows))
    layered = 8 * sum(
        problem.n_samples * layer.module.weight.shape[1]
        + problem.n_rows * layer.module.weight.shape[0]
        for layer in hadamard
    )
    n_free = sum(problem.params[name].numel() for name in free)
    matrices = 8 * problem.n_rows * (problem.n_rows + 4 * n_free)
    # Layers and groups are summed one after the other; a group is scaled and cut in copies.
    return matrices + max(2 * layered, 2 * group) + 4 * CHUNK_BYTES


def gram(problem: Problem, penalty: Mapping[str, Tensor]) -> Gram:
    """M = B1 D1^-1 B1' over the penalised columns, B0 the free ones.

    penalty: D by parameter name, each with the parameter's shape, zero throughout or positive
    throughout. Returns M with the upper triangle filled and zeros below.
    """
    layers = _trusted_layers(problem)
    return _assemble(problem, penalty, layers)


def _assemble(problem: Problem, penalty: Mapping[str, Tensor], layers: list[_Layer]) -> Gram:
    n_rows = problem.n_rows
    matrix = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=problem.device)
    free = [name for name in problem.params if not bool(penalty[name].any())]
    hadamard = [layer for layer in layers if not layer.explicit]
    explicit = [layer for layer in layers if layer.explicit]
    in_layers = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    rest = [name for name in problem.params if name not in in_layers and name not in free]
    trace = 0.0

    inputs, deltas = _capture(problem, hadamard)
    for layer in hadamard:
        a, delta = inputs[layer.weight], deltas[layer.weight]
        square = delta.square().sum(dim=2)
        if layer.weight not in free:
            trace += float((square * a.square().sum(dim=1)[:, None]).sum())
        if layer.bias and layer.bias not in free:
            trace += float(square.sum())
        _add_hadamard(matrix, a, delta, _inverse(penalty, layer, free))
    del inputs, deltas

    for columns, weight in _explicit_groups(problem, penalty, explicit, rest, free):
        trace += float(columns.square().sum())
        columns *= weight.sqrt()
        _add_outer(matrix, columns)

    b0 = torch.zeros(n_rows, 0, dtype=torch.float64, device=problem.device)
    if free:
        n_free = sum(problem.params[name].numel() for name in free)
        chunks = problem.chunks(2 * problem.n_columns * n_free)
        b0 = torch.cat([problem.rows(at, free).flatten(0, 1) for at in chunks])
        trace += float(b0.square().sum())
    return Gram(matrix, b0, trace)


# --- which modules can be taken layer by layer -------------------------------------------------


def _layers(problem: Problem) -> list[_Layer]:
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
        fits = bool(args) and args[0].shape[:1] == batch.shape[:1]
        shapes[id(module)] = args[0].ndim if fits and shapes.get(id(module), 0) >= 0 else -1

    candidates = [m for m in problem.model.modules() if _supported(m)]
    for module in candidates:
        handles.append(module.register_forward_hook(count))
    try:
        with torch.no_grad():
            for batch in (problem.x[:1], problem.x[:2]):  # two sizes: a sequence may be as long
                problem.model(batch)
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
        found.append(_Layer(module, names[id(module.weight)], bias, explicit))
    return found


def _supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros"
        return plain and not isinstance(module.padding, str)
    return type(module) is nn.Linear


def _trusted_layers(problem: Problem) -> list[_Layer]:
    """The layers, if three samples' layered Gram equals the Jacobian route's; else none."""
    layers = _layers(problem)
    if not layers:
        return layers
    n = problem.n_samples
    few = problem.subset(sorted({0, n // 2, n - 1}))
    ones = {name: torch.ones_like(p, dtype=torch.float64) for name, p in few.params.items()}
    layered = _assemble(few, ones, layers).matrix
    plain = _assemble(few, ones, []).matrix
    float64 = next(iter(problem.params.values())).dtype == torch.float64
    tolerance = (1e-9 if float64 else 1e-3) * float(plain.abs().max())
    return layers if float((layered - plain).abs().max()) <= tolerance else []


# --- activations and backpropagated deltas ------------------------------------------------------


class _Tape:
    """Records one call's input and output of each layer."""

    def __init__(self, layers: list[_Layer]) -> None:
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


def _backpropagate(
    problem: Problem, layers: list[_Layer], at: slice
) -> Iterator[tuple[_Layer, Tensor, Tensor]]:
    """Per layer its input (c, ...) and deltas (c, K', ...) for the rows of B at `at`."""
    tape = _Tape(layers)
    try:
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


def _capture(problem: Problem, layers: list[_Layer]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All samples' inputs (n, in) and deltas (n, K', out) of the Hadamard layers."""
    inputs: dict[str, list[Tensor]] = {layer.weight: [] for layer in layers}
    deltas: dict[str, list[Tensor]] = {layer.weight: [] for layer in layers}
    if not layers:
        return {}, {}
    for at in _forward_chunks(problem):
        for layer, a, delta in _backpropagate(problem, layers, at):
            inputs[layer.weight].append(a)
            deltas[layer.weight].append(delta)
    return (
        {name: torch.cat(parts) for name, parts in inputs.items()},
        {name: torch.cat(parts) for name, parts in deltas.items()},
    )


def _forward_chunks(problem: Problem) -> Iterator[slice]:
    """Chunks whose inputs, activations and deltas together stay near CHUNK_BYTES."""
    yield from problem.chunks(32 * (math.prod(problem.x.shape[1:]) + 64 * problem.n_columns))


# --- explicit rows --------------------------------------------------------------------------------


def _explicit_groups(
    problem: Problem,
    penalty: Mapping[str, Tensor],
    layers: list[_Layer],
    rest: list[str],
    free: list[str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of B's columns (N, columns) with 1/d per column, each within GROUP_BYTES.

    A tensor too large for one group is cut into column slices, each of which repeats the
    backward passes: memory is bounded, time pays.
    """
    budget = max(1, GROUP_BYTES // (8 * problem.n_rows))
    for layer in layers:
        weight_columns = 0 if layer.weight in free else layer.module.weight.numel()
        outs = layer.module.weight.shape[0]
        per_out = max(1, layer.module.weight.numel() // outs)
        step = max(1, min(outs, budget // per_out)) if weight_columns else outs
        for start in range(0, outs, step):
            cut = slice(start, min(start + step, outs))
            yield _layer_rows(problem, penalty, layer, cut, free)
    pending: list[str] = []
    width = 0
    for name in rest:
        size = problem.params[name].numel()
        if size > budget:
            for start in range(0, size, budget):
                cut = slice(start, min(start + budget, size))
                yield _plain_rows(problem, [name], cut), _reciprocal(penalty[name])[cut]
            continue
        if pending and width + size > budget:
            yield _plain_group(problem, penalty, pending)
            pending, width = [], 0
        pending.append(name)
        width += size
    if pending:
        yield _plain_group(problem, penalty, pending)


def _plain_group(
    problem: Problem, penalty: Mapping[str, Tensor], names: list[str]
) -> tuple[Tensor, Tensor]:
    weight = torch.cat([_reciprocal(penalty[name]) for name in names])
    return _plain_rows(problem, names, slice(None)), weight


def _plain_rows(problem: Problem, names: list[str], cut: slice) -> Tensor:
    size = sum(problem.params[name].numel() for name in names)
    width = len(range(*cut.indices(size)))
    rows = torch.empty(problem.n_rows, width, dtype=torch.float64, device=problem.device)
    k = problem.n_columns
    for at in problem.chunks(2 * k * size):
        rows[at.start * k : at.stop * k] = problem.rows(at, names)[:, :, cut].flatten(0, 1)
    return rows


def _layer_rows(
    problem: Problem, penalty: Mapping[str, Tensor], layer: _Layer, cut: slice, free: list[str]
) -> tuple[Tensor, Tensor]:
    """Rows of one convolution or sequence layer for the output channels in `cut`."""
    k = problem.n_columns
    parts = []
    for at in _forward_chunks(problem):
        for _, a, delta in _backpropagate(problem, [layer], at):
            patches, delta = _as_positions(layer.module, a, delta)
            delta = delta[..., cut, :]
            blocks = []
            if layer.weight not in free:
                blocks.append(torch.einsum("ckot,cit->ckoi", delta, patches).flatten(2))
            if layer.bias and layer.bias not in free:
                blocks.append(delta.sum(dim=3))
            if blocks:
                parts.append(torch.cat(blocks, dim=2).flatten(0, 1))
    weight = []
    if layer.weight not in free:
        weight.append(_reciprocal(penalty[layer.weight][cut]))
    if layer.bias and layer.bias not in free:
        weight.append(_reciprocal(penalty[layer.bias][cut]))
    none = torch.zeros(0, dtype=torch.float64, device=problem.device)
    if not weight:
        return none.reshape(1, 0).expand(problem.n_samples * k, 0).clone(), none
    return torch.cat(parts), torch.cat(weight)


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


# --- filling the upper triangle -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inverse:
    """1/d of a layer: weight a number or (out, in) or None if free; bias (out,) or None."""

    weight: float | Tensor | None
    bias: Tensor | None


def _inverse(penalty: Mapping[str, Tensor], layer: _Layer, free: list[str]) -> _Inverse:
    weight: float | Tensor | None = None
    if layer.weight not in free:
        d = penalty[layer.weight]
        constant = bool((d == d.flatten()[0]).all())
        weight = 1.0 / float(d.flatten()[0]) if constant else d.reciprocal()
    bias = None
    if layer.bias and layer.bias not in free:
        bias = _reciprocal(penalty[layer.bias])
    return _Inverse(weight, bias)


def _reciprocal(d: Tensor) -> Tensor:
    return d.flatten().reciprocal()


def _tiles(n_samples: int, samples: int) -> Iterator[tuple[slice, slice]]:
    """Pairs of sample ranges (i, j) with j >= i that cover the upper triangle."""
    for i in range(0, n_samples, samples):
        for j in range(i, n_samples, samples):
            yield slice(i, min(i + samples, n_samples)), slice(j, min(j + samples, n_samples))


def _add_hadamard(matrix: Tensor, a: Tensor, delta: Tensor, inverse: _Inverse) -> None:
    """matrix += the layer's Gram, tile by tile over the upper triangle.

    a (n, in), delta (n, K', out), matrix (n K', n K').
    """
    n, k, _ = delta.shape
    elementwise = isinstance(inverse.weight, Tensor)
    samples = max(1, (TILE_ROWS // 4 if elementwise else TILE_ROWS) // k)
    blocks = matrix.view(n, k, n, k)
    flat = delta.flatten(0, 1)
    for i, j in _tiles(n, samples):
        rows, columns = slice(i.start * k, i.stop * k), slice(j.start * k, j.stop * k)
        tile = blocks[i, :, j, :]
        if isinstance(inverse.weight, Tensor):
            inner = torch.matmul(a[i] * inverse.weight[:, None, :], a[j].T).permute(1, 2, 0)
            if inverse.bias is not None:
                inner = inner + inverse.bias
            left = delta[i][:, None] * inner[:, :, None, :]
            tile += torch.matmul(left, delta[j].mT[None]).permute(0, 2, 1, 3)
            continue
        if inverse.weight is not None:
            outer = (flat[rows] @ flat[columns].T).view(len(a[i]), k, len(a[j]), k)
            tile += outer * (inverse.weight * (a[i] @ a[j].T))[:, None, :, None]
        if inverse.bias is not None:
            matrix[rows, columns] += (flat[rows] * inverse.bias) @ flat[columns].T


def _add_outer(matrix: Tensor, rows: Tensor) -> None:
    """matrix += rows rows' over the upper triangle."""
    if not rows.shape[1]:
        return
    for start in range(0, len(matrix), 2 * TILE_ROWS):
        at = slice(start, start + 2 * TILE_ROWS)
        matrix[at, start:] += rows[at] @ rows[start:].T
