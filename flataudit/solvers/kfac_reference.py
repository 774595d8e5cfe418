"""KFAC's soft rank beside the exact one, as measured by benchmarks/peers.py.

Written by benchmarks/performance_page.py from benchmarks/peers.json; do not edit.
"""

from __future__ import annotations

from typing import NamedTuple


class ReferenceCase(NamedTuple):
    """name, soft rank by solver=kfac, exact soft rank."""

    name: str
    kfac: float
    exact: float


REFERENCE: tuple[ReferenceCase, ...] = (
    ReferenceCase("mlp-500", 1680.4094517741594, 538.989158458294),
    ReferenceCase("lenet-500", 1852.132463801403, 584.6046864877477),
)
