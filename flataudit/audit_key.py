"""The audit key: two audits with the same key give the same numbers.

It is the sha256 of all that an audit depends on: the model (`ModelSource.identity`), the sha256 of
its data, the options that can change a number, the training record as it was read, and the code.
Where the data lie, the deadline and the store do not count. A sweep finds by it what is audited
already (the run tag `flataudit.audit_key`) and which finished estimate a restarted sweep may take
over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from flataudit import stages
from flataudit.config import AuditOptions
from flataudit.models.registry import ModelSource

Json = dict[str, Any]

KEY_TAG = "flataudit.audit_key"  # on the audit run

# Options that change no number; the training record counts as it was read, not as it was named.
_WITHOUT_EFFECT = {"tracking_uri", "deadline", "training", "checkpoint"}
# Parts of the package that only choose what is measured, or show it.
_NOT_MEASURING = ("cli", "report", "pipeline.py", "planning.py", "sweeps.py")


def audit_key(
    identity: str, data: Mapping[str, str | None], training: Json | None, options: AuditOptions
) -> str:
    """The key as 64 hexadecimal digits.

    Args:
        identity: `ModelSource.identity`: model_id, or name, version and sha256 of the files.
        data: sha256 of the data by use: train, heldout (`flataudit.data.digest_of`).
        training: The training record as it was read, None without one.
        options: Of the audit.
    """
    parts = {
        "model": identity,
        "data": dict(data),
        "training": training,
        "options": options.model_dump(mode="json", exclude=_WITHOUT_EFFECT),
        "code": code_version(),
    }
    text = json.dumps(parts, sort_keys=True, allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()


def key_of(loaded: Json, options: AuditOptions) -> str:
    """The key of what `flataudit.stages.load` returned; a child process digests the data.

    Raises:
        InputError, StoreError: the data or the training record cannot be read.
        DeadlineError, AuditFailedError: a data function ran past the deadline, or crashed.
    """
    request = {"loaded": loaded, "options": options.model_dump()}
    found = stages.in_child(
        "flataudit.audit_key:inputs_here", request, options, spent=loaded["seconds"]
    )
    identity = ModelSource.from_dict(loaded["source"]).identity
    return audit_key(identity, found["data"], found["training"], options)


def inputs_here(request: Json, progress: stages.Progress) -> Json:
    """{data: sha256 by use, training: the record, None without one}, read in this process."""
    from flataudit.data import digest_of

    loaded, chosen = request["loaded"], AuditOptions(**request["options"])
    source = stages.open_source(loaded, chosen)
    train = stages.read_data(loaded["train"], chosen, source)
    heldout = stages.read_data(loaded["heldout"], chosen, source) if loaded["heldout"] else None
    training, _ = stages.read_record(loaded, chosen, source, len(train.y))
    data = {
        "train": digest_of(*train.pair),
        "heldout": None if heldout is None else digest_of(*heldout.pair),
    }
    return {"data": data, "training": training}


@cache
def code_version() -> str:
    """Version, rules and sources of what measures: an audit by other code has another key."""
    from flataudit.tracking import policy_hash

    root = Path(__file__).parent
    found = hashlib.sha256(policy_hash().encode())
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if name.parts[0] not in _NOT_MEASURING:
            found.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return found.hexdigest()
