"""Scores of an estimate against the true gap: pure functions of arrays, with weights per model.

Weights are how often a model counts: all one for the score itself, multiplicities for a bootstrap.
Pairs of models weigh w_i w_j.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]
Score = Callable[[Floats], float]  # weights (n,) -> value; NaN where it is undefined


def kendall(estimate: ArrayLike, gap: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Kendall's tau-b over all pairs, ties counted as in scipy.stats.kendalltau."""
    a, b, w = _arrays(estimate, gap, weights)
    return kendall_score(a, b)(w)


def kendall_score(estimate: ArrayLike, gap: ArrayLike) -> Score:
    """The same as a function of the weights, the signs of all pairs taken once."""
    a, b, _ = _arrays(estimate, gap, None)
    s, t = _signs(a), _signs(b)
    both, own, true = s * t, s**2, t**2

    def score(w: Floats) -> float:
        scale = math.sqrt((w @ own @ w) * (w @ true @ w))
        return float(w @ both @ w / scale) if scale > 0 else math.nan

    return score


def spearman(estimate: ArrayLike, gap: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Spearman's rho: the correlation of mid-ranks, each model counted `weights` times."""
    a, b, w = _arrays(estimate, gap, weights)
    return spearman_score(a, b)(w)


def spearman_score(estimate: ArrayLike, gap: ArrayLike) -> Score:
    """The same as a function of the weights, what lies below what counted once."""
    a, b, _ = _arrays(estimate, gap, None)
    below = [0.5 + 0.5 * _signs(values) for values in (a, b)]

    def score(w: Floats) -> float:
        total = w.sum()
        if total <= 1:
            return math.nan
        x, y = (matrix @ w for matrix in below)
        x, y = x - (w * x).sum() / total, y - (w * y).sum() / total
        scale = math.sqrt((w * x**2).sum() * (w * y**2).sum())
        return float((w * x * y).sum() / scale) if scale > 0 else math.nan

    return score


def log_errors(estimate: ArrayLike, gap: ArrayLike) -> Floats:
    """|log(estimate/gap)|; infinite where the two are not of one sign, NaN where the gap is 0."""
    a, b = np.asarray(estimate, dtype=float), np.asarray(gap, dtype=float)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = a / b
        found: Floats = np.where(ratio > 0, np.abs(np.log(np.where(ratio > 0, ratio, 1.0))), np.inf)
    return np.where(b == 0, np.nan, found)


def excess(estimate: ArrayLike, gap: ArrayLike, floor: ArrayLike) -> Floats:
    """Log errors beyond sampling noise: sqrt(max(0, log(estimate/gap)^2 - (s/gap)^2)).

    floor: s, the standard error of the test NLL that the training sample's size allows,
    sd(l_loo)/sqrt(n). Where estimate and gap are not of one sign there is no logarithm: 0 if they
    are within s of each other, else infinite.
    """
    a, g, s = (np.asarray(values, dtype=float) for values in (estimate, gap, floor))
    errors = log_errors(a, g)
    with np.errstate(divide="ignore", invalid="ignore"):
        beyond = np.sqrt(np.maximum(0.0, errors**2 - (s / g) ** 2))
    found: Floats = np.where(np.isfinite(errors), beyond, np.where(np.abs(a - g) <= s, 0.0, np.inf))
    return found


def quantile(values: ArrayLike, q: float, weights: ArrayLike | None = None) -> float:
    """The smallest value with at least a share q of the weight at or below it.

    With weights of one that is numpy's method "inverted_cdf".
    """
    v, w = _weighted(values, weights)
    if not len(v):
        return math.nan
    order = np.argsort(v)
    share = np.cumsum(w[order])
    at = int(np.searchsorted(share, q * share[-1] * (1 - 1e-12)))
    return float(v[order][min(at, len(v) - 1)])


def coverage(
    low: ArrayLike, high: ArrayLike, gap: ArrayLike, weights: ArrayLike | None = None
) -> float:
    """The share of true gaps within their interval."""
    inside = (np.asarray(low) <= np.asarray(gap)) & (np.asarray(gap) <= np.asarray(high))
    v, w = _weighted(inside.astype(float), weights)
    return float((v * w).sum() / w.sum()) if len(v) else math.nan


def sign_accuracy(
    estimate: ArrayLike,
    gap: ArrayLike,
    se: ArrayLike,
    pairs: Sequence[tuple[int, int, str]],
    weights: ArrayLike | None = None,
) -> dict[str, float]:
    """How often the sign of a difference is right, by the one hyper-parameter that differs.

    A pair weighs |P(sign right) - P(sign wrong)| of the truth's own difference given its standard
    errors, erf(|gap_i - gap_j|/sqrt(2 (se_i^2 + se_j^2))), so that noise neither helps nor harms;
    a tie of the estimate counts half. Each hyper-parameter is an environment of Dziugaite et al.
    2020 (arXiv 2010.11924): "worst" is their robust accuracy, one minus the robust sign error;
    "all" is over all pairs.
    """
    a, g, w = _arrays(estimate, gap, weights)
    return sign_score(a, g, se, pairs)(w)


def sign_score(
    estimate: ArrayLike, gap: ArrayLike, se: ArrayLike, pairs: Sequence[tuple[int, int, str]]
) -> Callable[[Floats], dict[str, float]]:
    """The same as a function of the weights, the pairs looked at once."""
    a, g, _ = _arrays(estimate, gap, None)
    s = np.asarray(se, dtype=float)
    if not pairs:
        return lambda w: {}
    i, j = (np.array([pair[at] for pair in pairs]) for at in (0, 1))
    names, code = np.unique([pair[2] for pair in pairs], return_inverse=True)
    noise, difference = np.hypot(s[i], s[j]), g[i] - g[j]
    with np.errstate(divide="ignore", invalid="ignore"):
        sure = special.erf(np.abs(difference) / (math.sqrt(2.0) * noise))
    certain = np.where(noise > 0, sure, 1.0) * (difference != 0)
    hit = 0.5 * (1.0 + np.sign(a[i] - a[j]) * np.sign(difference))

    def score(w: Floats) -> dict[str, float]:
        weight = w[i] * w[j] * certain
        total, right = (
            np.bincount(code, weights=x, minlength=len(names)) for x in (weight, weight * hit)
        )
        if not total.sum() > 0:
            return {}
        found = {
            str(name): float(r / t) for name, r, t in zip(names, right, total, strict=True) if t > 0
        }
        return found | {"worst": min(found.values()), "all": float(right.sum() / total.sum())}

    return score


def conditional_information(
    estimate: ArrayLike,
    gap: ArrayLike,
    hyperparameters: Mapping[str, ArrayLike],
    weights: ArrayLike | None = None,
    *,
    most: int = 2,
) -> float:
    """PGDL's score in percent: the least normalised conditional mutual information.

    Over ordered pairs of models that share the values of the hyper-parameters in S, V = sign of the
    estimates' difference and W that of the gaps': I(V; W | S)/H(W | S), where a group with the
    same values counts by its share of the pairs. The score is the minimum over all S of at most
    `most` hyper-parameters, the empty one included, times 100 (arXiv 2012.07976, after
    Jiang et al. 2020, arXiv 1912.02178). Sets S that leave the sign of no pair open are left out.
    """
    a, b, w = _arrays(estimate, gap, weights)
    v, truth = _signs(a), _signs(b)
    pairs = np.outer(w, w)
    np.fill_diagonal(pairs, 0.0)
    codes = {k: np.unique(np.asarray(x).astype(str), return_inverse=True)[1]
             for k, x in hyperparameters.items()}  # fmt: skip
    found = []
    for size in range(most + 1):
        for chosen in itertools.combinations(codes, size):
            group = np.zeros(len(a), dtype=np.int64)
            for name in chosen:
                group = group * (codes[name].max() + 1) + codes[name]
            value = _normalised_information(v, truth, pairs, group)
            if not math.isnan(value):
                found.append(value)
    return 100.0 * min(found) if found else math.nan


def _normalised_information(
    v: Floats, truth: Floats, pairs: Floats, group: NDArray[np.int64]
) -> float:
    same = group[:, None] == group[None, :]
    total = (pairs * same).sum()
    if total <= 0:
        return math.nan
    information = entropy = 0.0
    for value in np.unique(group):
        members = np.flatnonzero(group == value)
        at = np.ix_(members, members)
        size = pairs[at].sum()
        if size <= 0:
            continue
        joint = np.array(
            [[(pairs[at] * (v[at] == i) * (truth[at] == j)).sum() for j in (-1, 0, 1)]
             for i in (-1, 0, 1)]
        ) / size  # fmt: skip
        one, two = joint.sum(axis=1), joint.sum(axis=0)
        share = size / total
        information += share * float(special.rel_entr(joint, np.outer(one, two)).sum())
        entropy += share * float(stats.entropy(two))
    return information / entropy if entropy > 0 else math.nan


def bootstrap(
    score: Score,
    groups: Sequence[str],
    *,
    draws: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of a score under resampling of whole groups of models.

    Models of one group share training samples, so that groups, not models, are independent.
    """
    codes = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    n = int(codes.max()) + 1 if len(codes) else 0
    if n < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    values = np.array(
        [score(rng.multinomial(n, np.full(n, 1 / n))[codes].astype(float)) for _ in range(draws)]
    )
    values = values[~np.isnan(values)]
    if not len(values):
        return math.nan, math.nan
    tail = (1 - level) / 2
    return quantile(values, tail), quantile(values, 1 - tail)


def _signs(values: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.sign(values[:, None] - values[None, :])


def _arrays(a: ArrayLike, b: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    first, second = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    w = np.ones(len(first)) if weights is None else np.asarray(weights, dtype=float)
    if not (len(first) == len(second) == len(w)):
        raise ValueError(f"expected equal lengths, got {len(first)}, {len(second)} and {len(w)}")
    return first, second, w


def _weighted(values: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats]:
    v = np.asarray(values, dtype=float)
    w = np.ones(len(v)) if weights is None else np.asarray(weights, dtype=float)
    keep = ~np.isnan(v) & (w > 0)
    return v[keep], w[keep]
