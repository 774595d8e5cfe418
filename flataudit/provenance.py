"""Are the data of an audit the ones the model was trained on: the signs that they are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from flataudit.data import Dataset, digest_of
from flataudit.errors import InputError
from flataudit.store import store_errors

if TYPE_CHECKING:
    from flataudit.models.registry import ModelSource

# The final loss under the names that training scripts, Lightning, transformers and scikit-learn's
# autologging use; the first that the run has counts.
LOSS_METRICS = ("train_nll", "train_loss", "training_loss", "training_log_loss", "loss")
# An epoch's average or one mini-batch stands for the loss at the final weights, so only a loss far
# above it is a sign. One below is none: dropout, augmentation and a penalty raise the logged one.
LOSS_FACTOR = 2.0
LOSS_MARGIN = 0.1  # nats per example

Json = dict[str, Any]


def data_warnings(report: Json, train: Dataset, source: ModelSource) -> list[Json]:
    """The warnings `data_mismatch` that apply: by the data's sha256, by the logged training loss.

    Raises:
        StoreError: the source run cannot be read.
    """
    found = []
    if train.tag_sha256 is not None and train.tag_sha256 != _digest(train):
        found.append(
            "the sha256 of the training data differs from the one logged with it: they have changed"
            " since training; audit the data that the model was trained on"
        )
    logged = logged_loss(source) if report["family"] in ("categorical", "bernoulli") else None
    nll = report["train"]["nll"]
    if logged is not None and nll > LOSS_FACTOR * logged[1] + LOSS_MARGIN:
        name, value = logged
        found.append(
            f"the loss on these data is {nll:.3g} nats per example, but the source run ended at"
            f" {name} = {value:.3g}: they are not the training data, are prepared differently, or"
            " this version is an earlier checkpoint; audit the data that it was trained on"
        )
    return [{"code": "data_mismatch", "severity": "high", "message": message} for message in found]


def _digest(train: Dataset) -> str | None:
    """The data's sha256; of a table with text, which has none, the tag's own."""
    try:
        return digest_of(*train.pair)
    except InputError:
        return train.tag_sha256


def logged_loss(source: ModelSource) -> tuple[str, float] | None:
    """Name and last value of the training loss that the source run logged; None without one.

    A model folder is audited by itself: its run may be in a store that nobody asked for.

    Raises:
        StoreError: the store cannot be read.
    """
    if source.run_id is None or source.kind == "folder":
        return None
    with store_errors(f"read the source run {source.run_id}"):
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        try:
            metrics = MlflowClient().get_run(source.run_id).data.metrics
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
    for name in LOSS_METRICS:
        value = metrics.get(name)
        # MLflow may store what was not finite as 0 or 1.8e308.
        if value is not None and math.isfinite(value) and 0.0 < value < 1e300:
            return name, float(value)
    return None
