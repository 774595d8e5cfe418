"""A standing audit as a YAML file: which models, on what data, how, and when.

`read_pipeline` checks a file as a whole before anything runs; an error names the file, the line,
the field and what to write instead. Run as a module it prints the JSON Schema for editors.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flataudit.config import AuditOptions
from flataudit.errors import InputError
from flataudit.policy import read_policy
from flataudit.yaml_lines import BadYamlError, Place, RepeatedKeyError, parse_yaml

Json = dict[str, Any]

# Options of an audit that have a place of their own in a pipeline, or none at all.
_ELSEWHERE = {
    "target": "write it under data",
    "deadline": "write it at the top level, beside data",
    "tracking_uri": "set MLFLOW_TRACKING_URI: addresses and passwords stay out of these files",
}
_DATA_FILES = (".npz", ".csv", ".parquet")


def _without_elsewhere(schema: Json) -> None:
    for name in _ELSEWHERE:
        schema["properties"].pop(name, None)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Models(_Part):
    """Which registered models, and which versions of each."""

    name: Annotated[str, Field(min_length=1, examples=["churn"])] = Field(
        description="a registered model, or several by a pattern with * and ?"
    )
    select: Annotated[
        Literal["alias", "version", "latest", "unaudited", "all"], Field(examples=["latest"])
    ] = Field(
        description="alias: the version with that alias; version: that one; latest: the highest;"
        " unaudited: those without a verdict of this release and its rules; all: each version"
    )
    alias: Annotated[str | None, Field(examples=["champion"])] = Field(
        default=None, pattern=r"^[A-Za-z0-9_-]+$", description="with select: alias"
    )
    version: Annotated[int | None, Field(examples=[3])] = Field(
        default=None, ge=1, description="with select: version"
    )

    @model_validator(mode="after")
    def _complete(self) -> Models:
        for key, example in (("alias", "champion"), ("version", "3")):
            given, wanted = getattr(self, key) is not None, self.select == key
            if wanted and not given:
                raise PydanticCustomError(
                    "incomplete",
                    "{key} beside select: {key}, got none; write for example `{key}: {example}`",
                    {"key": key, "example": example},
                )
            if given and not wanted:
                raise PydanticCustomError(
                    "contradiction",
                    "no {key} beside select: {select}; write `select: {key}`, or leave {key} out",
                    {"key": key, "select": self.select},
                )
        return self


class Data(_Part):
    """The data of each audit, as on the command line."""

    train: Annotated[str, Field(min_length=1, examples=["mlflow"])] = Field(
        description="training data: a .npz, .csv or .parquet file, module:function, or mlflow (the"
        " dataset that each version's source run logged)"
    )
    heldout: Annotated[str | None, Field(examples=["heldout.npz"])] = Field(
        default=None, description="data never used in training: judges calibration"
    )
    target: Annotated[str | None, Field(examples=["churned"])] = Field(
        default=None, description="the target column of tables"
    )


class Options(AuditOptions):
    """The options of `flataudit audit`, by their long names; all have defaults."""

    model_config = ConfigDict(json_schema_extra=_without_elsewhere)

    @model_validator(mode="before")
    @classmethod
    def _only_here(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            for name, remedy in _ELSEWHERE.items():
                if name in values:
                    raise PydanticCustomError(
                        "elsewhere",
                        "no {name} under options; {remedy}",
                        {"name": name, "remedy": remedy},
                    )
        return values


def _cron(value: str) -> str:
    if len(value.split()) != 5:
        raise PydanticCustomError("cron", "five fields: minute hour day month weekday")
    try:
        CronSim(value, datetime.now())
    except CronSimError as error:
        reason = str(error).lower()
        raise PydanticCustomError(
            "cron", "a cron expression ({reason})", {"reason": reason}
        ) from None
    return value


def _timezone(value: str) -> str:
    try:
        ZoneInfo(value)
    except (KeyError, ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError
        raise PydanticCustomError("timezone", "a timezone of the IANA database") from None
    return value


class Schedule(_Part):
    """When the audit runs by itself."""

    cron: Annotated[str, AfterValidator(_cron), Field(examples=["0 3 * * *"])] = Field(
        description="minute hour day month weekday"
    )
    timezone: Annotated[str, AfterValidator(_timezone), Field(examples=["Europe/Berlin"])] = Field(
        default="UTC", description="of the IANA database"
    )

    def next_run(self, after: datetime | None = None) -> datetime:
        """The first time it fires after now, in the schedule's timezone.

        >>> from datetime import UTC
        >>> nightly = Schedule(cron="0 3 * * *", timezone="Europe/Berlin")
        >>> nightly.next_run(datetime(2026, 1, 5, 12, tzinfo=UTC)).isoformat()
        '2026-01-06T03:00:00+01:00'
        """
        zone = ZoneInfo(self.timezone)
        start = datetime.now(zone) if after is None else after.astimezone(zone)
        return next(CronSim(self.cron, start))


def _not_a_number(value: Any) -> Any:
    if isinstance(value, int | float):  # YAML reads `2024` as a number
        raise PydanticCustomError("text", "text in quotes")
    return value


Tag = Annotated[str, BeforeValidator(_not_a_number), Field(min_length=1, max_length=200)]


class Pipeline(_Part):
    """One standing audit."""

    model_config = ConfigDict(title="flataudit standing audit")

    name: Annotated[str, Field(examples=["churn-nightly"])] = Field(
        pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$",
        max_length=100,
        description="of the audit, unique: lower-case letters, digits and dashes",
    )
    model: Models = Field(examples=[{"name": "churn", "select": "latest"}])
    data: Data = Field(examples=[{"train": "mlflow"}])
    options: Options = Field(default=Options(), examples=[{"solver": "auto"}])
    policy: Annotated[str | None, Field(examples=["policies/churn.yaml"])] = Field(
        default=None, description="the gate policy, a YAML file"
    )
    schedule: Schedule | None = Field(default=None, examples=[{"cron": "0 3 * * *"}])
    deadline: Annotated[float | None, Field(examples=[600])] = Field(
        default=None, gt=0, le=1e6, description="seconds after which one audit is stopped"
    )
    retries: Annotated[int, Field(examples=[2])] = Field(
        default=0, ge=0, le=10, description="of an audit that failed; bad input is not tried again"
    )
    tags: Annotated[list[Tag], Field(examples=[["churn"]])] = Field(
        default=[], description="on the deployment and on the MLflow run of each sweep"
    )

    def to_dict(self) -> Json:
        """What `make_pipeline` reads back: JSON values, defaults left out."""
        found: Json = self.model_dump(mode="json", exclude_defaults=True)
        return found

    def audit_options(self) -> AuditOptions:
        """The options of each audit: those of `options`, with target and deadline."""
        own: Json = {"target": self.data.target, "tracking_uri": None}
        if self.deadline is not None:
            own["deadline"] = self.deadline
        return AuditOptions(**(self.options.model_dump() | own))


def read_pipeline(path: Path | str) -> Pipeline:
    """The standing audit in a YAML file; relative paths in it are meant from its folder.

    Raises:
        InputError: no such file, not YAML, an unknown or missing key, a bad value, or a policy
            that does not exist or is not one; names file, line and field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        got = "a folder" if path.is_dir() else str(error.strerror).lower()
        raise InputError(
            f"expected a pipeline file at {path}, got: {got}; name one, as pipelines/NAME.yaml"
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"expected UTF-8 text in {path}, got other bytes; save it anew") from None
    values, lines = _parse(text, str(path))
    pipeline = _validated(values, str(path), lines)
    pipeline = _from_folder(pipeline, path.parent)
    if pipeline.policy is not None:
        if not Path(pipeline.policy).is_file():
            _refuse(str(path), lines, ("policy",), f"a file, got none at {pipeline.policy}")
        read_policy(Path(pipeline.policy))
    return pipeline


