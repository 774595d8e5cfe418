"""The candidates: rules that take an estimate from a row, as those of `benchmarks.zoo.rules`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.zoo.research import training
from benchmarks.zoo.research.scoring import LIST
from benchmarks.zoo.research.trajectory import AVERAGES
from benchmarks.zoo.rules import (
    LOO,
    RECALIBRATED,
    SOFT_RANK,
    TIC,
    Row,
    Rule,
    blend,
    both,
    decided,
    never_sharper,
    number,
)

RATIOS = (2.0, 3.0, 5.0)  # n over the soft rank from which the path's leave-one-out is taken
TRAINING_ONLY = ("accuracy", "temperature", "logistic", "beta")
# c in PHI = 1 + c noise and 1/(1 + c noise), and PHI for all networks alike, the control.
NOISE_FACTORS = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0, 120.0)
CONSTANT_FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)


def column(name: str) -> Rule:
    """A column of the row as an estimate."""
    return lambda row: number(row, name)


def by_list(row: Row) -> float | None:
    """What the decision list takes."""
    found = decided(row)
    return None if found is None else found.gap


def of_parts(combine: Any, *parts: Rule) -> Rule:
    """`combine` of the parts that exist; LOO where the recalibrated soft rank does not."""

    def rule(row: Row) -> float | None:
        values = [part(row) for part in parts]
        known = [value for value in values if value is not None and value > 0]
        return float(combine(known)) if known else None

    return rule


def energy_left_out(row: Row) -> float | None:
    """TIC with leave-one-out residuals: information ratio x soft rank."""
    ratio, rank = number(row, "record_information_ratio"), SOFT_RANK(row)
    return None if ratio is None or rank is None else ratio * rank


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(float(np.mean(np.log(values))))


CLIPPED = never_sharper(RECALIBRATED)


COMBINATIONS: dict[str, Rule] = {
    LIST: by_list,
    "soft rank": SOFT_RANK,
    "recalibrated": CLIPPED,
    "loo": LOO,
    "tic": TIC,
    "tic with loo residuals": energy_left_out,
    "blend even where sharper": lambda row: LOO(row) if RECALIBRATED(row) is None else blend(row),
    "median of soft rank, recalibrated, tic with loo residuals": of_parts(
        np.median, SOFT_RANK, CLIPPED, energy_left_out
    ),
    "median of soft rank, recalibrated, loo": of_parts(np.median, SOFT_RANK, CLIPPED, LOO),
    "geometric mean of soft rank, recalibrated, loo": of_parts(
        geometric_mean, SOFT_RANK, CLIPPED, LOO
    ),
    "loo and soft rank": both(LOO, SOFT_RANK),
    "loo and recalibrated": both(LOO, CLIPPED),
    "largest of soft rank, recalibrated, loo": of_parts(max, SOFT_RANK, CLIPPED, LOO),
    "smallest of soft rank, recalibrated, loo": of_parts(min, SOFT_RANK, CLIPPED, LOO),
    "soft rank where adam or adamw, else list": lambda row: (
        by_list(row) if row["optimizer"] == "sgd" else SOFT_RANK(row)
    ),
    "200 held-out labels": column("held_gap"),
}


def recalibrated(variant: str, blended: bool = False) -> Rule:
    """The variant's soft rank, or its blend; the soft rank where it sharpens the model, and
    leave-one-out where there are no classes: as the list does."""

    def rule(row: Row) -> float | None:
        found, soft = number(row, variant), number(row, "soft_rank")
        if found is None or soft is None:
            return LOO(row)
        if row[f"{variant}_sharper"]:
            return soft
        return math.sqrt(found * soft) if blended else found

    return rule


def or_loo(name: str) -> Rule:
    """A column; leave-one-out where it does not exist."""
    return lambda row: LOO(row) if number(row, name) is None else number(row, name)


def recalibration_rules(source: str) -> dict[str, Rule]:
    """Both uses of each variant of a source: loo (training data alone), heldout or test."""
    variants = [f"{source}_{method}" for method in TRAINING_ONLY]
    if source == "loo":
        variants += ["loo_again", "loo_root"]
    if source == "test":
        variants = ["test_accuracy", "test_temperature"]
    return {
        f"{variant}{', blend' * blended}": recalibrated(variant, bool(blended))
        for variant in variants
        for blended in (0, 1)
    }


def where_many(inner: Rule, ratio: float, otherwise: Rule) -> Rule:
    """`inner` where n is at least `ratio` times the soft rank, else `otherwise`."""

    def rule(row: Row) -> float | None:
        gap = SOFT_RANK(row)  # soft rank / n
        return otherwise(row) if gap is None or gap * ratio > 1.0 else inner(row)

    return rule


SERIES_RULES: dict[str, Rule] = {
    LIST: column("list"),
    "soft rank": SOFT_RANK,
    "recalibrated": CLIPPED,
    "blend": never_sharper(blend),
    "loo": LOO,
    "tic": TIC,
    "path": column("path"),
    "path and soft rank": both(column("path"), SOFT_RANK),
    "undone": column("undone"),
    **{
        name: column(name)
        for kind in AVERAGES
        for name in (
            f"rank_{kind}", f"tic_{kind}", f"loo_{kind}", f"info_{kind}", f"tic_{kind}_both",
            f"loo_{kind}_both",
        )
    },
    **{
        f"rank_{kind} and soft rank": both(column(f"rank_{kind}"), SOFT_RANK)
        for kind in AVERAGES
    },
    **{
        f"loo_{kind}_both and soft rank": both(column(f"loo_{kind}_both"), SOFT_RANK)
        for kind in AVERAGES
    },
    **{f"loo_{kind} and loo": both(column(f"loo_{kind}"), LOO) for kind in AVERAGES},
    **{
        f"path where n is {ratio:g} soft ranks": where_many(column("path"), ratio, column("list"))
        for ratio in RATIOS
    },
}  # fmt: skip


# On the zoo: the same without those that average Lambda and residuals together, and the control.
PATH_RULES: dict[str, Rule] = {
    **{name: rule for name, rule in SERIES_RULES.items() if "_both" not in name},
    LIST: by_list,
    **{
        f"{name} where n is {ratio:g} soft ranks": where_many(column(of), ratio, by_list)
        for name, of in (("path", "path"), ("twice loo", "twice_loo"))
        for ratio in RATIOS
    },
    "twice soft rank": column("twice_soft_rank"),
    "twice loo": column("twice_loo"),
    "twice blend": lambda row: _blend_at(row, "twice"),
}


def over_gap(rule: Rule) -> Rule:
    """The ratio of the estimate to the true gap, where both are above 0."""

    def ratio(row: Row) -> float | None:
        value = rule(row)
        return None if value is None or value <= 0 or row["gap"] <= 0 else value / row["gap"]

    return ratio


def at_factor(name: str, factor: float) -> Rule:
    """An estimate at PHI times the training time, interpolated in logarithms; PHI within FACTORS.

    name: soft_rank, loo or blend (never sharper).
    """

    def rule(row: Row) -> float | None:
        ends = [_at(row, name, known) for known in training.FACTORS]
        if any(value is None or value <= 0 for value in ends):
            return number(row, "list")
        logs = np.log(np.array(ends, dtype=float))
        return float(np.exp(np.interp(math.log(factor), np.log(training.FACTORS), logs)))

    return rule


def _at(row: Row, name: str, factor: float) -> float | None:
    at = f"at_{factor:g}"
    return _blend_at(row, at) if name == "blend" else number(row, f"{at}_{name}")


def _blend_at(row: Row, at: str) -> float | None:
    soft, found, scale = (
        number(row, f"{at}_{name}") for name in ("soft_rank", "recalibrated", "scale")
    )
    if found is None or scale is None or soft is None or scale >= 1.0:
        return soft
    return math.sqrt(found * soft)


def factors_of(name: str, kind: str) -> dict[str, Rule]:
    """The candidates for PHI: by noise (longer, shorter) or constant; the first changes nothing."""
    if kind == "constant":
        return {LIST: at_factor(name, 1.0)} | {
            f"{c:g}": at_factor(name, c) for c in CONSTANT_FACTORS
        }

    def noisy(c: float) -> Rule:
        def rule(row: Row) -> float | None:
            longer = 1.0 + c * row["noise"]
            return at_factor(name, longer if kind == "longer" else 1.0 / longer)(row)

        return rule

    return {LIST: noisy(0.0)} | {f"{c:g}": noisy(c) for c in NOISE_FACTORS if c}
