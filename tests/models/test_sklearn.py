"""Twins of scikit-learn estimators: predictions, the penalty their settings imply, refusals."""

import copy
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.feature_selection import SelectFromModel
from sklearn.gaussian_process import GaussianProcessClassifier
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    BayesianRidge,
    ElasticNet,
    GammaRegressor,
    Lasso,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    PoissonRegressor,
    Ridge,
    RidgeClassifier,
    RidgeCV,
    SGDClassifier,
    SGDRegressor,
    TweedieRegressor,
)
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler
from sklearn.svm import SVC, LinearSVC
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.discovery import all_estimators

import flataudit
from flataudit.models.flavors import refused as refused_by_name
from flataudit.models.sklearn import as_network, make_twin
from flataudit.models.sklearn_penalty import PENALTIES
from tests.sklearn_cases import (
    CASES,
    CV,
    PAIR,
    REAL,
    RNG,
    THREE,
    TIGHT,
    TWO,
    X_HELD,
    N,
    X,
    fitted,
    message,
    refused,
    stopped,
)
from tests.test_properties import audited


def own_predictions(estimator, x):
    classifies = hasattr(estimator, "classes_")
    return estimator.predict_proba(x) if classifies else estimator.predict(x)


def twin_predictions(twin, family, x):
    with torch.no_grad():
        f = twin(torch.from_numpy(x))
    if family == "bernoulli":
        p = torch.sigmoid(f)
        f = torch.cat([1 - p, p], dim=1)
    elif family == "categorical":
        f = torch.softmax(f, dim=1)
    elif family == "poisson":
        f = f.exp()
    return f.numpy()


# --- predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_predictions_are_equal(name):
    estimator, family = fitted(name), CASES[name][2]
    found = twin_predictions(make_twin(estimator), family, X_HELD)
    wanted = own_predictions(estimator, X_HELD).reshape(found.shape)
    np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    assert as_network(estimator, (X, CASES[name][1]), None, "auto").family == family


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
@pytest.mark.parametrize("hidden", [(), (5,), (4, 3)])
def test_perceptrons_of_every_activation_and_depth(activation, hidden):
    options = {
        "hidden_layer_sizes": hidden,
        "activation": activation,
        "max_iter": 3,
        "random_state": 1,
    }
    classifier = stopped(MLPClassifier(**options), X, THREE)
    regressor = stopped(MLPRegressor(**options), X, PAIR)
    for estimator, family in ((classifier, "categorical"), (regressor, "gaussian")):
        found = twin_predictions(make_twin(estimator), family, X_HELD)
        wanted = own_predictions(estimator, X_HELD)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_weights_in_float32_are_audited_in_float64():
    estimator = stopped(MLPClassifier((4,), max_iter=20, random_state=0), X.astype("float32"), TWO)
    assert estimator.coefs_[0].dtype == np.float32
    assert flataudit.audit(estimator, (X.astype("float32"), TWO)).solver.dtype == "float64"


def test_an_argument_wins():
    estimator = fitted("logistic_lbfgs_softmax")
    given = flataudit.audit(estimator, (X, THREE), penalty=0.5).penalty
    assert (given.source, given.value, given.free_params) == ("argument", 0.5, 0)
    text = "optimizer=sgd,sum_lr=100"
    record = flataudit.audit(estimator, (X, THREE), training=text).penalty
    assert (record.source, record.value) == ("training", pytest.approx(0.01))
    names = flataudit.audit(estimator, (X, THREE), penalty={"weight": 0.1, "bias": 0}).penalty
    assert (names.value, names.free_params) == (0.1, 3)


def test_sample_weights_are_betrayed_by_the_gradient():
    weights = np.where(X[:, 0] > 0, 5.0, 0.2)
    estimator = LogisticRegression(**TIGHT).fit(X, TWO, sample_weight=weights)
    report = flataudit.audit(estimator, (X, TWO))
    assert "not_at_minimum" in [w.code for w in report.warnings]


# --- labels, pipelines, searches ----------------------------------------------------------------


def same_report(found, wanted):
    for part in ("nll", "leverage", "tic", "loo"):
        a, b = getattr(found.samples, part), getattr(wanted.samples, part)
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
    assert found.calibration.verdict == wanted.calibration.verdict
    assert found.gap.value == pytest.approx(wanted.gap.value, rel=1e-9)


