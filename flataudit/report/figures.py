"""Two pictures of a report: is the confidence right, and which directions the data decide.

PNG for the registry, SVG for the page. Figures are `matplotlib.figure.Figure` objects, never
pyplot's, so nothing stays open. The SVG's colours are CSS variables (`--fig-ink`, ...) with the
light theme as their fallback, so the page can switch to dark.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flataudit.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colour-blind safe; every hue also differs in lightness, marker or line style.
COLOURS = {
    "surface": "#fffffe",
    "ink": "#1b2530",
    "muted": "#5a6672",
    "rule": "#d5dbe1",
    "main": "#0b69a8",
    "soft": "#9cc3e0",
    "second": "#e39a1f",
    "bad": "#c2331b",
}
PNG_DPI = 170
WIDTH = 5.1  # inches; narrow, so that the text stays legible at phone width


def reliability_png(report: dict[str, Any], display: dict[str, Any]) -> bytes:
    """Reliability diagram with histogram, or PIT histogram for regression, as PNG."""
    return _png(_reliability(report, display, titled=True))


def reliability_svg(report: dict[str, Any], display: dict[str, Any]) -> str:
    """The same picture as an SVG element for inlining."""
    return svg(_reliability(report, display), "rel", reliability_alt(report, display))


def spectrum_png(report: dict[str, Any], display: dict[str, Any]) -> bytes:
    """Spectrum of the ggn over the penalty, or the leverage curve without one, as PNG."""
    return _png(_spectrum(report, display, titled=True))


def spectrum_svg(report: dict[str, Any], display: dict[str, Any]) -> str:
    """The same picture as an SVG element for inlining."""
    return svg(_spectrum(report, display), "spec", spectrum_alt(report, display))


def reliability_alt(report: dict[str, Any], display: dict[str, Any]) -> str:
    """The reliability picture in one sentence, for those who cannot see it."""
    data = display.get("reliability")
    if not data or not data["bins"]:
        return "No calibration picture for this report."
    bins = data["bins"]
    inside = sum(not _outside(b, data["kind"]) for b in bins)
    if data["kind"] == "regression":
        return f"PIT histogram: {inside} of {len(bins)} bars lie inside the 95 % band."
    return f"Reliability diagram: {inside} of {len(bins)} bins lie inside the 95 % band."


def spectrum_alt(report: dict[str, Any], display: dict[str, Any]) -> str:
    """The spectrum picture in one sentence, for those who cannot see it."""
    ratios = _ratios(display)
    if ratios:
        used = sum(r > 1 for r in ratios)
        return f"Spectrum: {used:,} of {len(ratios):,} directions are more than half used."
    leverage = (display.get("spectrum") or {}).get("leverage") or []
    if leverage:
        return f"Leverage of the training samples: largest {words.number(max(leverage))}."
    return "No spectrum for this report."


def _reliability(report: dict[str, Any], display: dict[str, Any], titled: bool = False) -> Figure:
    data = display.get("reliability")
    with style():
        if not data or not data["bins"]:
            return _message(titled, "Calibration", "No calibration picture for this report.")
        if data["kind"] == "regression":
            return _pit(report, data, titled)
        return _diagram(report, data, titled)


def _diagram(report: dict[str, Any], data: dict[str, Any], titled: bool) -> Figure:
    fig = figure(WIDTH, 5.0, titled)
    top, below = fig.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.7, 1]})
    bins = sorted(data["bins"], key=lambda b: b["confidence"])
    conf = [b["confidence"] for b in bins]
    lows, highs = [b["low"] for b in bins], [b["high"] for b in bins]
    seen = [h for h in data.get("histogram") or [] if h["right_count"] + h["wrong_count"]]
    least = min(conf + lows + [b["accuracy"] for b in bins] + [h["left"] for h in seen])
    floor = min(max(math.floor(least * 10 + 1e-9) / 10, 0.0), 0.8)

    top.plot([floor, 1], [floor, 1], color=COLOURS["muted"], lw=1, ls=(0, (4, 3)), zorder=1)
    if len(bins) > 1:
        top.fill_between(conf, lows, highs, color=COLOURS["soft"], alpha=0.45, lw=0, zorder=0)
    band = top.vlines(conf, lows, highs, color=COLOURS["soft"], lw=2.5, zorder=1)
    band.set_label("95 % band if calibrated")
    for bad, marker, colour, label in (
        (False, "o", "main", "inside the band"),
        (True, "D", "bad", "outside"),
    ):
        points = [b for b in bins if _outside(b, "classification") == bad]
        if points:
            x, y = [b["confidence"] for b in points], [b["accuracy"] for b in points]
            top.plot(x, y, marker, ms=6, mfc=COLOURS[colour], mec=COLOURS["surface"], mew=0.8,
                     ls="none", label=label, zorder=3)  # fmt: skip
    pad = (1 - floor) * 0.02
    top.set_xlim(floor - pad, 1 + pad)
    top.set_ylim(floor - pad, 1 + 2 * pad)
    for left, height, side, text in (
        (0.02, 0.97, "left", "under-confident above the line"),
        (0.98, 0.03, "right", "over-confident below the line"),
    ):
        top.text(left, height, text, transform=top.transAxes, ha=side, fontsize=8,
                 va="top" if side == "left" else "bottom", color=COLOURS["muted"])  # fmt: skip
    top.set_ylabel("observed frequency")
    top.tick_params(labelbottom=False)
    legend(top, 3)
    evidence = words.EVIDENCE.get(data.get("evidence") or report["calibration"]["evidence"], "")
    _title(fig, titled, "Does the stated probability come true?", f"On {evidence}")

    _histogram(below, data)
    below.set_xlabel("predicted probability")
    return fig


def _histogram(axes: Axes, data: dict[str, Any]) -> None:
    bars = data.get("histogram") or []
    left, width = [h["left"] for h in bars], [h["right"] - h["left"] for h in bars]
    right, wrong = [h["right_count"] for h in bars], [h["wrong_count"] for h in bars]
    edge: Any = {"align": "edge", "edgecolor": COLOURS["surface"], "linewidth": 0.5}
    axes.bar(left, right, width, color=COLOURS["soft"], label="right", **edge)
    axes.bar(left, wrong, width, bottom=right, color=COLOURS["second"], label="wrong", **edge)
    for key, style, label in (
        ("mean_confidence", "-", "mean confidence"),
        ("accuracy", (0, (2, 1.5)), "accuracy"),
    ):
        value = data.get(key)
        if value is not None:
            text = f"{label} {words.percent(value)}"
            axes.axvline(value, color=COLOURS["ink"], lw=1.4, ls=style, label=text)
    axes.set_ylabel("samples")
    legend(axes, 4)


def _pit(report: dict[str, Any], data: dict[str, Any], titled: bool) -> Figure:
    fig = figure(WIDTH, 4.2, titled)
    axes = fig.subplots()
    bins = data["bins"]
    for bad, colour, hatch, label in (
        (False, "soft", None, "inside the band"),
        (True, "bad", "///", "outside"),
    ):
        some = [b for b in bins if _outside(b, "regression") == bad]
        if some:
            axes.bar([b["left"] for b in some], [b["count"] for b in some],
                     [b["right"] - b["left"] for b in some], align="edge", label=label,
                     color=COLOURS[colour], edgecolor=COLOURS["surface"], hatch=hatch)  # fmt: skip
    edges = [b["left"] for b in bins] + [bins[-1]["right"]]
    for key, name in (("low", "95 % band if calibrated"), ("high", None)):
        axes.stairs([b[key] for b in bins], edges, color=COLOURS["ink"], lw=1.2, ls=(0, (4, 3)),
                    baseline=None, label=name)  # fmt: skip
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.08 * max(max(b["count"], b["high"]) for b in bins))
    axes.set_xlabel("share of the predicted distribution below the true value (PIT)")
    axes.set_ylabel("samples")
    legend(axes, 3)
    evidence = words.EVIDENCE.get(data.get("evidence") or report["calibration"]["evidence"], "")
    _title(fig, titled, "Is the predicted spread right?", f"Flat if so; on {evidence}")
    return fig


def _spectrum(report: dict[str, Any], display: dict[str, Any], titled: bool = False) -> Figure:
    data = display.get("spectrum") or {}
    ratios = _ratios(display)
    leverage = [x for x in data.get("leverage") or [] if x is not None]
    with style():
        if ratios:
            return _eigenvalues(report, ratios, titled)
        if leverage:
            return _leverage(report, leverage, data.get("reason"), titled)
        reason = data.get("reason") or "none was computed"
        return _message(titled, "Spectrum", f"No spectrum: {reason}")


def _eigenvalues(report: dict[str, Any], ratios: list[float], titled: bool) -> Figure:
    fig = figure(WIDTH, 4.6, titled)
    axes = fig.subplots()
    shares = [r / (1 + r) for r in ratios]
    shown = _shown(shares)
    index, step = list(range(1, shown + 1)), max(1, shown // 600)
    keep = sorted({*range(0, shown, step), shown - 1})
    x = [index[i] for i in keep]

    twin = axes.twinx()
    edge_x, edge_y = [0.5, *(i + 0.5 for i in x)], [shares[i] for i in keep]
    twin.stairs(edge_y, edge_x, fill=True, color=COLOURS["soft"], alpha=0.5, lw=0)
    twin.set_ylim(0, 1)
    twin.set_ylabel("share used, r / (1 + r)  (area)", color=COLOURS["muted"])
    twin.grid(False)
    axes.set_zorder(twin.get_zorder() + 1)
    axes.patch.set_visible(False)

    small = shown <= 60
    axes.semilogy(x, [ratios[i] for i in keep], color=COLOURS["main"], lw=1.8,
                  marker="o" if small else "", ms=3.5)  # fmt: skip
    axes.axhline(1, color=COLOURS["ink"], lw=1.1, ls=(0, (4, 3)))
    # Symmetric about 1, so that the dashed line is r = 1 on the left and 1/2 on the right.
    reach = 2 * max(ratios[0], min(1 / ratios[shown - 1], 1e3), 10.0)
    axes.set_ylim(1 / reach, reach)
    axes.set_xlim(0.5, shown + 0.5)
    late = sum(r > 1 for r in ratios) > 0.55 * shown  # where the label is off the line's way
    axes.text(0.015 if late else 0.985, 0.88 if late else 1.12, "penalty: half used",
              color=COLOURS["ink"], ha="left" if late else "right", va="top" if late else "bottom",
              transform=axes.get_yaxis_transform())  # fmt: skip
    axes.set_ylabel("r = ggn eigenvalue / penalty  (line)")
    axes.set_xlabel("direction, from most to least decided by the data")
    _decades(axes)
    axes.set_title(_rank_text(report, shares, shown), loc="left", fontsize=8.5,
                   color=COLOURS["muted"], parse_math=False)  # fmt: skip
    _title(fig, titled, "How many directions do the data decide?", "")
    return fig


def _leverage(
    report: dict[str, Any], values: list[float], reason: str | None, titled: bool
) -> Figure:
    fig = figure(WIDTH, 4.6, titled)
    axes = fig.subplots()
    values = sorted(values, reverse=True)
    last = max(len(values) - 1, 1)
    floor = max(max(values) * 1e-6, 1e-300)
    x = [100 * i / last for i in range(len(values))]
    axes.semilogy(x, [max(v, floor) for v in values], color=COLOURS["main"], lw=1.8)
    rank, n = report["estimates"]["soft_rank"]["rank"], report["data"]["n_samples"]
    if rank:
        axes.axhline(rank / n, color=COLOURS["ink"], lw=1.1, ls=(0, (4, 3)),
                     label=f"mean leverage {words.number(rank / n)} = soft rank / n")  # fmt: skip
        legend(axes, 1)
    axes.set_xlim(0, 100)
    axes.set_xlabel("training samples, from most to least decisive (%)")
    axes.set_ylabel("leverage (contribution to the soft rank)")
    _decades(axes)
    why = f"No eigenvalues: {reason}" if reason else "No eigenvalues were computed."
    _title(fig, titled, "How much does each sample decide?", why)
    return fig


def _rank_text(report: dict[str, Any], shares: list[float], shown: int) -> str:
    """Soft rank = the area, plus what unpenalised parameters add (their ratio is infinite)."""
    area, rank = sum(shares), report["estimates"]["soft_rank"]["rank"]
    text = f"Soft rank {words.number(area if rank is None else rank, 1)}"
    free = report["penalty"]["free_params"]
    if rank is None or abs(rank - area) <= 0.01 * rank:
        text += " = shaded area"
    elif free and rank > area:
        text += f" = area {words.number(area, 1)} + {words.number(rank - area, 1)} unpenalised"
    text += f", of {words.number(report['model']['n_params'])} parameters"
    if shown < len(shares):
        rest = words.percent(sum(shares[shown:]) / area)
        text += f"\n{len(shares) - shown:,} further directions, {rest} of the area, not drawn"
    return text


def share_rows(display: dict[str, Any]) -> list[tuple[str, str]]:
    """How many of the largest eigenvalues hold a quarter, half, ... of the soft rank's area.

    >>> share_rows({"spectrum": {"ratios": [9.0, 9.0, 1.0, 0.0]}})[:2]
    [('25 %', '1 of 3'), ('50 %', '2 of 3')]
    """
    shares = [r / (1 + r) for r in _ratios(display)]
    total, rows = sum(shares), []
    for part in (0.25, 0.5, 0.75, 0.9, 0.99):
        reached, count = 0.0, 0
        while count < len(shares) and reached < part * total * (1 - 1e-12):
            reached, count = reached + shares[count], count + 1
        rows.append((f"{100 * part:.0f} %", f"{count:,} of {len(shares):,}"))
    return rows if total > 0 else []


def _shown(shares: list[float]) -> int:
    """How many directions to draw: all up to 60, else those that hold 99 % of the area."""
    total, reached = sum(shares), 0.0
    for count, share in enumerate(shares, 1):
        reached += share
        if count >= 60 and reached >= 0.99 * total:
            return count
    return len(shares)


def _ratios(display: dict[str, Any]) -> list[float]:
    found = (display.get("spectrum") or {}).get("ratios") or []
    return sorted((float(r) for r in found if r is not None and r > 0), reverse=True)


def _outside(item: dict[str, Any], kind: str) -> bool:
    value = item["count"] if kind == "regression" else item["accuracy"]
    return not item["low"] <= value <= item["high"]


def _message(titled: bool, title: str, text: str) -> Figure:
    fig = figure(WIDTH, 3.0, titled)
    fig.text(0.5, 0.5, textwrap.fill(text, 60), ha="center", va="center",
             color=COLOURS["muted"], parse_math=False)  # fmt: skip
    _title(fig, titled, title, "")
    return fig


def _title(fig: Figure, titled: bool, title: str, note: str) -> None:
    """A heading for the PNG, which stands alone; the page has its own, so the SVG has none."""
    if titled:
        text = "\n".join([title, *([textwrap.fill(note, 78)] if note else [])])
        fig.suptitle(text, x=0.02, ha="left", fontsize=11, parse_math=False)


def legend(axes: Axes, columns: int) -> None:
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False,
                borderpad=0.2, columnspacing=1.0, handlelength=1.4, handletextpad=0.5)  # fmt: skip


def _decades(axes: Axes) -> None:
    """Tick labels 0.01, 1, 100, 10⁴ as plain text (no mathtext in the SVG)."""
    from matplotlib.ticker import FuncFormatter

    digits = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

    def label(value: float, _: int) -> str:
        if 1e-3 <= value <= 1e3:
            return f"{value:g}"
        return f"10{str(round(math.log10(value))).translate(digits)}" if value > 0 else ""

    axes.yaxis.set_major_formatter(FuncFormatter(label))
    axes.minorticks_off()  # unlabelled, and half of the time that the picture takes


def figure(width: float, height: float, titled: bool = False) -> Figure:
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height + 0.45 * titled), layout="constrained")
    fig.set_facecolor("white" if titled else "none")
    return fig


@contextmanager
def style() -> Iterator[None]:
    """Our look, whatever the user's matplotlibrc says about the things set here."""
    import matplotlib as mpl

    ink, muted, rule = COLOURS["ink"], COLOURS["muted"], COLOURS["rule"]
    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 9, "axes.labelsize": 9, "legend.fontsize": 8.5,
        "axes.facecolor": "none", "axes.edgecolor": rule, "axes.labelcolor": ink,
        "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "axes.axisbelow": True, "grid.color": rule, "grid.linewidth": 0.6, "text.color": ink,
        "xtick.color": rule, "ytick.color": rule, "xtick.labelcolor": muted,
        "ytick.labelcolor": muted, "hatch.color": COLOURS["surface"], "text.usetex": False,
        "svg.fonttype": "none", "svg.hashsalt": "flataudit", "path.simplify": True,
    }  # fmt: skip
    with mpl.rc_context(settings):
        yield


def _png(fig: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    out = io.BytesIO()
    with style():
        fig.set_dpi(PNG_DPI)
        # What savefig writes, which draws all of it twice.
        FigureCanvasAgg(fig).print_png(out)  # type: ignore[no-untyped-call]
    return out.getvalue()


def svg(fig: Figure, prefix: str, alt: str) -> str:
    """One `<svg>` element: no prolog, metadata or namespaces; ids prefixed; themed colours."""
    from html import escape

    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = io.StringIO()
    with style():
        fig.set_dpi(72)  # the points of SVG
        FigureCanvasSVG(fig).print_svg(  # type: ignore[no-untyped-call]
            out, metadata={"Date": None}
        )
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-")
    for name, colour in COLOURS.items():
        text = text.replace(colour, f"var(--fig-{name}, {colour})")
    box = re.search(r'viewBox="[^"]*"', text)
    head = f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(alt)}">'
    return head + text[text.index(">") + 1 :]
