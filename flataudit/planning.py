"""What an audit would cost: its sizes, its solver, that solver's memory, and about how long.

The model is loaded once and its outputs are computed once; nothing is factorised.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from flataudit import penalty as penalties
from flataudit import stages
from flataudit.config import AuditOptions
from flataudit.curvature.problem import Problem
from flataudit.labels import with_indices
from flataudit.models.sklearn import Subject, as_network
from flataudit.preparation import prepared_problem
from flataudit.sensitivity import wants_sensitivity
from flataudit.solvers import SOLVERS, choose
from flataudit.solvers.base import EIGENVALUE_LIMIT, SPECTRUM, Penalty, cholesky_work
from flataudit.tensors import as_pair

Json = dict[str, Any]

# Costs in floating-point operations at the speed of a matrix product, as measured on networks of
# 63 to 25,000 parameters; audits of more than a second took 0.6 to 2.5 times what they say.
EVIDENCE_SOLVES = 12.0  # trials of a search for the penalty where a spectrum would cost too much
LOGGING_SECONDS = 2.0  # figures, page and MLflow's writes, on two cores
_PROBE = 1024  # rows of the matrices whose product measures this machine


@dataclass(frozen=True, slots=True)
class Plan:
    """n_rows: N = n K' of the output space; bytes: the solver's peak; minutes: None if unknown."""

    n_samples: int
    n_params: int
    n_rows: int
    solver: str
    reason: str
    bytes: int
    minutes: float | None

    def to_dict(self) -> Json:
        return asdict(self)


def plan_audit(loaded: Json, options: AuditOptions) -> Plan:
    """The plan of the audit that `flataudit.stages.load` prepared; a child process makes it.

    Raises:
        InputError: whatever the audit itself would refuse before it factorises.
        MemoryPlanError: no exact solver fits.
        StoreError: the model's files cannot be had.
        DeadlineError, AuditFailedError: the model's code ran past the deadline, or crashed.
    """
    request = {"loaded": loaded, "options": options.model_dump()}
    spent = loaded["seconds"]
    return Plan(**stages.in_child("flataudit.planning:plan_here", request, options, spent=spent))


def plan_here(request: Json, progress: stages.Progress) -> Json:
    """`plan_audit` in this process: the model's code runs here."""
    from flataudit.models.classes import class_names
    from flataudit.models.registry import load_model

    started = time.perf_counter()
    loaded, options = request["loaded"], AuditOptions(**request["options"])
    source = stages.open_source(loaded, options)
    model = load_model(source)
    data = stages.read_data(loaded["train"], options, source)
    recorded = stages.read_record(loaded, options, source, len(data.y))[0] is not None
    classes = class_names(source, model) if data.y.dtype.kind == "U" else None
    subject = as_network(model, data.pair, None, options.family)
    train, _, names, _ = with_indices(subject.train, None, classes)
    train = as_pair(train, "train")
    _, problem = prepared_problem(subject, train, names, dispersion=1.0, device=options.device)
    penalty = penalties.from_argument(_penalty(subject, recorded, options), problem.params)
    choice = choose(options.solver, problem, penalty)
    reading = time.perf_counter() - started
    work = operations(
        choice.name,
        problem,
        penalty,
        varied=wants_sensitivity(options.sensitivity, problem),
        evidence=_needs_evidence(subject, recorded, options),
    )
    seconds = None if work is None else reading + work / operations_per_second() + LOGGING_SECONDS
    found = Plan(
        problem.n_samples,
        problem.n_params,
        problem.n_rows,
        choice.name,
        choice.reason,
        choice.peak_bytes,
        None if seconds is None else seconds / 60,
    )
    return found.to_dict()


def operations(
    solver: str, problem: Problem, penalty: Penalty, *, varied: bool, evidence: bool
) -> float | None:
    """Floating-point operations of an audit, about; None for a solver not known here.

    Each factorisation takes what the solver counts: one for the audit, one for the recalibrated
    model, two more where the penalty is varied, and the search for a penalty where none is known;
    eigenvalues where the matrix is small.
    """
    if solver not in SOLVERS:
        return None
    once = SOLVERS[solver].work(problem, penalty)
    p, n = float(problem.n_params), float(problem.n_rows)
    size = {"primal": p, "dual": n}
    small = min(p, n) <= EIGENVALUE_LIMIT
    solves = 2.0 + (2.0 if varied else 0.0) + (EVIDENCE_SOLVES if evidence and not small else 0.0)
    spectra = (1.0 + evidence) if small else 0.0
    return solves * once + spectra * SPECTRUM * cholesky_work(size[solver])


@cache
def operations_per_second() -> float:
    """Floating-point operations per second of a float64 matrix product here; takes some 0.1 s."""
    matrix = torch.full((_PROBE, _PROBE), 1e-3, dtype=torch.float64)
    _ = matrix @ matrix
    started = time.perf_counter()
    _ = matrix @ matrix
    return 2.0 * _PROBE**3 / (time.perf_counter() - started)


def _penalty(subject: Subject, recorded: bool, options: AuditOptions) -> Any:
    """One with the audit's unpenalised parameters, which is all that a plan depends on."""
    if options.penalty != "auto":
        return options.penalty
    own = subject.penalty
    if not recorded and own is not None and own.record.optimizer == "converged":
        return own.decay
    return 1.0


def _needs_evidence(subject: Subject, recorded: bool, options: AuditOptions) -> bool:
    """Whether nothing tells the penalty, so that it has to be searched for."""
    known = options.penalty != "auto" or recorded
    return not known and subject.penalty is None
