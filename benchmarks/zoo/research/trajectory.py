"""What training went through on the way: outputs at checkpoints, and averages over them.

Times are integrated learning rates, as `TrainingRecord.training_time` has them. Under gradient flow
a direction of curvature h has moved by the integral of exp(-(T - t) h) times the residuals, which
the estimates replace by the final residuals over h + 1/T: too small where those have vanished.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.zoo.fit import MOMENTUM, rate_at

Floats = NDArray[np.float64]

AVERAGES = ("time", "plain", "early")


@dataclass(frozen=True, slots=True, eq=False)
class Path:
    """Outputs on the training samples at checkpoints, (c, n, K), at times (c,) that rise."""

    times: Floats
    outputs: Tensor


def times_of(schedule: str, steps: int, lr: float, momentum: float = MOMENTUM) -> Floats:
    """Integrated learning rate after 0, 1, ..., `steps` steps of SGD with momentum, (steps + 1,).

    Step t, counted from 1, moves by lr_t (1 - m^t)/(1 - m) under a gradient of 1.
    """
    rates = lr * np.array([rate_at(schedule, step, steps) for step in range(steps)])
    weights = (1.0 - momentum ** np.arange(1, steps + 1)) / (1.0 - momentum)
    return np.concatenate([[0.0], np.cumsum(rates * weights)])


def rate_for(time: float, schedule: str, steps: int, momentum: float = MOMENTUM) -> float:
    """The schedule's largest learning rate with which `steps` steps take the time `time`."""
    return time / float(times_of(schedule, steps, 1.0, momentum)[-1])


def checkpoints(steps: int, count: int) -> list[int]:
    """Steps at which to look: the first and the last, half of the others evenly, half by ratio."""
    even = np.linspace(0, steps, count // 2)
    ratio = np.geomspace(1, steps, count // 2)
    return sorted({int(step) for step in np.round(np.concatenate([even, ratio]))})


def average_weights(times: Floats, kind: str) -> Floats:
    """Weights (c,) of the checkpoints that sum to 1.

    time: the trapezoid rule over time; plain: all alike; early: as time, up to half of it; final:
    the last alone. Of a single checkpoint all are 1.

    >>> average_weights(np.array([0.0, 1.0, 4.0]), "time").tolist()
    [0.125, 0.5, 0.375]
    """
    if kind not in ("final", *AVERAGES):
        raise KeyError(f"unknown average {kind!r}; choose one of: final, {', '.join(AVERAGES)}")
    count = len(times)
    if kind == "final" or count == 1:
        return np.eye(count)[-1]
    if kind == "plain":
        return np.full(count, 1.0 / count)
    used = times <= (times[-1] if kind == "time" else times[-1] / 2)
    weights = np.zeros(count)
    gaps = np.diff(times[used])
    weights[: len(gaps)] += gaps / 2
    weights[1 : len(gaps) + 1] += gaps / 2
    total = weights.sum()
    return weights / total if total > 0 else np.eye(count)[0]


def averaged(values: Tensor, weights: Floats) -> Tensor:
    """The weighted mean over checkpoints, (n, ...)."""
    return torch.tensordot(torch.as_tensor(weights), values, dims=1)


def path_shift(
    jacobian: Tensor, root: Tensor, residuals: Tensor, times: Floats, penalty: float, decay: float
) -> Tensor:
    """The shift (n, K) that leaving i out causes, by its residuals along the path.

    J_i [integral of exp(-(T - t)(G + w)) dt] J_i'r_i(t) / n, with J and G at the end, residuals
    linear between the checkpoints' means. jacobian: scaled by the scalar penalty w + 1/T; decay: w.
    With constant residuals it is A_i r_i but for exp(-T h) in place of 1/T.
    """
    b = (root.mT @ jacobian).flatten(0, 1)
    values, vectors = torch.linalg.eigh(b.T @ b)
    rate = penalty * values.clamp_min(0.0) + decay
    left = torch.as_tensor(times[-1] - times)  # time that is left at each checkpoint
    moved = jacobian @ vectors
    total = torch.zeros(len(jacobian), len(values), dtype=torch.float64)
    for at in range(1, len(times)):
        first, last = float(left[at - 1]), float(left[at])
        # (exp(-last rate) - exp(-first rate))/rate, also where rate is 0.
        share = torch.exp(-last * rate) * -torch.expm1(-(first - last) * rate)
        weight = torch.where(rate > 0, share / rate.clamp_min(1e-300), first - last)
        r = (residuals[at - 1] + residuals[at]) / 2
        total += weight * (moved.mT @ r[:, :, None])[:, :, 0]
    return penalty * (moved @ total[:, :, None])[:, :, 0]
