"""Rows of B of a model that is one Linear layer: linear and logistic regression, linear probes.

With f_i = W x_i + b, row block i of B is S_i' (x) (x_i', 1) / sqrt(n). Neither G nor B T needs
these rows: with a, c outputs, T_a the rows of T for the weights of output a, and t_a for its bias,

    G_ac = (1/n) sum_i (S_i S_i')_ac x_i x_i'         n in^2 K (K + 1) operations, not 2 N P^2
    B_i T = (1/sqrt(n)) S_i' [x_i' T_a + t_a]_a       2 n P a column of T, not 2 N P
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flataudit.curvature.gram import trusted_layers
from flataudit.curvature.layers import Layer, backpropagate, forward_chunks
from flataudit.curvature.problem import Problem

PANEL = 512  # columns of T at a time: each is read once, and a product is wide enough


@dataclass(frozen=True, slots=True, eq=False)
class LinearModel:
    """inputs x (n, in); weight, bias: where each starts among the parameters, bias None without."""

    problem: Problem
    inputs: Tensor
    weight: int
    bias: int | None

    def _weights(self, output: int) -> slice:
        inside = self.inputs.shape[1]
        return slice(self.weight + output * inside, self.weight + (output + 1) * inside)

    @property
    def _biases(self) -> slice | None:
        return None if self.bias is None else slice(self.bias, self.bias + self.problem.n_outputs)

    def ggn(self) -> Tensor:
        """G = B'B (P, P)."""
        problem, x = self.problem, self.inputs
        p, k = problem.n_params, problem.n_outputs
        root = problem.factor.root * problem.n_samples**-0.5
        variance = root @ root.mT
        ggn = torch.zeros(p, p, dtype=torch.float64, device=problem.device)
        for a in range(k):
            for c in range(a + 1):
                block = x.T @ (variance[:, a, c, None] * x)
                ggn[self._weights(a), self._weights(c)] = block
                ggn[self._weights(c), self._weights(a)] = block.T
        if self._biases is not None:
            ggn[self._biases, self._biases] = variance.sum(dim=0)
            cross = (x.T @ variance.flatten(1)).view(-1, k, k)
            for a in range(k):
                ggn[self._weights(a), self._biases] = cross[:, a]
                ggn[self._biases, self._weights(a)] = cross[:, a].T
        return ggn

    def times(self, t: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """B T for T (P, q), tile by tile: the samples, the columns of T, and (c, K', columns).

        Panels in which all weights of an output are zero, as in a triangular T, cost nothing.
        """
        problem, k = self.problem, self.problem.n_outputs
        root = problem.factor.root.mT * problem.n_samples**-0.5
        wide = min(PANEL, t.shape[1])
        chunks = list(problem.chunks(2 * k * wide))
        # One buffer throughout: fresh pages for every tile cost as much as a third of the products.
        buffer = t.new_empty(k, chunks[0].stop, wide)
        for start in range(0, t.shape[1], PANEL):
            panel = t[:, start : start + PANEL].contiguous()
            width = panel.shape[1]
            used = [bool(panel[self._weights(a)].any()) for a in range(k)]
            for at in chunks:
                x = self.inputs[at]
                each = buffer[:, : len(x), :width]
                for a in range(k):
                    if used[a]:
                        torch.mm(x, panel[self._weights(a)], out=each[a])
                    else:
                        each[a].zero_()
                if self._biases is not None:
                    each += panel[self._biases][:, None]
                yield at, slice(start, start + width), root[at] @ each.transpose(0, 1)


def is_linear_layer(problem: Problem) -> bool:
    """Whether the model is one Linear layer, as three samples show."""
    return linear_model(problem.few()) is not None


def linear_model(problem: Problem) -> LinearModel | None:
    """The model as one Linear layer whose outputs are the model's, or None where it is not one."""
    layer = _layer(problem)
    if layer is None:
        return None
    inputs = []
    float64 = problem.params[layer.weight].dtype == torch.float64
    tolerance = (1e-12 if float64 else 1e-6) * float(problem.factor.root.abs().max())
    tolerance *= problem.n_samples**-0.5
    for at in forward_chunks(problem):
        root = problem.factor.root[at].mT * problem.n_samples**-0.5
        for _, x, delta in backpropagate(problem, [layer], at):
            # What follows the layer must hand S_i through as it is: a scale would not.
            if delta.shape != root.shape or float((delta - root).abs().max()) > tolerance:
                return None
            inputs.append(x)
    starts, start = {}, 0
    for name, p in problem.params.items():
        starts[name] = start
        start += p.numel()
    bias = None if layer.bias is None else starts[layer.bias]
    return LinearModel(problem, torch.cat(inputs), starts[layer.weight], bias)


def _layer(problem: Problem) -> Layer | None:
    """The one layer that holds every parameter, if there is one and it can be trusted."""
    layers = trusted_layers(problem)
    if len(layers) != 1 or layers[0].explicit:
        return None
    own = {name for name in (layers[0].weight, layers[0].bias) if name}
    return layers[0] if own == set(problem.params) else None
