"""The command line: a thin shell around `flataudit.stages`.

Exit codes: 0 done; 2 bad input or unsupported model (one line on stderr); 3 the audit failed, ran
past its deadline, or a store could not be used.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import click
import typer

from flataudit.errors import FlatauditError, InputError

app = typer.Typer(
    help="Audits a registered model: how much worse it will do on unseen data, and whether to"
    " rely on that prediction.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Keeps `audit` a command of its own."""


@app.command()
def audit(
    model_uri: Annotated[
        str,
        typer.Argument(
            help="models:/name/version, models:/name@alias, models:/m-id, runs:/id/path or a"
            " local MLflow model folder",
            show_default=False,
        ),
    ],
    train: Annotated[
        str,
        typer.Option(
            help="training data: file.npz (x, y), .csv or .parquet with --target,"
            " module:function, or mlflow (the source run's dataset)",
            show_default=False,
        ),
    ],
    heldout: Annotated[
        str, typer.Option(help="data never used in training: judges calibration")
    ] = "",
    target: Annotated[str, typer.Option(help="target column of tables")] = "",
    family: Annotated[
        str, typer.Option(help="auto, categorical, bernoulli, gaussian or poisson")
    ] = "auto",
    penalty: Annotated[str, typer.Option(help="auto, or the weight decay of the mean loss")] = "",
    dispersion: Annotated[str, typer.Option(help="auto, or the Gaussian variance")] = "",
    training: Annotated[
        str, typer.Option(help="training record: auto (the source run), FILE or KEY=VALUE,...")
    ] = "",
    curvature: Annotated[str, typer.Option(help="ggn")] = "",
    solver: Annotated[str, typer.Option(help="auto, primal or dual")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "",
    config: Annotated[str, typer.Option(help="YAML file of options; the command line wins")] = "",
    json_file: Annotated[
        str, typer.Option("--json", help="write the report as JSON to FILE, or - for stdout")
    ] = "",
    no_log: Annotated[bool, typer.Option("--no-log", help="write nothing to MLflow")] = False,
    deadline: Annotated[
        float | None, typer.Option(help="seconds after which the audit is stopped")
    ] = None,
    tracking_uri: Annotated[
        str, typer.Option(help="MLflow store (default: MLFLOW_TRACKING_URI, else a local folder)")
    ] = "",
) -> None:
    """Predict a model's generalization gap and log it, with its confidence, to MLflow."""
    from flataudit.config import make_options, read_options
    from flataudit.report import terminal
    from flataudit.stages import Stages, estimate, run_audit

    from_file = read_options(Path(config)) if config else {}
    given = {
        "target": target,
        "family": "" if family == "auto" else family,
        "penalty": _number(penalty),
        "dispersion": _number(dispersion),
        "training": training,
        "curvature": curvature,
        "solver": solver,
        "device": device,
        "deadline": deadline,
        "tracking_uri": tracking_uri,
    }
    given = {key: value for key, value in given.items() if value not in (None, "", "auto")}
    options = make_options({**from_file, **given}, "the options")
    if json_file not in ("", "-") and not Path(json_file).parent.is_dir():
        raise InputError(
            f"expected --json to name a file in an existing folder, got {json_file}; make it first"
        )
    with _Stages() as show:
        stages = Stages(estimate=lambda loaded, values: estimate(loaded, values, show.stage))
        result = run_audit(
            model_uri, train, heldout or None, options, stages=stages, write=not no_log
        )
    report = result["report"]
    text = json.dumps(report, indent=2, allow_nan=False)
    if json_file == "-":
        print(text)
        return
    if json_file:
        _write(Path(json_file), text + "\n")
    print(terminal.render(report))
    if result["run_id"]:
        print(f"\nlogged to MLflow: run {result['run_id']} in experiment flataudit")


@app.command()
def demo(
    folder: Annotated[
        str, typer.Option(help="where the demo's embedded stores are kept")
    ] = "flataudit-store",
) -> None:
    """Train, register and audit three small networks on real digits; compare with the truth."""
    from flows.demo import run_demo

    run_demo(Path(folder))


def main() -> None:
    """The console script: runs a command and turns errors into one line and an exit code."""
    _quiet()
    try:
        code = app(standalone_mode=False)
    except FlatauditError as error:
        code = _fail(str(error), error.exit_code)
    except click.exceptions.Abort:
        code = _fail("interrupted", 130)
    except click.ClickException as error:
        code = _fail(error.format_message(), 2)
    except KeyboardInterrupt:
        code = _fail("interrupted", 130)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"flataudit: {' '.join(message.split())}", file=sys.stderr)
    return code


def _quiet() -> None:
    """Third parties' notices would drown the one line that matters."""
    if os.environ.get("FLATAUDIT_DEBUG"):
        return
    warnings.simplefilter("ignore")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "ERROR")
    for name in ("alembic", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError(
            f"expected --json to name a writable file, got {path}: {error.strerror}; choose another"
        ) from None


class _Stages:
    """The running stage on a terminal's stderr; silent elsewhere."""

    def __enter__(self) -> _Stages:
        from rich.console import Console

        console = Console(stderr=True)
        self._status: Any = console.status("loading") if console.is_terminal else None
        if self._status:
            self._status.start()
        return self

    def stage(self, text: str) -> None:
        if self._status:
            self._status.update(text)

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()
