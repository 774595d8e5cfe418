"""Plain words: the verdict table, the gap's text, what may be relied on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from flataudit.report import words
from flataudit.results import AuditWarning, Calibration, Gap, HeldoutFit, PenaltyInfo


def warnings(*severities: str) -> tuple[AuditWarning, ...]:
    return tuple(AuditWarning("high_leverage", s, "m") for s in severities)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("confidence", "severities", "expected"),
    [
        ("ok", (), "pass"),
        ("ok", ("info", "none"), "pass"),
        ("ok", ("info", "warn"), "warn"),
        ("ok", ("high",), "warn"),
        ("ok", ("critical", "info"), "fail"),
        ("low", (), "warn"),
        ("low", ("warn",), "warn"),
        ("low", ("critical",), "fail"),
        ("refused", (), "fail"),
        ("refused", ("info",), "fail"),
        ("something new", (), "fail"),
    ],
)
def test_verdict_table(change: Any, confidence: str, severities: Any, expected: str) -> None:
    report = change(confidence=confidence, warnings=warnings(*severities))
    assert words.verdict(report) == expected


def test_a_severity_of_the_future_is_never_passed(change: Any) -> None:
    assert words.verdict(change(warnings=warnings("unheard-of"))) == "warn"


@pytest.mark.parametrize(
    ("triple", "expected"),
    [
        ((0.0523, 0.0409, 0.0637), "0.052 [0.041, 0.064]"),
        ((1.2345, 1.1, 1.4), "1.234 [1.100, 1.400]"),
        ((0.00042, 0.0003, 0.00054), "0.00042 [0.00030, 0.00054]"),
        ((-0.0101, -0.0204, 0.0002), "-0.010 [-0.020, 0.000]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
        ((0.05, None, None), "0.050"),
        ((0.05, None, 0.07), "0.050 [–, 0.070]"),
        ((None, None, None), "–"),
    ],
)
def test_gap_text(change: Any, triple: Any, expected: str) -> None:
    gap = Gap(*triple, level=0.9, estimator="tic", reason="r")
    assert words.gap_text(change(gap=gap)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "–"), (float("nan"), "–"), (True, "–"), (0.0, "0.000"), (7, "7"), (4096, "4,096"),
     (0.0523, "0.052"), (12.9, "12.900"), (313.8, "313.8"), (53961.4, "53,961"),
     (-3.25, "-3.250"), (2.1e-5, "2.1e-05")],
)  # fmt: skip
def test_number(value: Any, expected: str) -> None:
    assert words.number(value) == expected


def test_headline_says_how_much_and_whether_to_rely_on_it(reports: Any) -> None:
    assert words.headline(reports["calibrated"][0]) == (
        "Expect the loss on unseen data to exceed the loss on the training data by 0.052 nats per "
        "example (90 % interval 0.041 to 0.064); this prediction may be relied on."
    )
    assert words.headline(reports["refused"][0]).endswith("do not rely on this prediction.")
    assert words.headline(reports["regression"][0]).endswith("use this prediction with care.")
    assert "interval" not in words.headline(reports["without_loo"][0])


def test_headline_without_a_gap(change: Any) -> None:
    gap = Gap(float("nan"), float("nan"), float("nan"), 0.9, "tic", "r")
    assert words.headline(change(gap=gap)) == "No gap could be predicted for this model."


def test_meaning_is_the_geometric_mean_probability(change: Any, reports: Any) -> None:
    # exp(-0.2104) = 0.8103, exp(-0.2627) = 0.7690; 1 - exp(5.3941 - 5.4252) = 0.0306
    assert "81.0 % on training data and of 76.9 %" in words.meaning(change())
    assert "3.1 % less likely" in words.meaning(reports["regression"][0])
    assert "true count" in words.meaning(change(family="poisson"))


def test_explain_tells_the_observed_gap_and_where_it_lies(change: Any) -> None:
    inside = change(heldout=HeldoutFit(0.26, 0.91, gap=0.05, gap_se=0.01))
    outside = change(heldout=HeldoutFit(0.31, 0.91, gap=0.1, gap_se=0.01))
    assert any("0.050 (standard error 0.010), inside" in line for line in words.explain(inside))
    assert any("outside the predicted interval" in line for line in words.explain(outside))


def test_accuracy_comes_from_held_out_data_where_given(change: Any) -> None:
    assert words.accuracy_source(change()) == "predicted on unseen data"
    seen = change(heldout=HeldoutFit(0.26, 0.91, gap=0.05, gap_se=0.01))
    assert words.accuracy_source(seen) == "on the held-out data"


def test_explain_never_says_none_or_nan(reports: Any) -> None:
    for report, _ in reports.values():
        text = " ".join(words.explain(report)) + words.description_block(report, None)
        assert "None" not in text
        assert "nan" not in text.split()


def test_reliance_names_the_reasons(reports: Any, change: Any) -> None:
    label, reasons = words.reliance(reports["refused"][0])
    assert label == "No, do not rely on it"
    assert any("over-confident" in r for r in reasons)
    assert any("guess" in r for r in reasons)
    assert any("last detail" in r for r in reasons)
    assert words.reliance(change())[0] == "Yes, rely on it"
    penalty = PenaltyInfo(1.0, 0, "evidence", None, None)
    assert any("guess" in r for r in words.reliance(change(penalty=penalty))[1])


@pytest.mark.parametrize(
    ("verdict", "direction", "part"),
    [("calibrated", "none", "match"), ("within_tolerance", "over", "within tolerance"),
     ("not_shown", "none", "too few samples"), ("miscalibrated", "over", "over-confident"),
     ("miscalibrated", "under", "under-confident"), ("miscalibrated", "mixed", "too low"),
     ("miscalibrated", "none", "off"), ("insufficient", "none", "Too few"),
     ("unknown", "none", "unknown")],
)  # fmt: skip
def test_calibration_text(change: Any, verdict: Any, direction: Any, part: str) -> None:
    calibration = Calibration("loo", 500, verdict, direction, "none")
    assert part in words.calibration_text(change(calibration=calibration))


def test_description_block_is_verdict_first_and_links_the_run(reports: Any) -> None:
    text = words.description_block(reports["refused"][0], "http://host/#/runs/1 2")
    assert text.startswith("**flataudit: fail.** ")
    assert "0.620 [0.585, 0.655] nats per example" in text
    assert "`overconfident` (critical)" in text
    assert text.endswith("(<http://host/#/runs/1 2>)")
    assert "<http" not in words.description_block(reports["calibrated"][0], None)


def test_warnings_come_most_severe_first(change: Any) -> None:
    report = change(warnings=warnings("info", "critical", "warn", "high"))
    order = [w["severity"] for w in words.sorted_warnings(report)]
    assert order == ["critical", "high", "warn", "info"]


def test_lower_bound_is_said(calibrated: Any) -> None:
    bound = dataclasses.replace(calibrated.gap, lower_bound=True)
    report = dataclasses.replace(calibrated, gap=bound).to_dict()
    assert words.LOWER_BOUND in words.explain(report)


def test_what_the_interval_holds_is_said(calibrated: Any) -> None:
    """exp(1.645 x 0.42) = 2.0."""
    gap = dataclasses.replace(calibrated.gap, model_error=0.42)
    report = dataclasses.replace(calibrated, gap=gap).to_dict()
    (line,) = [text for text in words.explain(report) if "factor" in text]
    assert "90 % interval" in line
    assert "a factor of 2.0 either way" in line
    del report["gap"]["model_error"]  # as audits of before the decision 17 are
    assert words.interval_text(report) == ""


@pytest.mark.parametrize("confidence", ["low", "refused"])
def test_every_reason_of_a_low_confidence_is_given(change: Any, confidence: Any) -> None:
    doubts = ("the penalty is a guess", "the model is over-confident")
    report = change(confidence=confidence, confidence_reasons=doubts)
    label, reasons = words.reliance(report)
    assert (label, reasons[:2]) == (words.RELIANCE[confidence], list(doubts))
    assert len(reasons) == 3
    assert "is known" in reasons[2]
    report["penalty"]["source"] = "evidence"  # what is guessed is said once
    assert words.reliance(report)[1] == list(doubts)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("the model is linear", "The model is linear."), ("Why?", "Why?"), ("Done.", "Done."),
     ("", ""), (None, "")],
)  # fmt: skip
def test_sentence(text: Any, expected: str) -> None:
    assert words.sentence(text) == expected
