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
    ReferenceCase("mlp-500", 1677.1127589643684, 538.812075267216),
    ReferenceCase("lenet-500", 1852.132463801403, 584.6046864877476),
    ReferenceCase("logistic-2000", 1266.5284226475742, 853.5410456662045),
    ReferenceCase("mlp-2000", 2733.131843021426, 1147.4213755575079),
    ReferenceCase("lenet-2000", 3099.4150988067313, 1021.2530565177385),
)
