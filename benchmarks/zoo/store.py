"""The zoo's MLflow registry and the rows measured from it, in one folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.zoo.data import Sources
from benchmarks.zoo.grid import Cell

CELL_TAG = "zoo.cell"  # on a model version: the digest of the cell it was trained for
EXPERIMENT = "zoo"
Json = dict[str, Any]


def open_store(folder: str | Path) -> Any:
    """Points MLflow at the embedded store in `folder` and returns a client of it."""
    import mlflow

    from flataudit.store import embedded_store, use_tracking

    use_tracking(embedded_store(folder))
    return mlflow.MlflowClient()


def sources_of(options: Json) -> Sources:
    """Where data are read from, by a flow's plain options."""
    folder = options.get("data")
    return Sources(Path(folder) if folder else None, bool(options.get("download")))


def registered_uri(client: Any, cell: Cell) -> str | None:
    """The newest version that was trained for exactly this cell."""
    found = [
        version
        for version in client.search_model_versions(f"name = '{cell.name}'")
        if version.tags.get(CELL_TAG) == cell.digest()
    ]
    if not found:
        return None
    newest = max(found, key=lambda version: int(version.version))
    return f"models:/{newest.name}/{newest.version}"


def fields(cell: Cell) -> Json:
    """The cell as columns: its fields, name and group."""
    return {**asdict(cell), "name": cell.name, "group": cell.group}


def row_path(folder: str | Path, kind: str, cell: Cell) -> Path:
    """The file of one row; its name changes with the cell's definition."""
    return Path(folder) / kind / f"{cell.name}.{cell.digest()}.json"


def write_row(path: Path, row: Json) -> None:
    """Writes a row at once: a file that exists is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(json.dumps(row, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_rows(folder: str | Path, kind: str, cells: list[Cell]) -> list[Json]:
    """The rows of these cells that were written, in the cells' order."""
    paths = [row_path(folder, kind, cell) for cell in cells]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
