"""Training with its path kept, and the estimates along it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.zoo.draw import Drawn
from benchmarks.zoo.fit import MOMENTUM, fit_network, tensors
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.research.curvature import (
    RankAt,
    categorical_variance,
    functional_variance,
    gap_of_energy,
    left_out_outputs,
    rise,
    scaled_jacobian,
    square_root,
    undo_own_training,
)
from benchmarks.zoo.research.trajectory import (
    AVERAGES,
    Path,
    average_weights,
    averaged,
    checkpoints,
    path_shift,
    times_of,
)
from flataudit.families import Categorical
from flataudit.fitting import PenalisedFit
from flataudit.solvers import FunctionalVariance
from flataudit.training import TrainingRecord

Json = dict[str, Any]

CHECKPOINTS = 40


def with_path(cell: Cell, drawn: Drawn) -> tuple[nn.Module, TrainingRecord, Path]:
    """The trained network, its record and the outputs at its checkpoints, in eval mode.

    With early stopping the path ends where the weights stand.
    """
    per_epoch = math.ceil(len(drawn.train) / cell.batch_size)
    planned = cell.epochs * per_epoch
    wanted = set(checkpoints(planned, CHECKPOINTS))
    x, _ = tensors(drawn.train, drawn.pools.task)
    kept: dict[int, Tensor] = {}

    def watch(network: nn.Module, step: int) -> None:
        if step in wanted:
            network.eval()
            with torch.no_grad():
                kept[step] = network(x).double()
            network.train()

    fitted = fit_network(cell, drawn, watch)
    assert fitted.epochs is not None
    last = fitted.epochs * per_epoch
    with torch.no_grad():
        kept[last] = fitted.model(x).double()
    steps = sorted(step for step in kept if step <= last)
    momentum = MOMENTUM if cell.optimizer == "sgd" else 0.0  # Adam's record counts learning rates
    times = times_of(cell.schedule, planned, cell.lr, momentum)
    return fitted.model, fitted.record, Path(times[steps], torch.stack([kept[s] for s in steps]))


def flow_metric(
    fit: PenalisedFit, record: TrainingRecord
) -> tuple[dict[str, Tensor], float, float]:
    """(D', p, w): training moves theta by -M^-1 (gradient + w M theta) dt, D' = p M, p = w + 1/T.

    M is the identity for SGD, sqrt(v_j) for Adam and AdamW; T the integrated learning rate. The
    weight decay of Adam, which M divides, is left out: p = 1/T.
    """
    w = record.weight_decay
    if record.optimizer == "adam":
        return {name: d - w for name, d in fit.penalty.items()}, 1.0 / record.total_lr, 0.0
    time = record.training_time() if record.optimizer == "sgd" else record.total_lr
    return dict(fit.penalty), w + 1.0 / time, w


def along_path(
    fit: PenalisedFit, record: TrainingRecord, path: Path, *, both: bool = False
) -> Json:
    """The estimates with residuals, or Lambda, averaged over the checkpoints; `path`; `undone`.

    both: also those with the two averaged together.
    """
    problem, family = fit.problem, fit.problem.family
    assert isinstance(family, Categorical)
    assert isinstance(fit.variance, FunctionalVariance)
    f, y, root = problem.outputs, problem.y, problem.factor.root
    jacobian = scaled_jacobian(problem, fit.penalty)
    outputs = torch.cat([path.outputs[:-1], f[None]])  # the last: the audit's own, in float64
    residuals = torch.stack([family.residual(at, y) for at in outputs])
    variances = [categorical_variance(torch.log_softmax(at, dim=1)) for at in outputs]
    final = variances[-1]
    a, rank_at = functional_variance(jacobian, root), RankAt(jacobian)
    row: Json = {}
    for kind in AVERAGES:
        weights = average_weights(path.times, kind)
        r = averaged(residuals, weights)
        between = averaged(torch.stack(variances), weights)
        left = left_out_outputs(a, final, r, f)
        row |= {
            f"rank_{kind}": rank_at(square_root(between)),
            f"tic_{kind}": gap_of_energy(a, r),
            f"loo_{kind}": rise(family, left, f, y),
            f"info_{kind}": gap_of_energy(a, family.residual(left, y)),
        }
        if both:
            wide = functional_variance(jacobian, square_root(between))
            moved = left_out_outputs(wide, between, r, f)
            row[f"tic_{kind}_both"] = gap_of_energy(wide, r)
            row[f"loo_{kind}_both"] = rise(family, moved, f, y)
    metric, penalty, decay = flow_metric(fit, record)
    if record.optimizer == "adam":  # D is not a multiple of its metric
        jacobian = scaled_jacobian(problem, metric)
    shift = path_shift(jacobian, root, residuals, path.times, penalty, decay)
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    corrected = torch.linalg.solve(eye - a @ final, shift[:, :, None])[:, :, 0]
    row["path"] = rise(family, f + corrected, f, y)
    row["undone"] = rise(family, undo_own_training(fit.variance, family, f, y), f, y)
    return row
