"""What is concluded from the tests: verdict, direction and severity.

Two questions are asked apart. Do the labels contradict the probabilities (reject)? And is the
calibration error shown to be small (equivalent)? With few labels neither may be answered, with
many a trifle is rejected; only both answers together are a verdict.

|                | not reject   | reject           |
|----------------|--------------|------------------|
| equivalent     | calibrated   | within_tolerance |
| not equivalent | not_shown    | miscalibrated    |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from flataudit.calibration import metrics, tests
from flataudit.calibration.metrics import FloatArray
from flataudit.errors import InputError
from flataudit.results import Calibration, Direction, Evidence, Severity, Verdict


@dataclass(frozen=True, slots=True)
class CalibrationPolicy:
    """The thresholds of the verdict; the defaults are those the method was measured with.

    Attributes:
        delta: Tolerated root mean squared calibration error, in probability.
        slope_band: Tolerated slopes; their reciprocals are temperatures, and for regression
            ratios of variance.
        alpha: Level of the three tests together (each is held against alpha/3).
        min_samples: Fewer samples are insufficient.
        min_errors: Fewer wrong top labels (counts: fewer events) are insufficient.
        direction_z: Half-width, in standard errors, of the intervals that decide the direction;
            the default splits 2.5 % per side between slope and gap.
        high_gap, critical_gap: Severity by the gap's lower limit.
        high_slope, critical_slope: Severity by the slope's upper limit.
    """

    delta: float = 0.05
    slope_band: tuple[float, float] = (0.80, 1.25)
    alpha: float = 0.05
    min_samples: int = 200
    min_errors: int = 10
    direction_z: float = 2.2414027276049473  # the normal's upper 1.25 % point
    high_gap: float = 0.05
    critical_gap: float = 0.15
    high_slope: float = 0.8
    critical_slope: float = 0.5

    def __post_init__(self) -> None:
        """Refuses thresholds that no verdict could be read from."""
        low, high = self.slope_band
        rules = {
            "0 < delta < 1": 0 < self.delta < 1,
            "slope_band around 1, above 0": 0 < low < 1 < high,
            "0 < alpha < 1": 0 < self.alpha < 1,
            "min_samples >= 1": self.min_samples >= 1,
            "min_errors >= 0": self.min_errors >= 0,
            "direction_z > 0": self.direction_z > 0,
            "0 <= high_gap <= critical_gap": 0 <= self.high_gap <= self.critical_gap,
            "0 < critical_slope <= high_slope <= 1": 0
            < self.critical_slope
            <= self.high_slope
            <= 1,
        }
        for rule, holds in rules.items():
            if not holds:
                raise InputError(
                    f"calibration policy: expected {rule}, got {self}; correct the policy"
                )


_DEFAULT = CalibrationPolicy()


def assess_classification(
    log_p: ArrayLike,
    labels: ArrayLike,
    *,
    evidence: Evidence,
    policy: CalibrationPolicy = _DEFAULT,
    seed: int = 0,
) -> Calibration:
    """Calibration of a classifier from log probabilities and labels.

    Rejects where the smallest of three p-values (slope, bins, class bias) is at most alpha/3.
    Equivalent where the 95 % upper bound on the calibration error is at most delta and the
    slope's 90 % interval lies in `slope_band`. K = 2 is tested on the probability of class 1,
    K > 2 on the top label; the gap and ECE are the top label's for every K.

    The direction is over where the slope's upper limit is below 1 or the gap's lower limit
    above 0, under likewise, mixed where both hold. With fewer wrong labels than `min_errors` it
    is none: the normal intervals do not hold for a handful of errors.

    Args:
        log_p: (n, K >= 2) log probabilities in float64, from log_softmax; -inf is allowed.
        labels: (n,) whole numbers 0..K-1.
        evidence: Where the probabilities come from. On training data calibration points the
            wrong way, so there the verdict is unknown and direction and severity are none; the
            numbers are filled all the same.
        policy: Thresholds.
        seed: For `ece_if_calibrated`.

    Returns:
        The filled `Calibration`; p-values are raw, one per test.

    Raises:
        InputError: Wrong shapes, NaN, rows that do not sum to 1, labels out of range.

    >>> rng = np.random.default_rng(0)
    >>> p = rng.dirichlet(np.ones(3), size=4000)
    >>> labels = (rng.random(4000)[:, None] > p.cumsum(axis=1)[:, :2]).sum(axis=1)
    >>> assess_classification(np.log(p), labels, evidence="heldout").verdict
    'calibrated'
    """
    _check_evidence(evidence)
    log_p, y = metrics.checked_probabilities(log_p, labels)
    p = np.exp(log_p)
    confidence, hit = metrics.top_label(p, y)
    event, happened = (p[:, 1], y == 1) if p.shape[1] == 2 else (confidence, hit)

    p_values = {
        "slope": tests.slope_score_test(log_p, y).p_value,
        "bins": tests.bin_test(event, happened).p_value,
        "bias": tests.class_bias_test(p, y).p_value,
    }
    slope = tests.fit_slope(log_p, y)
    gap = tests.confidence_gap(confidence, hit)
    bound = tests.calibration_error_bound(event, happened)
    equivalent = bound.upper <= policy.delta and _within(
        slope.interval(tests.Z95), policy.slope_band
    )

    n, n_errors = y.size, int(y.size - hit.sum())
    slope_ci, gap_ci = slope.interval(policy.direction_z), gap.interval(policy.direction_z)
    verdict, direction, severity = _conclude(
        p_values,
        equivalent,
        slope_ci,
        gap_ci,
        evidence=evidence,
        policy=policy,
        enough=n >= policy.min_samples and n_errors >= policy.min_errors,
        measurable=n_errors >= policy.min_errors,
    )
    errors = metrics.calibration_errors(confidence, hit)
    return Calibration(
        evidence=evidence,
        n=n,
        verdict=verdict,
        direction=direction,
        severity=severity,
        ece=errors.ece,
        ece_if_calibrated=metrics.ece_if_calibrated(confidence, seed=seed),
        mce=errors.mce,
        ace=errors.ace,
        mean_confidence=float(confidence.mean()),
        accuracy=float(hit.mean()),
        slope=_finite(slope.value),
        slope_ci=_finite_pair(slope_ci),
        confidence_gap=gap.value,
        confidence_gap_ci=_finite_pair(gap_ci),
        p_values=p_values,
    )


def assess_gaussian(
    z: ArrayLike,
    *,
    evidence: Evidence,
    policy: CalibrationPolicy = _DEFAULT,
    sigma_from_residuals: bool,
) -> Calibration:
    """Calibration of a Gaussian model from standardised residuals z = (y - mu)/sigma.

    The p-values are: slope, the dispersion score sum(z^2 - 1)/sqrt(2 n); bins, the chi-square
    test of the PIT Phi(z) on 10 bins; bias, the mean of z. Their smallest at most alpha/3 is the
    first step of Holm's procedure. The slope is 1/mean z^2, the factor on the log density that
    fits best, with its chi-square interval (see `tests.dispersion_dof`): below 1, mean z^2 above
    1, is over-confident.

    Equivalent where the slope's 90 % interval lies in `slope_band` (default: the variance right
    within -20 % and +25 %) and the 90 % interval of the mean of z within +-2 Phi^-1((1+delta)/2)
    (default: +-.125), the shift that moves no predicted probability by more than delta.
    The shape is no part of it: heavy-tailed residuals with the right mean and variance are
    rejected by their bins and within tolerance.

    Args:
        z: (n,) or (n, n_outputs); outputs count as independent, as the likelihood has it.
        evidence: As in `assess_classification`.
        policy: Thresholds; `min_errors` and the gap's do not apply.
        sigma_from_residuals: Whether sigma^2 is the mean squared training residual. Then
            mean z^2 = 1 on training data whatever the model, and no slope is given there. On
            leave-one-out residuals the dispersion still tells whether sigma fits new data.

    Returns:
        The `Calibration`; fields that need classes are None.

    Raises:
        InputError: Empty or non-finite z.
    """
    _check_evidence(evidence)
    z = metrics.checked_residuals(z)
    p_values = {
        "slope": tests.dispersion_test(z).p_value,
        "bins": tests.pit_test(tests.gaussian_pit(z)).p_value,
        "bias": tests.mean_bias_test(z, float(z.size)).p_value,
    }
    return _assess_dispersion(
        z,
        2.0 / z.size,
        p_values,
        slope_exists=not (sigma_from_residuals and evidence == "train"),
        evidence=evidence,
        policy=policy,
    )


def assess_poisson(
    y: ArrayLike,
    rate: ArrayLike,
    *,
    evidence: Evidence,
    policy: CalibrationPolicy = _DEFAULT,
    seed: int = 0,
) -> Calibration:
    """Calibration of a Poisson model from counts and predicted rates.

    The p-values are: slope, the dispersion score sum(((y - rate)^2 - y)/rate)/sqrt(2 n); bins,
    the chi-square test of the randomised PIT on 10 bins; bias, sum(y - rate)/sqrt(sum rate).
    Slope, direction and equivalence are those of `assess_gaussian` with the Pearson residual
    z = (y - rate)/sqrt(rate), whose square has variance 2 + 1/rate under the model: small rates
    widen the interval.

    Args:
        y: (n,) or (n, n_outputs) counts.
        rate: Predicted means > 0, same shape.
        evidence: As in `assess_classification`.
        policy: Thresholds; `min_errors` is held against the larger of the events counted and
            the events predicted.
        seed: For the randomised PIT.

    Returns:
        The `Calibration`; fields that need classes are None.

    Raises:
        InputError: Shapes that differ, counts that are not whole and >= 0, rates not > 0.
    """
    _check_evidence(evidence)
    counts, rate = metrics.checked_counts(y, rate)
    z = (counts - rate) / np.sqrt(rate)
    pit = tests.poisson_pit(counts, rate, seed=seed)
    p_values = {
        "slope": tests.poisson_dispersion_test(counts, rate).p_value,
        "bins": tests.pit_test(pit).p_value,
        "bias": tests.mean_bias_test(counts - rate, float(rate.sum())).p_value,
    }
    events = max(float(counts.sum()), float(rate.sum()))
    return _assess_dispersion(
        z,
        float((2.0 + 1.0 / rate).mean()) / z.size,
        p_values,
        enough_events=events >= policy.min_errors,
        evidence=evidence,
        policy=policy,
    )


# --- how a verdict is drawn ---


def _assess_dispersion(
    z: FloatArray,
    variance: float,
    p_values: dict[str, float],
    *,
    evidence: Evidence,
    policy: CalibrationPolicy,
    slope_exists: bool = True,
    enough_events: bool = True,
) -> Calibration:
    """Verdict for residuals z with slope 1/mean z^2; `variance`: of mean z^2 under the model."""
    square = (z * z).ravel()
    mean_square, dof = float(square.mean()), tests.dispersion_dof(square, variance)

    def slope_interval(quantile: float) -> tuple[float, float]:
        low, high = tests.dispersion_interval(mean_square, dof, quantile)
        return _reciprocal(high), _reciprocal(low)

    # sup |Phi(x + b) - Phi(x)| = 2 Phi(b/2) - 1 = delta, solved for b.
    tolerated_shift = 2.0 * float(special.ndtri(0.5 * (1.0 + policy.delta)))
    bias = tests.mean_with_error(z.ravel())
    equivalent = _within(slope_interval(tests.Z95), policy.slope_band) and _within(
        bias.interval(tests.Z95), (-tolerated_shift, tolerated_shift)
    )
    slope_ci = slope_interval(policy.direction_z)
    verdict, direction, severity = _conclude(
        p_values,
        equivalent,
        slope_ci,
        (-math.inf, math.inf),
        evidence=evidence,
        policy=policy,
        enough=z.shape[0] >= policy.min_samples and enough_events,
        measurable=enough_events,
    )
    return Calibration(
        evidence=evidence,
        n=z.shape[0],
        verdict=verdict,
        direction=direction,
        severity=severity,
        slope=_finite(_reciprocal(mean_square)) if slope_exists else None,
        slope_ci=_finite_pair(slope_ci) if slope_exists else None,
        p_values=p_values,
    )


def _conclude(
    p_values: dict[str, float],
    equivalent: bool,
    slope_ci: tuple[float, float],
    gap_ci: tuple[float, float],
    *,
    evidence: Evidence,
    policy: CalibrationPolicy,
    enough: bool,
    measurable: bool,
) -> tuple[Verdict, Direction, Severity]:
    """The table at the top of this module, and what it is called when data do not suffice."""
    if evidence == "train":
        return "unknown", "none", "none"
    direction = _direction(slope_ci, gap_ci) if measurable else "none"
    severity = _severity(direction, equivalent, slope_ci[1], gap_ci[0], policy)
    if not enough:
        return "insufficient", direction, severity
    reject = min(p_values.values()) <= policy.alpha / len(p_values)
    table: dict[tuple[bool, bool], Verdict] = {
        (True, False): "calibrated",
        (True, True): "within_tolerance",
        (False, False): "not_shown",
        (False, True): "miscalibrated",
    }
    return table[equivalent, reject], direction, severity


def _direction(slope_ci: tuple[float, float], gap_ci: tuple[float, float]) -> Direction:
    """Over, under, mixed or none, by whether either interval excludes its null."""
    over = slope_ci[1] < 1.0 or gap_ci[0] > 0.0
    under = slope_ci[0] > 1.0 or gap_ci[1] < 0.0
    if over and under:
        return "mixed"
    return "over" if over else "under" if under else "none"


def _severity(
    direction: Direction,
    equivalent: bool,
    slope_high: float,
    gap_low: float,
    policy: CalibrationPolicy,
) -> Severity:
    """How bad over-confidence is at the favourable end of its intervals."""
    if direction not in ("over", "mixed"):
        return "none"
    if gap_low > policy.critical_gap or slope_high < policy.critical_slope:
        return "critical"
    if gap_low > policy.high_gap or slope_high < policy.high_slope:
        return "high"
    return "info" if equivalent else "warn"


# --- input and output ---


def _check_evidence(evidence: str) -> None:
    """Refuses an unknown kind of evidence: a typo would pass training data off as held out."""
    if evidence not in get_args(Evidence):
        raise InputError(
            f"evidence: expected one of {', '.join(get_args(Evidence))}, got {evidence!r}; "
            "say where the probabilities come from"
        )


def _within(interval: tuple[float, float], band: tuple[float, float]) -> bool:
    return band[0] <= interval[0] and interval[1] <= band[1]


def _reciprocal(value: float) -> float:
    return 1.0 / value if value > 0.0 else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _finite_pair(pair: tuple[float, float]) -> tuple[float, float] | None:
    return pair if math.isfinite(pair[0]) and math.isfinite(pair[1]) else None