@pytest.mark.parametrize(
    "names", [np.array(["ham", "eggs", "spam"]), np.array([40, 7, -3]), np.array([2.0, 1.0, 5.0])]
)
def test_labels_are_those_of_the_estimator(names):
    y = names[THREE]
    estimator = LogisticRegression(**TIGHT).fit(X, y)
    report = flataudit.audit(estimator, (X, y), heldout=(X[:50], y[:50]))
    order = np.searchsorted(np.sort(names), y)
    plain = LogisticRegression(**TIGHT).fit(X, order)
    same_report(report, flataudit.audit(plain, (X, order), heldout=(X[:50], order[:50])))
    assert report.family == "categorical"
    strange = y[:50].copy()
    strange[3] = "egg" if y.dtype.kind == "U" else 9
    text = message(lambda: flataudit.audit(estimator, (X, y), heldout=(X[:50], strange)))
    assert "heldout labels among the estimator's classes" in text


def test_booleans_and_columns():
    estimator = LogisticRegression(**TIGHT).fit(X, TWO == 1)
    report = flataudit.audit(estimator, (torch.from_numpy(X), torch.from_numpy(TWO == 1)[:, None]))
    assert (report.family, report.model.n_params) == ("bernoulli", 5)


def test_transformers_make_the_data():
    raw = X * [1, 50, 0.1, 3] + 7
    raw[::9, 2] = np.nan
    pipeline = make_pipeline(
        SimpleImputer(), StandardScaler(copy=False), LogisticRegression(C=0.5, **TIGHT)
    )
    pipeline.fit(raw.copy(), THREE)
    held = raw[:30] + 0.1
    given = raw.copy()
    report = flataudit.audit(pipeline, (given, THREE), heldout=(held, THREE[:30]))
    np.testing.assert_array_equal(given, raw)
    transformed = pipeline[:-1].transform(raw.copy())
    wanted = flataudit.audit(
        pipeline[-1],
        (transformed, THREE),
        heldout=(pipeline[:-1].transform(held.copy()), THREE[:30]),
    )
    same_report(report, wanted)
    assert report.heldout.gap == pytest.approx(wanted.heldout.gap, rel=1e-9)
    assert report.model.notes[0].endswith(
        "scikit-learn's LogisticRegression, after SimpleImputer, after StandardScaler"
    )


def test_the_data_keep_their_own_identity():
    from flataudit.data import digest_of

    pipeline = make_pipeline(StandardScaler(), Ridge()).fit(X, REAL)
    assert flataudit.audit(pipeline, (X, REAL)).data.sha256 == digest_of(X, REAL)


def test_tables_and_sparse_features():
    frame = pd.DataFrame(X, columns=list("abcd"))
    frame["kind"] = np.where(X[:, 0] + X[:, 3] > 0, "up", "down")
    encode = ColumnTransformer(
        [("one", OneHotEncoder(sparse_output=True), ["kind"])],
        remainder="passthrough",
        sparse_threshold=1.0,
    )
    pipeline = make_pipeline(encode, FunctionTransformer(), LogisticRegression(**TIGHT))
    pipeline.fit(frame, TWO)
    assert sparse.issparse(pipeline[:-1].transform(frame))
    report = flataudit.audit(pipeline, (frame, TWO), heldout=(frame[:60], TWO[:60]))
    assert report.model.n_params == 7
    assert "expected train x that the estimator accepts" in refused(pipeline, X, TWO)


def test_texts(monkeypatch):
    words = np.array(["good", "bad", "film", "plot", "actor", "long"])
    texts = [" ".join(RNG.choice(words, 6)) for _ in range(60)]
    labels = ["yes" if text.count("good") > text.count("bad") else "no" for text in texts]
    pipeline = make_pipeline(TfidfVectorizer(), LogisticRegression(**TIGHT)).fit(texts, labels)
    report = flataudit.audit(pipeline, (texts, labels), heldout=(texts[:9], labels[:9]))
    assert report.model.n_params == 7
    assert report.penalty.stationarity < 1e-4
    monkeypatch.setattr("flataudit.models.sklearn.available_bytes", lambda device: 1000)
    assert "as a dense array to fit into" in refused(pipeline, texts, labels)


def test_arrays_for_an_estimator_fitted_to_a_table():
    frame = pd.DataFrame(X, columns=list("abcd"))
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(**TIGHT)).fit(frame, TWO)
    same_report(flataudit.audit(pipeline, (X, TWO)), flataudit.audit(pipeline, (frame, TWO)))


def test_searches_and_nests_of_them():
    inner = Pipeline([("scale", StandardScaler()), ("model", LogisticRegression(**TIGHT))])
    grid = GridSearchCV(inner, {"model__C": [0.01, 0.1]}, cv=3)
    chance = RandomizedSearchCV(inner, {"model__C": [0.01, 0.1]}, n_iter=2, cv=3, random_state=0)
    outer = make_pipeline(SelectFromModel(RandomForestClassifier(5, random_state=0)), grid)
    for search in (grid, chance, outer):
        search.fit(X, THREE)
        found = flataudit.audit(search, (X, THREE))
        best = search if hasattr(search, "best_estimator_") else search[-1]
        assert found.penalty.value == pytest.approx(1 / (best.best_params_["model__C"] * N))
        assert found.penalty.stationarity < 1e-4
    unfitted = GridSearchCV(inner, {"model__C": [0.1]}, refit=False).fit(X, THREE)
    assert "refit=True" in refused(unfitted)


