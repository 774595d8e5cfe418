"""Child processes: what comes back from them, how they end, and what they cannot change."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flataudit import errors, isolation, processes
from flataudit.errors import AuditFailedError, DeadlineError, InputError, MemoryLimitError
from flataudit.isolation import forked, fresh
from tests.shells import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")

GB = 10**9


def run(job, arguments=None, **more):
    return isolation.run(f"tests.isolated_jobs:{job}", arguments, **more)


def soon(holds, seconds=30.0):
    """Whether `holds()` comes true within so many seconds."""
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def gone(pid):
    """Whether a process has ended; one that only waits for its parent has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def all_gone(pids):
    return soon(lambda: all(gone(pid) for pid in pids))


def pids_in(file):
    assert soon(file.exists)
    found = [int(pid) for pid in file.read_text().split()]
    assert len(found) == 3
    return found


@pytest.fixture
def temporary(monkeypatch, tmp_path):
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# --- what comes back ----------------------------------------------------------------------------


def test_an_answer_and_its_progress():
    asked = {"text": "ä\n", "number": 0.1, "nothing": None, "progress": [["a"], ["b", 1, 20]]}
    heard = []
    assert run("echo", asked, progress=lambda *values: heard.append(values)) == asked
    assert heard == [("a",), ("b", 1, 20)]
    assert run("echo", asked) == asked  # and nobody listens


def test_a_large_answer():
    asked = {"text": "x" * 20_000_000}
    assert run("echo", asked) == asked


@pytest.mark.parametrize(
    "name",
    ["InputError", "MemoryPlanError", "NumericalError", "AuditFailedError", "StoreError"],
)
def test_errors_keep_their_class(name):
    with pytest.raises(errors.FlatauditError) as caught:
        run("raises", name)
    assert type(caught.value) is getattr(errors, name)
    assert str(caught.value) == "expected a , got b"  # one line, as every error


@pytest.mark.parametrize("name", ["RuntimeError", "SystemExit", "KeyboardInterrupt", "MemoryError"])
def test_what_else_is_raised_is_one_line(name):
    with pytest.raises(AuditFailedError) as caught:
        run("raises", name, name="the work")
    assert str(caught.value) == (
        f"expected the work to complete, got {name}: expected a , got b; set FLATAUDIT_DEBUG=1 for"
        " the traceback"
    )


def test_an_error_class_of_the_child_alone():
    with pytest.raises(AuditFailedError, match="expected a"):
        run("raises", "OurOwn")


@pytest.mark.parametrize("name", ["set", "nan", "inf", "function", "loop", "bytes"])
def test_what_is_not_json_is_no_result(name):
    with pytest.raises(AuditFailedError, match="expected the call to give plain JSON values, got"):
        run("result", name)


def test_no_such_function():
    with pytest.raises(AuditFailedError, match="no attribute 'nothing'"):
        run("nothing")
    with pytest.raises(AuditFailedError, match="No module named 'no_such_module'"):
        isolation.run("no_such_module:run", None)


# --- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("abort", "got signal 6 (Aborted) of its process: last words; likely a crash"),
        ("segfault", "got signal 11 (Segmentation fault) of its process: last words"),
        ("exit", "got exit code 9 of its process: last words"),
        ("exit well", "got exit code 0 of its process: last words"),
        ("kill", "got signal 9 (Killed) of its process: last words; likely out of memory"),
    ],
)
def test_a_crash_says_how(how, expected, temporary, capfd):
    with pytest.raises(AuditFailedError) as caught:
        run("crash", how, name="the work")
    assert type(caught.value) is AuditFailedError
    assert str(caught.value).startswith(f"expected a result of the work, {expected}")
    assert capfd.readouterr() == ("", "")
    assert list(temporary.iterdir()) == []


def test_past_the_deadline_all_its_processes_are_killed(tmp_path, temporary):
    """Also those that ignore signals, are in sessions of their own, or have lost their parent."""
    with pytest.raises(DeadlineError, match=r"the work to end within 5 s, got no result"):
        run("hang", str(tmp_path / "pids"), deadline=5, name="the work")
    assert all_gone(pids_in(tmp_path / "pids"))
    assert list(temporary.iterdir()) == []


