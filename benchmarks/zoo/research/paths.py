"""The zoo's networks trained again with their path kept: does what helps in `training` help there?

    python -m benchmarks.zoo.research.paths [--store FOLDER] [--data FOLDER] [--only PATTERN]

Networks of classes in the decision list's open branch with at most MOST parameters. Training is
reproducible: own_nll is to be compared with the training NLL of the registered model. Columns:

    path, loo_AVERAGE, info_AVERAGE, tic_AVERAGE, rank_AVERAGE   as in `training`
    twice_ESTIMATE      soft_rank, loo and recalibrated at twice the training time: the control
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.data import Unavailable
from benchmarks.zoo.draw import Drawn, draw
from benchmarks.zoo.grid import Cell, by_name
from benchmarks.zoo.research.command import open_branch, run
from benchmarks.zoo.research.path_estimates import along_path, flow_metric, with_path
from benchmarks.zoo.research.recalibrate import accuracy_scale
from benchmarks.zoo.rules import Row
from benchmarks.zoo.store import row_path, sources_of, write_row
from flataudit import FlatauditError, estimates
from flataudit.families import Categorical
from flataudit.solvers import FunctionalVariance

Json = dict[str, Any]

KIND = "research_paths"
MOST = 2500  # parameters: the path's eigenvectors are a P x P matrix


def retraced(cell: Cell, drawn: Drawn) -> Json:
    """The row of one network of the zoo, trained again."""
    network, record, path = with_path(cell, drawn)
    fit, _ = penalised(cell, network, record, drawn)
    problem, family = fit.problem, fit.problem.family
    assert isinstance(family, Categorical)
    row: Json = {"own_nll": float(family.nll(problem.outputs, problem.y).mean())}
    row |= along_path(fit, record, path)
    metric, penalty, decay = flow_metric(fit, record)
    half = 0.5 * (penalty - decay) / penalty  # of D' = p M, what 1/T is, halved
    twice = {name: d - half * metric[name] for name, d in fit.penalty.items()}
    variance = fit.variance_at(twice)
    assert isinstance(variance, FunctionalVariance)
    row["twice_soft_rank"] = float(estimates.soft_rank(variance).mean())
    left = estimates.loo(variance, problem.factor.residual, family, problem.outputs, problem.y)
    if left is not None:
        row["twice_loo"] = float(left.psi.mean())
        scale = accuracy_scale(family, problem.outputs, (left.outputs, problem.y))
        scaled = fit.variance_at(twice, scale)
        assert isinstance(scaled, FunctionalVariance)
        row["twice_recalibrated"] = float(estimates.soft_rank(scaled).mean())
        row["twice_scale"] = scale
    return {k: float(v) if math.isfinite(v) else None for k, v in row.items()}


def retrace_cell(cell: Cell, options: Json) -> Json:
    """Trains one cell again and writes its row; {name, state, seconds}."""
    torch.set_num_threads(1)
    path = row_path(options["store"], KIND, cell)
    if path.is_file():
        return {"name": cell.name, "state": "skipped"}
    started = time.perf_counter()
    try:
        row = retraced(cell, draw(cell, sources_of(options)))
    except Unavailable as missing:
        return {"name": cell.name, "state": "unavailable", "error": str(missing)}
    except FlatauditError as error:
        return {"name": cell.name, "state": "failed", "error": str(error)}
    seconds = time.perf_counter() - started
    write_row(path, {"name": cell.name} | row | {"seconds": seconds})
    return {"name": cell.name, "state": "done", "seconds": seconds}


def chosen(rows: Sequence[Row]) -> list[Row]:
    """The networks of classes within MOST."""
    return [row for row in rows if row["task"] == "classification" and row["n_params"] <= MOST]


if __name__ == "__main__":
    zoo = by_name()
    sys.exit(
        run(
            __doc__,
            [(row["name"], zoo[row["name"]]) for row in chosen(open_branch())],
            retrace_cell,
        )
    )
