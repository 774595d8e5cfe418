"""The gap by class and by slice: means of the per-sample values over groups of training samples.

For a group S of n_S samples, in nats per example:

    gap       mean of psi_i over S; psi_i is sample i's own rise in loss when it is left out (LOO),
              its TIC contribution r_i'A_i r_i where there is no leave-one-out
    gap_se    sd(l_i + psi_i)/sqrt(n_S), ddof 1: as for the whole gap, that of the predicted loss
    accuracy  share of S that leave-one-out outputs get right, with Wilson's interval

The soft rank is not used: its leverage h_i stands for E[r'Ar | x] and knows nothing of the label,
so its mean over a class is no gap of that class. Weighted by n_S the gaps add up to the estimator's
gap over all samples, which is kept in the table, as it may differ from the gap that is believed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import InputError
from flataudit.estimates import LeaveOneOut
from flataudit.families import log_probabilities
from flataudit.results import LEVEL, Interval, SliceRow, SliceTable

MAX_NUMBERS = 20  # different numbers up to which each is a slice; above, bins of equal size
BINS = 5
MAX_TEXTS = 100  # different texts; more are refused
MISSING = "missing"
FEW = 10  # samples; smaller slices come last, whatever their gap

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Groups = tuple[list[str], NDArray[np.int64]]  # names, and each sample's group (n,)


@dataclass(frozen=True, slots=True, eq=False)
class PerSample:
    """What slices are made of, each (n,): loss, gap contribution, labels and hits.

    labels, hit, hit_unseen: None for regression; hit_unseen also without leave-one-out.
    """

    nll: Floats
    psi: Floats
    estimator: Literal["loo", "tic"]
    labels: NDArray[np.int64] | None = None
    hit: Bools | None = None
    hit_unseen: Bools | None = None


def per_sample(
    problem: Problem, nll: Tensor, tic: Tensor | None, left_out: LeaveOneOut | None
) -> PerSample | None:
    """The per-sample values of an audit, on the CPU; None where the solver knows none."""
    psi = tic if left_out is None else left_out.psi
    if psi is None:
        return None
    log_p = log_probabilities(problem.family, problem.outputs)
    labels = hit = hit_unseen = None
    if log_p is not None:
        y = problem.y.reshape(-1).long()
        labels, hit = _numpy(y), _numpy(log_p.argmax(dim=1) == y)
        if left_out is not None:
            unseen = log_probabilities(problem.family, left_out.outputs)
            assert unseen is not None
            hit_unseen = _numpy(unseen.argmax(dim=1) == y)
    estimator: Literal["loo", "tic"] = "tic" if left_out is None else "loo"
    return PerSample(_numpy(nll), _numpy(psi), estimator, labels, hit, hit_unseen)


def class_table(samples: PerSample | None, names: Sequence[str] | None = None) -> SliceTable | None:
    """The table by class, under the classes' names or indices; None for regression."""
    if samples is None or samples.labels is None:
        return None
    found = np.unique(samples.labels)
    texts = [str(k) if names is None else names[k] for k in found]
    return _table("class", texts, np.searchsorted(found, samples.labels), samples)


def group_by(slices: Mapping[str, Any] | None, n_samples: int) -> dict[str, Groups]:
    """The groups of each column, by its name: what can be refused is refused before any work.

    Raises:
        InputError: not one number or text per sample, or too many different texts.
    """
    return {
        str(name): group(values, n_samples, str(name)) for name, values in (slices or {}).items()
    }


def slice_tables(
    grouped: Mapping[str, Groups], samples: PerSample | None
) -> tuple[SliceTable, ...]:
    """One table for each column; none without per-sample values."""
    if samples is None:
        return ()
    return tuple(_table(name, *groups, samples) for name, groups in grouped.items())


