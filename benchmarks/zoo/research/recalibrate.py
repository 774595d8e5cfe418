"""Recalibrated soft ranks of the networks in the decision list's open branch, by many Lambdas.

    python -m benchmarks.zoo.research.recalibrate [--store FOLDER] [--data FOLDER] [--only PATTERN]

In an order drawn once within each data set, so that a pass that is stopped leaves a stratified
sample. Lambda of the recalibrated probabilities q is diag(q) - q q'; J and D stay as they are, and
one Jacobian per model serves every variant. A row holds, for VARIANT = SOURCE_METHOD, the
recalibrated soft rank's gap and VARIANT_sharper, whether the mean training confidence rose:

    SOURCE  loo: the leave-one-out outputs; heldout: 200 labels; test: the test pool, which no one
            has, to see what recalibration could bring at best
    METHOD  accuracy: the scale on the logits at which the mean training confidence is the source's
            accuracy (the package's); temperature, logistic, beta: netcal's scalings
    loo_root: at the square root of the scale; loo_again: the scale from the recalibrated model's
            own leave-one-out accuracy

and three estimates that need no recalibration's soft rank: loo, loo_recalibrated and
tic_recalibrated (of the model with scaled logits), undone (`curvature.undo_own_training`).
"""

from __future__ import annotations

import contextlib
import io
import math
import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.draw import Drawn
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import registered_cell
from benchmarks.zoo.research.command import open_branch, run
from benchmarks.zoo.research.curvature import RankAt, rise, scaled_jacobian, undo_own_training
from flataudit import estimates
from flataudit.curvature.problem import predict
from flataudit.families import Categorical, log_probabilities
from flataudit.fitting import PenalisedFit
from flataudit.judgement import class_labels, hit_rate, recalibration_scale
from flataudit.solvers import FunctionalVariance

Json = dict[str, Any]
Labelled = tuple[Tensor, Tensor]  # outputs (m, K) and labels (m,)

KIND = "recalibrated"
SCALINGS = {
    "temperature": "TemperatureScaling",
    "logistic": "LogisticCalibration",
    "beta": "BetaCalibration",
}
SMALLEST = 1e-30  # of a recalibrated probability: logarithms stay finite


def recalibrate_cell(name: str, options: Json) -> Json:
    """Writes the row of one registered cell; {name, state, seconds}."""

    def row(cell: Cell, uri: str, model: Any, record: Json | None, drawn: Drawn) -> Json:
        return {"name": name} | recalibrations(cell, model, record, drawn)

    return registered_cell(name, options, KIND, row, "recalibrate_seconds")


def recalibrations(cell: Cell, model: Any, record: Any, drawn: Drawn) -> Json:
    """Every variant of one network; empty where there are no classes."""
    if drawn.pools.task != "classification":
        return {}
    fit, network = penalised(cell, model, record, drawn)
    f, y, family = fit.problem.outputs, class_labels(fit.problem.y), fit.problem.family
    assert isinstance(family, Categorical)
    assert isinstance(fit.variance, FunctionalVariance)
    left_out = estimates.loo(fit.variance, fit.problem.factor.residual, family, f, y)
    assert left_out is not None
    sources: dict[str, Labelled] = {
        "loo": (left_out.outputs, y),
        "heldout": labelled(network, drawn.heldout),
        "test": labelled(network, drawn.test),
    }
    found: dict[str, Tensor] = {}
    for source, pair in sources.items():
        scale = accuracy_scale(family, f, pair)
        found[f"{source}_accuracy"] = torch.log_softmax(scale * f, dim=1)
        for method in SCALINGS if source != "test" else ("temperature",):
            found[f"{source}_{method}"] = scaled_by_netcal(method, pair, f)
    scale = accuracy_scale(family, f, sources["loo"])
    found["loo_root"] = torch.log_softmax(math.sqrt(scale) * f, dim=1)
    row, again = of_recalibrated(fit, scale)
    found["loo_again"] = torch.log_softmax(again * f, dim=1)
    before = confidence(torch.log_softmax(f, dim=1))
    rank_at = RankAt(scaled_jacobian(fit.problem, fit.penalty))
    for variant, log_q in found.items():
        row[variant] = rank_at(family.factor(log_q, y).root)
        row[f"{variant}_sharper"] = confidence(log_q) >= before
    undone = undo_own_training(fit.variance, family, f, y)
    row |= {
        "scale": scale,
        "soft_rank": float(estimates.soft_rank(fit.variance).mean()),
        "loo": float(left_out.psi.mean()),
        "undone": rise(family, undone, f, y),
    }
    return {key: value if math.isfinite(value) else None for key, value in row.items()}


def labelled(network: nn.Module, pool: Any) -> Labelled:
    """The network's outputs on a pool and its labels."""
    x = torch.as_tensor(np.asarray(pool.x)).double()
    return predict(network, x), torch.as_tensor(np.asarray(pool.y))


def confidence(log_p: Tensor) -> float:
    """The mean top-label probability."""
    return float(log_p.exp().amax(dim=1).mean())


def accuracy_scale(family: Categorical, f: Tensor, pair: Labelled) -> float:
    """The package's scale, for the accuracy of these outputs and labels."""
    log_p = log_probabilities(family, pair[0])
    assert log_p is not None
    scale = recalibration_scale(family, f, hit_rate(log_p, pair[1]))
    assert scale is not None
    return scale


def scaled_by_netcal(method: str, pair: Labelled, f: Tensor) -> Tensor:
    """log q (n, K): the probabilities at outputs f, recalibrated by a scaling fitted to `pair`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pyro, on its import, and of scipy's bounds
        from netcal import scaling

        found = getattr(scaling, SCALINGS[method])()
        # It prints where a class has no label.
        with contextlib.redirect_stdout(io.StringIO()):
            found.fit(probabilities(pair[0]), pair[1].numpy(), random_state=0, tensorboard=False)
            q = np.asarray(found.transform(probabilities(f)), dtype=np.float64)
    if q.ndim == 1:  # two classes: the probability of the second
        q = np.column_stack([1.0 - q, q])
    q = np.clip(q, SMALLEST, None)
    return torch.as_tensor(np.log(q / q.sum(axis=1, keepdims=True)))


def probabilities(f: Tensor) -> np.ndarray[Any, Any]:
    """Softmax as numpy, within [0, 1] in spite of rounding."""
    return np.clip(torch.softmax(f, dim=1).numpy(), 0.0, 1.0)


def of_recalibrated(fit: PenalisedFit, scale: float) -> tuple[Json, float]:
    """Leave-one-out and TIC of the model with scaled logits, and the scale by its own accuracy."""
    problem, family = fit.problem, fit.problem.family
    assert isinstance(family, Categorical)
    f, y = problem.outputs * scale, problem.y
    residual = family.factor(f, y).residual
    variance = fit.variance_at(fit.penalty, scale)
    assert isinstance(variance, FunctionalVariance)
    left_out = estimates.loo(variance, residual, family, f, y)
    row: Json = {"tic_recalibrated": float(estimates.tic(variance, residual).mean())}
    if left_out is None:
        return row | {"loo_recalibrated": math.nan}, scale
    again = accuracy_scale(family, problem.outputs, (left_out.outputs, class_labels(y)))
    return row | {"loo_recalibrated": float(left_out.psi.mean())}, again


if __name__ == "__main__":
    names = [row["name"] for row in open_branch()]
    sys.exit(run(__doc__, zip(names, names, strict=True), recalibrate_cell))
