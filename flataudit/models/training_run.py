"""How a model was trained, from what its source run logged.

Files are read with torch's safe loader alone (`weights_only`): nothing in them is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from flataudit.errors import InputError
from flataudit.models.source import ModelSource, if_found, open_client
from flataudit.optimizer_state import OptimizerState, states_in
from flataudit.run_records import training_from_run
from flataudit.store import scratch_folder, store_errors
from flataudit.training import TRAINING_ARTIFACT, TrainingRecord, parse_training

if TYPE_CHECKING:
    from mlflow import MlflowClient

LR_METRICS = re.compile(r"(train/)?(lr|learning_rate)|lr-(SGD|Adam|AdamW)(/pg\d+)?")

STATE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # of mlflow.pytorch.log_state_dict and others
MAX_BYTES = 2**30
MAX_FILES = 8  # checkpoints that are looked into
MAX_DEPTH = 3


def training_record(source: ModelSource, n_samples: int) -> tuple[TrainingRecord | None, str]:
    """How the model was trained, as its source run tells, and a sentence on where from.

    The run's artifact `flataudit/training.json` is the complete record, of a scikit-learn
    estimator too. Without it an estimator's own settings tell; a network's record comes from the
    run's params, the history of its learning rate metric and the optimizer's state_dict, where
    one was logged (`flataudit.run_records.training_from_run`). None, with the reason, where the
    run is missing or says too little.

    Raises:
        StoreError: the store cannot be read.
    """
    if source.run_id is None:
        return None, "the model has no source run"
    with store_errors(f"read the source run {source.run_id}"):
        client = open_client()
        run = if_found(lambda: client.get_run(str(source.run_id)))
        if run is None:
            return None, f"the source run {source.run_id} is not in this store"
        listed = client.list_artifacts(source.run_id, TRAINING_ARTIFACT.rpartition("/")[0])
        if any(item.path == TRAINING_ARTIFACT for item in listed):
            path = client.download_artifacts(source.run_id, TRAINING_ARTIFACT, scratch_folder())
            try:
                return parse_training(path), f"{TRAINING_ARTIFACT} of the source run"
            except InputError as error:
                return None, f"{TRAINING_ARTIFACT} of the source run is not usable: {error}"
        if source.flavor == "sklearn":
            return None, "the estimator's own settings tell how it was fitted"
        names = sorted(filter(LR_METRICS.fullmatch, run.data.metrics), key=len)
        histories = []
        for name in names:
            points = client.get_metric_history(source.run_id, name)
            ordered = sorted(points, key=lambda m: (m.step, m.timestamp))
            histories.append([m.value for m in ordered])
        state, unread = _optimizer_state(client, source.run_id)
    if any(history != histories[0] for history in histories[1:]):
        return None, (
            f"the source run logged several learning rates ({', '.join(names)}); write the record"
            " with flataudit.log_training(..., model=model)"
        )
    params = dict(run.data.params)
    if run.data.metrics.get("stopped_epoch", 0) > 0:  # MLflow's autolog of early stopping, from 0
        params["epochs_run"] = str(int(run.data.metrics["stopped_epoch"]) + 1)
    history = histories[0] if histories else []
    record, reason = training_from_run(params, history, n_samples, state)
    if record is None and unread:
        reason += f"; torch's safe loader does not read {', '.join(unread)}"
    return record, reason


# --- the optimizer's state_dict -----------------------------------------------------------------


def _optimizer_state(client: MlflowClient, run_id: str) -> tuple[OptimizerState | None, list[str]]:
    """The optimizer's state that the run logged last, by its steps; and files that do not load."""
    import torch

    found: list[OptimizerState] = []
    unread: list[str] = []
    for path in sorted(_state_files(client, run_id), key=_newest_first)[:MAX_FILES]:
        local = client.download_artifacts(run_id, path, scratch_folder())
        try:
            loaded = torch.load(local, map_location="cpu", weights_only=True)
        except Exception:  # pickles of other classes, other formats: torch, pickle, zipfile raise
            unread.append(path)
            continue
        found += states_in(loaded)
    if not found:
        return None, unread
    return max(found, key=lambda state: state.steps or 0), unread


def _state_files(client: MlflowClient, run_id: str) -> Iterator[str]:
    """Files that torch.save may have written, outside of models."""
    folders: list[str | None] = [None]
    while folders:
        folder = folders.pop()
        items: list[Any] = client.list_artifacts(run_id, folder)
        if any(PurePosixPath(item.path).name == "MLmodel" for item in items):
            continue
        for item in items:
            path = PurePosixPath(item.path)
            if item.is_dir and len(path.parts) < MAX_DEPTH:
                folders.append(item.path)
            elif path.suffix in STATE_SUFFIXES and (item.file_size or 0) <= MAX_BYTES:
                yield item.path


def _newest_first(path: str) -> tuple[Any, ...]:
    """Optimizers by name before checkpoints, later ones (epoch 10) before earlier (epoch 9)."""
    numbers = [-int(number) for number in re.findall(r"\d+", path)]
    return ("optim" not in path.lower(), numbers, path)
