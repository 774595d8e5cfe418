"""Solvers: one file per strategy, plain dicts, and the choice between them.

SOLVERS are exact; MATRIX_FREE, for sizes where no matrix fits, are approximations that state their
error. kfac, never chosen by `auto`, states only how far off it was elsewhere.

>>> sorted(SOLVERS), sorted(MATRIX_FREE)
(['dual', 'primal'], ['kfac', 'lanczos', 'sampling'])
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from flataudit.curvature.problem import Problem, evaluate
from flataudit.errors import InputError, MemoryPlanError
from flataudit.memory import available_bytes, human
from flataudit.solvers.base import (
    EIGENVALUE_LIMIT,
    SPECTRUM,
    Checkpoint,
    Curvature,
    CurvatureTraces,
    FunctionalVariance,
    MatrixFree,
    Penalty,
    Solver,
    Work,
    cholesky_work,
)
from flataudit.solvers.dual import Dual
from flataudit.solvers.free import free_bytes, free_parameters
from flataudit.solvers.kfac import Kfac
from flataudit.solvers.lanczos import Lanczos
from flataudit.solvers.primal import Primal
from flataudit.solvers.sampling import Sampling

__all__ = [
    "MATRIX_FREE",
    "NAMES",
    "SOLVERS",
    "Checkpoint",
    "Choice",
    "Curvature",
    "CurvatureTraces",
    "FunctionalVariance",
    "Solver",
    "Work",
    "choose",
    "select",
    "solve",
]

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Primal(), Dual())}
MATRIX_FREE: dict[str, MatrixFree] = {
    solver.name: solver for solver in (Sampling(), Lanczos(), Kfac())
}
NAMES = (*sorted(SOLVERS), *sorted(MATRIX_FREE))

# In messages of errors that have no type of their own.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
)
# Floating-point operations up to which `auto` takes samples, which give leave-one-out and values
# per sample, rather than the two traces alone: about an hour at 3e10/s on a processor's core and
# at 3e13/s on a graphics card.
AFFORDABLE = {"cpu": 1e14, "cuda": 1e17}
# Products with the operator that sampling takes: systems times iterations, as measured at penalties
# of 1e-2 and 1e-3 (benchmarks/matrix_free.json); at 1e-4 it can be seven times as many.
SAMPLING_PRODUCTS = 10_000


@dataclass(frozen=True, slots=True)
class Choice:
    """A solver's name, why it was chosen, and the peak bytes it stated."""

    name: str
    reason: str
    peak_bytes: int

    @property
    def exact(self) -> bool:
        """Whether the solver is."""
        return self.name in SOLVERS


def check_name(name: str) -> str:
    """The name of a solver, or `auto`; InputError lists the choices."""
    if name != "auto" and name not in NAMES:
        raise InputError(f"unknown solver {name!r}; choose one of: auto, {', '.join(NAMES)}")
    return name


