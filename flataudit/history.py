"""Earlier audits of a registered model, of any version, as the report's history shows them."""

from __future__ import annotations

import logging
from typing import Any

from flataudit.audits import past_audits
from flataudit.store import one_line
from flataudit.track_record import observed_gaps

LIMIT = 50  # audits shown

log = logging.getLogger(__name__)


def earlier_audits(name: str | None) -> list[dict[str, Any]]:
    """The audits of models:/name/... that gave a gap, newest first, at most 50.

    Each is `PastAudit.to_dict()` and `observed_gap`, what `flataudit observe` measured later, or
    None; nats per example. An unreadable history is logged and empty: it is no reason for an audit
    to fail.
    """
    if name is None:
        return []
    try:
        observed = observed_gaps(name)
        found = [audit for audit in past_audits(name) if audit.gap is not None]
    except Exception as error:
        log.warning("could not read the earlier audits of %s: %s", name, one_line(error))
        return []
    return [
        audit.to_dict() | {"observed_gap": observed.get(audit.run_id)} for audit in found[:LIMIT]
    ]
