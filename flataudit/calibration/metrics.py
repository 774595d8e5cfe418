"""Checked inputs, calibration errors and the tables behind the pictures; all that is descriptive.

The errors compare, within bins of the top-label confidence c, mean confidence with accuracy.
None has a known null distribution, so ECE is shown beside the ECE that a calibrated model with
the same confidences would have. This is the only importer of netcal, which takes logits, NaN and
labels out of range without a word; hence the checks here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flataudit.errors import InputError

N_BINS = 15
PIT_BINS = 10
LOG_ZERO = -745.0  # about the log of the smallest float64; stands in for log 0

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

_SUM_TOLERANCE = 1e-4
_HISTOGRAM_BINS = 20


@dataclass(frozen=True, slots=True)
class CalibrationErrors:
    """netcal's numbers for the top label; each is None where it does not exist.

    `ece` is weighted by bin size and `mce` the largest bin's, both on equal-width bins; `ace` is
    the plain mean over bins of equal size (the adaptive calibration error).
    """

    ece: float | None = None
    mce: float | None = None
    ace: float | None = None


# --- input ---


def checked_probabilities(log_p: ArrayLike, labels: ArrayLike) -> tuple[FloatArray, IntArray]:
    """Log probabilities and labels that every function of this package can work with.

    Args:
        log_p: (n, K >= 2); rows must sum to 1 within 1e-4, -inf is allowed.
        labels: (n,) whole numbers 0..K-1.

    Returns:
        float64 (n, K), rows normalised, log 0 = -inf replaced by -745 and finite values kept;
        int64 (n,).

    Raises:
        InputError: Wrong shapes, NaN, rows that do not sum to 1, labels out of range.
    """
    table = np.asarray(log_p, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 1 or table.shape[1] < 2:
        raise InputError(
            f"log_p: expected shape (n >= 1, K >= 2), got {table.shape}; "
            "pass one row per sample (for a Bernoulli model the columns log(1-p), log p)"
        )
    if np.isnan(table).any():
        raise InputError(
            f"log_p: expected numbers, got {int(np.isnan(table).sum())} NaN; "
            "check the model's inputs and weights"
        )
    # The sign comes first: exp of raw logits would overflow.
    if table.max() > _SUM_TOLERANCE:
        raise InputError(
            f"log_p: expected log probabilities <= 0, got {table.max():.6g}; "
            "apply log_softmax to the logits"
        )
    total = np.exp(table).sum(axis=1)
    worst = int(np.abs(total - 1.0).argmax())
    if abs(total[worst] - 1.0) > _SUM_TOLERANCE:
        raise InputError(
            f"log_p: expected rows of probabilities that sum to 1 within {_SUM_TOLERANCE:g}, "
            f"got {total[worst]:.6g} in row {worst}; apply log_softmax to the logits"
        )
    y = _check_labels(np.asarray(labels), *table.shape)
    # Rounding must not leave a probability above 1, and log 0 must not leave 0 * inf.
    normal = np.minimum(table - np.log(total)[:, None], 0.0)
    return np.asarray(np.where(np.isneginf(normal), LOG_ZERO, normal)), y


def checked_residuals(z: ArrayLike) -> FloatArray:
    """Standardised residuals as finite float64, (n,) or (n, n_outputs)."""
    table = np.asarray(z, dtype=np.float64)
    if table.ndim not in (1, 2) or table.size == 0:
        raise InputError(
            f"z: expected shape (n,) or (n, n_outputs), got {table.shape}; "
            "pass one standardised residual (y - mu)/sigma per target"
        )
    if not np.isfinite(table).all():
        raise InputError(
            f"z: expected finite residuals, got {int((~np.isfinite(table)).sum())} others; "
            "check the predictions and that sigma > 0"
        )
    return table


def checked_counts(y: ArrayLike, rate: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Counts and rates as float64 of one shape."""
    counts, rates = np.asarray(y, dtype=np.float64), np.asarray(rate, dtype=np.float64)
    if counts.ndim not in (1, 2) or counts.size == 0 or counts.shape != rates.shape:
        raise InputError(
            "y, rate: expected one shape (n,) or (n, n_outputs), "
            f"got {counts.shape} and {rates.shape}; pass one rate per count"
        )
    if not np.isfinite(counts).all() or counts.min() < 0 or (counts != np.rint(counts)).any():
        raise InputError("y: expected whole numbers >= 0, got others; a Poisson model needs counts")
    if not np.isfinite(rates).all() or rates.min() <= 0:
        raise InputError(
            f"rate: expected finite rates > 0, got {rates.min():.6g}..{rates.max():.6g}; "
            "pass exp(output), not the output"
        )
    return counts, rates


