"""The matrix-free solvers on the six fitted models whose values were computed independently."""

from __future__ import annotations

import pytest

from flataudit import estimates
from flataudit.curvature.problem import make_problem
from flataudit.families import make_family
from flataudit.penalty import from_argument
from flataudit.solvers import MATRIX_FREE, Work
from tests.cases import REFERENCES, reference

# Relative, of soft rank and TIC, and of the leave-one-out gap where the solver gives one.
TOLERANCE = {"lanczos": (0.01, None), "sampling": (0.03, 0.03)}


@pytest.mark.parametrize("solver", sorted(TOLERANCE))
@pytest.mark.parametrize("values", REFERENCES, ids=lambda values: values["name"])
def test_reference_values(values, solver):
    fitted = reference(values)
    family = make_family(values["family"], fitted.y, values["n_outputs"], values["dispersion"])
    y = family.check(fitted.y, values["n_outputs"])
    problem = make_problem(fitted.model, fitted.x, y, family)
    penalty = from_argument(values["penalty"], problem.params)
    found = MATRIX_FREE[solver].solve(problem, penalty, Work(seed=1))
    v = problem.factor.residual
    traces, loo = TOLERANCE[solver]

    rank, tic = estimates.measure_soft_rank(found), estimates.measure_tic(found, v)

    assert rank.gap == pytest.approx(values["gap_soft_rank"], rel=traces)
    assert tic.gap == pytest.approx(values["gap_tic_uncentred"], rel=traces)
    centred = tic.gap - found.mean_gradient / problem.n_samples
    assert centred == pytest.approx(values["gap_tic_centred"], rel=1.5 * traces)
    assert found.trace_ggn == pytest.approx(values["trace_ggn"], rel=0.5)
    left_out = estimates.measure_loo(found, v, family, problem.outputs, y)
    if loo is None:
        assert left_out is None
    else:
        assert left_out[1].gap == pytest.approx(values["gap_loo"], rel=loo)
        error = left_out[1].monte_carlo_se
        assert abs(left_out[1].gap - values["gap_loo"]) <= 4 * error