def test_the_callers_estimator_is_untouched():
    pipeline = make_pipeline(StandardScaler(), copy.deepcopy(fitted("mlp"))).fit(X, THREE)
    before = pickle.dumps(pipeline)
    given = X.copy(), THREE.copy()
    flataudit.audit(pipeline, given, heldout=(X, THREE), recalibrate=True)
    assert pickle.dumps(pipeline) == before
    np.testing.assert_array_equal(given[0], X)


# --- refusals -----------------------------------------------------------------------------------

UNDEFINED = {
    "forest": (RandomForestClassifier(3), "no gradient"),
    "tree": (DecisionTreeClassifier(), "no gradient"),
    "boosting": (GradientBoostingClassifier(n_estimators=3), "no gradient"),
    "svc": (SVC(), "a margin loss is no likelihood"),
    "linear_svc": (LinearSVC(), "a margin loss is no likelihood"),
    "neighbours": (KNeighborsClassifier(), "keeps the training data"),
    "bayes": (GaussianNB(), "fits densities of x"),
    "calibrated": (CalibratedClassifierCV(LogisticRegression()), "averages models"),
    "dummy": (DummyClassifier(), "it ignores x"),
    "ridge_classifier": (RidgeClassifier(), "no likelihood"),
    "lasso": (Lasso(), "no curvature"),
    "elastic_net": (ElasticNet(), "no curvature"),
    "histograms": (HistGradientBoostingClassifier(max_iter=2), "no gradient"),
    "gaussian_process": (GaussianProcessClassifier(), "one weight per training sample"),
}


@pytest.mark.parametrize("name", UNDEFINED)
def test_flatness_is_undefined(name):
    estimator, reason = UNDEFINED[name]
    for model in (estimator, make_pipeline(StandardScaler(), estimator)):
        text = refused(model)
        assert f"got {type(estimator).__name__} (scikit-learn)" in text
        assert reason in text
        assert "flatness is undefined" in text


@pytest.mark.parametrize("kind", ["classifier", "regressor", "cluster"])
def test_every_estimator_of_scikit_learn_is_audited_or_refused_with_a_reason(kind):
    for name, _ in all_estimators(type_filter=kind):
        if name not in PENALTIES:
            text = str(refused_by_name(name))
            assert "flatness is undefined" in text or "which is not supported: " in text, name


def test_the_folds_choose_c_and_alpha():
    choice = LogisticRegressionCV(
        Cs=[1e-3, 0.1, 10.0], solver="newton-cholesky", **CV, **TIGHT
    ).fit(X, THREE)
    found = flataudit.audit(choice, (X, THREE))
    assert found.penalty.value == pytest.approx(1 / (choice.C_ * N))
    plain = LogisticRegression(C=choice.C_, solver="newton-cholesky", **TIGHT).fit(X, THREE)
    same_report(found, flataudit.audit(plain, (X, THREE)))
    folds = RidgeCV(alphas=[0.1, 3.0, 50.0], cv=4).fit(X, REAL)
    same_report(
        flataudit.audit(folds, (X, REAL)),
        flataudit.audit(Ridge(alpha=folds.alpha_).fit(X, REAL), (X, REAL)),
    )


