"""Why a model of another flavor is not audited; its class is read without unpickling anything."""

from __future__ import annotations

import json
import pickletools
import re
import zipfile
from pathlib import Path
from typing import NoReturn

from flataudit.errors import InputError

_TREES = re.compile(r"Forest|DecisionTree|ExtraTree|Boost|XGB|LGBM")
_WHY = {
    "transformers": "a pipeline, whose tokenizer and files need the transformers library; log the"
    " pipeline's model with mlflow.pytorch.log_model and give its token ids and mask by name",
}
_TREE_FLAVORS = ("xgboost", "lightgbm", "catboost", "h2o")


def refuse_flavor(flavor: str, folder: Path) -> NoReturn:
    """Raises InputError: expected a pytorch model, got `flavor`, and why that cannot be audited."""
    if flavor == "sklearn":
        names = _class_names(folder)
        trees = [name for name in names if _TREES.search(name)]
        if trees:
            _refuse_trees(f"{trees[0]} (scikit-learn)")
        kind = f" {names[0]}" if names else " estimator"
        raise InputError(
            f"expected a model of the pytorch flavor, got the scikit-learn{kind}; scikit-learn"
            " models are not supported in this release, audit a PyTorch network"
        )
    if flavor in _TREE_FLAVORS:
        _refuse_trees(f"a {flavor} model")
    if flavor in _WHY:
        raise InputError(f"expected a model of the pytorch flavor, got {flavor}, {_WHY[flavor]}")
    raise InputError(
        f"expected a model of the pytorch flavor, got {flavor}; log the network itself with"
        " mlflow.pytorch.log_model"
    )


def _refuse_trees(got: str) -> NoReturn:
    raise InputError(
        f"expected a network with differentiable parameters, got {got}; a tree ensemble has no"
        " gradient, so flatness is undefined for it: audit a PyTorch network"
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
