"""The data of an audit by name: npz, csv, parquet, module:function, or what MLflow logged.

Arrays keep their dtype, except that the features of a table become float64 (for token ids, which
must stay integers, use an npz file); for a scikit-learn model they stay a table, whose columns its
transformers know by name. Class labels may be text (`flataudit.labels`). MLflow and pandas are
imported only where they are needed.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flataudit.errors import InputError, first_of
from flataudit.labels import text_labels, with_indices
from flataudit.store import one_line, scratch_folder, store_errors

if TYPE_CHECKING:
    import pandas as pd
    from mlflow.entities import DatasetInput

    from flataudit.models.registry import ModelSource

FORMS = "a .npz, .csv or .parquet file, module:function, or mlflow"
SUFFIXES = (".npz", ".csv", ".parquet")
CONTEXTS = ("training", "train")  # ours, and the one of MLflow's autologging

_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


Array = NDArray[Any]
# One input, several by name, several by position, the table of a scikit-learn model.
Features: TypeAlias = "Array | dict[str, Array] | tuple[Array, ...] | pd.DataFrame"


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """What was loaded: x (n, ...) and y (n, ...), and where it came from.

    `tag_sha256` is the tag `sha256` of a dataset logged in MLflow, else None: compare it with
    the report's `data.sha256` (`digest_of`), as MLflow's own digest covers only part of large
    data. `path`: the file, where the data came from one.
    """

    x: Features
    y: Array
    origin: str
    tag_sha256: str | None = None
    path: Path | None = None

    @property
    def pair(self) -> tuple[Features, Array]:
        """(x, y), as `flataudit.audit` takes it."""
        return self.x, self.y


def load_data(
    spec: str,
    *,
    target: str | None = None,
    source: ModelSource | None = None,
    slices: str | None = None,
) -> Dataset:
    """The data that `spec` names.

    Args:
        spec: A `.npz` file with arrays x and y, y and one array of any name, or y and several
            inputs by the names of forward's parameters; a `.csv` or `.parquet` file, with `target`;
            `module:function`, which returns (x, y), x an array, a dict or a tuple of arrays (for
            scikit-learn also a table, a sparse matrix or texts); or `mlflow`: the dataset that the
            model's source run logged with the context "training" (tags `target` and `sha256`).
        target: The name of the target column of a table.
        source: The model, for `mlflow` and for whether its transformers take a table.
        slices: The column of a table that is no feature if it holds text, or the array of an npz
            file that is no input (`flataudit.columns`).

    Raises:
        InputError: whatever is missing, empty or not numeric, in one line.
        StoreError: MLflow cannot be read.
    """
    check_data(spec)
    if spec == "mlflow":
        return _from_mlflow(source, target, slices)
    path = Path(spec).expanduser()
    as_table = source is not None and source.flavor == "sklearn"
    if path.suffix.lower() in SUFFIXES:
        x, y = _from_file(path, target, as_table, slices)
        return Dataset(x, y, str(path.absolute()), path=path)
    x, y = _from_function(spec, as_table)
    return Dataset(x, y, spec)


def check_data(spec: str) -> None:
    """What can be known of the data that `spec` names without reading them or running any code.

    Raises:
        InputError: no form of data, or a file that is missing or empty.
    """
    path = Path(spec).expanduser()
    if spec == "mlflow":
        return
    if path.suffix.lower() in SUFFIXES:
        _check_file(path)
    elif not _FUNCTION.fullmatch(spec):
        raise InputError(f"expected data as {FORMS}, got {spec!r}; convert it to one of these")


def digest_of(x: Any, y: Any) -> str:
    """The sha256 of this data: the report's, and the value of a dataset's tag `sha256`.

    Labels as text count as the indices of their sorted unique values, whatever a model names.
    """
    from flataudit.tensors import as_pair, digest

    (x, y), _, _, _ = with_indices((x, y), None, None)
    return digest(*as_pair((x, y), "data"))


def training_input(source: ModelSource | None) -> DatasetInput:
    """The one dataset that the model's source run logged with the context "training".

    Raises:
        InputError: no source run, or not exactly one such dataset in it.
        StoreError: MLflow cannot be read.
    """
    remedy = "give the file with --train"
    if source is None or source.run_id is None:
        raise InputError(f"expected a model with a source run for data mlflow, got none; {remedy}")
    with store_errors(f"read the source run {source.run_id}"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            run = MlflowClient().get_run(source.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            raise InputError(
                f"expected the model's source run {source.run_id}, got none in this store; {remedy}"
            ) from error
    inputs = [] if run.inputs is None else run.inputs.dataset_inputs
    for context in CONTEXTS:
        found = [item for item in inputs if input_tag(item, "mlflow.data.context") == context]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(item.dataset.name for item in found)
            raise InputError(
                f"expected one dataset with the context {context!r} in run {source.run_id}, got"
                f" {len(found)} ({names}); {remedy}"
            )
    raise InputError(
        f"expected a dataset with the context 'training' in run {source.run_id}, got none; log it"
        f" with mlflow.log_input(dataset, context='training'), or {remedy}"
    )


def input_tag(item: DatasetInput, key: str) -> str | None:
    """The value of one tag of a logged dataset, None where it has none."""
    return next((str(tag.value) for tag in item.tags if tag.key == key), None)


def _from_mlflow(source: ModelSource | None, target: str | None, slices: str | None) -> Dataset:
    item = training_input(source)
    assert source is not None
    name = item.dataset.name
    if item.dataset.source_type == "code":
        raise InputError(
            f"expected a file behind the dataset {name!r} of run {source.run_id}, got one logged"
            " without a source; log it with source=PATH, or give the file with --train"
        )
    try:
        import mlflow.data

        origin = mlflow.data.get_source(item)
        # What has to be downloaded goes into our own temporary folder.
        takes_folder = "dst_path" in signature(origin.load).parameters and not _is_local(item)
        options = {"dst_path": scratch_folder()} if takes_folder else {}
        found: Any = origin.load(**options)
    except Exception as error:  # the sources' loaders raise whatever their library does
        raise InputError(
            f"expected to load the dataset {name!r} of run {source.run_id} from"
            f" {_uri_of(item)}, got: {one_line(error)}; give the file with --train"
        ) from error
    target = target or input_tag(item, "target")
    as_table = source.flavor == "sklearn"
    path = None
    if isinstance(found, str | Path):
        path = _single_file(Path(found))
        x, y = _from_file(path, target, as_table, slices)
    else:
        frame = _as_frame(found, item)
        x, y = _from_table(frame, target, f"the dataset {name!r}", as_table, slices)
    where = f"mlflow: dataset {name} of run {source.run_id}"
    return Dataset(x, y, where, input_tag(item, "sha256"), path)


def _single_file(path: Path) -> Path:
    """The one data file in a folder that a source downloaded; a file itself."""
    inside = [file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES]
    return inside[0] if path.is_dir() and len(inside) == 1 else path


def _as_frame(found: Any, item: DatasetInput) -> pd.DataFrame:
    """What the sources of tables load (Hugging Face, Delta, Spark), as a table of pandas."""
    import pandas as pd

    name = item.dataset.name
    for method in ("to_pandas", "toPandas"):
        if hasattr(found, method):
            try:
                found = getattr(found, method)()
            except Exception as error:  # whatever that library raises
                raise InputError(
                    f"expected the dataset {name!r} as a table, got: {one_line(error)}; give a"
                    " file with --train"
                ) from error
    if not isinstance(found, pd.DataFrame):
        raise InputError(
            f"expected the dataset {name!r} to load as a file or a table, got"
            f" {type(found).__name__} from a {item.dataset.source_type} source; give a file with"
            " --train"
        )
    return found


def _uri_of(item: DatasetInput) -> str:
    try:
        where = json.loads(item.dataset.source)
        return str(where.get("uri") or where.get("url") or item.dataset.source_type)
    except (ValueError, AttributeError):
        return str(item.dataset.source_type)


def _is_local(item: DatasetInput) -> bool:
    uri = _uri_of(item)
    return uri.startswith("file:") or re.match(r"[a-z][a-z0-9+.-]+:", uri) is None


def _from_file(
    path: Path, target: str | None, as_table: bool, slices: str | None
) -> tuple[Features, Array]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(
            f"expected a .npz, .csv or .parquet file, got {path}; convert it to one of these"
        )
    _check_file(path)
    if suffix == ".npz":
        return _from_npz(path, slices)
    return _from_table(_read_table(path), target, str(path), as_table, slices)


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"expected a data file at {path}, got none; check the path")
    if path.stat().st_size == 0:
        raise InputError(f"expected data in {path}, got an empty file; write it again")


def _from_npz(path: Path, slices: str | None) -> tuple[Features, Array]:
    remedy = "save it with numpy.savez(path, x=x, y=y)"
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise InputError(f"expected arrays x and y in {path}, got one array; {remedy}")
            missing = [name for name in ("x", "y") if name not in archive.files]
            names = [name for name in archive.files if name != slices or name == "y"]
            if missing == ["x"] and len(names) > 1:
                named = {name: archive[name] for name in names}
                y = named.pop("y")
                # One array is the model's one input, whatever it is called.
                return (named if len(named) > 1 else next(iter(named.values()))), y
            if missing:
                raise InputError(
                    f"expected arrays x and y in {path}, got {', '.join(archive.files) or 'none'};"
                    f" add {' and '.join(missing)}"
                )
            return archive["x"], archive["y"]
    except InputError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"expected a numpy .npz file without pickled objects at {path}, got:"
            f" {one_line(error)}; {remedy}"
        ) from error


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path) if path.suffix.lower() == ".csv" else pd.read_parquet(path)
    except Exception as error:  # parser errors of pandas and pyarrow share no base class
        raise InputError(
            f"expected a table in {path}, got: {one_line(error)}; check the file"
        ) from error


def _from_table(
    frame: pd.DataFrame, target: str | None, path: str, as_table: bool, slices: str | None
) -> tuple[Features, Array]:
    from pandas.api.types import is_numeric_dtype

    names = [str(name) for name in frame.columns]
    frame = frame.set_axis(names, axis="columns")
    if target is None or target not in names:
        got = "no --target" if target is None else f"--target {target}"
        raise InputError(
            f"expected --target to name a column of {path}, got {got}; choose from:"
            f" {first_of(names)}"
        )
    if slices in names and slices != target and not is_numeric_dtype(frame[slices].dtype):
        frame = frame.drop(columns=slices)
        names = [name for name in names if name != slices]
    if len(frame) == 0 or len(names) < 2:
        raise InputError(
            f"expected rows and feature columns in {path}, got {len(frame)} rows and"
            f" {len(names) - 1} features; write it again"
        )
    x: Features
    text = [name for name in names if name != target and not is_numeric_dtype(frame[name].dtype)]
    if text and not as_table:
        raise InputError(
            f"expected numbers in {path}, got text or dates in {first_of(text)}; encode these"
            " columns as the model's training did, or drop them"
        )
    x = frame.drop(columns=target)
    if not as_table:
        x = x.to_numpy(dtype=np.float64, na_value=np.nan)
    column = frame[target]
    if column.isna().any():
        raise InputError(
            f"expected a value of {target} in each row of {path}, got"
            f" {int(column.isna().sum())} missing; drop those rows"
        )
    if not is_numeric_dtype(column.dtype):
        labels = text_labels(column.to_numpy(dtype=object))
        if labels is None:
            raise InputError(
                f"expected numbers or class names in {target} of {path}, got {column.dtype};"
                " convert this column"
            )
        return x, labels
    kinds = {"b": np.bool_, "i": np.int64, "u": np.int64}
    return x, column.to_numpy(dtype=kinds.get(column.dtype.kind, np.float64))


def _from_function(spec: str, as_table: bool) -> tuple[Features, Array]:
    module_name, _, name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the installed command does not
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"expected to import {module_name} for data {spec}, got: {one_line(error)}; run where"
            " it can be imported, or set PYTHONPATH"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        got = "no such name" if function is None else type(function).__name__
        raise InputError(
            f"expected a function {name} in {module_name}, got {got}; it must return (x, y)"
        )
    try:
        found = function()
    except Exception as error:
        raise InputError(
            f"expected {spec} to return (x, y), got {type(error).__name__}: {one_line(error)};"
            " it is called without arguments"
        ) from error
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise InputError(
            f"expected {spec} to return (x, y), got {type(found).__name__}; return two arrays"
        )
    x, y = found
    labels = text_labels(y)
    # Tables, sparse matrices and texts are what a pipeline of scikit-learn starts from.
    given = as_table and (hasattr(x, "columns") or hasattr(x, "toarray") or _are_texts(x))
    return (
        x if given else as_features(x, f"x of {spec}"),
        _as_array(y, f"y of {spec}") if labels is None else labels,
    )


def _are_texts(x: Any) -> bool:
    return isinstance(x, list | np.ndarray) and text_labels(x) is not None


def as_features(value: Any, name: str) -> Features:
    """Arrays by name or by position, as `flataudit.tensors.as_pair` reads them, else one array."""
    if isinstance(value, Mapping):
        return {str(key): _as_array(item, f"{key} in {name}") for key, item in value.items()}
    if isinstance(value, tuple) and value and all(hasattr(item, "__array__") for item in value):
        return tuple(_as_array(item, f"input {i} in {name}") for i, item in enumerate(value))
    return _as_array(value, name)


def _as_array(value: Any, name: str) -> Array:
    try:
        if hasattr(value, "detach"):  # a torch tensor, perhaps on a GPU or with a gradient
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except Exception as error:
        raise InputError(
            f"expected an array for {name}, got {type(value).__name__}: {one_line(error)};"
            " return numpy arrays or tensors"
        ) from error
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"expected numbers for {name}, got dtype {array.dtype}; encode text and objects"
        )
    return array
