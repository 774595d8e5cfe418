"""Scores every estimate, rule and baseline against the true gaps, overall and by regime.

    python -m benchmarks.zoo.scores [RESULTS.parquet] [--out scores.json] [--draws 200]

Values come with a 90 % interval from resampling groups of models that share training samples.
Measures that are no gap (norms, sharpness) are scored by their order alone. A model for which an
estimate does not exist is left out of that estimate's scores; n says how many were in. Two more
tables: `floor`, what sampling noise alone allows, and `beside`, the audit's choice (OURS) with each
rival that sees the training samples alone, on the models that have both.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from benchmarks.zoo import statistics as s
from benchmarks.zoo.grid import HYPERPARAMETERS, differ_in_one
from benchmarks.zoo.rules import ESTIMATES, RULES, decided, number, observed, regimes
from flataudit.results import Z_LEVEL
from flataudit.selection import MODEL_ERROR, choose_confidence, widened

Json = dict[str, Any]
HERE = Path(__file__).parent
SOURCES = ("record", "decay", "evidence")
GAPS = (
    *(f"{source}_{name}" for source in SOURCES for name in ESTIMATES),
    *RULES, "held_gap", "cv_gap", "aic", "waic", "mpe", "mpe_kfac", "randalo",
)  # fmt: skip
ORDERS = (
    "hessian_trace", "hessian_top", "trace_ratio", "sam", "path_norm", "parameter_norm",
    "n_params", "alpha",
)  # fmt: skip
OURS = "rule_list"
RIVALS = ("cv_gap", "aic", "waic", "mpe_kfac", "mpe", "randalo", *ORDERS)
FLOOR_DRAWS = 200
LEVEL = 0.9
FEWEST = 5  # models that a score needs
FEWEST_GROUPS = 5  # independent groups that an interval needs
FEWEST_PER_TASK = 8  # models that PGDL's score needs of a task


def score(rows: Sequence[Mapping[str, Any]], name: str, *, draws: int = 200) -> Json | None:
    """All scores of one column of `rows`; None where fewer than FEWEST models have it."""
    rows = [row for row in rows if number(row, name) is not None and number(row, "gap") is not None]
    if len(rows) < FEWEST:
        return None
    estimate, gap, se, floor = (
        np.array([number(row, key) or 0.0 for row in rows])
        for key in (name, "gap", "gap_se", "floor")
    )
    groups = [str(row["group"]) for row in rows]

    def bounded(measure: s.Score) -> Json:
        return _bounded(measure, groups, draws)

    pairs = one_apart(rows)
    # Training samples are shared within a group; what differs in truth is known to gap_se.
    signs = s.sign_score(estimate, gap, se, pairs)
    found: Json = {
        "n": len(rows),
        "kendall": bounded(s.kendall_score(estimate, gap)),
        "spearman": bounded(s.spearman_score(estimate, gap)),
        "sign": bounded(lambda w: signs(w).get("all", math.nan)),
        "sign_worst": bounded(lambda w: signs(w).get("worst", math.nan)),
        "sign_by_hyperparameter": signs(np.ones(len(rows))),
        "n_pairs": len(pairs),
        "information": information(rows, estimate, gap, draws),
    }
    if name in GAPS:
        errors = s.log_errors(estimate, gap)
        beyond = s.excess(estimate, gap, floor)
        for key, values in (("error", errors), ("excess", beyond)):
            for label, q in (("median", 0.5), ("p90", 0.9)):
                found[f"{key}_{label}"] = bounded(lambda w, v=values, q=q: s.quantile(v, q, w))
        ends = interval(rows, name)
        if ends is not None:
            found["coverage"] = bounded(lambda w: s.coverage(*ends, gap, w))
    return found


def one_apart(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """Pairs of a group's models that differ in one hyper-parameter: (i, j, its name)."""
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["group"], []).append(i)
    pairs = (pair for members in groups.values() for pair in itertools.combinations(members, 2))
    named = ((i, j, differ_in_one(rows[i], rows[j])) for i, j in pairs)
    return [(i, j, name) for i, j, name in named if name is not None]


def information(
    rows: Sequence[Mapping[str, Any]], estimate: s.Floats, gap: s.Floats, draws: int
) -> Json:
    """PGDL's score, the mean over tasks: the groups with at least FEWEST_PER_TASK models."""
    groups = np.array([str(row["group"]) for row in rows])
    values = []
    for group in np.unique(groups):
        at = np.flatnonzero(groups == group)
        if len(at) < FEWEST_PER_TASK:
            continue
        varied = {
            key: [rows[i][key] for i in at]
            for key in HYPERPARAMETERS
            if len({str(rows[i][key]) for i in at}) > 1
        }
        value = s.conditional_information(estimate[at], gap[at], varied)
        if not math.isnan(value):
            values.append(value)
    if not values:
        return {"value": None, "low": None, "high": None, "tasks": 0}
    array = np.array(values)
    low, high = s.bootstrap(
        lambda w: float((w * array).sum() / w.sum()), [str(i) for i in range(len(array))],
        draws=draws, level=LEVEL,
    )  # fmt: skip
    return {
        "value": float(array.mean()),
        "low": finite(low),
        "high": finite(high),
        "tasks": len(array),
    }


