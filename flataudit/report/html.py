"""The report as one self-contained HTML page: inline style and SVG, no script, no network.

`render` turns the report into strings here and lays them out in `templates/report.html.j2`,
which escapes everything: names, labels and messages come from others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from flataudit.report import figures, marks, remedies, sensitivity, tables, trend, words

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATE = "report.html.j2"
INFLUENCE_SHOWN = 12  # rows in sight; the rest are folded away
INFLUENCE_MAX = 50

_SEVERITY_WORDS = {"info": "for information", "warn": "warning"}
_VERDICT_LEADS = {
    "pass": "Nothing stands against using this prediction.",
    "warn": "Usable with care. First:",
    "look": "Usable, but look at this first:",
    "fail": "Do not decide on this prediction. First:",
}
_TRAINING_KEYS = {
    "optimizer": "Optimizer",
    "sum_lr": "Sum of learning rates",
    "momentum": "Momentum",
    "batch_size": "Batch size",
    "weight_decay": "Weight decay",
    "dampening": "Dampening",
    "steps": "Steps",
    "loss": "Loss",
}


def render(
    report: dict[str, Any],
    display: dict[str, Any],
    history: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """The page for a report.

    Args:
        report: `AuditReport.to_dict()`, or the same read back from JSON.
        display: `AuditReport.display`: reliability bins, spectrum, influential samples.
        history: Earlier audits of any version of this registered model, each {version,
            audited_at, verdict, confidence, gap, gap_low, gap_high, heldout_gap} and, where it
            became known later, observed_gap; None where a value does not exist.

    Returns:
        A complete HTML document, well under 1 MB.
    """
    from markupsafe import Markup

    # The SVGs are ours and escape what they are given, hence Markup.
    bins = (display.get("reliability") or {}).get("bins")
    spectrum = display.get("spectrum") or {}
    drawn = spectrum.get("ratios") or spectrum.get("leverage")
    changes = trend.trend_svg(report, history)
    label, reasons = words.reliance(report)
    verdict = words.verdict(report)
    look = verdict == "warn" and report["confidence"] == "ok"
    return _template().render(
        r=report,
        w=words,
        verdict=verdict,
        lead=_VERDICT_LEADS["look" if look else verdict],
        steps=_steps(report),
        reliance={"label": label, "reasons": reasons},
        title=model_title(report),
        loss_rows=_loss_rows(report),
        estimators=_estimator_rows(report),
        calibration=_calibration_rows(report),
        slices=tables.slices(report),
        shift=[_row(*row) for row in tables.shift(report)],
        history=tables.history(report, history),
        trend=None if changes is None else Markup(changes),
        bins=_bin_rows(display),
        shares=figures.share_rows(display),
        premise=_premise_rows(report),
        penalty=_penalty_rows(report),
        sensitivity=sensitivity.table(report),
        identity=_identity_rows(report),
        solver=_solver_rows(report),
        warnings=_warning_rows(report),
        influence=_influence_rows(report, display),
        shown=INFLUENCE_SHOWN,
        reliability=Markup(figures.reliability_svg(report, display)) if bins else None,
        spectrum=Markup(figures.spectrum_svg(report, display)) if drawn else None,
        has_ratios=bool(spectrum.get("ratios")),
        no_ratios=spectrum.get("reason"),
    )


def model_title(report: Mapping[str, Any]) -> str:
    """The model's name for a heading: "churn, version 3", its URI, or what else is known."""
    model = report["model"]
    if model["name"]:
        return str(model["name"]) + (f", version {model['version']}" if model["version"] else "")
    return str(model["uri"] or model["model_id"] or "Model given in Python")


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flataudit.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["num"] = _num
    environment.filters["minus"] = _minus
    environment.filters["flags"] = _flags
    environment.filters["percent"] = words.percent
    return environment.get_template(TEMPLATE)


def _num(value: Any, digits: int = 3) -> str:
    return _minus(words.number(value, digits))


