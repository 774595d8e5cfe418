import json
import math
import re

import pytest

from flataudit.report import terminal, words
from flataudit.results import PenaltyPoint

SENSITIVITY = (
    PenaltyPoint(1 / 3, 0.061, 0.05, None),
    PenaltyPoint(1.0, 0.052, 0.047, 0.055),
    PenaltyPoint(3.0, 0.041, 0.04, 0.05),
)
NAMES = ["calibrated", "refused", "regression", "without_loo"]
NO_VALUE = re.compile(r"\b(None|null|nan|inf|NaN|Infinity)\b")


@pytest.fixture(params=NAMES)
def report(reports, request):
    return reports[request.param][0]


def rows(text):
    """Label: text of the table under the first line, continued lines joined."""
    found, label = {}, ""
    for line in text.splitlines()[2:]:
        if not line:
            break
        label = line[: terminal.LABEL].strip() or label
        found[label] = f"{found.get(label, '')} {line[terminal.LABEL :].strip()}".strip()
    return found


def test_no_line_is_wider_than_the_screen(report):
    text = terminal.render(report)
    assert max(map(len, text.splitlines())) <= 96
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_the_verdict_comes_first(report):
    first, empty, gap, *_ = terminal.render(report).splitlines()
    name = report["model"]["uri"] or "model"
    assert first == f"{name}: {words.verdict(report).upper()} (confidence {report['confidence']})"
    assert empty == ""
    assert gap.startswith("gap ")


def test_verdicts(reports):
    firsts = {name: terminal.render(reports[name][0]).splitlines()[0] for name in NAMES}
    assert firsts == {
        "calibrated": "models:/fashion-mlp/3: PASS (confidence ok)",
        "refused": "models:/mnist-cnn@candidate: FAIL (confidence refused)",
        "regression": "runs:/4b0c/model: WARN (confidence low)",
        "without_loo": "model: WARN (confidence low)",
    }


def test_the_numbers_are_the_report_s(reports):
    found = rows(terminal.render(reports["calibrated"][0]))
    assert found["gap"] == "0.052 [0.041, 0.064] nats per example, by soft_rank"
    assert found["loss"] == "0.263 [0.251, 0.274] on unseen data, 0.210 trained"
    assert found["accuracy"] == "91.3 % [90.7, 91.9] predicted on unseen data"
    assert found["estimates"] == "soft_rank 0.052, tic 0.047, loo 0.055"
    assert found["calibration"] == "calibrated, direction none"
    assert "constant learning rate of 0.1 over 900 steps" in found["penalty"]
    assert found["solver"].startswith("dual on cuda (NVIDIA H100) in ")


def test_what_does_not_exist_is_a_dash_or_absent(report):
    text = terminal.render(report)
    assert not NO_VALUE.search(text), NO_VALUE.search(text)


def test_absent_estimates_and_accuracy(reports):
    found = rows(terminal.render(reports["without_loo"][0]))
    assert found["estimates"] == "soft_rank 0.081, tic 0.079"
    assert "accuracy" not in found
    assert found["gap"].startswith("0.081 nats per example")  # its interval is not known
    assert "accuracy" not in rows(terminal.render(reports["regression"][0]))


KEPT = {"schema", "seconds", "level", "n", "n_params", "n_samples", "n_outputs"}


def emptied(value, name=""):
    """The same with every number null that can be: the least that a report can hold."""
    if isinstance(value, dict):
        return {key: emptied(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return [emptied(item) for item in value]
    return None if type(value) in (int, float) and name not in KEPT else value


def test_numbers_that_are_all_null(report):
    text = terminal.render(emptied(report))
    assert not NO_VALUE.search(text), NO_VALUE.search(text)
    assert words.DASH in rows(text)["gap"]


def test_long_names_and_notes_are_wrapped(change):
    report = json.loads(json.dumps(change()))
    report["model"]["uri"] = "models:/" + "a-very-long-name-" * 9 + "/12"
    report["penalty"]["assumptions"] = ["word " * 60, "x" * 300]
    report["solver"]["reason"] = "because " * 40
    report["warnings"][0]["message"] = "unbroken" * 40
    text = terminal.render(report)
    assert max(map(len, text.splitlines())) <= 96
    assert "/12: PASS (confidence ok)" in text.partition("\n\n")[0].replace("\n", " ")


def test_warnings_most_severe_first_each_with_its_message(reports):
    report = reports["refused"][0]
    lines = terminal.render(report).splitlines()
    heads = [line for line in lines if re.fullmatch(r"(info|warn|high|critical): \w+", line)]
    codes = ["overconfident", "train_saturated", "penalty_unknown", "estimators_disagree",
             "high_leverage"]  # fmt: skip
    assert [head.partition(": ")[2] for head in heads] == codes
    text = " ".join(" ".join(lines).split())
    for warning in report["warnings"]:
        assert words.sentence(warning["message"]) in text


def test_every_sentence_of_the_explanation_is_there(report):
    text = " ".join(terminal.render(report).split())
    for sentence in words.explain(report):
        assert " ".join(sentence.split()) in text


def test_rendering_changes_nothing(report):
    before = json.dumps(report)
    terminal.render(report)
    assert json.dumps(report) == before
    assert not math.isnan(report["train"]["nll"])


def test_sensitivity_is_a_line_of_the_believed_estimate(change):
    assert "sensitivity" not in rows(terminal.render(change()))
    report = change(sensitivity=SENSITIVITY)
    assert report["gap"]["estimator"] == "soft_rank"
    wanted = "gap 0.061 at D/3, 0.052 at D, 0.041 at 3 D; D: the penalty"
    assert rows(terminal.render(report))["sensitivity"] == wanted


def test_sensitivity_where_an_estimate_does_not_exist(change):
    points = (PenaltyPoint(1 / 3, None, None, None), *SENSITIVITY[1:])
    text = rows(terminal.render(change(sensitivity=points)))["sensitivity"]
    assert text.startswith("gap – at D/3, 0.052 at D")
