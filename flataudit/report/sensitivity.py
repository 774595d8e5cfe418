"""How the estimates change with the penalty, in words and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flataudit.report import words


def text(report: Mapping[str, Any]) -> str:
    """The believed estimate at each penalty: "0.061 at D/3, 0.052 at D, 0.040 at 3 D", or ""."""
    code = report["gap"]["estimator"]
    points = report.get("sensitivity") or []
    return ", ".join(
        f"{words.interval(point.get(code), None, None)} at {penalty(point['factor'])}"
        for point in points
    )


def table(report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Columns: the estimators that exist; rows: the penalties, with each estimator's gap."""
    points = report.get("sensitivity")
    if not points:
        return None
    codes = [code for code in words.ESTIMATORS if any(p.get(code) is not None for p in points)]
    used = report["gap"]["estimator"]
    return {
        "columns": [{"name": words.ESTIMATORS[code][0], "used": code == used} for code in codes],
        "rows": [
            {"name": penalty(p["factor"]), "gaps": [p.get(code) for code in codes]} for p in points
        ],
    }


def penalty(factor: float) -> str:
    """The penalty D times a factor.

    >>> penalty(1 / 3), penalty(1.0), penalty(3.0)
    ('D/3', 'D', '3 D')
    """
    if factor == 1:
        return "D"
    return f"D/{1 / factor:.3g}" if factor < 1 else f"{factor:.3g} D"
