"""solver=kfac: exact where Kronecker factors are, else the definition of KFAC; and its refusals."""

from __future__ import annotations

import builtins
import importlib.util
import warnings

import pytest
import torch
from torch import nn

import flataudit
from flataudit import estimates
from flataudit.errors import InputError, MemoryPlanError
from flataudit.solvers import NAMES, SOLVERS, select
from flataudit.solvers.base import Work
from flataudit.solvers.kfac import Kfac, reference_note
from flataudit.solvers.kfac_reference import REFERENCE
from tests.case import Case, build, constant, elementwise

installed = pytest.mark.skipif(
    importlib.util.find_spec("curvlinops") is None,
    reason="needs curvlinops: pip install 'flataudit[kfac]'",
)


def solve(built):
    return Kfac().solve(built.problem, built.penalty, Work())


def regression(n=40, *, n_outputs=2, bias=False, penalty=None) -> Case:
    return Case(
        "regression",
        lambda: nn.Linear(5, n_outputs, bias=bias),
        lambda: torch.randn(n, 5),
        lambda: torch.randn(n, n_outputs),
        "gaussian",
        penalty or constant(0.02),
        dispersion=0.7,
    )


def network(family="categorical", *, hidden=4, n=30) -> Case:
    n_outputs = {"categorical": 3, "bernoulli": 1, "poisson": 2, "gaussian": 2}[family]
    labels = {
        "categorical": lambda: torch.randint(0, 3, (n,)),
        "bernoulli": lambda: torch.randint(0, 2, (n,)),
        "poisson": lambda: torch.poisson(torch.ones(n, 2)),
        "gaussian": lambda: torch.randn(n, 2),
    }
    return Case(
        f"network-{family}",
        lambda: nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, n_outputs)),
        lambda: torch.randn(n, 5),
        labels[family],
        family,
    )


@installed
@pytest.mark.parametrize("n", [40, 700])  # 700: more than one batch
def test_equals_the_exact_solver_where_g_is_a_kronecker_product(n):
    """One linear layer without bias under a constant variance: G = E[x x'] (x) I/s2."""
    built = build(regression(n))
    found, exact = solve(built), SOLVERS["primal"].solve(built.problem, built.penalty)
    torch.testing.assert_close(found.q, exact.q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.complement, exact.complement, rtol=1e-10, atol=1e-12)
    assert found.mean_gradient == pytest.approx(exact.mean_gradient, rel=1e-10)
    assert found.trace_ggn == pytest.approx(exact.trace_ggn, rel=1e-10)


@installed
def test_unpenalised_parameters_take_the_pseudo_inverse():
    built = build(regression(penalty=constant(0.0)))
    rank = float(estimates.soft_rank(solve(built)).sum())
    assert rank == pytest.approx(10.0, rel=1e-9)  # least squares: the number of parameters


@installed
def test_a_convolution_over_the_whole_input_is_a_linear_layer():
    case = regression()
    linear = build(case)
    image = Case(
        "image",
        lambda: nn.Sequential(nn.Conv2d(1, 2, (1, 5), bias=False), nn.Flatten()),
        lambda: linear.x[:, None, None, :],
        lambda: linear.y,
        "gaussian",
        case.penalty,
        dispersion=case.dispersion,
    )
    convolved = build(image)
    # The data are given, so the only thing drawn is the weight, which Q does not depend on here.
    torch.testing.assert_close(solve(convolved).q, solve(linear).q, rtol=1e-9, atol=1e-12)


@installed
@pytest.mark.parametrize("family", ["categorical", "bernoulli", "poisson", "gaussian"])
def test_equals_the_definition_of_kfac(family):
    """Q_i = B_i (blockdiag(E[d d'] (x) E[a a'], E[d d']) + D)^-1 B_i', from plain autograd."""
    built = build(network(family))
    problem, (first, _, last) = built.problem, built.problem.model
    n = problem.n_samples
    x = problem.x.parts[0]
    hidden = torch.tanh(first(x)).detach()
    deltas = {"0": [], "2": []}
    for i in range(n):
        root = problem.factor.root[i]
        of_first = torch.autograd.functional.jacobian(
            lambda z, root=root: root.T @ last(torch.tanh(z)), first(x[i]).detach()
        )
        deltas["0"].append(of_first)
        deltas["2"].append(root.T)
    blocks = []
    for layer, inputs in (("0", x), ("2", hidden)):
        outer = sum(d.T @ d for d in deltas[layer]) / n
        blocks += [torch.kron(outer, inputs.T @ inputs / n), outer]
    total = torch.block_diag(*blocks) + 0.02 * torch.eye(problem.n_params, dtype=torch.float64)
    rows = problem.rows(slice(0, n)) * n**0.5
    wanted = rows @ torch.linalg.solve(total, rows.mT) / n

    found = solve(built)
    torch.testing.assert_close(found.q, wanted.detach(), rtol=1e-9, atol=1e-12)


