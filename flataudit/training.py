"""The training record: what the optimizer did, from a mapping, a file or KEY=VALUE text.

Stopping after a finite time acts as a penalty (`flataudit.penalty`), so the record is the largest
single lever on an audit's accuracy. Keys: optimizer (sgd|adam|adamw|converged), sum_lr (or lr,
schedule constant|cosine|linear, steps), momentum, dampening, batch_size, weight_decay, and
loss (nll|mse|half_mse): what the weight decay was added to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flataudit.errors import InputError

OPTIMIZERS = ("sgd", "adam", "adamw", "converged")
SCHEDULES = ("constant", "cosine", "linear")
LOSSES = ("nll", "mse", "half_mse")
NUMBERS = ("sum_lr", "lr", "steps", "momentum", "dampening", "batch_size", "weight_decay")
KEYS = ("optimizer", *NUMBERS, "schedule", "loss")


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a model was trained; `assumptions` lists what was filled in rather than read.

    sum_lr: sum of the learning rates over all steps; steps: how many, where known.
    """

    optimizer: str
    sum_lr: float | None = None
    lr: float | None = None
    schedule: str = "constant"
    steps: int | None = None
    momentum: float = 0.0
    dampening: float = 0.0
    batch_size: int | None = None
    weight_decay: float = 0.0
    loss: str | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def total_lr(self) -> float:
        """The sum of the learning rates over the run."""
        if self.sum_lr is not None:
            return self.sum_lr
        return float(self.learning_rates().sum())

    def learning_rates(self) -> NDArray[np.float64]:
        """The learning rate of each step, (steps,); spread evenly where only their sum is known."""
        steps = self.steps or 0
        if self.lr is None:
            return np.full(steps, (self.sum_lr or 0.0) / max(steps, 1))
        progress = np.arange(steps) / max(steps, 1)
        if self.schedule == "cosine":
            shape = 0.5 * (1.0 + np.cos(np.pi * progress))
        elif self.schedule == "linear":
            shape = 1.0 - progress
        else:
            shape = np.ones(steps)
        rates = self.lr * shape
        return rates if self.sum_lr is None else rates * (self.sum_lr / rates.sum())

    def training_time(self) -> float:
        """Gradient-flow time T of SGD with momentum m: each step still to come counts.

        T = (1 - dampening) sum_u lr_u (1 - m^u)/(1 - m), u steps before the end; without the
        number of steps the long-run limit (1 - dampening) sum lr/(1 - m).

        >>> record = TrainingRecord("sgd", lr=1.0, steps=20, momentum=0.9)
        >>> round(record.training_time() / 20, 1)
        6.0
        """
        m = self.momentum
        if not self.steps or m == 0.0:
            return (1.0 - self.dampening) * self.total_lr / (1.0 - m)
        remaining = np.arange(self.steps, 0, -1)
        weights = -np.expm1(remaining * math.log(m)) / (1.0 - m)
        return (1.0 - self.dampening) * float(self.learning_rates() @ weights)

    def to_record(self) -> dict[str, Any]:
        """The record as `parse_training` reads it back."""
        fields = dataclasses.asdict(self)
        return {key: value for key, value in fields.items() if value not in (None, ())}

    def to_dict(self) -> dict[str, Any]:
        """The record as the report shows it; what does not exist is None."""
        known = self.optimizer != "converged"
        return {
            "optimizer": self.optimizer,
            "sum_lr": self.total_lr if known else None,
            "momentum": self.momentum,
            "batch_size": self.batch_size,
            "weight_decay": self.weight_decay,
            "dampening": self.dampening,
            "steps": self.steps,
            "loss": self.loss,
        }


def parse_training(source: Mapping[str, Any] | str | Path) -> TrainingRecord:
    """A checked record from a mapping, a YAML or JSON file, or KEY=VALUE,... text.

    Raises:
        InputError: unknown keys or optimizer, Adam without a batch size, no learning rates,
            numbers out of range.

    >>> parse_training("optimizer=adam,sum_lr=3,batch_size=32").weight_decay
    0.0
    """
    if isinstance(source, Mapping):
        values = dict(source)
    else:
        path = Path(source)
        values = _read_file(path) if _is_file(path) else _read_pairs(str(source))
    unknown = sorted(set(values) - set(KEYS) - {"assumptions"})
    if unknown:
        raise InputError(
            f"unknown training key {unknown[0]!r}; choose from: {', '.join(sorted(KEYS))}"
        )
    values = {key: value for key, value in values.items() if value is not None}
    optimizer = str(values.get("optimizer", "")).lower()
    if optimizer not in OPTIMIZERS:
        raise InputError(
            f"expected training optimizer to be one of {', '.join(OPTIMIZERS)}, got"
            f" {values.get('optimizer')!r}; use 'converged' for a fit run to its optimum"
        )
    numbers = {key: _number(key, values[key]) for key in NUMBERS if key in values}
    record = TrainingRecord(
        optimizer=optimizer,
        sum_lr=numbers.get("sum_lr"),
        lr=numbers.get("lr"),
        schedule=_choice("schedule", values.get("schedule", "constant"), SCHEDULES),
        steps=_whole("steps", numbers),
        momentum=numbers.get("momentum", 0.0),
        dampening=numbers.get("dampening", 0.0),
        batch_size=_whole("batch_size", numbers),
        weight_decay=numbers.get("weight_decay", 0.0),
        loss=_choice("loss", values["loss"], LOSSES) if "loss" in values else None,
        assumptions=tuple(values.get("assumptions", ())),
    )
    _check(record)
    return record


