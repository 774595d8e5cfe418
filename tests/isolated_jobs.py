"""What the tests of `flataudit.isolation` run in a child: functions of (arguments, progress)."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from flataudit import errors


def echo(asked, progress):
    for values in asked.get("progress", []):
        progress(*values)
    return asked


def raises(name, progress):
    class OurOwn(errors.NumericalError):
        """Known here only."""

    kinds = {"SystemExit": SystemExit, "KeyboardInterrupt": KeyboardInterrupt, "OurOwn": OurOwn}
    kinds |= {"MemoryError": MemoryError, "RuntimeError": RuntimeError}
    raise kinds.get(name, getattr(errors, name, None))("expected a\n, got b")


def crash(how, progress):
    for stream, text in ((sys.stdout, "on stdout"), (sys.stderr, "last words")):
        stream.write(f"{text}\n")
        stream.flush()
    {
        "abort": os.abort,
        "segfault": lambda: ctypes.string_at(0),
        "exit": lambda: os._exit(9),
        "exit well": lambda: os._exit(0),
        "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    }[how]()


def result(name, progress):
    loop = []
    loop.append(loop)
    return {
        "set": {1},
        "nan": [float("nan")],
        "inf": float("-inf"),
        "function": result,
        "loop": loop,
        "bytes": b"a",
    }[name]


def chatter(n_bytes, progress):
    for stream in (sys.stdout, sys.stderr):
        for _ in range(n_bytes // 1000):
            stream.write("x" * 999 + "\n")
        stream.flush()
    os.write(1, b"to the descriptor")
    return "done"


def where(_, progress):
    """What a child sees of its surroundings."""
    return {
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "path": sys.path,
        "modules": sorted(sys.modules),
        "temporary": tempfile.gettempdir(),
        "argv": sys.argv,
        "stdin": sys.stdin.read(),
        "pids": [os.getpid(), os.getppid()],
    }


def litter(folder, progress):
    """Changes all that a child can change of its own process, and leaves files and a process."""
    os.chdir(folder)
    os.environ["LITTER"] = "1"
    os.environ.pop("HOME", None)
    Path(folder, "littered.py").write_text("VALUE = 1\n")
    sys.path.insert(0, folder)
    __import__("littered")
    sys.modules["flataudit.errors"] = None
    os.umask(0o777)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    kept = [tempfile.mkdtemp(), tempfile.mkstemp()[1]]
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    return {"files": kept, "pid": child.pid}


def hang(file, progress):
    """Never returns, nor does a process in a session of its own; their pids go to `file`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    grandchild = subprocess.run(
        ["sh", "-c", "sleep 1000 >/dev/null 2>&1 & echo $!"], capture_output=True, text=True
    )
    part = Path(f"{file}.part")
    part.write_text(f"{os.getpid()} {child.pid} {grandchild.stdout.strip()}")
    part.replace(file)
    progress("hanging")
    while True:
        time.sleep(1000)


def hold(asked, progress):
    """Fills so many bytes, here or in a child."""
    if asked.get("fork"):
        pid = os.fork()
        if pid:
            os.waitpid(pid, 0)
            return "the child has gone"
    kept = []
    for _ in range(asked["n_bytes"] // 10**7):
        kept.append(b"x" * 10**7)
    if asked.get("fork"):
        time.sleep(1000)
    return len(kept)


def share(n_bytes, progress):
    """Fills so many bytes once, then has four children read them for a while."""
    kept = b"x" * n_bytes
    for _ in range(4):
        if os.fork() == 0:
            kept.count(b"y")
            time.sleep(0.3)
            os._exit(0)
    for _ in range(4):
        os.wait()
    return len(kept)


def meet(asked, progress):
    """Returns only where another call runs at the same time."""
    mine, other = asked
    Path(mine).touch()
    end = time.monotonic() + 60
    while not Path(other).exists():
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


def wait_for(file, progress):
    progress(os.getppid())
    while not Path(file).exists():
        time.sleep(0.01)
    return True


def forks_and_returns(_, progress):
    return "first" if os.fork() else "second"


def leaves_a_thread(_, progress):
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return "done"


def garbage(_, progress):
    for fd in range(3, 40):
        try:
            os.write(fd, b'\x00\xff{"answer"\n[1]\n')
        except OSError:
            continue
    return "done"


def closes_everything(_, progress):
    os.closerange(0, 100)
    return "done"


def threads(_, progress):
    import torch

    a = torch.ones(700, 700)
    assert float((a @ a)[0, 0]) == 700.0
    return torch.get_num_threads()


# --- for processes that call ----------------------------------------------------------------------


def calls(queue):
    """In a process of its own, whatever its kind."""
    from flataudit import isolation

    queue.put(isolation.run("tests.isolated_jobs:echo", {"a": 1}))
    queue.put(multiprocessing.current_process().daemon)


def saves(path, progress):
    """Waits; writes what it has when it is interrupted."""
    try:
        progress("waiting")
        time.sleep(60)
    except KeyboardInterrupt:
        Path(path).write_text("kept")


def deaf(path, progress):
    """Waits, whatever interrupts it."""
    Path(path).write_text(str(os.getpid()))
    progress("waiting")
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            continue


def hold_mb(arguments, progress):
    """Holds so many MB for a moment."""
    held = b"x" * (arguments["mb"] * 10**6)
    return len(held)