def test_past_the_deadline_before_it_has_begun(tmp_path):
    """While the server still imports, which counts: and then the function does not run at all."""
    (tmp_path / "slow_to_import.py").write_text("import time\ntime.sleep(1.5)\n")
    code = (
        "import pathlib, sys\n"
        "sys.path.insert(0, str(pathlib.Path.cwd()))\n"  # the server imports from there as well
        "from flataudit import isolation\n"
        "try:\n"
        "    isolation.run('tests.isolated_jobs:hang', 'pids', deadline=0.3,\n"
        "                  preload=['slow_to_import'])\n"
        "except isolation.DeadlineError as error:\n"
        "    print(error)\n"
        "print(isolation.run('tests.isolated_jobs:echo', {}, preload=['slow_to_import']))\n"
        "print(pathlib.Path('pids').exists())\n"
    )
    done = python(code, tmp_path)
    assert done[0].startswith("expected the call to end within 0.3 s")
    assert done[1:] == ["{}", "False"]


def test_what_it_leaves_running_ends_with_it(tmp_path):
    assert run("leaves_a_thread") == "done"
    left = run("litter", str(tmp_path))
    assert all_gone([left["pid"]])


def test_beyond_the_memory_limit_it_is_stopped():
    with pytest.raises(MemoryLimitError) as caught:
        run("hold", {"n_bytes": 20 * GB}, memory_limit=GB // 2, name="the work")
    message = str(caught.value)
    assert message.startswith("expected the work to stay within 0.50 GB of memory, got ")
    peak = float(message.partition(", got ")[2].partition(" GB")[0])
    assert 0.5 <= peak < 2.0
    assert caught.value.exit_code == 3


def test_memory_of_its_children_counts():
    with pytest.raises(MemoryLimitError):
        run("hold", {"n_bytes": GB, "fork": True}, memory_limit=GB // 2, deadline=60)


def test_within_the_memory_limit_nothing_happens():
    assert run("hold", {"n_bytes": GB // 4}, memory_limit=GB // 2) == 25


def test_pages_that_processes_share_count_once():
    """The sum of what each process has in RAM is above the limit here; what they use is not."""
    assert run("share", 200_000_000, memory_limit=600_000_000) == 200_000_000


def test_an_interrupt_ends_it(tmp_path):
    """As does anything else that is raised in the caller, here by `progress`."""

    def interrupt(text):
        assert text == "hanging"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("hang", str(tmp_path / "pids"), progress=interrupt)
    assert all_gone(pids_in(tmp_path / "pids"))


def test_with_grace_it_can_save_what_it_has(tmp_path):
    def interrupt(text):
        raise KeyboardInterrupt

    path = tmp_path / "saved"
    with pytest.raises(KeyboardInterrupt):
        run("saves", str(path), progress=interrupt, grace=30.0)
    assert path.read_text() == "kept"


def test_at_the_deadline_too(tmp_path):
    path = tmp_path / "saved"
    run("echo", {})  # the server's imports are not what takes too long
    with pytest.raises(DeadlineError):
        run("saves", str(path), deadline=3.0, grace=30.0)
    assert path.read_text() == "kept"


def test_grace_ends(tmp_path):
    def interrupt(text):
        raise KeyboardInterrupt

    path = tmp_path / "pids"
    with pytest.raises(KeyboardInterrupt):
        run("deaf", str(path), progress=interrupt, grace=0.2)
    assert all_gone([int(path.read_text())])


def test_a_thread_that_waits_for_it_can_be_interrupted(tmp_path):
    """As Prefect stops a task that runs in a thread: by an exception from another thread."""
    import ctypes

    ended = []

    def call():
        try:
            run("hang", str(tmp_path / "pids"))
        except ZeroDivisionError as error:
            ended.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    pids = pids_in(tmp_path / "pids")
    raised = ctypes.py_object(ZeroDivisionError)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), raised)
    thread.join(30)
    assert len(ended) == 1
    assert all_gone(pids)


HANGS = (
    "import signal, sys\n"
    # Where the tests run in a shell's background, SIGINT is ignored and handed down so.
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from flataudit import isolation\n"
    "isolation.run('tests.isolated_jobs:hang', sys.argv[1])\n"
)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_caller(how, tmp_path):
    """Killed, ended, or by Ctrl-C, which a terminal sends to the caller's whole group."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    parent = subprocess.Popen(
        [sys.executable, "-c", HANGS, str(tmp_path / "pids")],
        env=environment(TMPDIR=str(folder)),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        pids = pids_in(tmp_path / "pids")
        (server,) = processes.descendants(parent.pid)[:1]
        assert not any(gone(pid) for pid in (*pids, server))
    finally:
        os.killpg(parent.pid, how)
        assert parent.wait(30) != 0
    assert all_gone([*pids, server])
    assert soon(lambda: list(folder.iterdir()) == [])


def test_it_outlives_the_server_but_not_its_keeper(tmp_path):
    """A call in progress goes on where the server dies; the next one starts another."""
    run("echo", {})
    server = forked._server.process
    keepers = []

    def kill(keeper):
        keepers.append(keeper)
        server.kill()
        server.wait()
        (tmp_path / "go").touch()

    assert run("wait_for", str(tmp_path / "go"), progress=kill)
    assert run("echo", {"a": 1}) == {"a": 1}
    assert forked._server.process.pid != server.pid
    with pytest.raises(AuditFailedError, match="the end of its process"):
        run("wait_for", str(tmp_path / "never"), progress=lambda pid: os.kill(pid, signal.SIGKILL))
    assert len(keepers) == 1


def test_a_server_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(forked, "_server", None)
    monkeypatch.setattr(forked, "python", lambda *_: [sys.executable, "-c", "1 / 0"])
    with pytest.raises(AuditFailedError, match="ZeroDivisionError: division by zero"):
        run("echo", {})
    forked._server.control.close()
    forked._server.said.close()


# --- what it cannot change ----------------------------------------------------------------------


def test_nothing_leaks_into_the_caller_or_the_next_call(tmp_path, temporary):
    def mine():
        here = os.getcwd(), dict(os.environ), list(sys.path), set(sys.modules), os.umask(0o22)
        os.umask(here[-1])
        return here

    before, first = mine(), run("where")
    left = run("litter", str(tmp_path))
    assert mine() == before
    assert not any(Path(file).exists() for file in left["files"])
    assert list(temporary.iterdir()) == []
    second = run("where")
    for key in ("folder", "path", "modules", "argv", "stdin"):
        assert second[key] == first[key], key
    assert "LITTER" not in second["environment"]
    assert set(first["pids"]).isdisjoint(second["pids"])


def test_modules_of_the_same_name_do_not_meet(tmp_path, monkeypatch):
    """Not even where the caller has imported a third one."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same_name.py").write_text(
            f"def name(asked, progress):\n    return {name!r}\n"
        )
    monkeypatch.syspath_prepend(str(tmp_path / "c"))
    import same_name

    assert same_name.name(None, None) == "c"
    for name in ("a", "b", "a"):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(tmp_path / name))
            assert isolation.run("same_name:name", None) == name
    assert isolation.run("same_name:name", None) == "c"
    del sys.modules["same_name"]


