"""How much memory there is, asked before the work starts."""

from __future__ import annotations

import os
from pathlib import Path

import torch

# Left to the rest of the process and to the libraries' work arrays.
HEADROOM = 0.85


def available_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now: free GPU memory, or available RAM.

    On Linux a control group's limit counts as well, since a container sees the host's memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * HEADROOM)
    free = _meminfo()
    if free is None:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_free()
    return int((free if limit is None else min(free, limit)) * HEADROOM)


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
