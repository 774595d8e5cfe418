"""The decision list against its rivals, and what its intervals and `ok` are worth: rule_fit.json.

    python -m benchmarks.zoo.rule_fit [RESULTS.parquet | STORE] [--out FILE] [--draws 200]

Everything that is chosen here is chosen on nine data sets and scored on the tenth, in turn: the
estimate for each of the two branches that the method leaves open (`OPEN`), and the model error of
each estimator, which makes the intervals wider. `flataudit.selection` holds what the ten together
say; intervals and confidence are those of that list, with the other nine sets' model errors. The
criterion is the mean over data sets of the mean excess error, capped at `CAP` so that no single
model, whose gap is within noise of 0, decides.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.zoo import statistics as s
from benchmarks.zoo.grid import grid
from benchmarks.zoo.rules import (
    CALIBRATED,
    LOO,
    RECALIBRATED,
    SOFT_RANK,
    TIC,
    Decided,
    Row,
    Rule,
    blend,
    both,
    calibration,
    decided,
    decision_list_heldout,
    first_list,
    geometric,
    nearest,
    never_sharper,
    number,
    observed,
    paper,
)
from benchmarks.zoo.scores import finite, read, rounded
from benchmarks.zoo.store import read_rows
from flataudit.results import LEVEL, Z_LEVEL
from flataudit.selection import choose_confidence, widened

Json = dict[str, Any]
Flags = NDArray[np.bool_]

OUT = Path(__file__).with_name("rule_fit.json")
CAP = math.log(4.0)
FACTOR = 1.5  # a prediction within it, or with the truth in its interval, was right
# Estimators that share one model error: the soft rank and what is made of it.
FAMILIES = {
    "loo": ("loo",),
    "tic": ("tic",),
    "soft_rank": ("soft_rank", "soft_rank_recalibrated", "soft_rank_blend"),
}


OPEN: dict[str, dict[str, Rule]] = {
    "linear": {
        "loo": LOO,
        "soft_rank": SOFT_RANK,
        "tic": TIC,
        "recalibrated": never_sharper(RECALIBRATED),
        "loo_and_soft_rank": both(LOO, SOFT_RANK),
    },
    "network": {
        "blend": never_sharper(blend),
        "soft_rank": never_sharper(SOFT_RANK),
        "recalibrated": never_sharper(RECALIBRATED),
        "recalibrated_even_if_sharper": RECALIBRATED,
        "loo": LOO,
        "tic": TIC,
        "loo_and_soft_rank": both(LOO, SOFT_RANK),
        "loo_and_recalibrated": never_sharper(geometric),
    },
}


def branch(row: Row) -> str:
    """The branch of the decision list: calibrated, under, or open for linear models or networks."""
    c = calibration(row)
    if c.verdict in CALIBRATED:
        return "calibrated"
    if c.verdict == "miscalibrated" and c.direction == "under" and not row["by_loo_saturated"]:
        return "under"
    return "linear" if row["architecture"] == "glm" else "network"


def with_choice(choice: Mapping[str, str]) -> Rule:
    """The decision list with the named estimates in its open branches."""

    def rule(row: Row) -> float | None:
        at = branch(row)
        if at not in OPEN:
            return SOFT_RANK(row) if at == "calibrated" else TIC(row)
        found = OPEN[at][choice[at]](row)
        return LOO(row) if found is None else found

    return rule


def excess(rows: Sequence[Row], rule: Rule) -> s.Floats:
    """Excess errors (n,); infinite where the rule gives none."""
    estimate = np.array([_or_nan(rule(row)) for row in rows])
    gap, floor = (np.array([_or_nan(number(row, key)) for row in rows]) for key in ("gap", "floor"))
    found = s.excess(estimate, gap, floor)
    return np.where(np.isnan(found), np.inf, found)


def criterion(rows: Sequence[Row], rule: Rule) -> float:
    """The mean over data sets of the mean excess error, capped at CAP."""
    capped = np.minimum(excess(rows, rule), CAP)
    sets = np.array([row["data"] for row in rows])
    return float(np.mean([capped[sets == name].mean() for name in np.unique(sets)]))


def choose(rows: Sequence[Row]) -> dict[str, str]:
    """The best estimate of each open branch on these rows."""
    found = {}
    for at, candidates in OPEN.items():
        of = [row for row in rows if branch(row) == at]
        found[at] = min(candidates, key=lambda name: criterion(of, candidates[name]))
    return found


def needed_error(found: Decided, gap: float) -> float:
    """The smallest model error with which the interval holds the gap; infinite if none does."""
    margin, miss = Z_LEVEL * found.se, gap - found.gap
    if abs(miss) <= margin:
        return 0.0
    if found.gap <= 0:
        return math.inf
    ratio = math.sqrt(miss**2 - margin**2) / found.gap
    if miss > 0:
        return math.log1p(ratio) / Z_LEVEL
    return -math.log1p(-ratio) / Z_LEVEL if ratio < 1 else math.inf


def model_errors(rows: Sequence[Row]) -> dict[str, float]:
    """By estimator family, the error with which a share LEVEL of (n + 1) intervals holds the gap.

    The split-conformal quantile: of exchangeable models a new one is inside with that probability.
    """
    found = {}
    for family, members in FAMILIES.items():
        values = sorted(
            needed_error(chosen, row["gap"])
            for row in rows
            if (chosen := decided(row)) is not None and chosen.estimator in members
        )
        at = min(len(values), math.ceil((len(values) + 1) * LEVEL)) - 1
        found[family] = values[at] if values else 0.0
    return found


def family_of(estimator: str) -> str:
    """The family whose model error an estimator has."""
    return next(family for family, members in FAMILIES.items() if estimator in members)


def cross_validate(rows: Sequence[Row]) -> Json:
    """For each data set what the others choose, and what that says of its models."""
    sets = sorted({row["data"] for row in rows})
    folds: Json = {}
    told: dict[str, Json] = {}
    for name in sets:
        others = [row for row in rows if row["data"] != name]
        choice, errors = choose(others), model_errors(others)
        rule = with_choice(choice)
        folds[name] = {"choice": choice, "model_error": errors}
        for row in rows:
            if row["data"] != name:
                continue
            found = decided(row)
            assert found is not None
            margin = Z_LEVEL * found.se
            ends = widened(found.gap, margin, errors[family_of(found.estimator)], Z_LEVEL)
            confidence, reasons = choose_confidence(observed(row, found, ends))
            told[row["name"]] = {
                "rule": rule(row),
                "estimator": found.estimator,
                "sampling": abs(found.gap - row["gap"]) <= margin,
                "covered": ends[0] <= row["gap"] <= ends[1],
                "near": float(s.log_errors([found.gap], [row["gap"]])[0]) <= math.log(FACTOR),
                "confidence": confidence,
                "reasons": reasons,
            }
    return {"folds": folds, "told": told}


def rule_scores(rows: Sequence[Row], rule: Rule, draws: int) -> Json:
    """Kendall's tau, errors and excess errors, with 90 % intervals over groups of models."""
    estimate = np.array([_or_nan(rule(row)) for row in rows])
    gap = np.array([row["gap"] for row in rows])
    beyond = excess(rows, rule)
    errors = s.log_errors(estimate, gap)
    groups = [str(row["group"]) for row in rows]
    capped = np.minimum(beyond, CAP)
    measures: dict[str, s.Score] = {
        "kendall": lambda w: s.kendall(estimate, gap, w),
        "error_median": lambda w: s.quantile(errors, 0.5, w),
        "excess_median": lambda w: s.quantile(beyond, 0.5, w),
        "excess_p90": lambda w: s.quantile(beyond, 0.9, w),
        "excess_mean_capped": lambda w: float((w * capped).sum() / w.sum()),
    }
    found: Json = {}
    for name, measure in measures.items():
        low, high = s.bootstrap(measure, groups, draws=draws, level=LEVEL)
        value = measure(np.ones(len(rows)))
        found[name] = {"value": finite(value), "low": finite(low), "high": finite(high)}
    return found


