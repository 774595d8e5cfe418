"""Rules that pick an estimate from a model's row, to be compared with what the audit chose.

Each takes a row of `measure` (a mapping of its columns) and returns a gap, or None. `decided` is
the package's decision list applied to a row, so that a change of the list needs no new audits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flataudit.results import (
    LEVEL,
    Calibration,
    Estimate,
    Estimates,
    EstimatorName,
    Gap,
    PenaltyInfo,
)
from flataudit.selection import Observations, SelectionPolicy, choose_estimator

Row = Mapping[str, Any]
Rule = Callable[[Row], float | None]
CALIBRATED = ("calibrated", "within_tolerance")
ESTIMATES = ("soft_rank", "tic", "loo", "soft_rank_recalibrated")
BLENDED = ("soft_rank", "soft_rank_recalibrated")


def number(row: Row, name: str) -> float | None:
    """A column as a finite float, else None."""
    value = row.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def calibration(row: Row, evidence: str = "loo") -> Calibration:
    """The verdict of a row, as the decision list reads it."""
    found = {key: row[f"by_{evidence}_{key}"] for key in ("verdict", "direction", "severity")}
    return Calibration(evidence=evidence, n=row["n_train"], **found)  # type: ignore[arg-type]


def record(name: str) -> Rule:
    """The estimate `name` at the record's penalty."""
    return lambda row: number(row, f"record_{name}")


def both(first: Rule, second: Rule) -> Rule:
    """The geometric mean of two estimates; the first where the second does not exist."""

    def rule(row: Row) -> float | None:
        a, b = first(row), second(row)
        return a if a is None or b is None or a <= 0 or b <= 0 else math.sqrt(a * b)

    return rule


SOFT_RANK, TIC, LOO = record("soft_rank"), record("tic"), record("loo")
RECALIBRATED = record("soft_rank_recalibrated")
blend = both(SOFT_RANK, RECALIBRATED)
_loo_and_recalibrated = both(LOO, RECALIBRATED)


@dataclass(frozen=True, slots=True)
class Decided:
    """What the decision list takes of a row: the estimator, its gap and standard error."""

    estimator: EstimatorName
    gap: float
    se: float


def decided(row: Row, evidence: str = "loo") -> Decided | None:
    """The decision list of `flataudit.selection` on a row; None where a verdict is missing."""
    if row.get(f"by_{evidence}_verdict") is None:
        return None
    name, _ = choose_estimator(
        calibration(row, evidence),
        linear=row["architecture"] == "glm",
        saturated=bool(row[f"by_{evidence}_saturated"]),
        has_loo=number(row, "record_loo") is not None,
        scale=number(row, "record_scale"),
    )
    if name != "soft_rank_blend":
        gap, se = number(row, f"record_{name}"), number(row, f"record_{name}_se")
    else:  # its own standard error lies between those of its parts
        gap = blend(row)
        parts = [number(row, f"record_{part}_se") or 0.0 for part in BLENDED]
        se = sum(parts) / len(parts)
    return None if gap is None or se is None else Decided(name, gap, se)


def decision_list(row: Row) -> float | None:
    """The gap by the decision list, calibration judged by leave-one-out."""
    found = decided(row)
    return None if found is None else found.gap


def decision_list_heldout(row: Row) -> float | None:
    """The gap by the decision list, calibration judged on held-out labels."""
    found = decided(row, "heldout")
    return None if found is None else found.gap


def paper(row: Row) -> float | None:
    """Soft rank where calibrated, else TIC: the paper's rule as it stands."""
    calibrated = row.get("by_loo_verdict") in CALIBRATED
    return number(row, "record_soft_rank" if calibrated else "record_tic")


def chosen_by_loo(row: Row) -> float | None:
    """The choice of the audits as they were made, calibration judged by leave-one-out."""
    return number(row, "by_loo_gap")


def chosen_by_heldout(row: Row) -> float | None:
    """The choice of the audits as they were made, calibration judged on held-out labels."""
    return number(row, "by_heldout_gap")


