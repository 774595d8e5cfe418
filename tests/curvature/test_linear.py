"""One Linear layer: products without the rows of B, and only where the model is one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flataudit.curvature import linear as module
from flataudit.curvature.linear import LinearModel, is_linear_layer, linear_model
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import Bernoulli, Categorical, Gaussian
from tests.cases import CASES, build

LINEAR = [c for c in CASES if is_linear_layer(build(c).problem)]


def rows_of(problem: Problem) -> torch.Tensor:
    return problem.rows(slice(0, problem.n_samples)).flatten(0, 1)


def product(model: LinearModel, t: torch.Tensor) -> torch.Tensor:
    """B T (N, q) from its tiles, each of which comes once."""
    problem = model.problem
    whole = torch.full((problem.n_samples, problem.n_columns, t.shape[1]), torch.nan).double()
    for at, columns, z in model.times(t):
        assert bool(whole[at, :, columns].isnan().all())
        whole[at, :, columns] = z
    return whole.flatten(0, 1)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-13 * float(wanted.abs().max()))


def test_the_cases_hold_linear_models_of_every_family():
    assert {c.family for c in LINEAR} >= {"categorical", "gaussian", "bernoulli"}
    assert len(LINEAR) < len(CASES) / 2


@pytest.mark.parametrize("case", LINEAR, ids=lambda case: case.name)
def test_products_are_those_of_the_rows(case):
    problem = build(case).problem
    rows = rows_of(problem)
    model = linear_model(problem)
    assert model is not None
    close(model.ggn(), rows.T @ rows)
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(problem.n_params, 7, generator=generator, dtype=torch.float64)
    # An output none of whose weights counts, but whose bias does.
    t[model.weight : model.weight + model.inputs.shape[1]] = 0.0
    close(product(model, t), rows @ t)


def test_panels_and_chunks_make_one_product(monkeypatch):
    """A triangular T, cut into panels of which some leave an output's weights out."""
    monkeypatch.setattr(module, "PANEL", 4)
    torch.manual_seed(0)
    x = torch.randn(9, 4, dtype=torch.float64)
    problem = make_problem(
        nn.Linear(4, 3).double(), x, torch.arange(9) % 3, Categorical(), chunk_size=4
    )
    model = linear_model(problem)
    assert model is not None
    t = torch.randn(15, 14, dtype=torch.float64).triu()
    assert len(list(model.times(t))) == 4 * 3
    close(product(model, t), rows_of(problem) @ t)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", ["weight first", "bias first"])
def test_columns_follow_the_order_of_the_parameters(bias, order):
    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 3, bias=bias)
            if bias and order == "bias first":
                first = self.inner.bias
                weight = self.inner.weight
                del self.inner.bias, self.inner.weight
                self.inner.register_parameter("bias", first)
                self.inner.register_parameter("weight", weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.inner(x.flatten(1))
            return out

    torch.manual_seed(0)
    x = torch.randn(9, 2, 2, dtype=torch.float64)
    problem = make_problem(Probe().double(), x, torch.arange(9) % 3, Categorical(), chunk_size=4)
    model = linear_model(problem)
    assert model is not None
    rows = rows_of(problem)
    close(model.ggn(), rows.T @ rows)
    eye = torch.eye(problem.n_params, dtype=torch.float64)
    close(product(model, eye), rows)


def frozen() -> nn.Module:
    """A linear probe: the torso's parameters are not trained."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for p in model[0].parameters():
        p.requires_grad_(False)
    return model


class Scaled(nn.Module):
    """The layer's output is not the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * (1.0 + x[:, :1] ** 2)
        return out


class Late(Scaled):
    """Looks like one Linear layer on samples of small norm alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) * (1.0 + (x[:, :1] > 3.0))
        return out


@pytest.mark.parametrize(
    ("build_model", "linear"),
    [
        (lambda: nn.Linear(4, 3), True),
        (frozen, True),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Identity()), True),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(1)), True),  # S_i sums to 0
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()), False),
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), False),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), False),
        (Scaled, False),
    ],
)
def test_which_models_are_one_linear_layer(build_model, linear):
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.float64)
    problem = make_problem(build_model().double().eval(), x, torch.arange(8) % 3, Categorical())
    assert is_linear_layer(problem) is linear
    assert (linear_model(problem) is not None) is linear


def test_every_sample_is_looked_at():
    """Three samples decide what is planned; all of them what is done."""
    x = torch.zeros(9, 4, dtype=torch.float64)
    x[:, 1] = torch.arange(9.0)
    x[2, 0] = 5.0
    problem = make_problem(Late().double(), x, torch.arange(9) % 3, Categorical())
    assert is_linear_layer(problem)
    assert linear_model(problem) is None


@pytest.mark.parametrize("family", [Gaussian(dispersion=0.5), Bernoulli()])
def test_one_output(family):
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.float64)
    y = (torch.arange(8) % 2).double()[:, None]
    problem = make_problem(nn.Linear(4, 1).double(), x, y, family)
    model = linear_model(problem)
    assert model is not None
    close(model.ggn(), rows_of(problem).T @ rows_of(problem))