def select(
    name: str,
    n_params: int,
    n_rows: int,
    plans: dict[str, int],
    available: int,
    *,
    work: Mapping[str, float],
    affordable: bool = True,
    failed: Mapping[str, str] | None = None,
    free: tuple[int, int] = (0, 0),
) -> Choice:
    """The exact solver with less work that fits into memory, else a matrix-free one. Pure.

    name: a solver or `auto`; n_params P; n_rows N = n K'; plans: peak bytes by solver, of those
    that come into question; available: bytes; work: operations of the exact solvers; affordable:
    whether sampling's work is; failed: how solvers failed that `auto` passes over, as "ran out of
    memory" although the plan fitted; free: P0 unpenalised parameters and the bytes of their
    N x P0 columns.

    Raises:
        InputError: unknown solver.
        MemoryPlanError: the named solver, or with `auto` every solver, needs more than there is.

    >>> work = {"primal": 9e9, "dual": 1.3e10}
    >>> select("auto", 650, 2700, {"primal": 10, "dual": 99}, 100, work=work).reason
    'P = 650 parameters, N = 2700 rows: 9e+09 operations, 1.3e+10 for dual'
    """
    check_name(name)
    failed = failed or {}
    first, second = sorted(("primal", "dual"), key=lambda each: work[each])
    sizes = f"P = {n_params} parameters, N = {n_rows} rows"
    compared = f"{sizes}: {work[first]:.2g} operations, {work[second]:.2g} for {second}"
    n_free, columns = free
    # Told where they are what does not fit.
    held = (
        f", {human(columns)} of it for {n_free} unpenalised parameters, which a"
        " penalty on them would save"
        if 2 * columns > available and name != "primal"
        else ""
    )
    if name != "auto":
        if plans[name] > available:
            other = {"primal": "dual", "dual": "primal"}.get(name, "lanczos")
            fits = other != name and plans.get(other, available + 1) <= available
            instead = f"solver={other} ({human(plans[other])}), " if fits else ""
            raise MemoryPlanError(
                f"expected solver={name} to fit into {human(available)}, got a plan of"
                f" {human(plans[name])}{held}; use {instead}fewer samples"
                " or more memory"
            )
        return Choice(name, f"asked for; {sizes}", plans[name])
    lost = "".join(f", {each} {how}" for each, how in failed.items())
    if plans[first] <= available and first not in failed:
        return Choice(first, compared + lost, plans[first])
    if plans[second] <= available and second not in failed:
        more = f"{work[second]:.2g} operations, {work[first]:.2g} for {first}"
        short = f", but {first} needs {human(plans[first])} of {human(available)}"
        reason = f"{sizes}: {more}" + (short if plans[first] > available else "")
        return Choice(second, reason + lost, plans[second])
    needs = (
        f"an exact solver needs {human(min(plans[first], plans[second]))} of {human(available)}"
        if min(plans[first], plans[second]) > available
        else "no exact solver got through"
    ) + lost
    for each in ("sampling", "lanczos"):
        if plans.get(each, available + 1) > available or each in failed:
            continue
        if each == "sampling" and not affordable:
            needs += ", and sampling would take more than about an hour"
            continue
        return Choice(each, f"{sizes}; {needs}", plans[each])
    others = "".join(
        f", {each} {human(plans[each])}" for each in ("sampling", "lanczos") if each in plans
    )
    raise MemoryPlanError(
        f"expected a solver to fit into {human(available)}, got primal"
        f" {human(plans['primal'])} for P = {n_params} and dual {human(plans['dual'])} for"
        f" N = {n_rows}{others}{lost}{held}; audit a random subset of the training data, or use"
        " more memory"
    )


def choose(
    name: str, problem: Problem, penalty: Penalty, failed: Mapping[str, str] | None = None
) -> Choice:
    """`select` for this problem on its device."""
    check_name(name)
    failed = failed or {}
    available = available_bytes(problem.device)
    plans = {key: solver.plan(problem, penalty) for key, solver in SOLVERS.items()}
    affordable = True
    exact_fits = any(plans[key] <= available and key not in failed for key in SOLVERS)
    if name in MATRIX_FREE or not exact_fits:
        plans |= {key: solver.plan(problem, penalty) for key, solver in MATRIX_FREE.items()}
    if name == "auto" and not exact_fits:
        work = SAMPLING_PRODUCTS * product_flops(problem)
        affordable = work <= AFFORDABLE.get(problem.device.type, AFFORDABLE["cpu"])
    return select(
        name,
        problem.n_params,
        problem.n_rows,
        plans,
        available,
        work=exact_work(problem, penalty),
        affordable=affordable,
        failed=failed,
        free=(free_parameters(problem, penalty), free_bytes(problem, penalty)),
    )


def exact_work(problem: Problem, penalty: Penalty) -> dict[str, float]:
    """Floating-point operations of the exact solvers, about.

    With the eigenvalues of their matrix where the smaller of the two is small enough for those: the
    audit shows them, and searches an unknown penalty by them.
    """
    sides = {"primal": float(problem.n_params), "dual": float(problem.n_rows)}
    shown = min(sides.values()) <= EIGENVALUE_LIMIT
    return {
        key: solver.work(problem, penalty)
        + (SPECTRUM * cholesky_work(sides[key]) if shown else 0.0)
        for key, solver in SOLVERS.items()
    }


def product_flops(problem: Problem) -> float:
    """Floating-point operations of one product with the operator: two forward and backward passes.

    Counted on one small batch's forward pass, of which either takes about three.
    """
    few = problem.x[: min(2, problem.n_samples)]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        evaluate(problem.model, few)
    return 6.0 * counter.get_total_flops() / len(few) * problem.n_samples


def solve(
    name: str, problem: Problem, penalty: Penalty, work: Work, *, spectrum: bool = False
) -> Curvature:
    """The curvature by the solver of that name; `spectrum` is the exact solvers' alone."""
    if name in SOLVERS:
        return SOLVERS[name].solve(problem, penalty, spectrum=spectrum)
    return MATRIX_FREE[name].solve(problem, penalty, work)


def is_out_of_memory(error: BaseException) -> bool:
    """torch raises a plain RuntimeError where RAM, or a CUDA library's own workspace, is out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | MemoryPlanError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