def interval(
    rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[list[float], list[float]] | None:
    """The estimate's 90 % intervals: the audit's own, or +- 1.645 standard errors."""
    own = {"rule_audit_loo": "by_loo", "rule_audit_heldout": "by_heldout", OURS: OURS}.get(name)
    if own is not None:
        keys = (f"{own}_low", f"{own}_high")
        ends = [[number(row, key) for row in rows] for key in keys]
    else:
        z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
        ends = [[], []]
        for row in rows:
            value, se = number(row, name), number(row, f"{name}_se")
            for part, sign in zip(ends, (-1, 1), strict=True):
                part.append(None if value is None or se is None else value + sign * z * se)
    if any(end is None for part in ends for end in part):
        return None
    low, high = ends
    return low, high  # type: ignore[return-value]  # no None is left


SAID = {  # who foresees accuracy and mean confidence: the columns
    **{source: (f"{source}_accuracy", f"{source}_mean_confidence") for source in SOURCES},
    "heldout": ("by_heldout_calibration_accuracy", "by_heldout_calibration_mean_confidence"),
}


def accuracies(rows: Sequence[Mapping[str, Any]], *, draws: int = 200) -> Json:
    """Median absolute errors of the predicted accuracy and confidence gap, in points of 100.

    By leave-one-out at each penalty, and, for comparison, as 200 held-out labels tell it.
    """
    found: Json = {}
    for source, columns in SAID.items():
        kept = [
            row
            for row in rows
            if None not in [number(row, key) for key in (*columns, *TRUE)]
        ]  # fmt: skip
        told, sure, true, held = (
            np.array([number(row, key) for row in kept], dtype=float) for key in (*columns, *TRUE)
        )
        groups = [str(row["group"]) for row in kept]
        found[source] = {"n": len(kept)}
        for name, errors in (
            ("accuracy", 100 * np.abs(told - true)),
            ("confidence_gap", 100 * np.abs((sure - told) - (held - true))),
        ):
            found[source][name] = _bounded(
                lambda w, e=errors: s.quantile(e, 0.5, w), groups, draws
            )  # fmt: skip
    return found


TRUE = ("test_accuracy", "test_mean_confidence")


def floor(rows: Sequence[Mapping[str, Any]]) -> Json:
    """Scores of the true gap plus the sampling noise s = sd(l_loo)/sqrt(n): the mean over draws.

    What an estimate could reach that is wrong by nothing but the luck of its n samples.
    """
    rows = [row for row in rows if number(row, "gap") and number(row, "floor")]
    if len(rows) < FEWEST:
        return {"n": len(rows)}
    gap, noise = (np.array([number(row, key) for row in rows]) for key in ("gap", "floor"))
    rng = np.random.default_rng(0)
    ones = np.ones(len(rows))
    found = []
    for _ in range(FLOOR_DRAWS):
        drawn = gap + noise * rng.normal(size=len(rows))
        errors = s.log_errors(drawn, gap)
        found.append(
            (s.kendall(drawn, gap, ones), s.quantile(errors, 0.5), s.quantile(errors, 0.9))
        )
    names = ("kendall", "error_median", "error_p90")
    means = np.mean(found, axis=0)
    return {"n": len(rows)} | {
        name: finite(value) for name, value in zip(names, means, strict=True)
    }  # fmt: skip


def beside(rows: Sequence[Mapping[str, Any]], rival: str, *, draws: int = 200) -> Json | None:
    """OURS and a rival on the models that have both: Kendall's tau, and excess errors of gaps.

    {n, kendall: {ours, theirs, low, high}, ...}; low and high: of the difference, theirs - ours.
    """
    rows = [
        row for row in rows if None not in [number(row, key) for key in (OURS, rival, "gap")]
    ]  # fmt: skip
    if len(rows) < FEWEST:
        return None
    ours, theirs, gap = (
        np.array([number(row, key) for row in rows], dtype=float) for key in (OURS, rival, "gap")
    )
    noise = np.array([number(row, "floor") or 0.0 for row in rows])
    groups = [str(row["group"]) for row in rows]
    scores: dict[str, tuple[s.Score, s.Score]] = {
        "kendall": (s.kendall_score(ours, gap), s.kendall_score(theirs, gap))
    }
    if rival in GAPS:
        excess = [s.excess(values, gap, noise) for values in (ours, theirs)]
        for label, q in (("median", 0.5), ("p90", 0.9)):
            first, second = (
                lambda w, e=errors, q=q: s.quantile(e, q, w) for errors in excess
            )  # fmt: skip
            scores[f"excess_{label}"] = (first, second)
    found: Json = {"n": len(rows)}
    ones = np.ones(len(rows))
    for name, (mine, other) in scores.items():
        low, high = _interval(lambda w, a=mine, b=other: _difference(b(w), a(w)), groups, draws)
        found[name] = {
            "ours": finite(mine(ones)),
            "theirs": finite(other(ones)),
            "low": finite(low),
            "high": finite(high),
        }
    return found


def _difference(a: float, b: float) -> float:
    """a - b, 0 where both are infinite."""
    return 0.0 if a == b else a - b


def with_rules(rows: Sequence[Mapping[str, Any]]) -> list[Json]:
    """The rows with a column for each rule, and what the package's list says of each as it is now.

    A row's own by_loo_confidence is that of the audit as it was made; it makes way for the list's.
    """
    return [
        dict(row) | {name: rule(row) for name, rule in RULES.items()} | listed(row) for row in rows
    ]


def listed(row: Mapping[str, Any]) -> Json:
    """The decision list's interval, estimator and confidence for a row, by the package's rules."""
    found = decided(row)
    if found is None:
        return {}
    low, high = widened(found.gap, Z_LEVEL * found.se, MODEL_ERROR[found.estimator], Z_LEVEL)
    confidence, _ = choose_confidence(observed(row, found, (low, high)))
    return {
        f"{OURS}_low": low,
        f"{OURS}_high": high,
        f"{OURS}_estimator": found.estimator,
        "by_loo_confidence": confidence,
    }


def all_scores(rows: Sequence[Mapping[str, Any]], *, draws: int = 200) -> Json:
    """{regime: {n, groups, accuracies, floor, beside: {rival: ...}, scores: {column: ...}}}."""
    rows = with_rules(rows)
    names = list(dict.fromkeys(regime for row in rows for regime in regimes(row)))
    found: Json = {}
    for regime in names:
        of = [row for row in rows if regime in regimes(row)]
        scores = {name: score(of, name, draws=draws) for name in (*GAPS, *ORDERS)}
        rivals = {name: beside(of, name, draws=draws) for name in RIVALS}
        found[regime] = {
            "n": len(of),
            "groups": len({row["group"] for row in of}),
            "accuracies": accuracies(of, draws=draws),
            "floor": floor(of),
            "beside": {name: value for name, value in rivals.items() if value is not None},
            "scores": {name: value for name, value in scores.items() if value is not None},
        }
    return found


def table(found: Json, regime: str = "all") -> str:
    """A regime's scores as text, in the order of the median error, orders last."""
    heads = ("kendall", "sign", "sign_worst", "information", "error_median", "error_p90",
             "excess_median", "excess_p90", "coverage")  # fmt: skip
    lines = [f"{'':32}{'n':>5}" + "".join(f"{head:>15}" for head in heads)]

    def key(item: tuple[str, Json]) -> float:
        value = item[1].get("error_median", {}).get("value")
        return math.inf if value is None else float(value)

    for name, scores in sorted(found[regime]["scores"].items(), key=key):
        values = [scores.get(head, {}).get("value") for head in heads]
        cells = "".join(f"{'' if v is None else format(v, '.3f'):>15}" for v in values)
        lines.append(f"{name:32}{scores['n']:>5}{cells}")
    return "\n".join(lines)


def dump(found: Json) -> str:
    """JSON with four decimals, one line per estimate."""
    lines = []
    for regime, parts in rounded(found).items():
        inner = []
        for key, value in parts.items():
            if key in ("scores", "beside"):
                rows = ",\n".join(f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
                inner.append(f"  {json.dumps(key)}: {{\n{rows}\n  }}")
            else:
                inner.append(f"  {json.dumps(key)}: {json.dumps(value, allow_nan=False)}")
        lines.append(f" {json.dumps(regime)}: {{\n" + ",\n".join(inner) + "\n }")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def rounded(value: Any, decimals: int = 4) -> Any:
    """A result with so many decimals, and null where a number is not finite."""
    if isinstance(value, float):
        return round(value, decimals) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: rounded(v, decimals) for k, v in value.items()}
    return [rounded(v, decimals) for v in value] if isinstance(value, list) else value


def read(path: Path) -> list[Json]:
    """The rows of a parquet, missing values as None."""
    import pyarrow.parquet as pq

    return list(pq.read_table(path).to_pylist())


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("results", type=Path, nargs="?", default=HERE / "results.parquet")
    arguments.add_argument("--out", type=Path, help="default: scores.json beside the results")
    arguments.add_argument("--draws", type=int, default=200, help="of the bootstrap")
    given = arguments.parse_args()
    found = all_scores(read(given.results), draws=given.draws)
    out = given.out or given.results.with_name("scores.json")
    out.write_text(dump(found), encoding="utf-8")
    for regime in found:
        print(f"\n{regime}: {found[regime]['n']} models\n{table(found, regime)}")


def _interval(measure: s.Score, groups: Sequence[str], draws: int) -> tuple[float, float]:
    if len(set(groups)) < FEWEST_GROUPS:
        return math.nan, math.nan
    return s.bootstrap(measure, groups, draws=draws, level=LEVEL)


def _bounded(measure: s.Score, groups: Sequence[str], draws: int) -> Json:
    low, high = _interval(measure, groups, draws)
    return {
        "value": finite(measure(np.ones(len(groups)))),
        "low": finite(low),
        "high": finite(high),
    }


def finite(value: float) -> float | None:
    """The number, None for NaN and infinity."""
    return float(value) if math.isfinite(value) else None


if __name__ == "__main__":
    main()
