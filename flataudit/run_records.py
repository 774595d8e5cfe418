"""The training record that a run's params, learning rate metric and optimizer state allow.

Read are the names of mlflow.pytorch.autolog (Lightning), of transformers' Trainer and the usual
ones of plain log_params. What is filled in rather than read is listed in the record's
`assumptions`; an optimizer or a schedule that is not known gives no record, never a guess.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flataudit.errors import InputError
from flataudit.optimizer_state import OptimizerState
from flataudit.training import LOSSES, SCHEDULES, TrainingRecord, parse_training

_NAMES = {
    "optimizer": ("optimizer", "optimizer_name", "opt", "optim"),
    "sum_lr": ("sum_lr",),
    "lr": ("lr", "learning_rate"),
    "schedule": ("schedule", "scheduler", "lr_schedule", "lr_scheduler", "lr_scheduler_type"),
    "steps": ("steps", "max_steps", "n_steps", "num_steps", "total_steps"),
    "warmup_steps": ("warmup_steps", "num_warmup_steps"),
    "warmup_ratio": ("warmup_ratio",),
    "momentum": ("momentum",),
    "dampening": ("dampening",),
    "batch_size": ("batch_size", "train_batch_size", "per_device_train_batch_size"),
    "weight_decay": ("weight_decay", "wd"),
    "loss": ("loss",),
    "epochs": ("epochs", "max_epochs", "num_epochs", "n_epochs", "num_train_epochs"),
    "accumulated": ("gradient_accumulation_steps", "accumulate_grad_batches"),
    "smoothing": ("label_smoothing_factor", "label_smoothing"),
    "clip": ("max_grad_norm", "gradient_clip_val", "clip_grad_norm", "grad_clip"),
}
_ABSENT = ("", "none", "null", "-1", "-1.0")
_OPTIMIZERS = {"adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw"}
_SCHEDULES = {
    "cosineannealinglr": "cosine",
    "cosine_annealing": "cosine",
    "cosineannealing": "cosine",
    "cosine_with_warmup": "cosine",
    "cosine_schedule_with_warmup": "cosine",
    "get_cosine_schedule_with_warmup": "cosine",
    "linear_decay": "linear",
    "linear_with_warmup": "linear",
    "linear_schedule_with_warmup": "linear",
    "get_linear_schedule_with_warmup": "linear",
    "constant_with_warmup": "constant",
    "constant_schedule_with_warmup": "constant",
    "get_constant_schedule_with_warmup": "constant",
}
_MEANS = {
    "nll": "crossentropyloss crossentropy nllloss bcewithlogitsloss bceloss poissonnllloss"
    " gaussiannllloss",
    "mse": "mseloss meansquarederror squarederror",
}
_NOT_DECAYED = ("*bias", "*[Ll]ayer[Nn]orm*", "*layer_norm*", "*[Rr][Mm][Ss][Nn]orm*")


_UNNAMED = (
    "several parameter groups without their names; write the record with"
    " flataudit.log_training(..., model=model)"
)


class _UnknownError(ValueError):
    """The run says too little, or something that has no training time known to us."""


def training_from_run(
    params: Mapping[str, Any],
    lr_history: Sequence[float],
    n_samples: int,
    state: OptimizerState | None = None,
) -> tuple[TrainingRecord | None, str]:
    """The record that a run's logged params and lr metric allow, or None; and the reason.

    lr_history: the metric's values in the order of their steps. One value per step: their sum is
    exact. Fewer: the logged schedule where there is one, else they are spread evenly.
    state: the optimizer's own, which wins over the params.
    """
    found = _read(params)
    notes: list[str] = []
    try:
        if state is not None:
            found = _with_state(found, state, bool(lr_history), notes)
        if "optimizer" not in found:
            return None, "the source run logged no optimizer"
        values = _optimizer(found)
        values |= {
            key: found[key]
            for key in ("momentum", "dampening", "weight_decay", "sum_lr", "lr", "steps", "loss")
            if key in found and key not in values
        }
        if "loss" in values:
            values["loss"] = _loss(str(values["loss"]))
        batch = _batch(found, notes)
        if batch is not None:
            values["batch_size"] = batch
        _steps(values, found, n_samples, notes)
        schedule = _schedule(found, values, notes, bool(lr_history))
        if schedule is not None:
            values["schedule"] = schedule
        if lr_history and "sum_lr" not in values:
            _from_history(values, list(lr_history), found, notes)
        if "batch_size" not in values:
            _batch_from_steps(values, found, n_samples, notes)
        _defaults(values, found, notes)
        if state is not None and state.groups:
            values["groups"] = _groups(values, state, notes)
        values["assumptions"] = tuple(notes)
        origin = "params and metrics" if state is None else "optimizer state, params and metrics"
        return parse_training(values), f"the source run's {origin}"
    except (InputError, ValueError, OverflowError) as error:
        return None, f"the source run's record is incomplete ({' '.join(str(error).split())})"


def _with_state(
    found: dict[str, Any], state: OptimizerState, has_history: bool, notes: list[str]
) -> dict[str, Any]:
    """The run's params with what the optimizer itself holds."""
    if state.groups is None:
        raise _UnknownError(_UNNAMED)
    merged: dict[str, Any] = {**found, **state.settings}
    # A printed optimizer would bring back the settings that the state knows better.
    text = state.settings.get("optimizer") or str(found.get("optimizer", "")).partition("(")[0]
    if not text.strip():
        raise _UnknownError("the optimizer's state does not tell Adam from AdamW: log its name")
    merged["optimizer"] = text
    if state.steps is not None:
        merged["steps"] = state.steps
        notes.append(f"steps = {state.steps}, by the optimizer's own count when it was saved")
    if state.decayed_from is not None and not has_history and "schedule" not in found:
        raise _UnknownError(
            f"a scheduler changed the learning rate from {state.decayed_from:g}, in a way that was"
            " not logged: log the scheduler, or the lr metric at every step"
        )
    return merged


