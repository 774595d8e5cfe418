"""Soft rank, TIC and leave-one-out: closed forms and true refits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from flataudit import estimates
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import Family, Gaussian, make_family
from flataudit.solvers import SOLVERS
from flataudit.solvers.base import FunctionalVariance
from tests.cases import BY_NAME, build

solvers = pytest.mark.parametrize("solver", sorted(SOLVERS))


def drawn(n: int, features: int, seed: int = 0) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, features, generator=generator, dtype=torch.float64), generator


def linear_problem(theta: Tensor, x: Tensor, y: Tensor, family: Family) -> Problem:
    """A linear model with weights theta (K, features), its last column the intercept."""
    model = nn.Linear(x.shape[1], len(theta)).double()
    with torch.no_grad():
        model.weight.copy_(theta[:, :-1])
        model.bias.copy_(theta[:, -1])
    return make_problem(model, x, family.check(y, len(theta)), family)


def penalty_of(problem: Problem, weight: float, bias: float) -> dict[str, Tensor]:
    return {
        "weight": torch.full_like(problem.params["weight"].detach(), weight),
        "bias": torch.full_like(problem.params["bias"].detach(), bias),
    }


def newton(
    x: Tensor, y: Tensor, family: str, weight: float, keep: Tensor, outputs: int = 1
) -> Tensor:
    """argmin of sum_{i kept} l_i + n/2 weight |w|^2, n the number of ALL samples: (K, features+1).

    Damped Newton with exact second derivatives of torch's own losses.
    """
    design = torch.cat([x, torch.ones(len(x), 1).double()], dim=1)[keep]
    target = y[keep]
    tied = torch.cat([torch.ones(x.shape[1]), torch.zeros(1)]).double()

    def objective(flat: Tensor) -> Tensor:
        theta = flat.view(outputs, -1)
        f = design @ theta.T
        if family == "bernoulli":
            loss = nn.functional.binary_cross_entropy_with_logits(
                f[:, 0], target.double(), reduction="sum"
            )
        elif family == "categorical":
            loss = nn.functional.cross_entropy(f, target, reduction="sum")
        elif family == "poisson":
            loss = (f[:, 0].exp() - target * f[:, 0]).sum()
        else:
            loss = (target.double() - f[:, 0]).square().sum() / 2
        return loss + len(x) * weight * (theta.square() * tied).sum() / 2

    theta = torch.zeros(outputs * design.shape[1], dtype=torch.float64)
    for _ in range(100):
        leaf = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
        hessian = torch.autograd.functional.hessian(objective, theta)
        step = torch.linalg.lstsq(hessian, -gradient).solution
        size = 1.0
        while float(objective(theta + size * step)) > float(objective(theta)) and size > 1e-6:
            size /= 2
        theta = theta + size * step
        if float(step.norm()) < 1e-11:
            break
    return theta.view(outputs, -1)


def leave_one_out(problem: Problem, penalty: dict[str, Tensor], solver: str):
    found = SOLVERS[solver].solve(problem, penalty)
    v = problem.factor.residual
    left_out = estimates.loo(found, v, problem.family, problem.outputs, problem.y)
    assert left_out is not None
    return left_out


# --- Gaussian: everything is exact --------------------------------------------------------------


@solvers
def test_press(solver):
    """Ridge: leave-one-out residuals are e_i/(1 - h_i), h the hat matrix's diagonal."""
    case = BY_NAME["ridge"]
    built = build(case)
    hat = case.closed_form(built.x, built.y)["hat"]
    y = built.problem.y
    design = torch.cat([built.x, torch.ones(len(built.x), 1).double()], dim=1)
    theta = torch.linalg.lstsq(design, hat @ y).solution
    problem = linear_problem(theta.T, built.x, y, Gaussian(case.dispersion))

    left_out = leave_one_out(problem, built.penalty, solver)

    press = (y - hat @ y) / (1 - hat.diagonal())[:, None]
    torch.testing.assert_close(y - left_out.outputs, press, rtol=1e-9, atol=1e-10)
    before = (y - hat @ y).square()
    torch.testing.assert_close(
        left_out.psi,
        ((press.square() - before) / (2 * case.dispersion))[:, 0],
        rtol=1e-8,
        atol=1e-10,
    )


