"""What the state_dict of a torch optimizer says about the training that it did.

Its groups hold the settings that really ran (learning rate, momentum, weight decay), Adam's state
the number of steps; what a scheduler did on the way it does not hold. A state is known by its
shape: groups with parameters, and a state for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

# Keys that only the groups of these optimizers have together.
_SGD = {"momentum", "dampening", "nesterov"}
_ADAM = {"betas", "eps", "amsgrad"}
_CHECKPOINT_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states", "optim")


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """The settings, as `training_from_run` reads params, and the groups that differ from them.

    steps: Adam's count, or that of the checkpoint; None where neither is there. groups: for
    `TrainingRecord`; None where they differ and their parameters have no names.
    """

    settings: Mapping[str, Any]
    steps: int | None
    groups: Sequence[Mapping[str, Any]] | None
    decayed_from: float | None = None


def states_in(loaded: Any) -> Iterator[OptimizerState]:
    """The optimizer states in what was loaded from a file: itself, or in a checkpoint's keys."""
    if _is_state(loaded):
        yield read_state(loaded)
    elif isinstance(loaded, Mapping):
        steps = loaded.get("global_step") if "optimizer_states" in loaded else None
        for key in _CHECKPOINT_KEYS:
            held = loaded.get(key)
            for item in held if isinstance(held, list) else [held]:
                if _is_state(item):
                    yield read_state(item, steps)


def read_state(state: Mapping[str, Any], steps: int | None = None) -> OptimizerState:
    """One optimizer's `state_dict()`; steps: the checkpoint's own count, where it has one.

    >>> import torch
    >>> line = torch.nn.Linear(2, 1)
    >>> found = read_state(torch.optim.SGD(line.parameters(), lr=0.5, momentum=0.9).state_dict())
    >>> found.settings["optimizer"], found.settings["lr"], found.settings["momentum"]
    ('sgd', 0.5, 0.9)
    """
    groups = state["param_groups"]
    values = [_values(group) for group in groups]
    sizes = [len(group["params"]) for group in groups]
    at = sizes.index(max(sizes))
    rest = values[at]
    counts = [int(s["step"]) for s in state["state"].values() if _is_number(s.get("step"))]
    now = _number(groups[at].get("lr"))
    return OptimizerState(
        settings=rest,
        steps=max(counts, default=steps),
        groups=_differing(groups, values, rest),
        decayed_from=rest["lr"] if now != rest["lr"] else None,
    )


def _values(group: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        key: _number(group[key])
        for key in ("momentum", "dampening", "weight_decay")
        if _is_number(group.get(key))
    }
    # What a scheduler left in lr is not what training began with.
    found["lr"] = _number(group.get("initial_lr", group.get("lr")))
    for key in ("nesterov", "amsgrad", "maximize"):
        if group.get(key):
            found[key] = True
    found |= _kind(group)
    return found


def _kind(group: Mapping[str, Any]) -> dict[str, str]:
    """{"optimizer": kind}; nothing where an old torch saved Adam and AdamW alike."""
    keys = set(group)
    if keys >= _SGD:
        cycled = {"max_momentum", "base_momentum"} & keys  # no training time is known for it
        return {"optimizer": "cycled-momentum SGD" if cycled else "sgd"}
    if keys >= _ADAM and "momentum_decay" not in keys:
        if "decoupled_weight_decay" not in keys:
            return {}
        return {"optimizer": "adamw" if group["decoupled_weight_decay"] else "adam"}
    return {"optimizer": "unnamed"}


def _differing(
    groups: Sequence[Mapping[str, Any]], values: list[dict[str, Any]], rest: dict[str, Any]
) -> list[dict[str, Any]] | None:
    """The groups with another weight decay or learning rate; None where they have no names."""
    found = []
    for group, own in zip(groups, values, strict=True):
        if own == rest or not group["params"]:
            continue
        names = group.get("param_names")
        differs = {key for key, value in own.items() if rest.get(key) != value}
        if not names or differs - {"lr", "weight_decay"}:
            return None
        found.append(
            {"parameters": list(names), "weight_decay": own["weight_decay"], "lr": own["lr"]}
        )
    return found


def _is_state(value: Any) -> TypeGuard[Mapping[str, Any]]:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and bool(value["param_groups"])
        and all(isinstance(g, Mapping) and "params" in g for g in value["param_groups"])
    )


def _is_number(value: Any) -> bool:
    import torch  # here: a gate, which reads no optimizer, starts without it

    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else float("nan")
