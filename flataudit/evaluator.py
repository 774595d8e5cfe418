"""The MLflow evaluator `flataudit`: an audit inside `mlflow.models.evaluate`.

    mlflow.models.evaluate(model, data, targets="label", model_type="classifier",
                           evaluators="flataudit", evaluator_config={"train": (x, y)})

`data` is the held-out data; the data the model was trained on stand in the config, and without
them the evaluator does nothing, since MLflow asks every plugin where none is named. The metrics
and the report go to evaluate's run. It is no audit of record: tags and description of a
registered version stay as they are (docs/decisions/0011-evaluator-and-webhook.md).

MLflow imports this file when something is first evaluated; torch comes with the first audit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow.models.evaluation.base import EvaluationArtifact, EvaluationResult, ModelEvaluator

from flataudit.errors import AuditFailedError, FlatauditError, InputError
from flataudit.store import one_line

if TYPE_CHECKING:
    from flataudit.config import AuditOptions
    from flataudit.data import Dataset
    from flataudit.models.registry import ModelSource

DATA_KEYS = ("train", "heldout")

Json = dict[str, Any]


class FlatauditEvaluator(ModelEvaluator):
    """Audits a PyTorch or scikit-learn model that MLflow can load.

    `evaluator_config`:
        train: Required: (x, y), a DataFrame with the column `target`, or what the command line's
            --train takes ("train.npz", "module:function", "mlflow").
        heldout: The same forms, in place of evaluate's `data` (MLflow's tables hold no images and
            no second input); False: no held-out data, and `data` is not used.
        penalty, training, family, ...: The options of an audit (`flataudit.config.AuditOptions`)
            that `flataudit.audit` takes.
    """

    @classmethod
    def can_evaluate(
        cls, *, model_type: str | None, evaluator_config: Mapping[str, Any] | None, **_: Any
    ) -> bool:
        """Whether the config names training data."""
        return "train" in (evaluator_config or {})

    def evaluate(
        self,
        *,
        model_type: str | None,
        dataset: Any,
        run_id: str,
        evaluator_config: Mapping[str, Any],
        model: Any = None,
        model_id: str | None = None,
        **_: Any,
    ) -> EvaluationResult:
        """The audit: metrics (`flataudit/gap`, ...) and artifacts, both also logged to the run.

        Raises:
            InputError: a model, data or an option that cannot be audited, in one line.
            AuditFailedError, NumericalError: the audit broke.
            StoreError: MLflow failed.
        """
        from flataudit import tracking

        report, display, source = _audited(model, dataset, dict(evaluator_config))
        folder, uri = tracking.log_evaluation(
            report,
            display,
            source,
            run_id=run_id,
            train=_described(evaluator_config["train"]),
            # With a model_id MLflow logs the metrics itself: to this run and to the model.
            data=None if model_id else (str(dataset.name), str(dataset.digest or dataset.hash)),
        )
        return EvaluationResult(
            metrics=tracking.metrics_of(report), artifacts=_artifacts(folder, uri), run_id=run_id
        )


def _audited(model: Any, dataset: Any, config: Json) -> tuple[Json, Json, ModelSource]:
    """Report and display of the audit, and what is known of the model."""
    given = {key: config.pop(key, None) for key in DATA_KEYS}
    options = _options(config)
    source, raw = _model(model)
    target = options.target or dataset.targets_name
    train = _data(given["train"], "train", target, source)
    heldout = _heldout(given["heldout"], dataset, target, source)
    if heldout is not None:
        _check_apart(train, heldout)
    try:
        return *_estimate(raw, train, heldout, options, source), source
    except FlatauditError:
        raise
    except Exception as error:
        raise AuditFailedError(
            f"expected the audit to complete, got {type(error).__name__}: {one_line(error)}; run it"
            " with flataudit.audit for the details"
        ) from error


def _options(config: Json) -> AuditOptions:
    from flataudit.config import make_options

    known = ["target", *_option_names()]
    unknown = [name for name in config if name not in known and name != "col_mapping"]
    if unknown:
        raise InputError(
            f"unknown option {unknown[0]!r} in evaluator_config of flataudit; choose from:"
            f" {', '.join([*DATA_KEYS, *known])}; options of other evaluators go into a dict of"
            " their own, as {'flataudit': {...}, 'default': {...}}"
        )
    return make_options({k: v for k, v in config.items() if k in known}, "evaluator_config")


def _option_names() -> list[str]:
    """The options that `flataudit.audit` itself takes: the others are about stores and processes
    (a deadline needs a child process, which has none of a notebook's arrays)."""
    from flataudit.audit import audit
    from flataudit.config import AuditOptions

    parameters = signature(audit).parameters
    return [name for name in AuditOptions.model_fields if name in parameters]


def _model(model: Any) -> tuple[ModelSource, Any]:
    """Where the model comes from, as far as its own metadata tell, and the network or estimator."""
    from flataudit.models.flavors import refuse_flavor
    from flataudit.models.registry import ModelSource

    metadata = getattr(model, "metadata", None)
    if metadata is None or not hasattr(model, "get_raw_model"):
        got = "none" if model is None else "a function or a served model"
        raise InputError(
            f"expected a model URI or mlflow.pyfunc.load_model(...) as the model, got {got}; log"
            " the model and give its URI, or call flataudit.audit on the network itself"
        )
    flavors = [name for name in metadata.flavors if name != "python_function"]
    flavor = next((name for name in ("pytorch", "sklearn") if name in flavors), None)
    if flavor is None:
        refuse_flavor((flavors or ["python_function"])[0])
    run_id, model_id = metadata.run_id or None, metadata.model_id or None
    uri = f"models:/{model_id}" if model_id else f"runs:/{run_id}/{metadata.artifact_path}"
    kind = "logged_model" if model_id else "run" if run_id else "folder"
    if kind == "folder":
        uri = "a model without an id"
    source = ModelSource(uri, kind, flavor, uri, model_id=model_id, run_id=run_id)  # type: ignore[arg-type]
    return source, model.get_raw_model()


def _data(given: Any, name: str, target: str | None, source: ModelSource) -> Dataset:
    """The data that the config's `train` or `heldout` names or holds."""
    import pandas as pd

    from flataudit.data import Dataset, load_data

    if isinstance(given, str | Path):
        return load_data(str(given), target=target, source=source)
    if isinstance(given, pd.DataFrame):
        return _table(given, name, target, source)
    if isinstance(given, tuple | list) and len(given) == 2:
        x, y = given
        return Dataset(x, y, name)
    raise InputError(
        f"expected {name} in evaluator_config as (x, y), a DataFrame or a file, got"
        f" {type(given).__name__}; give what the model was trained on"
    )


def _heldout(given: Any, dataset: Any, target: str | None, source: ModelSource) -> Dataset | None:
    """The config's held-out data, else evaluate's own."""
    import pandas as pd

    from flataudit.data import Dataset

    if given is False:
        return None
    if given is not None:
        return _data(given, "heldout", target, source)
    if dataset.labels_data is None:
        raise InputError(
            "expected targets for the held-out data, got none; give evaluate's targets=, or set"
            " 'heldout': False"
        )
    x, y = dataset.features_data, dataset.labels_data
    if isinstance(x, pd.DataFrame):
        column = str(dataset.targets_name)
        return _table(x.assign(**{column: y}), "data", column, source)
    return Dataset(x, y, "data")


def _table(frame: Any, name: str, target: str | None, source: ModelSource) -> Dataset:
    """A DataFrame, read as the same table in a file would be."""
    from flataudit.data import load_data
    from flataudit.store import scratch_folder

    if target is None:
        raise InputError(
            f"expected the target column of the table {name}, got none; add 'target' to"
            " evaluator_config"
        )
    path = Path(scratch_folder()) / f"{name}.parquet"
    try:
        frame.set_axis([str(column) for column in frame.columns], axis="columns").to_parquet(
            path, index=False
        )
    except Exception as error:  # of pyarrow, whose errors share no base class with pandas's
        raise InputError(
            f"expected a table of numbers and text in {name}, got: {one_line(error)}; convert its"
            " columns"
        ) from error
    return replace(load_data(str(path), target=target, source=source), origin=name)


def _check_apart(train: Dataset, heldout: Dataset) -> None:
    from flataudit.data import digest_of

    if digest_of(*train.pair) == digest_of(*heldout.pair):
        raise InputError(
            "expected held-out data that the model was not trained on as evaluate's data, got the"
            " training data themselves; give others, or set 'heldout': False"
        )


def _estimate(
    model: Any,
    train: Dataset,
    heldout: Dataset | None,
    options: AuditOptions,
    source: ModelSource,
) -> tuple[Json, Json]:
    from flataudit.audit import audit
    from flataudit.labels import text_labels
    from flataudit.models.registry import training_record
    from flataudit.provenance import data_warnings

    training, origin = options.training, "none given"
    if training == "auto":
        record, origin = training_record(source, len(train.y))
        training = None if record is None else record.to_record()
    named = text_labels(train.y) is not None
    found = audit(
        model,
        train.pair,
        heldout=None if heldout is None else heldout.pair,
        training=training,
        classes=_classes(source, model) if named else None,
        **{name: getattr(options, name) for name in _option_names() if name != "training"},
    )
    report = found.to_dict()
    report["model"] |= source.report_fields()
    report["warnings"] = data_warnings(report, train, source) + report["warnings"]
    if report["penalty"]["source"] == "evidence":
        report["penalty"]["assumptions"].append(f"no training record: {origin}")
    return report, dict(found.display)


def _classes(source: ModelSource, model: Any) -> list[str] | None:
    from flataudit.models.classes import class_names

    try:
        return class_names(source, model)
    except InputError:  # a model that is in no store: only its attributes can tell
        return None


def _described(train: Any) -> str:
    return str(train) if isinstance(train, str | Path) else "train"


def _artifacts(folder: Path, uri: str) -> dict[str, EvaluationArtifact]:
    """The run's artifacts by name, with their content, as `EvaluationResult.save` needs it."""
    from mlflow.models.evaluation import artifacts
    from PIL import Image

    from flataudit.keys import ARTIFACTS

    found: dict[str, EvaluationArtifact] = {}
    for path in sorted(folder.iterdir()):
        name, where = f"{ARTIFACTS}/{path.name}", f"{uri}/{path.name}"
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                found[name] = artifacts.ImageEvaluationArtifact(where, image.copy())
        elif path.suffix == ".json":
            content = json.loads(path.read_text(encoding="utf-8"))
            found[name] = artifacts.JsonEvaluationArtifact(where, content)
        else:
            text = path.read_text(encoding="utf-8")
            found[name] = artifacts.TextEvaluationArtifact(where, text)
    return found