def _flags(text: str) -> Any:
    """Text with command-line options set as code; everything else is escaped."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(--[a-z]+( hessian| ggn)?)", r"<code>\1</code>", str(escape(text))))


def _steps(report: dict[str, Any]) -> list[str]:
    """Up to three things to do, from the warnings above info; what a pass means otherwise."""
    measured = report["heldout"] is not None
    found = [
        remedies.first_step(w["code"], measured=measured)
        for w in words.sorted_warnings(report)
        if _above_info(w)
    ]
    if found:
        return found[:3]
    if words.verdict(report) == "pass":
        return ["Expect this loss on new data drawn like the training data; drift is not covered."]
    if report["penalty"]["source"] == "evidence":
        return [remedies.first_step("penalty_unknown")]
    if measured:
        return ["Compare the prediction with the loss measured on the held-out data."]
    return ["Confirm the prediction on held-out data (--heldout)."]


def _above_info(warning: Mapping[str, Any]) -> bool:
    return warning["severity"] not in ("none", "info")


def _loss_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Training, predicted and measured loss on one axis."""
    train, test, heldout = report["train"], report["predicted_test_nll"], report["heldout"]
    limits = marks.scale([train["nll"], test["value"], test["low"], test["high"],
                     heldout["nll"] if heldout else None])  # fmt: skip
    text = words.interval(test["value"], test["low"], test["high"])
    rows = [
        _loss_row("Training data", "train", marks.mark(limits, train["nll"], None, None),
                  words.interval(train["nll"], None, None)),
        _loss_row("Unseen data, predicted", "test",
                  marks.mark(limits, test["value"], test["low"], test["high"]), text),
    ]  # fmt: skip
    if heldout:
        mark = marks.mark(limits, heldout["nll"], None, None)
        text = words.interval(heldout["nll"], None, None)
        rows.append(_loss_row("Held-out data, measured", "seen", mark, text))
    return rows


def _loss_row(name: str, kind: str, mark: Any, text: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "mark": mark, "text": _minus(text)}


