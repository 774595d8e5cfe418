"""Statistics with known null distributions: is the model calibrated, and by how much not.

The null of every test is that labels are drawn from the model's own probabilities. Each of the
three tests of a family finds what the others miss: the slope a model that is too sure of
everything, the bins one that is too sure here and too modest there, the bias a class (or a mean)
that is predicted too often. Only numpy and scipy.special, which import fast.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import special

from flataudit.calibration import metrics
from flataudit.calibration.metrics import N_BINS, PIT_BINS, BoolArray, FloatArray, IntArray

Z95 = 1.645  # one-sided 95 %

_MIN_VARIANCE = 2.0  # of a merged bin; below it chi-square is no approximation
_RIDGE = 1e-9  # counts^2, on the covariance of class counts: a class may have probability 0
_MAX_SLOPE = 2.0**20
_CHUNK = 2**21  # entries of log_p worked on at once


@dataclass(frozen=True, slots=True)
class Statistic:
    """A test statistic and its p-value; `dof` for chi-square, None for a two-sided z."""

    value: float
    p_value: float
    dof: int | None = None


@dataclass(frozen=True, slots=True)
class WithError:
    """An estimate and its standard error; both infinite where the estimate does not exist."""

    value: float
    se: float

    def interval(self, z: float) -> tuple[float, float]:
        """value -+ z se, or the whole line where the estimate or its error is not finite."""
        if not (math.isfinite(self.value) and math.isfinite(self.se)):
            return -math.inf, math.inf
        return self.value - z * self.se, self.value + z * self.se


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """Squared calibration error without its noise, its standard error, and a bound on the root.

    `upper` is the 95 % upper confidence bound sqrt(max(squared + 1.645 se, 0)).
    """

    squared: float
    se: float
    upper: float


# --- classification ---


def slope_score_test(log_p: FloatArray, labels: IntArray) -> Statistic:
    """Score test of slope 1 in the family softmax(a log p).

    z = U/sqrt(V) with U = sum_i (log p_iy - m_i), V = sum_i sum_k p_ik (log p_ik - m_i)^2 and
    m_i = sum_k p_ik log p_ik. U and V are the exact null mean-zero score and its null variance.

    Args:
        log_p: (n, K) finite log probabilities (see `checked_probabilities`).
        labels: (n,) classes 0..K-1.

    Returns:
        z < 0 means over-confident; two-sided p-value.

    Source:
        Cox, Biometrika 45, 1958; Spiegelhalter, Statistics in Medicine 5, 1986.

    >>> log_p = np.log(np.array([[0.8, 0.2]] * 10))
    >>> slope_score_test(log_p, np.array([0] * 8 + [1] * 2)).p_value.__round__(6)
    1.0
    """
    return _normal(*_slope_moments(log_p, labels, 1.0))


def fit_slope(log_p: FloatArray, labels: IntArray) -> WithError:
    """Maximum-likelihood slope a of softmax(a log p) on a >= 0; temperature is 1/a.

    The log likelihood is concave with gradient sum_i (log p_iy - E_a log p_i) and curvature
    sum_i Var_a(log p_i); its root is found by Newton's method inside a bracket, and
    se = 1/sqrt(sum_i Var_a(log p_i)) at the fit.

    Args:
        log_p: (n, K) finite log probabilities.
        labels: (n,) classes 0..K-1.

    Returns:
        Slope (below 1: over-confident) and standard error. Both infinite where no finite slope
        fits: every label is the top label, or all classes are equally likely in every row. The
        slope is 0 where the labels contradict the ranking so much that flat probabilities fit
        best.

    Source:
        Guo et al., arXiv:1706.04599 (as temperature 1/a).

    >>> log_p = np.log(np.array([[0.8, 0.2]] * 10))
    >>> fit_slope(log_p, np.array([0] * 8 + [1] * 2)).value.__round__(6)
    1.0
    """
    none = WithError(math.inf, math.inf)
    # The score falls to this limit as a grows. Taken directly: at a large finite a its last
    # digits decide, and they are rounding.
    if _score_limit(log_p, labels) == 0.0:
        return none
    score, info = _slope_moments(log_p, labels, 0.0)
    if score <= 0.0:
        return WithError(0.0, 1.0 / math.sqrt(info))
    low, high = 0.0, 1.0
    score, info = _slope_moments(log_p, labels, high)
    while score >= 0.0:
        if score == 0.0 and info > 0.0:
            return WithError(high, 1.0 / math.sqrt(info))
        if high >= _MAX_SLOPE:
            return none
        low, high = high, 2.0 * high
        score, info = _slope_moments(log_p, labels, high)
    slope = high
    for _ in range(100):
        step = score / info if info > 0.0 else math.inf
        proposal = slope + step
        if not low < proposal < high:
            proposal = 0.5 * (low + high)
        step, slope = proposal - slope, proposal
        score, info = _slope_moments(log_p, labels, slope)
        if score > 0.0:
            low = slope
        else:
            high = slope
        if abs(step) <= 1e-10 * slope:
            break
    return WithError(slope, 1.0 / math.sqrt(info)) if info > 0.0 else none


def bin_test(confidence: FloatArray, hit: BoolArray, n_bins: int = N_BINS) -> Statistic:
    """Hosmer-Lemeshow test on merged equal-size bins: sum_b D_b^2/V_b against chi-square.

    D = sum (hit - c) and V = sum c (1 - c) over a bin. Bins are merged from the left until
    V >= 2, and what remains joins the last: with less variance a single miss in a bin of sure
    predictions would reject by itself. The probabilities are not fitted to these labels, so the
    degrees of freedom are the number of bins.

    Args:
        confidence: (n,) probability of the event `hit` (top label right; K = 2: class 1).
        hit: (n,) bool.
        n_bins: Bins before merging.

    Returns:
        Statistic, p-value and degrees of freedom.

    Source:
        Hosmer and Lemeshow, Communications in Statistics A9, 1980.

    >>> bin_test(np.full(10, 0.5), np.array([True, False] * 5)).p_value
    1.0
    """
    index = metrics.quantile_bins(confidence, n_bins)
    variance = np.bincount(index, weights=confidence * (1.0 - confidence), minlength=n_bins)
    excess = np.bincount(index, weights=hit - confidence, minlength=n_bins)
    merged: list[list[float]] = []
    v = d = 0.0
    for v_bin, d_bin in zip(variance.tolist(), excess.tolist(), strict=True):
        v, d = v + v_bin, d + d_bin
        if v >= _MIN_VARIANCE:
            merged.append([v, d])
            v = d = 0.0
    if merged:
        merged[-1][0] += v
        merged[-1][1] += d
    else:
        merged.append([v, d])
    return _chi_square(sum(_ratio(d * d, v) for v, d in merged), len(merged))


def class_bias_test(p: FloatArray, labels: IntArray) -> Statistic:
    """Are classes as frequent as predicted: U' Sigma^-1 U against chi-square with K - 1 df.

    U = class counts - sum_i p_i and Sigma = diag(sum_i p_i) - P'P + 1e-9 I, class 0 dropped.
    For K = 2 this is the squared z of sum (y - p_1).

    Args:
        p: (n, K) probabilities.
        labels: (n,) classes 0..K-1.

    Returns:
        Statistic, p-value and degrees of freedom.

    >>> class_bias_test(np.full((4, 2), 0.5), np.array([0, 1, 1, 1])).value.__round__(6)
    1.0
    """
    n_classes = p.shape[1]
    excess = (np.bincount(labels, minlength=n_classes) - p.sum(axis=0))[1:]
    covariance = (np.diag(p.sum(axis=0)) - p.T @ p)[1:, 1:]
    # Eigenvalues, not a solve: classes of probability 0 leave it singular up to rounding.
    values, vectors = np.linalg.eigh(covariance)
    rounding = n_classes * np.finfo(np.float64).eps * max(float(values[-1]), 0.0)
    values = np.maximum(values, rounding) + _RIDGE
    return _chi_square(float(((vectors.T @ excess) ** 2 / values).sum()), n_classes - 1)


def calibration_error_bound(
    confidence: FloatArray, hit: BoolArray, n_bins: int = N_BINS
) -> ErrorBound:
    """Upper 95 % bound on the root mean squared calibration error over equal-size bins.

    With d = mean(hit - c), v = (mean (hit - c)^2 - d^2)/(n_b - 1), w = n_b/n over bins with
    n_b >= 2: squared = sum w (d^2 - v), se^2 = sum w^2 (2 v^2 + 4 max(d^2 - v, 0) v). The v
    removes the noise that makes the plug-in error of a calibrated model positive. The sum is
    skewed, so the bound covers in 89 to 96 % of samples (n = 500 to 10,000).

    Args:
        confidence: (n,) probability of the event `hit`.
        hit: (n,) bool.
        n_bins: Bins.

    Returns:
        The squared error (may be negative), its standard error and the bound on its root, in
        units of probability; the bound is infinite where no bin holds two samples.

    Source:
        The debiased squared calibration error of Kumar et al., arXiv:1909.10155.
    """
    index = metrics.quantile_bins(confidence, n_bins)
    counts = np.bincount(index, minlength=n_bins)
    use = counts >= 2
    if not use.any():
        return ErrorBound(math.nan, math.inf, math.inf)
    residual = hit - confidence
    n_b = counts[use]
    d = np.bincount(index, weights=residual, minlength=n_bins)[use] / n_b
    square = np.bincount(index, weights=residual**2, minlength=n_bins)[use] / n_b
    v = np.maximum(square - d * d, 0.0) / (n_b - 1)
    w = n_b / confidence.size
    squared = float((w * (d * d - v)).sum())
    se = math.sqrt(float((w * w * (2 * v * v + 4 * np.maximum(d * d - v, 0.0) * v)).sum()))
    return ErrorBound(squared, se, math.sqrt(max(squared + Z95 * se, 0.0)))


def confidence_gap(confidence: FloatArray, hit: BoolArray) -> WithError:
    """g = mean(c - hit) of the top label and sd/sqrt(n), ddof 1; above 0 is over-confident."""
    return mean_with_error(confidence - hit)


# --- regression and counts ---


def gaussian_pit(z: FloatArray) -> FloatArray:
    """Probability integral transform Phi(z) of standardised residuals: uniform if calibrated."""
    return np.asarray(special.ndtr(z), dtype=np.float64)


def poisson_pit(counts: FloatArray, rate: FloatArray, *, seed: int = 0) -> FloatArray:
    """Randomised PIT u = F(y - 1) + v (F(y) - F(y - 1)), v uniform: uniform if calibrated.

    Args:
        counts: Whole numbers >= 0.
        rate: Predicted means > 0, same shape.
        seed: Of the generator that draws v.

    Returns:
        u in [0, 1], same shape.

    Source:
        Dunn and Smyth, Journal of Computational and Graphical Statistics 5, 1996.
    """
    v = np.random.default_rng(seed).random(counts.shape)
    upper = special.pdtr(counts, rate)
    lower = np.where(counts > 0, special.pdtr(np.maximum(counts - 1, 0), rate), 0.0)
    return np.asarray(np.clip(lower + v * (upper - lower), 0.0, 1.0))


def dispersion_test(z: FloatArray) -> Statistic:
    """Score test of variance 1: sum(z^2 - 1)/sqrt(2 n); above 0 means over-confident."""
    return _normal(float((z * z - 1.0).sum()), 2.0 * z.size)


def poisson_dispersion_test(counts: FloatArray, rate: FloatArray) -> Statistic:
    """Score test of variance = mean: sum(((y - rate)^2 - y)/rate)/sqrt(2 n).

    Each term has mean 0 and variance 2 exactly if y is Poisson. Source: Dean and Lawless,
    JASA 84, 1989.
    """
    terms = ((counts - rate) ** 2 - counts) / rate
    return _normal(float(terms.sum()), 2.0 * counts.size)


def mean_bias_test(residual: FloatArray, variance: float) -> Statistic:
    """z-test of sum(residual) = 0; `variance` is that of the sum under the model."""
    return _normal(float(residual.sum()), variance)


def pit_test(pit: FloatArray, n_bins: int = PIT_BINS) -> Statistic:
    """Chi-square test that the PIT is uniform over equal bins, n_bins - 1 df.

    >>> pit_test((np.arange(100) + 0.5) / 100).value
    0.0
    """
    counts = metrics.pit_counts(pit, n_bins)
    expected = pit.size / n_bins
    return _chi_square(float(((counts - expected) ** 2).sum()) / expected, n_bins - 1)


def dispersion_dof(square: FloatArray, variance: float) -> float:
    """Degrees of freedom 2/r^2 of the chi-square that stands in for mean(square).

    Args:
        square: Squared residuals z^2.
        variance: Of their mean under the model.

    Returns:
        2/r^2 with r^2 the larger of `variance` and the relative variance observed, so that heavy
        tails widen the interval instead of passing for a wrong variance.

    Source:
        Satterthwaite, Biometrics Bulletin 2, 1946.

    >>> dispersion_dof(np.array([0.5, 1.5] * 50), 2 / 100)
    100.0
    """
    mean = mean_with_error(square)
    if math.isfinite(mean.se) and mean.value > 0.0:
        variance = max(variance, (mean.se / mean.value) ** 2)
    return 2.0 / variance


def dispersion_interval(mean_square: float, dof: float, z: float) -> tuple[float, float]:
    """Chi-square interval of the variance ratio: dof * mean_square / chi-square quantiles.

    Args:
        mean_square: Mean of z^2.
        dof: Degrees of freedom, n for normal residuals.
        z: Each side misses with probability 1 - Phi(z).

    Returns:
        (low, high) of E z^2.
    """
    tail = float(special.ndtr(-z))
    # gammaincinv and gammainccinv invert the lower and the upper tail without cancellation.
    upper = 2.0 * float(special.gammainccinv(0.5 * dof, tail))
    lower = 2.0 * float(special.gammaincinv(0.5 * dof, tail))
    return _ratio(dof * mean_square, upper), _ratio(dof * mean_square, lower)


def mean_with_error(values: FloatArray) -> WithError:
    """Mean and its standard error sd/sqrt(n), ddof 1; the error of one value is infinite."""
    n = values.size
    se = float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return WithError(float(values.mean()), se)


# --- shared ---


def _slope_moments(log_p: FloatArray, labels: IntArray, slope: float) -> tuple[float, float]:
    """Score and information of the slope: sum (log p_iy - E_a log p_i), sum Var_a(log p_i)."""
    score = info = 0.0
    for rows in _chunks(*log_p.shape):
        block, y = log_p[rows], labels[rows]
        weights = slope * (block - block.max(axis=1, keepdims=True))
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = np.einsum("ik,ik->i", weights, block)
        deviation = block - mean[:, None]
        score += float(np.take_along_axis(deviation, y[:, None], axis=1).sum())
        info += float(np.einsum("ik,ik,ik->", weights, deviation, deviation))
    return score, info


def _score_limit(log_p: FloatArray, labels: IntArray) -> float:
    """sum_i (log p_iy - max_k log p_ik), the score at infinite slope; 0 if every label is top."""
    own = np.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return float((own - log_p.max(axis=1)).sum())


def _chunks(n: int, width: int) -> Iterator[slice]:
    """Row slices of at most _CHUNK entries, so that temporaries stay small."""
    rows = max(1, _CHUNK // width)
    for start in range(0, n, rows):
        yield slice(start, start + rows)


def _ratio(numerator: float, denominator: float) -> float:
    """numerator/denominator with 0/0 = 0: nothing was at stake and nothing happened."""
    if denominator > 0.0:
        return numerator / denominator
    return 0.0 if numerator == 0.0 else math.copysign(math.inf, numerator)


def _normal(total: float, variance: float) -> Statistic:
    """Two-sided z-test of a sum with mean 0 and this variance under the null."""
    z = _ratio(total, math.sqrt(variance))
    return Statistic(z, float(2.0 * special.ndtr(-abs(z))))


def _chi_square(value: float, dof: int) -> Statistic:
    """Upper-tail chi-square test."""
    return Statistic(value, float(special.chdtrc(dof, value)), dof)
