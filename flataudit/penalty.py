"""The penalty D of J(theta) = (1/n) sum l_i + theta' D theta / 2, and where it came from.

Everything is in the MEAN-loss convention: D is weight decay as torch.optim.SGD applies it to a
mean NLL. Where the training loss was c (mean NLL) + constant, D = D_train / c and 1/T becomes
1/(cT). Stopping after a time T keeps a direction of curvature h at the share 1 - exp(-hT), close
to h/(h + 1/T): early stopping acts as a penalty 1/T (theory: docs/method.md).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import InputError
from flataudit.results import PenaltyInfo
from flataudit.training import TrainingRecord

ADAM_EPS = 1e-8  # torch's default: keeps D above 0 where a parameter never sees a gradient

PenaltyArgument = float | int | str | Mapping[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class GradientMoments:
    """Mean gradient and second moment diag(C) of the per-sample NLL gradients, by parameter."""

    mean: Mapping[str, Tensor]
    second: Mapping[str, Tensor]

    @property
    def trace(self) -> float:
        """tr(C), C the uncentred gradient covariance (empirical Fisher)."""
        return sum(float(t.sum()) for t in self.second.values())


@dataclass(frozen=True, slots=True, eq=False)
class EstimatorPenalty:
    """A model's own penalty: D by parameter name in units of its training loss, and its record."""

    decay: Mapping[str, float]
    record: TrainingRecord


