"""Whether a process is still there, as another process sees it."""

import subprocess
import sys

import pytest

from flataudit import processes

pytestmark = pytest.mark.skipif(processes.identity() == "", reason="no /proc")

NAMES = "from flataudit.processes import identity; print(identity(), flush=True); input()"


@pytest.fixture
def child():
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", NAMES], stdin=pipe, stdout=pipe, text=True) as it:
        yield it
        it.kill()


def test_gone_once_it_is_killed(child):
    named = child.stdout.readline().strip()
    assert named.split()[2] == str(child.pid)
    assert not processes.is_gone(named)
    child.kill()
    # A zombie until it is waited for, with its pid still taken.
    while processes._start(child.pid) != "ended":
        pass
    assert processes.is_gone(named)
    child.wait()
    assert processes.is_gone(named)


def test_this_process_is_there():
    assert not processes.is_gone(processes.identity())


def test_another_process_with_its_pid_is_not_it():
    *place, _ = processes.identity().split()
    assert processes.is_gone(" ".join([*place, "1"]))


@pytest.mark.parametrize("part", [0, 1])
def test_elsewhere_nothing_is_certain(part):
    """Another boot or machine, another container: even for a pid that nobody has."""
    fields = processes.identity().split()
    fields[part] = "another"
    fields[2] = str(2**22 + 1)
    assert not processes.is_gone(" ".join(fields))


@pytest.mark.parametrize("named", ["", "x", "a b c d e"])
def test_no_name_is_no_evidence(named):
    assert not processes.is_gone(named)
