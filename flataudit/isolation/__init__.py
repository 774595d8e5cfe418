"""Runs a function by name in a child process that can be stopped, and may crash or leak.

On Linux the child is forked by a server that has the heavy modules imported already
(`server`); elsewhere a fresh interpreter is started. What the child does to its
environment, working folder, import path, modules and temporary files is gone with it. It runs as
the same user: this is no sandbox.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flataudit import errors
from flataudit.errors import AuditFailedError, DeadlineError, FlatauditError, MemoryLimitError
from flataudit.isolation.messages import Late

if sys.platform == "linux":
    from flataudit.isolation import forked as children
else:
    from flataudit.isolation import fresh as children

Json = dict[str, Any]
Progress = Callable[..., None]


def run(
    function: str,
    arguments: Any,
    *,
    deadline: float | None = None,
    spent: float = 0.0,
    memory_limit: int | None = None,
    grace: float = 0.0,
    progress: Progress | None = None,
    preload: Sequence[str] = (),
    name: str = "the call",
    used: dict[str, int] | None = None,
) -> Any:
    """What `function(arguments, progress)` returns in a child process.

    The child has the caller's environment, import path and working folder as they are now; its
    stdout goes nowhere, its temporary files are removed. It ends, with all processes that it
    started, at the deadline, beyond the memory limit, and when the caller is interrupted or dies.

    Args:
        function: `module:function`, importable in the child; called with `arguments` and a
            function that hands its arguments to `progress`.
        arguments: Plain JSON, as is the result, which holds no NaN or infinity.
        deadline: Seconds, the start of the child included.
        spent: How many of them are gone already.
        memory_limit: Bytes that the child and its descendants may hold in RAM.
        grace: Seconds between a KeyboardInterrupt in the child and its end by force, where it is
            stopped: for a function that saves what it has.
        progress: Called in this process, in the calling thread.
        preload: Modules that the server imports before the first call.
        name: What the errors call it.
        used: Gets `peak_bytes`, the most RAM that the child held, where the system tells it.

    Raises:
        FlatauditError: the function's own, by class.
        AuditFailedError: it raised anything else, crashed, or gave what is not JSON.
        DeadlineError, MemoryLimitError: it was stopped.
        InputError: a memory limit where none can be kept.
    """
    ends = None if deadline is None else time.monotonic() + deadline - spent
    scratch = tempfile.mkdtemp(prefix="flataudit-")
    places = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), scratch)
    request = {
        "function": function,
        "arguments": arguments,
        "name": name,
        "folder": _folder(),
        "path": [str(entry) for entry in sys.path],
        "environment": dict(os.environ) | places,
        "scratch": scratch,
        "memory_limit": memory_limit,
        "grace": grace,
        "debug": bool(os.environ.get("FLATAUDIT_DEBUG")),
        "preload": list(preload),
    }
    try:
        line = json.dumps(request).encode() + b"\n"
        with children.call(request, line, ends) as messages:
            return _answer(messages, progress, name, memory_limit, used)
    except Late:
        raise DeadlineError(
            f"expected {name} to end within {deadline:g} s, got no result by then and stopped it;"
            " raise --deadline or audit fewer samples"
        ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def prestart(preload: Sequence[str]) -> None:
    """Lets the server import `preload` while this process does something else."""
    children.prestart(preload)


def _folder() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # removed under this process
        return None


def _answer(
    messages: Iterable[Json],
    progress: Progress | None,
    name: str,
    limit: int | None,
    used: dict[str, int] | None,
) -> Any:
    """The answer among the messages; an error, once the child has ended, where there is none."""
    found: Json = {}
    ended: Json = {}
    for message in messages:
        if "progress" in message:
            if progress is not None:
                progress(*message["progress"])
        elif "output" in message:
            sys.stderr.write(message["output"])
        elif "ended" in message:
            ended = message["ended"]
        else:
            found = message
    if ended.get("peak") is not None:
        raise MemoryLimitError(
            f"expected {name} to stay within {_gb(limit or 0)} of memory, got {_gb(ended['peak'])}"
            " and stopped it; raise --memory-limit or audit fewer samples"
        )
    if "answer" in found:
        if used is not None and found.get("peak_bytes") is not None:
            used["peak_bytes"] = found["peak_bytes"]
        return found["answer"]
    if "error" in found:
        kind = getattr(errors, str(found["error"]), AuditFailedError)
        if not (isinstance(kind, type) and issubclass(kind, FlatauditError)):
            kind = AuditFailedError
        raise kind(str(found.get("message")))
    raise AuditFailedError(_crashed(ended, name))


def _crashed(ended: Json, name: str) -> str:
    code = ended.get("code")
    if code is None:
        how = "the end"
    elif code >= 0:
        how = f"exit code {code}"
    else:
        how = f"signal {-code} ({signal.strsignal(-code) or 'unknown'})"
    said = [line.strip() for line in str(ended.get("output", "")).splitlines() if line.strip()]
    last = f": {' | '.join(said[-3:])[-300:]}" if said else ""
    likely = (
        "likely out of memory" if code == -9 else "likely a crash of the model's or data's code"
    )
    return f"expected a result of {name}, got {how} of its process{last}; {likely}"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"
