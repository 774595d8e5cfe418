"""Renders the tables of docs/decisions/0018-research.md from research.json.

python -m benchmarks.zoo.research.page
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.common.pages import machine_line, rendered
from benchmarks.zoo.research.scoring import LIST
from benchmarks.zoo.research.summary import OUT

Json = dict[str, Any]

PAGE = Path(__file__).parents[3] / "docs" / "decisions" / "0018-research.md"
LABELS = "200 held-out labels"
METHODS = {
    "accuracy": "scale from the accuracy (the package's)",
    "temperature": "netcal's temperature",
    "logistic": "netcal's logistic calibration",
    "beta": "netcal's beta calibration",
}
OTHERS = {
    "loo_root": "soft rank at the root of the scale",
    "loo_again, blend": "blend, scale from the recalibrated model's own leave-one-out",
    "loo_again": "that scale from its own leave-one-out, clipped, not blended",
    "loo_recalibrated": "leave-one-out of the recalibrated model",
    "tic_recalibrated": "TIC of the recalibrated model",
    "undone": "own training undone (saturation inverted)",
    LABELS: "*the gap of 200 held-out labels*",
}
COMBINED = {
    "median of soft rank, recalibrated, tic with loo residuals": (
        "median of soft rank, recalibrated and TIC with leave-one-out residuals"
    ),
    LIST: "**the list**",
    "recalibrated": "recalibrated, clipped",
    "median of soft rank, recalibrated, loo": "median of soft rank, recalibrated and LOO",
    "blend even where sharper": "blend also where it sharpens",
    "soft rank": "soft rank",
    "geometric mean of soft rank, recalibrated, loo": "geometric mean of the three",
    "soft rank where adam or adamw, else list": "soft rank where Adam or AdamW, else the list",
    "loo and soft rank": "geometric mean of LOO and soft rank",
    "tic with loo residuals": "TIC with leave-one-out residuals",
    "loo": "LOO",
}
ALONG = {
    LIST: "**the list**",
    "soft rank": "soft rank",
    "loo": "LOO, final residuals",
    "loo_time": "LOO, residuals averaged over time",
    "loo_time and loo": "geometric mean of those two",
    "tic_time": "TIC, averaged over time (= information ratio x soft rank)",
    "rank_time": "soft rank, Lambda averaged over time",
    "path": "path",
    "path and soft rank": "geometric mean of path and soft rank",
    "path where n is 5 soft ranks": "path where n is 5 soft ranks, else the list",
    "undone": "own training undone",
}
CHANGES = {
    "step": "step", "cosine": "cosine", "one_cycle": "one-cycle", "batch 8": "batch 8",
    "batch 100": "batch 100", "batch all": "all samples",
}  # fmt: skip
QUANTITIES = ("gap", "list/gap", "soft rank/gap", "loo/gap")


def score(found: Json) -> str:
    """'.335'."""
    return short(found["score"])


def short(value: float | None, sign: bool = False) -> str:
    """'+.05': without the zero before the point, of which 1.2 has none."""
    if value is None:
        return "-"
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def bias(found: Json) -> str:
    value = found["bias"]
    return "-" if value is None else f"{value:+.2f}".replace("0.", ".", 1)


def difference(found: Json) -> str:
    """'-.016 (-.034 to +.002)', bold where the interval excludes 0 on the good side."""
    d = found["minus_list"]
    if d["value"] is None or d["low"] is None:
        return short(d["value"], sign=True)
    text = f"{short(d['value'], True)} ({short(d['low'], True)} to {short(d['high'], True)})"
    return f"**{text}**" if d["high"] < 0 else text


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|" + "---|" * len(cells)]


def of_rules(scores: Json, names: dict[str, str]) -> str:
    """Rules by name, best first."""
    lines = head("", "score", "median log ratio", "minus the list (90 %)")
    for name in sorted(names, key=lambda each: scores[each]["score"]):
        found = scores[name]
        against = "" if name == LIST else difference(found)
        lines.append(row(names[name], score(found), bias(found), against))
    return "\n".join(lines)


def combinations(found: Json) -> str:
    return of_rules(found["combinations"]["scores"], COMBINED)


def recalibrations(found: Json) -> str:
    """The blends against the list, and what else was tried, best first."""
    names = {
        f"{source}_{method}, blend": f"blend by {text}, {of}"
        for source, of in (("loo", "leave-one-out"), ("heldout", "200 labels"))
        for method, text in METHODS.items()
        if (source, method) != ("loo", "accuracy")
    }
    names["heldout_accuracy, blend"] = "blend by the scale from the accuracy, 200 labels"
    names["test_temperature, blend"] = "blend by netcal's temperature, the whole test pool"
    names["test_temperature"] = "netcal's temperature of the whole test pool, clipped, not blended"
    return of_rules(found["recalibration"]["scores"], {LIST: "**the list**"} | names | OTHERS)


def effects(found: Json) -> str:
    changes = found["training"]["gap_effects"]
    lines = head("against constant, batch 40", "gap", "list/gap", "soft rank/gap", "LOO/gap")
    for name, text in CHANGES.items():
        lines.append(row(text, *(percent(changes[name][what]) for what in QUANTITIES)))
    return "\n".join(lines)


def percent(found: Json) -> str:
    """A mean log ratio in percent with its interval."""
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    return f"{value:+.0f} ({low:+.0f} to {high:+.0f})"


def factors(found: Json) -> str:
    """What a factor of the training time brings out of data set."""
    by = found["training"]["time_factors"]
    lines = head("estimate at time PHI T", "PHI grows with lr/batch", "one PHI for all")
    for name, text in (("soft_rank", "soft rank"), ("blend", "blend"), ("loo", "LOO")):
        lines.append(row(text, *(difference(by[f"{name}, {kind}"])
                                 for kind in ("longer", "constant"))))  # fmt: skip
    return "\n".join(lines)


def along(found: Json) -> str:
    """The path's estimates on the series and on the zoo."""
    series, zoo = found["training"]["regimes"], found["paths"]["regimes"]
    parts = {"series": series["all"], "zoo": zoo["all"], "zoo, SGD": zoo["sgd"]}
    counted = [f"{name} ({part['models']})" for name, part in parts.items()]
    lines = head("", *(cell for name in counted for cell in (name, "minus the list")))
    for name, text in ALONG.items():
        cells = []
        for part in parts.values():
            of = part["scores"][name]
            against = "" if name == LIST else difference(of)
            cells += [f"{score(of)}, {bias(of)}", against]
        lines.append(row(text, *cells))
    chosen = [part["out_of_data_set"] for part in parts.values()]
    cells = [cell for of in chosen for cell in (f"{score(of)}, {bias(of)}", difference(of))]
    lines.append(row("the best on the other data sets", *cells))
    return "\n".join(lines)


