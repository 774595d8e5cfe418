"""Dots with whiskers on one axis, as places in per cent of the width: small pictures in tables."""

from __future__ import annotations

import math
from collections.abc import Iterable

Limits = tuple[float, float]
Mark = dict[str, str | None]


def scale(values: Iterable[float | None]) -> Limits:
    """Axis limits around all finite values, with a margin of 6 % on both sides."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def mark(
    limits: Limits,
    value: float | None,
    low: float | None,
    high: float | None,
    line: float | None = None,
) -> Mark | None:
    """Places of a dot, its whisker, zero and a line to compare with; None without a value.

    >>> mark((0.0, 2.0), 1.0, None, None)["at"]
    '50.00%'
    """
    if value is None:
        return None
    start, end = limits

    def place(x: float | None) -> str | None:
        return None if x is None else f"{100 * (x - start) / (end - start):.2f}%"

    return {"at": place(value), "low": place(low), "high": place(high), "zero": place(0.0),
            "line": place(line)}  # fmt: skip
