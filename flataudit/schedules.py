"""Learning rates that torch's schedulers gave, replayed on a stand-in optimizer.

Only schedulers whose rates follow from their settings can be replayed; the caller's own are never
touched: a copy is taken back to its start and stepped.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import lr_scheduler

from flataudit.errors import InputError

Rates = NDArray[np.float64]
_SINGLE = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.OneCycleLR,
    lr_scheduler.CyclicLR,
)
_RECORDER = "use flataudit.TrainingRecorder around the training loop"


def replayed_rates(
    optimizer: torch.optim.Optimizer, scheduler: Any, steps: int, every: int | None
) -> tuple[Rates, tuple[str, ...]]:
    """The learning rate of each step and group, (steps, groups), and what was assumed.

    every: optimizer steps per scheduler step; by default from the scheduler's own count, which is
    0 before training: then once per step, and the record says so.

    Raises:
        InputError: a scheduler that cannot be replayed, or rates that are not those of the
            optimizer.
    """
    now = _rates(optimizer)
    if scheduler is None:
        first = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
        if not np.allclose(first, now, rtol=1e-9, atol=0.0):
            raise InputError(
                "expected a constant learning rate without a scheduler, got one that a scheduler"
                f" set from {first[0]:g} to {now[0]:g}; give the scheduler"
            )
        return np.tile(now, (steps, 1)), ("constant learning rate: no scheduler was given",)
    if getattr(scheduler, "optimizer", None) is not optimizer:
        raise InputError(
            f"expected a scheduler of this optimizer, got {type(scheduler).__name__} of another;"
            " give the two that trained the model"
        )
    twin = _from_the_start(scheduler, _stand_in(optimizer))
    taken = _taken(scheduler)
    assumptions: tuple[str, ...] = ()
    if every is None:
        every = _every(taken, steps)
        if taken == 0:
            assumptions = (
                f"the scheduler takes one step per optimizer step, {steps} in all: the record was"
                " written before training",
            )
    elif every < 1:
        raise InputError(f"expected scheduler_every of at least 1, got {every}; see its meaning")
    needed = max((steps - 1) // every, taken)
    states = [_rates(twin.optimizer)]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(needed):
                twin.step()
                states.append(_rates(twin.optimizer))
    except Exception as error:
        raise InputError(
            f"expected {type(scheduler).__name__} to go on for {needed} steps, got:"
            f" {' '.join(str(error).split())}; check steps and scheduler_every"
        ) from error
    if not np.allclose(states[taken], now, rtol=1e-7, atol=1e-12):
        raise InputError(
            f"expected a learning rate of {states[taken][0]:.6g} after {taken} scheduler steps, got"
            f" {now[0]:.6g}; it was changed otherwise: {_RECORDER}"
        )
    rates = np.array(states)[np.arange(steps) // every]
    return rates, assumptions


def _every(taken: int, steps: int) -> int:
    """Optimizer steps per scheduler step, from the scheduler's count after training."""
    if taken == 0 or taken in (steps, steps - 1):
        return 1
    if taken < steps and steps % taken == 0:
        return steps // taken
    raise InputError(
        f"expected the scheduler stepped at a fixed interval, got {taken} of its steps in {steps}"
        f" optimizer steps; give scheduler_every, or {_RECORDER}"
    )


def _taken(scheduler: Any) -> int:
    """Steps of the scheduler so far; a ChainedScheduler counts in its parts."""
    parts = getattr(scheduler, "_schedulers", None)
    if type(scheduler) is lr_scheduler.ChainedScheduler and parts:
        return _taken(parts[0])
    return int(scheduler.last_epoch)


def _rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _stand_in(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the groups' settings at the start, over one number each."""
    groups = []
    for group in optimizer.param_groups:
        settings = {key: copy.copy(value) for key, value in group.items() if key != "params"}
        settings.pop("param_names", None)
        settings["lr"] = float(group.get("initial_lr", group["lr"]))
        groups.append({"params": [torch.nn.Parameter(torch.zeros(1))], **settings})
    return torch.optim.SGD(groups, lr=1.0)


def _from_the_start(scheduler: Any, stand_in: torch.optim.Optimizer) -> Any:
    """A copy of the scheduler on the stand-in, before any of its steps."""
    parts = getattr(scheduler, "_schedulers", None)
    if type(scheduler) is lr_scheduler.SequentialLR and parts:
        twins = [_from_the_start(part, stand_in) for part in parts]
        return lr_scheduler.SequentialLR(stand_in, twins, list(scheduler._milestones))
    if type(scheduler) is lr_scheduler.ChainedScheduler and parts:
        twins = [_from_the_start(part, stand_in) for part in parts]
        return lr_scheduler.ChainedScheduler(twins, stand_in)
    if type(scheduler) not in _SINGLE:
        raise InputError(
            f"expected a scheduler whose rates follow from its settings, got"
            f" {type(scheduler).__name__}, which cannot be replayed; {_RECORDER}"
        )
    if getattr(scheduler, "cycle_momentum", False) and "momentum" in scheduler.optimizer.defaults:
        raise InputError(
            f"expected a constant momentum, got {type(scheduler).__name__} with"
            " cycle_momentum=True, whose training time is not known; give the audit a penalty"
        )
    twin = object.__new__(type(scheduler))
    for key, value in vars(scheduler).items():  # the user's own functions are shared, not copied
        vars(twin)[key] = copy.copy(value) if isinstance(value, list | dict) else value
    twin.optimizer = stand_in
    twin.last_epoch = -1
    if isinstance(twin, lr_scheduler.CosineAnnealingWarmRestarts):
        twin.T_i, twin.T_cur = twin.T_0, -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin._initial_step()
    return twin
