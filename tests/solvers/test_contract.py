"""Every exact solver on every case, against the dense float64 definition of `tests.dense`."""

from __future__ import annotations

import pytest
import torch

from flataudit import estimates
from flataudit.curvature.problem import make_problem
from flataudit.families import Gaussian
from flataudit.solvers import SOLVERS
from tests.cases import BY_NAME, CASES, build
from tests.dense import dense

# Largest error relative to the largest value of each array. The quantities are sums of at most a
# few hundred products, so 1e-10 leaves six digits for conditioning; exceptions state their reason.
DEFAULT = 1e-10
TOLERANCE = {
    # eigenvalue cut-offs of a singular G + D, in the oracle's pseudo-inverse as much as here
    "softmax_all_free": 1e-9,
    "collinear": 1e-9,
}


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    assert got.shape == wanted.shape
    assert got.dtype == torch.float64
    return float((got - wanted).abs().max()) <= tolerance * float(wanted.abs().max())


def centred(outputs: torch.Tensor, family: str) -> torch.Tensor:
    """Outputs up to the constant that softmax ignores."""
    return outputs - outputs.mean(dim=1, keepdim=True) if family == "categorical" else outputs


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_solver_equals_definition(case, solver):
    built = build(case)
    problem = built.problem
    exact = dense(built.model, built.x, built.y, case.family, built.penalty, case.dispersion)
    tolerance = TOLERANCE.get(case.name, DEFAULT)

    found = SOLVERS[solver].solve(problem, built.penalty)

    v = problem.factor.residual
    left_out = estimates.loo(found, v, problem.family, problem.outputs, problem.y)
    assert left_out is not None
    assert close(problem.outputs, exact.outputs, 1e-12)
    assert close(estimates.soft_rank(found), exact.leverage, tolerance)
    assert close(estimates.tic(found, v), exact.tic, tolerance)
    assert close(left_out.psi, exact.loo, tolerance)
    assert close(
        centred(left_out.outputs, case.family), centred(exact.loo_outputs, case.family), tolerance
    )
    assert found.trace_ggn == pytest.approx(exact.trace_ggn, rel=tolerance)
    assert estimates.centred_tic(found, v) == pytest.approx(exact.centred_tic, rel=tolerance)
    eye = torch.eye(problem.n_columns, dtype=torch.float64)
    assert close(found.complement, eye - found.q, tolerance)


def test_cases_have_both_shapes():
    """Some cases have more parameters than rows, some fewer, so that both solvers meet both."""
    problems = [build(case).problem for case in CASES]
    assert sum(p.n_params > p.n_rows for p in problems) >= 5
    assert sum(p.n_params < p.n_rows for p in problems) >= 5


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("case", [c for c in CASES if c.closed_form], ids=lambda case: case.name)
def test_closed_form(case, solver):
    built = build(case)
    known = case.closed_form(built.x, built.y)
    leverage = estimates.soft_rank(SOLVERS[solver].solve(built.problem, built.penalty))
    assert float(leverage.sum()) == pytest.approx(known["rank"], rel=1e-10)
    if "leverage" in known:
        torch.testing.assert_close(leverage, known["leverage"], rtol=1e-10, atol=0)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("name", ["ridge", "mlp_tanh_wide", "mlp_elementwise", "layernorm"])
def test_spectrum(name, solver):
    """ratios: the nonzero eigenvalues of D^-1/2 G D^-1/2 over the penalised parameters."""
    case = BY_NAME[name]
    built = build(case)
    exact = dense(built.model, built.x, built.y, case.family, built.penalty, case.dispersion)
    d = torch.cat([built.penalty[name].flatten() for name in built.problem.params])
    tied = d > 0
    scaled = exact.ggn[tied][:, tied] * d[tied].rsqrt() * d[tied, None].rsqrt()
    wanted = torch.linalg.eigvalsh(scaled).flip(0)[: built.problem.n_rows]

    ratios = SOLVERS[solver].solve(built.problem, built.penalty, spectrum=True).ratios

    assert ratios is not None
    assert bool((ratios >= 0).all())
    common = min(len(ratios), len(wanted))
    assert common == min(built.problem.n_rows, int(tied.sum()))
    torch.testing.assert_close(
        ratios[:common], wanted[:common].clamp_min(0), rtol=1e-10, atol=1e-11 * float(wanted[0])
    )
    assert SOLVERS[solver].solve(built.problem, built.penalty).ratios is None


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_free_features_of_any_scale(scale, solver):
    """Least squares does not care about units: the soft rank stays the number of parameters."""
    case = BY_NAME["least_squares"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model, x, y = case.model().double(), case.x().double(), case.y()
    x = x * torch.tensor([1.0, scale, 1.0 / scale, 1.0], dtype=torch.float64)
    problem = make_problem(model, x, Gaussian().check(y, 1), Gaussian())
    penalty = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    leverage = estimates.soft_rank(SOLVERS[solver].solve(problem, penalty))
    design = torch.cat([x / x.norm(dim=0), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    hat = torch.linalg.qr(design).Q.square().sum(dim=1)
    torch.testing.assert_close(leverage, hat, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_dead_free_feature(solver):
    """A free column of zeros is a null direction: it adds nothing and breaks nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        x, y = torch.randn(20, 3).double(), torch.randn(20)
        model = torch.nn.Linear(3, 1).double()
    x[:, 1] = 0.0
    problem = make_problem(model, x, Gaussian().check(y, 1), Gaussian())
    penalty = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    leverage = estimates.soft_rank(SOLVERS[solver].solve(problem, penalty))
    assert float(leverage.sum()) == pytest.approx(3.0, rel=1e-12)
