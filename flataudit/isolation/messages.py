"""What both ways to start a child share: its command line, and the messages that come back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Json = dict[str, Any]


class Late(Exception):
    """The deadline of a call has passed."""


def parsed(line: bytes | bytearray) -> Json | None:
    """A message; None for what the model's code has written into the channel."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def python(function: str, *arguments: object) -> list[str]:
    """The command that calls `module:function` in a Python with this process's import path."""
    path = [str(entry) for entry in sys.path if entry]
    own = str(Path(__file__).parents[2])
    if own not in path:
        path.append(own)
    module, _, name = function.partition(":")
    call = f"{name}({', '.join(map(repr, arguments))})"
    code = f"import sys; sys.path[:] = {path!r}; from {module} import {name}; {call}"
    return [sys.executable, "-c", code]
