"""Writing a training record: one line in a training script, or a recorder around it.

`log_training` knows the optimizer's settings and replays the scheduler on a stand-in to get the
learning rate of each step; `TrainingRecorder` watches the steps themselves, which works for any
schedule. Neither changes the optimizer, the scheduler or the model. Both write the artifact that
the audit reads first (`flataudit/training.json`).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from flataudit.errors import InputError
from flataudit.schedules import replayed_rates
from flataudit.training import TRAINING_ARTIFACT, TrainingRecord, parse_training

SUPPORTED = "torch.optim.SGD, Adam and AdamW"
_KINDS: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
}
Rates = NDArray[np.float64]  # (steps, groups): the learning rate of each step


def log_training(
    optimizer: torch.optim.Optimizer,
    scheduler: Any = None,
    steps: int | None = None,
    batch_size: int | None = None,
    *,
    loss: str | None = None,
    model: nn.Module | None = None,
    scheduler_every: int | None = None,
    run_id: str | None = None,
) -> dict[str, Any]:
    """Writes how a model was trained to its MLflow run, so that its audit need not guess.

    Call it after training (or before: then that the plan was followed is an assumption of the
    record). The learning rates are exact: constant, or the scheduler's own, replayed from the start
    on a stand-in and compared with where the optimizer's rate is now.

    Args:
        optimizer: torch.optim.SGD, Adam or AdamW.
        scheduler: torch's learning rate scheduler, where there is one; those that react to a
            metric need `TrainingRecorder`.
        steps: Optimizer steps of the whole run; Adam's own count where not given.
        batch_size: Samples per step; Adam and AdamW need it.
        loss: nll (default of classifiers), mse or half_mse: what was minimised.
        model: Names the parameters, which differing parameter groups need.
        scheduler_every: Optimizer steps per `scheduler.step()`; by default from its own count.
        run_id: The run; by default the active one.

    Returns:
        The record, as `flataudit.audit(..., training=record)` takes it.

    Raises:
        InputError: another optimizer or scheduler, or settings that contradict each other.
        StoreError: the record cannot be written.
    """
    _kind(optimizer)
    taken = _steps(optimizer, steps)
    rates, assumptions = replayed_rates(optimizer, scheduler, taken, scheduler_every)
    record = make_record(optimizer, rates, batch_size, loss, model, assumptions)
    return write_record(record, run_id)


class TrainingRecorder:
    """Records each step's learning rates by a hook on the optimizer; exact for any schedule.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    >>> with TrainingRecorder(optimizer, batch_size=8) as recorder:
    ...     for _ in range(4):
    ...         optimizer.step()
    >>> recorder.record().sum_lr
    2.0
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        batch_size: int | None = None,
        *,
        loss: str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        _kind(optimizer)
        self._optimizer = optimizer
        self._settings = (batch_size, loss, model)
        self._rates: list[list[float]] = []
        self._hook = optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._rates.append([float(group["lr"]) for group in optimizer.param_groups])

    def record(self) -> TrainingRecord:
        """The record of the steps so far.

        Raises:
            InputError: no step was taken, or a group was added on the way.
        """
        if not self._rates:
            raise InputError(
                "expected optimizer steps to record, got none; make the recorder before training"
            )
        if len({len(row) for row in self._rates}) > 1:
            raise InputError(
                "expected the same parameter groups in every step, got groups added on the way;"
                " give the penalty by parameter"
            )
        rates = np.array(self._rates)
        return make_record(self._optimizer, rates, *self._settings, assumptions=())

    def log(self, run_id: str | None = None) -> dict[str, Any]:
        """Writes the record to the run, by default the active one; returns it."""
        return write_record(self.record(), run_id)

    def close(self) -> None:
        """Takes the hook off the optimizer."""
        self._hook.remove()

    def __enter__(self) -> TrainingRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def make_record(
    optimizer: torch.optim.Optimizer,
    rates: Rates,
    batch_size: int | None,
    loss: str | None,
    model: nn.Module | None,
    assumptions: tuple[str, ...],
) -> TrainingRecord:
    """The record from the optimizer's settings and the learning rates of each step and group.

    Raises:
        InputError: groups that differ in more than weight decay and learning rate, or without
            names; variants whose effect is not known.
    """
    kind = _kind(optimizer)
    groups = optimizer.param_groups
    for option in ("maximize", "amsgrad"):
        if any(group.get(option) for group in groups):
            raise InputError(
                f"expected an optimizer without {option}, got {option}=True; its training time is"
                " not known: give the audit a penalty"
            )
    momentum = _common(groups, "momentum", kind)
    dampening = _common(groups, "dampening", kind)
    nesterov = bool(_common(groups, "nesterov", kind))
    values: list[dict[str, Any]] = []
    for at, group in enumerate(groups):
        column = rates[:, at]
        found = {"weight_decay": float(group["weight_decay"]), "sum_lr": math.fsum(column)}
        if kind == "sgd":
            found["time"] = _time(column, momentum, dampening, nesterov)
        values.append(found)
    sizes = [sum(p.numel() for p in group["params"]) for group in groups]
    rest = values[int(np.argmax(sizes))]
    differing: list[dict[str, Any]] = []
    if model is not None or any(found != rest for found in values):
        names = _names(optimizer, model)
        differing = [
            {"parameters": names[at], **found}
            for at, found in enumerate(values)
            if found != rest and names[at]
        ]
    return parse_training(
        {
            "optimizer": kind,
            **rest,
            "steps": len(rates),
            "momentum": momentum,
            "dampening": dampening,
            "batch_size": batch_size,
            "loss": loss,
            "groups": differing,
            "assumptions": assumptions,
        }
    )


