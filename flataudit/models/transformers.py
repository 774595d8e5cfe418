"""The network inside a pipeline of MLflow's transformers flavor.

Its inputs are what its `forward` takes, token ids and mask by name: the data of an audit are
tokenized as the training was. The transformers library is imported here alone, where such a model
is loaded; flataudit does not depend on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flataudit.errors import InputError
from flataudit.store import one_line

KINDS = ("ForSequenceClassification", "ForImageClassification", "ForAudioClassification")


def load_classifier(folder: Path, uri: str) -> Any:
    """The classifier that `mlflow.transformers.log_model` wrote into `folder`, on the CPU.

    Raises:
        InputError: another kind of pipeline, weights that are not among the files, no transformers
            library, files that do not load.
    """
    from mlflow.models import Model

    settings = Model.load(str(folder)).flavors["transformers"]
    kind = str(settings.get("pipeline_model_type") or "no model's class")
    if not kind.endswith(KINDS):
        raise InputError(
            f"expected a classifier (...{KINDS[0]} or the like) in {uri}, got {kind}: what it was"
            " fitted to is not one label per sample; audit a network with mlflow.pytorch.log_model"
        )
    if not (folder / str(settings.get("model_binary") or "model")).exists():
        raise InputError(
            f"expected the weights of {kind} among the files of {uri}, got a reference to a hub;"
            " log the model with its weights (save_pretrained=True)"
        )
    try:
        import mlflow.transformers
        from transformers.utils import logging
    except ImportError as error:
        raise InputError(
            f"expected the transformers library for {uri}, got none; install it, or log the"
            " pipeline's model with mlflow.pytorch.log_model"
        ) from error
    shows_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        found = mlflow.transformers.load_model(str(folder), return_type="components")
    except Exception as error:  # transformers, safetensors and MLflow: no base class in common
        raise InputError(
            f"expected a transformers model that loads from {uri}, got {type(error).__name__}:"
            f" {one_line(error)}; log it again"
        ) from error
    finally:
        if shows_bars:
            logging.enable_progress_bar()
    return found["model"].to("cpu")
