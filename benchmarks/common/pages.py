"""Pages whose tables and figures are made from committed results."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rendered(page: str, table: Callable[[str], str]) -> str:
    """The page with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


def machine_line(found: dict[str, Any]) -> str:
    """Where it was measured (`benchmarks.common.machine`), in one sentence."""
    threads = "one thread" if found["threads"] == 1 else f"{found['threads']} threads"
    return (
        f"{found['processor']}, {found['cores']} cores, {found['memory_gib']} GiB, {threads};"
        f" {software(found)}."
    )


def software(found: dict[str, Any]) -> str:
    """System, Python and libraries."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items())
    return f"{found['system']}, Python {found['python']}, {libraries}"


def pyplot() -> Any:
    """matplotlib without a screen, set up so that the same figure is the same file."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "flataudit", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False}
    )  # fmt: skip
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path) -> None:
    """Writes the figure without a date, and closes it."""
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
