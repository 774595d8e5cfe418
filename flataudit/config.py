"""The options of an audit as users write them: on the command line, in YAML, as flow parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, ValidationError

from flataudit.errors import InputError


class AuditOptions(BaseModel):
    """Options with the contract's names and defaults; unknown names are refused.

    penalty: 'auto', a number or {parameter name: number}; training: 'auto' reads the model's
    source run, else a mapping, a file or KEY=VALUE,... text, or None for no record; deadline:
    seconds, of the whole audit; memory_limit: bytes, or text with a unit (8GB, 8GiB);
    checkpoint: a folder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str | None = None
    family: str = "auto"
    penalty: float | str | dict[str, float] = "auto"
    dispersion: float | str = "auto"
    training: str | dict[str, Any] | None = "auto"
    curvature: str = "ggn"
    solver: str = "auto"
    device: str = "auto"
    seed: int = 0
    recalibrate: bool = False
    sensitivity: Literal["auto"] | bool = "auto"
    slices: str | None = None  # COLUMN of the training data, or FILE:COLUMN
    # A day: longer than any exact audit that fits into memory takes, and a hang ends all the same.
    deadline: float = Field(default=86400.0, gt=0, le=1e6)  # seconds; above, timers overflow
    memory_limit: Annotated[ByteSize, Field(gt=0), AfterValidator(int)] | None = None
    checkpoint: str | None = None  # folder; of the matrix-free solvers
    tracking_uri: str | None = None


def make_options(values: dict[str, Any], origin: str = "options") -> AuditOptions:
    """Checked options; empty text counts as not given.

    Raises:
        InputError: names the origin, the field, and what was expected.
    """
    given = {str(key): value for key, value in values.items() if value not in (None, "")}
    try:
        return AuditOptions(**given)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            known = ", ".join(AuditOptions.model_fields)
            raise InputError(
                f"unknown option {field!r} in {origin}; choose from: {known}"
            ) from None
        expected = first["msg"].removeprefix("Input should be ")
        raise InputError(
            f"expected {field} in {origin} to be {expected}, got {first['input']!r}; see flataudit"
            " audit --help"
        ) from None


def read_options(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"expected a YAML file, got none at {path}; check --config") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"expected valid YAML in {path}, got: {reason}") from None
    if not isinstance(values, dict):
        raise InputError(f"expected options as KEY: VALUE in {path}, got {type(values).__name__}")
    make_options(values, str(path))
    return values