def test_it_sees_its_caller_as_it_is_at_the_call(tmp_path, monkeypatch, temporary):
    """Working folder, import path, and variables that were set after the server was started."""
    run("echo", {})
    server = forked._server.process.pid
    monkeypatch.setenv("FLATAUDIT_A", "1 ä \udcff")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = run("where")
    assert seen["folder"] == str(tmp_path)
    assert seen["path"] == sys.path
    assert seen["environment"]["FLATAUDIT_A"] == "1 ä \udcff"
    expected = dict(os.environ)
    for name in ("TMPDIR", "TEMP", "TMP"):
        assert seen["environment"].pop(name) == seen["temporary"]
        expected.pop(name, None)
    assert seen["environment"] == expected
    assert Path(seen["temporary"]).parent == temporary
    assert seen["stdin"] == ""
    assert forked._server.process.pid == server
    folder = tmp_path / "removed"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert run("echo", {"a": 1}) == {"a": 1}


def test_settings_that_are_read_at_import_start_another_server(tmp_path):
    code = (
        "import os\n"
        "from flataudit import isolation\n"
        "for n in ('1', '2', '2'):\n"
        "    os.environ['OMP_NUM_THREADS'] = n\n"
        "    print(isolation.run('tests.isolated_jobs:threads', None, preload=['torch']))\n"
        "    print(isolation.forked._server.process.pid)\n"
    )
    found = python(code, tmp_path)
    assert found[::2] == ["1", "2", "2"]
    assert found[1] != found[3] == found[5]


