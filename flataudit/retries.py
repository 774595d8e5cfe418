"""Calls to a store that are tried again, with growing delays, where the failure may pass.

MLflow's own HTTP client tries a server again for minutes before it gives up (see
MLFLOW_HTTP_REQUEST_MAX_RETRIES); what it gives up is final here. Left are databases that are busy
or were restarted, artifact stores, and answers that broke off. Every call that is tried again has
to be idempotent: its first try may have succeeded, and only the answer been lost.
"""

from __future__ import annotations

import errno
import logging
import random
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

from flataudit.errors import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

DELAYS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try, each shortened at random
PATIENCE = 60.0  # seconds after which no further try begins

_PASSING_CODES = {"TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED"}  # of MLflow
_PASSING_STATUS = {408, 429, 500, 502, 503, 504}  # of HTTP
_PASSING_ERRNO = {errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ESTALE, errno.ETIMEDOUT}
# MLflow has one code for all that a database refuses.
_LASTING = re.compile("disk is full|no space left|read-?only|no such table|permission", re.I)

log = logging.getLogger(__name__)


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later.

    >>> transient(ConnectionResetError()), transient(OSError(errno.ENOSPC, "No space left"))
    (True, False)
    """
    if isinstance(error, StoreError) and error.__cause__ is not None:
        error = error.__cause__
    code = getattr(error, "error_code", None)
    if code is not None:  # an MlflowException
        return code in _PASSING_CODES and not _LASTING.search(str(error))
    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None)
    if status is not None:
        return status in _PASSING_STATUS
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING_ERRNO
    return _broke_off(error)


def _broke_off(error: BaseException) -> bool:
    from requests import exceptions

    broken = (exceptions.ConnectionError, exceptions.Timeout, exceptions.ChunkedEncodingError)
    return isinstance(error, broken)


def retried(call: Callable[[], T]) -> T:
    """What `call` returns, tried again while its failures may pass; else its last error."""
    started = time.monotonic()
    for delay in DELAYS:
        try:
            return call()
        except Exception as error:
            if not transient(error) or time.monotonic() - started > PATIENCE:
                raise
            log.info("%s; trying again in %g s at most", type(error).__name__, delay)
        time.sleep(delay * random.uniform(0.5, 1.0))
    return call()


def patient(client: MlflowClient) -> MlflowClient:
    """The same client, each call of which is `retried`; for idempotent calls only.

    After a call that was given up each further one is tried once, until one succeeds: to tidy up
    in a store that is gone should not take minutes.
    """
    return cast("MlflowClient", _Patient(client))


class _Patient:
    def __init__(self, client: MlflowClient) -> None:
        self._client, self._gone = client, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            def once() -> Any:
                return found(*args, **kwargs)

            try:
                answer = once() if self._gone else retried(once)
            except Exception as error:
                self._gone = transient(error)
                raise
            self._gone = False
            return answer

        return call if callable(found) else found
