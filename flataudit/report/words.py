"""Plain words for a report: one wording for the page, the terminal and the registry.

Every function takes the report as JSON values (`AuditReport.to_dict()`, or the same read back
from a store). Gaps and losses are nats per example. What does not exist reads as a dash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any, Literal

Report = dict[str, Any]
ReportVerdict = Literal["pass", "warn", "fail"]

DASH = "–"
FEW_SAMPLES = 10  # slices below are set apart
SEVERITY_ORDER = ("none", "info", "warn", "high", "critical")

ESTIMATORS: Mapping[str, tuple[str, str]] = {
    "soft_rank": ("Soft rank", "directions the data decide, over n; right when calibrated"),
    "tic": ("TIC", "errors actually made, weighted by inverse curvature, over n"),
    "loo": ("LOO", "each sample predicted as if it had been left out of training"),
    "soft_rank_recalibrated": (
        "Soft rank, recalibrated",
        "soft rank with the confidence corrected",
    ),
    "soft_rank_blend": (
        "Soft rank, blended",
        "geometric mean of the soft rank and the recalibrated one",
    ),
}
RELIANCE: Mapping[str, str] = {
    "ok": "Yes, rely on it",
    "low": "Only with care",
    "refused": "No, do not rely on it",
}
EVIDENCE: Mapping[str, str] = {
    "heldout": "held-out data",
    "loo": "leave-one-out predictions",
    "train": "training data only",
}
PENALTY_SOURCES: Mapping[str, str] = {
    "argument": "given by the user",
    "estimator": "read from the estimator's settings",
    "training": "weight decay and training time, from the training record",
    "evidence": "estimated from the weights (no training record)",
}


def number(value: Any, digits: int = 3) -> str:
    """A number for reading: 0.052, 12.3, 4,096, 2.1e-05; a dash for null or non-finite.

    >>> number(0.0523), number(4096), number(None)
    ('0.052', '4,096', '–')
    """
    if not _finite(value):
        return DASH
    size = abs(value)
    if isinstance(value, int) or size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 0.5 * 10.0**-digits:
        return f"{value:.1e}"
    return f"{value:.{1 if size >= 100 else digits}f}"


def percent(value: Any) -> str:
    """A share in [0, 1] as a percentage with one decimal; a dash for null."""
    return f"{100 * value:.1f} %" if _finite(value) else DASH


def interval(value: Any, low: Any, high: Any) -> str:
    """Value with its interval, "0.052 [0.041, 0.064]": three decimals, more for small values.

    >>> interval(0.0523, 0.0409, 0.0637), interval(0.00042, 0.0003, 0.00054)
    ('0.052 [0.041, 0.064]', '0.00042 [0.00030, 0.00054]')
    """
    if not _finite(value):
        return DASH
    bounds = [x for x in (low, high) if _finite(x)]
    scale = max([abs(value), *(abs(x - value) for x in bounds)])
    digits = 3 if scale == 0 else min(max(3, 1 - math.floor(math.log10(scale))), 8)
    ends = (f"{x:.{digits}f}" if _finite(x) else DASH for x in (low, high))
    return f"{value:.{digits}f}" + (f" [{', '.join(ends)}]" if bounds else "")


def percent_interval(value: Any, low: Any, high: Any) -> str:
    """A share with its interval in per cent: "91.4 % [90.2, 92.6]"."""
    if not (_finite(value) and _finite(low) and _finite(high)):
        return percent(value)
    return f"{percent(value)} [{100 * low:.1f}, {100 * high:.1f}]"


def sentence(text: Any) -> str:
    """A message as a sentence: first letter in upper case, a full stop at the end."""
    clean = str(text or "").strip()
    return clean[:1].upper() + clean[1:] + ("" if not clean or clean[-1] in ".!?" else ".")


def level_text(report: Report) -> str:
    """The interval's level: "90 %"."""
    return f"{100 * report['gap']['level']:.0f} %"


def z_of(report: Mapping[str, Any]) -> float:
    """The standard normal's quantile that belongs to the interval's level: 1.645 for 90 %."""
    return NormalDist().inv_cdf(0.5 + float(report["gap"]["level"]) / 2)


def p_text(p: float | None) -> str:
    """A p value: "0.023", "< 0.001", or a dash."""
    return "< 0.001" if p is not None and p < 0.001 else number(p)


def gap_text(report: Report) -> str:
    """The gap with its interval, nats per example: "0.052 [0.041, 0.064]"."""
    gap = report["gap"]
    return interval(gap["value"], gap["low"], gap["high"])


def verdict(report: Report) -> ReportVerdict:
    """The version's verdict by the contract's rule.

    fail: confidence refused, or a critical warning; pass: confidence ok and no warning above
    info; warn: everything else.
    """
    worst = max((_rank(w["severity"]) for w in report["warnings"]), default=0)
    if report["confidence"] not in ("ok", "low") or worst >= _rank("critical"):
        return "fail"
    return "pass" if report["confidence"] == "ok" and worst <= _rank("info") else "warn"


