"""The command line: one file per command, each a thin shell; errors become one line and a code.

Exit codes: 0 done; 1 the gate refused; 2 bad input or unsupported model (one line on stderr); 3 the
audit failed, ran past its deadline, or a store could not be used.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import typer

from flataudit.cli import audit, audits, compare, demo, gate, observe, run, serve, webhook
from flataudit.errors import FlatauditError
from flataudit.logs import VARIABLE, listen

app = typer.Typer(
    help="Audits a registered model: how much worse it will do on unseen data, and whether to"
    " rely on that prediction.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Each command's file imports nothing heavy before it runs.
app.command()(audit.audit)
app.command()(gate.gate)
app.command()(compare.compare)
app.command()(observe.observe)
app.command()(observe.track_record)
app.add_typer(audits.audits, name="audits")
app.command()(run.run)
app.command()(serve.serve)
app.command()(demo.demo)
app.add_typer(webhook.app, name="webhook")


def main() -> None:
    """The console script: runs a command and turns errors into one line and an exit code."""
    _quiet()
    try:
        listen()
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
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "CRITICAL")
    if not os.environ.get(VARIABLE):
        # The lines of the stages reach Prefect's server all the same, but not the terminal.
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    for name in ("alembic", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
