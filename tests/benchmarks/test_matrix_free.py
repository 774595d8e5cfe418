"""The matrix in place of the network: what the runs of the benchmark take the solvers through."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.matrix_free import DenseOperator
from flataudit import estimates
from flataudit.solvers import MATRIX_FREE, SOLVERS, Work
from flataudit.solvers.lanczos import _Run as LanczosRun
from flataudit.solvers.sampling import _Run as SamplingRun
from tests.case import Case, constant
from tests.cases import build

PENALTY = 1e-3
SMALL = Case(  # N = 180, P = 384
    "small",
    lambda: torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10)),
    lambda: torch.randn(20, 20),
    lambda: torch.randint(0, 10, (20,)),
    penalty=constant(PENALTY),
)


@pytest.mark.parametrize("settings", [{}, {"first": 3, "further": 4, "max_basis": 40}])
def test_lanczos_is_the_same_to_rounding(settings):
    built = build(SMALL)
    solver = replace(MATRIX_FREE["lanczos"], **settings)
    operator = DenseOperator.of(built.problem, PENALTY, rooted=False)
    run = LanczosRun(solver, built.problem, operator, built.penalty, Work(seed=3))
    wanted = solver.solve(built.problem, built.penalty, Work(seed=3))
    found = run.result()
    for name in ("soft_rank", "tic"):
        a, b = getattr(found, name), getattr(wanted, name)
        assert a.value == pytest.approx(b.value, rel=1e-8)
        assert a.monte_carlo_se == pytest.approx(b.monte_carlo_se, rel=1e-6, abs=1e-12)
    assert operator.applications > 0


def test_sampling_draws_from_the_same_posterior():
    """Other noise of the same law: within the standard error, which is stated."""
    built = build(SMALL)
    problem, v = built.problem, built.problem.factor.residual
    exact = SOLVERS["dual"].solve(problem, built.penalty)
    solver = replace(MATRIX_FREE["sampling"], tolerance=0.05)
    operator = DenseOperator.of(problem, PENALTY, rooted=True)
    found = SamplingRun(solver, problem, operator, built.penalty, Work(seed=3)).result()
    for measure in (estimates.measure_soft_rank, lambda c: estimates.measure_tic(c, v)):
        got, wanted = measure(found), measure(exact).gap
        assert 0 < got.monte_carlo_se < 0.1 * wanted
        assert abs(got.gap - wanted) < 4.5 * got.monte_carlo_se + (got.truncation or 0.0)
