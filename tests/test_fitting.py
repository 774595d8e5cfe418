"""Penalty, dispersion and factorisation together: the fixed points that tie them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flataudit.curvature.problem import make_problem
from flataudit.errors import FlatauditError, InputError
from flataudit.families import Categorical, Gaussian
from flataudit.fitting import penalised_fit
from flataudit.solvers import SOLVERS
from flataudit.training import parse_training
from tests.cases import BY_NAME, build
from tests.dense import dense


def fit(problem, **options):
    given = {"penalty": 0.05, "record": None, "dispersion": 1.0, "solver": "auto"} | options
    return penalised_fit(problem, **given)


def rank_of(variance) -> float:
    return float(variance.q.diagonal(dim1=1, dim2=2).sum())


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", ["ridge", "gaussian_outputs"])
def test_dispersion_is_the_fixed_point(name, solver):
    """s2 = RSS/(n K - soft rank at s2), the soft rank by the dense definition."""
    case = BY_NAME[name]
    built = build(case)
    found = fit(built.problem, dispersion="auto", solver=solver, penalty=0.3)
    value = found.dispersion.value
    assert found.dispersion.source == "residuals"
    penalty = {k: torch.full_like(p.detach(), 0.3) for k, p in built.problem.params.items()}
    exact = dense(built.model, built.x, built.y, "gaussian", penalty, value)
    y = built.y.reshape(built.problem.outputs.shape).double()
    rss = float((built.problem.outputs - y).square().sum())
    freedom = y.numel() - float(exact.leverage.sum())
    assert value == pytest.approx(rss / freedom, rel=1e-7)
    assert rank_of(found.variance) == pytest.approx(float(exact.leverage.sum()), rel=1e-7)
    # The gradients are those at the settled dispersion.
    mean = torch.einsum("nkp,nk->p", exact.jacobian, exact.residual) / len(y)
    got = torch.cat([t.flatten() for t in found.moments.mean.values()])
    torch.testing.assert_close(got, mean, rtol=1e-6, atol=1e-8)
    assert found.moments.trace == pytest.approx(float(exact.covariance.diagonal().sum()), rel=1e-6)


def test_least_squares_dispersion_is_the_textbook_one():
    """RSS/(n - p)."""
    built = build(BY_NAME["least_squares"])
    found = fit(built.problem, penalty=0.0, dispersion="auto")
    rss = float((built.problem.outputs - built.problem.y).square().sum())
    assert found.dispersion.value == pytest.approx(rss / (25 - 5), rel=1e-9)


def test_given_dispersion_is_kept():
    built = build(BY_NAME["ridge"])
    found = fit(built.problem, dispersion=0.5)
    assert (found.dispersion.value, found.dispersion.source) == (0.5, "argument")
    assert fit(build(BY_NAME["logistic"]).problem).dispersion is None


def test_interpolating_regression_needs_a_dispersion():
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        y = model(x)
    problem = make_problem(model, x, y, Gaussian())
    with pytest.raises(InputError, match="interpolates") as caught:
        fit(problem, dispersion="auto")
    assert all(part in str(caught.value) for part in ("expected", "got", "--dispersion"))


@pytest.mark.parametrize(
    ("loss", "scale"),
    [("nll", 1.0), ("half_mse", 0.3), ("mse", 2 * 0.3 / 3), (None, 2 * 0.3 / 3)],
)
def test_loss_scale(loss, scale):
    """torch's MSELoss averages over n and K: mse = (2 s2/K) NLL + constant; D = w/c."""
    built = build(BY_NAME["gaussian_outputs"])
    record = {"optimizer": "converged", "weight_decay": 0.06}
    record |= {} if loss is None else {"loss": loss}
    found = fit(built.problem, penalty="auto", dispersion=0.3, record=parse_training(record))
    for d in found.penalty.values():
        torch.testing.assert_close(d, torch.full_like(d, 0.06 / scale))


def test_loss_scale_is_a_ratio_of_gradients():
    """c by torch's own losses: grad MSELoss = c grad mean NLL, at any weights."""
    built = build(BY_NAME["gaussian_outputs"])
    y = built.y.double()
    nll = torch.nn.GaussianNLLLoss(full=True, reduction="sum")
    f = built.model(built.x)
    mean_nll = nll(f, y, torch.full_like(f, 0.3)) / len(y)
    losses = {"mse": nn.functional.mse_loss(f, y), "nll": mean_nll}
    weight = built.model[0].weight
    grads = {
        name: torch.autograd.grad(loss, weight, retain_graph=True)[0]
        for name, loss in losses.items()
    }
    torch.testing.assert_close(grads["mse"], 2 * 0.3 / 3 * grads["nll"])


