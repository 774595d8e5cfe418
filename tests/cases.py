"""Named problems: small models of every kind, each a few lambdas and a seed.

`CASES` is what the contract test runs every solver on. Models are built and data drawn under the
case's own seed, in float64 and eval mode, so a case is the same wherever it is used.

Two cases have closed forms (`closed_form`): ridge regression, whose leverages are the diagonal of
the hat matrix and whose leave-one-out residuals are PRESS, and least squares, whose soft rank is
the number of parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.case import Built, Case, build, constant, elementwise
from tests.layer_cases import LAYER_CASES

__all__ = ["BY_NAME", "CASES", "REFERENCES", "Built", "Case", "build", "constant", "elementwise"]

DATA = Path(__file__).parent / "data"


# --- models that nn.Sequential cannot say -------------------------------------------------------


class Tied(nn.Module):
    """One weight in two layers: the encoder's and, transposed, the decoder's."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(5, 4)
        self.decode = nn.Linear(4, 5, bias=False)
        self.decode.weight = nn.Parameter(torch.randn(5, 4) / 2)
        self.encode.weight = nn.Parameter(torch.randn(4, 5) / 2)
        self.head = nn.Linear(5, 3)
        self.again = nn.Linear(5, 3)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.decode(torch.tanh(self.encode(x)))
        return self.head(h) + torch.tanh(self.again(x))


class Twice(nn.Module):
    """One layer called twice: the sum over calls has cross terms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Borrowed(nn.Module):
    """Uses another module's weight through a function, which no hook on that module sees."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 4)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        back = nn.functional.linear(torch.tanh(self.inner(x)), self.inner.weight.T)
        return self.head(back)


class Recurrent(nn.Module):
    """A GRU and a layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class DataDependent(nn.Module):
    """Chooses its branch by the values of x, which vmap cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = [self.up(row) if float(row[0]) > 0 else self.down(row) for row in x.unbind()]
        return torch.stack(rows)


class Sequences(nn.Module):
    """Linear layers on (n, time, in), averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x)).mean(dim=1))


class TimeFirst(nn.Module):
    """Linear layers on (time, n, in): the first axis is not the samples'."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(dim=0))


class Attention(nn.Module):
    """One transformer block over (n, time, width)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(x).mean(dim=1))


class Unused(nn.Module):
    """An auxiliary head that runs and is thrown away, a detached branch, an idle parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.auxiliary = nn.Linear(5, 3), nn.Linear(5, 2)
        self.detached, self.idle = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.auxiliary(x)
        return self.head(x) + self.detached(x).detach()


class Words(nn.Module):
    """Integer inputs: an embedding, averaged, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(x)).mean(dim=1))


class Squeezed(nn.Module):
    """Drops its output axis, as hand-written regressions do."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x).squeeze(-1)


def _mlp(inputs: int, width: int, outputs: int, activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), activation, nn.Linear(width, outputs))


def _batchnorm() -> nn.Module:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(5, 4), norm, nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model(torch.randn(50, 5))  # in training mode: gathers running statistics
    return model


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, kernel_size=3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 4, kernel_size=2, dilation=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def _odd_convolutions() -> nn.Module:
    """Groups, circular padding and padding by name: none goes layer by layer."""
    return nn.Sequential(
        nn.Conv2d(2, 4, kernel_size=3, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 2, kernel_size=3, padding=1, padding_mode="circular"),
        nn.Conv2d(2, 2, kernel_size=3, padding="same"),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


def _frozen() -> nn.Module:
    model = _mlp(5, 6, 3, nn.Tanh())
    model[0].weight.requires_grad_(False)
    return model


def _labels(n: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (n,))


# --- the cases ----------------------------------------------------------------------------------


def _ridge_form(x: Tensor, y: Tensor) -> dict[str, Any]:
    """Hat matrix H = X (X'X + n s2 lambda I0)^-1 X', intercept free; PRESS residual e/(1 - h)."""
    design = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)
    tied = torch.diag(torch.tensor([1.0] * x.shape[1] + [0.0]).double())
    hat = design @ torch.linalg.inv(design.T @ design + len(x) * 0.5 * 0.1 * tied) @ design.T
    return {"leverage": hat.diagonal(), "hat": hat, "rank": float(hat.diagonal().sum())}


