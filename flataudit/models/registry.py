"""A model by its MLflow URI: which version it is, its files, its network.

`resolve` reads the store once and returns a plain, JSON-able `ModelSource`; everything else
starts from that. Models are read in place where their files are local, else downloaded once.
"""

from __future__ import annotations

import hashlib
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import unquote, urlparse

from flataudit.errors import InputError, StoreError
from flataudit.models.flavors import refuse_files, refuse_flavor
from flataudit.models.source import ModelSource, if_found, open_client
from flataudit.models.training_run import training_record
from flataudit.store import one_line, scratch_folder, store_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

__all__ = ["FORMS", "ModelSource", "load_model", "local_folder", "resolve", "training_record"]

FORMS = (
    "models:/name/version, models:/name@alias, models:/m-id, runs:/id/path or the folder of an"
    " MLflow model"
)

_ADDED_BY_DOWNLOAD = "registered_model_meta"  # MLflow writes it into the folder it downloads to


def resolve(uri: str) -> ModelSource:
    """Finds the model that `uri` names, and brings its files to this machine.

    Raises:
        InputError: a malformed URI, or no such model, version, alias, run or folder.
        StoreError: the store or its artifacts cannot be reached.
    """
    if uri.startswith("models:/"):
        return _from_registry(uri)
    if uri.startswith("runs:/"):
        return _from_run(uri)
    folder = Path(unquote(urlparse(uri).path) if uri.startswith("file:") else uri).expanduser()
    if not (folder / "MLmodel").is_file():
        got = "a folder without an MLmodel file" if folder.is_dir() else "no such folder"
        raise InputError(f"expected a model as {FORMS}, got {uri!r}, {got}; check the spelling")
    folder = folder.resolve()
    return _described(ModelSource(str(folder), "folder", "", str(folder)))


def load_model(source: ModelSource) -> Any:
    """The torch network or the scikit-learn estimator, on the CPU, as it was logged.

    Pickles and skops files run code of whoever logged them;
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false refuses them, and leaves pt2 exports.
    Code logged with the model (code_paths) stays importable in this process; modules of models
    loaded earlier are forgotten, so that two models cannot get each other's.

    Raises:
        InputError: another flavor, pickles not allowed, a class that cannot be imported, files
            that do not load, an estimator known to have no flatness (it is not loaded).
        StoreError: the files are gone and cannot be downloaded again.
    """
    from torch import nn

    folder = local_folder(source)
    if source.flavor == "sklearn":
        refuse_files(folder)
    elif source.flavor not in ("pytorch", "transformers"):
        refuse_flavor(source.flavor)
    _forget_modules(folder)
    if source.flavor == "transformers":
        from flataudit.models.transformers import load_classifier

        return load_classifier(folder, source.uri)
    import mlflow.pytorch
    import mlflow.sklearn

    kind = "PyTorch" if source.flavor == "pytorch" else "scikit-learn"
    try:
        if kind == "scikit-learn":
            return mlflow.sklearn.load_model(str(folder))
        model = mlflow.pytorch.load_model(str(folder), map_location="cpu")
    except ImportError as error:
        _not_importable(source, f"no module {error.name!r}" if error.name else one_line(error))
    except AttributeError as error:
        _not_importable(source, one_line(error))
    except Exception as error:  # torch, pickle, zipfile and MLflow: no base class in common
        if "MLFLOW_ALLOW_PICKLE_DESERIALIZATION" in str(error):
            got = "a pickle" if kind == "PyTorch" else f"a {kind} model"
            raise InputError(
                f"expected a pt2 model because MLFLOW_ALLOW_PICKLE_DESERIALIZATION is false, got"
                f" {got} in {source.uri}; allow pickles you trust, or log the model with"
                " mlflow.pytorch.log_model(..., serialization_format='pt2')"
            ) from error
        raise InputError(
            f"expected a {kind} model that loads from {source.uri}, got"
            f" {type(error).__name__}: {one_line(error)}; log it again"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"expected a torch.nn.Module in {source.uri}, got {type(model).__name__}; log the"
            " network itself"
        )
    return model


def local_folder(source: ModelSource) -> Path:
    """The folder with the model's files; found or downloaded again where it is gone."""
    folder = Path(source.local_path)
    if (folder / "MLmodel").is_file():
        return folder
    return Path(resolve(source.uri).local_path)


# --- the URI forms ------------------------------------------------------------------------------


def _from_registry(uri: str) -> ModelSource:
    rest = uri.removeprefix("models:/").lstrip("/")
    name, slash, version = rest.partition("/")
    alias = ""
    if not slash:
        name, _, alias = rest.rpartition("@") if "@" in rest else ("", "", "")
    with store_errors(f"look up {uri}"):
        client = open_client()
        if not slash and not alias and re.fullmatch(r"m-\w+", rest):
            model = if_found(lambda: client.get_logged_model(rest))
            if model is None:
                raise InputError(
                    f"expected a logged model {rest} in this store, got none; check the id and the"
                    " tracking URI"
                )
            located = _located(model.artifact_location, uri)
            return _described(
                ModelSource(
                    f"models:/{rest}",
                    "logged_model",
                    "",
                    str(located),
                    model_id=rest,
                    run_id=model.source_run_id or None,
                )
            )
        if not name or not (version.isdigit() or alias):
            raise InputError(f"expected a model as {FORMS}, got {uri!r}; check the spelling")
        if alias:
            entry = if_found(lambda: client.get_model_version_by_alias(name, alias))
        else:
            entry = if_found(lambda: client.get_model_version(name, version))
        if entry is None:
            raise InputError(_no_version(client, name, version, alias))
        return _from_version(client, entry)


