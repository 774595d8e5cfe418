"""The command line that the zoo's passes share: which cells, where from, where to."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.zoo.grid import Cell, grid

STORE = Path("zoo-store")


def parser(text: str | None) -> argparse.ArgumentParser:
    """The options of every pass."""
    found = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--quick", action="store_true", help="a subset of a minute or two")
    found.add_argument("--only", metavar="PATTERN", help="cells whose name matches, as 'zoo-cnn-*'")
    found.add_argument("--store", type=Path, default=STORE, help="registry and rows (%(default)s)")
    found.add_argument("--data", type=Path, help="folder with the data sets; see data.py")
    found.add_argument("--download", action="store_true", help="fetch missing sets from OpenML")
    return found


def chosen(given: argparse.Namespace) -> list[Cell]:
    """The cells that the options name."""
    cells = grid(quick=given.quick)
    return [cell for cell in cells if not given.only or fnmatchcase(cell.name, given.only)]


def main(
    text: str | None, call: str, after: Callable[[argparse.Namespace], None] | None = None
) -> None:
    """Runs `call` on every chosen cell as one Prefect flow and prints what came of it."""
    given = parser(text).parse_args()
    from flows.zoo import zoo_flow

    options: dict[str, Any] = {
        "store": str(given.store.resolve()),
        "data": str(given.data.resolve()) if given.data else None,
        "download": given.download,
    }
    started = time.perf_counter()
    rows = zoo_flow(call, [cell.name for cell in chosen(given)], options)
    counts = Counter(row["state"] for row in rows)
    seconds = time.perf_counter() - started
    print(f"{', '.join(f'{n} {state}' for state, n in counts.items())} in {seconds:.0f} s")
    for error, n in Counter(row["error"] for row in rows if row.get("error")).items():
        print(f"  {n} x {error}", file=sys.stderr)
    if after is not None:
        after(given)
    sys.exit(1 if counts["failed"] else 0)