def _check(record: TrainingRecord) -> None:
    if not 0.0 <= record.momentum < 1.0:
        raise InputError(
            f"expected momentum in [0, 1), got {record.momentum}; give the SGD momentum"
        )
    if not 0.0 <= record.dampening < 1.0:
        raise InputError(f"expected dampening in [0, 1), got {record.dampening}; the default is 0")
    if record.optimizer == "converged":
        return
    if record.sum_lr is None and (record.lr is None or not record.steps):
        raise InputError(
            "expected sum_lr, or lr with steps, in the training record, got neither; give the sum"
            " of the learning rates over all steps, or optimizer=converged"
        )
    if record.total_lr <= 0:
        raise InputError(
            f"expected a sum of learning rates above 0, got {record.total_lr}; check lr and steps"
        )
    if record.optimizer in ("adam", "adamw") and not record.batch_size:
        raise InputError(
            f"expected batch_size in the training record of {record.optimizer}, got none; its"
            " second moment depends on it"
        )


def _is_file(path: Path) -> bool:
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        if not path.is_file():
            raise InputError(
                f"expected a training record file, got no file at {path}; check the path"
            )
        return True
    return False


def _read_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            values = json.loads(text)
        else:
            import yaml  # only a YAML record needs it; the core runs without

            values = yaml.safe_load(text)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"expected valid YAML or JSON in {path}, got: {reason}; check the file"
        ) from error
    if not isinstance(values, dict):
        raise InputError(
            f"expected keys and values in {path}, got {type(values).__name__}; see {KEYS}"
        )
    return values


def _read_pairs(text: str) -> dict[str, Any]:
    pairs = [item.partition("=") for item in text.split(",") if item.strip()]
    if not pairs or any(not separator for _, separator, _ in pairs):
        raise InputError(
            f"expected a training record as KEY=VALUE,... or a .yaml or .json file, got {text!r};"
            " for example optimizer=sgd,sum_lr=40,momentum=0.9"
        )
    return {key.strip(): value.strip() for key, _, value in pairs}


def _number(key: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise InputError(
            f"expected training {key} to be a number of at least 0, got {value!r}; check the record"
        )
    return number


def _whole(key: str, numbers: Mapping[str, float]) -> int | None:
    if key not in numbers:
        return None
    if numbers[key] != int(numbers[key]) or numbers[key] < 1:
        raise InputError(
            f"expected training {key} to be a whole number of at least 1, got {numbers[key]:g};"
            " check the record"
        )
    return int(numbers[key])


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    if str(value).lower() not in choices:
        raise InputError(
            f"expected training {key} to be one of {', '.join(choices)}, got {value!r};"
            " check the record"
        )
    return str(value).lower()


# --- from a run's params and metrics ------------------------------------------------------------

_NAMES = {
    "optimizer": ("optimizer", "optimizer_name"),
    "sum_lr": ("sum_lr",),
    "lr": ("lr", "learning_rate"),
    "schedule": ("schedule", "scheduler", "lr_schedule"),
    "steps": ("steps", "max_steps", "n_steps"),
    "momentum": ("momentum",),
    "dampening": ("dampening",),
    "batch_size": ("batch_size",),
    "weight_decay": ("weight_decay",),
    "loss": ("loss",),
}
_EPOCHS = ("epochs", "max_epochs", "num_epochs", "n_epochs")


def training_from_run(
    params: Mapping[str, Any], lr_history: list[float], n_samples: int
) -> tuple[TrainingRecord | None, str]:
    """The record that a run's logged params and lr metric allow, or None; and the reason.

    Steps follow from epochs and batch size where only those were logged; the metric's history is
    taken as one value per step or, where shorter, evenly spread over the steps.
    """
    values: dict[str, Any] = {}
    for key, names in _NAMES.items():
        for name in names:
            if params.get(name) not in (None, "", "None"):
                values[key] = params[name]
                break
    if "optimizer" not in values:
        return None, "the source run logged no optimizer"
    values["optimizer"] = str(values["optimizer"]).lower()
    assumptions: list[str] = []
    try:
        epochs = next((float(params[name]) for name in _EPOCHS if params.get(name)), None)
        batch = values.get("batch_size")
        if "steps" not in values and epochs and batch:
            values["steps"] = round(epochs * math.ceil(n_samples / float(batch)))
            assumptions.append(
                f"steps = {values['steps']}: {epochs:g} epochs of {n_samples} samples in batches"
                f" of {batch}"
            )
        if lr_history and "sum_lr" not in values:
            steps = float(values.get("steps", len(lr_history)))
            values["sum_lr"] = sum(lr_history) * max(1.0, steps / len(lr_history))
            if steps > len(lr_history):
                assumptions.append("the lr metric's history is spread evenly over the steps")
        if values.get("schedule") is None and "sum_lr" not in values and "lr" in values:
            assumptions.append("constant learning rate: no schedule was logged")
        for key in ("momentum", "weight_decay"):
            if key not in values and (key == "weight_decay" or values["optimizer"] == "sgd"):
                assumptions.append(f"{key} = 0: none was logged")
        values["assumptions"] = tuple(assumptions)
        return parse_training(values), "the source run's params and metrics"
    except (InputError, ValueError) as error:
        return None, f"the source run's record is incomplete ({error})"