def from_argument(argument: PenaltyArgument, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """D from a number for all parameters, or a number per parameter name (0: unpenalised).

    Raises:
        InputError: negative or not finite, unknown or missing names.
    """
    if isinstance(argument, Mapping):
        unknown = sorted(set(argument) - set(params))
        missing = sorted(set(params) - set(argument))
        if unknown or missing:
            problem = f"unknown {unknown[0]!r}" if unknown else f"no value for {missing[0]!r}"
            raise InputError(
                f"expected a penalty for each of {', '.join(sorted(params))}, got {problem};"
                " give 0 for unpenalised parameters"
            )
        values = {name: _checked(argument[name], name) for name in params}
    else:
        values = dict.fromkeys(params, _checked(argument, "the penalty"))
    return {name: _full(params[name], value) for name, value in values.items()}


def from_training(
    record: TrainingRecord,
    problem: Problem,
    moments: GradientMoments,
    loss_scale: float,
    decay: Mapping[str, float] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """D from weight decay plus training time, and the objective's own part of it.

    sgd: (w + 1/T)/c. adam: (w + s_j/sum_lr)/c. adamw: (w + 1/sum_lr) s_j/c, with
    s_j = sqrt(v_j) + eps and v_j the second moment of the mini-batch gradient of the training
    loss at the final weights: gbar_j^2 + (diag(C)_j - gbar_j^2)/b (n-b)/(n-1), which counts
    sampling without replacement; L2-Adam's gbar includes w theta_j. converged: w/c.
    loss_scale c: training loss = c (mean NLL) + constant. w and the learning rates are those of
    the parameter's group, where the record has groups; decay: w by parameter name where it is
    not the record's.

    Raises:
        InputError: a group that names no parameter of the model.
    """
    c, n = loss_scale, problem.n_samples
    records = record.by_parameter(problem.params)
    total: dict[str, Tensor] = {}
    objective: dict[str, Tensor] = {}
    for name, p in problem.params.items():
        record = records[name]
        w = record.weight_decay if decay is None else decay[name]
        objective[name] = _full(p, w / c)
        if record.optimizer == "converged":
            total[name] = objective[name]
            continue
        if record.optimizer == "sgd":
            total[name] = _full(p, (w + 1.0 / record.training_time()) / c)
            continue
        assert record.batch_size is not None
        batch = min(record.batch_size, n)
        spread = (moments.second[name] - moments.mean[name].square()).clamp_min(0.0)
        spread = c * c * spread / batch * (n - batch) / max(n - 1, 1)
        centre = c * moments.mean[name]
        if record.optimizer == "adam":
            root = (spread + (centre + w * p.detach()).square()).sqrt() + ADAM_EPS
            total[name] = (w + root / record.total_lr) / c
        else:
            root = (spread + centre.square()).sqrt() + ADAM_EPS
            total[name] = (w + 1.0 / record.total_lr) * root / c
            objective[name] = w * root / c
    if not all(bool(torch.isfinite(d).all()) for d in (*total.values(), *objective.values())):
        raise InputError(
            "expected a training record that gives a finite penalty, got one out of float64's"
            " range; check the learning rates, the weight decay and the scale of the targets"
        )
    return total, objective


def evidence(
    soft_rank_at: Callable[[float], float],
    limit: int,
    params: Mapping[str, Tensor],
    n: int,
    *,
    tolerance: float = 1e-6,
) -> float:
    """MacKay's fixed point lambda = softrank_lambda / (n |theta|^2).

    It is unique: one side falls in lambda, the other rises. `tolerance` is relative, in lambda.

    soft_rank_at: the soft rank at a scalar penalty; limit: its supremum, min(P, N). It makes
    early-stopped networks' estimates too large, as penalty_unknown says with numbers.
    """
    norm = n * sum(float(p.detach().double().square().sum()) for p in params.values())
    if not norm > 0 or not math.isfinite(norm):
        raise InputError(
            "expected weights that are not all zero, got |theta| = 0; give the penalty or the"
            " training record"
        )

    def excess(log_penalty: float) -> float:
        return soft_rank_at(math.exp(log_penalty)) - norm * math.exp(log_penalty)

    high = math.log(limit / norm)
    low = high
    for _ in range(40):
        low -= math.log(10.0)
        if excess(low) > 0:
            return math.exp(brentq(excess, low, low + math.log(10.0), xtol=tolerance, rtol=1e-9))
    raise InputError(
        "expected curvature above rounding error, got a model whose outputs hardly depend on its"
        " parameters; give the penalty or the training record"
    )


def stationarity(
    objective: Mapping[str, Tensor], problem: Problem, mean: Mapping[str, Tensor]
) -> float:
    """|gbar + D theta| / |gbar| with the objective's own D: 0 at its minimum.

    A gradient of exactly zero counts as stationary; what float64 cannot hold is its largest number.
    """
    scale = norm(mean.values())
    residual = remaining_gradient(objective, problem, mean)
    return min(residual / scale, sys.float_info.max) if scale > 0 else 0.0


def remaining_gradient(
    objective: Mapping[str, Tensor], problem: Problem, mean: Mapping[str, Tensor]
) -> float:
    """|gbar + D theta|."""
    return norm(mean[name] + objective[name] * p.detach() for name, p in problem.params.items())


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all entries of all tensors, whose squares may overflow."""
    flat = torch.cat([t.flatten().to(torch.float64) for t in tensors])
    largest = float(flat.abs().max())
    if not 0.0 < largest < math.inf:
        return largest
    return largest * float((flat / largest).square().sum().sqrt())


def describe(
    penalty: Mapping[str, Tensor],
    source: str,
    record: TrainingRecord | None,
    residual: float | None,
) -> PenaltyInfo:
    """The penalty as the report shows it."""
    values = torch.cat([d.flatten() for d in penalty.values()])
    tied = values[values > 0]
    low, high = (float(tied.min()), float(tied.max())) if len(tied) else (0.0, 0.0)
    return PenaltyInfo(
        value=low if low == high else None,
        free_params=int((values == 0).sum()),
        source=source,  # type: ignore[arg-type]  # one of the contract's four, from audit.py
        training=None if record is None else record.to_dict(),
        stationarity=residual,
        low=low,
        high=high,
        assumptions=() if record is None else record.assumptions,
    )


def _checked(value: float | int | str, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InputError(
            f"expected {name} to be a number of at least 0, got {value!r}; it is the weight decay"
            " of a mean loss, or 'auto'"
        )
    return number


def _full(p: Tensor, value: float) -> Tensor:
    return torch.full_like(p.detach(), value, dtype=torch.float64)
