"""The penalty that a scikit-learn estimator's own settings imply, in the MEAN-loss convention.

`PENALTIES` maps an estimator's class to a pure function of its settings and of n, the number of
samples it was fitted to. Each returns an `Objective`: D on weights and on intercepts in units of
the training loss, and how that loss was minimised. Squared errors are half the mean squared error
(loss 'half_mse'), so the Gaussian family divides by its dispersion s2. Every row is checked by the
penalised gradient vanishing at the fitted optimum (tests/models/test_sklearn.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flataudit.errors import InputError
from flataudit.training import TrainingRecord

CONVERGED = TrainingRecord("converged", loss="nll")
LEAST_SQUARES = TrainingRecord("converged", loss="half_mse")
MINIMUM_RATE = 1e-6  # scikit-learn's own end of learning_rate='adaptive'


@dataclass(frozen=True, slots=True)
class Objective:
    """Training loss = record.loss + (weight |weights|^2 + bias |intercepts|^2)/2."""

    weight: float
    bias: float
    record: TrainingRecord


def logistic_regression(estimator: Any, n: int) -> Objective:
    """C sum_i l_i + |w|^2/2, so D = 1/(C n); liblinear has the intercept as one more weight."""
    _refuse_class_weight(estimator)
    _refuse_l1(estimator)
    unpenalised = getattr(estimator, "penalty", "l2") in (None, "none")
    weight = 0.0 if unpenalised else 1.0 / (_scalar(estimator, "C") * n)
    penalised_bias = estimator.solver == "liblinear"
    bias = weight / float(estimator.intercept_scaling) ** 2 if penalised_bias else 0.0
    return Objective(weight, bias, CONVERGED)


def logistic_regression_cv(estimator: Any, n: int) -> Objective:
    """As LogisticRegression with the C that the folds chose, refitted to all n samples."""
    _refuse_class_weight(estimator)
    if not estimator.refit:
        raise InputError(
            "expected LogisticRegressionCV with refit=True, got refit=False: averages over folds"
            " are at no minimum of one loss; refit it"
        )
    _refuse_l1(estimator)
    if np.any([ratio or 0.0 for ratio in np.atleast_1d(getattr(estimator, "l1_ratio_", 0.0))]):
        raise _l1(estimator)
    chosen = np.unique(estimator.C_)  # one per class, all the same for a softmax
    if len(chosen) > 1:
        raise InputError(
            f"expected one C for all classes of LogisticRegressionCV, got {len(chosen)}; audit a"
            " LogisticRegression refitted with one"
        )
    weight = 1.0 / (float(chosen[0]) * n)
    # The refit does not pass intercept_scaling on: 1 there, whatever the estimator says.
    return Objective(weight, weight if estimator.solver == "liblinear" else 0.0, CONVERGED)


def sgd_classifier(estimator: Any, n: int) -> Objective:
    """Mean l_i + alpha |w|^2/2."""
    _refuse_class_weight(estimator)
    _refuse_l1(estimator)
    weight = 0.0 if estimator.penalty is None else _scalar(estimator, "alpha")
    return Objective(weight, 0.0, CONVERGED)


def ridge(estimator: Any, n: int) -> Objective:
    """sum_i |y_i - f_i|^2 + alpha |w|^2, so D = alpha/n beside half the mean squared error."""
    _refuse_positive(estimator)
    return Objective(_scalar(estimator, "alpha") / n, 0.0, LEAST_SQUARES)


def ridge_cv(estimator: Any, n: int) -> Objective:
    """As Ridge with the alpha that was chosen, refitted to all n samples."""
    return Objective(_scalar(estimator, "alpha_") / n, 0.0, LEAST_SQUARES)


def linear_regression(estimator: Any, n: int) -> Objective:
    """Least squares: no penalty."""
    _refuse_positive(estimator)
    return Objective(0.0, 0.0, LEAST_SQUARES)


def poisson_regressor(estimator: Any, n: int) -> Objective:
    """Half the mean deviance + alpha |w|^2/2; half the deviance is the NLL up to a constant."""
    return Objective(_scalar(estimator, "alpha"), 0.0, CONVERGED)


def mlp(estimator: Any, n: int) -> Objective:
    """Mean l_i + alpha |w|^2/(2 batch), biases free; for lbfgs the batch is all n samples.

    sgd and adam: alpha times the mean over steps of 1/batch, and a training record. With early
    stopping n is without the validation split, and the epochs end at the weights restored.
    """
    alpha = _scalar(estimator, "alpha")
    squared = getattr(estimator, "loss", "log_loss") == "squared_error"
    if estimator.solver == "lbfgs":
        return Objective(alpha / n, 0.0, LEAST_SQUARES if squared else CONVERGED)
    n_train = n
    if estimator.early_stopping:
        n_train -= math.ceil(estimator.validation_fraction * n)
    automatic = estimator.batch_size == "auto"
    batch = max(1, min(200 if automatic else int(estimator.batch_size), n_train))
    sizes = [min(batch, n_train - start) for start in range(0, n_train, batch)]
    weight = alpha * float(np.mean([1.0 / size for size in sizes]))
    rates = _rates(estimator, n_train)
    record = TrainingRecord(
        estimator.solver,
        sum_lr=len(sizes) * sum(rates),
        steps=len(sizes) * len(rates),
        momentum=float(estimator.momentum) if estimator.solver == "sgd" else 0.0,
        batch_size=batch,
        weight_decay=weight,
        loss="half_mse" if squared else "nll",
        assumptions=_assumptions(estimator, n, n_train),
    )
    if not rates or record.total_lr <= 0:
        raise InputError(
            f"expected a trained {type(estimator).__name__}, got one whose learning rates sum to 0;"
            " fit it for at least one epoch"
        )
    return Objective(weight, 0.0, record)


PENALTIES: dict[str, Callable[[Any, int], Objective]] = {
    "LogisticRegression": logistic_regression,
    "LogisticRegressionCV": logistic_regression_cv,
    "SGDClassifier": sgd_classifier,
    "Ridge": ridge,
    "RidgeCV": ridge_cv,
    "LinearRegression": linear_regression,
    "PoissonRegressor": poisson_regressor,
    "MLPClassifier": mlp,
    "MLPRegressor": mlp,
}


# --- a stochastic MLP's learning rates ----------------------------------------------------------


def _rates(mlp: Any, n_train: int) -> list[float]:
    """The learning rate of each epoch whose steps the final weights hold."""
    epochs = max(int(mlp.n_iter_), round(int(mlp.t_) / n_train))
    rate = float(mlp.learning_rate_init)
    if mlp.solver == "adam" or mlp.learning_rate == "constant":
        rates = [rate] * epochs
    elif mlp.learning_rate == "invscaling":
        seen = [epoch * n_train for epoch in range(epochs)]
        rates = [rate / (t + 1) ** float(mlp.power_t) if t else rate for t in seen]
    else:
        rates = _adaptive_rates(mlp, epochs, rate)
    if mlp.early_stopping:
        rates = rates[: int(np.argmax(mlp.validation_scores_)) + 1]
    return rates


def _adaptive_rates(mlp: Any, epochs: int, rate: float) -> list[float]:
    """A fifth of the rate whenever n_iter_no_change epochs in a row did not improve by tol."""
    curve = [-s for s in mlp.validation_scores_] if mlp.early_stopping else list(mlp.loss_curve_)
    best, waited, rates = math.inf, 0, []
    for loss in curve[:epochs]:
        rates.append(rate)
        waited = waited + 1 if loss > best - mlp.tol else 0
        best = min(best, loss)
        if waited > mlp.n_iter_no_change and rate > MINIMUM_RATE:
            rate, waited = rate / 5.0, 0
    return rates


def _assumptions(mlp: Any, n: int, n_train: int) -> tuple[str, ...]:
    found = []
    if n_train < n:
        found.append(
            f"early stopping held out {n - n_train} of the {n} samples, which count as training"
            " data here"
        )
    if int(mlp.t_) != int(mlp.n_iter_) * n_train:
        found.append(
            f"the estimator saw {int(mlp.t_)} samples, not {int(mlp.n_iter_)} epochs of {n_train}:"
            " fitted in several calls or to other data; its steps are counted as epochs of these"
        )
    return tuple(found)


# --- refusals -----------------------------------------------------------------------------------


def _refuse_class_weight(estimator: Any) -> None:
    if getattr(estimator, "class_weight", None) is not None:
        raise InputError(
            f"expected an unweighted loss, got {type(estimator).__name__} with class_weight="
            f"{estimator.class_weight!r}; its minimum is not that of the mean loss: refit without"
        )


def _refuse_l1(estimator: Any) -> None:
    kind = getattr(estimator, "penalty", "l2")
    ratio = getattr(estimator, "l1_ratio", None) or 0.0
    if kind == "l1" or (kind in ("elasticnet", "deprecated") and ratio > 0.0):
        raise _l1(estimator)


def _l1(estimator: Any) -> InputError:
    return InputError(
        f"expected an l2 penalty, got {type(estimator).__name__} with an l1 part; it has no"
        " curvature and sets weights to exactly 0, so no D exists: refit with l2"
    )


def _refuse_positive(estimator: Any) -> None:
    if getattr(estimator, "positive", False):
        raise InputError(
            f"expected free coefficients, got {type(estimator).__name__} with positive=True; a"
            " constrained minimum has a gradient: refit without"
        )


def _scalar(estimator: Any, name: str) -> float:
    value = getattr(estimator, name)
    if np.ndim(value) > 0:
        raise InputError(
            f"expected one number as {name} of {type(estimator).__name__}, got {np.size(value)};"
            " audit one target at a time"
        )
    return float(value)
