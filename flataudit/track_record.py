"""The track record: predicted gaps against those that occurred, over all audits that have both.

A gap is known where `flataudit observe` measured it later, or where the audit itself was given
held-out data. The second kind is kept apart: those data also judged the calibration, by which the
estimate was chosen.

The interval of a gap is about the expected loss, an observed gap carries the error of its own
sample. An observation is covered where |observed - predicted| is at most the two half-widths in
quadrature, at the interval's level (90 %); `covered_bare` leaves the observation's error out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flataudit import keys
from flataudit.audits import metric, model_filter, parse_uri, past_audits, search_runs
from flataudit.results import LEVEL, Z_LEVEL, to_json

Json = dict[str, Any]
Kind = Literal["later", "with_audit"]
CONFIDENCE = 0.95  # of a coverage's interval


@dataclass(frozen=True, slots=True)
class Outcome:
    """One predicted gap and the one that occurred, nats per example.

    kind: later (`flataudit observe`) or with_audit (the audit's own held-out data).
    """

    kind: Kind
    run_id: str
    audit_run_id: str
    uri: str
    name: str | None
    version: str | None
    identity: str
    at: str
    estimator: str | None
    confidence: str | None
    family: str | None
    predicted: float
    low: float
    high: float
    observed: float
    observed_se: float

    @property
    def error(self) -> float:
        """Observed minus predicted: above 0 the gap was larger than predicted."""
        return self.observed - self.predicted

    @property
    def covered(self) -> bool:
        """Whether both agree, each with its own error."""
        return agree(self.predicted, self.low, self.high, self.observed, self.observed_se)

    @property
    def covered_bare(self) -> bool:
        """Whether the observed gap lies in the predicted interval as it stands."""
        return self.low <= self.observed <= self.high

    def to_dict(self) -> Json:
        """Plain JSON values."""
        derived = {"error": self.error, "covered": self.covered, "covered_bare": self.covered_bare}
        found: Json = to_json(self)
        return found | derived


def agree(predicted: float, low: float, high: float, observed: float, se: float) -> bool:
    """Whether an observed gap is as predicted: half-widths at its level, in quadrature."""
    return abs(observed - predicted) <= math.hypot((high - low) / 2, Z_LEVEL * se)


def read_outcomes(name: str | None = None) -> list[Outcome]:
    """All outcomes of one registered model, or of all, newest first.

    Of several observations of one audit the newest counts.

    Raises:
        StoreError: MLflow cannot be read.
    """
    later = _observations(name)
    with_audit = [
        Outcome(
            kind="with_audit",
            run_id=audit.run_id,
            audit_run_id=audit.run_id,
            uri=audit.uri,
            name=audit.name,
            version=audit.version,
            identity=audit.identity,
            at=audit.audited_at,
            estimator=audit.estimator,
            confidence=audit.confidence,
            family=audit.family,
            predicted=audit.gap,
            low=audit.gap_low,
            high=audit.gap_high,
            observed=audit.heldout_gap,
            observed_se=audit.heldout_gap_se,
        )
        for audit in past_audits(name)
        if audit.gap is not None
        and audit.gap_low is not None
        and audit.gap_high is not None
        and audit.heldout_gap is not None
        and audit.heldout_gap_se is not None
    ]
    return sorted([*later.values(), *with_audit], key=lambda o: o.at, reverse=True)


def observed_gaps(name: str | None = None) -> dict[str, float]:
    """The newest gap that `flataudit observe` measured, nats per example, by the audit's run.

    Raises:
        StoreError: MLflow cannot be read.
    """
    return {run_id: outcome.observed for run_id, outcome in _observations(name).items()}


def _observations(name: str | None) -> dict[str, Outcome]:
    """By audit run, the newest of each."""
    later: dict[str, Outcome] = {}
    for run in search_runs(keys.OBSERVATIONS, "" if name is None else model_filter(name)):
        found = _observed(run)
        if found is not None and (name is None or found.name == name):
            later.setdefault(found.audit_run_id, found)
    return later


def summarise(outcomes: Sequence[Outcome]) -> Json:
    """The track record as JSON: {level, confidence, groups: [...], outcomes: [...]}.

    Each group: {by, value, n, covered, coverage, coverage_low, coverage_high, covered_bare, bias,
    bias_se, rmse}; coverage_low and coverage_high are the exact binomial (Clopper-Pearson) 95 %
    interval, which takes audits as independent: audits of one model are less than that. bias is
    the mean of observed minus predicted.
    """
    parts: list[tuple[str, Callable[[Outcome], str | None]]] = [
        ("kind", lambda o: o.kind),
        ("estimator", lambda o: o.estimator),
        ("confidence", lambda o: o.confidence),
    ]
    groups = [{"by": "all", "value": "all", **_statistics(outcomes)}] if outcomes else []
    for by, of in parts:
        values = sorted({value for value in map(of, outcomes) if value})
        groups += [
            {"by": by, "value": value, **_statistics([o for o in outcomes if of(o) == value])}
            for value in values
        ]
    return {
        "level": LEVEL,
        "confidence": CONFIDENCE,
        "groups": groups,
        "outcomes": [outcome.to_dict() for outcome in outcomes],
    }


def _statistics(outcomes: Sequence[Outcome]) -> Json:
    from scipy.stats import binomtest

    n, covered = len(outcomes), sum(o.covered for o in outcomes)
    interval = binomtest(covered, n).proportion_ci(CONFIDENCE, method="exact")
    errors = [o.error for o in outcomes]
    bias = math.fsum(errors) / n
    spread = math.fsum((e - bias) ** 2 for e in errors)
    return {
        "n": n,
        "covered": covered,
        "coverage": covered / n,
        "coverage_low": float(interval.low),
        "coverage_high": float(interval.high),
        "covered_bare": sum(o.covered_bare for o in outcomes),
        "bias": bias,
        "bias_se": math.sqrt(spread / (n - 1) / n) if n > 1 else None,
        "rmse": math.sqrt(_mean(e * e for e in errors)),
    }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / len(found)


def _observed(run: Any) -> Outcome | None:
    """What an observation's run says, None where its logging broke off."""
    tags = run.data.tags
    names = (*(f"flataudit/{name}" for name in ("gap", "gap_low", "gap_high")),
             keys.OBSERVED_GAP, keys.OBSERVED_GAP_SE)  # fmt: skip
    values = [value for value in (metric(run, name) for name in names) if value is not None]
    if run.info.status != "FINISHED" or len(values) < len(names):
        return None
    gap, low, high, observed, se = values
    uri = tags.get(keys.URI_TAG, "")
    name, version = parse_uri(uri)
    return Outcome(
        kind="later",
        run_id=run.info.run_id,
        audit_run_id=tags.get(keys.RUN_ID, ""),
        uri=uri,
        name=name,
        version=version,
        identity=tags.get(keys.MODEL_ID, ""),
        at=tags.get(keys.OBSERVED_AT, ""),
        estimator=tags.get(keys.ESTIMATOR),
        confidence=tags.get(keys.CONFIDENCE),
        family=tags.get(keys.FAMILY),
        predicted=gap,
        low=low,
        high=high,
        observed=observed,
        observed_se=se,
    )
