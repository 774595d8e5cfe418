"""The process that runs one call: it takes its request's environment, calls, answers and ends."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from flataudit.errors import FlatauditError

Json = dict[str, Any]

_PR_SET_PDEATHSIG = 1


def work_below(request: Json, keeper: int, messages: int, output: int) -> NoReturn:
    """The worker of a keeper, in a process group of its own; it dies with the keeper."""
    try:
        os.setpgid(0, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the server inherited
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == keeper:
            with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
                score.write("500")  # if memory is out, this process goes and not who asked for it
            _work(request, messages, output)
    finally:
        os._exit(70)  # only reached where something above is broken


def work_alone() -> NoReturn:
    """A worker without server and keeper: the request on stdin, messages to stdout.

    It ends when stdin is closed. For systems where a fork is not safe.
    """
    request = json.loads(sys.stdin.buffer.readline())
    asked, messages = os.dup(0), os.dup(1)

    def end_with_the_parent() -> None:
        while os.read(asked, 1):
            pass
        os._exit(1)

    threading.Thread(target=end_with_the_parent, daemon=True).start()
    _work(request, messages, os.dup(2))


def _work(request: Json, messages: int, output: int) -> NoReturn:
    """Runs the function as the request says, and ends the process without any further ado."""
    _settle(request, output)
    worker = os.getpid()

    def progress(*values: Any) -> None:
        _write(messages, as_line({"progress": values}))

    outcome = _outcome(request, progress)
    if os.getpid() == worker:  # and not a fork of the model's code that came back
        _write(messages, outcome)
    # Neither handlers at exit nor threads of the model's code can hold the process up.
    os._exit(0)


def _settle(request: Json, output: int) -> None:
    """Folder, environment, import path and standard streams, as the request wants them."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd, to in ((null, 0), (output if request["debug"] else null, 1), (output, 2)):
        os.dup2(fd, to)
    with suppress(ImportError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no dump behind
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # found anew, from the environment
    if request["folder"] is not None:
        os.chdir(request["folder"])
    sys.path[:] = request["path"]
    importlib.invalidate_caches()
    sys.argv[:] = [""]
    warnings.simplefilter("default" if request["debug"] else "ignore")
    if request["debug"]:
        import faulthandler

        faulthandler.enable()


def _outcome(request: Json, progress: Callable[..., None]) -> bytes:
    """The line with the function's answer, or with its error by class."""
    name = request["name"]
    try:
        module, _, function = request["function"].partition(":")
        called = getattr(importlib.import_module(module), function)
        answer = called(request["arguments"], progress)
        try:
            return as_line({"answer": answer, "peak_bytes": _peak_bytes()})
        except (TypeError, ValueError, RecursionError) as error:
            return _error(f"expected {name} to give plain JSON values, got {_text(error)}")
    except FlatauditError as error:
        return as_line({"error": type(error).__name__, "message": str(error)})
    except BaseException as error:  # SystemExit and KeyboardInterrupt of foreign code as well
        if request["debug"]:
            traceback.print_exc()
        return _error(
            f"expected {name} to complete, got {_text(error)}; set FLATAUDIT_DEBUG=1 for the"
            " traceback"
        )


def _peak_bytes() -> int | None:
    """The most RAM that this process or one of its ended children held, shared pages included."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return unit * max(resource.getrusage(of).ru_maxrss for of in who)


def _error(message: str) -> bytes:
    return as_line({"error": "AuditFailedError", "message": message})


def _text(error: BaseException) -> str:
    reason = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


def as_line(message: Json) -> bytes:
    return json.dumps(message, allow_nan=False).encode() + b"\n"


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
