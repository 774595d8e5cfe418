"""The baselines against dense definitions and hand-computed values."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.zoo import baselines as b
from benchmarks.zoo.draw import draw
from benchmarks.zoo.fit import fit
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import measure
from flataudit.curvature.problem import make_problem
from flataudit.families import Categorical, Gaussian
from flataudit.fitting import penalised_fit

RADIUS = b.SAM_RADIUS


@pytest.fixture
def loss():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 3, (20,))
    return b.Loss(network, x, y, Categorical())


def test_hessian_trace_and_top_eigenvalue(loss):
    theta = loss.at()
    dense = torch.autograd.functional.hessian(loss, theta)
    values = torch.linalg.eigvalsh(dense)
    trace, se = b.hutchinson(loss, theta, probes=400)
    assert abs(trace - float(values.sum())) < 4 * se
    assert se < 0.1 * float(values.sum())
    assert b.top_eigenvalue(loss, theta) == pytest.approx(float(values[-1]), rel=1e-4)


def test_sharpness_of_a_quadratic():
    # Least squares through the origin, x = 1, y = 0: L = theta^2/2 + constant.
    network = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(network.weight, 2.0)
    x, y = torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1, dtype=torch.float64)
    loss = b.Loss(network, x, y, Gaussian(1.0))
    assert b.sharpness(loss, loss.at()) == pytest.approx(((2 + RADIUS) ** 2 - 4) / 2, rel=1e-12)
    nn.init.constant_(network.weight, 0.0)
    assert b.sharpness(loss, loss.at()) == 0.0  # at the minimum there is no direction


def test_path_norm_by_hand():
    network = nn.Sequential(nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, -2.0]]))
        network[0].bias.copy_(torch.tensor([3.0]))
        network[2].weight.copy_(torch.tensor([[2.0], [0.0]]))
        network[2].bias.copy_(torch.tensor([1.0, -1.0]))
    # Squared weights: hidden 1 + 4 + 9 = 14; outputs 4 * 14 + 1 and 1.
    example = torch.full((1, 2), 7.0, dtype=torch.float64)
    assert b.path_norm(network, example) == pytest.approx(math.sqrt(58))
    assert network[0].weight[0, 1] == -2.0  # the network itself is left alone
    assert b.path_norm(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).double(), example) is None


def test_waic_of_a_gaussian():
    # l = (r + e)^2/2 with e ~ N(0, A): variance r^2 A + A^2/2.
    torch.manual_seed(1)
    network = nn.Linear(2, 1).double()
    x, y = torch.randn(30, 2, dtype=torch.float64), torch.randn(30, 1, dtype=torch.float64)
    problem = make_problem(network, x, y, Gaussian(1.0))
    fitted = penalised_fit(problem, penalty=0.1, record=None, dispersion=1.0, solver="auto")
    value, _ = b.waic(fitted.problem, fitted.variance, draws=20_000)
    a, r = fitted.variance.q[:, 0, 0], problem.family.residual(problem.outputs, y)[:, 0]
    assert value == pytest.approx(float((r.square() * a + a.square() / 2).mean()), rel=0.02)


def test_cross_validation_of_a_ridge_regression_is_that_of_explicit_refits():
    cell = Cell("b", "diabetes", "glm", 50, 1e-1)
    drawn = draw(cell)
    model, likelihood = fit(cell, drawn).model, Gaussian(0.5)
    found = b.cross_validation(cell, drawn, model, likelihood)
    order = np.random.default_rng(cell.draw_seed).permutation(50)
    x, y = drawn.train.x.astype(float), drawn.train.y
    left = np.empty(50)
    for fold in np.split(order, 5):
        rest = np.setdiff1d(np.arange(50), fold)
        mean, centre = x[rest].mean(axis=0), y[rest].mean()
        z = x[rest] - mean
        w = np.linalg.solve(z.T @ z + 40 * 0.1 * np.eye(10), z.T @ (y[rest] - centre))
        left[fold] = (y[fold] - (x[fold] - mean) @ w - centre) ** 2
    own = (y - model.predict(x)) ** 2
    assert found["cv_gap"] == pytest.approx((left.mean() - own.mean()) / (2 * 0.5), rel=1e-6)


def test_cross_validation_is_left_out_where_it_costs_too_much():
    cell = Cell("b", "digits", "mlp", 100, 0.1, optimizer="sgd", epochs=b.CV_STEPS)
    assert b.cross_validation(cell, draw(cell), None, Categorical()) == {}


def test_a_linear_models_row_by_hand():
    # Without a held-out set or classes: the truth is the mean loss on the test pool.
    cell = Cell("b", "diabetes", "glm", 60, 1e-1)
    drawn = draw(cell)
    model = fit(cell, drawn).model
    row = measure(cell, model, None, drawn)
    s2 = row["dispersion"]
    own = (drawn.train.y - model.predict(drawn.train.x.astype(float))) ** 2
    unseen = (drawn.test.y - model.predict(drawn.test.x.astype(float))) ** 2
    assert row["gap"] == pytest.approx((unseen.mean() - own.mean()) / (2 * s2), rel=1e-6)
    assert row["gap_se"] == pytest.approx(
        unseen.std(ddof=1) / (2 * s2 * math.sqrt(len(unseen))), rel=1e-6
    )
    seen = drawn.heldout
    held = (seen.y - model.predict(seen.x.astype(float))) ** 2
    assert row["held_gap"] == pytest.approx((held.mean() - own.mean()) / (2 * s2), rel=1e-6)
    assert row["n_params"] == 11
    assert row["record_loo"] > 0
    assert row["evidence_error"] is None


def test_a_networks_row_by_dense_definitions():
    cell = Cell("b", "digits", "mlp", 50, 1e-2, width=3, depth=1, activation="tanh", pooling=2,
                optimizer="sgd", lr=0.05, epochs=20)  # fmt: skip
    drawn = draw(cell)
    trained = fit(cell, drawn)
    row = b.baselines(cell, trained.model, trained.record, drawn)
    network = trained.model.double()
    x, y = torch.as_tensor(drawn.train.x).double(), torch.as_tensor(drawn.train.y)
    values = dict(network.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(network, p, (x,)))(values)
    j = torch.cat([part.flatten(2) for part in jacobian.values()], dim=2).detach()  # (n, K, P)
    p = network(x).softmax(dim=1).detach()
    variance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    trace = torch.einsum("nip,nij,njp->", j, variance, j) / len(x)
    gradients = torch.einsum("nip,ni->np", j, p - nn.functional.one_hot(y, 10))
    assert row["trace_ratio"] == pytest.approx(
        float(gradients.square().sum() / len(x) / trace), rel=1e-6
    )
    theta = torch.cat([v.detach().reshape(-1) for v in values.values()])
    assert row["parameter_norm"] == pytest.approx(float(theta @ theta), rel=1e-6)
    assert row["aic"] == len(theta) / 50
    loss = b.Loss(network, x, y, Categorical())
    hessian = torch.autograd.functional.hessian(loss, loss.at())
    assert abs(row["hessian_trace"] - float(hessian.trace())) < 5 * row["hessian_trace_se"]
    assert row["hessian_top"] == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-3)
    mean = gradients.mean(dim=0)
    moved = float(loss(loss.at() + RADIUS * mean / mean.norm()) - loss(loss.at()))
    assert row["sam"] == pytest.approx(moved, rel=1e-6)
    assert 0 < row["waic"] < 1
    assert row["cv_gap"] > 0
