"""The choice between the exact solvers: a pure function of sizes, plans and memory."""

from __future__ import annotations

import os

import pytest
import torch

import flataudit.solvers as solvers
from flataudit import fitting
from flataudit.curvature.problem import make_problem
from flataudit.errors import InputError, MemoryPlanError
from flataudit.families import Categorical
from flataudit.memory import available_bytes, human, limited_to
from flataudit.processes import proportional_bytes
from flataudit.solvers import SOLVERS, choose, select
from flataudit.solvers.base import CHOLESKY, JACOBIAN, SPECTRUM, TRIANGULAR
from tests.cases import BY_NAME, build

GB = 10**9


@pytest.mark.parametrize(
    ("name", "work", "primal", "dual", "chosen", "reason"),
    [
        ("auto", (1e9, 2e9), 1, 1, "primal", "N = 20 rows: 1e+09 operations, 2e+09 for dual"),
        ("auto", (2e9, 2e9), 1, 1, "primal", "2e+09 for dual"),
        ("auto", (2.5e9, 2e9), 1, 1, "dual", "N = 20 rows: 2e+09 operations, 2.5e+09 for primal"),
        ("auto", (1, 2), 9, 5, "dual", "2 operations, 1 for primal, but primal needs 9 GB of 8 GB"),
        ("auto", (2, 1), 5, 9, "primal", "2 operations, 1 for dual, but dual needs 9 GB of 8 GB"),
        ("auto", (1, 2), 8, 9, "primal", "1 operations"),
        ("dual", (1, 2), 1, 8, "dual", "asked for; P = 10 parameters, N = 20 rows"),
        ("primal", (2, 1), 8, 1, "primal", "asked for"),
    ],
)
def test_select(name, work, primal, dual, chosen, reason):
    """The smaller work, whichever of P and N is the smaller, where it fits into memory."""
    plans = {"primal": primal * GB, "dual": dual * GB}
    choice = select(name, 10, 20, plans, 8 * GB, work=dict(zip(plans, work, strict=True)))
    assert choice.name == chosen
    assert reason in choice.reason
    assert choice.peak_bytes == plans[chosen]


EQUAL = {"primal": 1.0, "dual": 1.0}


@pytest.mark.parametrize(
    ("name", "primal", "dual", "parts"),
    [
        ("auto", 9, 12, ("8 GB", "primal 9 GB for P = 30", "dual 12 GB for N = 40", "subset")),
        ("dual", 1, 12, ("8 GB", "solver=dual", "12 GB", "use solver=primal (1 GB)")),
        ("primal", 9, 1, ("8 GB", "solver=primal", "9 GB", "use solver=dual (1 GB)")),
    ],
)
def test_does_not_fit(name, primal, dual, parts):
    with pytest.raises(MemoryPlanError) as caught:
        select(name, 30, 40, {"primal": primal * GB, "dual": dual * GB}, 8 * GB, work=EQUAL)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", *parts))
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_named_solver_is_not_advised_to_use_one_that_does_not_fit():
    with pytest.raises(MemoryPlanError) as caught:
        select("dual", 30, 40, {"primal": 9 * GB, "dual": 12 * GB}, 8 * GB, work=EQUAL)
    assert "use solver=primal" not in str(caught.value)


LOST = "ran out of memory"
FOUR = {"primal": 9 * GB, "dual": 12 * GB, "sampling": 5 * GB, "lanczos": 3 * GB}


@pytest.mark.parametrize(
    ("plans", "options", "chosen", "reason"),
    [
        ({}, {}, "sampling", "P = 30 parameters, N = 40 rows; an exact solver needs 9 GB of 8"),
        ({}, {"affordable": False}, "lanczos", "sampling would take more than about an hour"),
        ({"sampling": 9 * GB}, {}, "lanczos", "an exact solver needs 9 GB of 8 GB"),
        ({}, {"failed": {"sampling": LOST}}, "lanczos", "sampling ran out of memory"),
        (
            {"primal": GB, "dual": GB},
            {"failed": {"primal": LOST}},
            "dual",
            "primal ran out of memory",
        ),
        (
            {"primal": GB, "dual": GB},
            {"failed": {"primal": LOST, "dual": "broke down"}},
            "sampling",
            "no exact solver got through, primal ran out of memory, dual broke down",
        ),
    ],
)
def test_beyond_the_exact_sizes(plans, options, chosen, reason):
    choice = select("auto", 30, 40, FOUR | plans, 8 * GB, work=EQUAL, **options)
    assert choice.name == chosen
    assert reason in choice.reason
    assert choice.exact == (chosen in SOLVERS)
    assert choice.peak_bytes == (FOUR | plans)[chosen]


def test_nothing_fits():
    with pytest.raises(MemoryPlanError) as caught:
        select("auto", 30, 40, FOUR, 2 * GB, work=EQUAL)
    for part in ("primal 9 GB", "dual 12 GB", "sampling 5 GB", "lanczos 3 GB", "2 GB"):
        assert part in str(caught.value)
    with pytest.raises(MemoryPlanError, match=r"solver=sampling .* use solver=lanczos \(3 GB\)"):
        select("sampling", 30, 40, FOUR, 4 * GB, work=EQUAL)


