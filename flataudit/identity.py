"""Which model a URI names, without its files: for what only reads past audits."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlparse

from flataudit.models.registry import ModelSource, resolve
from flataudit.store import store_errors

_VERSION = re.compile(r"models:/+(?P<name>[^/@]+)(/(?P<version>\d+)|@(?P<alias>[\w-]+))")
_LOGGED = re.compile(r"models:/+(?P<id>m-\w+)")


def identify(uri: str) -> ModelSource:
    """The model as `flataudit.models.registry.resolve` finds it, its identity the same.

    Of a version that MLflow 3 registered nothing is downloaded but, at most, its MLmodel file:
    `flavor` and `local_path` are then empty, and `resolve` is needed before it can be loaded.

    Raises:
        InputError: a malformed URI, or no such model, version, alias, run or folder.
        StoreError: the store or its artifacts cannot be reached.
    """
    asked = _VERSION.fullmatch(uri)
    if asked is None:
        return resolve(uri)
    with store_errors(f"look up {uri}"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from mlflow.models import Model

        client = MlflowClient()
        name = asked["name"]
        try:
            if asked["alias"]:
                entry = client.get_model_version_by_alias(name, asked["alias"])
            else:
                entry = client.get_model_version(name, asked["version"])
        except MlflowException:
            return resolve(uri)  # which says what is there instead
        logged = _LOGGED.fullmatch(entry.source or "")
        if logged is None:  # a copy, a run's model, or one of MLflow 2
            location = client.get_model_version_download_uri(name, entry.version)
            parsed = urlparse(location)
            folder = unquote(parsed.path) if parsed.scheme == "file" else location
            model_id = Model.load(folder).model_id
        else:
            model_id = logged["id"]
    if not model_id:
        return resolve(uri)
    version = str(entry.version)
    return ModelSource(
        f"models:/{name}/{version}",
        "registry",
        flavor="",
        local_path="",
        name=name,
        version=version,
        model_id=model_id,
        run_id=entry.run_id or None,
    )
