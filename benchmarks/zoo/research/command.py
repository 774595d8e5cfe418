"""The command line that the passes of this folder share, and the order of the zoo's networks."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.zoo.command import STORE
from benchmarks.zoo.measure import RESULTS
from benchmarks.zoo.rule_fit import branch
from benchmarks.zoo.rules import Row, number
from benchmarks.zoo.scores import read

Json = dict[str, Any]
Item = TypeVar("Item")


def run(
    text: str | None,
    items: Iterable[tuple[str, Item]],
    call: Callable[[Item, Json], Json],
    arguments: Sequence[str] | None = None,
) -> int:
    """Calls `call(item, options)` on each named item that --only matches; 1 if any failed."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="PATTERN", help="networks whose name matches")
    parser.add_argument("--store", type=Path, default=STORE, help="registry and rows (%(default)s)")
    parser.add_argument("--data", type=Path, help="folder with the data sets; see data.py")
    given = parser.parse_args(arguments)
    options = {
        "store": str(given.store.resolve()),
        "data": str(given.data.resolve()) if given.data else None,
    }
    failed = 0
    for name, item in items:
        if given.only and not fnmatchcase(name, given.only):
            continue
        found = call(item, options)
        failed += found["state"] == "failed"
        print(*found.values(), flush=True)
    return 1 if failed else 0


def open_branch(path: Path = RESULTS) -> list[Row]:
    """The measured networks of the decision list's open branch, in the order of `stratified`."""
    rows = [row for row in read(path) if number(row, "gap") is not None]
    return stratified([row for row in rows if branch(row) == "network"])


def stratified(rows: Sequence[Row]) -> list[Row]:
    """Ordered so that every beginning has the data sets about in proportion, at random within.

    A pass that is stopped leaves a stratified sample; the key of the order follows from the name.
    """
    found = []
    for data in sorted({row["data"] for row in rows}):
        of = sorted((row for row in rows if row["data"] == data), key=_drawn)
        found += [((at + 0.5) / len(of), data, row) for at, row in enumerate(of)]
    return [row for *_, row in sorted(found, key=lambda item: item[:2])]


def _drawn(row: Row) -> str:
    return hashlib.sha256(row["name"].encode()).hexdigest()
