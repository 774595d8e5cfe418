"""Promotion as a Prefect flow: the gate, and the alias where it passed.

The decision is that of `flataudit gate` (`flataudit.gate.run_gate`); a refusal fails the flow, so
that whatever comes after it does not run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flataudit.config import make_options
from flataudit.gate import Audit, GateRefusedError, run_gate
from flataudit.policy import GatePolicy, parse_policy, read_policy

Json = dict[str, Any]


@task(name="gate", cache_policy=NO_CACHE, result_serializer="json")
def gate_task(
    model_uri: str,
    policy: Json,
    alias: str | None,
    dry_run: bool,
    override: str | None,
    audit: Json | None,
    policy_file: str | None,
    tracking_uri: str | None,
) -> Json:
    """Decides, records and, where it passed, sets the alias; never taken from a cache."""
    renewed = None
    if audit is not None:
        options = make_options(audit["options"] | {"tracking_uri": tracking_uri}, "audit options")
        renewed = Audit(audit["train"], audit["heldout"], options)
    decision = run_gate(
        model_uri,
        GatePolicy(**policy),
        alias=alias,
        dry_run=dry_run,
        override=override,
        audit=renewed,
        policy_file=policy_file,
        tracking_uri=tracking_uri,
    )
    return decision.to_dict() | {"exit_code": decision.exit_code}


@flow(name="flataudit-promote", result_serializer="json", validate_parameters=False)
def promote_flow(
    model_uri: str,
    policy: str | Json,
    alias: str | None = "champion",
    dry_run: bool = False,
    override: str | None = None,
    train: str | None = None,
    heldout: str | None = None,
    options: Json | None = None,
    tracking_uri: str | None = None,
) -> Json:
    """Gates a version and promotes it.

    Args:
        model_uri: As for `flataudit gate`.
        policy: A policy file, or its content as a mapping.
        alias: What a version that passes is given; None to decide only.
        dry_run: Check and record, set nothing.
        override: A reason to let a refused version through.
        train: Training data, to audit a version without a usable audit.
        heldout: Held-out data for that audit.
        options: More options of that audit, by the command line's names.
        tracking_uri: As for an audit.

    Returns:
        The decision's JSON.

    Raises:
        GateRefusedError: the gate refused; the decision is on record in MLflow.
        InputError: a bad policy, no such model.
    """
    if isinstance(policy, str):
        rules, file = read_policy(Path(policy)), policy
    else:
        import json

        rules, file = parse_policy(json.dumps(policy), "policy"), None
    audit = None
    if train is not None:
        audit = {"train": train, "heldout": heldout, "options": options or {}}
    values = rules.model_dump()
    decision: Json = gate_task(
        model_uri, values, alias, dry_run, override, audit, file, tracking_uri
    )
    if decision.pop("exit_code"):
        failed = ", ".join(rule["name"] for rule in decision["rules"] if not rule["passed"])
        raise GateRefusedError(
            f"expected {decision['uri']} to pass its gate, got a refusal by {failed}; see run"
            f" {decision['gate_run_id']} in flataudit-gates"
        )
    return decision
