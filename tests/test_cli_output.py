"""What a terminal shows while an audit runs."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from flataudit.cli import output


@pytest.fixture
def shown(monkeypatch):
    """Replaces stderr's console by one that `terminal` makes a terminal or not; its text."""

    def make(terminal):
        file = io.StringIO()
        console = Console(file=file, force_terminal=terminal, width=100, _environ={})
        monkeypatch.setattr("rich.console.Console", lambda **_: console)
        return file

    return make


def test_nothing_without_a_terminal(shown):
    file = shown(False)
    with output.StageDisplay() as show:
        show.stage("factorising the curvature")
        show.stage("factorising the curvature", 1, 2)
    assert file.getvalue() == ""


def test_stage_then_share_and_time_left(shown):
    file = shown(True)
    with output.StageDisplay() as show:
        show.stage("factorising the curvature")
        show._bar.refresh()
        assert "factorising the curvature" in file.getvalue()
        for done in range(1, 4):
            show.stage("factorising the curvature", done, 8)
        (task,) = show._bar.tasks
        assert (task.completed, task.total) == (3, 8)
        show.stage("judging calibration")
        (task,) = show._bar.tasks
        assert (task.description, task.completed, task.total) == ("judging calibration", 0, None)
