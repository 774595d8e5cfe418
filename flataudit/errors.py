"""The errors a user can meet, each with the exit code of the command line.

Every message is one line that says what was expected, what was found and what to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

# Control characters, and those that turn the direction of what follows.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


class FlatauditError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 3

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(" ".join(message.split())))


def printable(line: str) -> str:
    """A line that a terminal can only show: control characters of names become their codes.

    >>> print(printable("model \x1b[31mred"))
    model \\x1b[31mred
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], line)


def first_of(names: Any, limit: int = 8, each: Callable[[Any], str] = str) -> str:
    """The first of a list or array of names, as `each` writes them, and how many more there are.

    >>> first_of(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(each, names[:limit])) + more


class InputError(FlatauditError, ValueError):
    """The input is bad or the model is not supported: nothing was computed or written."""

    exit_code = 2


class NumericalError(FlatauditError, ArithmeticError):
    """A factorisation failed although the input looked sound; the message lists likely causes."""


class BreakdownError(NumericalError):
    """A Cholesky factorisation met a pivot that is not positive; another solver may get through."""


class MemoryPlanError(InputError):
    """The exact audit does not fit into memory; the message names the size and the alternatives."""


class AuditFailedError(FlatauditError):
    """The audit broke for a reason that is not bad input."""


class DeadlineError(FlatauditError):
    """The audit ran past its deadline and was stopped."""


class MemoryLimitError(AuditFailedError):
    """The audit used more memory than its limit and was stopped."""


class StoreError(FlatauditError):
    """MLflow could not be read or written; an earlier verdict was left untouched."""