def _check_labels(labels: np.ndarray[Any, Any], n: int, n_classes: int) -> IntArray:
    """Labels as int64 (n,) in 0..K-1."""
    if labels.shape != (n,):
        raise InputError(
            f"labels: expected shape ({n},) as log_p has {n} rows, got {labels.shape}; "
            "pass class indices, not one-hot rows"
        )
    if labels.dtype.kind not in "biuf" or not np.array_equal(labels, np.rint(labels)):
        raise InputError(
            f"labels: expected whole numbers, got {labels.dtype} with others; "
            "encode classes as 0..K-1"
        )
    if labels.min() < 0 or labels.max() >= n_classes:
        raise InputError(
            f"labels: expected 0..{n_classes - 1}, got {labels.min()}..{labels.max()}; "
            "encode classes by the model's own column order"
        )
    return labels.astype(np.int64)


# --- calibration errors ---


def top_label(p: FloatArray, labels: IntArray) -> tuple[FloatArray, BoolArray]:
    """Confidence max_k p_ik of the top label and whether that label is right.

    Args:
        p: (n, K) probabilities.
        labels: (n,) classes 0..K-1.

    Returns:
        Confidence (n,) float64 and hit (n,) bool. Of tied classes the first is the top label.

    >>> confidence, hit = top_label(np.array([[0.2, 0.8], [0.5, 0.5]]), np.array([1, 1]))
    >>> confidence.tolist(), hit.tolist()
    ([0.8, 0.5], [True, False])
    """
    top = p.argmax(axis=1)
    confidence: FloatArray = np.take_along_axis(p, top[:, None], axis=1)[:, 0]
    return confidence, np.asarray(top == labels)


def calibration_errors(
    confidence: FloatArray, hit: BoolArray, *, n_bins: int = N_BINS
) -> CalibrationErrors:
    """ECE, MCE and ACE of the top label as netcal computes them.

    netcal is given the confidence and hit of the top label, never the (n, K) probabilities: from
    those it guesses from the labels present whether the problem is binary, and fails or measures
    another quantity when it guesses wrong.

    Args:
        confidence: (n,) in [0, 1], checked by the caller: netcal drops NaN without a word.
        hit: (n,) bool.
        n_bins: Bins of each metric.

    Returns:
        The three errors; all None where netcal is not installed, `ace` None where tied
        confidences leave fewer than `n_bins` distinct bins.

    Source:
        ECE and MCE: Naeini et al., AAAI 2015. ACE over equal-size bins: Nixon et al.,
        arXiv:1904.01685.
    """
    try:
        # Imported here: it takes seconds and pulls in torch, scikit-learn and gpytorch.
        from netcal.metrics import ACE, ECE, MCE
    except ImportError:
        return CalibrationErrors()
    c, y = confidence.astype(np.float64), hit.astype(int)
    return CalibrationErrors(
        ece=float(ECE(n_bins).measure(c, y)),
        mce=float(MCE(n_bins).measure(c, y)),
        ace=float(ACE(n_bins, equal_intervals=False).measure(c, y))
        if _has_distinct_quantiles(c, n_bins)
        else None,
    )


def expected_calibration_error(
    confidence: FloatArray, hit: BoolArray, *, n_bins: int = N_BINS
) -> float:
    """ECE = sum_b (n_b/n) |mean hit - mean confidence| on equal-width bins, without netcal.

    Args:
        confidence: (n,) in [0, 1].
        hit: (n,) bool.
        n_bins: Bins [j/B, (j+1)/B), the last one closed.

    Returns:
        The same number as netcal's, up to rounding.

    >>> expected_calibration_error(np.array([0.9, 0.9]), np.array([True, False])).__round__(3)
    0.4
    """
    index = _equal_width_bins(confidence, n_bins)
    gap = np.bincount(index, weights=hit - confidence, minlength=n_bins)
    return float(np.abs(gap).sum() / confidence.size)


def ece_if_calibrated(
    confidence: FloatArray, *, n_resamples: int = 200, seed: int = 0, n_bins: int = N_BINS
) -> float:
    """Mean ECE when the labels are drawn from the model's own probabilities.

    This is how large ECE is by chance alone; it falls as 1/sqrt(n). Only the confidence matters,
    since a label drawn from p hits the top label with probability max p.

    Args:
        confidence: (n,) top-label confidence.
        n_resamples: Label sets drawn.
        seed: Of numpy's default generator.
        n_bins: As in `expected_calibration_error`.

    Returns:
        The mean over resamples, >= 0.

    Source:
        The consistency resampling of Broecker and Smith, Weather and Forecasting 22, 2007.

    >>> ece_if_calibrated(np.ones(10))
    0.0
    """
    rng = np.random.default_rng(seed)
    index = _equal_width_bins(confidence, n_bins)
    order = np.argsort(index, kind="stable")
    c = confidence[order]
    starts = np.flatnonzero(np.diff(index[order], prepend=-1))
    expected = np.add.reduceat(c, starts)
    total = 0.0
    for _ in range(n_resamples):
        hits = np.add.reduceat(rng.random(c.size) < c, starts)
        total += float(np.abs(hits - expected).sum())
    return total / (n_resamples * confidence.size)


def quantile_bins(confidence: FloatArray, n_bins: int = N_BINS) -> IntArray:
    """Bin index (n,) of equal-size bins; ties always share a bin, so there may be fewer bins."""
    edges = np.unique(np.quantile(confidence, np.arange(1, n_bins) / n_bins))
    return np.asarray(np.searchsorted(edges, confidence, side="right"), dtype=np.int64)