def differences(rows: Sequence[Row], rules: Mapping[str, Rule], draws: int) -> Json:
    """Each rival's mean capped excess error minus the decision list's, on the same models."""
    capped = {name: np.minimum(excess(rows, rule), CAP) for name, rule in rules.items()}
    groups = [str(row["group"]) for row in rows]
    ours, *rivals = capped
    found = {}
    for name in rivals:
        more = capped[name] - capped[ours]
        low, high = s.bootstrap(
            lambda w, more=more: float((w * more).sum() / w.sum()), groups, draws=draws, level=LEVEL
        )
        found[name] = {"value": float(more.mean()), "low": low, "high": high}
    return found


def regimes_of(rows: Sequence[Row]) -> dict[str, Flags]:
    """Masks of the regimes that are reported; over-confident: and not saturated."""
    linear = np.array([row["architecture"] == "glm" for row in rows])
    saturated = np.array([bool(row["by_loo_saturated"]) for row in rows])
    at = np.array([branch(row) for row in rows])
    direction = np.array([row["by_loo_direction"] for row in rows])
    return {
        "all": np.ones(len(rows), dtype=bool),
        "linear": linear,
        "networks": ~linear,
        "calibrated": at == "calibrated",
        "under_confident": at == "under",
        "over_confident": np.isin(direction, ["over", "mixed"]) & ~saturated,
        "saturated": saturated,
        **{
            name: np.array([row["architecture"] == name for row in rows])
            for name in ("mlp", "cnn", "resnet", "transformer")
        },
    }


