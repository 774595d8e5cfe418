"""The six fitted models whose values were computed independently, in dense float64."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch

from flataudit import estimates
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import make_family
from flataudit.penalty import from_argument, stationarity
from flataudit.solvers import SOLVERS
from tests.cases import REFERENCES, reference

RELATIVE = 1e-8
# The stored leave-one-out values of this case's first five samples are themselves inaccurate
# (3e-3 for the first, whose probability of an error is 4e-7). These are the values in 50-digit
# arithmetic, which `test_breast_cancer_in_fifty_digits` computes again.
BREAST_CANCER_LOO = (
    1.3633644360787638e-13,
    2.9651026375371579e-7,
    4.448688234080464e-11,
    2.2891211478653504e-5,
    2.2690368086637153e-7,
)


def problem_of(values, *, chunk_size=None, copies=1) -> tuple[Problem, dict[str, torch.Tensor]]:
    fitted = reference(values)
    x, y = torch.cat([fitted.x] * copies), torch.cat([fitted.y] * copies)
    family = make_family(values["family"], y, values["n_outputs"], values["dispersion"])
    y = family.check(y, values["n_outputs"])
    problem = make_problem(fitted.model, x, y, family, chunk_size=chunk_size)
    return problem, from_argument(values["penalty"], problem.params)


def solved(values, solver, **options) -> dict[str, torch.Tensor | float]:
    """Per-sample values and the two gradient traces."""
    problem, penalty = problem_of(values, **options)
    found = SOLVERS[solver].solve(problem, penalty)
    v = problem.factor.residual
    left_out = estimates.loo(found, v, problem.family, problem.outputs, problem.y)
    assert left_out is not None
    return {
        "leverage": estimates.soft_rank(found),
        "tic": estimates.tic(found, v),
        "loo": left_out.psi,
        "centred": estimates.centred_tic(found, v),
        "trace_ggn": found.trace_ggn,
        "nll": problem.family.nll(problem.outputs, problem.y),
    }


references = pytest.mark.parametrize("values", REFERENCES, ids=lambda values: values["name"])
solvers = pytest.mark.parametrize("solver", sorted(SOLVERS))


@solvers
@references
def test_reference_values(values, solver):
    found = solved(values, solver)
    n = values["n_samples"]
    assert len(found["leverage"]) == n
    wanted = {
        "soft_rank": float(found["leverage"].sum()),
        "gap_soft_rank": float(found["leverage"].mean()),
        "gap_tic_uncentred": float(found["tic"].mean()),
        "gap_tic_centred": found["centred"],
        "gap_loo": float(found["loo"].mean()),
        "trace_ggn": found["trace_ggn"],
        "train_nll": float(found["nll"].mean()),
    }
    for name, value in wanted.items():
        assert value == pytest.approx(values[name], rel=RELATIVE), name


@solvers
@references
def test_reference_samples(values, solver):
    found = solved(values, solver)
    loo = values["loo_first5"]
    if values["name"] == "breast_cancer_logistic":
        loo = BREAST_CANCER_LOO
    for name, first in (
        ("leverage", values["leverage_first5"]),
        ("tic", values["tic_first5"]),
        ("loo", loo),
    ):
        np.testing.assert_allclose(found[name][:5].numpy(), first, rtol=RELATIVE, err_msg=name)


@references
def test_reference_gradient(values):
    """trace of the gradient covariance; |gbar + D theta| / |gbar| is that of an optimum."""
    problem, penalty = problem_of(values)
    mean, second = problem.gradient_moments()
    trace = sum(float(t.sum()) for t in second.values())
    assert trace == pytest.approx(values["trace_gradient_covariance"], rel=RELATIVE)
    # The residual is what is left of two terms that cancel to seven digits.
    assert stationarity(penalty, problem, mean) == pytest.approx(values["stationarity"], rel=1e-3)


@solvers
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
@pytest.mark.parametrize(
    "values", [REFERENCES[1], REFERENCES[2], REFERENCES[4]], ids=lambda values: values["name"]
)
def test_chunk_size_changes_nothing(values, chunk_size, solver):
    size = chunk_size or values["n_samples"]
    found = solved(values, solver, chunk_size=size)
    wanted = solved(values, solver)
    for name in ("leverage", "tic", "loo", "nll"):
        scale = float(wanted[name].abs().max())
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-10, atol=1e-10 * scale)
    assert found["centred"] == pytest.approx(wanted["centred"], rel=1e-10)
    assert found["trace_ggn"] == pytest.approx(wanted["trace_ggn"], rel=1e-10)


# The dual Gram matrix of 300 digits twice has 5,400 rows.
DUPLICATED = [
    pytest.param(
        values,
        solver,
        id=f"{values['name']}-{solver}",
        marks=[pytest.mark.slow] if (solver, values["n_samples"]) == ("dual", 300) else [],
    )
    for values in REFERENCES
    for solver in sorted(SOLVERS)
]


@pytest.mark.parametrize(("values", "solver"), DUPLICATED)
def test_duplicated_data(values, solver):
    """Every sample twice, D and theta fixed: G and C are the same matrices of a mean loss.

    The soft rank and n times the TIC gap stay, so both gaps halve.
    """
    once, twice = solved(values, solver), solved(values, solver, copies=2)
    for name in ("leverage", "tic"):
        assert float(twice[name].sum()) == pytest.approx(float(once[name].sum()), rel=1e-10)
        assert float(twice[name].mean()) == pytest.approx(float(once[name].mean()) / 2, rel=1e-10)
    assert twice["trace_ggn"] == pytest.approx(once["trace_ggn"], rel=1e-10)


def test_breast_cancer_in_fifty_digits():
    """Leave-one-out of the first five samples, from the weights alone, in 50-digit arithmetic."""
    fitted = reference(REFERENCES[3])
    with mpmath.workdps(50):
        weight = [mpmath.mpf(w) for w in fitted.model.weight[0].tolist()]
        bias = mpmath.mpf(fitted.model.bias.item())
        rows = [[mpmath.mpf(value) for value in row] + [mpmath.mpf(1)] for row in fitted.x.tolist()]
        logits = [mpmath.fdot(row[:-1], weight) + bias for row in rows]
        n, size = len(rows), len(weight) + 1
        p = [1 / (1 + mpmath.exp(-f)) for f in logits]
        scaled = [
            [p_i * (1 - p_i) * value for value in row] for p_i, row in zip(p, rows, strict=True)
        ]
        hessian = mpmath.matrix(size, size)
        for a in range(size):
            for b in range(a + 1):
                total = mpmath.fdot((row[a] for row in scaled), (row[b] for row in rows))
                hessian[a, b] = hessian[b, a] = total / n
            if a < size - 1:
                hessian[a, a] += mpmath.mpf(REFERENCES[3]["penalty"]["weight"])
        found = []
        for i in range(5):
            row, y = mpmath.matrix(rows[i]), int(fitted.y[i])
            a = (row.T * mpmath.lu_solve(hessian, row))[0] / n
            shifted = logits[i] + a * (p[i] - y) / (1 - p[i] * (1 - p[i]) * a)
            sign = 1 - 2 * y
            loss = [mpmath.log1p(mpmath.exp(sign * f)) for f in (shifted, logits[i])]
            found.append(float(loss[0] - loss[1]))
    np.testing.assert_allclose(found, BREAST_CANCER_LOO, rtol=1e-14)
