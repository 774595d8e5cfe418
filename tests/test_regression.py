"""The warning that a model's gap rose since its last audit."""

import math

import numpy as np
import pytest
from mlflow import MlflowClient

from flataudit import stages
from flataudit.config import make_options
from flataudit.history import earlier_audits
from flataudit.regression import regression_warnings, rise
from flataudit.results import to_json
from flataudit.store import embedded_store
from tests.audited_store import log_report, make_report, pointed_at, register

SE = 0.006
MARGIN = 1.6448536269514722 * SE


def past(gap=0.05, margin=MARGIN, **changes):
    found = {
        "version": "3", "audited_at": "2026-03-01T10:00:00+00:00", "gap": gap,
        "gap_low": gap - margin, "gap_high": gap + margin, "family": "categorical",
        "data_sha256": make_report()["data"]["sha256"],
    }  # fmt: skip
    return found | changes


def codes(report, *earlier):
    return [w["code"] for w in regression_warnings(report, earlier)]


def test_more_than_the_interval_of_the_rise():
    """For equal standard errors sqrt(2) times one margin."""
    limit = math.sqrt(2.0) * MARGIN
    for by, expected in ((limit * 1.001, ["gap_regressed"]), (limit * 0.999, []), (-1.0, [])):
        assert codes(make_report(gap=0.05 + by, se=SE), past()) == expected


def test_the_near_side_of_each_interval_counts():
    report = make_report(gap=0.10, se=SE)
    assert codes(report, past(gap_high=0.11)) == []
    assert codes(report, past(gap_low=-9.0)) == ["gap_regressed"]


def test_as_often_as_the_level_says_where_nothing_changed():
    """Under no change at level 0.9 (two-sided) one in twenty is found, independent errors given."""
    random = np.random.default_rng(0)
    n = 20_000
    found = 0
    for one, other in random.normal(0.05, SE, (n, 2)):
        pair = [{"value": g, "low": g - MARGIN, "high": g + MARGIN} for g in (one, other)]
        found += rise(*pair)[1] > 0
    assert abs(found / n - 0.05) < 4 * math.sqrt(0.05 * 0.95 / n)


def test_only_the_newest_with_a_gap_counts():
    report = make_report(gap=0.10, se=SE)
    assert codes(report) == []
    assert codes(report, past(0.10), past(0.01)) == []
    assert codes(report, past(gap=0.1, gap_low=None), past(0.01)) == ["gap_regressed"]


def test_what_else_changed_is_said():
    report = make_report(gap=0.10, se=SE)
    (plain,) = regression_warnings(report, [past()])
    assert plain["severity"] == "warn"
    assert "rose by 0.05 nats per example" in plain["message"]
    assert "of version 3 on 2026-03-01, from 0.05 [" in plain["message"]
    assert "data are other" not in plain["message"]
    assert "family" not in plain["message"]
    (other,) = regression_warnings(report, [past(data_sha256="f" * 64, family="poisson")])
    assert "the training data are other ones than then" in other["message"]
    assert "the family was poisson then and is categorical now" in other["message"]
    (unknown,) = regression_warnings(report, [past(data_sha256=None, family=None, version=None)])
    assert "other ones" not in unknown["message"]


@pytest.fixture
def audited(tmp_path):
    with pointed_at(embedded_store(tmp_path / "store")) as uri:
        yield uri


def test_an_audit_says_it_and_logs_it(audited):
    """From the history in MLflow to the report, through the stages' own composition."""
    old, new = register("net"), register("net")
    log_report(old, make_report(gap=0.05, se=SE))
    options = make_options({"tracking_uri": audited})

    def run(gap, **more):
        report = to_json(make_report(gap=gap, se=SE))
        fake = stages.Stages(
            load=lambda *_: {"source": new.to_dict(), "train": "x", "heldout": None},
            estimate=lambda *_: {"report": report, "display": {}, "seconds": 1.0},
            log=lambda loaded, result, values: log_report(new, result["report"]),
        )
        found = stages.run_audit(new.uri, "x", None, options, stages=fake, **more)
        return [w["code"] for w in found["report"]["warnings"]], report

    assert run(0.10, write=False)[0] == ["gap_regressed", "high_leverage"]
    found, given = run(0.10)
    assert found == ["gap_regressed", "high_leverage"]
    assert [w["code"] for w in given["warnings"]] == ["high_leverage"]  # a kept estimate stays so
    tags = MlflowClient().get_model_version("net", "2").tags
    assert tags["flataudit.warnings"] == "gap_regressed, high_leverage"
    assert tags["flataudit.verdict"] == "warn"
    assert earlier_audits("net")[0]["warnings"][0] == "gap_regressed"
    assert run(0.10)[0] == ["high_leverage"]  # the last audit is that of 0.10 now
