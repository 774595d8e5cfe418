"""Is the audited model calibrated: on which probabilities it is judged, and what follows.

Held-out data come first, then the audit's own leave-one-out outputs; training probabilities point
the wrong way, so on them alone the verdict is unknown and they only feed the saturation flags.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flataudit.calibration import (
    assess_classification,
    assess_gaussian,
    assess_poisson,
    saturation_flags,
)
from flataudit.calibration.eprocess import count_ratios, label_ratios, residual_ratios
from flataudit.estimates import LeaveOneOut, mean_and_se
from flataudit.families import Family, log_probabilities
from flataudit.fitting import PenalisedFit
from flataudit.results import Calibration, Evidence, Interval, Premise, Shift
from flataudit.solvers import FunctionalVariance

RATE_LIMIT = 1e30  # Poisson rates are judged within 1/RATE_LIMIT .. RATE_LIMIT: squares stay finite
SCALE_LIMIT = 1e3  # logits are recalibrated by a factor within 1/SCALE_LIMIT .. SCALE_LIMIT


@dataclass(frozen=True, slots=True, eq=False)
class Unseen:
    """Held-out outputs f (m, K) and checked targets, on the audit's device.

    shift: how the inputs compare with those of training; keys: of the inputs, by which they are
    known again.
    """

    outputs: Tensor
    y: Tensor
    shift: Shift | None = None
    keys: NDArray[np.uint64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The calibration and what it was read from.

    outputs, y: those that were judged; train_accuracy, loo_accuracy, loo_confidence: None for
    regression (and for LOO where there is none).
    """

    calibration: Calibration
    outputs: Tensor
    y: Tensor
    train_accuracy: float | None
    loo_accuracy: float | None
    loo_confidence: float | None


def judge_calibration(
    fit: PenalisedFit, left_out: LeaveOneOut | None, unseen: Unseen | None, *, seed: int = 0
) -> Judged:
    """The calibration verdict on held-out, else leave-one-out, else training outputs."""
    problem, family = fit.problem, fit.problem.family
    evidence: Evidence
    if unseen is not None:
        evidence, outputs, y = "heldout", unseen.outputs, unseen.y
    elif left_out is not None:
        evidence, outputs, y = "loo", left_out.outputs, problem.y
    else:
        evidence, outputs, y = "train", problem.outputs, problem.y
    calibration = _assess(fit, outputs, y, evidence, seed)
    train = log_probabilities(family, problem.outputs)
    if train is None:
        return Judged(calibration, outputs, y, None, None, None)
    labels = class_labels(problem.y)
    accuracy = hit_rate(train, labels)
    on_train = _assess(fit, problem.outputs, problem.y, "train", seed)
    trace_ggn = fit.variance.trace_ggn
    flags = saturation_flags(
        accuracy=accuracy,
        nll=float(family.nll(problem.outputs, problem.y).mean()),
        log_p=to_numpy(train),
        labels=to_numpy(labels),
        trace_ratio=fit.moments.trace / trace_ggn if trace_ggn > 0 else None,
        slope=on_train.slope,
    )
    calibration = dataclasses.replace(calibration, saturation=flags)
    if left_out is None:
        return Judged(calibration, outputs, y, accuracy, None, None)
    log_p = log_probabilities(family, left_out.outputs)
    assert log_p is not None
    confidence = float(log_p.exp().amax(dim=1).mean())
    return Judged(calibration, outputs, y, accuracy, hit_rate(log_p, labels), confidence)


def likelihood_ratios(
    family: Family, outputs: Tensor, y: Tensor, dispersion: float | None
) -> NDArray[np.float64] | None:
    """log p_a(y_i)/p(y_i) of labels y at `outputs` for the slopes a of the e-process, (m, slopes).

    None where the family's numbers are beyond it (`flataudit.calibration.eprocess`).
    """
    log_p = log_probabilities(family, outputs)
    if log_p is not None:
        return label_ratios(to_numpy(log_p), to_numpy(class_labels(y)))
    if family.name == "gaussian":
        assert dispersion is not None
        return residual_ratios(to_numpy((y - outputs) / math.sqrt(dispersion)))
    rate = to_numpy(outputs.exp().clamp(1 / RATE_LIMIT, RATE_LIMIT))
    return count_ratios(to_numpy(y).reshape(rate.shape), rate)


