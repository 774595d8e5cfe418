"""The track record: arithmetic against numpy and scipy, and reading it from a store."""

import json
import xml.etree.ElementTree as ET

import mlflow
import numpy as np
import pytest
from scipy.stats import beta

from flataudit import keys
from flataudit.report import track_record as report
from flataudit.track_record import Outcome, read_outcomes, summarise
from tests.audited_store import STORES, log_report, make_report, pointed_at, register, store_of


def outcome(predicted, observed, half=0.01, se=0.0, **changes):
    values = {
        "kind": "later", "run_id": "r", "audit_run_id": "a", "uri": "models:/m/1", "name": "m",
        "version": "1", "identity": "m-1", "at": "2026-01-01T00:00:00+00:00",
        "estimator": "soft_rank", "confidence": "ok", "family": "categorical",
    }  # fmt: skip
    return Outcome(
        **(values | changes),
        predicted=predicted,
        low=predicted - half,
        high=predicted + half,
        observed=observed,
        observed_se=se,
    )


def group(record, by, value):
    (found,) = [g for g in record["groups"] if (g["by"], g["value"]) == (by, value)]
    return found


def test_covered_with_and_without_the_error_of_the_observation():
    near = outcome(0.10, 0.113, half=0.01, se=0.01)  # sqrt(0.01^2 + 0.01645^2) = 0.0192
    assert (near.covered, near.covered_bare) == (True, False)
    far = outcome(0.10, 0.12, half=0.01, se=0.01)
    assert (far.covered, far.covered_bare) == (False, False)
    assert outcome(0.1, 0.105).covered_bare
    assert far.error == pytest.approx(0.02)


def test_statistics_against_their_definitions():
    rng = np.random.default_rng(1)
    predicted = rng.normal(0.1, 0.02, 40)
    observed = predicted + rng.normal(0.002, 0.008, 40)
    record = summarise(
        [outcome(p, o) for p, o in zip(predicted.tolist(), observed.tolist(), strict=True)]
    )
    whole = group(record, "all", "all")
    errors = observed - predicted
    covered = int((np.abs(errors) <= 0.01).sum())
    assert 0 < covered < 40
    assert (whole["n"], whole["covered"]) == (40, covered)
    assert whole["bias"] == pytest.approx(errors.mean())
    assert whole["bias_se"] == pytest.approx(errors.std(ddof=1) / 40**0.5)
    assert whole["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    low, high = beta.ppf(0.025, covered, 41 - covered), beta.ppf(0.975, covered + 1, 40 - covered)
    assert (whole["coverage_low"], whole["coverage_high"]) == pytest.approx((low, high))
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_groups_by_kind_estimator_and_confidence():
    record = summarise(
        [
            outcome(0.1, 0.1),
            outcome(0.1, 0.2, estimator="tic", confidence="low"),
            outcome(0.1, 0.3, kind="with_audit", estimator="tic", confidence=None),
        ]
    )
    assert group(record, "kind", "later")["n"] == 2
    assert group(record, "kind", "with_audit")["bias"] == pytest.approx(0.2)
    assert group(record, "kind", "with_audit")["bias_se"] is None
    assert group(record, "estimator", "tic")["covered"] == 0
    assert group(record, "confidence", "low")["n"] == 1
    assert {g["value"] for g in record["groups"] if g["by"] == "confidence"} == {"ok", "low"}


def test_the_empty_record():
    record = summarise([])
    assert (record["groups"], record["outcomes"]) == ([], [])
    assert report.headline(record).startswith("No gap has been observed yet")
    assert report.rows(record) == []
    assert report.draw(record).startswith(b"\x89PNG")


def test_words_and_picture():
    record = summarise(
        [
            outcome(0.1, 0.12),
            outcome(0.2, 0.201, se=0.02, confidence="low"),
            outcome(0.4, 0.7, confidence="refused", kind="with_audit"),
            outcome(0.1, 0.1, confidence="unheard-of"),
        ]
    )
    assert report.headline(record).startswith("2 of 4 gaps came out as predicted at the 90 % level")
    assert "0.080 nats larger" in report.headline(record)
    first = report.rows(record)[0]
    assert first[:3] == ("all", "4", "2 (50.0 %)")
    assert report.draw(record).startswith(b"\x89PNG")
    svg = report.draw(record, "svg")
    assert ET.fromstring(svg).tag.endswith("svg")
    assert report.draw(record, "svg") == svg  # the same bytes for the same record


@pytest.fixture(scope="module", params=STORES)
def uri(request):
    with store_of(request) as found:
        yield found


def test_read_from_a_store(uri):
    """Both kinds; the newest observation of an audit; none whose logging broke off."""
    heldout = {"nll": 0.28, "accuracy": 0.9, "gap": 0.08, "gap_se": 0.02}
    with pointed_at(uri):
        client = mlflow.MlflowClient()
        source, other = register("recorded"), register("another")
        first = log_report(source, make_report(gap=0.05))
        second = log_report(source, {**make_report(gap=0.06), "heldout": heldout})
        log_report(other, make_report())
        for audit, gap, status in (
            (first, 0.01, "FINISHED"), (first, 0.07, "FINISHED"), (first, 0.9, "FAILED"),
        ):  # fmt: skip
            _observation(client, source, audit, gap, status)
        _observation(client, other, "elsewhere", 0.02, "FINISHED")
        found = {o.audit_run_id: o for o in read_outcomes("recorded")}
        assert set(found) == {first, second}
        assert (found[first].kind, found[first].observed) == ("later", 0.07)
        assert (found[second].kind, found[second].observed) == ("with_audit", 0.08)
        assert found[second].observed_se == 0.02
        assert (found[first].estimator, found[first].confidence) == ("soft_rank", "ok")
        assert (found[first].name, found[first].identity) == ("recorded", source.identity)
        of_both = [o.name for o in read_outcomes() if o.name in ("recorded", "another")]
        assert sorted(of_both) == ["another", "recorded", "recorded"]


def _observation(client, source, audit_run_id, gap, status):
    from flataudit.records import record_run

    tags = {keys.RUN_ID: audit_run_id, keys.ESTIMATOR: "soft_rank", keys.CONFIDENCE: "ok",
            keys.OBSERVED_AT: "2026-01-01T00:00:00+00:00"}  # fmt: skip
    with record_run(keys.OBSERVATIONS, source, "observe", tags) as (_, run_id):
        for key, value in (
            ("flataudit/gap", 0.05), ("flataudit/gap_low", 0.04), ("flataudit/gap_high", 0.06),
            (keys.OBSERVED_GAP, gap), (keys.OBSERVED_GAP_SE, 0.01),
        ):  # fmt: skip
            client.log_metric(run_id, key, value)
    if status != "FINISHED":
        client.set_terminated(run_id, status)