@solvers
@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_gaussian_loo_equals_true_refits(weight, solver):
    """n D held fixed, leaving one out is exact for a quadratic loss: all 30 refits agree."""
    x, generator = drawn(30, 4)
    y = torch.randn(30, generator=generator, dtype=torch.float64)
    everyone = torch.arange(30)
    theta = newton(x, y, "gaussian", weight, everyone)
    problem = linear_problem(theta, x, y, Gaussian())

    left_out = leave_one_out(problem, penalty_of(problem, weight, 0.0), solver)

    for i in range(30):
        refit = newton(x, y, "gaussian", weight, everyone[everyone != i])
        wanted = x[i] @ refit[0, :-1] + refit[0, -1]
        assert left_out.outputs[i, 0].item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-10)


@solvers
def test_least_squares_soft_rank(solver):
    """Without a penalty the soft rank is the number of parameters, and gap = dof/n by Mallows."""
    built = build(BY_NAME["least_squares"])
    leverage = estimates.soft_rank(SOLVERS[solver].solve(built.problem, built.penalty))
    assert float(leverage.sum()) == pytest.approx(5.0, rel=1e-12)


@solvers
def test_soft_rank_falls_from_the_rank_to_zero(solver):
    """tr G (G + lambda)^-1 is the rank of G at lambda = 0 and tr(G)/lambda at large lambda."""
    problem = build(BY_NAME["mlp_tanh_wide"]).problem
    ranks = []
    for value in (1e-9, 1e-3, 1.0, 1e6):
        d = {name: torch.full_like(p.detach(), value) for name, p in problem.params.items()}
        found = SOLVERS[solver].solve(problem, d)
        ranks.append(float(estimates.soft_rank(found).sum()))
        trace = found.trace_ggn
    assert ranks[0] == pytest.approx(problem.n_rows, rel=1e-4)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == pytest.approx(trace / 1e6, rel=1e-4)


# --- one Gauss-Newton step for the others -------------------------------------------------------


@solvers
@pytest.mark.parametrize(
    ("family", "outputs"), [("bernoulli", 1), ("categorical", 3), ("poisson", 1)]
)
def test_loo_is_close_to_true_refits(family, outputs, solver):
    """Sixty refits of a linear model: the mean rise of the loss within 3 %, each sample's output
    within 10 % of the largest shift."""
    n, weight = 60, 0.05
    x, generator = drawn(n, 4, seed=1)
    y = {
        "bernoulli": (torch.rand(n, generator=generator) < torch.sigmoid(2 * x[:, 0])).long(),
        "categorical": (x[:, :3] + torch.randn(n, 3, generator=generator).double()).argmax(dim=1),
        "poisson": torch.poisson(torch.exp(x[:, 0] / 2), generator=generator),
    }[family]
    everyone = torch.arange(n)
    theta = newton(x, y, family, weight, everyone, outputs)
    likelihood = make_family(family, y, outputs)
    problem = linear_problem(theta, x, y, likelihood)

    left_out = leave_one_out(problem, penalty_of(problem, weight, 0.0), solver)

    refits = torch.stack(
        [newton(x, y, family, weight, everyone[everyone != i], outputs) for i in range(n)]
    )
    f = torch.einsum("nkf,nf->nk", refits[:, :, :-1], x) + refits[:, :, -1]
    rise = likelihood.nll(f, problem.y) - likelihood.nll(problem.outputs, problem.y)
    assert float(left_out.psi.mean()) == pytest.approx(float(rise.mean()), rel=0.03)
    shifts = [a - problem.outputs for a in (left_out.outputs, f)]
    if family == "categorical":
        shifts = [s - s.mean(dim=1, keepdim=True) for s in shifts]
    largest = float(shifts[1].abs().max())
    assert float((shifts[0] - shifts[1]).abs().max()) < 0.1 * largest
    # A step that does nothing, or goes the other way, would fail both.
    assert float(rise.mean()) > 0.01


def test_loo_gap_is_tic_to_first_order():
    """As A_i shrinks the leave-one-out gap approaches the TIC gap."""
    problem = build(BY_NAME["mlp_tanh_wide"]).problem
    ratios = []
    for value in (1.0, 100.0):
        d = {name: torch.full_like(p.detach(), value) for name, p in problem.params.items()}
        found = SOLVERS["dual"].solve(problem, d)
        v = problem.factor.residual
        left_out = estimates.loo(found, v, problem.family, problem.outputs, problem.y)
        ratios.append(float(left_out.psi.mean() / estimates.tic(found, v).mean()))
    assert abs(ratios[1] - 1) < 1e-2
    assert abs(ratios[1] - 1) < abs(ratios[0] - 1)