@installed
def test_duplicating_the_data_halves_the_gaps_and_keeps_the_soft_rank():
    once, twice = build(network()), build(network(), copies=2)
    a, b = solve(once), solve(twice)
    assert float(estimates.soft_rank(b).sum()) == pytest.approx(
        float(estimates.soft_rank(a).sum()), rel=1e-10
    )
    v, w = once.problem.factor.residual, twice.problem.factor.residual
    assert float(estimates.tic(b, w).mean()) == pytest.approx(
        float(estimates.tic(a, v).mean()) / 2, rel=1e-10
    )


@installed
@pytest.mark.parametrize("chunk", [1, 7, None])
def test_chunks_change_no_number(chunk):
    found = solve(build(network(), chunk_size=chunk))
    torch.testing.assert_close(found.q, solve(build(network())).q, rtol=1e-11, atol=1e-13)


@installed
def test_leaves_the_model_without_hooks_or_gradients():
    built = build(network())
    solve(built)
    for module in built.problem.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in built.problem.model.parameters())


@installed
def test_leverage_beyond_one_leaves_no_leave_one_out_and_says_so():
    """Strongly coupled layers and hardly a penalty: KFAC's leverages pass 1."""
    case = network(hidden=40, n=8)
    built = build(Case(case.name, case.model, case.x, case.y, penalty=constant(1e-5)))
    found = solve(built)
    v = built.problem.factor.residual
    assert float(torch.linalg.eigvalsh(found.q).max()) >= 1.0
    problem = built.problem
    assert estimates.loo(found, v, problem.family, problem.outputs, problem.y) is None
    assert any("no leave-one-out" in note for note in found.notes)


@installed
def test_every_result_says_how_far_off_kfac_was():
    assert reference_note() in solve(build(network())).notes
    ratios = [case.kfac / case.exact for case in REFERENCE]
    assert f"{min(ratios):.2g} to {max(ratios):.2g}" in reference_note()


@installed
def test_refuses_layers_that_kfac_does_not_cover():
    case = Case(
        "norm",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)),
        lambda: torch.randn(20, 5),
        lambda: torch.randint(0, 3, (20,)),
    )
    with pytest.raises(InputError, match="Linear and Conv2d layers alone"):
        solve(build(case))


def test_refuses_a_penalty_by_element():
    with pytest.raises(InputError, match="one penalty per parameter tensor"):
        solve(build(regression(penalty=elementwise(0.01, 0.1))))


def test_says_what_to_install(monkeypatch):
    """Also on a machine where curvlinops is installed."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "curvlinops":
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'flataudit\[kfac\]'"):
        solve(build(regression()))


@installed
def test_importing_raises_no_warning_of_a_third_party():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(build(regression()))


def test_plan_covers_factors_and_values():
    problem = build(network()).problem
    values = 8 * problem.n_rows * problem.n_columns
    assert Kfac().plan(problem, {}) > 3 * values


@installed
def test_an_audit_warns_that_its_error_is_unknown():
    built = build(network(n=60))
    report = flataudit.audit(built.model, (built.x, built.y), penalty=0.02, solver="kfac")
    assert (report.solver.name, report.solver.exact) == ("kfac", False)
    (warning,) = [w for w in report.warnings if w.code == "approximate_solver"]
    assert warning.severity == "high"
    assert reference_note() in warning.message
    assert "within its interval" not in warning.message
    exact = flataudit.audit(built.model, (built.x, built.y), penalty=0.02)
    rank = exact.estimates.soft_rank.rank
    assert report.estimates.soft_rank.rank != pytest.approx(rank, rel=0.01)


def test_the_choice_of_solvers_names_kfac_and_auto_never_takes_it():
    assert "kfac" in NAMES
    work = {"primal": 1.0, "dual": 1.0}
    plans = {"primal": 9, "dual": 9, "sampling": 9, "lanczos": 9, "kfac": 1}
    with pytest.raises(MemoryPlanError):
        select("auto", 100, 200, plans, 5, work=work)
    assert select("kfac", 100, 200, plans, 5, work=work).name == "kfac"
