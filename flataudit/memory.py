"""How much memory there is, asked before the work starts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from flataudit.processes import proportional_bytes

# Left to the rest of the process and to the libraries' work arrays.
HEADROOM = 0.85

_LIMIT: ContextVar[int | None] = ContextVar("memory limit", default=None)


@contextmanager
def limited_to(n_bytes: int | None) -> Iterator[None]:
    """Lets `available_bytes` count on so much RAM for this process, what it holds included.

    It plans only: nothing here keeps the process below.
    """
    token = _LIMIT.set(n_bytes)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now: GPU memory that no tensor holds, or free RAM.

    On Linux a control group's limit counts as well, since a container sees the host's memory,
    and so does the limit of `limited_to`, less what this process holds.
    """
    if device.type == "cuda":
        # What an earlier solve used and torch keeps is not free to the driver, but to the next one.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int((torch.cuda.mem_get_info(device)[0] + kept) * HEADROOM)
    free = _meminfo()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _LIMIT.get()
    left = None if limit is None else max(0, limit - proportional_bytes())
    bounds = [bound for bound in (free, _cgroup_free(), left) if bound is not None]
    return int(min(bounds) * HEADROOM)


def human(n_bytes: float) -> str:
    """Bytes as a short text: 5.4 GB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.3g} GB"


def _meminfo() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_free() -> int | None:
    base = Path("/sys/fs/cgroup")
    try:
        limit = (base / "memory.max").read_text(encoding="ascii").strip()
        used = (base / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))