def _batch_from_steps(
    values: dict[str, Any], found: Mapping[str, Any], n_samples: int, notes: list[str]
) -> None:
    """The batch size that steps and epochs allow: n over the steps of an epoch, rounded up."""
    steps, epochs = values.get("steps"), found.get("epochs_run", found.get("epochs"))
    if steps is None or epochs is None or not 0 < float(epochs) <= float(steps):
        return
    batch = math.ceil(n_samples * float(epochs) / float(steps))
    values["batch_size"] = batch
    notes.append(
        f"batch_size = {batch}: {float(steps):g} steps in {float(epochs):g} epochs of {n_samples}"
        " samples"
    )


def _groups(
    values: Mapping[str, Any], state: OptimizerState, notes: list[str]
) -> list[dict[str, Any]]:
    """The state's groups; where only the sum of the learning rates is known, in its proportion."""
    found = [dict(group) for group in state.groups or ()]
    first = float(state.settings["lr"])
    for group in found:
        share = group["lr"] / first if first else 1.0
        if "sum_lr" in values:
            group.pop("lr")
            group["sum_lr"] = share * float(values["sum_lr"])
            if share != 1.0:
                notes.append("groups keep the proportion of their learning rates throughout")
        elif share == 1.0:
            group.pop("lr")
    return found


def _read(params: Mapping[str, Any]) -> dict[str, Any]:
    """The params under our names; the first of several names wins, as do earlier ones listed."""
    given = {str(key).lower().replace("-", "_"): value for key, value in params.items()}
    found = {"transformers": True} if "per_device_train_batch_size" in given else {}
    for key, names in _NAMES.items():
        for name in names:
            if str(given.get(name, "")).strip().lower() not in _ABSENT:
                found[key] = given[name]
                break
    for key in ("amsgrad", "maximize", "nesterov", "t_max", "eta_min", "patience", "epochs_run"):
        if str(given.get(key, "")).strip().lower() not in (*_ABSENT, "false", "0", "0.0"):
            found[key] = given[key]
    return found