CASES = (
    Case(
        "ridge",
        lambda: nn.Linear(4, 1),
        lambda: torch.randn(20, 4),
        lambda: torch.randn(20),
        family="gaussian",
        dispersion=0.5,
        penalty=constant(0.1, free=("bias",)),
        layers=("weight",),
        closed_form=_ridge_form,
    ),
    Case(
        "least_squares",
        lambda: nn.Linear(4, 1),
        lambda: torch.randn(25, 4),
        lambda: torch.randn(25),
        family="gaussian",
        penalty=constant(0.0),
        layers=("weight",),
        closed_form=lambda x, y: {"rank": 5.0},
    ),
    Case(
        "softmax_all_free",
        lambda: nn.Linear(4, 3),
        lambda: torch.randn(30, 4),
        lambda: _labels(30, 3),
        penalty=constant(0.0),
        layers=("weight",),
        # 15 parameters less the class shift, which softmax ignores, in each of 5 columns.
        closed_form=lambda x, y: {"rank": 10.0},
    ),
    Case(
        "collinear",
        lambda: nn.Linear(5, 3),
        lambda: (lambda z: torch.cat([z, z[:, :2]], dim=1))(torch.randn(30, 3)),
        lambda: _labels(30, 3),
        penalty=constant(0.0),
        closed_form=lambda x, y: {"rank": 8.0},
    ),
    Case(
        "softmax_free_bias",
        lambda: nn.Linear(4, 3),
        lambda: torch.randn(20, 4),
        lambda: _labels(20, 3),
        penalty=constant(0.02, free=("bias",)),
        layers=("weight",),
    ),
    Case(
        "softmax_free_weight",
        lambda: nn.Linear(4, 3),
        lambda: torch.randn(20, 4),
        lambda: _labels(20, 3),
        penalty=constant(0.02, free=("weight",)),
        layers=("weight",),
    ),
    Case(
        "logistic",
        lambda: nn.Linear(4, 1),
        lambda: torch.randn(20, 4),
        lambda: _labels(20, 2),
        family="bernoulli",
        layers=("weight",),
    ),
    Case(
        "poisson",
        lambda: nn.Linear(4, 1),
        lambda: torch.randn(20, 4),
        lambda: torch.randint(0, 5, (20,)),
        family="poisson",
        layers=("weight",),
    ),
    Case(
        "poisson_outputs",
        lambda: _mlp(4, 5, 2, nn.Tanh()),
        lambda: torch.randn(15, 4),
        lambda: torch.randint(0, 5, (15, 2)),
        family="poisson",
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "gaussian_outputs",
        lambda: _mlp(4, 5, 3, nn.Tanh()),
        lambda: torch.randn(15, 4),
        lambda: torch.randn(15, 3),
        family="gaussian",
        dispersion=0.3,
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "squeezed",
        Squeezed,
        lambda: torch.randn(15, 4),
        lambda: torch.randn(15),
        family="gaussian",
        layers=("line.weight",),
    ),
    Case(
        "mlp_tanh_wide",  # P = 98 > N = 24
        lambda: _mlp(5, 10, 3, nn.Tanh()),
        lambda: torch.randn(12, 5),
        lambda: _labels(12, 3),
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "mlp_relu_inplace",  # P = 39 < N = 48
        lambda: _mlp(5, 4, 3, nn.ReLU(inplace=True)),
        lambda: torch.randn(24, 5),
        lambda: _labels(24, 3),
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "mlp_elementwise",
        lambda: _mlp(5, 6, 3, nn.Tanh()),
        lambda: torch.randn(15, 5),
        lambda: _labels(15, 3),
        penalty=elementwise(1e-4, 1.0),
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "mlp_free_biases",
        lambda: _mlp(5, 6, 3, nn.Tanh()),
        lambda: torch.randn(30, 5),
        lambda: _labels(30, 3),
        penalty=constant(0.02, free=("bias",)),
        layers=("0.weight", "2.weight"),
    ),
    Case(
        "frozen_weight",
        _frozen,
        lambda: torch.randn(15, 5),
        lambda: _labels(15, 3),
        layers=("2.weight",),
    ),
    Case(
        "convolutions",
        _convolutions,
        lambda: torch.randn(10, 2, 8, 8),
        lambda: _labels(10, 3),
        layers=("0.weight", "2.weight", "5.weight"),
    ),
    Case(
        "convolutions_elementwise",
        _convolutions,
        lambda: torch.randn(10, 2, 8, 8),
        lambda: _labels(10, 3),
        penalty=elementwise(1e-3, 1.0),
        layers=("0.weight", "2.weight", "5.weight"),
    ),
    Case(
        "odd_convolutions",
        _odd_convolutions,
        lambda: torch.randn(10, 2, 6, 6),
        lambda: _labels(10, 3),
        layers=("6.weight",),
    ),
    Case("tied", Tied, lambda: torch.randn(12, 5), lambda: _labels(12, 3)),
    Case(
        "called_twice",
        Twice,
        lambda: torch.randn(12, 5),
        lambda: _labels(12, 3),
        layers=("head.weight",),
    ),
    Case("borrowed", Borrowed, lambda: torch.randn(12, 5), lambda: _labels(12, 3), layers=()),
    Case(
        "layernorm",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: torch.randn(12, 5),
        lambda: _labels(12, 3),
        penalty=constant(0.02, free=("1.weight", "1.bias")),
        layers=("0.weight", "1.weight", "3.weight"),
    ),
    Case(
        "layernorm_penalised",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)),
        lambda: torch.randn(12, 5),
        lambda: _labels(12, 3),
        layers=("0.weight", "1.weight", "3.weight"),
    ),
    Case(
        "batchnorm",
        _batchnorm,
        lambda: torch.randn(12, 5),
        lambda: _labels(12, 3),
        layers=("0.weight", "1.weight", "3.weight"),
    ),
    Case(
        "embedding",
        Words,
        lambda: torch.randint(0, 9, (12, 6)),
        lambda: _labels(12, 3),
        layers=("head.weight",),
    ),
    Case(
        "sequences",
        Sequences,
        lambda: torch.randn(12, 5, 3),
        lambda: _labels(12, 3),
        layers=("inner.weight", "head.weight"),
    ),
    # The time axis as long as any small probe batch might be.
    Case("time_first_2", TimeFirst, lambda: torch.randn(12, 2, 3), lambda: _labels(12, 3)),
    Case("time_first_3", TimeFirst, lambda: torch.randn(12, 3, 3), lambda: _labels(12, 3)),
    Case("time_first_12", TimeFirst, lambda: torch.randn(12, 12, 3), lambda: _labels(12, 3)),
    Case("attention", Attention, lambda: torch.randn(10, 3, 4), lambda: _labels(10, 3)),
    Case("gru", Recurrent, lambda: torch.randn(10, 4, 3), lambda: _labels(10, 3)),
    Case("data_dependent", DataDependent, lambda: torch.randn(12, 4), lambda: _labels(12, 3)),
    Case("unused", Unused, lambda: torch.randn(12, 5), lambda: _labels(12, 3)),
    *LAYER_CASES,
)
BY_NAME = {case.name: case for case in CASES}


# --- the fitted reference models ----------------------------------------------------------------

REFERENCES: tuple[dict[str, Any], ...] = tuple(
    json.loads((DATA / "reference.json").read_text(encoding="utf-8"))
)


@dataclass(frozen=True)
class Reference:
    """One fitted model with values computed independently in dense float64."""

    model: nn.Module
    x: Tensor
    y: Tensor
    values: Mapping[str, Any]


@cache
def _arrays(name: str) -> dict[str, Any]:
    with np.load(DATA / f"{name}.npz") as stored:
        return dict(stored)


def reference(values: Mapping[str, Any]) -> Reference:
    """The model and data of an entry of `REFERENCES`."""
    arrays = _arrays(values["name"])
    state = {k.removeprefix("param:"): torch.from_numpy(v) for k, v in arrays.items() if ":" in k}
    weights = [v for k, v in state.items() if k.endswith("weight")]
    layers: list[nn.Module] = []
    for weight in weights:
        layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.Tanh()]
    model = layers[0] if len(weights) == 1 else nn.Sequential(*layers[:-1])
    model.double().eval()
    model.load_state_dict(state)
    return Reference(model, torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"]), values)
