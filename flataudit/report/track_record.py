"""The track record as a picture and as plain words; pure: its JSON in, bytes or text out."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flataudit.report import words
from flataudit.report.figures import COLOURS, PNG_DPI
from flataudit.results import Z_LEVEL

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Record = Mapping[str, Any]

# Confidence: marker, colour and name; a hollow marker is held-out data that came with the audit.
_MARKS = {
    "ok": ("o", COLOURS["main"], "rely on it"),
    "low": ("D", COLOURS["second"], "with care"),
    "refused": ("X", COLOURS["bad"], "do not rely on it"),
}
_KINDS = {"later": "observed later", "with_audit": "held-out data of the audit"}


def draw(record: Record, kind: str = "png") -> bytes:
    """Predicted gap against the one that occurred, both with 90 % intervals, as PNG or SVG.

    kind: png or svg. A record without outcomes gives a picture that says so.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    ink, rule = COLOURS["ink"], COLOURS["rule"]
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.edgecolor": rule, "text.color": ink,
        "axes.labelcolor": ink, "axes.spines.top": False, "axes.spines.right": False,
        "axes.grid": True, "axes.axisbelow": True, "grid.color": rule, "grid.linewidth": 0.6,
        "xtick.color": COLOURS["muted"], "ytick.color": COLOURS["muted"], "text.usetex": False,
        "svg.hashsalt": "flataudit",
    }  # fmt: skip
    out = io.BytesIO()
    with mpl.rc_context(settings):
        figure = Figure(figsize=(5.6, 5.4), layout="constrained")
        figure.set_facecolor("white")
        axes = figure.subplots()
        if record["outcomes"]:
            _points(axes, record)
        else:
            axes.set_axis_off()
            axes.text(0.5, 0.5, "No gap has been observed yet.", ha="center", va="center")
        extra: dict[str, Any] = {"metadata": {"Date": None}} if kind == "svg" else {"dpi": PNG_DPI}
        figure.savefig(out, format=kind, **extra)
    return out.getvalue()


def headline(record: Record) -> str:
    """One sentence: how many gaps occurred, how many as predicted, and with what bias."""
    whole = next((g for g in record["groups"] if g["by"] == "all"), None)
    if whole is None:
        return "No gap has been observed yet: flataudit observe URI --heldout DATA records one."
    side = "larger" if whole["bias"] >= 0 else "smaller"
    return (
        f"{whole['covered']} of {whole['n']} gaps came out as predicted at the"
        f" {100 * record['level']:.0f} % level ({words.percent(whole['coverage'])}, interval"
        f" {100 * whole['coverage_low']:.0f} to {100 * whole['coverage_high']:.0f}); they were"
        f" {words.number(abs(whole['bias']))} nats {side} than predicted on average."
    )


def rows(record: Record) -> list[tuple[str, ...]]:
    """The groups as text: (group, n, coverage, its interval, bias, rmse)."""
    found: list[tuple[str, ...]] = []
    for group in record["groups"]:
        se = group["bias_se"]
        bias = f"{group['bias']:+.3f}" + ("" if se is None else f" +- {se:.3f}")
        name = _KINDS.get(group["value"], group["value"])
        found.append(
            (
                name if group["by"] in ("all", "kind") else f"{group['by']}: {name}",
                str(group["n"]),
                f"{group['covered']} ({words.percent(group['coverage'])})",
                f"{100 * group['coverage_low']:.0f} to {100 * group['coverage_high']:.0f} %",
                bias,
                words.number(group["rmse"]),
            )
        )
    return found


def _points(axes: Axes, record: Record) -> None:
    outcomes = record["outcomes"]
    ends = [o[key] for o in outcomes for key in ("low", "high", "observed", "predicted")]
    ends += [o["observed"] + s * Z_LEVEL * o["observed_se"] for o in outcomes for s in (-1, 1)]
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    pad = 0.05 * (high - low) or 0.01
    span = (low - pad, high + pad)
    axes.plot(span, span, color=COLOURS["muted"], lw=1, ls=(0, (4, 3)), zorder=1)
    for at, text, side, edge in ((0.02, "more than predicted", "left", "top"),
                                 (0.98, "less than predicted", "right", "bottom")):  # fmt: skip
        axes.text(at, 1 - at, text, transform=axes.transAxes, ha=side, va=edge, fontsize=8,
                  color=COLOURS["muted"])  # fmt: skip
    for (confidence, kind), group in _grouped(outcomes).items():
        marker, colour, meaning = _MARKS.get(confidence, ("s", COLOURS["muted"], confidence))
        x = [o["predicted"] for o in group]
        y = [o["observed"] for o in group]
        across = [
            [o["predicted"] - o["low"] for o in group],
            [o["high"] - o["predicted"] for o in group],
        ]
        axes.errorbar(
            x, y, xerr=across, yerr=[Z_LEVEL * o["observed_se"] for o in group], fmt=marker, ms=6,
            mfc=colour if kind == "later" else COLOURS["surface"], mec=colour, ecolor=colour,
            elinewidth=0.9, alpha=0.95, zorder=3, label=f"{meaning}, {_KINDS[kind]}",
        )  # fmt: skip
    axes.set_xlim(*span)
    axes.set_ylim(*span)
    axes.set_aspect("equal")
    axes.set_xlabel("predicted gap, nats per example")
    axes.set_ylabel("gap that occurred, nats per example")
    whole = next(g for g in record["groups"] if g["by"] == "all")
    axes.set_title(
        f"{whole['covered']} of {whole['n']} gaps as predicted"
        f" ({100 * record['level']:.0f} % intervals)",
        loc="left", fontsize=11, fontweight="bold",
    )  # fmt: skip
    axes.figure.legend(loc="outside lower center", frameon=False, fontsize=8, ncols=2)


def _grouped(outcomes: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Outcomes by confidence and kind, in the order of the legend."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    order = {name: i for i, name in enumerate(_MARKS)}
    for outcome in sorted(
        outcomes, key=lambda o: (order.get(o["confidence"], math.inf), o["kind"])
    ):
        found.setdefault((str(outcome["confidence"]), outcome["kind"]), []).append(outcome)
    return found