def _estimator_rows(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every estimator with gap, standard error and interval; the observed gap last.

    The intervals are gap +- z se, and that of the one used is the report's, with its own error.
    """
    z = words.z_of(report)
    rows = [
        {"code": code, "name": name, "what": what, "used": report["gap"]["estimator"] == code,
         **_estimate(report["estimates"].get(code), z)}
        for code, (name, what) in words.ESTIMATORS.items()
    ]  # fmt: skip
    for row in rows:
        if row["used"] and row["low"] is not None:
            row["low"], row["high"] = report["gap"]["low"], report["gap"]["high"]
    heldout = report["heldout"]
    if heldout:
        seen = _estimate({"gap": heldout["gap"], "se": heldout["gap_se"]}, z)
        n = words.number(report["data"]["heldout_samples"])
        what = f"measured on {n} held-out samples"
        rows.append({"code": "", "name": "Observed", "what": what, "used": False, **seen})
    limits = marks.scale([0.0, *(row[key] for row in rows for key in ("gap", "low", "high"))])
    line = heldout["gap"] if heldout else None
    for row in rows:
        row["mark"] = marks.mark(limits, row["gap"], row["low"], row["high"], line)
        if row["gap"] is None:
            row["note"] = _missing_estimate(row["code"], report["solver"])
        elif row["se"] is None:
            row["note"] = ", ".join([*filter(None, [row["note"]]), "no standard error available"])
    return rows


def _estimate(found: Mapping[str, Any] | None, z: float) -> dict[str, Any]:
    gap, se = (found["gap"], found["se"]) if found else (None, None)
    half = None if gap is None or se is None else z * se
    if found and se is not None:  # an approximate solver's own errors, as in the gap's interval
        half = z * math.hypot(se, found.get("monte_carlo_se") or 0.0)
        half += found.get("truncation") or 0.0
    notes = []
    if found and found.get("rank") is not None:
        notes.append(f"soft rank {words.number(found['rank'], 1)}")
    if found and found.get("scale") is not None:
        notes.append(f"logits times {words.number(found['scale'])}")
    if found and found.get("centred") is not None:
        notes.append(f"{words.number(found['centred'], 4)} with the mean gradient removed")
    if found and found.get("accuracy") is not None:
        notes.append(f"accuracy {words.percent(found['accuracy'])}")
    return {"gap": gap, "se": se, "low": None if half is None else gap - half,
            "high": None if half is None else gap + half, "note": ", ".join(notes)}  # fmt: skip


def _missing_estimate(code: str, solver: Mapping[str, Any]) -> str:
    if code == "loo" and solver["name"] == "lanczos":
        return "not available: solver lanczos gives none"
    if code == "loo":
        return "not available: a leave-one-out step is not finite"
    return "not computed for this model" if code else "not available"


def _row(name: str, value: str, note: str = "") -> dict[str, str]:
    return {"name": name, "value": value, "note": note}


def _minus(text: str) -> str:
    """Numbers with a typographic minus sign and their per cent sign on the same line.

    The exponent of 2e-05 keeps its hyphen.
    """
    text = re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)
    return re.sub(r"(?<!\w)-(?=\d)", "\N{MINUS SIGN}", text)


def _short(value: Any) -> str:
    """A number to four significant digits: 0.00121, 900, 2.1e-06."""
    return words.number(value) if value is None or abs(value) >= 1e4 else f"{value:.4g}"


def _calibration_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    cal = report["calibration"]
    p_values = cal["p_values"] or {}
    regression = not words.classifies(dict(report))
    missing = "not defined for regression" if regression else "not computed (needs netcal)"
    rows = [
        _row("Judged on", words.EVIDENCE[cal["evidence"]], f"{words.number(cal['n'])} samples"),
        _row("Verdict", cal["verdict"].replace("_", " "),
             f"direction: {cal['direction']}, severity: {cal['severity']}"),
    ]  # fmt: skip
    if not regression:
        gap, slope = cal["confidence_gap"], cal["slope"]
        ends = cal["confidence_gap_ci"] or (None, None)
        note = "" if gap is not None else "not available"
        rows += [
            _row("Mean confidence", words.percent(cal["mean_confidence"]),
                 _why(cal["mean_confidence"], "not available")),
            _row("Accuracy", words.percent(cal["accuracy"]),
                 _why(cal["accuracy"], "not available")),
            _row("Confidence minus accuracy", _minus(words.interval(gap, *ends)),
                 note or "above 0: over-confident"),
            _row("Slope", words.interval(slope, *(cal["slope_ci"] or (None, None))),
                 _why(slope, "not available") or "on log p; below 1: over-confident"),
        ]  # fmt: skip
        expected = words.number(cal["ece_if_calibrated"])
        against = f"a calibrated model of this size would show {expected}"
        against = against if cal["ece_if_calibrated"] is not None else "no reference available"
        rows += [
            _row("ECE", words.number(cal["ece"]), _why(cal["ece"], missing) or against),
            _row("MCE", words.number(cal["mce"]), _why(cal["mce"], missing) or "largest bin"),
            _row("ACE", words.number(cal["ace"]),
                 _why(cal["ace"], missing) or "bins of equal size"),
        ]  # fmt: skip
    found = report.get("fresh_labels")
    if found:
        new = f", {found['fresh']:,} of them new" if "fresh" in found else ""
        note = f"on {found['n']:,} labels of all audits{new}; alarm at {found['threshold']:g}"
        rows.append(_row("E over all labels", words.e_text(found["log_e"]), note))
    for name, p in p_values.items():
        rows.append(_row(f"p value, {name}", words.p_text(p), _why(p, "not available")))
    return rows


def _why(value: Any, reason: str) -> str:
    return reason if value is None else ""


def _bin_rows(display: Mapping[str, Any]) -> dict[str, Any] | None:
    """The reliability picture as a table: its heads and its rows."""
    data = display.get("reliability") or {}
    bins = data.get("bins")
    if not bins:
        return None
    if data["kind"] == "regression":
        heads = ["PIT from", "to", "Samples", "Expected, 95 %"]
        rows = [[_num(b["left"], 2), _num(b["right"], 2), _num(b["count"]),
                 f"{_num(b['low'], 0)} to {_num(b['high'], 0)}"] for b in bins]  # fmt: skip
    else:
        heads = ["Predicted", "Observed", "95 % band", "Samples"]
        rows = [[words.percent(b["confidence"]), words.percent(b["accuracy"]),
                 f"{100 * b['low']:.1f} to {100 * b['high']:.1f}", _num(b["count"])]
                for b in sorted(bins, key=lambda b: -b["confidence"])]  # fmt: skip
    return {"heads": heads, "rows": rows}


def _premise_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    premise = report["premise"]
    if not premise:
        return []
    z, ratio = premise["z"], premise["information_ratio"]
    p = None if z is None else 2 * NormalDist().cdf(-abs(z))
    biased = premise["evidence"] == "train"
    return [
        _row("Information ratio", words.number(ratio),
             _why(ratio, "not available") or "1: errors as large as the probabilities say; "
             "above 1: larger; below 1: smaller"),
        _row("z", _num(z, 2), _why(z, "not available") or f"two-sided p {words.p_text(p)}"),
        _row("Judged on", words.EVIDENCE[premise["evidence"]],
             "biased low: training errors are too small" if biased else ""),
    ]  # fmt: skip


def _penalty_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    penalty, record, spread = report["penalty"], report["penalty"]["training"], report["dispersion"]
    value, note = _short(penalty["value"]), "per parameter, on the mean loss"
    if penalty["value"] is None:
        value, note = "differs by parameter", "no single value"
        if penalty.get("low") is not None and penalty.get("high") is not None:
            value = f"{_short(penalty['low'])} to {_short(penalty['high'])}"
            note = "differs by parameter"
    rows = [
        _row("Penalty", value, note),
        _row("Where it comes from", words.PENALTY_SOURCES[penalty["source"]]),
        _row("Parameters without penalty", words.number(penalty["free_params"])),
        _row("Stationarity", _short(penalty["stationarity"]),
             _why(penalty["stationarity"], "not available")
             or "|gradient of the objective| / |gradient of the loss|; 0 at a minimum"),
    ]  # fmt: skip
    if spread:
        source = {"argument": "given by the user", "residuals": "from the training residuals"}
        rows.append(_row("Variance of the noise", _short(spread["value"]),
                         source.get(spread["source"], spread["source"])))  # fmt: skip
    if not record:
        rows.append(_row("Training record", words.DASH, "none given or found"))
        return rows
    for key, item in record.items():
        if key == "groups":
            rows += [_row("Other " + ", ".join(g["parameters"]), _group_text(g)) for g in item]
            continue
        text = _short(item) if isinstance(item, int | float) else str(item or words.DASH)
        rows.append(_row(_TRAINING_KEYS.get(key, key), text, _why(item, "not recorded")))
    return rows


def _group_text(group: Mapping[str, Any]) -> str:
    named = {"weight_decay": "weight decay", "lr": "learning rate", "sum_lr": "sum of rates"}
    parts = [f"{text} {_short(group[key])}" for key, text in named.items() if key in group]
    return ", ".join(parts) or words.DASH


def _identity_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    model, data = report["model"], report["data"]
    named = {"URI": "uri", "Name": "name", "Version": "version", "Model id": "model_id",
             "Flavor": "flavor"}  # fmt: skip
    rows = [
        _row(name, str(model[key])) for name, key in named.items() if model[key] is not None
    ] or [_row("Registered as", words.DASH, "given in Python, not from a registry")]
    heldout = data["heldout_samples"]
    return [
        *rows,
        _row("Parameters", words.number(model["n_params"])),
        _row(
            "Family",
            report["family"],
            f"{words.number(data['n_outputs'])} output{'s' * (data['n_outputs'] != 1)}",
        ),
        _row("Training samples", words.number(data["n_samples"])),
        _row("Held-out samples", words.number(heldout), _why(heldout, "none given")),
        _row("sha256 of the data", str(data["sha256"] or words.DASH)),
    ]


def _solver_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    solver = report["solver"]
    size = solver["peak_bytes"]
    memory = words.DASH if size is None else f"{size / 2**20:,.0f} MiB"
    return [
        _row("Solver", solver["name"], "exact" if solver["exact"] else "approximate"),
        _row("Why this one", solver["reason"] or words.DASH),
        _row("Device", solver["device"]),
        _row("Precision", solver["dtype"]),
        _row("Time", f"{words.number(solver['seconds'], 1)} s"),
        _row("Planned memory", memory, "the solver's own arrays"),
    ]


def _warning_rows(report: dict[str, Any]) -> list[dict[str, str]]:
    return [
        {"code": w["code"], "title": remedies.warning_title(w["code"]), "severity": w["severity"],
         "word": _SEVERITY_WORDS.get(w["severity"], w["severity"]), "message": w["message"],
         "remedy": remedies.remedy(w["code"], measured=report["heldout"] is not None)}
        for w in words.sorted_warnings(report)
    ]  # fmt: skip


def _influence_rows(report: dict[str, Any], display: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Influential samples; the loss without a sample is its training loss plus the LOO rise."""
    rows = []
    for item in (display.get("influence") or [])[:INFLUENCE_MAX]:
        nll, rise = item["nll"], item["loo"]
        both = None not in (nll, rise, item["label"], item["predicted"])
        rows.append({**item, "without": nll + rise if both else None,
                     "differs": words.classifies(report) and both
                     and item["label"] != item["predicted"]})  # fmt: skip
    return rows