def make_pipeline(values: Mapping[str, Any], origin: str = "the pipeline") -> Pipeline:
    """The standing audit from plain values; paths are meant from the working folder.

    Raises:
        InputError: an unknown or missing key or a bad value; names origin and field.
    """
    return _validated(dict(values), origin, {})


def read_folder(folder: Path | str) -> dict[Path, Pipeline]:
    """All standing audits of a folder, in the order of their files' names.

    Raises:
        InputError: no such folder, no YAML file in it, a bad file, or one name used twice.
    """
    folder = Path(folder)
    paths = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not paths:
        got = "none" if folder.is_dir() else "no such folder"
        raise InputError(f"expected pipeline files in {folder}, got {got}; name their folder")
    found = {path: read_pipeline(path) for path in paths}
    check_names(found)
    return found


def check_names(found: Mapping[Path, Pipeline]) -> None:
    """InputError where two files have the same name of a standing audit."""
    seen: dict[str, Path] = {}
    for path, pipeline in found.items():
        if pipeline.name in seen:
            raise InputError(
                f"expected a name of its own in {path}, got {pipeline.name!r} as in"
                f" {seen[pipeline.name]}; rename one"
            )
        seen[pipeline.name] = path


def schema_text() -> str:
    """The JSON Schema of a pipeline file, as committed in pipelines/schema.json."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return json.dumps(schema | Pipeline.model_json_schema(), indent=2) + "\n"


# --- files --------------------------------------------------------------------------------------


def _parse(text: str, origin: str) -> tuple[Any, dict[Place, int]]:
    """The values of a YAML file and the line of each; a key given twice is an error."""
    try:
        return parse_yaml(text)
    except BadYamlError as error:
        line = "" if error.line is None else f":{error.line}"
        raise InputError(
            f"expected valid YAML in {origin}{line}, got: {error.reason}; values with * : # or {{"
            " need quotes"
        ) from None
    except RepeatedKeyError as error:
        _refuse(origin, {error.place: error.line}, error.place, "this key once, got it before in"
                f" line {error.before}; leave one out")  # fmt: skip


def _from_folder(pipeline: Pipeline, folder: Path) -> Pipeline:
    """The pipeline with the paths in it made absolute."""

    def path(value: str | None) -> str | None:
        return value and str((folder / Path(value).expanduser()).absolute())

    def data(value: str | None) -> str | None:
        return path(value) if value and Path(value).suffix.lower() in _DATA_FILES else value

    training = pipeline.options.training
    if isinstance(training, str) and Path(training).suffix in (".yaml", ".yml", ".json"):
        training = path(training)
    return pipeline.model_copy(
        update={
            "data": pipeline.data.model_copy(
                update={"train": data(pipeline.data.train), "heldout": data(pipeline.data.heldout)}
            ),
            "options": pipeline.options.model_copy(update={"training": training}),
            "policy": path(pipeline.policy),
        }
    )


# --- errors -------------------------------------------------------------------------------------


def _validated(values: Any, origin: str, lines: Mapping[Place, int]) -> Pipeline:
    if not isinstance(values, dict):
        got = "nothing" if values is None else type(values).__name__
        raise InputError(
            f"expected keys as `name: churn-nightly` in {origin}, got {got}; copy an example from"
            " pipelines/"
        )
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda item: _line(lines, item["loc"]) or 0)
        others = len({_place(item["loc"]) for item in found}) - 1
        more = f" ({others} more after this one)" if others else ""
        _refuse(origin, lines, _place(found[0]["loc"]), _explained(found[0]) + more)


def _refuse(origin: str, lines: Mapping[Place, int], place: Place, message: str) -> NoReturn:
    line = _line(lines, place)
    field = ".".join(str(part) for part in place) or "the file"
    where = origin if line is None else f"{origin}:{line}"
    raise InputError(f"{where}: {field}: expected {message}")


def _line(lines: Mapping[Place, int], place: Place) -> int | None:
    """Of the value, or of what it should stand in."""
    for length in range(len(place), 0, -1):
        if place[:length] in lines:
            return lines[place[:length]]
    return min(lines.values(), default=None)


def _place(loc: Place) -> Place:
    """The place without pydantic's names of the members of a union."""
    known: Place = ()
    part: Any = Pipeline
    for name in loc:
        fields = getattr(part, "model_fields", None)
        if fields is not None and known and name not in fields and known[-1] in _UNIONS:
            break
        known = (*known, name)
        part = _PARTS.get(str(name)) if fields is not None and name in fields else None
        if known[-1] in _UNIONS:
            break
    return known


