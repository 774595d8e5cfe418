"""Regression: whether the gap rose since the last audit of the same registered model.

Two audits give gaps g0 in [l0, u0] and g1 in [l1, u1], nats per example, at one level. The interval
of their difference begins at

    d - sqrt((g1 - l1)^2 + (u0 - g0)^2),  d = g1 - g0,

which recovers variances from the intervals (MOVER: Zou and Donner, Statistics in Medicine 27, 2008)
and needs no symmetry. It holds for independent errors; audits that share data err in the same
direction, which makes it too wide: a regression that is found is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

CODE = "gap_regressed"


def rise(now: Mapping[str, float], before: Mapping[str, float]) -> tuple[float, float]:
    """The gap's rise and the lower end of the rise's interval, nats per example.

    Args:
        now, before: {value, low, high} of each gap.

    >>> d, low = rise(
    ...     {"value": 0.5, "low": 0.2, "high": 0.6}, {"value": 0.1, "low": 0.0, "high": 0.5}
    ... )
    >>> round(d, 12), round(low, 12)
    (0.4, -0.1)
    """
    difference = now["value"] - before["value"]
    margin = math.hypot(now["value"] - now["low"], before["high"] - before["value"])
    return difference, difference - margin


def regression_warnings(
    report: Mapping[str, Any], earlier: Iterable[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """The warning `gap_regressed` where the gap rose by more than the interval of the rise.

    Other data or another family are said; losses of two families have no common scale.

    Args:
        report: The new audit, as JSON.
        earlier: Earlier audits of the same registered model, newest first, as
            `flataudit.history.earlier_audits` gives them; the first with a gap counts.
    """
    gap = report["gap"]
    numbers = ("gap", "gap_low", "gap_high")
    last = next((a for a in earlier if all(a.get(n) is not None for n in numbers)), None)
    if last is None or any(gap[n] is None for n in ("value", "low", "high")):
        return []
    before = dict(zip(("value", "low", "high"), (last[n] for n in numbers), strict=True))
    difference, low = rise(gap, before)
    if not low > 0.0:
        return []
    of = f" of version {last['version']}" if last.get("version") else ""
    parts = [
        f"the gap rose by {difference:.3g} nats per example (at least {low:.3g}) since the last"
        f" audit{of} on {str(last['audited_at'])[:10]}, from {_shown(before)} to {_shown(gap)}"
    ]
    if last.get("data_sha256") not in (None, report["data"]["sha256"]):
        parts.append("the training data are other ones than then")
    if last.get("family") not in (None, report["family"]):
        parts.append(
            f"the family was {last['family']} then and is {report['family']} now, whose losses"
            " have no common scale"
        )
    parts.append("compare the two audits before this version replaces another")
    return [{"code": CODE, "severity": "warn", "message": "; ".join(parts)}]


def _shown(gap: Mapping[str, float]) -> str:
    return f"{gap['value']:.3g} [{gap['low']:.3g}, {gap['high']:.3g}]"
