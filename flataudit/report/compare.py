"""Two audited versions side by side, from their reports alone: what differs, and how surely.

Pure functions: reports' JSON in, plain data or text out. Losses and gaps are nats per example.

The standard error of a predicted loss is sd(l + psi)/sqrt(n) over the training samples. Reports do
not hold the per-sample values, so the correlation r of two models' errors is unknown: the error of
the difference is sqrt(a^2 + b^2 - 2 r a b), between |a - b| and a + b. On different data r = 0. On
the same data r is anywhere, as a rule above 0, and two statements are made: one that holds for
every r, by a + b, and one that holds for r >= 0, by sqrt(a^2 + b^2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from flataudit.report import words

if TYPE_CHECKING:
    from jinja2 import Template

Report = Mapping[str, Any]


def compare(first: Report, second: Report, names: tuple[str, str]) -> dict[str, Any]:
    """The comparison as JSON values.

    Returns:
        {names, same_model, same_data, comparable, reason, rows: [{name, first, second, differs}],
        difference: {value, se, low, high, level, se_any, low_any, high_any, better, certainty,
        sentence} | null}. The difference is the second's predicted_test_nll minus the first's; the
        interval `_any` holds whatever the correlation. better: the name, or null; certainty:
        whatever_the_correlation | if_not_negatively_correlated | independent | none.
    """
    same_data = first["data"]["sha256"] == second["data"]["sha256"]
    comparable, reason = _comparable(first, second, same_data)
    rows = [
        {"name": label, "first": a, "second": b, "differs": a != b}
        for label, a, b in zip(
            [label for label, _ in _cells(first)],
            [text for _, text in _cells(first)],
            [text for _, text in _cells(second)],
            strict=True,
        )
    ]
    ids = [report["model"].get("model_id") for report in (first, second)]
    return {
        "names": list(names),
        "same_model": ids[0] is not None and ids[0] == ids[1],
        "same_data": same_data,
        "comparable": comparable,
        "reason": reason,
        "rows": rows,
        "difference": _difference(first, second, names, same_data) if comparable else None,
    }


def render_html(found: Mapping[str, Any]) -> str:
    """One self-contained page; no network, no scripts."""
    return _template().render(found=found, sentence=words.sentence)


def _comparable(first: Report, second: Report, same_data: bool) -> tuple[bool, str]:
    families = first["family"], second["family"]
    if families[0] != families[1]:
        return (
            False,
            f"losses of the {families[0]} and the {families[1]} family have no common unit",
        )
    if any(_number(r, "predicted_test_nll", "value") is None for r in (first, second)):
        return False, "an audit without a predicted loss"
    if same_data:
        return True, "both were trained and audited on the same data"
    return True, (
        "the training data differ: each prediction is for data like its own, so the difference is"
        " one of models only where both are samples of the same population"
    )


def _difference(
    first: Report, second: Report, names: tuple[str, str], same_data: bool
) -> dict[str, Any]:
    values = [_number(r, "predicted_test_nll", "value") or 0.0 for r in (first, second)]
    value = values[1] - values[0]
    level = min(float(r["gap"]["level"]) for r in (first, second))
    errors = [_se(first), _se(second)]
    found: dict[str, Any] = {"value": value, "level": level}
    if errors[0] is None or errors[1] is None:
        return found | dict.fromkeys(("se", "low", "high", "se_any", "low_any", "high_any")) | {
            "better": None,
            "certainty": "none",
            "sentence": "An audit without an interval: how sure the difference is cannot be told.",
        }  # fmt: skip
    z = NormalDist().inv_cdf(0.5 + level / 2)
    se, widest = math.hypot(errors[0], errors[1]), errors[0] + errors[1]
    found |= {"se": se, "low": value - z * se, "high": value + z * se}
    found |= {"se_any": widest, "low_any": value - z * widest, "high_any": value + z * widest}
    better = names[1] if value < 0 else names[0]
    percent = f"{100 * level:.0f} %"
    if same_data and abs(value) > z * widest:
        certainty = "whatever_the_correlation"
        text = f"{better} is predicted better, at the {percent} level whatever the correlation of"
        text += " the two models' errors."
    elif abs(value) > z * se:
        certainty = "if_not_negatively_correlated" if same_data else "independent"
        text = f"{better} is predicted better at the {percent} level"
        text += (
            ", if the two models' errors on the same samples are not negatively correlated, which"
            " they seldom are."
            if same_data
            else ", for the two data sets as independent samples."
        )
    else:
        better, certainty = "", "none"
        text = f"No difference is shown at the {percent} level."
        if same_data:
            text += (
                " Errors on the same samples usually go together, so a paired comparison could"
                " still show one: audit both in Python and compare report.samples."
            )
    return found | {"better": better or None, "certainty": certainty, "sentence": text}


def _se(report: Report) -> float | None:
    """The standard error of the predicted loss, from its interval."""
    predicted = report["predicted_test_nll"]
    low, high = predicted["low"], predicted["high"]
    if low is None or high is None:
        return None
    z = NormalDist().inv_cdf(0.5 + float(report["gap"]["level"]) / 2)
    return float(high - low) / (2 * z)


def _cells(report: Report) -> list[tuple[str, str]]:
    known = dict(report)
    gap, predicted, calibration = report["gap"], report["predicted_test_nll"], report["calibration"]
    accuracy, heldout, penalty = report["predicted_accuracy"], report["heldout"], report["penalty"]
    codes = [f"{w['code']} ({w['severity']})" for w in words.sorted_warnings(known)]
    value = penalty["value"]
    size = words.number(value) if value is not None else "differs by parameter"
    return [
        ("verdict", words.verdict(known)),
        ("rely on it", str(report["confidence"])),
        ("gap", words.gap_text(known)),
        ("estimator", str(gap["estimator"])),
        (
            "predicted loss",
            words.interval(predicted["value"], predicted["low"], predicted["high"]),
        ),
        (
            "predicted accuracy",
            words.percent_interval(accuracy["value"], accuracy["low"], accuracy["high"])
            if accuracy
            else words.DASH,
        ),
        ("training loss", words.number(report["train"]["nll"])),
        ("training accuracy", words.percent(report["train"]["accuracy"])),
        ("observed gap", _observed(heldout)),
        ("calibration", str(calibration["verdict"])),
        ("direction", str(calibration["direction"])),
        ("judged on", words.EVIDENCE.get(calibration["evidence"], str(calibration["evidence"]))),
        ("penalty", f"{size}, {words.PENALTY_SOURCES.get(penalty['source'], penalty['source'])}"),
        ("warnings", ", ".join(codes) or "none"),
        ("parameters", words.number(report["model"]["n_params"])),
        ("samples", words.number(report["data"]["n_samples"])),
        ("data (sha256)", str(report["data"]["sha256"])[:16]),
    ]


def _observed(heldout: Mapping[str, Any] | None) -> str:
    if not heldout or heldout["gap"] is None:
        return words.DASH
    text = words.interval(heldout["gap"], None, None)
    return f"{text} (standard error {words.interval(heldout['gap_se'], None, None)})"


def _number(report: Report, *path: str) -> float | None:
    value: Any = report
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


@cache
def _template() -> Template:
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    text = (files("flataudit.report") / "compare.html.j2").read_text(encoding="utf-8")
    return Environment(autoescape=True, undefined=StrictUndefined).from_string(text)