def fit(rows: Sequence[Row], *, draws: int = 200) -> Json:
    """The whole of rule_fit.json."""
    rows = [row for row in rows if number(row, "gap") is not None and decided(row) is not None]
    crossed = cross_validate(rows)
    told = crossed["told"]
    chosen = choose(rows)
    rules: dict[str, Rule] = {
        "decision list, out of data set": lambda row: told[row["name"]]["rule"],
        "as above, LOO where under-confident": lambda row: (
            LOO(row) if branch(row) == "under" else told[row["name"]]["rule"]
        ),
        "decision list, calibration by 200 held-out labels": decision_list_heldout,
        "decision list of 0002": first_list,
        "paper: soft rank if calibrated, else TIC": paper,
        "always soft rank": SOFT_RANK,
        "always TIC": TIC,
        "always LOO": LOO,
        "always recalibrated soft rank": lambda row: (
            SOFT_RANK(row) if RECALIBRATED(row) is None else RECALIBRATED(row)
        ),
        "TIC if under, else LOO and recalibrated": geometric,
        "oracle": nearest,
        "200 held-out labels": lambda row: number(row, "held_gap"),
    }
    masks = {name: mask for name, mask in regimes_of(rows).items() if mask.any()}
    scores = {
        regime: {
            name: rule_scores([row for row, m in zip(rows, mask, strict=True) if m], rule, draws)
            for name, rule in rules.items()
        }
        for regime, mask in masks.items()
    }
    return {
        "models": len(rows),
        "data_sets": len(crossed["folds"]),
        "criterion": "mean over data sets of the mean excess error, capped at log 4",
        "choice": chosen,
        "candidates": {
            at: {
                name: criterion([row for row in rows if branch(row) == at], rule)
                for name, rule in candidates.items()
            }
            for at, candidates in OPEN.items()
        },
        "model_error": model_errors(rows),
        "folds": crossed["folds"],
        "scores": {name: {"n": int(masks[name].sum())} | scores[name] for name in scores},
        "differences": differences(rows, rules, draws),
        "intervals": intervals(rows, told, masks),
        "confidence": confidence(rows, told),
    }


