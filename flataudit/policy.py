"""The policy of a gate: a YAML file of rules, checked before anything is looked at.

`GatePolicy.model_json_schema()` is its JSON Schema, for editors and for checks elsewhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flataudit.errors import InputError
from flataudit.results import SEVERITIES, ConfidenceLevel, Severity, Verdict
from flataudit.yaml_lines import BadYamlError, RepeatedKeyError, parse_yaml

Mode = Literal["enforced", "dry_run", "disabled"]

_NOT_RULES = ("mode", "max_regression")


def _as_number(value: Any) -> Any:
    """YAML reads 1e-2 as text and yes as true: the first is meant as a number, never the second."""
    if isinstance(value, bool):
        raise ValueError("a number")
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            raise ValueError("a number") from None
    return value


Number = Annotated[float, BeforeValidator(_as_number), Field(allow_inf_nan=False)]


class GatePolicy(BaseModel):
    """The rules of a gate; what is not listed is not checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_gap: Number | None = Field(
        default=None, description="most that the interval's upper end of the gap may be, in nats"
    )
    max_predicted_test_nll: Number | None = Field(
        default=None, description="most that the predicted loss on unseen data may be, in nats"
    )
    min_predicted_accuracy: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        default=None, description="least that the predicted accuracy may be, in [0, 1]"
    )
    calibration: Annotated[list[Verdict], Field(min_length=1)] | None = Field(
        default=None, description="calibration verdicts that pass"
    )
    max_severity: Severity | None = Field(
        default=None, description="gravest severity that a warning may have"
    )
    confidence: Annotated[list[ConfidenceLevel], Field(min_length=1)] | None = Field(
        default=None, description="confidence levels that pass"
    )
    max_age_days: Annotated[Number, Field(gt=0)] | None = Field(
        default=None, description="most days since the audit"
    )
    baseline: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] | None = Field(
        default=None, description="alias of the version to be no worse than"
    )
    max_regression: Annotated[Number, Field(ge=0)] = Field(
        default=0.0,
        description="most that predicted_test_nll may exceed the baseline's, in nats",
    )
    mode: Mode = Field(
        default="enforced",
        description="enforced; dry_run: checks and records, exits 0, sets nothing; disabled",
    )

    def rules(self) -> dict[str, Any]:
        """The thresholds by rule, in the order of the fields; only the listed ones."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            name: value
            for name, value in given.items()
            if value is not None and name not in _NOT_RULES
        }

    @property
    def sha256(self) -> str:
        """Of the values, whatever the file's layout: the same for the same rules."""
        text = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_policy(path: Path) -> GatePolicy:
    """The policy in a YAML file.

    Raises:
        InputError: in one line, with file, line and field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError:
        raise InputError(f"expected a policy file, got the folder {path}; name a file") from None
    except OSError:
        raise InputError(f"expected a policy file at {path}, got none; check --policy") from None
    except UnicodeDecodeError:
        raise InputError(f"expected YAML as UTF-8 text in {path}, got other bytes") from None
    return parse_policy(text, str(path))


def parse_policy(text: str, origin: str = "policy") -> GatePolicy:
    """The policy that YAML text holds; `origin` names it in errors.

    Raises:
        InputError: not YAML, an unknown or repeated key, a value that no rule can have, no rule.
    """
    try:
        values, places = parse_yaml(text)
    except BadYamlError as error:
        where = origin if error.line is None else f"{origin}:{error.line}"
        raise InputError(f"{where}: expected valid YAML, got: {error.reason}") from None
    except RepeatedKeyError as error:
        raise InputError(
            f"{origin}:{error.line}: expected {error.place[-1]} once, got it in line"
            f" {error.before} too; drop one"
        ) from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else f"a {type(values).__name__}"
        raise InputError(
            f"{origin}: expected rules as KEY: VALUE, got {got}; see docs/gate.md for the keys"
        )
    lines = {str(place[0]): line for place, line in places.items() if len(place) == 1}
    for key, value in values.items():
        if value is None:  # which would mean that the rule is not checked
            raise InputError(
                f"{_at(origin, lines, str(key))}: expected a value for {key}, got none; give one,"
                " or drop the line"
            )
    try:
        policy = GatePolicy(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: lines.get(str(e["loc"][0]), 0))
        raise InputError(_explained(first, lines, origin)) from None
    if "max_regression" in values and policy.baseline is None:
        raise InputError(
            f"{_at(origin, lines, 'max_regression')}: expected baseline beside max_regression, got"
            " none; add baseline: champion, or drop max_regression"
        )
    if not policy.rules() and policy.mode != "disabled":
        raise InputError(
            f"{origin}: expected at least one rule, got none, which every model would pass; add"
            " one (docs/gate.md), or mode: disabled"
        )
    return policy


def _at(origin: str, lines: Mapping[str, int], field: str) -> str:
    return f"{origin}:{lines[field]}" if field in lines else origin


def _explained(error: Any, lines: Mapping[str, int], origin: str) -> str:
    field = str(error["loc"][0])
    where = _at(origin, lines, field)
    if error["type"] == "extra_forbidden":
        known = ", ".join(GatePolicy.model_fields)
        return f"{where}: unknown key {field!r}; choose from: {known}"
    if error["type"] == "string_pattern_mismatch":
        expected = "an alias of letters, digits, _ and -"
    elif field in _CHOICES:
        expected = f"{'' if field in ('max_severity', 'mode') else 'a list '}of {_CHOICES[field]}"
        expected = expected.replace("of ", "one of ", 1) if expected.startswith("of") else expected
    else:
        text = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        expected = "a number" if "valid number" in text else text
    return (
        f"{where}: expected {field} to be {expected}, got {error['input']!r}; see docs/gate.md for"
        " what each key takes"
    )


_CHOICES = {
    "calibration": ", ".join(get_args(Verdict)),
    "confidence": ", ".join(get_args(ConfidenceLevel)),
    "max_severity": ", ".join(SEVERITIES),
    "mode": ", ".join(get_args(Mode)),
}
