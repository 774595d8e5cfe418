"""What a model of a store is to the rest of the package, and how the store is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from mlflow import MlflowClient

Kind = Literal["registry", "logged_model", "run", "folder"]
T = TypeVar("T")

_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One model of one store, found and on this machine.

    uri: with an alias resolved to its version; name, version: of kind registry only; model_id:
    None for models logged with MLflow 2; run_id: the run that trained it, None where unknown;
    artifact_sha256: of the model's files, only where there is no model_id.
    """

    uri: str
    kind: Kind
    flavor: str
    local_path: str
    name: str | None = None
    version: str | None = None
    model_id: str | None = None
    run_id: str | None = None
    artifact_sha256: str | None = None

    @property
    def identity(self) -> str:
        """What an audit is bound to: model_id, or name, version and sha256 of the files."""
        if self.model_id is not None:
            return self.model_id
        return "/".join(x for x in (self.name, self.version, self.artifact_sha256) if x)

    def report_fields(self) -> dict[str, str | None]:
        """The fields of `results.ModelInfo` that only the registry knows."""
        return {
            name: getattr(self, name) for name in ("uri", "name", "version", "model_id", "flavor")
        }

    def to_dict(self) -> dict[str, str | None]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelSource:
        """The source that `to_dict` described; unknown keys are ignored."""
        return cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values})


def open_client() -> MlflowClient:
    """A client of a store that answers: from here on an error is about what was asked for."""
    from mlflow import MlflowClient

    made = MlflowClient()
    made.search_experiments(max_results=1)
    return made


def if_found(look_up: Callable[[], T]) -> T | None:
    """What a client call returns, None where MLflow says that it does not exist."""
    from mlflow.exceptions import MlflowException

    try:
        return look_up()
    except MlflowException as error:
        if error.error_code in _MISSING:
            return None
        raise
