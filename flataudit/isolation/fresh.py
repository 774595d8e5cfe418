"""Calls in a fresh interpreter each, where a fork is not safe: the imports are paid every time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

from flataudit.errors import InputError
from flataudit.isolation.messages import Late, parsed, python

Json = dict[str, Any]


@contextmanager
def call(request: Json, line: bytes, ends: float | None) -> Iterator[Iterator[Json]]:
    """The messages of the call that `line` asks for; Late among them where it `ends`."""
    if request["memory_limit"] is not None:
        raise InputError(
            f"expected no memory limit on {sys.platform}, got one; it can be kept on Linux only"
        )
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as said,
        subprocess.Popen(
            python("flataudit.isolation.worker:work_alone"),
            stdin=pipe,
            stdout=pipe,
            stderr=said,
            start_new_session=hasattr(os, "killpg"),  # a group, which is killed as a whole
        ) as process,
    ):
        late = threading.Event()
        left = threading.TIMEOUT_MAX if ends is None else max(0.0, ends - time.monotonic())
        timer = threading.Timer(left, _end, [process, late])
        timer.daemon = True
        timer.start()
        try:
            yield _messages(process, line, said, late, request["debug"])
        finally:
            timer.cancel()
            _end(process)


def prestart(preload: Sequence[str]) -> None:
    """Nothing can be done ahead."""


def _end(process: subprocess.Popen[bytes], late: threading.Event | None = None) -> None:
    if late is not None:
        late.set()
    with suppress(OSError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _messages(
    process: subprocess.Popen[bytes],
    line: bytes,
    said: IO[bytes],
    late: threading.Event,
    debug: bool,
) -> Iterator[Json]:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(OSError):
        process.stdin.write(line)
        process.stdin.flush()
    yield from filter(None, map(parsed, process.stdout))
    process.wait()
    if late.is_set():
        raise Late
    said.seek(0)
    output = said.read().decode(errors="replace")
    if debug:
        yield {"output": output}
    yield {"ended": {"code": process.returncode, "output": output[-2000:]}}
