"""The training record of a source run, as people's tools really write it."""

from __future__ import annotations

import json
import logging
import warnings

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from flataudit.config import AuditOptions
from flataudit.errors import InputError
from flataudit.models.registry import ModelSource, resolve, training_record
from flataudit.stages import run_audit
from tests.mlflow_store import REQUIREMENTS, make_store, toy_data, tracking


@pytest.fixture
def store():
    made = make_store()
    with tracking(made.uri):
        yield made


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    # Autologging infers a model's requirements in a process of its own, for 10 s and more.
    monkeypatch.setenv("MLFLOW_REQUIREMENTS_INFERENCE_TIMEOUT", "1")
    for name in (
        "mlflow.pytorch",
        "mlflow.sklearn",
        "lightning.pytorch",
        "mlflow.utils.environment",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def new_run(params, history=(), artifact=None):
    client = mlflow.MlflowClient()
    run_id = client.create_run(client.get_experiment_by_name("training").experiment_id).info.run_id
    for name, value in params.items():
        client.log_param(run_id, name, value)
    for step, value in history:
        client.log_metric(run_id, "learning_rate", value, step=step)
    if artifact is not None:
        client.log_text(run_id, artifact, "flataudit/training.json")
    return ModelSource("models:/x/1", "registry", "pytorch", "/x", run_id=run_id)


def test_record_from_params_and_lr_metric(store):
    record, reason = training_record(resolve("models:/digits/1"), 80)
    assert record is not None
    assert (record.optimizer, record.batch_size, record.weight_decay) == ("sgd", 80, 0.01)
    assert record.sum_lr == pytest.approx(0.5 + 0.4 + 0.3 + 0.2)
    assert reason


def test_the_lr_history_is_taken_in_the_order_of_its_steps(store):
    source = new_run({"optimizer": "sgd"}, [(2, 0.3), (0, 0.1), (1, 0.2)])
    record, _ = training_record(source, 80)
    assert record is not None
    assert record.sum_lr == pytest.approx(0.6)


def test_the_complete_record_comes_first(store):
    complete = json.dumps({"optimizer": "adam", "sum_lr": 3, "batch_size": 32, "weight_decay": 0.1})
    record, reason = training_record(new_run({"optimizer": "sgd"}, [(0, 0.1)], complete), 80)
    assert record is not None
    assert (record.optimizer, record.sum_lr, record.batch_size) == ("adam", 3, 32)
    assert reason == "flataudit/training.json of the source run"


def log_metrics(source, **histories):
    client = mlflow.MlflowClient()
    for name, values in histories.items():
        for step, value in enumerate(values):
            client.log_metric(source.run_id, name.replace("lr_", "lr-"), value, step=step)
    return source


def test_lightnings_learning_rate_monitor(store):
    params = {"optimizer_name": "SGD", "lr": 0.3, "epochs": 4, "batch_size": 40}
    record, _ = training_record(log_metrics(new_run(params), lr_SGD=[0.1] * 8), 80)
    assert record is not None
    assert (record.steps, record.sum_lr) == (8, pytest.approx(0.8))


def test_several_learning_rates_need_a_record(store):
    params = {"optimizer": "SGD", "epochs": 1, "batch_size": 40}
    source = log_metrics(new_run(params), lr=[0.1] * 2, learning_rate=[0.1] * 2)
    record, _ = training_record(source, 80)
    assert record is not None
    source = log_metrics(new_run(params), lr=[0.1] * 2, lr_SGD=[0.2] * 2)
    record, reason = training_record(source, 80)
    assert record is None
    assert "(lr, lr-SGD)" in reason


def test_early_stopping_as_mlflows_autolog_writes_it(store):
    params = {"optimizer_name": "SGD", "lr": 0.1, "epochs": 9, "batch_size": 40, "patience": 2}
    record, _ = training_record(log_metrics(new_run(params), stopped_epoch=[3]), 80)
    assert record is not None
    assert record.steps == 4 * 2


def test_no_record_and_why(store):
    cases = [
        (ModelSource("/x", "folder", "pytorch", "/x"), "the model has no source run"),
        (ModelSource("/x", "folder", "pytorch", "/x", run_id="0" * 32), "is not in this store"),
        (new_run({}), "optimizer"),
        (new_run({"optimizer": "adam", "lr": 0.1, "steps": 5}), "batch"),
        (new_run({}, artifact='{"optimizer": "lion"}'), "training.json of the source run is not"),
        (new_run({}, artifact="{"), "training.json of the source run is not usable"),
    ]
    for source, expected in cases:
        record, reason = training_record(source, 80)
        assert record is None
        assert expected in reason
        assert "\n" not in reason


# --- optimizer state_dicts ----------------------------------------------------------------------


def trained(optimizer_of, steps=30, scheduler_of=None):
    """A network after some steps on the toy data, and its optimizer."""
    x, y = (torch.from_numpy(array) for array in toy_data(80))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    optimizer = optimizer_of(net)
    scheduler = None if scheduler_of is None else scheduler_of(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return net, optimizer


def logged_state(params, state, path="optimizer"):
    """A new run that logged params and, as mlflow.pytorch does, a state_dict."""
    source = new_run(params)
    with mlflow.start_run(run_id=source.run_id):
        mlflow.pytorch.log_state_dict(state, artifact_path=path)
    return source


def adamw(net):
    return torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.3)


def test_adamw_s_state_needs_the_batch_size_alone(store):
    _, optimizer = trained(adamw)
    record, reason = training_record(logged_state({"batch_size": 20}, optimizer.state_dict()), 80)
    assert record is not None, reason
    assert (record.optimizer, record.weight_decay, record.steps) == ("adamw", 0.3, 30)
    assert record.total_lr == pytest.approx(0.6)
    assert record.batch_size == 20
    assert "optimizer state" in reason
    assert any("steps = 30" in text for text in record.assumptions)
    record, reason = training_record(logged_state({}, optimizer.state_dict()), 80)
    assert record is None
    assert "batch_size" in reason


def test_the_state_wins_over_the_params(store):
    """What was logged before training is a plan; the optimizer holds what ran."""
    _, optimizer = trained(
        lambda net: torch.optim.SGD(net.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01)
    )
    params = {"optimizer": "Adam", "lr": 1, "weight_decay": 5, "epochs": 3, "batch_size": 40}
    record, reason = training_record(logged_state(params, optimizer.state_dict()), 80)
    assert record is not None, reason
    assert (record.optimizer, record.momentum, record.weight_decay) == ("sgd", 0.8, 0.01)
    assert (record.steps, record.total_lr) == (6, pytest.approx(1.2))


def test_groups_by_their_names(store):
    """torch keeps the names where the optimizer was given named parameters."""

    def groups(net):
        named = list(net.named_parameters())
        return torch.optim.AdamW(
            [
                {"params": [p for p in named if "weight" in p[0]], "weight_decay": 0.1},
                {"params": [p for p in named if "bias" in p[0]], "lr": 0.05, "weight_decay": 0.0},
            ],
            lr=0.01,
        )

    net, optimizer = trained(groups)
    source = logged_state({"batch_size": 80}, optimizer.state_dict())
    record, reason = training_record(source, 80)
    assert record is not None, reason
    by_name = record.by_parameter([name for name, _ in net.named_parameters()])
    assert [by_name[f"0.{part}"].weight_decay for part in ("weight", "bias")] == [0.1, 0.0]
    rates = [by_name[f"0.{part}"].total_lr for part in ("weight", "bias")]
    assert rates == pytest.approx([0.3, 1.5])
    # With the learning rate's history its sum is shared in the same proportion.
    client = mlflow.MlflowClient()
    for step in range(30):
        client.log_metric(source.run_id, "lr", 0.02, step=step)
    record, _ = training_record(source, 80)
    assert record is not None
    by_name = record.by_parameter([name for name, _ in net.named_parameters()])
    rates = [by_name[f"0.{part}"].total_lr for part in ("weight", "bias")]
    assert rates == pytest.approx([0.6, 3.0])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["param_names"]
    record, reason = training_record(logged_state({"batch_size": 80}, state), 80)
    assert record is None
    assert "several parameter groups without their names" in reason


def test_a_schedule_that_nobody_logged_is_no_guess(store):
    _, optimizer = trained(adamw, scheduler_of=lambda o: torch.optim.lr_scheduler.StepLR(o, 10))
    state = optimizer.state_dict()
    record, reason = training_record(logged_state({"batch_size": 20}, state), 80)
    assert record is None
    assert "a scheduler changed the learning rate from 0.02" in reason
    named = {"batch_size": 20, "scheduler": "cosine"}
    record, _ = training_record(logged_state(named, state), 80)
    assert record is not None
    assert (record.schedule, record.lr) == ("cosine", 0.02)


def test_checkpoints_and_the_last_of_them(store):
    _, early = trained(adamw, steps=4)
    net, late = trained(adamw, steps=12)
    source = logged_state({"batch_size": 20}, {"optimizer": early.state_dict()}, "epoch_9")
    with mlflow.start_run(run_id=source.run_id):
        for key, optimizer, path in (("optimizer_state_dict", late, "epoch_10"),):
            state = {"model": net.state_dict(), key: optimizer.state_dict(), "epoch": 3}
            mlflow.pytorch.log_state_dict(state, artifact_path=path)
        mlflow.pytorch.log_state_dict(net.state_dict(), artifact_path="weights")
    record, _ = training_record(source, 80)
    assert record is not None
    assert record.steps == 12


class Evil:
    """Runs code where it is unpickled."""

    ran = False

    def __reduce__(self):
        return Evil.run, ()

    @staticmethod
    def run():
        Evil.ran = True
        return {}


def test_a_pickle_in_the_place_of_a_state_is_not_run(store, tmp_path):
    source = new_run({"batch_size": 20, "lr": 0.1, "epochs": 2})
    torch.save(Evil(), tmp_path / "optimizer.pth")
    mlflow.MlflowClient().log_artifact(source.run_id, str(tmp_path / "optimizer.pth"))
    record, reason = training_record(source, 80)
    assert record is None
    assert not Evil.ran
    assert reason.endswith("torch's safe loader does not read optimizer.pth")
    assert Evil.run() == {}
    Evil.ran = False


def test_a_state_of_another_optimizer_is_no_guess(store):
    _, optimizer = trained(lambda net: torch.optim.RMSprop(net.parameters(), lr=0.01))
    params = {"optimizer": "sgd", "steps": 30, "batch_size": 80}
    record, reason = training_record(logged_state(params, optimizer.state_dict()), 80)
    assert record is None
    assert "is not known" in reason


# --- what the tools log, in runs of them --------------------------------------------------------


def last_model(run_id):
    """The URI of the model that a run logged."""
    (output,) = mlflow.get_run(run_id).outputs.model_outputs
    return f"models:/{output.model_id}"


def experiment():
    return mlflow.get_experiment_by_name("training").experiment_id


@pytest.mark.parametrize("serialization_format", ["cloudpickle", "skops"])
def test_sklearn_autolog(store, tmp_path, serialization_format):
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x, y = toy_data(80)
    x = x.astype(np.float64)
    mlflow.sklearn.autolog(
        log_input_examples=False, silent=True, serialization_format=serialization_format
    )
    try:
        with mlflow.start_run(experiment_id=experiment()) as run, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make_pipeline(StandardScaler(), LogisticRegression(C=0.5, tol=1e-10)).fit(x, y)
    finally:
        mlflow.sklearn.autolog(disable=True)
    uri = last_model(run.info.run_id)
    # The dataset that autolog logs has code as its source, which nothing can load again.
    assert len(mlflow.get_run(run.info.run_id).inputs.dataset_inputs) == 1
    with pytest.raises(InputError, match="got one logged without a source") as error:
        run_audit(uri, "mlflow", None, AuditOptions())
    assert "--train" in str(error.value)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    report = run_audit(uri, str(tmp_path / "train.npz"), None, AuditOptions())["report"]
    assert report["penalty"]["source"] == "estimator"
    assert report["penalty"]["value"] == pytest.approx(1 / (0.5 * 80))
    assert report["penalty"]["stationarity"] < 1e-4
    assert "data_mismatch" not in [warning["code"] for warning in report["warnings"]]


def lightning_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, lr=0.05):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            x, y = batch
            loss = nn.functional.cross_entropy(self(x), y)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr, weight_decay=0.02)

    return Module()


