"""Renders what benchmarks/claims.py measured: tables and figures of docs/claims.md.

    python benchmarks/claims_page.py

Reads benchmarks/claims.json. Writes the blocks between `<!-- table: NAME -->` and `<!-- end -->` of
docs/claims.md and the figures under docs/images. The text around the blocks is written by hand.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.claims import pending
from benchmarks.common.pages import machine_line, pyplot, rendered, save

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "claims.md"
IMAGES = ROOT / "docs" / "images"
FAMILIES = {
    "gaussian": "Gaussian linear",
    "bernoulli": "binary logistic",
    "softmax": "softmax regression",
    "mlp": "network 20-8-10",
    "wide": "network 20-40-10",
}
ESTIMATES = {
    "soft_rank": "soft rank / n",
    "tic": "TIC",
    "loo": "LOO",
    "recalibrated": "recalibrated soft rank / n",
}
COLOURS = {"soft_rank": "#1b6ca8", "tic": "#d1720a", "loo": "#3a3a3a", "recalibrated": "#7a9e3a"}
MARKS = {"soft_rank": "o", "tic": "s", "loo": "^", "recalibrated": "d"}
HOLDS = 0.10  # an estimate is said to hold where it is within this share of the gap


@dataclass(frozen=True, slots=True)
class Ratio:
    """mean(estimate)/mean(gap) over draws, with its standard error by the delta method."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.se:.3f}"

    @property
    def holds(self) -> bool:
        return abs(self.value - 1.0) <= HOLDS


@dataclass(frozen=True, eq=False)
class Result:
    """All draws of one cell: its settings, and one array (draws,) per column."""

    cell: dict[str, Any]
    columns: dict[str, list[Any]]

    def __getattr__(self, name: str) -> Any:
        return self.cell[name]

    def __len__(self) -> int:
        return len(self.columns["gap"])

    def mean(self, name: str) -> float:
        return float(np.mean(self.columns[name]))

    def se(self, name: str) -> float:
        values = np.asarray(self.columns[name], dtype=float)
        return float(values.std(ddof=1) / math.sqrt(len(values)))

    def ratio(self, estimate: str, gap: str = "gap") -> Ratio | None:
        """None where an estimate is missing in some draw."""
        if any(value is None for value in self.columns[estimate]):
            return None
        top, bottom = (np.asarray(self.columns[name], dtype=float) for name in (estimate, gap))
        value = float(top.mean() / bottom.mean())
        spread = float((top - value * bottom).std(ddof=1))
        return Ratio(value, spread / math.sqrt(len(top)) / abs(float(bottom.mean())))

    @property
    def slope(self) -> float:
        """Geometric mean of the true slopes."""
        return math.exp(float(np.log(self.columns["slope"]).mean()))

    def most(self, name: str) -> str:
        """The commonest value, with its share where it is not all."""
        (value, count), *_ = Counter(self.columns[name]).most_common()
        return str(value) if count == len(self) else f"{value} ({count}/{len(self)})"


def results(found: dict[str, Any]) -> list[Result]:
    """Every cell with at least two draws."""
    kept = []
    for entry in found["cells"]:
        if len(entry["rows"]) >= 2:
            columns = dict(zip(found["columns"], zip(*entry["rows"], strict=True), strict=True))
            kept.append(Result(entry["cell"], {k: list(v) for k, v in columns.items()}))
    return kept


def render(page: str, found: dict[str, Any]) -> str:
    """The page with every block made anew."""
    measured = results(found)
    tables: dict[str, Callable[[], str]] = {
        "machine": lambda: machine_line(found["machine"]),
        "open": lambda: open_line(found),
        "calibrated": lambda: calibrated_table(measured),
        "meets": lambda: meets_lines(measured),
        "variance": lambda: variance_table(measured),
        "softmax": lambda: slope_table(measured, "softmax"),
        "wide": lambda: slope_table(measured, "wide"),
        "regimes": lambda: regimes_table(measured),
    }
    return rendered(page, lambda name: tables[name]())


def pick(measured: Iterable[Result], claim: int, family: str) -> list[Result]:
    return [r for r in measured if (r.claim, r.family) == (claim, family)]


def open_line(found: dict[str, Any]) -> str:
    """How many draws there are, and what to do for the rest."""
    done, left = sum(len(entry["rows"]) for entry in found["cells"]), len(list(pending(found)))
    if not left:
        return f"All {done:,} fits are made."
    return (
        f"{done:,} of {done + left:,} fits are made; `python benchmarks/claims.py` goes on from"
        " there. Cells with fewer than two draws are not shown."
    )


# --- tables -------------------------------------------------------------------------------------