_PARTS: dict[str, type[BaseModel]] = {
    "model": Models,
    "data": Data,
    "options": Options,
    "schedule": Schedule,
}
_UNIONS = {
    "penalty": "auto, a number, or numbers by parameter name",
    "dispersion": "auto or a number",
    "training": "auto, a file, KEY=VALUE,... or keys and values",
    "sensitivity": "auto, true or false",
}


def _explained(error: Any) -> str:
    """What was expected, what was found and what to write instead."""
    kind, place = error["type"], _place(error["loc"])
    owner, example = _owner(place)
    if kind == "extra_forbidden":
        known = list(owner.model_fields)
        if owner is Options:
            known = [name for name in known if name not in _ELSEWHERE]
        close = difflib.get_close_matches(str(place[-1]), known, n=1)
        hint = f"did you mean {close[0]}?" if close else "leave it out"
        return f"one of {', '.join(known)}; {hint}"
    if kind == "missing":
        return f"a value, got none; write for example `{example}`"
    if kind in ("incomplete", "contradiction", "elsewhere"):
        return str(error["msg"])
    expected = re.sub(r"^(Input|Value|String|List) should (be|have) ", "", error["msg"])
    if kind == "string_pattern_mismatch":
        expected = "lower-case letters, digits and dashes" if place == ("name",) else expected
    if place[-1] in _UNIONS:
        expected = _UNIONS[str(place[-1])]
    elif kind in ("model_type", "model_attributes_type", "dict_type"):
        expected = "keys and values, indented below it"
    hint = f"; write for example `{example}`" if example else ""
    return f"{expected}, got {error['input']!r}{hint}"


def _owner(place: Place) -> tuple[type[BaseModel], str]:
    """The model that a place belongs to, and a line to write there."""
    owner: type[BaseModel] = Pipeline
    if len(place) > 1:
        owner = _PARTS.get(str(place[0]), Pipeline)
    name = str(place[1] if owner is not Pipeline else place[0]) if place else ""
    field = owner.model_fields.get(name)
    examples = [] if field is None else field.examples or []
    if field is not None and not examples:  # set inside Annotated
        examples = next(
            (item.examples for item in field.metadata if getattr(item, "examples", None)), []
        )
    return owner, f"{name}: {_yaml(examples[0])}" if examples else ""


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str) and re.search(r"[*:#{]", value):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())