def optimizers(found: Json) -> str:
    """List and soft rank by optimizer, on the zoo and on networks trained for the question."""
    parts = {
        "zoo": found["combinations"]["by_optimizer"],
        "fresh": found.get("by_optimizer", {}),
    }
    lines = head("open branch", "networks", "the list", "soft rank", "minus the list")
    for where, part in parts.items():
        for kind, text in (("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW"), ("both", "both")):
            if kind in part:
                of = part[kind]["scores"]
                cells = (f"{score(of[name])}, {bias(of[name])}" for name in (LIST, "soft rank"))
                lines.append(row(f"{where}, {text}", str(part[kind]["models"]), *cells,
                                 difference(of["soft rank"])))  # fmt: skip
    return "\n".join(lines)


def environment(found: Json) -> str:
    return machine_line(found["environment"])


TABLES: dict[str, Callable[[Json], str]] = {
    "combinations": combinations,
    "recalibrations": recalibrations,
    "effects": effects,
    "factors": factors,
    "along": along,
    "optimizers": optimizers,
    "environment": environment,
}


def render(page: str, found: Json) -> str:
    """The page with every table made anew."""
    return rendered(page, lambda name: TABLES[name](found))


def main() -> None:
    found = json.loads(OUT.read_text(encoding="utf-8"))
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


if __name__ == "__main__":
    main()