def intervals(rows: Sequence[Row], told: Mapping[str, Json], masks: Mapping[str, Flags]) -> Json:
    """Coverage by regime, data set and estimator: of sampling alone, and out of data set."""
    groups: dict[str, Flags] = dict(masks)
    for key in ("data", "estimator"):
        values = np.array([row["data"] if key == "data" else told[row["name"]]["estimator"]
                           for row in rows])  # fmt: skip
        groups |= {f"{key}: {value}": values == value for value in np.unique(values)}
    ratio = np.array([row["n_train"] / row["record_rank"] for row in rows])
    for low, high in ((0, 2), (2, 5), (5, 10), (10, math.inf)):
        groups[f"n / soft rank from {low} to {high:g}"] = (ratio >= low) & (ratio < high)
    before, after = (np.array([told[row["name"]][key] for row in rows], dtype=float)
                     for key in ("sampling", "covered"))  # fmt: skip
    return {
        name: {
            "n": int(mask.sum()),
            "sampling_only": float(before[mask].mean()),
            "widened": float(after[mask].mean()),
        }
        for name, mask in groups.items()
        if mask.any()
    }


def confidence(rows: Sequence[Row], told: Mapping[str, Json]) -> Json:
    """How many models are called ok or low, how many of those were right, and why they are low."""
    found: Json = {}
    for level in ("ok", "low"):
        of = [each for each in told.values() if each["confidence"] == level]
        found[level] = {"n": len(of), "share": len(of) / len(told), "right": _share_right(of)}
    found["reasons"] = dict(Counter(why for each in told.values() for why in each["reasons"]))
    over = [row["name"] for row in rows if row["by_loo_direction"] in ("over", "mixed")]
    called = [told[name] for name in over if told[name]["confidence"] == "ok"]
    found["ok_and_over_confident"] = {"n": len(called), "right": _share_right(called)}
    return found


def _share_right(told: Sequence[Json]) -> float | None:
    """The share with the gap in the interval or within FACTOR of the estimate."""
    return float(np.mean([each["covered"] or each["near"] for each in told])) if told else None


def load(path: Path) -> list[Row]:
    """The rows of a results file, or of a store's folder."""
    return list(read_rows(path, "measured", grid())) if path.is_dir() else list(read(path))


def table(found: Json, regime: str) -> str:
    """A regime's rules as text, best first."""
    heads = ("kendall", "error_median", "excess_median", "excess_p90", "excess_mean_capped")
    lines = [f"{regime}: {found['scores'][regime]['n']} models"]
    lines.append(f"{'':44}" + "".join(f"{head:>20}" for head in heads))
    of = {name: row for name, row in found["scores"][regime].items() if name != "n"}
    for name, row in sorted(of.items(), key=lambda item: item[1][heads[-1]]["value"]):
        values = ("-" if row[h]["value"] is None else f"{row[h]['value']:.3f}" for h in heads)
        lines.append(f"{name:44}" + "".join(f"{value:>20}" for value in values))
    return "\n".join(lines)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("results", type=Path, nargs="?",
                           default=OUT.with_name("results.parquet"))  # fmt: skip
    arguments.add_argument("--out", type=Path, default=OUT)
    arguments.add_argument("--draws", type=int, default=400, help="of the bootstrap")
    given = arguments.parse_args()
    found = fit(load(given.results), draws=given.draws)
    text = json.dumps(rounded(found), indent=1, allow_nan=False)
    given.out.write_text(text + "\n", encoding="utf-8")
    for regime in found["scores"]:
        print(table(found, regime), end="\n\n")
    print(json.dumps({k: found[k] for k in ("choice", "model_error", "confidence")}, indent=1))


if __name__ == "__main__":
    main()
