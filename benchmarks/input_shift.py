"""Error rate and power of the two-sample test of the inputs (docs/decisions/0004-input-shift.md).

python benchmarks/input_shift.py [REPEATS]
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from flataudit.selection import is_shifted
from flataudit.shift import LEVEL, input_shift

Array = NDArray[np.float64]
Draw = Callable[[np.random.Generator], tuple[Array, Array]]


def halves(x: Array, rng: np.random.Generator, m: int | None = None) -> tuple[Array, Array]:
    order = rng.permutation(len(x))
    cut = len(x) // 2 if m is None else len(x) - m
    return x[order[:cut]], x[order[cut:]]


def moved(a: Array, b: Array, columns: slice, by: float = 0.0, times: float = 1.0):  # type: ignore[no-untyped-def]
    b = b.copy()
    spread = np.concatenate([a, b]).std(axis=0)[columns]
    b[:, columns] = b[:, columns] * times + by * spread
    return a, b


digits, labels = load_digits(return_X_y=True)
diabetes = load_diabetes().data
cancer = load_breast_cancer().data
ALL = slice(None)


def subset(rng: np.random.Generator) -> tuple[Array, Array]:
    """Held-out digits without the classes 7, 8 and 9."""
    a, b = rng.permutation(len(digits))[:900], rng.permutation(len(digits))[:600]
    return digits[a], digits[b][labels[b] < 7]


def older(rng: np.random.Generator) -> tuple[Array, Array]:
    """Held-out patients of the upper half of ages only."""
    a, b = halves(diabetes, rng)
    return a, b[b[:, 0] > 0.0]


NULL: dict[str, Draw] = {
    "digits 898/899 x 64": lambda r: halves(digits, r),
    "digits 1747/50 x 64": lambda r: halves(digits, r, 50),
    "diabetes 221/221 x 10": lambda r: halves(diabetes, r),
    "breast cancer 519/50 x 30": lambda r: halves(cancer, r, 50),
    "normal 50/50 x 1": lambda r: (r.normal(size=(50, 1)), r.normal(size=(50, 1))),
    "heavy tails 100/100 x 300": lambda r: (
        r.standard_cauchy((100, 300)),
        r.standard_cauchy((100, 300)),
    ),
    "rare flags 200/200 x 500": lambda r: (
        (r.random((200, 500)) < 0.01) * 1.0,
        (r.random((200, 500)) < 0.01) * 1.0,
    ),
    "tokens 300/300 x 32": lambda r: (
        r.zipf(1.5, (300, 32)).clip(max=5000),
        r.zipf(1.5, (300, 32)).clip(max=5000),
    ),
}
POWER: dict[str, Draw] = {
    "digits: mean of all + 0.1 sd": lambda r: moved(*halves(digits, r), ALL, by=0.1),
    "digits: one pixel + 0.5 sd": lambda r: moved(*halves(digits, r), slice(20, 21), by=0.5),
    "digits: one pixel x 1.5": lambda r: moved(*halves(digits, r), slice(20, 21), times=1.5),
    "digits: all x 1.2": lambda r: moved(*halves(digits, r), ALL, times=1.2),
    "digits: three classes missing": subset,
    "diabetes: mean of all + 0.3 sd": lambda r: moved(*halves(diabetes, r), ALL, by=0.3),
    "diabetes: one feature + 0.5 sd": lambda r: moved(*halves(diabetes, r), slice(2, 3), by=0.5),
    "diabetes: all x 1.5": lambda r: moved(*halves(diabetes, r), ALL, times=1.5),
    "diabetes: upper half of ages": older,
    "diabetes: 50 held out, + 0.5 sd": lambda r: moved(*halves(diabetes, r, 50), ALL, by=0.5),
    "tokens: other frequencies": lambda r: (
        r.zipf(1.5, (300, 32)).clip(max=5000),
        r.zipf(1.8, (300, 32)).clip(max=5000),
    ),
}


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    for title, cases in (("same source", NULL), ("shifted", POWER)):
        print(f"| {title}, {repeats} draws | p < {LEVEL} | warned |\n|---|---|---|")
        for name, draw in cases.items():
            hits = warned = 0
            for seed in range(repeats):
                a, b = (torch.from_numpy(part) for part in draw(np.random.default_rng(seed)))
                found = input_shift(a, b, seed=seed)
                hits += found.p_value < LEVEL
                warned += is_shifted(found)
            print(f"| {name} | {hits / repeats:.3f} | {warned / repeats:.3f} |", flush=True)


if __name__ == "__main__":
    main()