def write_record(record: TrainingRecord, run_id: str | None) -> dict[str, Any]:
    """Writes `flataudit/training.json` to the run, by default the active one.

    Raises:
        InputError: no run.
        StoreError: the store failed.
    """
    import mlflow

    from flataudit.results import to_json
    from flataudit.store import store_errors

    if run_id is None:
        active = mlflow.active_run()
        if active is None:
            raise InputError(
                "expected an active MLflow run or run_id, got neither; call it inside"
                " mlflow.start_run(), or give run_id"
            )
        run_id = active.info.run_id
    values: dict[str, Any] = to_json(record.to_record())
    with store_errors(f"log the training record to run {run_id}"):
        mlflow.MlflowClient().log_dict(run_id, values, TRAINING_ARTIFACT)
    return values


def _kind(optimizer: Any) -> str:
    kind = _KINDS.get(type(optimizer))
    if kind is None:
        raise InputError(
            f"expected one of {SUPPORTED}, got {type(optimizer).__name__}, whose training time is"
            " not known; give the audit a penalty"
        )
    decoupled = [bool(group.get("decoupled_weight_decay")) for group in optimizer.param_groups]
    return "adamw" if kind == "adam" and all(decoupled) else kind


def _steps(optimizer: torch.optim.Optimizer, steps: int | None) -> int:
    """The number of steps, compared with Adam's own count where it has one."""
    counts = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    counted = max(counts, default=0)
    if steps is None and counted:
        return counted
    if steps is None or steps != int(steps) or steps < 1:
        raise InputError(
            f"expected steps to be the number of optimizer steps, got {steps!r}; give the whole"
            " run's: epochs times batches per epoch"
        )
    if counted and counted != steps:
        raise InputError(
            f"expected steps={counted}, which the optimizer counted, got {steps}; leave steps out"
        )
    return int(steps)


def _time(rates: Rates, momentum: float, dampening: float, nesterov: bool) -> float:
    """SGD's training time: step t counts lr_t (1 - m^t)/(1 - m), as in `TrainingRecord`; Nesterov's
    looks one power of m ahead."""
    if momentum == 0.0:
        return math.fsum(rates)
    powers = np.arange(1, len(rates) + 1) + nesterov
    weights = -np.expm1(powers * math.log(momentum)) / (1.0 - momentum)
    return (1.0 - dampening) * math.fsum(rates * weights)


def _common(groups: list[dict[str, Any]], key: str, kind: str) -> float:
    found = {float(group.get(key, 0.0)) for group in groups} if kind == "sgd" else {0.0}
    if len(found) > 1:
        raise InputError(
            f"expected one {key} for all parameter groups, got {sorted(found)}; give the audit a"
            " penalty by parameter"
        )
    return found.pop()


def _names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[list[str]]:
    """The model's parameter names by group of the optimizer."""
    if model is None:
        raise InputError(
            "expected model=... with parameter groups that differ in weight decay or learning rate,"
            " got none; give the model, whose parameters it names"
        )
    model = _unwrapped(model)
    named: dict[int, str] = {id(p): name for name, p in model.named_parameters()}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in trained
    ]
    if missing:
        raise InputError(
            f"expected the optimizer to hold every trained parameter of the model, got none of"
            f" {missing[0]!r}; set requires_grad=False on what was not trained"
        )
    return [
        [named[id(p)] for p in group["params"] if id(p) in named]
        for group in optimizer.param_groups
    ]


def _unwrapped(model: Any) -> Any:
    """The network inside torch.compile or (Distributed)DataParallel, as it is logged."""
    if hasattr(model, "_orig_mod"):
        return _unwrapped(model._orig_mod)
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return _unwrapped(model.module) if isinstance(model, wrappers) else model
