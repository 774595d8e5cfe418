"""Options and arguments that several commands take, each worded once."""

from __future__ import annotations

from typing import Any

import typer

MODEL_URI = typer.Argument(
    help="models:/name/version, models:/name@alias, models:/m-id, runs:/id/path or a"
    " local MLflow model folder",
    show_default=False,
)
MODEL = typer.Option(help="one registered model (default: all)")
TARGET = typer.Option(help="target column of tables")
DEVICE = typer.Option(help="auto, cpu or cuda")
TRACKING = typer.Option(help="MLflow store (default: MLFLOW_TRACKING_URI, else a local folder)")


def json_file_option(what: str = "result") -> Any:
    """`--json FILE|-`."""
    return typer.Option("--json", help=f"write the {what} as JSON to FILE, or - for stdout")
