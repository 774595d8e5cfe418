"""Why a model is not audited: by its flavor, or by the class of a scikit-learn estimator.

The class in a model's files is read without unpickling anything.
"""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import NoReturn

from flataudit.errors import InputError
from flataudit.models.sklearn_penalty import PENALTIES

SUPPORTED = ", ".join(PENALTIES)
_TREE_FLAVORS = ("xgboost", "lightgbm", "catboost", "h2o")
_NO_GRADIENT = "a tree ensemble has no gradient"
# Why flatness is undefined, by the class's name; the first that matches.
_REASONS = (
    (r"Forest|Tree|Boost|XGB|LGBM", _NO_GRADIENT),
    (r"SV[CRM]$|Perceptron$|PassiveAggressive", "a margin loss is no likelihood"),
    (r"Neighbors|Centroid", "it keeps the training data and has no fitted parameters"),
    (
        r"^GaussianProcess|^KernelRidge|^Label(Propagation|Spreading)",
        "it has one weight per training sample: none can be left out of them",
    ),
    (r"NB$|DiscriminantAnalysis$", "it fits densities of x, not the minimum of a loss"),
    (r"^CalibratedClassifier", "it averages models of several folds, at no minimum together"),
    (r"^(Fixed|Tuned)Threshold", "its decisions come from a threshold, not from a likelihood"),
    (r"^Dummy", "it ignores x"),
    (r"^(Stacking|Voting|Bagging)", "several models together are at no minimum of one loss"),
    (r"^SelfTraining", "it was fitted to labels that it gave itself"),
    (r"^(MultiTask)?(Lasso|ElasticNet|Lars)", "an l1 penalty has no curvature"),
    (r"^OrthogonalMatchingPursuit", "it chooses features one by one, which no penalty describes"),
    (r"^RidgeClassifier", "squared loss on class labels is no likelihood"),
    (r"^(Huber|Quantile|RANSAC|TheilSen)", "a robust loss is no likelihood"),
    (r"^Isotonic", "a step function has no gradient"),
    (r"^(CCA|PLS)", "it maximises a covariance, not a likelihood"),
    (r"^(OneVsRest|OneVsOne|OutputCode)", "one model per class has no joint likelihood"),
    (
        r"^(MultiOutput|RegressorChain|ClassifierChain)",
        "its models, one per target, share no likelihood",
    ),
    (r"^TransformedTarget", "its loss is that of transformed targets"),
    (
        r"KMeans$|DBSCAN$|^(AffinityPropagation|AgglomerativeClustering|Birch|MeanShift|OPTICS"
        r"|SpectralClustering|FeatureAgglomeration)|Mixture$",
        "clusters have no targets to predict",
    ),
)
# Where flatness exists, but no twin of the estimator does: why, and what to use.
_UNSUPPORTED = (
    (r"^GammaRegressor", "a Gamma likelihood is none of the families here", "a PoissonRegressor"),
    (
        r"^TweedieRegressor",
        "a Tweedie likelihood is none of the families here",
        "PoissonRegressor for power=1, Ridge for power=0",
    ),
    (r"^SGDRegressor", "where its steps ended is not on record", "Ridge, which has its objective"),
    (
        r"^(BayesianRidge|ARDRegression)",
        "its penalty was chosen by evidence along with the noise",
        "Ridge with alpha = lambda_/alpha_",
    ),
)


def refuse_flavor(flavor: str) -> NoReturn:
    """Raises InputError: a flavor that holds no network or estimator, and what to log instead."""
    if flavor in _TREE_FLAVORS:
        raise InputError(_undefined(f"a model of the {flavor} flavor", _NO_GRADIENT))
    raise InputError(
        f"expected a model of the pytorch, sklearn or transformers flavor, got {flavor}; log the"
        " network itself with mlflow.pytorch.log_model"
    )


def refuse_files(folder: Path) -> None:
    """InputError where the estimator in a model's files is known to have no flatness."""
    names = _class_names(folder)
    if names and refusal(names[0]) is not None:
        raise refused(names[0])


def refusal(name: str) -> str | None:
    """Why estimators of the class `name` have no flatness, where that is known."""
    return next((why for pattern, why in _REASONS if re.search(pattern, name)), None)


def refused(name: str) -> InputError:
    """The error for a scikit-learn class without a twin."""
    reason = refusal(name)
    if reason is not None:
        return InputError(_undefined(f"{name} (scikit-learn)", reason))
    for pattern, why, instead in _UNSUPPORTED:
        if re.search(pattern, name):
            return InputError(
                f"expected a scikit-learn estimator among {SUPPORTED}, got {name}, which is not"
                f" supported: {why}; fit {instead}"
            )
    return InputError(
        f"expected a scikit-learn estimator among {SUPPORTED}, got {name}; audit one of these, or"
        " a PyTorch network"
    )


def _undefined(got: str, reason: str) -> str:
    return (
        f"expected a model with differentiable parameters at the minimum of a likelihood, got"
        f" {got}; {reason}, so flatness is undefined for it: audit a PyTorch network or one of"
        f" {SUPPORTED}"
    )


def _class_names(folder: Path) -> list[str]:
    """Class names in the model's skops or pickle files, the estimator's own first."""
    names: list[str] = []
    for path in sorted(folder.rglob("*")):
        try:
            if path.suffix == ".skops":
                names += _in_skops(path)
            elif path.suffix in (".pkl", ".pickle", ".joblib"):
                names += _in_pickle(path)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile):
            continue  # a damaged file: the flavor alone has to do
    return names


def _in_skops(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        text = archive.read("schema.json").decode()
    return [str(json.loads(text)["__class__"]), *re.findall(r'"__class__":\s*"(\w+)"', text)]


def _in_pickle(path: Path) -> list[str]:
    """The names of all classes and functions a pickle refers to, by its opcodes alone."""
    names, last = [], ""
    for opcode, argument, _ in pickletools.genops(path.read_bytes()):
        if opcode.name == "GLOBAL":
            names.append(str(argument).rpartition(" ")[2])
        elif opcode.name == "STACK_GLOBAL":
            names.append(last.rpartition(".")[2])
        elif "UNICODE" in opcode.name:
            last = str(argument)
    return names