def test_free_columns_that_do_not_fit_are_named():
    with pytest.raises(MemoryPlanError) as caught:
        select("auto", 30, 40, FOUR, 2 * GB, work=EQUAL, free=(7, 3 * GB))
    assert "3 GB of it for 7 unpenalised parameters" in str(caught.value)
    with pytest.raises(MemoryPlanError, match="for 7 unpenalised parameters"):
        select("lanczos", 30, 40, FOUR, 2 * GB, work=EQUAL, free=(7, 3 * GB))
    with pytest.raises(MemoryPlanError) as caught:
        select("auto", 30, 40, FOUR, 2 * GB, work=EQUAL, free=(7, GB // 10))
    assert "unpenalised" not in str(caught.value)


def test_plans_of_the_matrix_free_count_the_free_columns():
    """N x P0, as often as it is held, beyond the plan without them."""
    built = build(BY_NAME["mlp_tanh_wide"], copies=40)
    problem = built.problem
    first = next(iter(problem.params))
    penalty = built.penalty | {first: torch.zeros_like(built.penalty[first])}
    columns = problem.params[first].numel()
    for name in ("sampling", "lanczos"):
        plan = solvers.MATRIX_FREE[name].plan
        more = plan(problem, penalty) - plan(problem, built.penalty)
        assert more >= 2 * 8 * problem.n_rows * columns


def test_choose_goes_beyond_the_exact_sizes(monkeypatch):
    """Memory for a few vectors, not for a matrix; sampling where its work is affordable."""
    built = build(BY_NAME["mlp_tanh_wide"])
    monkeypatch.setattr(solvers.SOLVERS["primal"].__class__, "plan", lambda *a: 10**15)
    monkeypatch.setattr(solvers.SOLVERS["dual"].__class__, "plan", lambda *a: 10**15)
    monkeypatch.setattr(solvers, "available_bytes", lambda device: 10 * GB)
    assert choose("auto", built.problem, built.penalty).name == "sampling"
    monkeypatch.setitem(solvers.AFFORDABLE, "cpu", 1.0)
    assert choose("auto", built.problem, built.penalty).name == "lanczos"
    with pytest.raises(MemoryPlanError, match="lanczos ran out of memory"):
        choose("auto", built.problem, built.penalty, {"lanczos": LOST})


def test_product_flops_are_those_of_two_passes():
    """Two products of (n, in) with (in, out) per layer and pass, forward, and twice backward."""
    problem = build(BY_NAME["mlp_tanh_wide"]).problem
    forward = 2 * 12 * (5 * 10 + 10 * 3)
    assert solvers.product_flops(problem) == pytest.approx(6 * forward)


def test_unknown_solver():
    with pytest.raises(
        InputError,
        match="unknown solver 'kfca'; choose one of: auto, dual, primal, kfac, lanczos, sampling",
    ):
        select("kfca", 1, 1, {"primal": 1, "dual": 1}, 1, work=EQUAL)


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("dispersion", [1.0, "auto"])
def test_too_large_raises_before_any_factorisation(monkeypatch, solver, dispersion):
    built = build(BY_NAME["gaussian_outputs"])
    monkeypatch.setattr(solvers, "available_bytes", lambda device: 1000)
    started = []
    for each in SOLVERS.values():
        monkeypatch.setattr(type(each), "solve", lambda *a, **k: started.append(a))
    with pytest.raises(MemoryPlanError, match="got"):
        fitting.penalised_fit(
            built.problem, penalty=0.1, record=None, dispersion=dispersion, solver=solver
        )
    assert started == []


def linear(n, features, classes=10):
    """A logistic regression's problem: P = classes (features + 1), N = n (classes - 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, features, generator=generator, dtype=torch.float64)
    model = torch.nn.Linear(features, classes).double()
    problem = make_problem(model, x, torch.arange(n) % classes, Categorical())
    return problem, {name: torch.full_like(p.detach(), 0.1) for name, p in problem.params.items()}


@pytest.mark.parametrize(
    ("n", "features", "chosen"),
    [
        (700, 784, "dual"),  # P = 7,850, N = 6,300: 2.9e11 operations against 6.4e11
        (1000, 784, "primal"),  # P/N = 0.87: 6.8e11 operations against 8.3e11
        (500, 900, "dual"),  # P above N
        (400, 64, "primal"),  # P = 650, N = 3,600, with the spectrum of either
    ],
)
def test_the_choice_is_by_work_on_both_sides_of_the_crossover(monkeypatch, n, features, chosen):
    problem, penalty = linear(n, features)
    monkeypatch.setattr(solvers, "available_bytes", lambda device: 100 * GB)
    assert choose("auto", problem, penalty).name == chosen


def test_work_counts_the_products():
    """A linear layer's Gram and G, each with a Cholesky and a triangular inverse."""
    problem, penalty = linear(60, 30)
    p, rows, n = 310, 540, 60
    expected = n**2 * 30 + rows**2 * (10 + 1) + rows**2 * 10 + rows**2 * 9
    expected += (CHOLESKY + TRIANGULAR) * rows**3 / 3
    assert SOLVERS["dual"].work(problem, penalty) == pytest.approx(expected)
    expected = 2.1 * n * p**2 + (CHOLESKY + TRIANGULAR) * p**3 / 3
    expected += 2 * rows * 10 * p + 2 * rows * 9 * p
    assert SOLVERS["primal"].work(problem, penalty) == pytest.approx(expected)


def test_primal_work_of_other_models_counts_the_rows():
    """G, the whitened rows, a Cholesky, and the Jacobian twice."""
    built = build(BY_NAME["mlp_relu_inplace"])
    p, rows, k = built.problem.n_params, built.problem.n_rows, built.problem.n_columns
    expected = (2 + TRIANGULAR) * rows * p**2 + CHOLESKY * p**3 / 3
    expected += 2 * rows * k * p + 2 * JACOBIAN * rows * p
    assert SOLVERS["primal"].work(built.problem, built.penalty) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["convolutions", "mlp_free_biases", "mlp_elementwise", "gru"])
def test_work_of_other_layers(name):
    """Explicit columns, the Jacobian's entries, and a penalty per element cost more."""
    built = build(BY_NAME[name])
    work = SOLVERS["dual"].work(built.problem, built.penalty)
    rows = built.problem.n_rows
    assert work > 2 * rows**3 / 3 + rows**2 * built.problem.n_columns
    if name == "gru":
        recurrent = sum(p.numel() for key, p in built.problem.params.items() if "gru" in key)
        assert work > JACOBIAN * rows * recurrent


def test_the_spectrum_counts_where_the_audit_shows_it():
    problem, penalty = linear(60, 30)
    found = solvers.exact_work(problem, penalty)
    for key, side in (("primal", 310), ("dual", 540)):
        own = SOLVERS[key].work(problem, penalty)
        assert found[key] == pytest.approx(own + SPECTRUM * CHOLESKY * side**3 / 3)


def test_an_unknown_penalty_with_the_larger_matrix_asked_for(monkeypatch):
    """The search goes by solves where the solver's own matrix is too large for a spectrum."""
    monkeypatch.setattr("flataudit.fitting.EIGENVALUE_LIMIT", 400)
    monkeypatch.setattr("flataudit.solvers.dual.EIGENVALUE_LIMIT", 400)
    problem, _ = linear(60, 30)
    ranks = {}
    for solver in ("dual", "primal"):
        fit = fitting.penalised_fit(
            problem, penalty="auto", record=None, dispersion=1.0, solver=solver
        )
        ranks[solver] = float(fit.penalty["weight"].flatten()[0])
    assert ranks["dual"] == pytest.approx(ranks["primal"], rel=0.05)


def test_choose_states_the_plan(monkeypatch):
    built = build(BY_NAME["mlp_tanh_wide"])
    monkeypatch.setattr(solvers, "available_bytes", lambda device: 10 * GB)
    choice = choose("auto", built.problem, built.penalty)
    assert choice.name == "dual"
    assert choice.peak_bytes == SOLVERS["dual"].plan(built.problem, built.penalty)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_plan_covers_the_matrix_and_grows_with_it(solver):
    """The plan is at least the matrix of float64 that the solver cannot do without."""
    small = build(BY_NAME["mlp_tanh_wide"])
    large = build(BY_NAME["mlp_tanh_wide"], copies=40)
    plans = [SOLVERS[solver].plan(b.problem, b.penalty) for b in (small, large)]
    assert plans[1] >= plans[0]
    size = large.problem.n_params if solver == "primal" else large.problem.n_rows
    assert plans[1] >= 8 * size**2


def test_what_torch_keeps_of_a_gpu_can_be_used_again(monkeypatch):
    """After a solve its memory is torch's, not the driver's: the next one of its size fits."""
    for name, value in {
        "mem_get_info": (10 * GB, 80 * GB),
        "memory_reserved": 65 * GB,
        "memory_allocated": 5 * GB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert available_bytes(torch.device("cuda")) == int(0.85 * 70 * GB)


def test_available_bytes_is_within_the_machine():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes(torch.device("cpu")) <= machine


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(999, "999 B"), (1500, "1.5 kB"), (2.59e9, "2.59 GB"), (7e13, "7e+04 GB")],
)
def test_human(n_bytes, text):
    assert human(n_bytes) == text


def test_a_limit_counts_less_what_this_process_holds():
    cpu = torch.device("cpu")
    unlimited = available_bytes(cpu)
    held = proportional_bytes()
    with limited_to(held + 10**9):
        assert available_bytes(cpu) == pytest.approx(0.85e9, rel=0.2)
        with limited_to(1):
            assert available_bytes(cpu) == 0
        with limited_to(None):
            assert available_bytes(cpu) == pytest.approx(unlimited, rel=0.5)
    with limited_to(10**15):
        assert available_bytes(cpu) == pytest.approx(unlimited, rel=0.5)
