"""The report on a terminal: the first screen of the page, as plain text."""

from __future__ import annotations

import textwrap
from typing import Any

from flataudit.errors import printable
from flataudit.report import sensitivity, words

WIDTH = 96
LABEL = 12


def render(report: dict[str, Any]) -> str:
    """The answer, then the reasons, then the warnings with what to do first."""
    confidence, gap = report["confidence"], report["gap"]
    name = report["model"]["uri"] or "model"
    first = f"{name}: {words.verdict(report).upper()} (confidence {confidence})"
    lines = [*textwrap.wrap(first, WIDTH, break_on_hyphens=False), ""]
    lines += _row("gap", f"{words.gap_text(report)} nats per example, by {gap['estimator']}")
    predicted = report["predicted_test_nll"]
    test = words.interval(predicted["value"], predicted["low"], predicted["high"])
    lines += _row("loss", f"{test} on unseen data, {words.number(report['train']['nll'])} trained")
    accuracy = report["predicted_accuracy"]
    if accuracy:
        text = words.percent_interval(accuracy["value"], accuracy["low"], accuracy["high"])
        lines += _row("accuracy", f"{text} {words.accuracy_source(report)}")
    lines += _row("estimates", _estimates(report))
    calibration = report["calibration"]
    lines += _row("calibration", f"{calibration['verdict']}, direction {calibration['direction']}")
    lines += _row("penalty", words.PENALTY_SOURCES[report["penalty"]["source"]])
    for note in report["penalty"]["assumptions"]:
        lines += _row("", note)
    if report.get("sensitivity"):
        lines += _row("sensitivity", f"gap {sensitivity.text(report)}; D: the penalty")
    solver = report["solver"]
    lines += _row(
        "solver", f"{solver['name']} on {solver['device']} in {solver['seconds']:.2g} s"
        f" ({solver['reason']})"
    )  # fmt: skip
    lines.append("")
    for sentence in words.explain(report):
        lines += textwrap.wrap(sentence, WIDTH)
    for warning in words.sorted_warnings(report):
        head = f"{warning['severity']}: {warning['code']}"
        lines += ["", head]
        lines += textwrap.wrap(
            words.sentence(warning["message"]), WIDTH, initial_indent="  ", subsequent_indent="  "
        )
    return "\n".join(map(printable, lines))


def _estimates(report: dict[str, Any]) -> str:
    parts = [
        f"{name} {words.interval(estimate['gap'], None, None)}"
        for name, estimate in report["estimates"].items()
        if estimate is not None
    ]
    return ", ".join(parts)


def _row(label: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=f"{label:<{LABEL}}", subsequent_indent=" " * LABEL
    )