def _optimizer(found: Mapping[str, Any]) -> dict[str, Any]:
    """Kind, and the settings that a printed optimizer holds: 'Adam (\\nParameter Group 0 ...'."""
    text = str(found["optimizer"]).strip()
    match = re.match(r"(?:<class ')?(?:\w+\.)*(\w+)", text)
    name = match[1].lower() if match else ""
    if name == "adamw_bnb_8bit" or name not in ("sgd", "adam", "adamw", "converged", *_OPTIMIZERS):
        raise _UnknownError(f"optimizer {text[:40]!r} is not known: sgd, adam and adamw are")
    for option in ("amsgrad", "maximize"):
        if option in found or re.search(rf"{option}[:=]\s*True", text):
            raise _UnknownError(f"training time with {option} is not known")
    values: dict[str, Any] = {"optimizer": _OPTIMIZERS.get(name, name)}
    if "parameter group 1" in text.lower():
        raise _UnknownError(_UNNAMED)
    for key in ("lr", "momentum", "dampening", "weight_decay"):
        printed = re.search(rf"(?<!\w){key}[:=]\s*([-+.\deE]+)", text)
        if printed:
            values[key] = printed[1]
    if "initial_lr" in text:
        values.pop("lr", None)  # what a scheduler left, not what training began with
    return values


def _loss(text: str) -> str:
    """nll, mse or half_mse, by torch's names too: 'CrossEntropyLoss()', 'cross_entropy'."""
    name = re.sub(r"^(<class ')?(\w+\.)*", "", text.strip().lower()).partition("(")[0].strip(" '<>")
    for loss, names in _MEANS.items():
        if name.replace("_", "") in names.split():
            return loss
    if name not in LOSSES:
        raise _UnknownError(f"loss {text[:40]!r} is not known: {', '.join(LOSSES)} are")
    return name


def _batch(found: Mapping[str, Any], notes: list[str]) -> int | None:
    if "batch_size" not in found:
        return None
    batch = float(found["batch_size"])
    accumulated = float(found.get("accumulated", 1))
    if found.get("transformers"):
        notes.append(f"one device, with {batch:g} samples per batch")
    if accumulated > 1:
        total = batch * accumulated
        notes.append(f"{total:g} samples per step: {accumulated:g} batches of {batch:g}")
    if batch * accumulated < 1:
        raise _UnknownError(f"batch size {batch:g}")
    return int(batch * accumulated)


def _steps(
    values: dict[str, Any], found: Mapping[str, Any], n_samples: int, notes: list[str]
) -> None:
    """Steps from epochs and batch size where they were not logged; the short last batch counts."""
    if "epochs_run" in found:
        found = {**found, "epochs": found["epochs_run"]}
    elif "patience" in found and "steps" not in values and "epochs" in found:
        notes.append(f"early stopping did not end the run before {found['epochs']} epochs")
    if "steps" in values or "epochs" not in found or "batch_size" not in values:
        return
    accumulated = float(found.get("accumulated", 1))
    batches = math.ceil(n_samples / float(found["batch_size"]))
    epochs = float(found["epochs"])
    steps = math.ceil(epochs * math.ceil(batches / accumulated))
    values["steps"] = steps
    notes.append(
        f"steps = {steps}: {epochs:g} epochs of {n_samples} samples in batches of"
        f" {values['batch_size']}"
    )


def _schedule(
    found: Mapping[str, Any], values: dict[str, Any], notes: list[str], has_history: bool
) -> str | None:
    """constant, cosine or linear, with its warm-up; None where none was logged, or where the lr
    metric stands for it."""
    if "schedule" not in found:
        _warm_up(found, values, named=False)
        return None
    text = str(found["schedule"]).strip()
    name = re.sub(r"^(<class ')?(\w+\.)*", "", text.lower()).partition("(")[0].strip(" '<>")
    if name in ("none", "false", "no"):
        return "constant"
    schedule = name if name in SCHEDULES else _SCHEDULES.get(name)
    if schedule is None:
        if "sum_lr" in values or has_history:
            return None
        raise _UnknownError(
            f"schedule {text[:40]!r} is not known: {', '.join(SCHEDULES)} are, or the lr metric"
            " logged at every step"
        )
    _warm_up(found, values, named="warmup" in name)
    inside = re.search(r"(?<!\w)(eta_min|min_lr)[:=]\s*([-+.\deE]+)", text)
    if "eta_min" in found or (inside and float(inside[2]) != 0.0):
        raise _UnknownError("a cosine schedule that ends above 0 is not known")
    period = float(found.get("t_max", 0))
    units = (values.get("steps"), found.get("epochs"), found.get("epochs_run"))
    if period and period not in {float(x) for x in units if x is not None}:
        raise _UnknownError(f"a cosine schedule with T_max={period:g} is not that of the whole run")
    if schedule != name or found.get("transformers"):
        ends = "" if schedule == "constant" else " to 0 over the whole run"
        notes.append(f"the schedule {text[:40]!r} is taken as {schedule}{ends}")
    return schedule


