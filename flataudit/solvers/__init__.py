"""Solvers: one file per strategy, a plain dict, and the choice between them.

>>> sorted(SOLVERS)
['dual', 'primal']
"""

from __future__ import annotations

from dataclasses import dataclass

from flataudit.curvature.problem import Problem
from flataudit.errors import InputError, MemoryPlanError
from flataudit.memory import available_bytes, human
from flataudit.solvers.base import FunctionalVariance, Penalty, Solver
from flataudit.solvers.dual import Dual
from flataudit.solvers.primal import Primal

__all__ = ["SOLVERS", "Choice", "FunctionalVariance", "Solver", "choose", "select"]

SOLVERS: dict[str, Solver] = {solver.name: solver for solver in (Primal(), Dual())}


@dataclass(frozen=True, slots=True)
class Choice:
    """A solver's name, why it was chosen, and the peak bytes it stated."""

    name: str
    reason: str
    peak_bytes: int


def check_name(name: str) -> str:
    """The name of a solver, or `auto`; InputError lists the choices."""
    if name != "auto" and name not in SOLVERS:
        raise InputError(
            f"unknown solver {name!r}; choose one of: auto, {', '.join(sorted(SOLVERS))}"
        )
    return name


def select(name: str, n_params: int, n_rows: int, plans: dict[str, int], available: int) -> Choice:
    """The exact solver with the smaller matrix that fits into memory. Pure.

    name: a solver or `auto`; n_params P; n_rows N = n K'; plans: peak bytes by solver;
    available: bytes.

    Raises:
        InputError: unknown solver.
        MemoryPlanError: the named solver, or with `auto` every solver, needs more than there is.

    >>> select("auto", 650, 2700, {"primal": 10, "dual": 99}, 100).reason
    'P = 650 parameters <= N = 2700 rows'
    """
    check_name(name)
    first, second = ("primal", "dual") if n_params <= n_rows else ("dual", "primal")
    sign = "<=" if n_params <= n_rows else ">"
    compared = f"P = {n_params} parameters {sign} N = {n_rows} rows"
    if name != "auto":
        if plans[name] > available:
            other = "dual" if name == "primal" else "primal"
            instead = (
                f"solver={other} ({human(plans[other])}), " if plans[other] <= available else ""
            )
            raise MemoryPlanError(
                f"expected solver={name} to fit into {human(available)}, got a plan of"
                f" {human(plans[name])}; use {instead}fewer samples"
                " or more memory"
            )
        return Choice(name, f"asked for; {compared}", plans[name])
    if plans[first] <= available:
        return Choice(first, compared, plans[first])
    if plans[second] <= available:
        reason = f"{compared}, but {first} needs {human(plans[first])} of {human(available)}"
        return Choice(second, reason, plans[second])
    raise MemoryPlanError(
        f"expected an exact solver to fit into {human(available)}, got primal"
        f" {human(plans['primal'])} for P = {n_params} and dual {human(plans['dual'])} for"
        f" N = {n_rows}; audit a random subset of the training data, or use more memory"
    )


def choose(name: str, problem: Problem, penalty: Penalty) -> Choice:
    """`select` for this problem on its device."""
    check_name(name)
    plans = {key: solver.plan(problem, penalty) for key, solver in SOLVERS.items()}
    available = available_bytes(problem.device)
    return select(name, problem.n_params, problem.n_rows, plans, available)