def _from_version(client: MlflowClient, entry: ModelVersion) -> ModelSource:
    name, version = str(entry.name), str(entry.version)
    uri = f"models:/{name}/{version}"
    located = _located(client.get_model_version_download_uri(name, version), uri)
    source = ModelSource(
        uri, "registry", "", str(located), name, version, run_id=entry.run_id or None
    )
    return _described(source)


def _no_version(client: MlflowClient, name: str, version: str, alias: str) -> str:
    model = if_found(lambda: client.get_registered_model(name))
    if model is None:
        return (
            f"expected a registered model {name!r}, got none of that name in this store; check the"
            " name and the tracking URI"
        )
    if alias:
        known = ", ".join(sorted(model.aliases)) or "none"
        return f"expected an alias {alias!r} of {name}, got only: {known}; set it or give a version"
    latest = max((int(v.version) for v in model.latest_versions), default=0)
    newest = f"the newest is {latest}" if latest else "it has none"
    return f"expected version {version} of {name}, got no such version; {newest}"


def _from_run(uri: str) -> ModelSource:
    run_id, _, path = uri.removeprefix("runs:/").lstrip("/").partition("/")
    path = path.strip("/")
    if not run_id or not path:
        raise InputError(f"expected a model as {FORMS}, got {uri!r}; add the path of the model")
    with store_errors(f"look up {uri}"):
        client = open_client()
        run = if_found(lambda: client.get_run(run_id))
        if run is None:
            raise InputError(
                f"expected a run {run_id} in this store, got none; check the id and the tracking"
                " URI"
            )
        # MLflow 3 keeps a model logged by a run outside the run's own artifacts.
        outputs = [] if run.outputs is None else run.outputs.model_outputs
        models = [client.get_logged_model(item.model_id) for item in outputs]
        named = [model for model in models if model.name == path]
        if named:
            model = max(named, key=lambda m: m.creation_timestamp)
            location, model_id = model.artifact_location, model.model_id
        else:
            listed = {item.path for item in client.list_artifacts(run_id, path)}
            if f"{path}/MLmodel" not in listed:
                logged = ", ".join(sorted({str(m.name) for m in models})) or "none"
                raise InputError(
                    f"expected an MLflow model at {path!r} in run {run_id}, got no such model; the"
                    f" run logged: {logged}"
                )
            location, model_id = f"{run.info.artifact_uri.rstrip('/')}/{path}", None
        located = _located(location, uri)
        return _described(
            ModelSource(uri, "run", "", str(located), model_id=model_id, run_id=run_id)
        )


def _described(source: ModelSource) -> ModelSource:
    """The source with what the model's own MLmodel file says."""
    from mlflow.models import Model

    folder = Path(source.local_path)
    try:
        model = Model.load(str(folder))
        flavors = [name for name in model.flavors if name != "python_function"]
    except Exception as error:
        raise InputError(
            f"expected a readable MLmodel file in {folder}, got: {one_line(error)}; log the model"
            " again"
        ) from error
    flavor = "pytorch" if "pytorch" in flavors else (flavors or ["python_function"])[0]
    model_id = source.model_id or model.model_id or None
    return replace(
        source,
        flavor=flavor,
        model_id=model_id,
        run_id=model.run_id or source.run_id,
        artifact_sha256=None if model_id else _sha256(folder),
    )


# --- files --------------------------------------------------------------------------------------


def _located(location: str, uri: str) -> Path:
    """The model's folder: its own where it is local, else downloaded into a temporary one."""
    if location.startswith("runs:/"):
        return Path(_from_run(location).local_path)
    parsed = urlparse(location)
    if parsed.scheme in ("", "file"):
        folder = Path(unquote(parsed.path) if parsed.scheme else location)
        if not (folder / "MLmodel").is_file():
            raise StoreError(
                f"expected the files of {uri} in {folder}, got no MLmodel there; restore the"
                " artifact store, or run where it is mounted"
            )
        return folder
    from mlflow.artifacts import download_artifacts

    return Path(download_artifacts(artifact_uri=uri, dst_path=scratch_folder()))


def _sha256(folder: Path) -> str:
    """sha256 over the names and contents of the model's files."""
    sha = hashlib.sha256()
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    for name in names:
        if name == _ADDED_BY_DOWNLOAD or "__pycache__" in name:
            continue
        with (folder / name).open("rb") as file:
            sha.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()


# --- code that comes with a model ----------------------------------------------------------------

_CODE_FOLDERS: list[str] = []


def _forget_modules(folder: Path) -> None:
    """Drops modules that came with models loaded earlier: their names may be this model's too."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        if any(file.startswith(f"{known}/") for known in _CODE_FOLDERS):
            del sys.modules[name]
    _CODE_FOLDERS.append(str(folder))


def _not_importable(source: ModelSource, got: str) -> NoReturn:
    raise InputError(
        f"expected the classes of {source.uri} to be importable, got {got}; install the package"
        " that defines them or set PYTHONPATH, or log the model with code_paths or as pt2"
    )
