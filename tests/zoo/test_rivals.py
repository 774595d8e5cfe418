"""The rivals against dense definitions; those of other libraries only where they are installed."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.zoo import rivals as r
from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.draw import draw
from benchmarks.zoo.fit import fit
from benchmarks.zoo.grid import Cell
from flataudit.curvature.problem import make_problem
from flataudit.estimates import loo
from flataudit.families import Categorical, Gaussian
from flataudit.fitting import penalised_fit

RIDGE = Cell("r", "diabetes", "glm", 60, 1e-1)
LOGISTIC = Cell("r", "breast-cancer", "glm", 80, 1e-1)
NET = Cell("r", "digits", "mlp", 60, 1e-2, width=12, depth=1, activation="relu", pooling=2,
           optimizer="adam", lr=2e-3, epochs=10)  # fmt: skip


def fitted(network, x, y, family, penalty=0.1):
    problem = make_problem(network, x, y, family)
    return penalised_fit(problem, penalty=penalty, record=None, dispersion=1.0, solver="auto")


def test_memory_perturbation_of_least_squares_by_hand():
    # l = r^2/2 and f moves by a r: the residual becomes r (1 + a).
    torch.manual_seed(0)
    network = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    found = fitted(network, x, y, Gaussian(1.0))
    value, se = r.rise_without(found.problem, found.variance)
    a = (
        torch.einsum(
            "ni,ij,nj->n", x, torch.linalg.inv(x.T @ x / 30 + 0.1 * torch.eye(3, dtype=x.dtype)), x
        )
        / 30
    )
    e = (network(x) - y).detach()[:, 0]
    rise = e.square() * ((1 + a).square() - 1) / 2
    assert value == pytest.approx(float(rise.mean()), rel=1e-10)
    own = (e.square() + math.log(2 * math.pi)) / 2
    assert se == pytest.approx(float((own + rise).std(correction=1)) / math.sqrt(30), rel=1e-10)


def test_memory_perturbation_of_classes_by_hand():
    torch.manual_seed(0)
    network = nn.Linear(2, 3).double()
    x, y = torch.randn(20, 2, dtype=torch.float64), torch.randint(0, 3, (20,))
    found = fitted(network, x, y, Categorical())
    value, _ = r.rise_without(found.problem, found.variance)
    jacobian = torch.func.jacrev(
        lambda p: torch.func.functional_call(network, p, (x,))
    )(dict(network.named_parameters()))  # fmt: skip
    j = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).detach()  # (n, 3, P)
    f = network(x).detach()
    p = f.softmax(dim=1)
    variance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ggn = torch.einsum("nip,nij,njq->pq", j, variance, j) / 20
    a = j @ torch.linalg.inv(ggn + 0.1 * torch.eye(len(ggn), dtype=x.dtype)) @ j.mT / 20
    residual = p - nn.functional.one_hot(y, 3)
    moved = f + (a @ residual[:, :, None])[:, :, 0]
    rise = nn.functional.cross_entropy(moved, y) - nn.functional.cross_entropy(f, y)
    assert value == pytest.approx(float(rise), rel=1e-8)


def test_kfac_is_exact_for_one_output_of_a_linear_layer():
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    network = nn.Linear(3, 1, bias=False).double()
    x, y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    found = fitted(network, x, y, Gaussian(1.0))
    exact, _ = r.rise_without(found.problem, found.variance)
    assert r.memory_perturbation(found, network)[0] == pytest.approx(exact, rel=1e-6)
    assert all(p.requires_grad for p in network.parameters())


def test_layers_that_kfac_does_not_know_are_left_out():
    pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    normed = nn.Sequential(plain[0], nn.LayerNorm(5), nn.Tanh(), plain[2]).double()
    x, y = torch.randn(40, 4, dtype=torch.float64), torch.randint(0, 3, (40,))
    value, _ = r.memory_perturbation(fitted(normed, x, y, Categorical()), normed)
    assert value > 0
    assert all(p.requires_grad for p in normed.parameters())
    alone = nn.LayerNorm(4).double()
    with pytest.raises(r.Undefined, match="no Linear or Conv2d"):
        r.memory_perturbation(fitted(alone, x, y, Categorical()), alone)


def test_one_penalty_per_tensor_is_the_geometric_mean():
    d = r.one_value(torch.tensor([[1.0, 4.0], [0.0, 0.0]], dtype=torch.float64))
    assert d.shape == (2, 2)
    assert torch.allclose(d, torch.full_like(d, 2.0))
    assert not r.one_value(torch.zeros(3)).any()


@pytest.mark.parametrize("cell", [RIDGE, LOGISTIC], ids=["ridge", "logistic"])
def test_the_jacobian_is_what_refits_say(cell):
    # dz/dy by differences, the optimum found by Newton's method on the same loss.
    drawn = draw(cell)
    model = fit(cell, drawn).model
    loss, z, y = r.scalar_loss(model, drawn)
    x = r.flat(drawn.train.x)
    found = r.scalar_jacobian(loss, z, y, x, cell.weight_decay)
    rows = torch.as_tensor(np.column_stack([x, np.ones(len(x))]))
    penalty = torch.full((rows.shape[1],), len(x) * cell.weight_decay, dtype=torch.float64)
    penalty[-1] = 0.0

    def refit(targets):
        w = torch.linalg.lstsq(rows, z[:, None]).solution[:, 0]
        for _ in range(30):
            at = (rows @ w).requires_grad_(True)
            (slope,) = torch.autograd.grad(loss(targets, at), at, create_graph=True)
            (twice,) = torch.autograd.grad(slope.sum(), at)
            matrix = rows.T @ (twice[:, None] * rows) + torch.diag(penalty)
            w = w - torch.linalg.solve(matrix, rows.T @ slope.detach() + penalty * w)
        return rows @ w

    assert torch.allclose(refit(y), z, atol=1e-3)  # scikit-learn's own optimum
    step = 1e-5
    for i in (0, 7):
        bump = torch.zeros_like(y)
        bump[i] = step
        column = (refit(y + bump) - refit(y - bump)) / (2 * step)
        assert torch.allclose(found[:, i], column, atol=1e-4)


@pytest.mark.parametrize("cell", [RIDGE, LOGISTIC], ids=["ridge", "logistic"])
def test_randalo_is_near_leave_one_out(cell):
    pytest.importorskip("randalo")
    drawn = draw(cell)
    model = fit(cell, drawn).model
    found, _ = penalised(cell, model, None, drawn)
    value, _ = r.randalo(cell, model, drawn, found.problem.family)
    p = found.problem
    exact = loo(found.variance, p.factor.residual, p.family, p.outputs, p.y)
    assert exact is not None
    assert value == pytest.approx(float(exact.psi.mean()), rel=0.15)
    again, _ = r.randalo(cell, model, drawn, found.problem.family)
    assert again == value  # the probes are drawn from a seed


def test_what_does_not_exist_says_why():
    drawn = draw(RIDGE)
    model = fit(RIDGE, drawn).model
    row = r.rivals(RIDGE, model, None, drawn)
    assert row["alpha_error"] == "defined for networks"
    assert row["mpe"] > 0
    drawn = draw(NET)
    trained = fit(NET, drawn)
    row = r.rivals(NET, trained.model, trained.record, drawn)
    assert row["randalo_error"] == "defined for linear models"


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "randalo", None)
    monkeypatch.setitem(sys.modules, "weightwatcher", None)
    drawn = draw(RIDGE)
    row = r.rivals(RIDGE, fit(RIDGE, drawn).model, None, drawn)
    assert "randalo is not installed" in row["randalo_error"]
    drawn = draw(NET)
    trained = fit(NET, drawn)
    row = r.rivals(NET, trained.model, trained.record, drawn)
    assert "pip install '.[zoo]'" in row["alpha_error"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_alpha_is_the_mean_over_layers():
    watcher = pytest.importorskip("weightwatcher")
    drawn = draw(NET)
    trained = fit(NET, drawn)
    value, _ = r.alpha(NET, trained.model)
    details = watcher.WeightWatcher(model=trained.model).analyze()
    assert value == pytest.approx(float(details["alpha"].mean()))


def test_what_is_not_finite_is_no_value():
    assert r.attempt("x", lambda: (math.inf, None)) == {
        "x_error": "expected a finite value, got inf"
    }
    assert r.attempt("x", lambda: (1.0, 0.5)) == {"x": 1.0, "x_se": 0.5}
