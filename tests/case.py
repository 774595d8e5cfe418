"""What a named problem is: a few lambdas and a seed, made real by `build`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import Problem, make_problem, predict
from flataudit.families import make_family
from flataudit.inputs import Inputs

Penalties = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
Data = Any  # a tensor, a tuple of tensors by position, or a dict of tensors by name


# --- penalties: D by parameter name -------------------------------------------------------------


def constant(value: float, free: tuple[str, ...] = ()) -> Penalties:
    """The same penalty on every element, none on parameters whose name ends in one of `free`."""

    def of(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: torch.full_like(p.detach(), 0.0 if free and name.endswith(free) else value)
            for name, p in params.items()
        }

    return of


def elementwise(low: float, high: float) -> Penalties:
    """Every element its own penalty, log-uniform over low..high, as Adam's are."""

    def of(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(7)
        return {
            name: low * (high / low) ** torch.rand(p.shape, generator=generator).double()
            for name, p in params.items()
        }

    return of


@dataclass(frozen=True)
class Case:
    """A model, its data, family and penalty; `layers`: weights whose Gram goes layer by layer.

    `layers` None: not claimed. `closed_form`: values known without the general definition.
    """

    name: str
    model: Callable[[], nn.Module]
    x: Callable[[], Data]
    y: Callable[[], Tensor]
    family: str = "categorical"
    penalty: Penalties = field(default_factory=lambda: constant(0.02))
    dispersion: float = 1.0
    seed: int = 0
    layers: tuple[str, ...] | None = None
    closed_form: Callable[[Tensor, Tensor], dict[str, Any]] | None = None


@dataclass(frozen=True)
class Built:
    """A case made real: float64 in eval mode."""

    model: nn.Module
    x: Data
    y: Tensor
    penalty: dict[str, Tensor]
    problem: Problem


def build(case: Case, *, chunk_size: int | None = None, copies: int = 1) -> Built:
    """The case's model, data, penalty and problem; `copies` repeats the data set."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        model, x, y = case.model().double().eval(), case.x(), case.y()
    inputs = Inputs.of(x).to(torch.float64)[list(range(len(y))) * copies]
    y = torch.cat([y] * copies)
    n_outputs = predict(model, inputs[:2]).shape[1]
    family = make_family(case.family, y, n_outputs, case.dispersion)
    checked = family.check(y, n_outputs)
    problem = make_problem(copy.deepcopy(model), inputs, checked, family, chunk_size=chunk_size)
    return Built(model, _plain(inputs), y, case.penalty(problem.params), problem)


def first(x: Data, n: int) -> Data:
    """The first n samples of a case's x."""
    return _plain(Inputs.of(x)[:n])


def _plain(inputs: Inputs) -> Data:
    """As a caller gives it."""
    if inputs.names is not None:
        return dict(zip(inputs.names, inputs.parts, strict=True))
    return inputs.parts if len(inputs.parts) > 1 else inputs.parts[0]
