"""Networks trained for equal times by other schedules and batches, with their path kept.

    python -m benchmarks.zoo.research.training [--store FOLDER] [--data FOLDER] [--only PATTERN]

SGD with momentum for STEPS steps at the weight decay of the zoo. Within a group of SERIES all take
the same integrated learning rate T, the same number of steps, samples and initial weights: they
differ in the schedule (at batches of BATCH) or in the batch size (at a constant rate). LONG ones
take five times as many steps and time, until the residuals have vanished. Beside them MLPs by Adam
and AdamW, which have the truth and the audit alone.

A row holds the truth and the audit of the zoo's `measure`, and beside them

    time, noise         T; the mean learning rate over the batch size, 1/(1 - momentum) in it
    at_PHI_ESTIMATE     soft_rank, loo and recalibrated at the time PHI T in place of T
    rank_AVERAGE        soft rank with Lambda averaged over checkpoints; time, plain, early
    tic_AVERAGE, loo_AVERAGE, info_AVERAGE      with averaged residuals, Lambda the final one: TIC,
        leave-one-out, and TIC with the residuals of that leave-one-out (information ratio x soft
        rank; with the averaged residuals themselves that product is tic_AVERAGE)
    tic_AVERAGE_both, loo_AVERAGE_both          with averaged residuals and Lambda
    path, undone        `trajectory.path_shift` and `curvature.undo_own_training`
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.data import Unavailable
from benchmarks.zoo.draw import Drawn, draw
from benchmarks.zoo.fit import MOMENTUM, TrainingFailed
from benchmarks.zoo.grid import RATES, Cell
from benchmarks.zoo.measure import audits, pair, truth
from benchmarks.zoo.research.command import run
from benchmarks.zoo.research.curvature import RankAt, scaled_jacobian
from benchmarks.zoo.research.path_estimates import along_path, with_path
from benchmarks.zoo.research.recalibrate import accuracy_scale
from benchmarks.zoo.research.trajectory import rate_for
from benchmarks.zoo.rules import decided
from benchmarks.zoo.store import fields, row_path, sources_of, write_row
from flataudit import FlatauditError, estimates
from flataudit.calibration import is_saturated
from flataudit.families import Categorical
from flataudit.fitting import PenalisedFit
from flataudit.solvers import FunctionalVariance

Json = dict[str, Any]

KIND = "research_training"
STEPS = 1200
MEAN_RATE = 0.02
LONG = 5
BATCH = 40
BATCHES = (8, 100, 0)  # 0: all samples
SCHEDULES = ("constant", "step", "cosine", "one_cycle")
TASKS: dict[tuple[str, str], Json] = {
    ("fashion-mnist", "mlp"): {"n": 400, "width": 16, "depth": 1, "pooling": 4},
    ("satellite", "mlp"): {"n": 400, "width": 16, "depth": 1},
    ("letter", "mlp"): {"n": 800, "width": 16, "depth": 1},
    ("digits", "mlp"): {"n": 400, "width": 16, "depth": 1},
    ("fashion-mnist", "cnn"): {"n": 400, "width": 6, "depth": 2, "pooling": 2},
}
NOISE, SEEDS = (0.0, 0.2), (0, 1)
ADAPTIVE, EPOCHS = "adaptive", (60, 200)
FACTORS = (0.5, 1.0, 2.0, 4.0)  # PHI: of the training time


def cells() -> list[Cell]:
    """All networks of this experiment; a group of them shares time, samples and initial weights."""
    total = MEAN_RATE * STEPS / (1.0 - MOMENTUM)
    found = []
    for seed in SEEDS:
        for (data, architecture), shape in TASKS.items():
            for noise in NOISE:
                base = Cell(
                    f"series-{architecture}", data, architecture, shape["n"], 1e-3,
                    width=shape["width"], depth=shape["depth"], activation="relu",
                    pooling=shape.get("pooling", 1), label_noise=noise, optimizer="sgd", seed=seed,
                )  # fmt: skip
                found += [timed(base, schedule, BATCH, STEPS, total) for schedule in SCHEDULES]
                found += [timed(base, "constant", batch, STEPS, total) for batch in BATCHES]
                long = dataclasses.replace(base, block=f"long-{architecture}")
                found += [
                    timed(long, "constant", batch, LONG * STEPS, LONG * total)
                    for batch in (8, BATCH)
                ]
    return found + adaptive()


def adaptive() -> list[Cell]:
    """MLPs by Adam and AdamW, at the zoo's learning rate: does the soft rank suit them better?"""
    choices = itertools.product(SEEDS, EPOCHS, NOISE, ("adam", "adamw"), TASKS.items())
    return [
        Cell(
            f"{ADAPTIVE}-{architecture}", data, architecture, shape["n"], 1e-3,
            width=shape["width"], depth=shape["depth"], activation="relu",
            pooling=shape.get("pooling", 1), label_noise=noise, optimizer=optimizer,
            lr=RATES[optimizer], epochs=epochs, batch_size=BATCH, seed=seed,
        )
        for seed, epochs, noise, optimizer, ((data, architecture), shape) in choices
        if architecture == "mlp"
    ]  # fmt: skip


