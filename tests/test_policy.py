"""Policy files: what they may hold, and what is said of what they may not."""

import re
from pathlib import Path

import pytest
import yaml

from flataudit.errors import InputError
from flataudit.policy import GatePolicy, parse_policy, read_policy

ROOT = Path(__file__).parents[1]
CONTRACT = """
max_gap: 0.10                 # on gap.high
max_predicted_test_nll: 0.80
min_predicted_accuracy: 0.90
calibration: [calibrated, within_tolerance, not_shown]
max_severity: warn
confidence: [ok, low]
max_age_days: 30              # of the audit
baseline: champion            # alias
max_regression: 0.02
mode: enforced                # disabled | dry_run | enforced
"""


def test_the_contract_s_policy():
    policy = parse_policy(CONTRACT)
    assert policy.rules() == {
        "max_gap": 0.1,
        "max_predicted_test_nll": 0.8,
        "min_predicted_accuracy": 0.9,
        "calibration": ["calibrated", "within_tolerance", "not_shown"],
        "max_severity": "warn",
        "confidence": ["ok", "low"],
        "max_age_days": 30.0,
        "baseline": "champion",
    }
    assert (policy.max_regression, policy.mode) == (0.02, "enforced")


@pytest.mark.parametrize("path", sorted((ROOT / "pipelines/policies").glob("*.yaml")), ids=str)
def test_every_policy_of_the_project_is_one(path):
    assert read_policy(path).rules()


def test_only_what_is_listed_is_a_rule():
    policy = parse_policy("max_gap: 1")
    assert policy.rules() == {"max_gap": 1.0}
    assert policy.mode == "enforced"
    assert parse_policy("baseline: champion").max_regression == 0.0
    assert parse_policy("mode: disabled").rules() == {}


def test_numbers_that_yaml_takes_for_text():
    assert parse_policy("max_gap: 1e-2").max_gap == 0.01


def test_the_same_rules_have_the_same_hash():
    assert (
        parse_policy(CONTRACT).sha256
        == GatePolicy(**yaml.safe_load(CONTRACT)).sha256
        == parse_policy("\n".join(reversed(CONTRACT.splitlines()))).sha256
    )
    assert parse_policy("max_gap: 0.1").sha256 != parse_policy("max_gap: 0.2").sha256


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("max_gap: much", 1, "expected max_gap to be a number, got 'much'"),
        ("max_gap: true", 1, "expected max_gap to be a number, got True"),
        ("max_gap: .nan", 1, "expected max_gap to be a finite number, got nan"),
        ("max_gap: .inf", 1, "finite number"),
        ("max_gap: [1]", 1, "expected max_gap to be a number, got [1]"),
        ("max_gap: 2020-01-01", 1, "expected max_gap to be a number"),
        ("mode: enforced\n\nmax_gap:", 3, "expected a value for max_gap, got none"),
        ("max_gap: 1\nmax_gap: 2", 2, "expected max_gap once, got it in line 1 too"),
        ("max_gap: 1\nmax_gaps: 2", 2, "unknown key 'max_gaps'; choose from: max_gap, "),
        ("# no\nmax_severity: bad", 2, "one of none, info, warn, high, critical, got 'bad'"),
        ("calibration: calibrated", 1, "a list of calibrated, within_tolerance"),
        ("calibration: [good]", 1, "a list of calibrated, within_tolerance"),
        ("confidence: []", 1, "a list of ok, low, refused, got []"),
        ("mode: on", 1, "one of enforced, dry_run, disabled, got True"),
        ("max_age_days: 0", 1, "greater than 0, got 0"),
        ("min_predicted_accuracy: 90", 1, "less than or equal to 1, got 90"),
        ("baseline: two words", 1, "an alias of letters, digits, _ and -, got 'two words'"),
        ("baseline: c\nmax_regression: -1", 2, "greater than or equal to 0, got -1"),
        ("max_gap: 1\nmax_regression: 1", 2, "expected baseline beside max_regression"),
        ("max_gap: [", 1, "expected valid YAML"),
        ("x: !!python/object:os.system a", 1, "expected valid YAML"),
    ],
)
def test_errors_name_file_line_and_field(tmp_path, text, line, said):
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_policy(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got an empty file"),
        ("- 1", "got a list"),
        ("text", "got a str"),
        ("mode: enforced", "at least one rule"),
        ("mode: dry_run", "at least one rule"),
    ],
)
def test_a_file_without_rules_is_refused(text, said):
    with pytest.raises(InputError, match=re.escape(said)):
        parse_policy(text)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"max_gap: 1 # \xe9")
    for path, said in (
        (tmp_path / "none.yaml", "got none; check --policy"),
        (tmp_path, "got the folder"),
        (tmp_path / "latin.yaml", "UTF-8"),
    ):
        with pytest.raises(InputError, match=re.escape(said)):
            read_policy(path)


def test_a_json_schema_comes_with_it():
    schema = GatePolicy.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == set(GatePolicy.model_fields)
    assert all("description" in field for field in schema["properties"].values())