def sorted_warnings(report: Report) -> list[dict[str, Any]]:
    """The warnings, most severe first, in the report's order among equals."""
    return sorted(report["warnings"], key=lambda w: -_rank(w["severity"]))


def classifies(report: Report) -> bool:
    """Whether the model predicts classes (as against real values or counts)."""
    return report["family"] in ("categorical", "bernoulli")


def reliance(report: Report) -> tuple[str, list[str]]:
    """Whether the prediction may be relied on, in words, and why; if not, every reason why not."""
    guessed = report["penalty"]["source"] == "evidence"
    known = (
        "it is not known how the model was trained, so the penalty is a guess"
        if guessed
        else "what held the weights back in training (the penalty) is known: "
        + PENALTY_SOURCES[report["penalty"]["source"]]
    )
    label = RELIANCE.get(report["confidence"], RELIANCE["refused"])
    doubts = report.get("confidence_reasons")
    if doubts:
        return label, list(doubts) + [known] * (not guessed)
    reasons = [known, _direction_reason(report["calibration"])]
    if any(w["code"] == "train_saturated" for w in report["warnings"]):
        reasons.append("the training data are fitted to the last detail")
    return label, reasons


def calibration_text(report: Report) -> str:
    """The calibration verdict as one sentence."""
    cal = report["calibration"]
    source = EVIDENCE[cal["evidence"]]
    if cal["verdict"] == "miscalibrated":
        how = {
            "over": "over-confident",
            "under": "under-confident",
            "mixed": "too high in places and too low in others",
        }.get(cal["direction"], "off")
        return f"The stated probabilities are {how} ({source})."
    return {
        "calibrated": f"The stated probabilities match what happens ({source}).",
        "within_tolerance": f"The stated probabilities are within tolerance ({source}).",
        "not_shown": f"No miscalibration found, but too few samples to exclude it ({source}).",
        "insufficient": f"Too few samples or errors to judge the calibration ({source}).",
    }.get(cal["verdict"], "Calibration unknown: training data alone cannot show it.")


def e_text(log_e: float) -> str:
    """An e-value: "57", "2.1", "0.034", "over 1,000,000".

    >>> e_text(math.log(57.3)), e_text(math.log(2.13)), e_text(-20.0), e_text(800.0)
    ('57', '2.1', 'below 0.001', 'over 1,000,000')
    """
    if log_e > math.log(1e6):
        return "over 1,000,000"
    e = math.exp(log_e)
    return f"{e:,.0f}" if e >= 10 else f"{e:.2g}" if e >= 0.001 else "below 0.001"


def fresh_labels_message(found: Mapping[str, Any]) -> str:
    """The alarm of the e-process over all labels so far, as a warning's message."""
    now, highest = e_text(found["log_e"]), e_text(found["log_e_max"])
    e = f"E is {now}" if now == highest else f"E was {highest} at its highest and is {now} now"
    kind = "over" if found["slope"] < 1.0 else "under"
    return (
        f"{_rounds(found)} contradict the stated probabilities: {e}, and a calibrated model ever"
        f" reaches {found['threshold']:g} with a chance of at most {100 / found['threshold']:g} %,"
        f" however often it is audited; the slope {found['slope']:g} fits best, so the model is"
        f" {kind}-confident"
    )


def fresh_labels_text(report: Mapping[str, Any]) -> str:
    """What all labels of all audits say together, as one sentence; "" without any."""
    found = report.get("fresh_labels")
    if not found:
        return ""
    if found["alarm"]:
        return sentence(fresh_labels_message(found))
    return (
        f"{_rounds(found)} do not contradict the stated probabilities: E is"
        f" {e_text(found['log_e'])}, and the alarm is at {found['threshold']:g}, which a calibrated"
        f" model ever reaches with a chance of at most {100 / found['threshold']:g} %, however"
        " often it is audited."
    )


def _rounds(found: Mapping[str, Any]) -> str:
    rounds = "one round" if found["looks"] == 1 else f"{found['looks']:,} rounds"
    return f"{found['n']:,} labels that the training did not see ({rounds})"


def headline(report: Report) -> str:
    """One sentence: the predicted gap, and whether it may be relied on."""
    gap, confidence = report["gap"], report["confidence"]
    if not _finite(gap["value"]):
        return "No gap could be predicted for this model."
    tail = {
        "ok": "this prediction may be relied on",
        "low": "use this prediction with care",
    }.get(confidence, "do not rely on this prediction")
    ends = interval(gap["value"], gap["low"], gap["high"]).rstrip("]").split(" [")
    span = f" ({level_text(report)} interval {ends[1].replace(', ', ' to ')})" if ends[1:] else ""
    return (
        "Expect the loss on unseen data to exceed the loss on the training data by "
        f"{ends[0]} nats per example{span}; {tail}."
    )


