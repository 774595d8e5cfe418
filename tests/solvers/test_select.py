"""The choice between the exact solvers: a pure function of sizes, plans and memory."""

from __future__ import annotations

import os

import pytest
import torch

import flataudit.solvers as solvers
from flataudit import fitting
from flataudit.errors import InputError, MemoryPlanError
from flataudit.memory import available_bytes, human, limited_to
from flataudit.processes import proportional_bytes
from flataudit.solvers import SOLVERS, choose, select
from tests.cases import BY_NAME, build

GB = 10**9


@pytest.mark.parametrize(
    ("name", "n_params", "n_rows", "primal", "dual", "chosen", "reason"),
    [
        ("auto", 10, 20, 1, 1, "primal", "P = 10 parameters <= N = 20 rows"),
        ("auto", 20, 20, 1, 1, "primal", "P = 20 parameters <= N = 20 rows"),
        ("auto", 21, 20, 1, 1, "dual", "P = 21 parameters > N = 20 rows"),
        ("auto", 10, 20, 9, 5, "dual", "but primal needs 9 GB of 8 GB"),
        ("auto", 21, 20, 5, 9, "primal", "but dual needs 9 GB of 8 GB"),
        ("auto", 10, 20, 8, 9, "primal", "P = 10 parameters <= N = 20 rows"),
        ("dual", 10, 20, 1, 8, "dual", "asked for"),
        ("primal", 21, 20, 8, 1, "primal", "asked for"),
    ],
)
def test_select(name, n_params, n_rows, primal, dual, chosen, reason):
    plans = {"primal": primal * GB, "dual": dual * GB}
    choice = select(name, n_params, n_rows, plans, 8 * GB)
    assert choice.name == chosen
    assert reason in choice.reason
    assert choice.peak_bytes == plans[chosen]


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
        select(name, 30, 40, {"primal": primal * GB, "dual": dual * GB}, 8 * GB)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", *parts))
    assert "\n" not in message
    assert caught.value.exit_code == 2


def test_named_solver_is_not_advised_to_use_one_that_does_not_fit():
    with pytest.raises(MemoryPlanError) as caught:
        select("dual", 30, 40, {"primal": 9 * GB, "dual": 12 * GB}, 8 * GB)
    assert "use solver=primal" not in str(caught.value)


FOUR = {"primal": 9 * GB, "dual": 12 * GB, "sampling": 5 * GB, "lanczos": 3 * GB}


@pytest.mark.parametrize(
    ("plans", "options", "chosen", "reason"),
    [
        ({}, {}, "sampling", "P = 30 parameters <= N = 40 rows; an exact solver needs 9 GB of 8"),
        ({}, {"affordable": False}, "lanczos", "sampling would take more than about an hour"),
        ({"sampling": 9 * GB}, {}, "lanczos", "an exact solver needs 9 GB of 8 GB"),
        ({}, {"failed": ["sampling"]}, "lanczos", "sampling ran out of memory"),
        ({"primal": GB, "dual": GB}, {"failed": ["primal"]}, "dual", "primal ran out of memory"),
        (
            {"primal": GB, "dual": GB},
            {"failed": ["primal", "dual"]},
            "sampling",
            "no exact solver got through, primal ran out of memory, dual ran out of memory",
        ),
    ],
)
def test_beyond_the_exact_sizes(plans, options, chosen, reason):
    choice = select("auto", 30, 40, FOUR | plans, 8 * GB, **options)
    assert choice.name == chosen
    assert reason in choice.reason
    assert choice.exact == (chosen in SOLVERS)
    assert choice.peak_bytes == (FOUR | plans)[chosen]


def test_nothing_fits():
    with pytest.raises(MemoryPlanError) as caught:
        select("auto", 30, 40, FOUR, 2 * GB)
    for part in ("primal 9 GB", "dual 12 GB", "sampling 5 GB", "lanczos 3 GB", "2 GB"):
        assert part in str(caught.value)
    with pytest.raises(MemoryPlanError, match=r"solver=sampling .* use solver=lanczos \(3 GB\)"):
        select("sampling", 30, 40, FOUR, 4 * GB)


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
        choose("auto", built.problem, built.penalty, ["lanczos"])


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
        select("kfca", 1, 1, {"primal": 1, "dual": 1}, 1)


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
