"""One audit per GPU: a concurrency limit of Prefect for each machine, and a lock for each GPU.

An audit that may use a GPU (device cuda, or auto where there is one) holds a slot of the limit
`flataudit-gpu-HOST` while it is estimated, and waits for one where all are taken. The limit is made
where it is missing, with one slot per visible GPU; one that is there keeps its number, so that it
can be changed on the server. It is asked for strictly: without it, or where it was switched off,
which to Prefect means no limit, the audit fails and says so.

Which GPU it is says a lock on a file of this machine. It also holds where a server that was
restarted has forgotten who has a slot, and between servers.

FLATAUDIT_GPU_SLOTS: audits at once on this machine's GPUs, instead of one per visible GPU; 0: no
limit is asked for.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from flataudit import stages
from flataudit.config import AuditOptions
from flataudit.errors import InputError, StoreError
from flataudit.store import one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows: the limit alone has to do
    fcntl = None

SLOTS = "FLATAUDIT_GPU_SLOTS"
LOOK_AGAIN = 0.2  # seconds between two looks for a free GPU


def limit_name() -> str:
    """The limit of this machine, by its host name."""
    return f"flataudit-gpu-{re.sub(r'[^a-z0-9]+', '-', platform.node().lower()).strip('-')}"


def gpu_slots() -> int:
    """How many audits may use this machine's GPUs at once; 0 where it has none.

    Raises:
        InputError: FLATAUDIT_GPU_SLOTS is no number.
    """
    given = os.environ.get(SLOTS)
    if not given:
        return visible_gpus()
    if not given.isdecimal():
        raise InputError(f"expected {SLOTS} to be a number of audits at once, got {given!r}")
    return int(given)


@cache
def visible_gpus() -> int:
    """The GPUs that torch sees, asked in a child process: this one keeps away from CUDA."""
    return int(stages.in_child("flataudit.stages:gpus_here", {}, AuditOptions())["gpus"])


@contextmanager
def gpu_slot(device: str) -> Iterator[int | None]:
    """Holds one of this machine's GPUs, where an audit on that device may use one.

    Args:
        device: An audit's option: auto, cpu or cuda.

    Yields:
        The GPU's index; None where there is none to choose.

    Raises:
        StoreError: the limit cannot be had, or is switched off; nothing was run.
    """
    slots = 0 if device == "cpu" else gpu_slots()
    if not slots:
        yield None
        return
    name = limit_name()
    ensure_limit(name, slots)
    with ExitStack() as held:
        try:
            held.enter_context(
                concurrency(
                    name,
                    occupy=1,
                    strict=True,
                    raise_on_lease_renewal_failure=fcntl is None,  # else the lock holds
                )
            )
        except ConcurrencySlotAcquisitionError as error:
            raise StoreError(
                f"expected a slot of Prefect's concurrency limit {name!r}, got: {one_line(error)};"
                f" see `prefect gcl inspect {name}`"
            ) from error
        yield held.enter_context(_locked(slots))


def ensure_limit(name: str, slots: int) -> None:
    """Makes the limit where it is missing; one that is there is left as it is.

    Raises:
        StoreError: it is switched off, or the server cannot be asked.
    """
    try:
        with get_client(sync_client=True) as client:
            try:
                found = client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                made = GlobalConcurrencyLimitCreate(name=name, limit=slots)
                with suppress(ObjectAlreadyExists):  # someone else was faster
                    client.create_global_concurrency_limit(made)
                found = client.read_global_concurrency_limit_by_name(name)
    except Exception as error:
        raise StoreError(
            f"could not ask Prefect for the concurrency limit {name!r}: {one_line(error)}; check"
            " PREFECT_API_URL and that the server runs"
        ) from error
    if not found.active:
        raise StoreError(
            f"expected Prefect's concurrency limit {name!r} to be active, got one that is switched"
            f" off, which would let every audit run at once: `prefect gcl enable {name}`, or set"
            f" {SLOTS}=0 to audit without a limit"
        )


@contextmanager
def _locked(slots: int) -> Iterator[int | None]:
    """Holds the lock of a GPU, waiting where all are held; its index, None without GPUs."""
    if fcntl is None:
        yield None
        return
    gpus = visible_gpus()
    folder = Path(tempfile.gettempdir())
    while True:
        for slot in range(slots):
            file = _opened(folder / f"flataudit-gpu-{slot}.lock")
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield slot % gpus if gpus else None
                return
            finally:
                os.close(file)  # which lets go of the lock, as does the end of the process
        time.sleep(LOOK_AGAIN)


def _opened(path: Path) -> int:
    """A descriptor of the file, made where it is missing; another user's is read all the same."""
    try:
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
