"""The server that forks, and the keeper of each call.

The server imports what every call needs, runs nothing, and forks a keeper for each connection it
is handed. The keeper forks the worker, passes on what it says, watches its memory, and ends it and
all its descendants when it is done or nobody listens any more.

Messages are lines of JSON: {progress}, {answer} or {error, message} from the worker; {output}
(in debug mode) and at last {ended} from the keeper.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from flataudit.isolation.worker import as_line, work_below
from flataudit.processes import descendants, proportional_bytes, resident_bytes

Json = dict[str, Any]

WATCH = 0.025  # seconds between two looks at the memory: 50 MB more, where 2 GB/s are filled
IDLE = 0.1  # seconds between two looks at the worker, where it does not wake the keeper itself
TAIL = 2000  # bytes kept of what the worker wrote to stderr
CHUNK = 1 << 16

_PR_SET_CHILD_SUBREAPER = 36


def serve(control_fd: int, modules: list[str]) -> None:
    """Imports `modules`, then forks a keeper for each connection sent over the control socket.

    Ends when its other end is closed, after the keepers. No tensor operation ever runs here: its
    threads would not exist in the children.
    """
    warnings.simplefilter("ignore")
    for name in modules:
        with suppress(Exception):  # what cannot be imported fails in the call that needs it
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children share these pages as long as no collection writes to them
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers leave no zombies
    with socket.socket(fileno=control_fd) as control:
        while True:
            asked, fds, _, _ = socket.recv_fds(control, 1, 1)
            if not asked:
                break
            connection = socket.socket(fileno=fds[0])
            if os.fork() == 0:
                try:
                    control.close()
                    _keep(connection)
                finally:
                    os._exit(0)
            connection.close()
    with suppress(ChildProcessError):
        os.wait()  # with SIGCHLD ignored it returns when the last one has gone


# --- the keeper ---------------------------------------------------------------------------------


def _keep(connection: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # Orphans among the worker's descendants become the keeper's children, so that it finds them.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with connection.makefile("rb") as lines:
        request = json.loads(lines.readline())
    if _hung_up(connection):  # past the deadline while the modules were still being imported
        return
    messages, messages_end = os.pipe()
    output, output_end = os.pipe()
    worker = os.fork()
    if worker == 0:
        connection.close()
        work_below(request, os.getppid(), messages_end, output_end)
    os.close(messages_end)
    os.close(output_end)
    watch = _Watch(connection, worker, messages, output, request)
    try:
        watch.until_it_ends()
    except OSError:  # nobody reads any more
        watch.heard = False
    if request["grace"] and not watch.heard:
        _interrupt(worker, request["grace"])
    _end_all(worker)
    if watch.heard:
        with suppress(OSError):
            watch.tell_the_end()
    else:
        shutil.rmtree(request["scratch"], ignore_errors=True)


class _Watch:
    """Passes on what the worker says, until it, its memory or its reader ends."""

    def __init__(
        self, connection: socket.socket, worker: int, messages: int, output: int, request: Json
    ) -> None:
        self.connection, self.worker = connection, worker
        self.messages, self.output = messages, output
        self.limit: int | None = request["memory_limit"]
        self.debug: bool = request["debug"]
        self.heard = True  # whether somebody still reads the connection
        self.code: int | None = None  # exit code of the worker, or minus the signal
        self.peak: int | None = None  # bytes, where they were too many
        self._line, self._tail = bytearray(), b""

    def until_it_ends(self) -> None:
        tick = IDLE if self.limit is None else WATCH
        sources: list[Any] = [self.connection, self.messages, self.output]
        while self.code is None and self.peak is None:
            ready, _, _ = select.select(sources, [], [], tick)
            if self.connection in ready and _hung_up(self.connection):
                self.heard = False
                return
            for fd, take in ((self.messages, self._pass_on), (self.output, self._note)):
                if fd in ready and not self._read(fd, take):
                    sources.remove(fd)
            self.peak = self._too_much()
            pid, status = os.waitpid(self.worker, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        for fd, take in ((self.messages, self._pass_on), (self.output, self._note)):
            while select.select([fd], [], [], 0)[0] and self._read(fd, take):
                pass

    def tell_the_end(self) -> None:
        output = self._tail.decode(errors="replace")
        ended = {"code": self.code, "peak": self.peak, "output": output}
        self.connection.sendall(as_line({"ended": ended}))

    def _read(self, fd: int, take: Callable[[bytes], None]) -> bool:
        chunk = os.read(fd, CHUNK)
        take(chunk)
        return bool(chunk)

    def _pass_on(self, chunk: bytes) -> None:
        """Whole lines only: the keeper's own messages go between them."""
        end = chunk.rfind(b"\n") + 1
        if not end:
            self._line += chunk
            return
        self.connection.sendall(bytes(self._line) + chunk[:end])
        self._line = bytearray(chunk[end:])

    def _note(self, chunk: bytes) -> None:
        self._tail = (self._tail + chunk)[-TAIL:]
        if self.debug and chunk:
            self.connection.sendall(as_line({"output": chunk.decode(errors="replace")}))

    def _too_much(self) -> int | None:
        if self.limit is None:
            return None
        pids = [self.worker, *descendants(self.worker)]
        if sum(map(resident_bytes, pids)) <= self.limit:  # an upper bound, which costs nothing
            return None
        held = sum(map(proportional_bytes, pids))
        return held if held > self.limit else None


def _hung_up(connection: socket.socket) -> bool:
    """Whether the other end was closed; it never sends more than the request."""
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _interrupt(worker: int, grace: float) -> None:
    """KeyboardInterrupt in the worker, and as many seconds for what it does on it."""
    end = time.monotonic() + grace
    with suppress(OSError):
        os.kill(worker, signal.SIGINT)
    while time.monotonic() < end and not os.waitpid(worker, os.WNOHANG)[0]:
        time.sleep(0.01)


def _end_all(worker: int) -> None:
    """SIGKILL to the worker's group and to all that descends from it, whatever group it is in."""
    end = time.monotonic() + 5.0  # a process in a system call that hangs cannot be waited for
    with suppress(OSError):
        os.killpg(worker, signal.SIGKILL)
    while time.monotonic() < end:
        for pid in descendants(os.getpid()):
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            time.sleep(0.002)
