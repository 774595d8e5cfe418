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

import typer

from flataudit.errors import FlatauditError, InputError

app = typer.Typer(
    help="Audits a registered model: how much worse it will do on unseen data, and whether to"
    " rely on that prediction.",
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
            help="training data: file.npz (x, y; or y and inputs by name), .csv or .parquet with"
            " --target, module:function, or mlflow (the source run's dataset)",
            show_default=False,
        ),
    ],
    heldout: Annotated[
        str, typer.Option(help="data never used in training: judges calibration")
    ] = "",
    target: Annotated[str, typer.Option(help="target column of tables")] = "",
    family: Annotated[
        str, typer.Option(help="auto, categorical, bernoulli, gaussian or poisson")
    ] = "",
    penalty: Annotated[str, typer.Option(help="auto, or the weight decay of the mean loss")] = "",
    dispersion: Annotated[str, typer.Option(help="auto, or the Gaussian variance")] = "",
    training: Annotated[
        str, typer.Option(help="training record: auto (the source run), FILE or KEY=VALUE,...")
    ] = "",
    curvature: Annotated[str, typer.Option(help="ggn")] = "",
    solver: Annotated[str, typer.Option(help="auto, primal or dual")] = "",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "",
    sensitivity: Annotated[
        str, typer.Option(help="estimates at a third and three times the penalty: auto, on or off")
    ] = "",
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
        "family": family,
        "penalty": _number(penalty),
        "dispersion": _number(dispersion),
        "training": training,
        "curvature": curvature,
        "solver": solver,
        "device": device,
        "sensitivity": sensitivity,
        "deadline": deadline,
        "tracking_uri": tracking_uri,
    }
    given = {key: value for key, value in given.items() if value not in (None, "")}
    options = make_options({**from_file, **given}, "the options")
    if json_file not in ("", "-"):
        _check_writable(Path(json_file))
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
        code = app(sys.argv[1:] or ["--help"], prog_name="flataudit", standalone_mode=False)
    except FlatauditError as error:
        code = _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted", 130)
    except Exception as error:
        code = _fail(*_explained(error))
    sys.exit(code if isinstance(code, int) else 0)


def _explained(error: Exception) -> tuple[str, int]:
    """One line and the exit code for a command line that does not parse, or for a bug."""
    message: Any = getattr(error, "format_message", None)  # of typer's errors, whatever their base
    if message is not None:
        context = getattr(error, "ctx", None)
        command = "flataudit" if context is None else context.command_path
        return f"{message().rstrip('.')}; see {command} --help", 2
    if os.environ.get("FLATAUDIT_DEBUG"):
        raise error
    return (
        f"expected the command to complete, got {type(error).__name__}: {error}; set"
        " FLATAUDIT_DEBUG=1 for the traceback"
    ), 3


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


def _check_writable(path: Path) -> None:
    """InputError, before any work, where the report could not be written to `path`."""
    if path.is_dir():
        raise InputError(
            f"expected --json to name a file, got the folder {path}; name a file in it"
        )
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise _not_writable(path, error) from None


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    try:
        _part(path).write_text(text, encoding="utf-8")
        os.replace(_part(path), path)
    except OSError as error:
        raise _not_writable(path, error) from None


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"expected --json to name a writable file in an existing folder, got {path}:"
        f" {error.strerror}; choose another"
    )


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
