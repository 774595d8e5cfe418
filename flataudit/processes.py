"""What Linux's /proc tells about processes: children, memory, and whether one is still there."""

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


def identity() -> str:
    """Names this process and no other: boot, pid namespace, pid and start; "" where not known."""
    try:
        boot, space = _here()
        return f"{boot} {space} {os.getpid()} {_start(os.getpid())}"
    except (OSError, IndexError):
        return ""


def is_gone(named: str) -> bool:
    """Whether the process that `identity` named has certainly ended.

    False where that cannot be seen from here: on another machine, in another container, or since
    the machine was started anew.
    """
    try:
        boot, space, pid, start = named.split()
        if (boot, space) != _here():
            return False
    except (OSError, ValueError):
        return False
    try:
        return _start(int(pid)) != start
    except FileNotFoundError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _here() -> tuple[str, str]:
    """This boot of the machine, and this container's numbering of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return boot, os.readlink("/proc/self/ns/pid")


def _start(pid: int) -> str:
    """When a process was started, in ticks since the boot; "ended" for a zombie."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "ended" if fields[0] in "ZX" else fields[19]