def pit_counts(pit: FloatArray, n_bins: int = PIT_BINS) -> IntArray:
    """How many PIT values fall into each of n_bins equal bins of [0, 1]; (n_bins,)."""
    index = np.minimum((pit.ravel() * n_bins).astype(np.int64), n_bins - 1)
    return np.bincount(index, minlength=n_bins).astype(np.int64)


def _equal_width_bins(confidence: FloatArray, n_bins: int) -> IntArray:
    """Index of the bin [j/B, (j+1)/B) of each confidence; 1 belongs to the last bin."""
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    index = np.searchsorted(edges, confidence, side="right") - 1
    return np.asarray(np.clip(index, 0, n_bins - 1), dtype=np.int64)


def _has_distinct_quantiles(confidence: FloatArray, n_bins: int) -> bool:
    """Whether netcal's equal-size bins exist: it clips to (0, 1) and ends them at 0 and 1."""
    eps = np.finfo(np.float64).eps
    edges = np.quantile(np.clip(confidence, eps, 1 - eps), np.linspace(0, 1, n_bins + 1))
    edges[0], edges[-1] = 0.0, 1.0
    return bool((np.diff(edges) > 0).all())


# --- pictures ---


def reliability_display(
    log_p: ArrayLike, labels: ArrayLike, *, n_bins: int = N_BINS
) -> dict[str, Any]:
    """Reliability diagram of the top label and a confidence histogram, as JSON values.

    Args:
        log_p: (n, K) log probabilities.
        labels: (n,) classes.
        n_bins: Equal-size bins; ties share a bin, so there may be fewer.

    Returns:
        `bins`: confidence, accuracy and count per bin, with the 95 % band low..high in which the
        accuracy of a calibrated model would lie (binomial, at the bin's mean confidence; it is
        centred on the null, not on the accuracy found). `histogram`: right and wrong counts on
        20 equal-width bins of [0, 1]. Further `mean_confidence` and `accuracy`.

    Raises:
        InputError: As in `assess_classification`.
    """
    log_p, y = checked_probabilities(log_p, labels)
    confidence, hit = top_label(np.exp(log_p), y)
    index = quantile_bins(confidence, n_bins)
    counts = np.bincount(index, minlength=n_bins)
    used = counts > 0
    n_b = counts[used]
    mean = np.bincount(index, weights=confidence, minlength=n_bins)[used] / n_b
    accuracy = np.bincount(index, weights=hit, minlength=n_bins)[used] / n_b
    low, high = _binomial_band(n_b, np.clip(mean, 0.0, 1.0))
    edges = np.linspace(0.0, 1.0, _HISTOGRAM_BINS + 1)
    right, wrong = (np.histogram(confidence[mask], edges)[0] for mask in (hit, ~hit))
    return {
        "kind": "classification",
        "bins": _rows(
            confidence=mean, accuracy=accuracy, low=low / n_b, high=high / n_b, count=n_b
        ),
        "histogram": _rows(left=edges[:-1], right=edges[1:], right_count=right, wrong_count=wrong),
        "mean_confidence": float(confidence.mean()),
        "accuracy": float(hit.mean()),
    }


def pit_display(pit: ArrayLike, *, n_bins: int = PIT_BINS) -> dict[str, Any]:
    """Histogram of PIT values as JSON values; flat if calibrated, U-shaped if over-confident.

    Args:
        pit: Values in [0, 1] of any shape, from `gaussian_pit` or `poisson_pit`.
        n_bins: Equal-width bins.

    Returns:
        `bins`: left, right and count, with the 95 % binomial band low..high of the count.

    Raises:
        InputError: Empty, non-finite or outside [0, 1].
    """
    u = np.asarray(pit, dtype=np.float64)
    if u.size == 0 or not bool(((u >= 0.0) & (u <= 1.0)).all()):
        raise InputError(
            f"pit: expected values in [0, 1], got shape {u.shape} with others or none; "
            "pass gaussian_pit(z) or poisson_pit(y, rate)"
        )
    edges = np.linspace(0.0, 1.0, n_bins + 1)
    size, share = np.full(n_bins, u.size), np.full(n_bins, 1.0 / n_bins)
    low, high = _binomial_band(size, share)
    rows = _rows(left=edges[:-1], right=edges[1:], count=pit_counts(u, n_bins), low=low, high=high)
    return {"kind": "regression", "bins": rows}


def _binomial_band(n: IntArray, p: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Central 95 % of a binomial count; exact, since sure bins have far from normal counts."""
    from scipy.stats import binom  # imported here: it takes half a second, only pictures need it

    return np.asarray(binom.ppf(0.025, n, p)), np.asarray(binom.ppf(0.975, n, p))


def _rows(**columns: np.ndarray[Any, Any]) -> list[dict[str, Any]]:
    """Columns of equal length as a list of records of plain Python numbers."""
    lists = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]
