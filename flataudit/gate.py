"""The gate: may this version be promoted? Rules, a record of the decision, then the alias.

The latest audit of exactly this model is read from the audit runs, never from a version's tags,
which MLflow copies along with a version. A decision on a stored audit needs neither torch nor the
model's files. docs/decisions/0010-gate.md says what is guaranteed about the alias and why.
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flataudit import keys, records, turns
from flataudit.audits import PastAudit, latest_audit, read_report
from flataudit.errors import FlatauditError, InputError, StoreError
from flataudit.identity import identify
from flataudit.policy import GatePolicy
from flataudit.results import to_json
from flataudit.rules import Baseline, Rule, all_passed, evaluate
from flataudit.store import store_errors, use_tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from flataudit.config import AuditOptions
    from flataudit.models.registry import ModelSource

Json = dict[str, Any]
SCHEMA = 1
REASON_LIMIT = 500  # characters of an override's reason
_ATTEMPTS = 5  # at a decision whose grounds change while it is written down


class GateRefusedError(FlatauditError):
    """The gate refused: some rule failed and nobody overrode it."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Audit:
    """A new audit where there is no usable one: its data and options, as for `flataudit audit`."""

    train: str
    heldout: str | None = None
    options: AuditOptions | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a gate decided; `to_dict()` is the JSON of the contract.

    outcome is what the rules say, whatever the mode and the override. exit_code: 0 passed,
    overridden, dry run or disabled; 1 refused; 2 refused because there is no audit.
    """

    outcome: str
    mode: str
    rules: tuple[Rule, ...]
    uri: str
    name: str | None
    version: str | None
    model_id: str | None
    identity: str
    audit_run_id: str | None
    policy: Json
    by: str
    decided_at: str
    alias_set: bool = False
    alias: Json | None = None
    baseline: Json | None = None
    override: Json | None = None
    notes: tuple[str, ...] = ()
    gate_run_id: str | None = None
    schema: int = field(default=SCHEMA, kw_only=True)

    def to_dict(self) -> Json:
        """Plain JSON values."""
        found: Json = to_json(self)
        return found

    @property
    def let_through(self) -> bool:
        """Whether the version may be promoted."""
        return self.mode == "enforced" and (self.outcome == "pass" or self.override is not None)

    @property
    def exit_code(self) -> int:
        """The exit code of the command line."""
        if self.mode != "enforced" or self.let_through:
            return 0
        unaudited = self.audit_run_id is None and any(r.name == "audit" for r in self.rules)
        return 2 if unaudited else 1


@dataclass(frozen=True, slots=True)
class _Grounds:
    """All that a decision rests on, as read at one time."""

    audit: PastAudit | None
    report: Mapping[str, Any] | None
    baseline: Baseline
    baseline_audit: PastAudit | None
    holder: str | None  # the version that has the alias to be set

    @property
    def key(self) -> tuple[Any, ...]:
        runs = [None if a is None else a.run_id for a in (self.audit, self.baseline_audit)]
        return (*runs, self.baseline.version, self.holder)


def run_gate(
    model_uri: str,
    policy: GatePolicy,
    *,
    alias: str | None = None,
    dry_run: bool = False,
    override: str | None = None,
    audit: Audit | None = None,
    policy_file: str | None = None,
    tracking_uri: str | None = None,
) -> Decision:
    """Decides on one model version, records the decision, and sets the alias where it passed.

    Args:
        model_uri: The model; with `alias` a registered version, by number or alias.
        policy: The rules.
        alias: The alias that a version let through gets.
        dry_run: As mode dry_run of the policy.
        override: A reason to let a refused version through, which is recorded with it.
        audit: How to audit the model where no audit is stored, where the latest one failed or
            where it is older than the policy allows. A dry run does not log it.
        policy_file: Named in the record.
        tracking_uri: As for an audit.

    Raises:
        InputError: no such model, an alias that cannot be set, an empty reason.
        StoreError: MLflow cannot be read or written. Nothing was set, unless the message says so.
        AuditFailedError, DeadlineError, NumericalError: of the audit.
    """
    mode = "dry_run" if dry_run and policy.mode == "enforced" else policy.mode
    reason = _reason(override)
    _check_alias(alias)
    use_tracking(tracking_uri)
    source = identify(model_uri)
    if alias and source.name is None:
        raise InputError(
            f"expected a registered version for --alias, got {model_uri}; register the model, or"
            " leave out the alias"
        )
    fresh = None
    if audit is not None and mode != "disabled":
        fresh = _audit(source, audit, policy, write=mode == "enforced")
    sets = alias if mode == "enforced" else None
    tags = {keys.GATE_STATE: "deciding"}
    if alias:
        tags[keys.GATE_ALIAS] = f"{source.name}@{alias}"
    if sets:
        tags[keys.GATE_QUEUE] = turns.queue_of(str(source.name), sets)
    decision: Decision | None = None
    try:
        with records.record_run(keys.GATES, source, "gate", tags) as (client, run_id):
            waited = turns.take_turn(client, run_id, tags[keys.GATE_QUEUE]) if sets else 0
            for _ in range(_ATTEMPTS):
                grounds = _read(client, source, policy, sets, fresh)
                decision = _decide(
                    source, policy, mode, grounds, reason, run_id, policy_file, fresh
                )
                if sets:
                    now = grounds.holder
                    place = {"name": sets, "before": now, "after": now, "waited_for": waited}
                    decision = replace(decision, alias=place)
                records.log_decision(client, run_id, decision.to_dict())
                if not (sets and decision.let_through):
                    break
                turns.check_turn(client, run_id)
                if _read(client, source, policy, sets, fresh).key == grounds.key:
                    decision = _set_alias(client, source, run_id, decision)
                    break
            else:
                raise StoreError(
                    f"expected the grounds of a decision on {source.uri} to stand still, got"
                    f" other audits or aliases at each of {_ATTEMPTS} attempts; nothing was set,"
                    " try again"
                )
            if not decision.alias_set:
                if mode == "enforced":
                    records.show_on_version(client, source, run_id, decision.to_dict())
                client.set_tag(run_id, keys.GATE_STATE, "done")
    except StoreError as error:
        if decision is None or not decision.alias_set:
            raise
        at = f"the alias {sets} of {source.name} is set, to version {source.version}"
        raise StoreError(f"{error}; {at}") from error
    return decision


# --- the decision -------------------------------------------------------------------------------


def _read(
    client: MlflowClient,
    source: ModelSource,
    policy: GatePolicy,
    sets: str | None,
    fresh: Json | None,
) -> _Grounds:
    aliases: Mapping[str, str] = {}
    if source.name is not None:
        entry = client.get_registered_model(source.name)
        aliases = {str(k): str(v) for k, v in entry.aliases.items()}
    holder = aliases.get(sets) if sets else None
    if policy.mode == "disabled":
        return _Grounds(None, None, Baseline(), None, holder)
    audit = latest_audit(source.identity)
    report = None if audit is None or audit.error else read_report(audit)
    if fresh is not None and fresh["run_id"] is None:  # of a dry run, which logs none
        audit, report = None, fresh["report"]
    version = aliases.get(policy.baseline) if policy.baseline else None
    if version is None or version == source.version:
        same = version is not None
        return _Grounds(audit, report, Baseline(version, same=same), None, holder)
    champion = latest_audit(identify(f"models:/{source.name}/{version}").identity)
    theirs = None if champion is None or champion.error else read_report(champion)
    return _Grounds(audit, report, Baseline(version, report=theirs), champion, holder)


def _decide(
    source: ModelSource,
    policy: GatePolicy,
    mode: str,
    grounds: _Grounds,
    reason: str | None,
    run_id: str,
    policy_file: str | None,
    fresh: Json | None,
) -> Decision:
    now = datetime.now(UTC)
    audit, baseline = grounds.audit, grounds.baseline
    rules: tuple[Rule, ...] = ()
    if mode != "disabled":
        age = None if audit is None else (now - audit.when).total_seconds() / 86400
        if audit is None and fresh is not None:
            age = 0.0
        missing = "this version has no audit"
        if audit is not None and audit.error:
            missing = f"the latest audit (run {audit.run_id}) failed"
        rules = evaluate(policy, grounds.report, age_days=age, baseline=baseline, missing=missing)
    passed = all_passed(rules)
    by, at = _user(), now.isoformat(timespec="seconds")
    overridden = None
    if reason is not None and not passed and mode == "enforced":
        failed = [rule.name for rule in rules if not rule.passed]
        overridden = {"reason": reason, "by": by, "at": at, "rules": failed}
    return Decision(
        outcome="pass" if passed else "refuse",
        mode=mode,
        rules=rules,
        uri=source.uri,
        name=source.name,
        version=source.version,
        model_id=source.model_id,
        identity=source.identity,
        audit_run_id=None if audit is None else audit.run_id,
        policy={
            "file": policy_file,
            "sha256": policy.sha256,
            "rules": policy.model_dump(exclude_none=True),
        },
        by=by,
        decided_at=at,
        baseline=None
        if baseline.version is None
        else {
            "alias": policy.baseline,
            "version": baseline.version,
            "audit_run_id": None
            if grounds.baseline_audit is None
            else grounds.baseline_audit.run_id,
        },
        override=overridden,
        notes=_notes(mode, audit, grounds, reason, passed),
        gate_run_id=run_id,
    )


def _notes(
    mode: str, audit: PastAudit | None, grounds: _Grounds, reason: str | None, passed: bool
) -> tuple[str, ...]:
    if mode == "disabled":
        return ("the policy is disabled: nothing was checked and nothing is set",)
    from flataudit.tracking import policy_hash

    notes = []
    if mode == "dry_run":
        notes.append("dry run: nothing is set")
    if reason is not None and passed:
        notes.append("the override was not needed")
    elif reason is not None and mode == "dry_run":
        notes.append("an override has no effect in a dry run")
    for label, found in (("the audit", audit), ("the baseline's audit", grounds.baseline_audit)):
        if found is not None and not found.error and found.policy != policy_hash():
            notes.append(
                f"{label} (run {found.run_id}) was made by other rules or another version of"
                " flataudit; audit again to compare like with like"
            )
    return tuple(notes)


# --- the alias ----------------------------------------------------------------------------------


def _set_alias(
    client: MlflowClient, source: ModelSource, run_id: str, decision: Decision
) -> Decision:
    """Marks the version, sets the alias, reads it back; the decision is on record already."""
    name, version, alias = str(source.name), str(source.version), dict(decision.alias or {})
    client.set_tag(run_id, keys.GATE_STATE, "setting")
    records.show_on_version(client, source, run_id, decision.to_dict())
    alias["after"] = _write_alias(client, name, alias["name"], version)
    kept = alias["after"] == version
    decision = replace(decision, alias_set=kept, alias=alias)
    with store_errors(
        f"record that {alias['name']} of {name} is now version {alias['after']} (it is set)"
    ):
        client.log_dict(run_id, decision.to_dict(), keys.DECISION)
        client.set_tag(run_id, keys.GATE_STATE, "set" if kept else "lost")
    if not kept:
        raise StoreError(
            f"expected {alias['name']} of {name} to be version {version}, which passed, got"
            f" version {alias['after']}, set by someone else at the same time; run the gate again"
        )
    return decision


def _write_alias(client: MlflowClient, name: str, alias: str, version: str) -> str | None:
    """Sets the alias; the version that it names then, None where it names none."""
    failed: Exception | None = None
    try:
        client.set_registered_model_alias(name, alias, version)
    except Exception as error:  # the answer may be lost where the write is not
        failed = error
    with store_errors(f"read whether the alias {alias} of {name} is now version {version}"):
        found = client.get_registered_model(name).aliases.get(alias)
    now = None if found is None else str(found)
    if failed is not None and now != version:
        left = "it is not set" if now is None else f"it names version {now}"
        with store_errors(f"set the alias {alias} of {name} ({left})"):
            raise failed
    return now


def _check_alias(alias: str | None) -> None:
    if alias is None:
        return
    if not re.fullmatch(r"[A-Za-z0-9_-]+", alias) or re.fullmatch(r"latest|v\d+", alias, re.I):
        raise InputError(
            f"expected --alias of letters, digits, _ and -, not latest or v1, which MLflow"
            f" reserves, got {alias!r}; choose another"
        )


# --- an audit, an override, a user --------------------------------------------------------------


def _audit(source: ModelSource, audit: Audit, policy: GatePolicy, *, write: bool) -> Json | None:
    """A new audit where the stored one cannot decide; None where it can."""
    stored = latest_audit(source.identity)
    if stored is not None and not stored.error:
        age = (datetime.now(UTC) - stored.when).total_seconds() / 86400
        if policy.max_age_days is None or age <= policy.max_age_days:
            return None
    from flataudit.config import AuditOptions
    from flataudit.stages import run_audit

    options = audit.options or AuditOptions()
    return run_audit(source.uri, audit.train, audit.heldout, options, write=write)


def _reason(override: str | None) -> str | None:
    if override is None:
        return None
    text = " ".join(override.split())
    if not text or len(text) > REASON_LIMIT:
        got = "none" if not text else f"{len(text)} characters"
        raise InputError(
            f"expected a reason for --override in 1 to {REASON_LIMIT} characters, got {got}; say"
            " why this version may pass all the same"
        )
    return text


def _user() -> str:
    """Who runs the gate, as MLflow or the machine knows them; nobody vouches for it."""
    known = os.environ.get("MLFLOW_TRACKING_USERNAME")
    if known:
        return known
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # no such user, no environment
        return "unknown"
