"""What the numbers were measured on: the kind of machine and the versions, no names or paths."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch", "numpy", "scipy", "curvlinops-for-pytorch", "backpack-for-pytorch", "nngeometry",
    "laplace-torch",
)  # fmt: skip


def machine(threads: int, libraries: Iterable[str] = LIBRARIES) -> dict[str, Any]:
    """Processor, cores, memory, system and the versions of the libraries that are installed."""
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    release = platform.freedesktop_os_release() if Path("/etc/os-release").exists() else {}
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": release.get("PRETTY_NAME", platform.system()),
        "python": platform.python_version(),
        "libraries": found,
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()
