"""Calibration looked at again and again: an e-process over the labels that come in after an audit.

A test at 5 % that is repeated each month rejects a calibrated model sooner or later. An e-process
may be looked at as often as one likes. With p the model and, for a slope a > 0, its tempered model

    p_a(y | x) = p(y | x)^a / sum_y' p(y' | x)^a,
    E = mean over slopes a of prod_i p_a(y_i | x_i) / p(y_i | x_i),

each factor has expectation 1 under p, given everything before it, so that E is a nonnegative
martingale that starts at 1 and by Ville's inequality reaches 20 at any time with a probability of
at most 1/20 if the model is calibrated, over all audits together. E grows without bound where some
p_a describes the labels better; the nearest slopes are .95 and 1.05, so that true slopes from about
.975 to 1.025 are let pass for ever.

What a slope means: for the categorical and the Bernoulli family the logits are multiplied by a
(temperature 1/a); for the Gaussian the variance is divided by a; for Poisson counts p_a is the
Conway-Maxwell-Poisson distribution, whose variance is about the rate over a. A slope below 1 is
over-confident for each of them, as in `Calibration.slope`.

Sources: Ville, Etude critique de la notion de collectif, 1939; Ramdas et al., Game-theoretic
statistics and safe anytime-valid inference, arXiv:2210.01948. Asymptotic Poisson normaliser: Gaunt
et al., arXiv:1612.06618.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from flataudit.calibration.metrics import (
    FloatArray,
    checked_counts,
    checked_probabilities,
    checked_residuals,
)
from flataudit.errors import InputError

SLOPES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2.0)
THRESHOLD = 20.0  # E from here on is an alarm: at most 1 in 20 false alarms, ever
RATE_LIMIT = 1e7  # Poisson rates above: log p has no digits left that could be summed

_Z_LIMIT = 1e50  # residuals beyond: their squares would overflow
_EXACT_RATE = 150.0  # the normaliser is a sum up to here and an asymptotic series above


@dataclass(frozen=True, slots=True)
class EProcess:
    """The state: running log likelihood ratios by slope, in nats.

    Attributes:
        log_ratios: sum_i log p_a(y_i)/p(y_i) for each of `SLOPES`.
        n: Labels counted.
        looks: How often labels were added.
        log_e_max: The largest log E at any look; an alarm stays one.

    >>> EProcess().log_e, EProcess().alarm
    (0.0, False)
    """

    log_ratios: tuple[float, ...] = (0.0,) * len(SLOPES)
    n: int = 0
    looks: int = 0
    log_e_max: float = 0.0

    @property
    def log_e(self) -> float:
        """log E = log mean_a exp(log ratio of a), nats."""
        return float(special.logsumexp(self.log_ratios)) - math.log(len(SLOPES))

    @property
    def alarm(self) -> bool:
        """Whether E has been at `THRESHOLD` or above at any look."""
        return self.log_e_max >= math.log(THRESHOLD)

    @property
    def slope(self) -> float | None:
        """The slope that describes all labels best; None before the first."""
        return SLOPES[int(np.argmax(self.log_ratios))] if self.n else None

    def extended(self, ratios: FloatArray) -> EProcess:
        """The state after one more look.

        Args:
            ratios: log p_a(y_i)/p(y_i) of labels that were not counted before, shape (m,
                len(SLOPES)), nats. Which labels are taken must not depend on the labels.

        Returns:
            The new state; the same one where there are none.
        """
        if ratios.ndim != 2 or ratios.shape[1] != len(SLOPES) or not np.isfinite(ratios).all():
            raise InputError(
                f"expected finite log ratios of shape (m, {len(SLOPES)}), got {ratios.shape};"
                " make them with the functions of this module"
            )
        if not len(ratios):
            return self
        sums = np.asarray(self.log_ratios) + ratios.sum(axis=0)
        found = EProcess(
            tuple(map(float, sums)), self.n + len(ratios), self.looks + 1, self.log_e_max
        )
        return EProcess(found.log_ratios, found.n, found.looks, max(self.log_e_max, found.log_e))

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with what follows from the state; `from_dict` reads it back."""
        return {
            "n": self.n,
            "looks": self.looks,
            "log_e": self.log_e,
            "log_e_max": self.log_e_max,
            "threshold": THRESHOLD,
            "alarm": self.alarm,
            "slope": self.slope,
            "slopes": list(SLOPES),
            "log_ratios": list(self.log_ratios),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> EProcess:
        """The state that `to_dict` wrote.

        Raises:
            InputError: of other slopes, or not a state.
        """
        try:
            if tuple(found["slopes"]) != SLOPES:
                raise ValueError(f"slopes {found['slopes']}")
            sums = tuple(map(float, found["log_ratios"]))
            highest = float(found["log_e_max"])
            if len(sums) != len(SLOPES) or not all(map(math.isfinite, (*sums, highest))):
                raise ValueError(f"log ratios {found['log_ratios']}")
            return cls(sums, int(found["n"]), int(found["looks"]), highest)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"expected the state of an e-process with slopes {SLOPES}, got"
                f" {type(error).__name__}: {error}; it is of another version or damaged"
            ) from None


