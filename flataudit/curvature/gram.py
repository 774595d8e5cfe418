"""The Gram matrix M = B D^-1 B' layer by layer, without forming the Jacobian.

For a Linear layer called once on (n, in) activations a with backpropagated deltas
(one per column of S), row i of B restricted to its weight is delta_i (x) a_i, so

    M_ij += (a_i . a_j) (delta_i . delta_j) / d            one penalty for the tensor
    M_ij += sum_o delta_io delta_jo sum_k a_ik a_jk / d_ok  one penalty per element

which costs N^2 out instead of N^2 in out. Conv2d, Linear on sequences and norms form their own rows
sum_t delta_t (x) a_t, all in one pass while they fit; every other parameter, and every parameter
that two modules share or one module uses twice, takes the Jacobian route (`Problem.rows`): a
layered sum would drop the cross terms. A check on three samples against the Jacobian route guards
against what hooks cannot see.

Only the upper triangle (C order) of M is filled: LAPACK reads it as the lower one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flataudit.curvature.layers import (
    Layer,
    backpropagate,
    capture,
    find_layers,
    forward_chunks,
    rows_of,
)
from flataudit.curvature.problem import CHUNK_BYTES, Problem

TILE_ROWS = 1152  # rows of M per tile: a tile of float64 stays near the last-level cache
GROUP_BYTES = 2 * 2**30  # explicit rows held at once, N x columns


@dataclass(frozen=True, slots=True, eq=False)
class Gram:
    """M = B1 D1^-1 B1' (N, N), upper triangle; b0 (N, P0) the free columns; trace tr(G)."""

    matrix: Tensor
    b0: Tensor
    trace_ggn: float


def gram_bytes(problem: Problem, penalty: Mapping[str, Tensor]) -> int:
    """Planned peak bytes of `gram`: M, free columns, one group of rows, the layers' inputs."""
    free = [name for name in problem.params if not bool(penalty[name].any())]
    hadamard = [layer for layer in trusted_layers(problem) if not layer.explicit]
    names = {name for layer in hadamard for name in (layer.weight, layer.bias)}
    in_rows = [problem.params[name].numel() for name in problem.params if name not in names]
    group = min(GROUP_BYTES, 8 * problem.n_rows * sum(in_rows))
    layered = 8 * sum(
        problem.n_samples * layer.module.weight.shape[1]
        + problem.n_rows * layer.module.weight.shape[0]
        for layer in hadamard
    )
    n_free = sum(problem.params[name].numel() for name in free)
    # M, the free columns with their images, and one strip of an outer product.
    matrices = 8 * problem.n_rows * (problem.n_rows + 4 * n_free + 2 * TILE_ROWS)
    # Layers and groups are summed one after the other; a group is scaled and cut in copies.
    return matrices + max(2 * layered, 2 * group) + 4 * CHUNK_BYTES


@dataclass(frozen=True, slots=True)
class GramWork:
    """Of `gram`: floating-point operations of its matrix products; entries of the Jacobian that are
    differentiated; free columns."""

    products: float
    entries: float
    free: int


def gram_work(problem: Problem, penalty: Mapping[str, Tensor]) -> GramWork:
    """What `gram` does, counted: half of M, by layers where they allow it.

    A Linear layer's two products and their entrywise one, N^2 (out + 1) and n^2 in; with a penalty
    per element n^2 in out and N^2 out; explicit columns N^2 each.
    """
    n, rows = float(problem.n_samples), float(problem.n_rows)
    free = {name for name in problem.params if not bool(penalty[name].any())}
    products = columns = entries = 0.0
    in_layers = set()
    for layer in trusted_layers(problem):
        in_layers |= {layer.weight, layer.bias}
        if layer.explicit:
            own = [name for name in (layer.weight, layer.bias) if name and name not in free]
            columns += sum(problem.params[name].numel() for name in own)
            continue
        out, inside = layer.module.weight.shape
        if layer.weight not in free:
            d = penalty[layer.weight]
            constant = bool((d == d.flatten()[0]).all())
            products += n**2 * inside * (1.0 if constant else out) + rows**2 * (out + 1)
        if layer.bias and layer.bias not in free:
            products += rows**2 * out
    n_free = 0
    for name, p in problem.params.items():
        if name in free:
            n_free += p.numel()
            entries += rows * p.numel()
        elif name not in in_layers:
            columns += p.numel()
            entries += rows * p.numel()
    return GramWork(products + rows**2 * columns, entries, n_free)


def gram(problem: Problem, penalty: Mapping[str, Tensor]) -> Gram:
    """M = B1 D1^-1 B1' over the penalised columns, B0 the free ones.

    penalty: D by parameter name, each with the parameter's shape, zero throughout or positive
    throughout. Returns M with the upper triangle filled and zeros below.
    """
    layers = trusted_layers(problem)
    return _assemble(problem, penalty, layers)


