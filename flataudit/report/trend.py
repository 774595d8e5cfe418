"""The history of a model's audits as a picture: predicted gaps with intervals, and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flataudit.report import figures, tables, words

SHOWN = 12  # audits


def trend_svg(report: dict[str, Any], earlier: Sequence[Mapping[str, Any]] | None) -> str | None:
    """An SVG element; None with fewer than two audits to compare."""
    rows = [row for row in tables.points(report, earlier) if row["gap"] is not None][-SHOWN:]
    if len(rows) < 2:
        return None
    with figures.style():
        fig = figures.figure(figures.WIDTH, 2.6)
        axes = fig.subplots()
        x = list(range(len(rows)))
        gaps = [row["gap"] for row in rows]
        bounded = [i for i in x if None not in (rows[i]["gap_low"], rows[i]["gap_high"])]
        axes.vlines(bounded, [rows[i]["gap_low"] for i in bounded],
                    [rows[i]["gap_high"] for i in bounded], color=figures.COLOURS["soft"],
                    lw=5, label=f"{words.level_text(report)} interval")  # fmt: skip
        axes.plot(x, gaps, "-o", color=figures.COLOURS["main"], lw=1, ms=5, label="predicted gap")
        seen = [i for i in x if rows[i]["observed"] is not None]
        if seen:
            axes.plot(seen, [rows[i]["observed"] for i in seen], "D", ls="none", ms=6,
                      mfc=figures.COLOURS["second"], mec=figures.COLOURS["ink"],
                      label="observed gap")  # fmt: skip
        axes.set_xticks(x, [_tick(row) for row in rows], parse_math=False)
        axes.set_xlim(-0.5, len(rows) - 0.5)
        axes.grid(False, axis="x")
        axes.set_ylabel("gap, nats")
        figures.legend(axes, 3)
        return figures.svg(fig, "trend", alt(report, earlier))


def alt(report: dict[str, Any], earlier: Sequence[Mapping[str, Any]] | None) -> str:
    """The picture in one sentence, for those who cannot see it."""
    rows = [row for row in tables.points(report, earlier) if row["gap"] is not None][-SHOWN:]
    first, last = (words.interval(rows[i]["gap"], None, None) for i in (0, -1))
    return (
        f"Predicted gap of {len(rows)} audits of this model: from {first} to {last} nats per"
        " example. The table below has every number."
    )


def _tick(row: Mapping[str, Any]) -> str:
    day = "this" if row["this"] else str(row["audited_at"] or "")[:10][5:]
    return f"v{row['version'] or '?'}\n{day}"
