"""What Linux's /proc tells about processes: their children, and the memory they hold."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


def descendants(pid: int) -> list[int]:
    """The children of a process, their children, and so on; none where the kernel tells none."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        tasks = Path(f"/proc/{waiting.pop()}/task")
        with suppress(OSError):
            for task in tasks.iterdir():
                with suppress(OSError, ValueError):
                    children = [int(name) for name in (task / "children").read_text().split()]
                    found += children
                    waiting += children
    return found


def resident_bytes(pid: int | str = "self") -> int:
    """Bytes of RAM that a process uses, shared pages in full; 0 where it is gone or unknown.

    Costs microseconds, and counts too much where processes share pages after a fork.
    """
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, ValueError, IndexError):
        return 0


def proportional_bytes(pid: int | str = "self") -> int:
    """Bytes of RAM with each shared page divided among those who share it (PSS).

    Over the processes of one audit the sum counts every page once. Where the kernel does not
    tell it: `resident_bytes`.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return resident_bytes(pid)
    for line in lines:
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return resident_bytes(pid)
