"""The training record: what the optimizer did, from a mapping, a file or KEY=VALUE text.

Stopping after a finite time acts as a penalty (`flataudit.penalty`), so the record is the largest
single lever on an audit's accuracy. Keys: optimizer (sgd|adam|adamw|converged), sum_lr (or lr,
schedule constant|cosine|linear, steps, warmup_steps), momentum, dampening, batch_size,
weight_decay, time (SGD's training time, where known exactly), groups (what differs by
parameter), and loss (nll|mse|half_mse): what the weight decay was added to.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flataudit.errors import InputError

TRAINING_ARTIFACT = "flataudit/training.json"  # of the training run: the complete record
OPTIMIZERS = ("sgd", "adam", "adamw", "converged")
SCHEDULES = ("constant", "cosine", "linear")
LOSSES = ("nll", "mse", "half_mse")
GROUP_NUMBERS = ("sum_lr", "lr", "time", "weight_decay")
NUMBERS = (*GROUP_NUMBERS, "steps", "warmup_steps", "momentum", "dampening", "batch_size")
KEYS = ("optimizer", *NUMBERS, "schedule", "loss", "groups")


@dataclass(frozen=True, slots=True)
class TrainingGroup:
    """What was different for some parameters, by name or pattern (`*.bias`); None: as the rest."""

    parameters: tuple[str, ...]
    weight_decay: float | None = None
    lr: float | None = None
    sum_lr: float | None = None
    time: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """How a model was trained; `assumptions` lists what was filled in rather than read.

    sum_lr: sum of the learning rates over all steps; steps: how many, where known; warmup_steps:
    the first ones, of linear warm-up from 0; time: SGD's `training_time` where whoever wrote the
    record knew each step's learning rate.
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
    warmup_steps: int = 0
    time: float | None = None
    groups: tuple[TrainingGroup, ...] = ()
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
        at, warm = np.arange(steps), self.warmup_steps
        progress = np.maximum(at - warm, 0) / max(steps - warm, 1)
        if self.schedule == "cosine":
            shape = 0.5 * (1.0 + np.cos(np.pi * progress))
        elif self.schedule == "linear":
            shape = 1.0 - progress
        else:
            shape = np.ones(steps)
        rates = self.lr * np.where(at < warm, at / max(warm, 1), shape)
        return rates if self.sum_lr is None else rates * (self.sum_lr / (rates.sum() or 1.0))

    def training_time(self) -> float:
        """Gradient-flow time T of SGD with momentum m: how far it goes under a gradient of 1.

        T = (1 - dampening) sum_t lr_t (1 - m^t)/(1 - m), t = 1 the first step: torch's learning
        rate multiplies the momentum built up by then. Without the number of steps the long-run
        limit (1 - dampening) sum lr/(1 - m).

        >>> record = TrainingRecord("sgd", lr=1.0, steps=20, momentum=0.9)
        >>> round(record.training_time() / 20, 1)
        6.0
        """
        if self.time is not None:
            return self.time
        m = self.momentum
        if not self.steps or m == 0.0:
            return (1.0 - self.dampening) * self.total_lr / (1.0 - m)
        weights = -np.expm1(np.arange(1, self.steps + 1) * math.log(m)) / (1.0 - m)
        return (1.0 - self.dampening) * float(self.learning_rates() @ weights)

    def by_parameter(self, names: Iterable[str]) -> dict[str, TrainingRecord]:
        """The record of each parameter: that of its group, else the record's own values.

        Raises:
            InputError: a name that the model does not have, a group without parameters, or a
                parameter in two groups.
        """
        names = list(names)
        found = dict.fromkeys(names, self)
        taken: set[str] = set()
        for number, group in enumerate(self.groups, start=1):
            matched = [n for n in names if any(fnmatchcase(n, p) for p in group.parameters)]
            plain = [p for p in group.parameters if p not in names and not set("*?[") & set(p)]
            if plain or not matched:
                raise InputError(
                    f"expected group {number} of the training record to name parameters of the"
                    f" model, got {(plain or group.parameters)[0]!r}; the model has"
                    f" {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                )
            twice = taken.intersection(matched)
            if twice:
                raise InputError(
                    f"expected each parameter in at most one group of the training record, got"
                    f" {min(twice)!r} in two; make the patterns narrower"
                )
            taken.update(matched)
            found |= dict.fromkeys(matched, self._of_group(group))
        return found

    def _of_group(self, group: TrainingGroup) -> TrainingRecord:
        changes: dict[str, Any] = {"groups": ()}
        if group.weight_decay is not None:
            changes["weight_decay"] = group.weight_decay
        if group.sum_lr is not None:
            time = None if self.time is None else self.time * group.sum_lr / self.total_lr
            changes |= {"sum_lr": group.sum_lr, "time": time}
        elif group.lr is not None and self.lr is not None:
            share = group.lr / self.lr
            time = None if self.time is None else self.time * share
            changes |= {"lr": group.lr, "sum_lr": self.total_lr * share, "time": time}
        elif group.lr is not None:
            changes |= {"lr": group.lr, "sum_lr": None, "time": None}
        if group.time is not None:
            changes["time"] = group.time
        return dataclasses.replace(self, **changes)

    def to_record(self) -> dict[str, Any]:
        """The record as `parse_training` reads it back."""
        fields = dataclasses.asdict(self)
        fields["groups"] = [_without_none(group) for group in fields["groups"]]
        return {key: value for key, value in fields.items() if value not in (None, (), [])}

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
            "groups": [
                _without_none(dataclasses.asdict(group)) | {"parameters": list(group.parameters)}
                for group in self.groups
            ],
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
        warmup_steps=_whole("warmup_steps", numbers, at_least=0) or 0,
        time=numbers.get("time"),
        groups=_groups(values.get("groups", ())),
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
    if record.time == 0:
        raise InputError("expected a training time above 0, got 0; leave it out or check the steps")
    for group in record.groups:
        if group.sum_lr is None and group.lr is not None and not (record.lr or record.steps):
            raise InputError(
                "expected sum_lr for a group of the training record, got its lr alone; give the"
                " group's sum_lr, or lr and steps of the whole record"
            )
        if 0.0 in (group.sum_lr, group.lr, group.time):
            raise InputError(
                "expected learning rates above 0 in each group of the training record, got 0; leave"
                " out what was not trained (requires_grad=False)"
            )


def _groups(given: Any) -> tuple[TrainingGroup, ...]:
    if isinstance(given, str | Mapping) or not isinstance(given, Iterable):
        raise InputError(
            f"expected training groups as a list of {{parameters: [names], weight_decay, lr}}, got"
            f" {given!r}; give them in a mapping or a file"
        )
    return tuple(_group(item) for item in given)


def _group(given: Any) -> TrainingGroup:
    if not isinstance(given, Mapping):
        raise InputError(
            f"expected a training group as {{parameters: [names], weight_decay, lr}}, got"
            f" {given!r}; check the record"
        )
    values = _without_none(given)
    unknown = sorted(set(values) - {"parameters", *GROUP_NUMBERS})
    if unknown:
        raise InputError(
            f"unknown key {unknown[0]!r} in a training group; choose from: parameters,"
            f" {', '.join(sorted(GROUP_NUMBERS))}"
        )
    names = values.pop("parameters", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"expected parameters: [names or patterns] in a training group, got {names!r}; name"
            " what the group holds"
        )
    return TrainingGroup(names, **{key: _number(key, value) for key, value in values.items()})


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


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


def _whole(key: str, numbers: Mapping[str, float], at_least: int = 1) -> int | None:
    if key not in numbers:
        return None
    if numbers[key] != int(numbers[key]) or numbers[key] < at_least:
        raise InputError(
            f"expected training {key} to be a whole number of at least {at_least}, got"
            f" {numbers[key]:g}; check the record"
        )
    return int(numbers[key])


def _choice(key: str, value: Any, choices: tuple[str, ...]) -> str:
    if str(value).lower() not in choices:
        raise InputError(
            f"expected training {key} to be one of {', '.join(choices)}, got {value!r};"
            " check the record"
        )
    return str(value).lower()
