"""Do the held-out inputs come from where the training inputs come from: a two-sample test.

One permutation null for two statistics of the same samples, both linear in who is held out, so
that a few hundred permutations cost one matrix product:

    per feature   Neyman's smooth components 1 and 2 of the midranks u in (-1, 1): location u and
                  scale u^2; the statistic is the largest |z| over features
    jointly       |mean of phi over held-out - mean of phi over training|^2 (MMD^2), phi random
                  Fourier features of the standardised inputs, and for integers the counts of each
                  sample's commonest values (of tokens: which words, wherever they stand)

The smaller of the two p-values is itself compared with its permutations: the level is exact for
exchangeable samples of any size, with ties, constant features and any dependence between features.
Measured error rates and power: docs/decisions/0004-input-shift.md.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from torch import Tensor

from flataudit.results import Shift

LEVEL = 0.01
PERMUTATIONS = 499
MAX_SAMPLES = 2000  # of each side; more would find differences too small to matter
MAX_FEATURES = 4096  # looked at one by one, evenly spaced; the joint statistic sees all
N_FOURIER = 256
N_VALUES = 256  # commonest values counted in integer inputs
_BLOCK = 512  # features at a time: bounds the memory

Floats = NDArray[np.float32]


def input_shift(train: Tensor, heldout: Tensor, *, seed: int = 0) -> Shift:
    """Compares held-out with training inputs, each (samples, ...) of the same trailing shape.

    Args:
        train: Training inputs (n, ...), floats, integers or booleans; at least 2 samples.
        heldout: Held-out inputs (m, ...).
        seed: Of the subsample, the permutations and the Fourier features.

    Returns:
        p-value, statistic, the features that differ (family-wise at 1 %), the one that does most
        and by how much (Kolmogorov distance, 0 to 1).

    >>> import torch
    >>> x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0))
    >>> input_shift(x[:200], x[200:]).p_value > LEVEL
    True
    >>> moved = x[200:] + torch.tensor([0.0, 2.0, 0.0])
    >>> found = input_shift(x[:200], moved)
    >>> found.worst_feature, found.n_features_shifted, found.p_value < LEVEL
    (1, 1, True)
    """
    rng = np.random.default_rng(seed)
    parts = [_subsample(t, rng) for t in (train, heldout)]
    n, m = (len(part) for part in parts)
    pooled = np.concatenate(parts)
    columns = np.arange(pooled.shape[1])
    if len(columns) > MAX_FEATURES:
        columns = np.linspace(0, len(columns) - 1, MAX_FEATURES).astype(int)
    groups = _arrangements(n, m, rng)

    peaks, z = np.zeros(len(groups)), np.zeros(len(columns))
    for start in range(0, len(columns), _BLOCK):
        block = columns[start : start + _BLOCK]
        found = np.abs(groups @ _rank_scores(pooled[:, block]))
        peaks = np.maximum(peaks, found.max(axis=1))
        z[start : start + _BLOCK] = found[0].reshape(2, -1).max(axis=0)
    phi = _joint_features(pooled, rng)
    joint = np.square(groups @ phi).sum(axis=1)

    smallest = np.minimum(_p_values(peaks), _p_values(joint))
    bound = np.sort(peaks)[math.ceil((1.0 - LEVEL) * len(peaks)) - 1]
    worst = int(z.argmax())
    sides = pooled[:n, columns[worst]], pooled[n:, columns[worst]]
    return Shift(
        p_value=float(np.mean(smallest <= smallest[0])),
        statistic=float(z[worst]),
        n_features_shifted=int((z > bound).sum()),
        worst_feature=int(columns[worst]),
        worst_distance=_distance(*sides),
        joint_distance=_witness_distance(phi[:n], phi[n:]),
        n_features=len(columns),
    )


def _subsample(x: Tensor, rng: np.random.Generator) -> NDArray[np.float64]:
    """At most MAX_SAMPLES rows (s, p), features flattened."""
    rows = np.arange(len(x))
    if len(x) > MAX_SAMPLES:
        rows = np.sort(rng.choice(len(x), MAX_SAMPLES, replace=False))
    kept: NDArray[np.float64] = x[rows].reshape(len(rows), -1).numpy().astype(np.float64)
    return kept


def _arrangements(n: int, m: int, rng: np.random.Generator) -> Floats:
    """Rows: weights 1/m on the held-out, -1/n on the others, the observed arrangement first.

    Scaled so that a score with pooled variance 1 has a weighted sum of variance 1.
    """
    weights = np.r_[np.full(n, -1.0 / n), np.full(m, 1.0 / m)] / math.sqrt(1.0 / n + 1.0 / m)
    rows = np.tile(weights.astype(np.float32), (PERMUTATIONS + 1, 1))
    rng.permuted(rows[1:], axis=1, out=rows[1:])
    return rows


def _rank_scores(x: NDArray[np.float64]) -> Floats:
    """Location and scale scores (s, 2p) of the midranks, each with mean 0 and variance 1 or 0."""
    u = (2.0 * rankdata(x, axis=0) - 1.0) / len(x) - 1.0
    return _standardised(np.concatenate([u, u * u], axis=1))


def _joint_features(x: NDArray[np.float64], rng: np.random.Generator) -> Floats:
    """phi (s, R): random Fourier features of a Gaussian kernel, and counts of common values."""
    z = _standardised(x)
    pairs = rng.integers(0, len(z), (2, 1000))
    width = float(np.median(np.linalg.norm(z[pairs[0]] - z[pairs[1]], axis=1))) or 1.0
    frequencies = rng.standard_normal((z.shape[1], N_FOURIER), dtype=np.float32) / width
    angles = z @ frequencies
    phi: list[NDArray[np.floating]] = [
        np.cos(angles) / math.sqrt(N_FOURIER),
        np.sin(angles) / math.sqrt(N_FOURIER),
    ]
    if x.shape[1] > 1 and bool((x == np.round(x)).all()):
        values, counts = np.unique(x, return_counts=True)
        common = np.sort(values[np.argsort(-counts, kind="stable")[:N_VALUES]])
        where = np.searchsorted(common, x).clip(max=len(common) - 1)
        cells = np.where(common[where] == x, where, len(common)) + np.arange(len(x))[:, None] * (
            len(common) + 1
        )
        table = np.bincount(cells.ravel(), minlength=len(x) * (len(common) + 1))
        bag = _standardised(table.reshape(len(x), -1)[:, :-1].astype(np.float64))
        phi.append(bag / math.sqrt(bag.shape[1]))
    stacked = np.concatenate(phi, axis=1)
    centred: Floats = (stacked - stacked.mean(axis=0)).astype(np.float32)
    return centred


def _standardised(x: NDArray[np.float64]) -> Floats:
    """Columns with mean 0 and variance 1; constant ones become 0. Huge values do not overflow."""
    largest = np.abs(x).max(axis=0)
    x = x / np.where(largest > 0, largest, 1.0)
    x = x - x.mean(axis=0)
    deviation = x.std(axis=0, ddof=1)
    # What is left of a constant column is rounding.
    return (x / np.where(deviation > 1e-12, deviation, np.inf)).astype(np.float32)


def _p_values(statistic: NDArray[np.floating]) -> NDArray[np.float64]:
    """The share of arrangements with a statistic at least as large, for each arrangement."""
    # Equal arrangements may differ by the rounding of a matrix product.
    rounded = np.round(statistic / (float(np.max(statistic)) or 1.0), 5)
    below = np.searchsorted(np.sort(rounded), rounded, side="left")
    return (len(rounded) - below) / len(rounded)


def _distance(a: NDArray[np.floating], b: NDArray[np.floating]) -> float:
    """Kolmogorov distance: the largest difference of the two distribution functions."""
    at = np.concatenate([a, b])
    shares = (np.searchsorted(np.sort(part), at, side="right") / len(part) for part in (a, b))
    return float(np.abs(np.subtract(*shares)).max())


def _witness_distance(a: Floats, b: Floats) -> float:
    """Distance along the direction that tells the samples apart, found and measured on halves.

    The projection on mean phi(b) - mean phi(a) of one half, the Kolmogorov distance of the other;
    averaged over both, less what chance gives.
    """
    found = []
    for half in (0, 1):
        if min(len(a), len(b)) < 4:
            return 0.0
        direction = b[half::2].mean(axis=0) - a[half::2].mean(axis=0)
        rest_a, rest_b = a[1 - half :: 2] @ direction, b[1 - half :: 2] @ direction
        # E[D] under equality: sqrt(pi/2) log 2 / sqrt(n m/(n + m)).
        chance = 0.8687 * math.sqrt(1.0 / len(rest_a) + 1.0 / len(rest_b))
        found.append(_distance(rest_a, rest_b) - chance)
    return max(0.0, float(np.mean(found)))