def calibrated_table(measured: list[Result]) -> str:
    lines = [
        "| model | n | draws | n / soft rank | gap | soft rank / n over gap | over the gap at"
        " fixed inputs | TIC over gap | LOO over gap |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        for r in pick(measured, 1, family):
            lines.append(
                f"| {FAMILIES[family]} | {r.n:,} | {len(r)} | {1 / r.mean('soft_rank'):.1f}"
                f" | {r.mean('gap'):.4f} ± {r.se('gap'):.4f} | {r.ratio('soft_rank')}"
                f" | {r.ratio('soft_rank', 'gap_fixed')} | {r.ratio('tic')} | {r.ratio('loo')} |"
            )
    return "\n".join(lines)


def meets(mine: list[Result], estimate: str) -> int | None:
    """The size from which on the estimate is within HOLDS of the gap at every size measured."""
    found = None
    for r in sorted(mine, key=lambda r: -r.n):
        ratio = r.ratio(estimate)
        if ratio is None or not ratio.holds:
            break
        found = r.n
    return found


def meets_lines(measured: list[Result]) -> str:
    lines = [
        f"| within {HOLDS:.0%} of the gap from n = | soft rank / n | TIC | LOO |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES:
        mine = pick(measured, 1, family)
        if not mine:
            continue
        cells = [meets(mine, name) for name in ("soft_rank", "tic", "loo")]
        largest = max(r.n for r in mine)
        texts = [f"{n:,}" if n else f"not up to {largest:,}" for n in cells]
        lines.append(f"| {FAMILIES[family]} | {' | '.join(texts)} |")
    return "\n".join(lines)


def variance_table(measured: list[Result]) -> str:
    lines = [
        "| stated variance / true | n | true slope | direction found | soft rank / n over gap"
        " | TIC over gap | LOO over gap |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(pick(measured, 2, "gaussian"), key=lambda r: (r.variance, r.n)):
        lines.append(
            f"| {r.variance:g} | {r.n:,} | {r.slope:.2f} | {r.most('direction')}"
            f" | {r.ratio('soft_rank')} | {r.ratio('tic')} | {r.ratio('loo')} |"
        )
    return "\n".join(lines)


def slope_table(measured: list[Result], family: str) -> str:
    lines = [
        "| n | penalty | label noise | draws | true slope | direction found | gap"
        " | soft rank / n over gap | TIC over gap | LOO over gap | recalibrated over gap |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in sorted(pick(measured, 2, family), key=lambda r: (r.n, r.noise, r.cell["penalty"])):
        ratios = [r.ratio(name) for name in ESTIMATES]
        lines.append(
            f"| {r.n:,} | {r.cell['penalty']:g} | {r.noise:g} | {len(r)} | {r.slope:.2f}"
            f" | {r.most('direction')} | {r.mean('gap'):.3f} ± {r.se('gap'):.3f}"
            f" | {' | '.join('none' if each is None else str(each) for each in ratios)} |"
        )
    return "\n".join(lines)


REGIMES = [
    ("true slope below 0.5", 0.0, 0.5),
    ("0.5 to 0.8", 0.5, 0.8),
    ("0.8 to 1.25", 0.8, 1.25),
    ("1.25 to 2", 1.25, 2.0),
    ("above 2", 2.0, math.inf),
]


def regimes_table(measured: list[Result]) -> str:
    """Range of each ratio over the classifiers of claim 2, by true slope."""
    mine = [r for r in measured if r.claim == 2 and r.family != "gaussian"]
    lines = [
        f"| {' | '.join(['', 'cells', *ESTIMATES.values()])} |",
        f"|{'---|' * (len(ESTIMATES) + 2)}",
    ]
    for title, low, high in REGIMES:
        inside = [r for r in mine if low <= r.slope < high]
        if not inside:
            continue
        texts = []
        for name in ESTIMATES:
            ratios = [ratio.value for r in inside if (ratio := r.ratio(name))]
            texts.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "none")
        lines.append(f"| {title} | {len(inside)} | {' | '.join(texts)} |")
    return "\n".join(lines)


# --- figures ------------------------------------------------------------------------------------


def _errorbar(axis: Any, x: list[float], ratios: list[Ratio], name: str, **options: Any) -> None:
    style: dict[str, Any] = {
        "marker": MARKS[name], "color": COLOURS[name], "label": ESTIMATES[name], "markersize": 4,
        "linewidth": 1.2, "capsize": 2,
    }  # fmt: skip
    style |= options
    axis.errorbar(x, [r.value for r in ratios], yerr=[2 * r.se for r in ratios], **style)


def _mark_one(axis: Any) -> None:
    """Where an estimate is the gap, and the band in which it is said to hold."""
    axis.axhspan(1 - HOLDS, 1 + HOLDS, color="#eeeeee", zorder=0)
    axis.axhline(1.0, color="#888888", linewidth=0.8)


def _finish(figure: Any, axis: Any, path: Path, *, columns: int) -> None:
    """One legend for all panels, that of `axis`; and the file."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
    save(figure, path)


def draw_calibrated(measured: list[Result], path: Path) -> None:
    """Estimates over the true gap against n, a panel per family."""
    plt = pyplot()
    families = [f for f in FAMILIES if pick(measured, 1, f)]
    figure, axes = plt.subplots(
        1, len(families), figsize=(2.5 * len(families), 3.1), sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, family in zip(axes[0], families, strict=True):
        mine = sorted(pick(measured, 1, family), key=lambda r: r.n)
        sizes = [r.n for r in mine]
        _mark_one(axis)
        for name in ("tic", "loo", "soft_rank"):
            _errorbar(axis, sizes, [r.ratio(name) for r in mine], name)
        _errorbar(
            axis, sizes, [r.ratio("soft_rank", "gap_fixed") for r in mine], "soft_rank",
            linestyle=":", markerfacecolor="white",
            label="soft rank / n over\nthe gap at fixed inputs",
        )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xticks([250, 1000, 4000, 16_000], ["250", "1,000", "4,000", "16,000"])
        axis.minorticks_off()
        axis.set_title(FAMILIES[family], fontsize=9)
        axis.set_xlabel("n")
    axes[0, 0].set_ylabel("estimate / true gap (± 2 SE)")
    axes[0, 0].set_ylim(0.0, 2.0)
    _finish(figure, axes[0, 0], path, columns=4)


def draw_variance(measured: list[Result], path: Path) -> None:
    """Gaussian with a stated variance: estimates over gap against that variance, by n."""
    plt = pyplot()
    mine = pick(measured, 2, "gaussian")
    sizes = sorted({r.n for r in mine})
    figure, axes = plt.subplots(
        1, len(sizes), figsize=(2.5 * len(sizes), 3.0), sharey=True, squeeze=False,
        constrained_layout=True,
    )  # fmt: skip
    for axis, n in zip(axes[0], sizes, strict=True):
        here = sorted((r for r in mine if r.n == n), key=lambda r: r.variance)
        x = [r.variance for r in here]
        _mark_one(axis)
        for name in ("soft_rank", "tic", "loo"):
            _errorbar(axis, x, [r.ratio(name) for r in here], name)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(x, [f"{v:g}" for v in x])
        axis.set_yticks([0.25, 0.5, 1, 2, 4], ["1/4", "1/2", "1", "2", "4"])
        axis.minorticks_off()
        axis.set_title(f"n = {n:,}", fontsize=9)
        axis.set_xlabel("stated / true variance")
    axes[0, 0].set_ylabel("estimate / true gap (± 2 SE)")
    _finish(figure, axes[0, 0], path, columns=3)


def draw_slopes(measured: list[Result], path: Path) -> None:
    """Classifiers: estimates over gap against the true slope, by family and n."""
    plt = pyplot()
    rows = [
        ("softmax", 0.0, "softmax regression"),
        ("wide", 0.0, "network 20-40-10"),
        ("wide", 0.4, "network, label noise 40 %"),
    ]
    mine = [r for r in measured if r.claim == 2 and r.family != "gaussian"]
    rows = [row for row in rows if any((r.family, r.noise) == row[:2] for r in mine)]
    sizes = sorted({r.n for r in mine})
    figure, axes = plt.subplots(
        len(rows), len(sizes), figsize=(3.0 * len(sizes), 2.5 * len(rows)), sharey=True,
        squeeze=False, constrained_layout=True,
    )  # fmt: skip
    for line, (family, noise, title) in zip(axes, rows, strict=True):
        for axis, n in zip(line, sizes, strict=True):
            here = sorted(
                (r for r in mine if (r.family, r.noise, r.n) == (family, noise, n)),
                key=lambda r: r.slope,
            )
            axis.set_visible(bool(here))
            if not here:
                continue
            _mark_one(axis)
            axis.axvline(1.0, color="#888888", linewidth=0.8)
            for name in ESTIMATES:
                known = [(r.slope, each) for r in here if (each := r.ratio(name))]
                _errorbar(axis, [s for s, _ in known], [each for _, each in known], name)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_ylim(0.04, 4.5)
            axis.set_yticks(
                [0.05, 0.1, 0.2, 0.5, 1, 2, 4], ["1/20", "1/10", "1/5", "1/2", "1", "2", "4"]
            )
            low, high = axis.get_xlim()
            ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 3, 4) if low <= t <= high]
            axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
            axis.minorticks_off()
            axis.set_title(f"{title}, n = {n:,}", fontsize=9)
        line[0].set_ylabel("estimate / true gap")
    for column in axes.T:
        lowest = [axis for axis in column if axis.get_visible()][-1]
        lowest.set_xlabel("true slope: < 1 over-, > 1 under-confident")
    _finish(figure, axes[0, 0], path, columns=4)


def main() -> None:
    found = json.loads((ROOT / "benchmarks" / "claims.json").read_text())
    measured = results(found)
    PAGE.write_text(render(PAGE.read_text(), found))
    draw_calibrated(measured, IMAGES / "claims_calibrated.svg")
    draw_variance(measured, IMAGES / "claims_variance.svg")
    draw_slopes(measured, IMAGES / "claims_slopes.svg")


if __name__ == "__main__":
    main()
