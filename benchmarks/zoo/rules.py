"""Rules that pick an estimate from a model's row, to be compared with what the audit chose.

Each takes a row of `measure` (a mapping of its columns) and returns a gap, or None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

Row = Mapping[str, Any]
CALIBRATED = ("calibrated", "within_tolerance")
ESTIMATES = ("soft_rank", "tic", "loo", "soft_rank_recalibrated")


def number(row: Row, name: str) -> float | None:
    """A column as a finite float, else None."""
    value = row.get(name)
    return None if value is None or not math.isfinite(value) else float(value)


def paper(row: Row) -> float | None:
    """Soft rank where calibrated, else TIC: the paper's rule as it stands."""
    calibrated = row.get("by_loo_verdict") in CALIBRATED
    return number(row, "record_soft_rank" if calibrated else "record_tic")


def chosen_by_loo(row: Row) -> float | None:
    """The audit's own choice, calibration judged by leave-one-out."""
    return number(row, "by_loo_gap")


def chosen_by_heldout(row: Row) -> float | None:
    """The audit's own choice, calibration judged on held-out labels."""
    return number(row, "by_heldout_gap")


def geometric(row: Row) -> float | None:
    """TIC where under-confident, else the geometric mean of LOO and the recalibrated soft rank."""
    if row.get("by_loo_direction") == "under":
        return number(row, "record_tic")
    first, second = number(row, "record_loo"), number(row, "record_soft_rank_recalibrated")
    if first is None or second is None or first <= 0 or second <= 0:
        return first
    return math.sqrt(first * second)


def oracle(row: Row) -> float | None:
    """The estimate nearest to the true gap, by the logarithm of the ratio: no rule can beat it."""
    gap = number(row, "gap")
    values = [number(row, f"record_{name}") for name in ESTIMATES]
    positive = [value for value in values if value is not None and value > 0]
    if gap is None or gap <= 0 or not positive:
        return None
    return min(positive, key=lambda value: abs(math.log(value / gap)))


RULES: dict[str, Callable[[Row], float | None]] = {
    "rule_paper": paper,
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
