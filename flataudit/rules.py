"""The rules of a gate as a pure function: policy and audit in, one outcome per rule out.

What is missing fails: a rule whose value the audit lacks does not pass. What is not listed in the
policy is not checked. Losses are nats per example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flataudit.policy import GatePolicy
from flataudit.results import SEVERITIES

Report = Mapping[str, Any]
_CLOCKS = 1 / 24  # days that an audit may seem to lie in the future, as clocks differ


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule, the value that was found and the threshold it was held against.

    skipped: there was nothing to hold it against, which the message explains; it then passes.
    """

    name: str
    value: float | str | None
    threshold: float | str | Sequence[str] | None
    passed: bool
    skipped: bool = False
    message: str = ""


@dataclass(frozen=True, slots=True)
class Baseline:
    """The version to be no worse than: version None where the alias is not set.

    same: it is the version under the gate; report: of its latest audit, None where there is none.
    """

    version: str | None = None
    same: bool = False
    report: Report | None = None


def evaluate(
    policy: GatePolicy,
    report: Report | None,
    *,
    age_days: float | None = None,
    baseline: Baseline | None = None,
    missing: str = "this version has no audit",
) -> tuple[Rule, ...]:
    """The outcome of each rule that the policy lists, in the policy's order.

    Args:
        policy: The rules.
        report: The JSON of the latest audit of exactly this version, None without a usable one.
        age_days: Days since that audit.
        baseline: What the policy's alias names.
        missing: Why there is no report.

    Returns:
        One `Rule` each; before them a failed rule `audit` where there is no report, so that no
        policy passes a version without one.
    """
    found = [] if report is not None else [Rule("audit", None, None, False, message=missing)]
    for name, threshold in policy.rules().items():
        if name == "baseline":
            found.append(_no_regression(policy, report, baseline or Baseline()))
        elif name == "max_age_days":
            found.append(_recent(threshold, age_days if report is not None else None))
        else:
            found.append(_CHECKS[name](name, threshold, report or {}))
    return tuple(found)


def all_passed(rules: Sequence[Rule]) -> bool:
    """Whether no rule failed."""
    return all(rule.passed for rule in rules)


def _at_most(name: str, threshold: float, report: Report) -> Rule:
    path = {"max_gap": ("gap", "high"), "max_predicted_test_nll": ("predicted_test_nll", "value")}
    value = number_at(report, *path[name])
    if value is None:
        return _lacking(name, threshold, report)
    return Rule(name, value, threshold, value <= threshold)


def _at_least(name: str, threshold: float, report: Report) -> Rule:
    value = number_at(report, "predicted_accuracy", "value")
    if value is None:
        return _lacking(name, threshold, report)
    return Rule(name, value, threshold, value >= threshold)


def _one_of(name: str, threshold: Sequence[str], report: Report) -> Rule:
    found = report.get("calibration")
    value = found.get("verdict") if isinstance(found, Mapping) else None
    value = value if name == "calibration" else report.get("confidence")
    if not isinstance(value, str):
        return _lacking(name, threshold, report)
    return Rule(name, value, threshold, value in threshold)


def _not_graver(name: str, threshold: str, report: Report) -> Rule:
    warnings = report.get("warnings")
    if not isinstance(warnings, list):
        return _lacking(name, threshold, report)
    severities = [str(w.get("severity")) for w in warnings if isinstance(w, Mapping)]
    ranks: dict[str, float] = {severity: rank for rank, severity in enumerate(SEVERITIES)}
    gravest = max(severities, key=lambda s: ranks.get(s, math.inf), default="none")
    codes = [
        str(w.get("code"))
        for w in warnings
        if ranks.get(str(w.get("severity")), math.inf) > ranks[threshold]
    ]
    return Rule(name, gravest, threshold, not codes, message=", ".join(codes))


def _recent(threshold: float, age_days: float | None) -> Rule:
    name = "max_age_days"
    if age_days is None or not math.isfinite(age_days):
        return Rule(name, None, threshold, False, message="no audit whose age could be told")
    if age_days < -_CLOCKS:
        message = "the audit lies in the future; check the clocks"
        return Rule(name, age_days, threshold, False, message=message)
    return Rule(name, max(age_days, 0.0), threshold, age_days <= threshold)


def _no_regression(policy: GatePolicy, report: Report | None, baseline: Baseline) -> Rule:
    name, threshold, alias = "baseline", policy.max_regression, policy.baseline
    if baseline.version is None:
        message = f"skipped: no version has the alias {alias}"
        return Rule(name, None, threshold, True, skipped=True, message=message)
    if baseline.same:
        message = f"skipped: this version is {alias}"
        return Rule(name, None, threshold, True, skipped=True, message=message)
    what = f"{alias}, version {baseline.version}"
    ours = number_at(report or {}, "predicted_test_nll", "value")
    theirs = number_at(baseline.report or {}, "predicted_test_nll", "value")
    if theirs is None or baseline.report is None:
        message = f"no predicted_test_nll for {what}; audit it"
        return Rule(name, None, threshold, False, message=message)
    if ours is None or report is None:
        return _lacking(name, threshold, report or {})
    if report.get("family") != baseline.report.get("family"):
        message = (
            f"losses of the {report.get('family')} and the {baseline.report.get('family')} family"
            f" cannot be compared ({what})"
        )
        return Rule(name, None, threshold, False, message=message)
    # Held against the sum, not the difference: 0.27 is no more than 0.02 above 0.25.
    return Rule(
        name, ours - theirs, threshold, ours <= theirs + threshold, message=f"against {what}"
    )


_CHECKS: Mapping[str, Callable[[str, Any, Report], Rule]] = {
    "max_gap": _at_most,
    "max_predicted_test_nll": _at_most,
    "min_predicted_accuracy": _at_least,
    "calibration": _one_of,
    "confidence": _one_of,
    "max_severity": _not_graver,
}


def number_at(report: Report, *path: str) -> float | None:
    """The finite number at this place of a report; None for anything else."""
    value: Any = report
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _lacking(name: str, threshold: Any, report: Report) -> Rule:
    message = "the audit has no such value" if report else "there is no audit"
    return Rule(name, None, threshold, False, message=message)