def test_squared_loss_belongs_to_gaussians():
    built = build(BY_NAME["logistic"])
    record = parse_training("optimizer=sgd,sum_lr=1,loss=mse")
    with pytest.raises(InputError, match="loss nll for the bernoulli family"):
        fit(built.problem, penalty="auto", record=record)


def test_penalty_given_is_taken_as_it_is():
    """A number beside a record: nothing of the record is added."""
    built = build(BY_NAME["mlp_tanh_wide"])
    record = parse_training("optimizer=sgd,sum_lr=1,weight_decay=0.5")
    found = fit(built.problem, penalty=0.01, record=record)
    assert found.penalty_info.source == "argument"
    assert found.penalty_info.value == 0.01
    assert found.penalty_info.training is None


def test_record_gives_the_penalty():
    built = build(BY_NAME["mlp_tanh_wide"])
    record = parse_training("optimizer=sgd,sum_lr=10,weight_decay=0.5")
    found = fit(built.problem, penalty="auto", record=record)
    assert found.penalty_info.source == "training"
    assert found.penalty_info.value == pytest.approx(0.6)
    assert found.penalty_info.training == record.to_dict()
    # Stationarity is that of the objective's own penalty: no training time in it.
    again = fit(built.problem, penalty=0.5)
    assert found.penalty_info.stationarity == pytest.approx(again.penalty_info.stationarity)
    assert found.remaining_gradient == pytest.approx(again.remaining_gradient)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", ["mlp_tanh_wide", "mlp_relu_inplace", "ridge"])
def test_evidence_fixed_point(name, solver):
    """n lambda |theta|^2 = soft rank at lambda, by the dense definition."""
    case = BY_NAME[name]
    built = build(case)
    found = fit(built.problem, penalty="auto", dispersion=case.dispersion, solver=solver)
    value = found.penalty_info.value
    assert found.penalty_info.source == "evidence"
    penalty = {k: torch.full_like(p.detach(), value) for k, p in built.problem.params.items()}
    exact = dense(built.model, built.x, built.y, case.family, penalty, case.dispersion)
    norm = sum(float(p.detach().square().sum()) for p in built.problem.params.values())
    rank = float(exact.leverage.sum())
    assert value * built.problem.n_samples * norm == pytest.approx(rank, rel=1e-5)


def test_evidence_without_a_spectrum(monkeypatch):
    """Above the eigenvalue limit: one solve per trial, to 2 % in lambda."""
    problem = build(BY_NAME["mlp_tanh_wide"]).problem
    exact = fit(problem, penalty="auto").penalty_info.value
    monkeypatch.setattr("flataudit.fitting.EIGENVALUE_LIMIT", 5)
    found = fit(problem, penalty="auto")
    assert found.penalty_info.value == pytest.approx(exact, rel=0.04)
    assert found.variance.ratios is None


def test_remaining_gradient_and_stationarity():
    built = build(BY_NAME["mlp_tanh_wide"])
    found = fit(built.problem, penalty=0.05)
    exact = dense(built.model, built.x, built.y, "categorical", dict(found.penalty))
    theta = torch.cat([p.detach().flatten() for p in built.problem.params.values()])
    mean = torch.einsum("nkp,nk->p", exact.jacobian, exact.residual) / 12
    left = float((mean + 0.05 * theta).norm())
    assert found.remaining_gradient == pytest.approx(left, rel=1e-10)
    assert found.penalty_info.stationarity == pytest.approx(left / float(mean.norm()), rel=1e-10)


class Kinked(nn.Module):
    """sqrt(z^2): finite at z = 0, where its derivative is not a number."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.sqrt(self.inner(x) ** 2))


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("penalty", [0.1, "auto"])
def test_derivatives_that_are_not_finite(solver, penalty):
    """One line that says so, and never a report of NaN."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
    x[3] = 0.0
    problem = make_problem(Kinked().double(), x, torch.arange(12) % 3, Categorical())
    with pytest.raises(FlatauditError, match=r"expected .* got .*;"):
        fit(problem, penalty=penalty, solver=solver)