def timed(cell: Cell, schedule: str, batch: int, steps: int, total: float) -> Cell:
    """The cell with `steps` steps in the time `total`; steps must be whole epochs."""
    batch = batch or cell.n
    epochs, rest = divmod(steps, math.ceil(cell.n / batch))
    if rest:
        raise ValueError(f"expected whole epochs, got {steps} steps of {batch} of {cell.n} samples")
    lr = rate_for(total, schedule, steps)
    return dataclasses.replace(cell, schedule=schedule, batch_size=batch, epochs=epochs, lr=lr)


def name_of(cell: Cell) -> str:
    """Unique among `cells`."""
    noise = f"-noise{cell.label_noise:g}" * (cell.label_noise > 0)
    kind = f"{cell.schedule}-b{cell.batch_size}"
    if cell.optimizer != "sgd":
        kind = f"{cell.optimizer}-e{cell.epochs}"
    return f"{cell.block}-{cell.data}{noise}-{kind}-s{cell.seed}"


def train_cell(cell: Cell, options: Json) -> Json:
    """Trains, measures and writes one row; {name, state, seconds}."""
    torch.set_num_threads(1)
    name = name_of(cell)
    path = row_path(options["store"], KIND, cell)
    if path.is_file():
        return {"name": name, "state": "skipped"}
    started = time.perf_counter()
    try:
        row = measured(cell, draw(cell, sources_of(options)))
    except Unavailable as missing:
        return {"name": name, "state": "unavailable", "error": str(missing)}
    except (TrainingFailed, FlatauditError) as error:
        return {"name": name, "state": "failed", "error": str(error)}
    seconds = time.perf_counter() - started
    write_row(path, row | {"seconds": seconds})
    return {"name": name, "state": "done", "seconds": seconds}


def measured(cell: Cell, drawn: Drawn) -> Json:
    """The row of one network."""
    network, record, path = with_path(cell, drawn)
    train = pair(cell, drawn.train)
    report = audits(network, record.to_record(), train, "auto")["record"]()
    n, steps = cell.n, cell.epochs * math.ceil(cell.n / cell.batch_size)
    row = fields(cell) | {"name": name_of(cell)}
    row |= {"group": f"{cell.block}-{cell.data}-{cell.label_noise:g}-s{cell.seed}"}
    row |= truth(network, train, pair(cell, drawn.test), "auto", report)
    row |= {
        "n_train": n,
        "n_params": report.model.n_params,
        "train_nll": report.train.nll,
        "floor": float(np.std(report.samples.nll + report.samples.loo, ddof=1)) / math.sqrt(n),
        "time": float(path.times[-1]),
        "noise": float(path.times[-1]) / steps / cell.batch_size,
        "record_scale": None,
        "by_loo_saturated": is_saturated(report.calibration.saturation),
    }
    for key in ("verdict", "direction", "severity"):
        row[f"by_loo_{key}"] = getattr(report.calibration, key)
    for key in ("soft_rank", "tic", "loo", "soft_rank_recalibrated"):
        found = getattr(report.estimates, key)
        row[f"record_{key}"] = None if found is None else found.gap
        row[f"record_{key}_se"] = None if found is None else found.se
        if key == "soft_rank_recalibrated" and found is not None:
            row["record_scale"] = found.scale
    row["list"] = report.gap.value
    chosen = decided(row)
    row["estimator"] = None if chosen is None else chosen.estimator
    if cell.optimizer == "sgd":
        fit, _ = penalised(cell, network, record, drawn)
        row |= with_other_times(fit, cell.weight_decay)
        row |= along_path(fit, record, path, both=True)
    return {key: _plain(value) for key, value in row.items()}


def with_other_times(fit: PenalisedFit, decay: float) -> Json:
    """Soft rank, leave-one-out and recalibrated soft rank at multiples of the training time."""
    problem, family = fit.problem, fit.problem.family
    assert isinstance(family, Categorical)
    row: Json = {}
    for factor in FACTORS:
        penalty = {name: decay + (d - decay) / factor for name, d in fit.penalty.items()}
        rank_at = RankAt(scaled_jacobian(problem, penalty))
        variance = fit.variance_at(penalty)
        assert isinstance(variance, FunctionalVariance)
        left = estimates.loo(variance, problem.factor.residual, family, problem.outputs, problem.y)
        key = f"at_{factor:g}"
        row[f"{key}_soft_rank"] = rank_at(problem.factor.root)
        row[f"{key}_loo"] = None if left is None else float(left.psi.mean())
        if left is not None:
            scale = accuracy_scale(family, problem.outputs, (left.outputs, problem.y))
            root = family.factor(problem.outputs * scale, problem.y).root
            row[f"{key}_recalibrated"], row[f"{key}_scale"] = rank_at(root), scale
    return row


def _plain(value: Any) -> Any:
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    sys.exit(run(__doc__, [(name_of(cell), cell) for cell in cells()], train_cell))
