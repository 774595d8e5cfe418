"""What gates and later observations write to MLflow; `keys` has every name.

A gate's decision is one run in the experiment `flataudit-gates`, an observation one in
`flataudit-observations`. Both are complete before a version shows anything of them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from flataudit import keys
from flataudit.results import to_json
from flataudit.store import ensure_experiment, store_errors
from flataudit.versions import DESCRIPTION_LIMIT, markdown_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flataudit.models.registry import ModelSource

BEGIN, END = "<!-- flataudit-gate:begin -->", "<!-- flataudit-gate:end -->"
TAG_LIMIT = 4000  # characters; MLflow takes 5000
_BLOCK = re.compile(f"\\s*{BEGIN}.*?{END}", re.DOTALL)


@contextmanager
def record_run(
    experiment: str, source: ModelSource, what: str, tags: Mapping[str, str]
) -> Iterator[tuple[MlflowClient, str]]:
    """A client and a new run's id; the run ends FINISHED, or FAILED where the block does.

    Raises:
        StoreError: whatever the store raises in the block.
    """
    with store_errors(f"record the {what} of {source.uri}"):
        from mlflow import MlflowClient

        experiment_id = ensure_experiment(experiment)
        client = MlflowClient()
        name = f"{source.name} v{source.version}" if source.name else source.uri
        known = {
            keys.URI_TAG: source.uri,
            keys.MODEL_ID: source.identity,
            "mlflow.source.name": "flataudit",
        }
        run = client.create_run(experiment_id, tags=known | dict(tags), run_name=f"{what} {name}")
        run_id = run.info.run_id
        try:
            yield client, run_id
        except BaseException:
            with suppress(Exception):
                client.set_terminated(run_id, "FAILED")
            raise
        client.set_terminated(run_id, "FINISHED")


def log_decision(client: MlflowClient, run_id: str, decision: Mapping[str, Any]) -> None:
    """The whole decision as an artifact, what one searches for as tags, values as metrics."""
    from mlflow.entities import Metric, RunTag

    client.log_dict(run_id, to_json(decision), keys.DECISION)
    now = int(time.time() * 1000)
    metrics = [
        Metric(f"flataudit/gate_{rule['name']}", float(rule["value"]), now, 0)
        for rule in decision["rules"]
        if isinstance(rule["value"], int | float)
    ]
    tags = {
        keys.GATE: gate_word(decision),
        keys.GATE_MODE: str(decision["mode"]),
        keys.GATE_BY: str(decision["by"]),
        keys.GATE_AT: str(decision["decided_at"]),
        keys.GATE_POLICY: str(decision["policy"]["sha256"]),
        keys.RUN_ID: str(decision["audit_run_id"] or ""),
        "flataudit.gate_failed": ", ".join(r["name"] for r in decision["rules"] if not r["passed"]),
        "mlflow.note.content": _sentence(decision),
    }
    if decision["override"]:
        tags[keys.GATE_OVERRIDE] = override_text(decision)
    client.log_batch(run_id, metrics, tags=[RunTag(k, v[:TAG_LIMIT]) for k, v in tags.items()])


def show_on_version(
    client: MlflowClient, source: ModelSource, run_id: str, decision: Mapping[str, Any]
) -> None:
    """The version's tags; an override also stands in its description, until the next decision."""
    if source.name is None or source.version is None:
        return
    name, version = source.name, source.version
    entry = client.get_model_version(name, version)
    old = str(entry.description or "")
    new = _BLOCK.sub("", old)
    if decision["override"]:
        said = markdown_text(override_text(decision))
        text = f"**flataudit gate: passed by override.** {said}"
        block = f"{BEGIN}\n{text[:1000]}\n{END}"
        longer = f"{new}\n\n{block}" if new else block
        new = longer if len(longer) <= DESCRIPTION_LIMIT else new
        client.set_model_version_tag(name, version, keys.GATE_OVERRIDE, override_text(decision))
    elif keys.GATE_OVERRIDE in entry.tags:
        client.delete_model_version_tag(name, version, keys.GATE_OVERRIDE)
    if new != old:
        client.update_model_version(name, version, new)
    client.set_model_version_tag(name, version, keys.GATE_RUN, run_id)
    client.set_model_version_tag(name, version, keys.GATE, gate_word(decision))


def gate_word(decision: Mapping[str, Any]) -> str:
    """pass, refuse, overridden, or disabled: never pass for what an override let through."""
    if decision["mode"] == "disabled":
        return "disabled"
    return "overridden" if decision["override"] else str(decision["outcome"])


def override_text(decision: Mapping[str, Any]) -> str:
    """Reason, who and when, and what it set aside."""
    found = decision["override"]
    rules = ", ".join(found["rules"])
    return f"{found['reason']} ({found['by']}, {found['at']}; set aside: {rules})"[:TAG_LIMIT]


def _sentence(decision: Mapping[str, Any]) -> str:
    failed = [rule["name"] for rule in decision["rules"] if not rule["passed"]]
    text = f"**{gate_word(decision)}** ({decision['mode']}): {decision['uri']}"
    return text + (f"; failed: {', '.join(failed)}" if failed else "")
