"""Renders what the benchmarks measured: tables and figures of docs/performance.md, KFAC's errors.

    python benchmarks/performance_page.py

Reads benchmarks/peers.json and benchmarks/scaling.json. Writes the blocks between
`<!-- table: NAME -->` and `<!-- end -->` of docs/performance.md, the figures under docs/images, and
flataudit/solvers/kfac_reference.py. The text around the blocks is written by hand.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.cases import CASES
from benchmarks.common.methods import METHODS
from benchmarks.common.pages import machine_line, pyplot, rendered, save
from benchmarks.scaling import exponents

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "images"
REFERENCE = ROOT / "flataudit" / "solvers" / "kfac_reference.py"
PUBLISHED = [name for name in CASES if not name.startswith("tiny-")]
SERIES = {
    "dual-n": "dual, over n (784-100-10)",
    "dual-p": "dual, over P (n = 250)",
    "dual-k": "dual, over K (n = 250)",
    "primal-p": "primal, over P (n = 1,000)",
    "product-n": "one product, over n (784-100-10)",
    "product-p": "one product, over P (n = 1,000)",
}
UNITS = {"n_rows": "N = n (K - 1)", "n_params": "P", "n": "n"}


def main() -> None:
    peers = json.loads((ROOT / "benchmarks" / "peers.json").read_text())
    scaling = json.loads((ROOT / "benchmarks" / "scaling.json").read_text())
    matrix_free = json.loads((ROOT / "benchmarks" / "matrix_free.json").read_text())
    PAGE.write_text(render(PAGE.read_text(), peers, scaling, matrix_free))
    REFERENCE.write_text(reference(peers))
    draw_peers(peers, IMAGES / "performance_peers.svg")
    draw_scaling(scaling, IMAGES / "performance_scaling.svg")


def render(
    page: str, peers: dict[str, Any], scaling: dict[str, Any], matrix_free: dict[str, Any]
) -> str:
    """The page with every block made anew."""

    def table(name: str) -> str:
        if name == "machine":
            return machine_line(peers["machine"])
        if name == "scaling":
            return scaling_table(scaling["points"])
        if name == "choice":
            return choice_table(scaling["points"])
        if name == "matrix-free":
            return matrix_free_table(matrix_free)
        if name == "single":
            return single_table(matrix_free["products"])
        if name == "kfac":
            return kfac_table(peers["rows"])
        if name == "open":
            return open_line(peers["rows"])
        return peers_table(name, peers["rows"])

    return rendered(page, table)


def peers_table(case: str, rows: list[dict[str, Any]]) -> str:
    """One case: a line per method, errors against this project's exact value."""
    mine = [r for r in rows if r["case"] == case and r["status"] != "not_applicable"]
    if not mine:
        return "Not measured yet."
    first = mine[0]
    exact = exact_row(case, rows)
    ours = exact["cpu_seconds"] if exact else None
    facts = (
        f"n = {first['n']:,}, P = {first['n_params']:,}, N = {first['n_rows']:,}"
        if ("n" in first)
        else ""
    )
    values = (
        f"; soft rank {exact['soft_rank']:.1f}, gap by TIC {exact['tic']:.4f}, by leave-one-out"
        f" {exact['loo']:.4f} nats per example"
        if exact
        else ""
    )
    lines = [
        f"{CASES[case].title}: {facts}{values}.",
        "",
        "| method | soft rank | TIC | LOO | CPU s | CPU, flataudit = 1 | wall s | peak GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    refused = []
    for row in mine:
        title = METHODS[row["method"]].title
        if row["status"] != "done":
            if row["status"] == "unsupported":
                refused.append(f"{title}: {row['reason']}")
            else:
                lines.append(f"| {title} | {row['reason']} | | | | | | |")
            continue
        cells = [
            title + (f" ({row['note']})" if row.get("note") else ""),
            *(
                error(row[key], exact and exact[key], row.get(f"{key}_se"))
                for key in ("soft_rank", "tic", "loo")
            ),
            f"{row['cpu_seconds']:.2f}",
            "" if ours is None else f"{row['cpu_seconds'] / ours:.2g}",
            f"{row['wall_seconds']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    if refused:
        lines += ["", "Cannot do this case. " + ". ".join(refused) + "."]
    return "\n".join(lines)


def exact_row(case: str, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    for row in rows:
        if (row["case"], row["method"], row["status"]) == (case, "flataudit", "done"):
            return row
    return None


def error(value: float | None, exact: float | None, se: float | None = None) -> str:
    """'exact' below 1e-8, else a percentage, else a factor; the value where no exact one is known.

    se: the method's own standard error, shown beside a percentage.

    >>> error(1.0 + 1e-12, 1.0), error(1.05, 1.0), error(4.5, 1.0), error(None, 1.0)
    ('exact', '+5.0 %', '4.5 times', 'none')
    """
    if value is None:
        return "none"
    if exact is None:
        return f"{value:.4g}"
    relative = value / exact - 1.0
    if abs(relative) < 1e-8:
        return "exact"
    if relative >= 1.0:
        return f"{value / exact:,.{1 if relative < 9 else 0}f} times"
    stated = "" if se is None else f" ± {abs(se / exact) * 100:.2g}"
    digits = max(0, min(4, 1 - _order(abs(relative) * 100)))
    return f"{relative * 100:+.{digits}f}{stated} %"


def _order(value: float) -> int:
    return int(f"{value:e}".split("e")[1])


def kfac_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| case | exact soft rank | kfac | times |", "|---|---|---|---|"]
    for case, approximate, exact in kfac_cases(rows):
        lines.append(f"| {case} | {exact:.1f} | {approximate:.1f} | {approximate / exact:.2f} |")
    return "\n".join(lines)


def kfac_cases(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(case, soft rank by solver=kfac, exact soft rank)."""
    found = []
    for case in PUBLISHED:
        exact = exact_row(case, rows)
        mine = [
            r for r in rows
            if (r["case"], r["method"], r["status"]) == (case, "flataudit-kfac", "done")
        ]  # fmt: skip
        if exact and mine:
            found.append((case, mine[0]["soft_rank"], exact["soft_rank"]))
    return found


def open_line(rows: list[dict[str, Any]]) -> str:
    """What has no row yet."""
    there = {(r["case"], r["method"]) for r in rows}
    missing = []
    for case in PUBLISHED:
        meant = [m for m in METHODS.values() if m.kind != "product" or not CASES[case].exact]
        left = [m.title for m in meant if (case, m.name) not in there]
        if len(left) == len(meant):
            missing.append(f"{case}: everything")
        elif left:
            missing.append(f"{case}: {', '.join(left)}")
    if not missing:
        return "Every case was measured with every method."
    return (
        "Not measured yet (`python benchmarks/peers.py` goes on from there): "
        + "; ".join(missing)
        + "."
    )


def reference(peers: dict[str, Any]) -> str:
    """The source of flataudit/solvers/kfac_reference.py."""
    cases = "".join(
        f'    ReferenceCase("{case}", {approximate!r}, {exact!r}),\n'
        for case, approximate, exact in kfac_cases(peers["rows"])
    )
    before = REFERENCE.read_text()
    return before[: before.index("REFERENCE: ")] + (
        f"REFERENCE: tuple[ReferenceCase, ...] = (\n{cases})\n"
    )


def choice_table(points: list[dict[str, Any]]) -> str:
    lines = [
        "| n | P | N | P/N | primal: operations | CPU s | dual: operations | CPU s | less work"
        " | less time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        if p["series"] != "choice" or p["status"] != "done":
            continue
        a, b = p["primal"], p["dual"]
        chosen = "primal" if a["work"] <= b["work"] else "dual"
        faster = "primal" if a["cpu_seconds"] <= b["cpu_seconds"] else "dual"
        lines.append(
            f"| {p['n']:,} | {p['n_params']:,} | {p['n_rows']:,}"
            f" | {p['n_params'] / p['n_rows']:.2f} | {a['work']:.2g} | {a['cpu_seconds']:.2f}"
            f" | {b['work']:.2g} | {b['cpu_seconds']:.2f} | {chosen} | {faster} |"
        )
    return "\n".join(lines)


def matrix_free_table(found: dict[str, Any]) -> str:
    """Largest errors over seeds, and how many lay inside what was stated."""
    lines = [
        "| solver | case | penalty | runs | products | soft rank | TIC | leave-one-out |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for part, solver in (("accuracy", "lanczos"), ("sampling", "sampling")):
        if part not in found:
            continue
        total = {**found[part]["total"], "case": "all", "penalty": None}
        for row in [*found[part]["cases"], total]:
            cells = [
                f"{row[q]['largest_error']:.2%} ({row[q]['inside']} in)" if q in row else ""
                for q in ("soft_rank", "tic", "loo")
            ]
            penalty = "" if row["penalty"] is None else f"{row['penalty']:g}"
            lines.append(
                f"| {solver} | {row['case']} | {penalty} | {row['runs']}"
                f" | {row['mean_products']:,.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def single_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| network | vectors | passes per vector |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['network']} | {row['vectors']} | {row['float64']['ratio']:.2f} |")
    return "\n".join(lines)


def scaling_table(points: list[dict[str, Any]]) -> str:
    found = exponents(points)
    lines = [
        "| series | sizes | time ~ size^ | limit ~ size^ | memory ~ size^ | time / limit |",
        "|---|---|---|---|---|---|",
    ]
    for series, title in SERIES.items():
        mine = [p for p in points if p["series"] == series and p["status"] == "done"]
        if series not in found:
            continue
        sizes = [p[p["varies"]] for p in mine]
        each = found[series]
        scale = 8 if series.startswith("product") else 1
        ratios = [p["cpu_seconds"] / scale / p["limit_cpu_seconds"] for p in mine]
        lines.append(
            f"| {title} | {UNITS[mine[0]['varies']]} = {min(sizes):,} to {max(sizes):,}"
            f" | {each['time']:.2f} | {each['limit']:.2f} | {_number(each['memory'])}"
            f" | {', '.join(f'{r:.1f}' for r in ratios)} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return "" if value != value else f"{value:.2f}"


# --- figures ------------------------------------------------------------------------------------


COLOURS = {"exact": "#1b6ca8", "estimate": "#d1720a", "approximation": "#8a8a8a"}


def draw_peers(peers: dict[str, Any], path: Path) -> None:
    """CPU time against the error of the soft rank, one panel per case; ours filled."""
    plt = pyplot()
    rows = [r for r in peers["rows"] if r["status"] == "done"]
    cases = [c for c in PUBLISHED if exact_row(c, rows)]
    lines = [sum(r["case"] == case for r in rows) for case in cases]
    times = [r["cpu_seconds"] for r in rows]
    figure, axes = plt.subplots(
        len(cases), 1, figsize=(7.2, 0.21 * sum(lines) + 0.75 * len(cases)), squeeze=False,
        constrained_layout=True, height_ratios=lines, sharex=True,
    )  # fmt: skip
    for axis, case in zip(axes[:, 0], cases, strict=True):
        exact = exact_row(case, rows)
        assert exact is not None
        mine = sorted((r for r in rows if r["case"] == case), key=lambda r: r["cpu_seconds"])
        names = [METHODS[r["method"]].title for r in mine]
        for i, row in enumerate(mine):
            method = METHODS[row["method"]]
            colour = COLOURS[method.kind]
            own = method.library == "flataudit"
            axis.barh(
                i, row["cpu_seconds"], color=colour if own else "white", edgecolor=colour,
                linewidth=1.2, height=0.7,
            )  # fmt: skip
            axis.text(
                row["cpu_seconds"] * 1.08, i, error(row["soft_rank"], exact["soft_rank"]),
                va="center", fontsize=8,
            )  # fmt: skip
        axis.set_yticks(range(len(mine)), names)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(max(min(times), 1e-3) / 2, max(times) * 8)
        axis.tick_params(labelbottom=True)
        axis.set_title(f"{CASES[case].title}, n = {CASES[case].n:,}", loc="left", fontsize=10)
    axes[-1, 0].set_xlabel(
        "CPU-seconds; beside each bar the error of the soft rank; filled: flataudit"
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in COLOURS.values()]
    figure.legend(
        handles, [f"{kind}" for kind in COLOURS], loc="outside upper right", ncols=3, frameon=False
    )
    save(figure, path)


def draw_scaling(scaling: dict[str, Any], path: Path) -> None:
    """CPU time against size, log-log, with the limit dashed and fitted exponents in the titles."""
    plt = pyplot()
    found = exponents(scaling["points"])
    names = [name for name in SERIES if name in found]
    columns = 2
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(7.6, 2.7 * lines), squeeze=False, constrained_layout=True
    )
    for axis, series in zip(axes.flat, names, strict=False):
        mine = [p for p in scaling["points"] if p["series"] == series and p["status"] == "done"]
        sizes = [p[p["varies"]] for p in mine]
        scale = scaling["vectors"] if series.startswith("product") else 1
        axis.loglog(
            sizes, [p["cpu_seconds"] / scale for p in mine], "o-", color=COLOURS["exact"],
            label="flataudit",
        )  # fmt: skip
        least = "forward and backward pass" if series.startswith("product") else "one Cholesky"
        axis.loglog(
            sizes, [p["limit_cpu_seconds"] for p in mine], "s--", color="#555555", label=least
        )
        axis.set_title(f"{SERIES[series]}: exponent {found[series]['time']:.2f}", fontsize=9)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel(UNITS[mine[0]["varies"]])
        axis.set_ylabel("CPU-seconds")
        axis.legend(frameon=False, fontsize=8)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    save(figure, path)


if __name__ == "__main__":
    main()
