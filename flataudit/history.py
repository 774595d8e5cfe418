"""Earlier audits of a registered model, of any version, as the report's history shows them."""

from __future__ import annotations

import logging
import math
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LIMIT = 50  # audits shown
PAGE = 500  # runs read

_METRICS = ("gap", "gap_low", "gap_high", "heldout_gap")
_TAGS = ("verdict", "confidence", "run_id", "audited_at")

log = logging.getLogger(__name__)


def earlier_audits(client: MlflowClient, name: str | None, experiment: str) -> list[dict[str, Any]]:
    """The finished audits of models:/name/..., newest first, at most 50.

    Each {version, run_id, audited_at, verdict, confidence, gap, gap_low, gap_high, heldout_gap},
    None where there is none; nats per example. An unreadable history is logged and empty: it is
    no reason for an audit to fail.
    """
    if name is None:
        return []
    prefix = f"models:/{name}/"
    try:
        where = client.get_experiment_by_name(experiment)
        if where is None:
            return []
        # Quotes cannot be escaped in a filter, and % and _ mean any character: see below.
        plain = "'" not in name and '"' not in name
        runs = client.search_runs(
            [where.experiment_id],
            f"tags.`flataudit.model_uri` LIKE '{prefix}%'" if plain else "",
            max_results=PAGE,
            order_by=["attributes.start_time DESC"],
        )
    except Exception as error:
        log.warning("could not read the earlier audits of %s: %s", name, error)
        return []
    uris = (run.data.tags.get("flataudit.model_uri", "") for run in runs)
    found = [_row(run, uri.removeprefix(prefix)) for run, uri in zip(runs, uris, strict=True)
             if uri.startswith(prefix) and run.info.status == "FINISHED"]  # fmt: skip
    return [row for row in found if row["gap"] is not None][:LIMIT]


def _row(run: Run, version: str) -> dict[str, Any]:
    row: dict[str, Any] = {"version": version}
    row |= {key: run.data.tags.get(f"flataudit.{key}") for key in _TAGS}
    for key in _METRICS:
        value = run.data.metrics.get(f"flataudit/{key}")
        row[key] = value if value is not None and math.isfinite(value) else None
    started = datetime.fromtimestamp(run.info.start_time / 1000, UTC)
    return row | {
        "run_id": run.info.run_id,
        "audited_at": row["audited_at"] or started.isoformat(timespec="seconds"),
    }