def _assemble(problem: Problem, penalty: Mapping[str, Tensor], layers: list[Layer]) -> Gram:
    n_rows = problem.n_rows
    matrix = torch.zeros(n_rows, n_rows, dtype=torch.float64, device=problem.device)
    free = [name for name in problem.params if not bool(penalty[name].any())]
    hadamard = [layer for layer in layers if not layer.explicit]
    explicit = [layer for layer in layers if layer.explicit]
    in_layers = {name for layer in layers for name in (layer.weight, layer.bias) if name}
    rest = [name for name in problem.params if name not in in_layers and name not in free]
    trace = 0.0

    inputs, deltas = capture(problem, hadamard)
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


def trusted_layers(problem: Problem) -> list[Layer]:
    """The layers, if three samples' layered Gram equals the Jacobian route's; else none."""
    layers = find_layers(problem)
    if not layers:
        return layers
    few = problem.few()
    ones = {name: torch.ones_like(p, dtype=torch.float64) for name, p in few.params.items()}
    layered = _assemble(few, ones, layers).matrix
    plain = _assemble(few, ones, []).matrix
    float64 = next(iter(problem.params.values())).dtype == torch.float64
    tolerance = (1e-9 if float64 else 1e-3) * float(plain.abs().max())
    return layers if float((layered - plain).abs().max()) <= tolerance else []


# --- explicit rows --------------------------------------------------------------------------------


def _explicit_groups(
    problem: Problem,
    penalty: Mapping[str, Tensor],
    layers: list[Layer],
    rest: list[str],
    free: list[str],
) -> Iterator[tuple[Tensor, Tensor]]:
    """Groups of B's columns (N, columns) with 1/d per column, each within GROUP_BYTES.

    A tensor too large for one group is cut into column slices, each of which repeats the
    backward passes: memory is bounded, time pays.
    """
    budget = max(1, GROUP_BYTES // (8 * problem.n_rows))
    together: list[tuple[Layer, slice]] = []
    width = 0
    for layer, cut, columns in _cuts(layers, free, budget):
        if together and width + columns > budget:
            yield _layer_rows(problem, penalty, together, free)
            together, width = [], 0
        together.append((layer, cut))
        width += columns
    if together:
        yield _layer_rows(problem, penalty, together, free)
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


def _cuts(layers: list[Layer], free: list[str], budget: int) -> Iterator[tuple[Layer, slice, int]]:
    """Explicit layers, a large one in slices of its output channels, with the columns of each."""
    for layer in layers:
        outs = layer.outs
        weighed = layer.weight not in free
        shifted = layer.bias is not None and layer.bias not in free
        each = (layer.module.weight.numel() // outs if weighed else 0) + shifted
        if not each:
            continue
        step = max(1, min(outs, budget // each))
        for start in range(0, outs, step):
            stop = min(start + step, outs)
            yield layer, slice(start, stop), each * (stop - start)


def _layer_rows(
    problem: Problem,
    penalty: Mapping[str, Tensor],
    cuts: list[tuple[Layer, slice]],
    free: list[str],
) -> tuple[Tensor, Tensor]:
    """Rows of these layers' output channels, from one pass over the data."""
    weight = []
    for layer, cut in cuts:
        if layer.weight not in free:
            weight.append(_reciprocal(penalty[layer.weight].reshape(layer.outs, -1)[cut]))
        if layer.bias and layer.bias not in free:
            weight.append(_reciprocal(penalty[layer.bias][cut]))
    inverse = torch.cat(weight)
    rows = torch.empty(problem.n_rows, len(inverse), dtype=torch.float64, device=problem.device)
    k = problem.n_columns
    for at in forward_chunks(problem):
        mine, start = rows[at.start * k : at.stop * k], 0
        passed = backpropagate(problem, [layer for layer, _ in cuts], at)
        for (_, cut), (layer, a, delta) in zip(cuts, passed, strict=True):
            scaled, shift = rows_of(layer, a, delta, cut)
            for name, block in ((layer.weight, scaled), (layer.bias, shift)):
                if name and name not in free:
                    stop = start + block.shape[2]
                    mine[:, start:stop] = block.flatten(0, 1)
                    start = stop
    return rows, inverse


# --- filling the upper triangle -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Inverse:
    """1/d of a layer: weight a number or (out, in) or None if free; bias (out,) or None."""

    weight: float | Tensor | None
    bias: Tensor | None


def _inverse(penalty: Mapping[str, Tensor], layer: Layer, free: list[str]) -> _Inverse:
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