def _warm_up(found: Mapping[str, Any], values: dict[str, Any], *, named: bool) -> None:
    warm = float(found.get("warmup_steps", 0))
    ratio = float(found.get("warmup_ratio", 0)) or (warm if 0 < warm < 1 else 0.0)
    if warm >= 1:
        values["warmup_steps"] = math.ceil(warm)
    elif ratio > 0:
        if "steps" not in values:
            raise _UnknownError("a warm-up as a share of an unknown number of steps")
        values["warmup_steps"] = math.ceil(ratio * float(values["steps"]))
    elif named and not found.get("transformers") and "warmup_steps" not in found:
        raise _UnknownError(f"schedule {found['schedule']!r} without the number of warm-up steps")


def _from_history(
    values: dict[str, Any], history: list[float], found: Mapping[str, Any], notes: list[str]
) -> None:
    """The sum of the learning rates from the metric, where it says more than the params."""
    logged = len(history)
    steps = values.get("steps")
    if steps is None:
        epochs = found.get("epochs")
        if epochs is not None and logged <= float(epochs):
            raise _UnknownError(
                f"{logged} learning rates for {epochs} epochs of an unknown number of steps: log"
                " batch_size"
            )
        notes.append(f"steps = {logged}: the lr metric has one value per step")
        values["steps"] = logged
        values["sum_lr"] = math.fsum(history)
    elif logged >= float(steps):
        if logged > float(steps) and float(found.get("accumulated", 1)) > 1:
            raise _UnknownError(f"{logged} learning rates for {steps} steps of accumulated batches")
        if logged > float(steps):
            notes.append(f"steps = {logged}, as the lr metric has values, not {steps}")
            values["steps"] = logged
        values["sum_lr"] = math.fsum(history)
    elif "schedule" in values and "lr" in values:
        return  # the closed form knows every step
    else:
        values["sum_lr"] = math.fsum(history) / logged * float(steps)
        notes.append(
            f"the lr metric's history ({logged} values) is spread evenly over the {steps} steps"
        )
    # The metric has the schedule and the warm-up in it.
    for key in ("lr", "schedule", "warmup_steps"):
        values.pop(key, None)


def _defaults(values: dict[str, Any], found: Mapping[str, Any], notes: list[str]) -> None:
    if "schedule" not in values and "sum_lr" not in values and "lr" in values:
        warm = values.get("warmup_steps")
        after = f" after {warm} steps of linear warm-up" if warm else ""
        notes.append(f"constant learning rate{after}: no schedule was logged")
    sgd = values["optimizer"] == "sgd"
    for key in ("momentum", "weight_decay"):
        if key not in values and (key == "weight_decay" or sgd):
            if key == "weight_decay" and values["optimizer"] == "adamw":
                values[key] = 0.01
                notes.append("weight_decay = 0.01, torch's default of AdamW: none was logged")
                continue
            notes.append(f"{key} = 0: none was logged")
    if sgd and "nesterov" in found:
        notes.append("Nesterov momentum counts as momentum")
    if float(found.get("smoothing", 0)) > 0:
        notes.append(
            f"label smoothing (of {found['smoothing']}) is not counted: the loss is taken as the"
            " NLL"
        )
    if float(found.get("clip", 0)) > 0:
        notes.append(f"clipping of the gradient (at {found['clip']}) is not counted")
    if found.get("transformers") and float(values.get("weight_decay", 0)) > 0:
        values["groups"] = [{"parameters": list(_NOT_DECAYED), "weight_decay": 0.0}]
        notes.append("no weight decay on biases and norm layers, as transformers' Trainer does")