def test_stdout_and_stderr_go_nowhere(capfd):
    """However much it is: no pipe fills up."""
    assert run("chatter", 3_000_000) == "done"
    assert capfd.readouterr() == ("", "")


def test_in_debug_mode_they_are_shown_on_stderr(capfd, monkeypatch):
    monkeypatch.setenv("FLATAUDIT_DEBUG", "1")
    with pytest.raises(AuditFailedError, match="signal 6"):
        run("crash", "abort")
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "on stdout\nlast words\n" in shown.err
    assert "Fatal Python error: Aborted" in shown.err
    with pytest.raises(AuditFailedError):
        run("raises", "RuntimeError")
    assert "Traceback (most recent call last)" in capfd.readouterr().err


@pytest.mark.parametrize(("name", "answer"), [("forks_and_returns", "first"), ("garbage", "done")])
def test_one_answer_comes_back(name, answer):
    assert run(name) == answer


def test_a_child_that_cannot_answer():
    with pytest.raises(AuditFailedError, match="got exit code 70 of its process"):
        run("closes_everything")


# --- where it is called from --------------------------------------------------------------------


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | more


def python(code, folder, *options, stdin=None):
    """The lines that a fresh interpreter prints."""
    arguments = options or ["-c", code]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=environment(), input=stdin, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


SCRIPT = (
    "print('main')\n"
    "from flataudit import isolation\n"
    "print(isolation.run('tests.isolated_jobs:echo', {'a': 1}))\n"
    "print(isolation.run('tests.isolated_jobs:where', None)['pids'][0])\n"
    "print(isolation.forked._server.process.pid)\n"
)


@pytest.mark.parametrize("kind", ["script", "command", "stdin", "module"])
def test_from_any_main_without_a_guard(kind, tmp_path):
    """The caller's main is not run again, and no process is left."""
    (tmp_path / "a_script.py").write_text(SCRIPT)
    options = {"script": ["a_script.py"], "command": ["-c", SCRIPT], "stdin": ["-"],
               "module": ["-m", "a_script"]}[kind]  # fmt: skip
    found = python(None, tmp_path, *options, stdin=SCRIPT if kind == "stdin" else None)
    assert found[:2] == ["main", "{'a': 1}"]
    assert len(found) == 4
    assert all_gone([int(pid) for pid in found[2:]])


def test_two_calls_at_once_from_threads(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    with ThreadPoolExecutor(2) as pool:
        found = [pool.submit(run, "meet", [a, b]), pool.submit(run, "meet", [b, a])]
        assert [future.result(90) for future in found] == [True, True]


def test_the_server_outlives_the_thread_that_started_it(tmp_path):
    code = (
        "import threading\n"
        "from flataudit import isolation\n"
        "def call():\n"
        "    print(isolation.run('tests.isolated_jobs:echo', {}))\n"
        "    print(isolation.forked._server.process.pid)\n"
        "for _ in range(2):\n"
        "    thread = threading.Thread(target=call)\n"
        "    thread.start()\n"
        "    thread.join()\n"
    )
    found = python(code, tmp_path)
    assert found[0] == found[2] == "{}"
    assert found[1] == found[3]


@pytest.mark.parametrize("daemon", [False, True])
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_from_a_process_of_multiprocessing(method, daemon):
    """Also a daemonic one, which multiprocessing itself lets have no children."""
    from tests.isolated_jobs import calls

    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=calls, args=(queue,), daemon=daemon)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert (queue.get(), queue.get()) == ({"a": 1}, daemon)
    process.close()


