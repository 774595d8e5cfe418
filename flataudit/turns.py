"""One gate at a time for each alias, over MLflow's API alone.

MLflow sets an alias without looking at what it was: there is no compare-and-set. So that a gate
decides against the champion that it replaces, gates on the same alias take turns by Lamport's
bakery algorithm [doi:10.1145/361082.361093], whose shared memory are the gates' own runs: a run
that is RUNNING stands in the queue, its ticket is a tag. It needs nothing of the store but that a
write is seen by later reads.

A gate that died leaves a run that stays RUNNING. Who has waited `PATIENCE` seconds for the same
run marks it KILLED and goes on, and a gate whose run was ended by another sets nothing. Between
that check and the write MLflow leaves a moment open that no client can close.
"""

from __future__ import annotations

import hashlib
import time
from typing import TYPE_CHECKING

from flataudit import keys
from flataudit.errors import StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PATIENCE = 120.0  # seconds; a turn takes about one


def queue_of(name: str, alias: str) -> str:
    """The queue for one alias of one registered model, as a tag's value."""
    return hashlib.sha256(f"{name}\n{alias}".encode()).hexdigest()


def take_turn(client: MlflowClient, run_id: str, queue: str) -> int:
    """Waits until this gate is the only one that may set the alias; its run must be RUNNING.

    The turn lasts until the run is ended.

    Returns:
        How many gates were ahead when this one queued up.

    Raises:
        StoreError: another gate took this one for dead.
    """
    own = client.get_run(run_id).info.experiment_id
    ticket = 1 + max((_ticket(run) or 0 for run in _waiting(client, own, queue)), default=0)
    client.set_tag(run_id, keys.GATE_TICKET, str(ticket))
    # Who joins from here on sees this ticket and draws a higher one; those without a ticket now
    # may yet draw the same or a lower one.
    undecided: set[str] | None = None
    ahead_at_first, head, since = 0, "", time.monotonic()
    while True:
        runs = {run.info.run_id: run for run in _waiting(client, own, queue)}
        if run_id not in runs:
            raise _taken_for_dead(run_id)
        tickets = {key: _ticket(run) for key, run in runs.items() if key != run_id}
        without = {key for key, number in tickets.items() if number is None}
        undecided = without if undecided is None else undecided & without
        lower = [
            (number, key)
            for key, number in tickets.items()
            if number is not None and (number, key) < (ticket, run_id)
        ]
        ahead = sorted(undecided) + [key for _, key in sorted(lower)]
        if not ahead:
            return ahead_at_first
        # A gate that died undecided holds up all others: the first to be given up.
        ahead_at_first = ahead_at_first or len(ahead)
        if ahead[0] != head:
            head, since = ahead[0], time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            client.set_tag(head, keys.GATE_STATE, f"given up by {run_id}")
            client.set_terminated(head, "KILLED")
        _await_end_of(client, ahead[-1], min(0.1 * len(ahead), 4.0))


def _await_end_of(client: MlflowClient, run_id: str, pause: float) -> None:
    """Returns when the last gate ahead has ended, which is when to look at the queue again.

    One run costs the store far less than the queue, which is looked at every few seconds all the
    same: for gates that died.
    """
    until = time.monotonic() + min(10.0, PATIENCE / 4)
    while time.monotonic() < until:
        time.sleep(pause)
        run = client.get_run(run_id)
        if run.info.status != "RUNNING" or _ticket(run) is None:
            return


def check_turn(client: MlflowClient, run_id: str) -> None:
    """StoreError where another gate has ended this one's run, and with it its turn."""
    if client.get_run(run_id).info.status != "RUNNING":
        raise _taken_for_dead(run_id)


def _taken_for_dead(run_id: str) -> StoreError:
    return StoreError(
        f"expected the gate's run {run_id} to be running, got one that another gate ended after"
        f" waiting {PATIENCE:g} s for it; no alias was set, run the gate again"
    )


def _waiting(client: MlflowClient, experiment_id: str, queue: str) -> list[Run]:
    terms = f"attributes.status = 'RUNNING' and tags.`{keys.GATE_QUEUE}` = '{queue}'"
    return list(client.search_runs([experiment_id], terms, max_results=1000))


def _ticket(run: Run) -> int | None:
    text = run.data.tags.get(keys.GATE_TICKET, "")
    return int(text) if text.isdigit() else None