def premise_test(fit: PenalisedFit, left_out: LeaveOneOut | None) -> Premise | None:
    """Information-matrix equality: E[r'Ar] = E[h] under the soft rank's premise.

    ratio = sum r_i'A_i r_i / sum h_i with leave-one-out residuals mu(f^(-i)) - y, z on the paired
    differences; on training residuals where there is no LOO (biased low). None without Q_i.
    """
    if not isinstance(fit.variance, FunctionalVariance):
        return None
    problem, family, q = fit.problem, fit.problem.family, fit.variance.q
    evidence: Evidence = "train" if left_out is None else "loo"
    outputs = problem.outputs if left_out is None else left_out.outputs
    r = family.residual(outputs, problem.y)
    v = family.whiten(problem.outputs, problem.y, r)
    energy = torch.einsum("ni,nij,nj->n", v, q, v)
    leverage = q.diagonal(dim1=1, dim2=2).sum(dim=1)
    mean, se = mean_and_se(energy - leverage)
    total = float(leverage.sum())
    if not (total > 0 and se > 0 and math.isfinite(mean) and math.isfinite(se)):
        return None
    return Premise(float(energy.sum()) / total, mean / se, evidence)


def recalibration_scale(family: Family, f: Tensor, accuracy: float) -> float | None:
    """The factor s on the logits at which the mean training confidence equals `accuracy`.

    Bisection: the mean top-label probability rises with s. None for regression, where the
    accuracy is undefined; clipped to within SCALE_LIMIT.
    """
    if log_probabilities(family, f) is None:
        return None
    low, high = -math.log(SCALE_LIMIT), math.log(SCALE_LIMIT)
    for _ in range(60):
        middle = (low + high) / 2
        log_p = log_probabilities(family, f * math.exp(middle))
        assert log_p is not None
        if float(log_p.exp().amax(dim=1).mean()) < accuracy:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def predicted_accuracy(judged: Judged, z: float) -> Interval | None:
    """Accuracy on unseen data from the judged outputs, +- z binomial standard errors.

    None for regression and where only training outputs were there to judge.
    """
    calibration = judged.calibration
    if calibration.accuracy is None or calibration.evidence == "train":
        return None
    accuracy = calibration.accuracy
    half = z * math.sqrt(accuracy * (1.0 - accuracy) / calibration.n)
    return Interval(accuracy, max(0.0, accuracy - half), min(1.0, accuracy + half))


def class_labels(y: Tensor) -> Tensor:
    """Class indices (n,) from the family's targets: Bernoulli keeps them as floats (n, 1)."""
    return y.reshape(-1).to(torch.int64)


def hit_rate(log_p: Tensor, labels: Tensor) -> float:
    """Share of samples whose top label is right."""
    return float((log_p.argmax(dim=1) == labels).double().mean())


def standardised(fit: PenalisedFit, outputs: Tensor, y: Tensor) -> NDArray[np.float64]:
    """Gaussian residuals (y - mu)/sigma, flattened over outputs."""
    assert fit.dispersion is not None
    return to_numpy((y - outputs).reshape(-1) / math.sqrt(fit.dispersion.value))


def to_numpy(t: Tensor) -> NDArray[np.float64]:
    """A CPU numpy array."""
    return t.detach().cpu().numpy()


def _assess(
    fit: PenalisedFit, outputs: Tensor, y: Tensor, evidence: Evidence, seed: int
) -> Calibration:
    family = fit.problem.family
    log_p = log_probabilities(family, outputs)
    if log_p is not None:
        labels = to_numpy(class_labels(y))
        return assess_classification(to_numpy(log_p), labels, evidence=evidence, seed=seed)
    if fit.dispersion is not None:
        return assess_gaussian(
            standardised(fit, outputs, y),
            evidence=evidence,
            sigma_from_residuals=fit.dispersion.source == "residuals",
        )
    rate = to_numpy(outputs.exp().clamp(1 / RATE_LIMIT, RATE_LIMIT).reshape(-1))
    return assess_poisson(to_numpy(y.reshape(-1)), rate, evidence=evidence, seed=seed)