def test_from_a_fork_of_the_caller(tmp_path):
    """It has a server of its own; the caller keeps its own, and a call that is in progress."""
    code = (
        "import os\n"
        "from flataudit import isolation\n"
        "def echo():\n"
        "    assert isolation.run('tests.isolated_jobs:echo', {}) == {}\n"
        "    return isolation.forked._server.process.pid\n"
        "first = echo()\n"
        "def fork(keeper):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        os._exit(0 if echo() != first else 1)\n"
        "    print(os.waitpid(pid, 0)[1])\n"
        "    open('go', 'w').close()\n"
        "print(isolation.run('tests.isolated_jobs:wait_for', 'go', progress=fork))\n"
        "print(echo() == first)\n"
    )
    assert python(code, tmp_path) == ["0", "True", "True"]


# --- where a fork is not safe -------------------------------------------------------------------


@pytest.fixture
def without_forks(monkeypatch):
    monkeypatch.setattr(isolation, "children", fresh)


@pytest.mark.usefixtures("without_forks")
def test_a_fresh_interpreter_does_the_same(tmp_path, temporary, monkeypatch, capfd):
    monkeypatch.setenv("FLATAUDIT_A", "1")
    isolation.prestart(["torch"])
    heard = []
    asked = {"a": "x" * 100_000, "progress": [["b", 1, 20]]}
    assert run("echo", asked, deadline=60, progress=lambda *values: heard.append(values)) == asked
    assert heard == [("b", 1, 20)]
    seen = run("where")
    assert (seen["path"], seen["folder"]) == (sys.path, os.getcwd())
    assert seen["environment"]["FLATAUDIT_A"] == "1"
    assert run("chatter", 300_000) == "done"
    with pytest.raises(errors.NumericalError):
        run("raises", "NumericalError")
    with pytest.raises(AuditFailedError, match=r"signal 11 .*: last words"):
        run("crash", "segfault")
    with pytest.raises(InputError, match="expected no memory limit"):
        run("echo", {}, memory_limit=GB)
    assert list(temporary.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("without_forks")
def test_a_fresh_interpreter_ends_at_the_deadline(tmp_path):
    with pytest.raises(DeadlineError):
        run("hang", str(tmp_path / "pids"), deadline=3)
    worker, *_ = pids = pids_in(tmp_path / "pids")
    assert all_gone([worker])
    for pid in pids[1:]:  # those in a session of their own are beyond its reach
        if not gone(pid):
            os.kill(pid, signal.SIGKILL)


# --- /proc --------------------------------------------------------------------------------------


def test_memory_of_a_process():
    mine = processes.resident_bytes()
    assert 0 < processes.proportional_bytes() <= mine * 1.01
    kept = b"x" * 50_000_000
    assert processes.resident_bytes() - mine > 0.9 * len(kept)
    assert processes.resident_bytes(2**30) == processes.proportional_bytes(2**30) == 0


def test_descendants_are_found_whatever_their_group():
    code = "import subprocess as s; p = s.Popen(['sleep', '100'], start_new_session=True); p.wait()"
    child = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert soon(lambda: len(processes.descendants(child.pid)) == 1)
        (grandchild,) = processes.descendants(child.pid)
        assert {child.pid, grandchild} <= set(processes.descendants(os.getpid()))
        os.kill(grandchild, signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    assert processes.descendants(2**30) == []


def test_requests_hold_the_environment_and_are_never_written_to_a_file(temporary, monkeypatch):
    """It may hold credentials."""
    monkeypatch.setenv("FLATAUDIT_SECRET", "xyzzy")
    found = []

    def look(keeper):
        files = [path for path in temporary.rglob("*") if path.is_file()]
        found.extend(path for path in files if "xyzzy" in path.read_text(errors="replace"))
        (temporary / "go").touch()

    assert run("wait_for", str(temporary / "go"), progress=look)
    assert found == []
    command = Path(f"/proc/{forked._server.process.pid}/cmdline").read_bytes()
    assert b"xyzzy" not in command


def test_the_peak_of_the_child_s_memory_is_told():
    peaks = []
    for mb in (1, 400):
        used = {}
        isolation.run("tests.isolated_jobs:hold_mb", {"mb": mb}, used=used)
        peaks.append(used["peak_bytes"])
    assert 380e6 < peaks[1] - peaks[0] < 420e6