SETTINGS = {
    "sgd_three": (
        SGDClassifier(loss="log_loss", random_state=0),
        THREE,
        "one model per class, not a softmax",
    ),
    "sgd_hinge": (SGDClassifier(random_state=0), TWO, "loss='log_loss', got 'hinge'"),
    "sgd_l1": (SGDClassifier(loss="log_loss", penalty="l1"), TWO, "an l2 penalty"),
    "l1": (LogisticRegression(l1_ratio=0.5, solver="saga", tol=0.1), TWO, "an l2 penalty"),
    "class_weight": (LogisticRegression(class_weight="balanced"), TWO, "class_weight='balanced'"),
    "sgd_class_weight": (SGDClassifier(loss="log_loss", class_weight={0: 2}), TWO, "class_weight"),
    "positive": (LinearRegression(positive=True), REAL, "positive=True"),
    "alphas": (Ridge(alpha=[1.0, 2.0]), PAIR, "one number as alpha of Ridge, got 2"),
    "multi_label": (
        MLPClassifier((2,), solver="lbfgs"),
        np.stack([TWO, THREE == 1], axis=1),
        "multi-label MLPClassifier",
    ),
    "lbfgs_outputs": (
        MLPRegressor(hidden_layer_sizes=(2,), solver="lbfgs"),
        PAIR,
        "its gradient is not that of its loss",
    ),
    "averaged": (
        LogisticRegressionCV(Cs=[1.0], refit=False, **CV),
        TWO,
        "LogisticRegressionCV with refit=True",
    ),
    "cv_l1": (
        LogisticRegressionCV(Cs=[1.0], solver="saga", tol=0.1, **(CV | {"l1_ratios": (0.5,)})),
        TWO,
        "an l2 penalty, got LogisticRegressionCV",
    ),
    "alpha_per_target": (
        RidgeCV(alphas=[0.1, 1e4], alpha_per_target=True),
        PAIR,
        "one number as alpha_ of RidgeCV, got 2",
    ),
    "gamma": (GammaRegressor(), np.exp(REAL), "a Gamma likelihood is none of the families"),
    "tweedie": (TweedieRegressor(), REAL, "not supported: a Tweedie likelihood"),
    "sgd_regressor": (SGDRegressor(random_state=0), REAL, "fit Ridge"),
    "bayesian": (BayesianRidge(), REAL, "Ridge with alpha = lambda_/alpha_"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_without_a_penalty(name):
    estimator, y, reason = SETTINGS[name]
    assert reason in refused(stopped(copy.deepcopy(estimator), X, y), X, y)


@pytest.mark.parametrize(
    "estimator",
    [LogisticRegression(), MLPRegressor(), make_pipeline(StandardScaler(), Ridge())],
)
def test_unfitted(estimator):
    assert "got one without coefficients; call fit first" in refused(estimator)


def test_data_that_do_not_fit():
    assert "shape (n, 4) for LogisticRegression, got (120, 3)" in refused(
        fitted("logistic_lbfgs_softmax"), X[:, :3]
    )
    assert "labels among the estimator's classes 0, 1, 2, got 3" in refused(
        fitted("logistic_lbfgs_softmax"), y=THREE + 1
    )
    assert "one class label per sample" in refused(fitted("logistic_lbfgs_softmax"), y=PAIR)
    assert "NaN or infinity" in refused(
        fitted("logistic_lbfgs_softmax"), np.where(X > 2, np.nan, X)
    )
    assert "to be a pair (x, y)" in message(lambda: flataudit.audit(fitted("ridge"), 3))
    text = message(lambda: flataudit.audit(fitted("ridge"), (X, REAL), family="poisson"))
    assert "expected family gaussian for Ridge, got poisson" in text


class Shifted(LogisticRegression):
    """A user's class that predicts otherwise than its base."""

    def predict_proba(self, x):
        return super().predict_proba(x + 0.1)


class Renamed(LogisticRegression):
    """A user's class that predicts as its base."""


def test_classes_derived_from_an_estimator():
    plain = flataudit.audit(fitted("logistic_lbfgs_softmax"), (X, THREE))
    same_report(flataudit.audit(Renamed(C=0.3, **TIGHT).fit(X, THREE), (X, THREE)), plain)
    assert "predictions off by" in refused(Shifted().fit(X, THREE))


# --- any data -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 30),
    width=st.integers(1, 5),
    kind=st.sampled_from(["logistic", "binary", "ridge", "poisson", "least_squares"]),
    scale=st.sampled_from([1e-8, 1.0, 1e4]),
    strength=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from(["float32", "float64"]),
    constant=st.booleans(),
    doubled=st.booleans(),
)
def test_any_data_give_numbers_or_a_named_error(
    seed, n, width, kind, scale, strength, dtype, constant, doubled
):
    """n below P, constant columns, doubled rows, extreme scales and penalties."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, width)) * scale).astype(dtype)
    if constant:
        x[:, 0] = 1.0
    if doubled:
        x = np.concatenate([x, x])
    y = rng.integers(0, 3, len(x))
    estimator = {
        "logistic": LogisticRegression(C=strength),
        "binary": LogisticRegression(C=strength, solver="newton-cholesky"),
        "ridge": Ridge(alpha=strength),
        "poisson": PoissonRegressor(alpha=strength),
        "least_squares": LinearRegression(),
    }[kind]
    y = y > 0 if kind == "binary" else y if kind in ("logistic", "poisson") else y + 0.5
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            estimator.fit(x, y)
    except (ValueError, np.linalg.LinAlgError):  # one class alone: nothing was fitted
        return
    audited(estimator, (x, y), heldout=(x[:2], y[:2]))


def test_arrays_that_cannot_be_written_to():
    """As pandas gives them: torch warns of undefined behaviour where it would share them."""
    x, y = np.random.default_rng(0).normal(size=(60, 3)), np.arange(60) % 2
    fitted = LogisticRegression().fit(x, y)
    x.flags.writeable = False
    assert flataudit.audit(fitted, (x, y)).model.n_params == 4
