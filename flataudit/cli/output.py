"""What the commands share: JSON files written whole or not at all, and the stage on a terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flataudit.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 110  # characters of a table where it is not a terminal that says so


def number(text: str) -> float | str:
    """The number that `text` writes, else `text` itself."""
    try:
        return float(text)
    except ValueError:
        return text


def check_writable(file: str, option: str = "--json") -> None:
    """InputError, before any work, where `file` could not be written.

    Nothing to check without one, or for - (stdout).
    """
    if file in ("", "-"):
        return
    path = Path(file)
    if path.is_dir():
        raise InputError(
            f"expected {option} to name a file, got the folder {path}; name a file in it"
        )
    part = _part(path)
    try:
        part.touch()
        part.unlink()
    except OSError as error:
        raise _not_writable(path, error, option) from None


def write_whole(file: str, content: str | bytes, option: str = "--json") -> None:
    """Writes text or bytes as a whole, or leaves what was there; InputError if it cannot."""
    path = Path(file)
    data = content.encode() if isinstance(content, str) else content
    try:
        _part(path).write_bytes(data)
        os.replace(_part(path), path)
    except OSError as error:
        raise _not_writable(path, error, option) from None


def written(value: Any, json_file: str) -> bool:
    """Writes JSON where `--json` asks; whether it went to stdout, so that nothing else may."""
    text = json.dumps(value, indent=2, allow_nan=False)
    if json_file == "-":
        print(text)
        return True
    if json_file:
        write_whole(json_file, text + "\n")
    return False


def table_console(*, width: int = WIDTH, stderr: bool = False, soft_wrap: bool = True) -> Console:
    """Where a table is printed: as wide as the terminal, else `width` characters."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=soft_wrap)
    if not console.is_terminal:
        console.width = width
    return console


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError, option: str) -> InputError:
    return InputError(
        f"expected {option} to name a writable file in an existing folder, got {path}:"
        f" {error.strerror}; choose another"
    )


class StageDisplay:
    """The running stage on a terminal's stderr, with the time left where steps are counted.

    Silent elsewhere.
    """

    def __enter__(self) -> StageDisplay:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self._bar: Any = None
        if console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task("loading", total=None)
        return self

    def stage(self, text: str, done: int = 0, expected: int | None = None) -> None:
        """Shows `text`; done of expected steps where the stage counts them."""
        if self._bar is None:
            return
        if expected is None:  # a new stage: what an earlier one took says nothing about it
            self._bar.remove_task(self._task)
            self._task = self._bar.add_task(text, total=None)
        else:
            self._bar.update(self._task, description=text, completed=done, total=expected)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
