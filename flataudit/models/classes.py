"""The names of a model's classes in the order of its outputs, from the model or its logs."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flataudit.models.registry import ModelSource, local_folder
from flataudit.store import store_errors

KEYS = ("classes", "class_names", "classes_", "id2label")
_PLACEHOLDER = re.compile(r"LABEL_\d+")


def class_names(source: ModelSource, model: Any = None) -> list[str] | None:
    """The first of these that names two classes or more; None where none does.

    An attribute `classes`, `class_names` or `classes_` of the network (or `config.id2label`);
    `metadata={"classes": [...]}` of `log_model`; a param of the LoggedModel; a param of the source
    run. As text: JSON, a Python list or names between commas. MLflow's signature has no place for
    class names.

    Raises:
        StoreError: MLflow cannot be read.
    """
    for values in _places(source, model):
        for key in KEYS:
            names = parse_names(values.get(key))
            if names is not None:
                return names
    return None


def parse_names(value: Any) -> list[str] | None:
    """Names from a list, a mapping {index: name}, or their text; None where it is neither.

    >>> parse_names("cat, dog"), parse_names('{"1": "dog", "0": "cat"}'), parse_names("10")
    (['cat', 'dog'], ['cat', 'dog'], None)
    """
    if isinstance(value, str):
        value = _parsed(value)
    if isinstance(value, Mapping):
        value = _in_order(value)
    if hasattr(value, "tolist") and not hasattr(value, "detach"):
        value = value.tolist()
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    # Where nobody named them, transformers calls its classes LABEL_0, LABEL_1, ...
    if not all(isinstance(name, str) and not _PLACEHOLDER.fullmatch(name) for name in value):
        return None
    return list(value)


def _parsed(text: str) -> Any:
    if text[:1] not in ("[", "(", "{"):
        return [name.strip() for name in text.split(",")]
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError):
            continue
    return None


def _in_order(names: Mapping[Any, Any]) -> list[Any] | None:
    """The names of {0: name, 1: name, ...}, keys as numbers or text."""
    found = {str(key): name for key, name in names.items()}
    order = [str(index) for index in range(len(found))]
    return [found[index] for index in order] if found.keys() == set(order) else None


def _places(source: ModelSource, model: Any) -> Iterator[Mapping[str, Any]]:
    from mlflow import MlflowClient
    from mlflow.models import Model

    if model is not None:
        yield {key: getattr(model, key, None) for key in KEYS[:3]}
        yield {"id2label": getattr(getattr(model, "config", None), "id2label", None)}
    yield Model.load(str(local_folder(source))).metadata or {}
    if source.kind == "folder":
        return  # audited by itself: its run may be in a store that nobody asked for
    with store_errors(f"read the classes of {source.uri}"):
        client = MlflowClient()
        if source.model_id is not None:
            yield _existing(lambda: client.get_logged_model(str(source.model_id)).params)
        if source.run_id is not None:
            yield _existing(lambda: client.get_run(str(source.run_id)).data.params)


def _existing(look_up: Callable[[], Any]) -> Mapping[str, Any]:
    """What a client call returns, nothing where MLflow says that it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return dict(look_up() or {})
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return {}
