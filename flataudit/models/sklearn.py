"""scikit-learn estimators as exact torch twins, their data and the penalty they were fitted with.

An estimator is recognised by the module of its class: scikit-learn itself is never imported, only
the attributes of the caller's object are read, and they are copied. The transformers of a pipeline
before its final estimator are applied to x: what they return is the data, for training and
held-out alike. A twin is held against the estimator's own predictions before it is used.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flataudit.errors import InputError, MemoryPlanError
from flataudit.labels import few
from flataudit.memory import available_bytes, human
from flataudit.models.flavors import refused
from flataudit.models.sklearn_penalty import PENALTIES
from flataudit.penalty import EstimatorPenalty
from flataudit.results import FamilyName
from flataudit.tensors import as_pair, digest

_SEARCHES = ("GridSearchCV", "RandomizedSearchCV", "HalvingGridSearchCV", "HalvingRandomSearchCV")
_CHECKED = 64  # samples whose predictions are compared
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """What is audited: a network and its data, and what is known of it beyond the caller's word.

    sha256: of the data as given, where they were transformed; penalty: the estimator's own.
    """

    model: Any
    train: Any
    heldout: Any
    family: str
    sha256: str | None = None
    penalty: EstimatorPenalty | None = None
    notes: tuple[str, ...] = ()


def is_estimator(model: Any) -> bool:
    """Whether the class of `model`, or one it derives from, is scikit-learn's."""
    return any(_is_own(kind) for kind in type(model).__mro__)


def as_network(model: Any, train: Any, heldout: Any, family: str) -> Subject:
    """A scikit-learn estimator as its twin, with the twin's data; anything else as it is.

    Raises:
        InputError: an estimator without a minimum of a likelihood in its parameters, an unfitted
            one, settings without a D, labels it does not know, or x that does not fit it.
    """
    if not is_estimator(model):
        return Subject(model, train, heldout, family)
    final, steps = unwrap(model)
    name = _supported_name(final)
    found = _family(final, name)
    if family not in ("auto", found):
        raise InputError(
            f"expected family {found} for {name}, got {family}; leave it to the estimator"
        )
    module = make_twin(final)
    first = steps[0] if steps else final
    train, left_out = _known_columns(first, train, "train")
    heldout, _ = _known_columns(first, heldout, "heldout")
    data = _data(final, steps, train, "train")
    as_pair(data, "train")  # refuses what no audit can use, before anything is predicted
    objective = PENALTIES[name](final, len(data[0]))
    _compare(model, module, found, train[0], data[0])
    decay = {
        key: objective.bias if key.endswith("bias") else objective.weight
        for key, _ in module.named_parameters()
    }
    after = "".join(f", after {_kind(step)}" for step in _named_steps(steps))
    return Subject(
        module,
        data,
        None if heldout is None else _data(final, steps, heldout, "heldout"),
        found,
        _digest(train, data),
        EstimatorPenalty(decay, objective.record),
        (f"audited as the torch twin of scikit-learn's {name}{after}", *left_out),
    )


def unwrap(estimator: Any) -> tuple[Any, list[Any]]:
    """The final estimator inside searches and pipelines, and the pipelines' parts before it.

    scikit-learn's own containers only: others may resample the data on the way.
    """
    steps: list[Any] = []
    while _is_own(type(estimator)):
        kind = type(estimator).__name__
        if kind in _SEARCHES:
            if not hasattr(estimator, "best_estimator_"):
                raise InputError(
                    f"expected a fitted {kind}, got one without best_estimator_; fit it with"
                    " refit=True"
                )
            estimator = estimator.best_estimator_
        elif kind == "Pipeline":
            if len(estimator.steps) > 1:
                steps.append(estimator[:-1])
            estimator = estimator.steps[-1][1]
        else:
            break
    return estimator, steps


def make_twin(estimator: Any) -> nn.Module:
    """The torch network in float64 with the estimator's natural parameters as outputs (n, K).

    Linear models: nn.Linear; perceptrons: nn.Sequential. K = 1, the logit, for two classes.

    Raises:
        InputError: an unsupported or unfitted estimator.
    """
    name = _supported_name(estimator)
    if name.startswith("MLP"):
        hidden = _ACTIVATIONS[estimator.activation]
        layers: list[nn.Module] = []
        for weight, bias in zip(estimator.coefs_, estimator.intercepts_, strict=True):
            layers += [_linear(weight.T, bias), hidden()]
        return nn.Sequential(*layers[:-1])
    return _linear(
        np.atleast_2d(estimator.coef_), estimator.intercept_ if estimator.fit_intercept else None
    )


