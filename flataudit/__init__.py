"""flataudit: how much worse a model will do on unseen data, and whether to rely on the answer.

The public names load on first use, so that `import flataudit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flataudit.audit import audit as audit
    from flataudit.errors import FlatauditError as FlatauditError
    from flataudit.errors import InputError as InputError
    from flataudit.recording import TrainingRecorder as TrainingRecorder
    from flataudit.recording import log_training as log_training
    from flataudit.results import AuditReport as AuditReport

try:
    __version__ = version("flataudit")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "audit": "flataudit.audit",
    "AuditReport": "flataudit.results",
    "FlatauditError": "flataudit.errors",
    "InputError": "flataudit.errors",
    "TrainingRecorder": "flataudit.recording",
    "log_training": "flataudit.recording",
}
__all__ = [
    "AuditReport",
    "FlatauditError",
    "InputError",
    "TrainingRecorder",
    "audit",
    "log_training",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flataudit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