# --- the functions by themselves ----------------------------------------------------------------


def test_short_functions_of_q():
    """h = tr Q, TIC = v'Qv and b = (I - Q)^-1 v - v, on a hand-made Q."""
    q = torch.tensor([[[0.5, 0.1], [0.1, 0.2]], [[0.0, 0.0], [0.0, 0.9]]], dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64)
    variance = FunctionalVariance(q, eye - q, mean_gradient=0.3, trace_ggn=1.0)
    v = torch.tensor([[1.0, 2.0], [3.0, 0.5]], dtype=torch.float64)
    assert estimates.soft_rank(variance).tolist() == pytest.approx([0.7, 0.9])
    assert estimates.tic(variance, v).tolist() == pytest.approx([0.5 + 0.4 + 0.8, 0.225])
    assert estimates.centred_tic(variance, v) == pytest.approx((1.7 + 0.225) / 2 - 0.3 / 2)
    family, y = Gaussian(), torch.zeros(2, 2, dtype=torch.float64)
    left_out = estimates.loo(variance, v, family, v, y)
    b = torch.linalg.inv(eye - q) @ v[:, :, None] - v[:, :, None]
    torch.testing.assert_close(left_out.outputs, v + b[:, :, 0])
    torch.testing.assert_close(
        left_out.psi, (left_out.outputs.square() - v.square()).sum(dim=1) / 2
    )


@pytest.mark.parametrize("last", [1.0, math.nan])
def test_loo_does_not_exist_at_leverage_one(last):
    """A sample that determines its own prediction, or a broken number, has no leave-one-out."""
    q = torch.tensor([[[0.5]], [[last]]], dtype=torch.float64)
    variance = FunctionalVariance(q, 1.0 - q, mean_gradient=0.0, trace_ggn=1.0)
    v, y = torch.ones(2, 1, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
    assert estimates.loo(variance, v, Gaussian(), v, y) is None


def measured(psi, **errors):
    values = torch.tensor(psi, dtype=torch.float64)
    return estimates.Measured(float(values.mean()), values, **errors)


def test_the_blend_is_the_geometric_mean_and_its_contributions_average_to_it():
    first, second = measured([0.1, 0.3, 0.2]), measured([0.9, 1.2, 0.3])
    found = estimates.blend(first, second)
    assert found.gap == pytest.approx(math.sqrt(0.2 * 0.8), rel=1e-12)
    assert float(found.psi.mean()) == pytest.approx(found.gap, rel=1e-12)
    assert (found.monte_carlo_se, found.truncation) == (None, None)
    nudged = estimates.blend(measured([0.1, 0.3, 0.2 + 3e-6]), second)
    slope = (nudged.gap - found.gap) / 3e-6  # d gap / d psi_i = b/(2 a_1 n)
    assert slope == pytest.approx(found.gap / (2 * 0.2 * 3), rel=1e-4)
    assert estimates.blend(first, first).psi.tolist() == pytest.approx(first.psi.tolist())


def test_the_blend_carries_the_errors_of_both_parts():
    parts = [measured([g], monte_carlo_se=0.1 * g, truncation=0.01 * g, noise=g * g)
             for g in (0.2, 0.8)]  # fmt: skip
    found = estimates.blend(*parts)
    assert found.monte_carlo_se == pytest.approx(0.1 * found.gap)
    assert found.truncation == pytest.approx(0.01 * found.gap)
    assert found.noise == pytest.approx(found.gap**2 / 2)


@pytest.mark.parametrize("nothing", [0.0, -1e-18])
def test_the_blend_with_nothing_is_nothing(nothing):
    found = estimates.blend(measured([0.2, 0.4]), measured([nothing, nothing]))
    assert found.gap == 0.0
    assert found.psi.tolist() == [0.0, 0.0]


def test_mean_and_se():
    values = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    mean, se = estimates.mean_and_se(values)
    assert mean == 3.0
    assert se == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