def label_ratios(log_p: ArrayLike, labels: ArrayLike) -> FloatArray:
    """log p_a(y_i)/p(y_i) of class labels, (n, len(SLOPES)), nats.

    Args:
        log_p: (n, K >= 2) log probabilities; for a Bernoulli model log(1 - p), log p.
        labels: (n,) classes 0..K-1.

    Raises:
        InputError: as `metrics.checked_probabilities`.

    >>> p = np.array([0.2, 0.8])
    >>> ratios = label_ratios(np.log([p, p]), [0, 1])
    >>> [round(float(p @ np.exp(r)), 12) for r in ratios.T[:2]]  # each has expectation 1
    [1.0, 1.0]
    """
    table, y = checked_probabilities(log_p, labels)
    own = table[np.arange(len(y)), y]
    found = np.empty((len(y), len(SLOPES)))
    for at, a in enumerate(SLOPES):
        found[:, at] = (a - 1.0) * own - special.logsumexp(a * table, axis=1)
    return found


def residual_ratios(z: ArrayLike) -> FloatArray:
    """log p_a(y_i)/p(y_i) of Gaussian targets, (n, len(SLOPES)), nats: the variance over a.

    Args:
        z: Standardised residuals (y - mu)/sigma, (n,) or (n, n_outputs). Where sigma was
            estimated it must be from training data alone.

    Raises:
        InputError: residuals that are not finite.
    """
    table = checked_residuals(z)
    table = np.clip(table.reshape(len(table), -1), -_Z_LIMIT, _Z_LIMIT)
    square, k = (table * table).sum(axis=1), table.shape[1]
    a = np.asarray(SLOPES)
    return np.asarray(0.5 * k * np.log(a) - 0.5 * (a - 1.0) * square[:, None])


def count_ratios(y: ArrayLike, rate: ArrayLike) -> FloatArray | None:
    """log p_a(y_i)/p(y_i) of counts, (n, len(SLOPES)), nats.

    Args:
        y: Counts, (n,) or (n, n_outputs).
        rate: The Poisson rates, of the same shape.

    Returns:
        None where a rate is above `RATE_LIMIT`.

    Raises:
        InputError: as `metrics.checked_counts`.
    """
    counts, rates = checked_counts(y, rate)
    if rates.max() > RATE_LIMIT:
        return None
    counts, rates = counts.reshape(len(counts), -1), rates.reshape(len(rates), -1)
    own = special.xlogy(counts, rates) - rates - special.gammaln(counts + 1.0)
    distinct, where = np.unique(rates, return_inverse=True)
    where = where.reshape(rates.shape)
    found = np.empty((len(counts), len(SLOPES)))
    for at, a in enumerate(SLOPES):
        normaliser = _log_poisson_power_sum(distinct, a)[where]
        found[:, at] = ((a - 1.0) * own - normaliser).sum(axis=1)
    return found


def _log_poisson_power_sum(rate: FloatArray, a: float) -> FloatArray:
    """log sum_k Poisson(k; rate)^a for rates (m,): a sum for small rates, else a series in 1/rate.

    The series is the Conway-Maxwell-Poisson normaliser's with its first three terms; at
    `_EXACT_RATE` its error is below 2e-9 for every slope.
    """
    small = rate <= _EXACT_RATE
    found = np.empty_like(rate)
    m = rate[~small]
    if m.size:
        s = a * a - 1.0
        u = 1.0 / (a * m)
        series = u * s / 24.0 + u**2 * s / 1152.0 * (s + 24.0)
        series += u**3 * s / 414720.0 * (5.0 * a**4 - 298.0 * a**2 + 11237.0)
        found[~small] = (
            0.5 * (1.0 - a) * np.log(2.0 * np.pi * m) - 0.5 * np.log(a) + np.log1p(series)
        )
    m = rate[small]
    if m.size:
        # At rate 150 and a = .5 what is left out is below 1e-60 of the sum.
        k = np.arange(0.0, 700.0)
        for start in range(0, m.size, 4096):
            part = m[start : start + 4096, None]
            log_p = special.xlogy(k, part) - part - special.gammaln(k + 1.0)
            found[np.flatnonzero(small)[start : start + 4096]] = special.logsumexp(
                a * log_p, axis=1
            )
    return found