def geometric(row: Row) -> float | None:
    """TIC where under-confident, else the geometric mean of LOO and the recalibrated soft rank."""
    if row.get("by_loo_direction") == "under":
        return TIC(row)
    return _loo_and_recalibrated(row)


def oracle(row: Row) -> float | None:
    """The estimate nearest to the true gap, by the logarithm of the ratio: no rule can beat it."""
    gap = number(row, "gap")
    values = [number(row, f"record_{name}") for name in ESTIMATES]
    positive = [value for value in values if value is not None and value > 0]
    if gap is None or gap <= 0 or not positive:
        return None
    return min(positive, key=lambda value: abs(math.log(value / gap)))


def never_sharper(inner: Rule) -> Rule:
    """`inner`, and the soft rank where recalibration would sharpen the model; LOO where it does
    not exist, as without classes."""

    def rule(row: Row) -> float | None:
        scale = number(row, "record_scale")
        if scale is None:
            return number(row, "record_loo")
        return inner(row) if scale < 1.0 else number(row, "record_soft_rank")

    return rule


def first_list(row: Row) -> float | None:
    """The decision list before this evidence (docs/decisions/0002-selection.md)."""
    c, saturated = calibration(row), bool(row["by_loo_saturated"])
    if c.verdict == "insufficient":
        return LOO(row)
    if c.verdict in CALIBRATED:
        return SOFT_RANK(row)
    if c.direction == "under":
        return TIC(row)
    doubtful = c.direction in ("over", "mixed") or saturated or c.verdict == "miscalibrated"
    again = RECALIBRATED(row) if doubtful and row["architecture"] != "glm" else None
    return LOO(row) if again is None else again


def nearest(row: Row) -> float | None:
    """The oracle's estimate, also of a gap at or below 0, where there is no ratio."""
    values = [number(row, f"record_{name}") for name in ESTIMATES]
    known = [value for value in values if value is not None]
    return oracle(row) if row["gap"] > 0 else min(known, key=lambda v: abs(v - row["gap"]))


RULES: dict[str, Rule] = {
    "rule_paper": paper,
    "rule_list": decision_list,
    "rule_list_heldout": decision_list_heldout,
    "rule_audit_loo": chosen_by_loo,
    "rule_audit_heldout": chosen_by_heldout,
    "rule_geometric": geometric,
    "rule_oracle": oracle,
}


def regimes(row: Row) -> list[str]:
    """The regimes a model belongs to.

    linear: a GLM; at_minimum: at least half of the penalty is weight decay, the rest being training
    time; early_stopped: less. By calibration: of leave-one-out. P<N: fewer parameters than rows.
    """
    found = ["all"]
    if row["architecture"] == "glm":
        found.append("linear")
    else:
        decay, record = number(row, "decay_penalty"), number(row, "record_penalty")
        settled = decay is not None and record is not None and decay >= 0.5 * record
        found += ["nets", "at_minimum" if settled else "early_stopped", row["architecture"]]
    if row.get("by_loo_verdict") in CALIBRATED:
        found.append("calibrated")
    elif row.get("by_loo_direction") in ("under", "over"):
        found.append(f"{row['by_loo_direction']}_confident")
    if number(row, "n_params") is not None:
        found.append("P<N" if row["n_params"] < row["n_rows"] else "P>N")
    confidence = row.get("by_loo_confidence")
    return [*found, f"called_{confidence}"] if confidence else found


def observed(row: Row, found: Decided, ends: tuple[float, float]) -> Observations:
    """A row as what the confidence is decided on."""
    warned = (row["by_loo_warnings"] or "").split(",")
    policy = SelectionPolicy()
    return Observations(
        calibration=calibration(row),
        estimates=Estimates(Estimate(0.0, 0.0), Estimate(0.0, 0.0)),
        premise=None,
        penalty=PenaltyInfo(None, 0, "training", None, None),
        gap=Gap(found.gap, *ends, LEVEL, found.estimator, ""),
        heldout=None,
        saturated=bool(row["by_loo_saturated"]),
        gradient_noise=0.0,
        max_leverage=policy.leverage * (2.0 if "high_leverage" in warned else 0.5),
        training_time=False,
        linear=row["architecture"] == "glm",
    )