def explain(report: Report) -> list[str]:
    """The report in a few plain sentences, most important first."""
    lines = [meaning(report)]
    gap, accuracy = report["gap"], report["predicted_accuracy"]
    if accuracy and _finite(accuracy["value"]):
        text = percent_interval(accuracy["value"], accuracy["low"], accuracy["high"])
        lines.append(f"Accuracy: {percent(report['train']['accuracy'])} on the training data, "
                     f"{text} {accuracy_source(report)}.")  # fmt: skip
    lines.append(observed_text(report))
    lines.append(calibration_text(report))
    lines.append(fresh_labels_text(report))
    label, reasons = reliance(report)
    lines.append(f"{label}: {'; '.join(reasons)}.")
    name = ESTIMATORS[gap["estimator"]][0]
    lines.append(sentence(f"The gap is the one by {name}: {gap['reason']}"))
    lines.append(interval_text(report))
    if gap.get("lower_bound"):
        lines.append(LOWER_BOUND)
    return [line for line in lines if line]


def interval_text(report: Report) -> str:
    """What the gap's interval holds; "" for an audit that counted the sampling error alone."""
    error = report["gap"].get("model_error")
    if not error:
        return ""
    return (
        f"The {level_text(report)} interval holds the sampling error and the estimator's own: up to"
        f" a factor of {math.exp(z_of(report) * error):.1f} either way on the models it was"
        " measured on."
    )


def meaning(report: Report) -> str:
    """The gap without nats: exp(-NLL) is the geometric mean of the right answer's probability."""
    train, test = report["train"]["nll"], report["predicted_test_nll"]["value"]
    if not (_finite(train) and _finite(test)):
        return ""
    if classifies(report):
        return (
            f"The right answer gets a probability of {percent(math.exp(-train))} on training data "
            f"and of {percent(math.exp(-test))} on unseen data (geometric means)."
        )
    less = "less" if test >= train else "more"
    thing = "count" if report["family"] == "poisson" else "value"
    share = percent(abs(math.expm1(train - test)))
    return (
        f"The model finds the true {thing} {share} {less} likely on unseen data than on training "
        "data (geometric mean)."
    )


def observed_text(report: Report) -> str:
    """The gap measured on held-out data and whether it lies in the predicted interval, or ""."""
    gap, heldout = report["gap"], report["heldout"]
    if not heldout or not _finite(heldout["gap"]):
        return ""
    seen = heldout["gap"]
    se = f" (standard error {interval(heldout['gap_se'], None, None)})"
    text = f"Measured on {number(report['data']['heldout_samples'])} held-out samples the gap is "
    text += interval(seen, None, None) + (se if _finite(heldout["gap_se"]) else "")
    if not _bounded(gap):
        return text + "."
    where = "inside" if gap["low"] <= seen <= gap["high"] else "outside"
    return f"{text}, {where} the predicted interval."


def nats_text(report: Report) -> str:
    """What 'nats per example' means, for the report's family."""
    if classifies(report):
        return (
            "Nats per example: the mean of -log(probability given to the right answer). "
            "Certain and right costs 0; giving it 90 % costs 0.11, 50 % costs 0.69."
        )
    thing = "probability" if report["family"] == "poisson" else "probability density"
    return (
        f"Nats per example: the mean of -log({thing} given to the true value). "
        "0.1 more: the true value is found about 10 % less likely; 0.69 more: half as likely."
    )


def accuracy_source(report: Report) -> str:
    """Where the predicted accuracy comes from."""
    heldout = report["heldout"]
    if heldout and heldout["accuracy"] is not None:
        return "on the held-out data"
    return "predicted on unseen data"


def description_block(report: Report, run_url: str | None) -> str:
    """Markdown for a model version's description, verdict first, without the markers."""
    worst = sorted_warnings(report)
    codes = ", ".join(f"`{w['code']}` ({w['severity']})" for w in worst) or "none"
    lines = [
        f"**flataudit: {verdict(report)}.** {headline(report)}",
        "",
        f"- Gap: {gap_text(report)} nats per example ({report['gap']['estimator']})",
        f"- Rely on it: {report['confidence']}; calibration: {report['calibration']['verdict']}",
    ]
    accuracy = report["predicted_accuracy"]
    if accuracy and _finite(accuracy["value"]):
        text = percent_interval(accuracy["value"], accuracy["low"], accuracy["high"])
        lines.append(f"- Accuracy {accuracy_source(report)}: {text}")
    lines.append(f"- Warnings: {codes}")
    if run_url:
        lines.append(f"- [Audit run and full report](<{run_url}>)")
    return "\n".join(lines)


LOWER_BOUND = (
    "The training data are few for what the model took from them (fewer than 10 samples per "
    "soft-rank direction), so the sampling error is larger than stated."
)


def _direction_reason(calibration: Mapping[str, Any]) -> str:
    if calibration["verdict"] in ("unknown", "insufficient"):
        return "the calibration could not be judged"
    return {
        "over": "the model is over-confident",
        "mixed": "the model is over-confident in places",
        "under": "the model is under-confident, not over-confident",
    }.get(calibration["direction"], "no over-confidence was found")


def _bounded(gap: Mapping[str, Any]) -> bool:
    return _finite(gap["low"]) and _finite(gap["high"])


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(severity: str) -> int:
    return (
        SEVERITY_ORDER.index(severity)
        if severity in SEVERITY_ORDER
        else SEVERITY_ORDER.index("warn")
    )
