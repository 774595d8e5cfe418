"""Checkpoints in a folder: one file per solve, replaced as a whole.

The solvers decide what their state is, this module when and where it is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from flataudit.errors import InputError
from flataudit.solvers import Checkpoint

EVERY = 30.0  # seconds between two writes, and at least SHARE times as long as one takes
SHARE = 20.0
# At an interruption only a state that is written within about a second; else the last one counts.
QUICK_BYTES = 256 * 2**20

State = dict[str, Tensor]


class FolderCheckpoint:
    """Keeps states in `folder`, one file per key.

    every: seconds between two writes of the same run.

    Raises:
        InputError: the folder cannot be made or written to.
    """

    def __init__(self, folder: str | Path, *, every: float = EVERY) -> None:
        self.folder = Path(folder)
        self._every = every
        self._next = time.monotonic() + every
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            part = self._part("writable")
            part.touch()
            part.unlink()
        except OSError as error:
            raise InputError(
                f"expected checkpoint to be a folder that can be written to, got {folder}:"
                f" {error.strerror}; choose another"
            ) from None

    def load(self, key: str) -> State | None:
        """The state saved under `key`; None where there is none or it cannot be read."""
        path = self._path(key)
        if not path.exists():
            return None
        try:
            state: State = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a file cut off or of another program: the solve starts anew
            return None
        return state

    def save(self, key: str, state: Callable[[], State], *, last: bool = False) -> None:
        """Writes the state if the time has come, or if it is the last."""
        if not last and time.monotonic() < self._next:
            return
        tensors = state()
        if last and self._path(key).exists() and _bytes(tensors) > QUICK_BYTES:
            return
        started = time.monotonic()
        # Views write their whole storage, so everything is copied first.
        kept = {name: t.detach().cpu().clone() for name, t in tensors.items()}
        part = self._part(key)
        torch.save(kept, part)
        os.replace(part, self._path(key))
        ended = time.monotonic()
        self._next = ended + max(self._every, SHARE * (ended - started))

    def _path(self, key: str) -> Path:
        return self.folder / f"flataudit-{key[:40]}.pt"

    def _part(self, key: str) -> Path:
        return self.folder / f"flataudit-{key[:40]}.{os.getpid()}.part"


def as_checkpoint(given: Checkpoint | str | Path | None) -> Checkpoint | None:
    """A folder's path as a `FolderCheckpoint`; anything else as it is."""
    if isinstance(given, str | Path):
        return FolderCheckpoint(given)
    return given


def _bytes(state: State) -> int:
    return sum(t.numel() * t.element_size() for t in state.values())
