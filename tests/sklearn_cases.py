"""Small scikit-learn fits, each with the penalty that it must have."""

import copy
import warnings
from functools import cache

import numpy as np
import pytest
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeCV,
    SGDClassifier,
)
from sklearn.neural_network import MLPClassifier, MLPRegressor

import flataudit
from flataudit.errors import InputError

N = 120
RNG = np.random.default_rng(5)
X = RNG.normal(size=(N, 4))
W = RNG.normal(size=(4, 3))
THREE = (X @ W + RNG.gumbel(size=(N, 3))).argmax(axis=1)
TWO = (THREE == 0).astype(int)
REAL = X @ W[:, 0] + RNG.normal(size=N)
PAIR = np.stack([REAL, X[:, 1] - REAL + RNG.normal(size=N)], axis=1)
COUNTS = RNG.poisson(np.exp(0.4 * X[:, 0] - 0.3))
X_HELD = RNG.normal(size=(40, 4))

TIGHT = {"tol": 1e-12, "max_iter": 10_000}
CV = {"l1_ratios": (0.0,), "use_legacy_attributes": False, "scoring": "neg_log_loss", "cv": 3}
LBFGS = {"solver": "lbfgs", "tol": 1e-15, "max_iter": 20_000, "max_fun": 10**6, "random_state": 0}
SMALL = {"hidden_layer_sizes": (4,), "alpha": 1.5}

# name: estimator, target, family, D by the mean loss (squared errors: times the dispersion s2) on
# weights and on intercepts, and the tolerance |grad J| / |grad NLL| that its optimizer reaches.
SOLVERS = {
    f"logistic_{solver}_{kind}": (
        LogisticRegression(C=0.3, solver=solver, random_state=0, **TIGHT),
        y,
        family,
        1 / (0.3 * N),
        0,
        1e-5,
    )
    for solver in ("lbfgs", "newton-cg", "newton-cholesky", "sag", "saga")
    for kind, y, family in (("softmax", THREE, "categorical"), ("binary", TWO, "bernoulli"))
}
CASES = {
    **SOLVERS,
    "logistic_cv": (
        LogisticRegressionCV(Cs=[0.02], solver="newton-cholesky", **CV, **TIGHT),
        THREE,
        "categorical",
        1 / (0.02 * N),
        0,
        1e-8,
    ),
    "logistic_cv_liblinear": (
        LogisticRegressionCV(Cs=[0.2], solver="liblinear", intercept_scaling=2.0, **CV, **TIGHT),
        TWO,
        "bernoulli",
        1 / (0.2 * N),
        1 / (0.2 * N),
        1e-5,
    ),
    "logistic_free": (
        LogisticRegression(C=np.inf, fit_intercept=False, **TIGHT),
        TWO,
        "bernoulli",
        0,
        0,
        None,
    ),
    "liblinear": (
        LogisticRegression(C=0.2, solver="liblinear", intercept_scaling=2.0, **TIGHT),
        TWO,
        "bernoulli",
        1 / (0.2 * N),
        1 / (0.2 * N * 4.0),
        1e-5,
    ),
    "sgd": (
        SGDClassifier(loss="log_loss", alpha=0.1, tol=None, max_iter=3000, random_state=0),
        TWO,
        "bernoulli",
        0.1,
        0,
        2e-3,
    ),
    "ridge": (Ridge(alpha=7.0), REAL, "gaussian", 7.0 / N, 0, 1e-10),
    "ridge_two_outputs": (Ridge(alpha=7.0), PAIR, "gaussian", 7.0 / N, 0, 1e-10),
    "ridge_cv": (RidgeCV(alphas=[7.0]), REAL, "gaussian", 7.0 / N, 0, 1e-10),
    "least_squares": (LinearRegression(), REAL, "gaussian", 0, 0, None),
    "least_squares_origin": (LinearRegression(fit_intercept=False), PAIR, "gaussian", 0, 0, None),
    "poisson": (PoissonRegressor(alpha=0.2, **TIGHT), COUNTS, "poisson", 0.2, 0, 1e-5),
    "mlp": (
        MLPClassifier(activation="tanh", **SMALL, **LBFGS),
        THREE,
        "categorical",
        1.5 / N,
        0,
        5e-3,
    ),
    "mlp_binary": (
        MLPClassifier((3,), activation="logistic", alpha=0.1, **LBFGS),
        TWO,
        "bernoulli",
        0.1 / N,
        0,
        5e-3,
    ),
    "mlp_identity": (
        MLPClassifier(activation="identity", **SMALL, **LBFGS),
        THREE,
        "categorical",
        1.5 / N,
        0,
        5e-3,
    ),
    "mlp_regressor": (
        MLPRegressor(activation="tanh", **SMALL, **LBFGS),
        REAL,
        "gaussian",
        1.5 / N,
        0,
        5e-3,
    ),
    "mlp_counts": (
        MLPRegressor(loss="poisson", activation="tanh", **SMALL, **LBFGS),
        COUNTS,
        "poisson",
        1.5 / N,
        0,
        5e-3,
    ),
}


@cache
def fitted(name):
    estimator, y, *_ = CASES[name]
    return copy.deepcopy(estimator).fit(X, y)


def stopped(estimator, x, y):
    """Fitted for the epochs it was given, which need not be enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(x, y)


def message(call):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("expected")
    return text


def refused(estimator, x=X, y=THREE):
    return message(lambda: flataudit.audit(estimator, (x, y)))
