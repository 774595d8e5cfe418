"""Rows of the report's larger tables: by class and slice, held-out inputs, history."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flataudit.report import marks, words

Report = dict[str, Any]


def slices(report: Report) -> list[dict[str, Any]]:
    """The tables by class and by slice, each with its rows, whiskers on one axis per table."""
    found = [report.get("classes"), *(report.get("slices") or [])]
    return [_slices(table, report) for table in found if table and table["rows"]]


def _slices(table: Mapping[str, Any], report: Report) -> dict[str, Any]:
    z = words.z_of(report)
    rows = [dict(row) for row in table["rows"]]
    for row in rows:
        half = None if row["gap_se"] is None else z * row["gap_se"]
        row["low"] = None if half is None else row["gap"] - half
        row["high"] = None if half is None else row["gap"] + half
    limits = marks.scale([0.0, table["gap"], *(r[k] for r in rows for k in ("gap", "low", "high"))])
    for row in rows:
        accuracy = row["predicted_accuracy"] or {"value": None, "low": None, "high": None}
        row["mark"] = marks.mark(limits, row["gap"], row["low"], row["high"], table["gap"])
        row["accuracy"] = words.percent_interval(*(accuracy[k] for k in ("value", "low", "high")))
        row["few"] = row["n"] < words.FEW_SAMPLES
    return {
        "title": "By class" if table["column"] == "class" else f"By {table['column']}",
        "column": table["column"],
        "rows": rows,
        "gap": table["gap"],
        "note": _slice_note(table, report),
        "classifies": words.classifies(report),
    }


def _slice_note(table: Mapping[str, Any], report: Report) -> str:
    how = words.ESTIMATORS[table["estimator"]][0]
    text = (
        f"Gap by {how}, which knows each sample's own label; over all samples"
        f" it is {words.interval(table['gap'], None, None)} (the dashed line)"
    )
    if report["gap"]["estimator"] != table["estimator"]:
        text += (
            f", and the estimate used above is {words.interval(report['gap']['value'], None, None)}"
        )
    text += ". The largest gap comes first"
    if any(row["n"] < words.FEW_SAMPLES for row in table["rows"]):
        text += f", slices of fewer than {words.FEW_SAMPLES} samples last"
    return text + "; among many slices one looks bad by chance alone."


def shift(report: Report) -> list[tuple[str, str, str]]:
    """The two-sample test of the held-out inputs as (name, value, note), [] without one."""
    found = report.get("shift")
    if not found:
        return []
    p = found["p_value"]
    differ = p is not None and p < 0.01
    return [
        ("Held-out inputs", "differ from training" if differ else "no difference found",
         f"p {words.p_text(p)}, exact permutation test; below 0.01 counts as a difference"),
        ("Features that moved", words.number(found["n_features_shifted"]),
         f"of {words.number(found['n_features'])} looked at one by one"),
        ("Most moved feature", f"number {found['worst_feature']}",
         f"distribution functions differ by {words.percent(found['worst_distance'])}"),
        ("All features together", words.percent(found["joint_distance"]),
         "difference along the direction that tells the two samples apart"),
    ]  # fmt: skip


def history(report: Report, earlier: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """This audit and the earlier ones, newest first, as strings; [] where none is known."""
    rows = []
    for item in points(report, earlier)[::-1]:
        rows.append({
            "this": item["this"],
            "version": item["version"] or words.DASH,
            "when": str(item["audited_at"] or words.DASH)[:16].replace("T", " "),
            "verdict": item["verdict"] or words.DASH,
            "gap": words.interval(item["gap"], item["gap_low"], item["gap_high"]),
            "observed": words.interval(item["observed"], None, None),
            "confidence": item["confidence"] or words.DASH,
        })  # fmt: skip
    return rows


def points(report: Report, earlier: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """The audits for the trend, oldest first; this one last."""
    gap, heldout = report["gap"], report["heldout"]
    this = {
        "this": True, "version": report["model"]["version"], "audited_at": "this audit",
        "verdict": words.verdict(report), "confidence": report["confidence"],
        "gap": gap["value"], "gap_low": gap["low"], "gap_high": gap["high"],
        "observed": heldout["gap"] if heldout else None,
    }  # fmt: skip
    names = ("version", "audited_at", "verdict", "confidence", "gap", "gap_low", "gap_high")
    before: list[dict[str, Any]] = []
    for row in earlier or ():
        late = row.get("observed_gap")
        observed = row.get("heldout_gap") if late is None else late
        before.append({key: row.get(key) for key in names} | {"observed": observed, "this": False})
    before.sort(key=lambda row: str(row["audited_at"] or ""))
    return [*before, this]
