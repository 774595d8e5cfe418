"""What the commands share: JSON files written whole or not at all, and the stage on a terminal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from flataudit.errors import InputError


def number(text: str) -> float | str:
    """The number that `text` writes, else `text` itself."""
    try:
        return float(text)
    except ValueError:
        return text


def check_writable(path: Path, option: str = "--json") -> None:
    """InputError, before any work, where nothing could be written to `path`."""
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


def write_whole(path: Path, content: str | bytes, option: str = "--json") -> None:
    """Writes text or bytes as a whole, or leaves what was there; InputError if it cannot."""
    data = content.encode() if isinstance(content, str) else content
    try:
        _part(path).write_bytes(data)
        os.replace(_part(path), path)
    except OSError as error:
        raise _not_writable(path, error, option) from None


def _part(path: Path) -> Path:
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def _not_writable(path: Path, error: OSError, option: str) -> InputError:
    return InputError(
        f"expected {option} to name a writable file in an existing folder, got {path}:"
        f" {error.strerror}; choose another"
    )


class StageDisplay:
    """The running stage on a terminal's stderr; silent elsewhere."""

    def __enter__(self) -> StageDisplay:
        from rich.console import Console

        console = Console(stderr=True)
        self._status: Any = console.status("loading") if console.is_terminal else None
        if self._status:
            self._status.start()
        return self

    def stage(self, text: str) -> None:
        if self._status:
            self._status.update(text)

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()
