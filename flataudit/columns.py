"""The column that an audit is sliced by: of the data's own file, or of another with the same rows.

`COLUMN` is a column of the training table or a named 1-d array of the training npz file. A text
column is then no feature of the table, a number still is; the array is no input of the model.
`FILE:COLUMN` reads another .csv, .parquet or .npz file, whose rows have the order of the data, and
leaves the data as they are.
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from flataudit.data import Dataset
from flataudit.errors import InputError
from flataudit.labels import few
from flataudit.store import one_line

_ELSEWHERE = re.compile(r"(?P<file>.+\.(?:npz|csv|parquet)):(?P<column>.+)", re.IGNORECASE)


def own_column(slices: str | None) -> str | None:
    """The name of a column of the data themselves; None where another file holds it.

    >>> own_column("region"), own_column("meta.csv:region")
    ('region', None)
    """
    return None if slices is None or _ELSEWHERE.fullmatch(slices) else slices


def read_slices(slices: str | None, data: Dataset) -> dict[str, Any] | None:
    """{name: values, one per sample}, as `flataudit.audit` takes them; None without `slices`.

    Raises:
        InputError: no such file or column.
    """
    if slices is None:
        return None
    elsewhere = _ELSEWHERE.fullmatch(slices)
    if elsewhere:
        path, name = Path(elsewhere["file"]).expanduser(), elsewhere["column"]
    elif data.path is not None:
        path, name = data.path, slices
    else:
        raise InputError(
            f"expected --slices FILE:COLUMN for data that are no file ({data.origin}), got"
            f" {slices!r}; write the column to a .csv, .parquet or .npz file"
        )
    if not path.is_file():
        raise InputError(f"expected a file for --slices at {path}, got none; check the path")
    return {name: _from_npz(path, name) if path.suffix == ".npz" else _from_table(path, name)}


def _from_npz(path: Path, name: str) -> Any:
    try:
        with np.load(path, allow_pickle=False) as archive:
            if name in archive.files:
                return archive[name]
            found = archive.files
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    raise _missing(path, name, found)


def _from_table(path: Path, name: str) -> Any:
    import pandas as pd

    try:
        frame = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else pd.read_csv(path)
    except Exception as error:  # parser errors of pandas and pyarrow share no base class
        raise _unreadable(path, error) from error
    frame = frame.set_axis([str(column) for column in frame.columns], axis="columns")
    if name not in frame.columns:
        raise _missing(path, name, list(frame.columns))
    return frame[name]


def _missing(path: Path, name: str, found: list[str]) -> InputError:
    return InputError(
        f"expected --slices to name a column of {path}, got {name!r}; choose from: {few(found)}"
    )


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"expected a readable file for --slices at {path}, got: {one_line(error)}; write it again"
    )
