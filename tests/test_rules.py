"""The rules of a gate as a table: policy, report, what comes out."""

import copy
import math

import pytest

from flataudit.policy import parse_policy
from flataudit.rules import Baseline, all_passed, evaluate
from tests.audited_store import make_report

REPORT = make_report(gap=0.05, se=0.01, train_nll=0.25, accuracy=0.9)  # gap.high 0.0664, nll 0.3
CHAMPION = Baseline("1", report=make_report(gap=0.05, train_nll=0.2))  # nll 0.25


def changed(path, value):
    report = copy.deepcopy(REPORT)
    part = report
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    return report


def one(text, report=REPORT, **more):
    (rule,) = evaluate(parse_policy(text), report, **more)
    return rule


HIGH = REPORT["gap"]["high"]
WARNINGS = [{"code": "a", "severity": "info"}, {"code": "b", "severity": "high"}]


@pytest.mark.parametrize(
    ("text", "report", "value", "passed"),
    [
        (f"max_gap: {HIGH!r}", REPORT, HIGH, True),
        (f"max_gap: {math.nextafter(HIGH, 0)!r}", REPORT, HIGH, False),
        ("max_gap: 0.06", REPORT, HIGH, False),  # the value, 0.05, would pass
        ("max_gap: 1", changed(["gap", "high"], None), None, False),
        ("max_gap: 1", changed(["gap", "high"], math.nan), None, False),
        ("max_gap: 1", changed(["gap", "high"], -math.inf), None, False),
        ("max_gap: 1", changed(["gap", "high"], "0"), None, False),
        ("max_gap: 1", changed(["gap", "high"], False), None, False),
        ("max_gap: 1", changed(["gap"], None), None, False),
        ("max_predicted_test_nll: 0.3", REPORT, 0.3, True),
        ("max_predicted_test_nll: 0.29", REPORT, 0.3, False),
        ("max_predicted_test_nll: 9", changed(["predicted_test_nll"], None), None, False),
        ("min_predicted_accuracy: 0.9", REPORT, 0.9, True),
        ("min_predicted_accuracy: 0.91", REPORT, 0.9, False),
        ("min_predicted_accuracy: 0", changed(["predicted_accuracy"], None), None, False),
        ("calibration: [calibrated]", REPORT, "calibrated", True),
        ("calibration: [not_shown]", REPORT, "calibrated", False),
        ("calibration: [calibrated]", changed(["calibration"], None), None, False),
        ("calibration: [calibrated]", changed(["calibration", "verdict"], None), None, False),
        ("confidence: [ok, low]", REPORT, "ok", True),
        ("confidence: [low]", REPORT, "ok", False),
        ("confidence: [ok]", changed(["confidence"], None), None, False),
        ("max_severity: info", REPORT, "info", True),
        ("max_severity: none", REPORT, "info", False),
        ("max_severity: none", changed(["warnings"], []), "none", True),
        ("max_severity: high", changed(["warnings"], WARNINGS), "high", True),
        ("max_severity: warn", changed(["warnings"], WARNINGS), "high", False),
        ("max_severity: critical", changed(["warnings"], None), None, False),
        (
            "max_severity: critical",  # a severity that this version does not know
            changed(["warnings"], [{"code": "c", "severity": "fatal"}]),
            "fatal",
            False,
        ),
    ],
)
def test_one_rule(text, report, value, passed):
    rule = one(text, report)
    assert rule.passed is passed
    assert rule.value == (pytest.approx(value) if isinstance(value, float) else value)
    assert rule.name == text.partition(":")[0]
    assert not rule.skipped


@pytest.mark.parametrize(
    ("age", "value", "passed"),
    [
        (0.0, 0.0, True),
        (30.0, 30.0, True),
        (30.01, 30.01, False),
        (-0.01, 0.0, True),  # clocks differ by minutes
        (-2.0, -2.0, False),
        (None, None, False),
        (math.nan, None, False),
    ],
)
def test_the_age(age, value, passed):
    rule = one("max_age_days: 30", age_days=age)
    assert (rule.value, rule.passed) == (value, passed)


@pytest.mark.parametrize(
    ("text", "baseline", "value", "passed", "skipped", "said"),
    [
        ("max_regression: 0.05", CHAMPION, 0.05, True, False, "against champion, version 1"),
        ("max_regression: 0.04", CHAMPION, 0.05, False, False, "against champion, version 1"),
        ("", Baseline("2", report=make_report(gap=0.1)), 0.0, True, False, "version 2"),
        ("", Baseline("2", report=make_report(gap=0.2)), -0.1, True, False, "version 2"),
        ("", Baseline(), None, True, True, "no version has the alias champion"),
        ("", None, None, True, True, "no version has the alias champion"),
        ("", Baseline("3", same=True), None, True, True, "this version is champion"),
        ("", Baseline("1"), None, False, False, "no predicted_test_nll for champion"),
        (
            "",
            Baseline("1", report=make_report(family="poisson")),
            None,
            False,
            False,
            "cannot be compared",
        ),
        (
            "",
            Baseline("1", report=changed(["predicted_test_nll", "value"], None)),
            None,
            False,
            False,
            "audit it",
        ),
    ],
)
def test_the_baseline(text, baseline, value, passed, skipped, said):
    rule = one(f"baseline: champion\n{text}", baseline=baseline)
    assert (rule.passed, rule.skipped) == (passed, skipped)
    assert rule.value == (None if value is None else pytest.approx(value))
    assert said in rule.message


def test_the_threshold_is_no_trap_of_floating_point():
    """0.27 - 0.25 is above 0.02 in floating point; 0.27 is not above 0.25 + 0.02."""
    ours = make_report(gap=0.07, train_nll=0.2)
    theirs = Baseline("1", report=make_report(gap=0.05, train_nll=0.2))
    assert one("baseline: champion\nmax_regression: 0.02", ours, baseline=theirs).passed


def test_a_version_without_its_own_number_fails_the_baseline():
    report = changed(["predicted_test_nll", "value"], None)
    assert not one("baseline: champion", report, baseline=CHAMPION).passed


def test_what_is_not_listed_is_not_checked():
    bad = make_report(gap=9.0, accuracy=0.1, calibration__verdict="miscalibrated")
    assert all_passed(evaluate(parse_policy("confidence: [ok]"), bad))


EVERY = """
max_gap: 9
max_predicted_test_nll: 9
min_predicted_accuracy: 0
calibration: [calibrated, within_tolerance, not_shown, miscalibrated, insufficient, unknown]
max_severity: critical
confidence: [ok, low, refused]
max_age_days: 9999
"""


def test_without_an_audit_every_rule_fails_and_one_more():
    rules = evaluate(parse_policy(EVERY), None, age_days=0.0, missing="it failed")
    assert [rule.name for rule in rules] == ["audit", *parse_policy(EVERY).rules()]
    assert not any(rule.passed for rule in rules)
    assert rules[0].message == "it failed"


def test_without_an_audit_a_skipped_rule_does_not_let_it_pass():
    rules = evaluate(parse_policy("baseline: champion"), None)
    assert rules[1].skipped
    assert not all_passed(rules)


def test_an_empty_report_fails_every_rule():
    assert not any(rule.passed for rule in evaluate(parse_policy(EVERY), {}))
