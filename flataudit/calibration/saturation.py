"""Whether the gradients have vanished: saturation, seen on training data alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flataudit.calibration import metrics

# Training data alone: any two of these and the gradients have vanished.
_ACCURACY = 0.995
_NLL = 0.05  # nats per example
_CURVATURE = 0.02  # mean of 1 - sum_k p_k^2, the trace of diag(p) - pp'
_RESIDUAL = 0.01  # a residual 1 - p_y above this still moves the parameters
_RESIDUAL_SHARE = 0.05
_TRACE_RATIO = (0.3, 3.0)
_SLOPE = 1.5


def saturation_flags(
    *,
    accuracy: float,
    nll: float,
    log_p: ArrayLike,
    labels: ArrayLike,
    trace_ratio: float | None,
    slope: float | None,
) -> tuple[str, ...]:
    """Signs, from training data alone, that the gradients have vanished.

    Args:
        accuracy: Training accuracy; flag `accuracy` from .995.
        nll: Mean training NLL, nats per example; flag `nll` below .05.
        log_p: (n, K) log probabilities; flag `curvature` if mean(1 - sum_k p_k^2) < .02.
        labels: (n,); flag `residuals` if fewer than 5 % of samples have 1 - p_y > .01.
        trace_ratio: tr C / tr G, gradient covariance over ggn; flag `trace_ratio` outside
            [.3, 3], or where both have vanished and it is NaN. None: not computed.
        slope: Fitted slope; flag `slope` above 1.5. None: no finite slope fits, which with
            every label right means that any larger one fits better.

    Returns:
        Names of the flags raised, in the order above.

    Raises:
        InputError: As in `assess_classification`.
    """
    log_p, y = metrics.checked_probabilities(log_p, labels)
    p = np.exp(log_p)
    moving = 1.0 - np.take_along_axis(p, y[:, None], axis=1) > _RESIDUAL
    low, high = _TRACE_RATIO
    flags = {
        "accuracy": accuracy >= _ACCURACY,
        "nll": nll < _NLL,
        "curvature": float((1.0 - (p * p).sum(axis=1)).mean()) < _CURVATURE,
        "residuals": float(moving.mean()) < _RESIDUAL_SHARE,
        # Negated, so that NaN raises the flag.
        "trace_ratio": trace_ratio is not None and not low <= trace_ratio <= high,
        "slope": accuracy == 1.0 if slope is None else slope > _SLOPE,
    }
    return tuple(name for name, raised in flags.items() if raised)


def is_saturated(flags: tuple[str, ...]) -> bool:
    """Whether at least two saturation flags were raised.

    >>> is_saturated(("accuracy",)), is_saturated(("accuracy", "nll"))
    (False, True)
    """
    return len(flags) >= 2
