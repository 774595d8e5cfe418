"""One line of log per stage of an audit: its start, and its end with seconds, model and run.

The lines go to the stdlib logger `flataudit.stages` and are silent until something listens: the
command line where FLATAUDIT_LOG is set, Prefect in a flow. With FLATAUDIT_LOG=json the line is one
JSON object, wherever it ends up. The core never logs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flataudit.errors import InputError, printable
from flataudit.store import one_line, without_password

VARIABLE = "FLATAUDIT_LOG"
FORMATS = ("text", "json")
LINE = "%(asctime)s %(levelname)s %(message)s"

log = logging.getLogger("flataudit.stages")
log.addHandler(logging.NullHandler())  # else Python shows errors on stderr where nobody listens


def log_format() -> str | None:
    """What FLATAUDIT_LOG asks for: text, json, or nothing.

    Raises:
        InputError: neither of these.
    """
    asked = os.environ.get(VARIABLE) or None
    if asked not in (None, *FORMATS):
        raise InputError(f"expected {VARIABLE} to be text or json, got {asked!r}")
    return asked


def listen() -> None:
    """The command line's part: the lines on stderr where FLATAUDIT_LOG asks for them.

    Else the package's warnings alone: what a command prints says how its stages ended.
    """
    asked = log_format()
    if asked is None:
        package = logging.getLogger("flataudit")
        package.addHandler(_warnings)
        package.propagate = False  # MLflow may give the root a handler, which shows every line
        return
    to_stderr("flataudit", "%(message)s" if asked == "json" else LINE)


def to_stderr(name: str, form: str) -> None:
    """The lines of a logger and those below it go to stderr, and nowhere else."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form))
    ours = logging.getLogger(name)
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    ours.propagate = False  # handlers of others would print each line again


class _Warnings(logging.Handler):
    """The package's warnings on whatever stderr is then, but no lines of the stages."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != log.name:
            sys.stderr.write(f"{self.format(record)}\n")


_warnings = _Warnings(logging.WARNING)


@contextmanager
def stage(name: str, uri: str) -> Iterator[dict[str, Any]]:
    """Logs the start and the end of a stage; what the block puts into the mapping ends the line.

    A stage that fails ends with a line of level ERROR, and its exception goes on.
    """
    started, more = time.perf_counter(), {}  # type: float, dict[str, Any]
    _say(logging.INFO, name, "start", uri)
    try:
        yield more
    except BaseException as error:
        seconds = time.perf_counter() - started
        _say(logging.ERROR, name, "failed", uri, seconds=seconds, error=one_line(error))
        raise
    _say(logging.INFO, name, "end", uri, seconds=time.perf_counter() - started, **more)


def _say(level: int, name: str, event: str, uri: str, **more: Any) -> None:
    if not log.isEnabledFor(level):
        return
    fields: dict[str, Any] = {"stage": name, "event": event, "uri": without_password(uri)}
    fields |= {key: round(v, 3) if isinstance(v, float) else v for key, v in more.items()}
    if os.environ.get(VARIABLE) == "json":
        text = json.dumps(fields)
    else:
        shown = "".join(f" {key}={value}" for key, value in fields.items() if key in more)
        text = printable(f"{name} {event} {fields['uri']}{shown}")
    log.log(level, "%s", text, extra={"flataudit": fields})