def group(values: Any, n: int, name: str) -> Groups:
    """The names of the groups of a column and each sample's group.

    Texts, booleans and up to 20 different numbers are groups of their own; more numbers fall into
    five bins of equal size, named by the smallest and the largest number in them. Nothing, NaN
    and None are the group "missing".

    >>> group(["b", "a", "b", None], 4, "shop")
    (['a', 'b', 'missing'], array([1, 0, 1, 2]))
    >>> group(range(100), 100, "age")[0]
    ['0 to 19', '20 to 39', '40 to 59', '60 to 79', '80 to 99']
    """
    column = _column(values, n, name)
    missing = np.array([v is None or v != v for v in column.tolist()], dtype=bool)
    kept = column[~missing]
    if kept.dtype.kind == "O":
        numbers = all(isinstance(v, int | float) for v in kept)
        kept = kept.astype(np.float64 if numbers and len(kept) else str)
    if kept.dtype.kind in "iuf":
        names, codes = _numbers(kept)
    else:
        found, codes = np.unique(kept, return_inverse=True)
        names = [str(value) for value in found]
        if len(names) > MAX_TEXTS:
            raise InputError(
                f"expected at most {MAX_TEXTS} different values in {name} to slice by, got"
                f" {len(names)}; choose a coarser column"
            )
    groups = np.full(n, len(names), dtype=np.int64)
    groups[~missing] = codes
    return names + [MISSING] * bool(missing.any()), groups


def _column(values: Any, n: int, name: str) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    if hasattr(values, "isna"):  # a pandas column: NA has no truth value
        values = values.astype(object).where(~values.isna(), None).to_numpy()
    column = np.asarray(values if hasattr(values, "__array__") else list(values))
    if column.ndim == 2 and column.shape[1] == 1:
        column = column[:, 0]
    if column.shape != (n,):
        raise InputError(
            f"expected one value of {name} for each of the {n} training samples to slice by, got"
            f" shape {column.shape}; give them in the samples' order"
        )
    if column.dtype.kind not in "biufUO":
        raise InputError(
            f"expected numbers or text in {name} to slice by, got {column.dtype}; convert it"
        )
    return column


def _numbers(values: NDArray[Any]) -> Groups:
    found, codes = np.unique(values, return_inverse=True)
    if len(found) <= MAX_NUMBERS:
        return _texts(found), codes.astype(np.int64)
    at = np.arange(1, BINS) / BINS
    edges = np.unique(np.quantile(values, at, method="inverted_cdf"))
    bins = np.searchsorted(edges, values, side="left")
    used, codes = np.unique(bins, return_inverse=True)
    ends = np.array([[values[bins == b].min(), values[bins == b].max()] for b in used])
    texts = _texts(ends.reshape(-1))
    pairs = zip(texts[::2], texts[1::2], strict=True)
    return [a if a == b else f"{a} to {b}" for a, b in pairs], codes.astype(np.int64)


def _texts(numbers: NDArray[Any]) -> list[str]:
    """Numbers as text, with as few digits as keep them apart."""
    distinct = len(np.unique(numbers))
    for digits in range(4, 18):
        texts = [f"{float(v):.{digits}g}" for v in numbers]
        whole = [str(int(v)) if abs(v) < 1e15 and v == round(v) else "" for v in numbers.tolist()]
        texts = [w or t for w, t in zip(whole, texts, strict=True)]
        if len(set(texts)) == distinct:
            return texts
    return [repr(v) for v in numbers.tolist()]


def _table(
    column: str, names: Sequence[str], groups: NDArray[np.int64], samples: PerSample
) -> SliceTable:
    rows = [_row(name, groups == code, samples) for code, name in enumerate(names)]
    rows.sort(key=lambda row: (row.n < FEW, -row.gap))
    return SliceTable(column, samples.estimator, float(samples.psi.mean()), tuple(rows))


def _row(name: str, of: Bools, samples: PerSample) -> SliceRow:
    losses, n = samples.nll[of] + samples.psi[of], int(of.sum())
    return SliceRow(
        value=name,
        n=n,
        train_nll=float(samples.nll[of].mean()),
        gap=float(samples.psi[of].mean()),
        gap_se=float(losses.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        train_accuracy=None if samples.hit is None else float(samples.hit[of].mean()),
        predicted_accuracy=None if samples.hit_unseen is None else wilson(samples.hit_unseen[of]),
    )


def wilson(hits: Bools) -> Interval:
    """A share with Wilson's score interval, which is right for few samples and shares of 0 and 1.

    >>> found = wilson(np.ones(5, dtype=bool))
    >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
    (1.0, 0.649, 1.0)
    """
    n, p = len(hits), float(hits.mean())
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Interval(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def _numpy(t: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = t.detach().cpu().numpy()
    return array