def lightning_run(tmp_path, *, checkpoints):
    """Four epochs of five batches of 16 under mlflow.pytorch.autolog; the run's id."""
    import lightning

    x, y = (torch.from_numpy(array) for array in toy_data(80))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16)
    mlflow.pytorch.autolog(
        silent=True, checkpoint=checkpoints, checkpoint_save_best_only=False, log_models=True
    )
    try:
        with mlflow.start_run(experiment_id=experiment()) as run, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lightning.Trainer(
                max_epochs=4,
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=str(tmp_path),
            ).fit(lightning_module(), batches)
    finally:
        mlflow.pytorch.autolog(disable=True)
    return run.info.run_id


def test_lightning_autolog(store, tmp_path):
    """Its params lack the batch size, without which AdamW's training time is not known."""
    run_id = lightning_run(tmp_path, checkpoints=False)
    source = resolve(last_model(run_id))
    record, reason = training_record(source, 80)
    assert record is None
    assert "expected sum_lr, or lr with steps" in reason
    mlflow.MlflowClient().log_param(run_id, "batch_size", 16)
    record, reason = training_record(source, 80)
    assert record is not None, reason
    assert (record.optimizer, record.weight_decay, record.steps) == ("adamw", 0.02, 20)
    assert record.total_lr == pytest.approx(1.0)


