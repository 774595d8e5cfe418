"""Calls through the server: it is started once per process, and handed a connection per call."""

from __future__ import annotations

import atexit
import os
import re
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any

from flataudit.isolation.messages import Late, parsed, python

Json = dict[str, Any]

# Read when a library is loaded: a server that was started under other values cannot serve.
AT_IMPORT = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|BLIS|NUMEXPR|TORCH|PYTORCH|CUDA)_.*")
PATIENCE = 2.0  # seconds that an ended call waits for its processes to be gone
POLL = 0.5  # seconds after which a waiting thread can be interrupted by an exception from another


@dataclass
class _Server:
    process: subprocess.Popen[bytes]
    control: socket.socket
    said: IO[bytes]  # its stderr
    key: object


_lock = threading.Lock()
_server: _Server | None = None
_retired: list[_Server] = []
_connections: set[socket.socket] = set()


@contextmanager
def call(request: Json, line: bytes, ends: float | None) -> Iterator[Iterator[Json]]:
    """The messages of the call that `line` asks for; Late among them where it `ends`."""
    connection, theirs = socket.socketpair()
    _connections.add(connection)
    try:
        with theirs:
            server = _hand_over(theirs, request["preload"])
        try:
            connection.settimeout(_left(ends))
            with suppress(ConnectionError):  # a server that died: no message will come
                connection.sendall(line)
            yield _messages(connection, ends, server)
        except BaseException:
            _stop(connection)
            raise
    finally:
        _connections.discard(connection)
        connection.close()


def prestart(preload: Sequence[str]) -> None:
    """Starts the server, if there is none."""
    _serving(preload)


def _messages(connection: socket.socket, ends: float | None, server: _Server) -> Iterator[Json]:
    line, ended = bytearray(), False
    while True:
        left = _left(ends)
        connection.settimeout(POLL if left is None else min(left, POLL))
        try:
            chunk = connection.recv(1 << 16)
        except TimeoutError:
            continue
        except ConnectionError:
            break
        if not chunk:
            break
        line += chunk
        if b"\n" in chunk:
            *lines, line = line.split(b"\n")
            for message in filter(None, map(parsed, lines)):
                ended = ended or "ended" in message
                yield message
    if ended:
        return
    with suppress(subprocess.TimeoutExpired):  # its connections close a moment before it is gone
        server.process.wait(PATIENCE)
        server.said.seek(0)
        said = server.said.read().decode(errors="replace")
        yield {"ended": {"code": server.process.returncode, "output": said}}


def _left(ends: float | None) -> float | None:
    """Seconds until then; Late where it has passed."""
    left = None if ends is None else ends - time.monotonic()
    if left is not None and left <= 0:
        raise Late
    return left


def _stop(connection: socket.socket) -> None:
    """Hangs up, on which the keeper ends all, and waits a little until it has."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(PATIENCE)
        while connection.recv(1 << 16):
            pass


def _hand_over(theirs: socket.socket, preload: Sequence[str]) -> _Server:
    """Sends one end of a connection to the server; to a new one where it has died meanwhile."""
    for last in (False, True):
        server = _serving(preload)
        try:
            socket.send_fds(server.control, [b"+"], [theirs.fileno()])
            return server
        except OSError:
            if last:
                raise
            server.process.wait(PATIENCE)
    raise AssertionError("not reached")


def _serving(preload: Sequence[str]) -> _Server:
    """The server of this process; a new one where there is none, or other modules are asked for."""
    global _server
    key = (tuple(preload), sorted(item for item in os.environ.items() if AT_IMPORT.match(item[0])))
    with _lock:
        if _server is not None and (_server.process.poll() is not None or _server.key != key):
            _server.control.close()  # it ends after its last call
            _retired.append(_server)
            _server = None
        if _server is None:
            _server = _started(key, preload)
        return _server


def _started(key: object, preload: Sequence[str]) -> _Server:
    ours, theirs = socket.socketpair()
    said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the server)
    with theirs:
        process = subprocess.Popen(
            python("flataudit.isolation.server:serve", theirs.fileno(), list(preload)),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for this process alone
        )
    return _Server(process, ours, said, key)


def _forget() -> None:
    """In a fork of this process: its servers and connections are not this one's."""
    global _lock, _server
    for server in [*_retired, *([_server] if _server else [])]:
        server.control.close()
        server.process.returncode = 0  # nothing to wait for
    for connection in _connections:
        connection.close()
    _lock, _server = threading.Lock(), None
    _retired.clear()
    _connections.clear()


@atexit.register
def _close() -> None:
    """Ends the servers; a call of another thread notices that nobody listens any more."""
    for server in [*_retired, *([_server] if _server else [])]:
        server.control.close()
        server.said.close()
        server.process.kill()
        server.process.wait()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
