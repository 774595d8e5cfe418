"""Scores of candidates against the decision list: pure functions of rows.

The score is that of `rule_fit`: the mean over data sets of the mean excess error, capped at log 4.
Differences to the list have 90 % bootstrap intervals over groups of models that share samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.zoo import statistics as s
from benchmarks.zoo.rule_fit import CAP, criterion, excess
from benchmarks.zoo.rules import Row, Rule
from flataudit.results import LEVEL

Json = dict[str, Any]
LIST = "list"


def bias(rows: Sequence[Row], rule: Rule) -> float:
    """The median of log(estimate/gap) over models where both are above 0; NaN where none is."""
    ratios = [
        math.log(value / row["gap"])
        for row in rows
        if row["gap"] > 0 and (value := rule(row)) is not None and value > 0
    ]
    return float(np.median(ratios)) if ratios else math.nan


def difference(rows: Sequence[Row], rule: Rule, than: Rule, draws: int) -> Json:
    """The score of `rule` minus that of `than`, with its interval; negative: `rule` is better."""
    more = np.minimum(excess(rows, rule), CAP) - np.minimum(excess(rows, than), CAP)
    sets = np.unique([row["data"] for row in rows], return_inverse=True)[1]

    def score(w: s.Floats) -> float:
        total, weight = (np.bincount(sets, weights=x) for x in (w * more, w))
        drawn = weight > 0
        return float(np.mean(total[drawn] / weight[drawn])) if drawn.any() else math.nan

    low, high = s.bootstrap(score, [str(row["group"]) for row in rows], draws=draws, level=LEVEL)
    return {"value": score(np.ones(len(rows))), "low": low, "high": high}


def scored(rows: Sequence[Row], rules: Mapping[str, Rule], draws: int) -> Json:
    """Score, bias and difference to the list of every rule; `rules` holds the list too."""
    return {
        name: {
            "score": criterion(rows, rule),
            "bias": bias(rows, rule),
            "minus_list": difference(rows, rule, rules[LIST], draws),
        }
        for name, rule in rules.items()
    }


def out_of_data_set(rows: Sequence[Row], rules: Mapping[str, Rule], draws: int) -> Json:
    """For each data set the rule that is best on the others, the list among them, scored on it."""
    sets = sorted({row["data"] for row in rows})
    choice = {}
    for name in sets:
        others = [row for row in rows if row["data"] != name]
        choice[name] = min(rules, key=lambda each: criterion(others, rules[each]))

    def chosen(row: Row) -> float | None:
        return rules[choice[row["data"]]](row)

    return {
        "choice": choice,
        "score": criterion(rows, chosen),
        "bias": bias(rows, chosen),
        "minus_list": difference(rows, chosen, rules[LIST], draws),
    }


def mean_change(
    pairs: Sequence[tuple[Row, Row]], value: Callable[[Row], float | None], draws: int
) -> Json:
    """The mean of log(value(second)/value(first)) over pairs with both above 0."""
    found = [
        (math.log(after / before), str(first["group"]))
        for first, second in pairs
        if (before := value(first)) is not None
        and (after := value(second)) is not None
        and before > 0
        and after > 0
    ]
    changes = np.array([change for change, _ in found])
    low, high = s.bootstrap(
        lambda w: float((w * changes).sum() / w.sum()),
        [group for _, group in found],
        draws=draws,
        level=LEVEL,
    )
    return {
        "pairs": len(found),
        "value": float(changes.mean()) if found else math.nan,
        "low": low,
        "high": high,
    }