def test_lightning_autolog_with_checkpoints(store, tmp_path):
    """A checkpoint holds the number of steps, and with it the batch size."""
    run_id = lightning_run(tmp_path, checkpoints=True)
    source = resolve(last_model(run_id))
    record, reason = training_record(source, 80)
    assert record is not None, reason
    assert (record.optimizer, record.weight_decay, record.steps) == ("adamw", 0.02, 20)
    assert (record.batch_size, record.total_lr) == (16, pytest.approx(1.0))
    x, y = toy_data(80)
    np.savez(tmp_path / "train.npz", x=x, y=y)
    options = AuditOptions(training="auto")
    report = run_audit(source.uri, str(tmp_path / "train.npz"), None, options)["report"]
    assert report["penalty"]["source"] == "training"
    assert any("batch_size = 16" in text for text in report["penalty"]["assumptions"])
    assert "data_mismatch" not in [warning["code"] for warning in report["warnings"]]


def test_transformers_trainer(store, tmp_path, monkeypatch):
    """A tiny classifier trained by the Trainer with its MLflow callback, logged and audited."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        Trainer,
        TrainingArguments,
    )

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (60, 6), generator=generator)
    y = (ids[:, 0] > 5).long() + (ids[:, 1] > 7).long()
    mask = torch.ones_like(ids)
    rows = [
        {"input_ids": a, "attention_mask": b, "labels": c}
        for a, b, c in zip(ids, mask, y, strict=True)
    ]
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )
    with mlflow.start_run(experiment_id=experiment()) as run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"),
            num_train_epochs=3,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            weight_decay=0.01,
            warmup_steps=3,
            logging_steps=4,
            report_to=["mlflow"],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = BertForSequenceClassification(config)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        rates = []
        trainer.create_optimizer_and_scheduler(24)
        trainer.optimizer.register_step_pre_hook(
            lambda o, *_: rates.append(o.param_groups[0]["lr"])
        )
        trainer.train()
        mlflow.pytorch.log_model(
            model, name="bert", serialization_format="pickle", pip_requirements=REQUIREMENTS
        )
    source = resolve(last_model(run.info.run_id))
    record, reason = training_record(source, 60)
    assert record is not None, reason
    assert (record.optimizer, record.batch_size, record.steps) == ("adamw", 8, 24)
    assert (record.warmup_steps, record.schedule, len(rates)) == (3, "linear", 24)
    np.testing.assert_allclose(record.learning_rates(), rates, rtol=1e-9)
    by_name = record.by_parameter([name for name, _ in model.named_parameters()])
    held = trainer.optimizer.param_groups
    for name, p in model.named_parameters():
        group = next(g for g in held if any(p is q for q in g["params"]))
        assert by_name[name].weight_decay == group["weight_decay"], name
    np.savez(tmp_path / "train.npz", input_ids=ids.numpy(), attention_mask=mask.numpy(), y=y)
    found = run_audit(source.uri, str(tmp_path / "train.npz"), None, AuditOptions(training="auto"))
    assert found["report"]["penalty"]["source"] == "training"
    assert found["report"]["solver"]["dtype"] == "float64"
    assert "data_mismatch" not in [w["code"] for w in found["report"]["warnings"]]