# --- which estimator it is ----------------------------------------------------------------------


def _is_own(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "sklearn"


def _kind(estimator: Any) -> str:
    """The name of the class, or of the supported one that a user's class derives from."""
    own = type(estimator)
    bases = (kind.__name__ for kind in own.__mro__ if _is_own(kind) and kind.__name__ in PENALTIES)
    return own.__name__ if _is_own(own) else next(bases, own.__name__)


def _supported_name(estimator: Any) -> str:
    """The class's name if a twin exists; InputError with the reason where not."""
    name = _kind(estimator)
    if name not in PENALTIES:
        raise refused(name)
    if not hasattr(estimator, "coefs_" if name.startswith("MLP") else "coef_"):
        raise InputError(f"expected a fitted {name}, got one without coefficients; call fit first")
    n_classes = len(getattr(estimator, "classes_", ()))
    loss = getattr(estimator, "loss", None)
    if name == "SGDClassifier":
        if loss != "log_loss":
            raise InputError(
                f"expected SGDClassifier with loss='log_loss', got {loss!r}, which is no"
                " likelihood, so flatness is undefined for it; refit with log_loss"
            )
        if n_classes > 2:
            raise InputError(
                f"expected two classes for SGDClassifier, got {n_classes}: it fits one model per"
                " class, not a softmax; use LogisticRegression, or audit each class alone"
            )
    if name in ("LogisticRegression", "LogisticRegressionCV"):
        mode = getattr(estimator, "multi_class", "auto")
        separate = estimator.solver == "liblinear" or mode == "ovr"
        if (n_classes > 2 and separate) or (n_classes == 2 and mode == "multinomial"):
            raise InputError(
                f"expected a softmax over {n_classes} classes, got {name} with"
                f" solver={estimator.solver!r}, multi_class={mode!r}; refit with solver='lbfgs'"
            )
    if name == "MLPClassifier" and estimator.out_activation_ == "logistic" and _outputs(estimator):
        raise InputError(
            "expected one label per sample, got a multi-label MLPClassifier; audit one label at"
            " a time"
        )
    if name == "MLPRegressor" and estimator.solver == "lbfgs" and _outputs(estimator):
        raise InputError(
            "expected one output for MLPRegressor(solver='lbfgs'), got"
            f" {estimator.n_outputs_}: its gradient is not that of its loss there, so it stops at"
            " no minimum; use solver='adam' or audit one output at a time"
        )
    return name


def _outputs(estimator: Any) -> bool:
    return int(estimator.n_outputs_) > 1


def _family(estimator: Any, name: str) -> FamilyName:
    if hasattr(estimator, "classes_"):
        return "bernoulli" if len(estimator.classes_) == 2 else "categorical"
    poisson = name == "PoissonRegressor" or getattr(estimator, "loss", None) == "poisson"
    return "poisson" if poisson else "gaussian"


def _named_steps(steps: list[Any]) -> list[Any]:
    parts = [part for pipeline in steps for _, part in pipeline.steps]
    return [part for part in parts if not (part is None or isinstance(part, str))]


def _linear(weight: NDArray[Any], bias: Any) -> nn.Linear:
    """A float64 layer with a copy of weight (K, d) and bias (K,), or none."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.array(weight, dtype=np.float64)))
        if bias is not None:
            layer.bias.copy_(torch.from_numpy(np.array(bias, dtype=np.float64).reshape(-1)))
    return layer


# --- its data -----------------------------------------------------------------------------------


def _data(estimator: Any, steps: list[Any], pair: Any, name: str) -> tuple[Any, Any]:
    """(x, y) as the twin takes them: x (n, d) float64 after the transformers, y in class indices.

    The caller's arrays are copied: a transformer with copy=False would write into them.
    """
    try:
        x, y = pair
    except (TypeError, ValueError):
        raise InputError(
            f"expected {name} to be a pair (x, y), got {type(pair).__name__}; give both arrays"
        ) from None
    x = _copied(x)
    try:
        with _quiet():
            for pipeline in steps:
                x = pipeline.transform(x)
        x = np.asarray(_dense(x), dtype=np.float64)
    except InputError:
        raise
    except Exception as error:  # transformers raise whatever they like
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"expected {name} x that the estimator accepts, got {type(error).__name__}: {reason};"
            " give x as it was fitted to"
        ) from error
    width = int(estimator.n_features_in_)
    if x.ndim != 2 or x.shape[1] != width:
        raise InputError(
            f"expected {name} x of shape (n, {width}) for {_kind(estimator)}, got {x.shape}; give"
            " the same features"
        )
    y = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    return x, (_indices(y, estimator.classes_, name) if hasattr(estimator, "classes_") else y)


def _first_step(estimator: Any) -> Any:
    return estimator.steps[0][1] if hasattr(estimator, "steps") else estimator


def _known_columns(first: Any, pair: Any, name: str) -> tuple[Any, tuple[str, ...]]:
    """The pair with a table's columns as the estimator was fitted to them, and what was left out.

    scikit-learn itself takes the same columns in the same order only.
    """
    names = getattr(first, "feature_names_in_", None)
    x: Any = pair[0] if isinstance(pair, tuple | list) and len(pair) == 2 else None
    if not hasattr(x, "columns"):
        return pair, ()
    if names is None:
        # A vectorizer of texts takes them alone, not as a table of one column.
        reads_texts = type(_first_step(first)).__name__.endswith("Vectorizer")
        return ((x.iloc[:, 0], pair[1]) if reads_texts and x.shape[1] == 1 else pair), ()
    given = [str(column) for column in x.columns]
    missing = [column for column in names if column not in given]
    if missing:
        raise InputError(
            f"expected a column {missing[0]!r} in {name} x, which the estimator was fitted to, got"
            f" {few(given)}; give the same features"
        )
    others = [column for column in given if column not in names]
    note = f"columns that the estimator does not know were left out: {few(others)}"
    return (x[list(names)], pair[1]), ((note,) if others else ())


def _dense(x: Any) -> Any:
    """A sparse matrix as an array; MemoryPlanError where that would not fit."""
    if not hasattr(x, "toarray"):
        return x
    needed, available = 8 * math.prod(x.shape), available_bytes(torch.device("cpu"))
    if 3 * needed > available:
        raise MemoryPlanError(
            f"expected the features of {x.shape[0]} samples as a dense array to fit into"
            f" {human(available)}, got {human(needed)} and its copies; audit a random subset, or"
            " keep fewer features"
        )
    return x.toarray()


def _indices(y: NDArray[Any], classes: NDArray[Any], name: str) -> NDArray[np.int64]:
    """Positions of the labels y in `classes_`."""
    if y.ndim == 0 or y.size != len(y):
        raise InputError(
            f"expected one class label per sample in {name} y, got shape {y.shape}; give labels,"
            " not one-hot rows"
        )
    known = {label: i for i, label in enumerate(classes.tolist())}
    labels = y.reshape(-1).tolist()
    unknown = next((label for label in labels if label not in known), None)
    if unknown is not None:
        shown = ", ".join(map(repr, list(known)[:8])) + (", ..." if len(known) > 8 else "")
        raise InputError(
            f"expected {name} labels among the estimator's classes {shown}, got {unknown!r}; give"
            " the labels it was fitted to"
        )
    return np.array([known[label] for label in labels], dtype=np.int64)


def _copied(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().cpu().numpy().copy()
    return x.copy() if hasattr(x, "copy") and hasattr(x, "shape") else np.array(x)


def _digest(pair: Any, data: Any) -> str:
    """sha256 of the data as given; of the twin's where those hold text, tables or gaps."""
    try:
        return digest(*as_pair(pair, "train"))
    except InputError:
        return digest(*as_pair(data, "train"))


def _compare(model: Any, twin: nn.Module, family: str, raw: Any, x: NDArray[np.float64]) -> None:
    """InputError where the twin's predictions are not the estimator's own."""
    raw, head = _copied(raw)[:_CHECKED], torch.from_numpy(np.array(x[:_CHECKED]))
    with torch.no_grad():
        found = twin(head)
    with _quiet():
        classifies = family in ("bernoulli", "categorical")
        own = model.predict_proba(raw) if classifies else model.predict(raw)
    if family == "bernoulli":
        found = torch.sigmoid(torch.cat([-found, found], dim=1))
    elif family == "categorical":
        found = torch.softmax(found, dim=1)
    elif family == "poisson":
        found = found.exp()
    tolerance = 1e-4 if np.asarray(own).dtype == np.float32 else 1e-9
    wanted = torch.from_numpy(np.array(own, dtype=np.float64)).reshape(found.shape)
    if not torch.allclose(found, wanted, rtol=tolerance, atol=tolerance):
        off = float((found - wanted).abs().max())
        raise InputError(
            f"expected {type(model).__name__} to predict as its scikit-learn class does, got"
            f" predictions off by {off:.1g}; audit the plain scikit-learn estimator"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that arrays carry no column names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*feature names")
        yield
