"""The training record that a run's params and learning rate metric allow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flataudit.run_records import training_from_run


def read(params, history=(), n_samples=100):
    record, reason = training_from_run(params, list(history), n_samples)
    assert record is not None, reason
    return record


def unknown(params, history=(), n_samples=100):
    """The one-line reason why there is no record."""
    record, reason = training_from_run(params, list(history), n_samples)
    assert record is None
    assert "\n" not in reason
    return reason


def test_run_with_everything():
    params = {
        "optimizer": "SGD",
        "learning_rate": "0.1",
        "momentum": "0.9",
        "weight_decay": "0.001",
        "batch_size": "32",
        "steps": "30",
    }
    record, reason = training_from_run(params, [], 320)
    assert record is not None
    assert (record.optimizer, record.lr, record.steps, record.momentum) == ("sgd", 0.1, 30, 0.9)
    assert record.total_lr == pytest.approx(3.0)
    assert "run" in reason


def test_run_steps_from_epochs():
    """Steps = epochs times the number of batches, the short last one included."""
    params = {"optimizer": "sgd", "lr": 0.1, "epochs": 3, "batch_size": 32}
    record, _ = training_from_run(params, [], 100)
    assert record is not None
    assert record.steps == 3 * 4
    assert any("12" in text for text in record.assumptions)
    assert any("momentum = 0" in text for text in record.assumptions)
    assert any("weight_decay = 0" in text for text in record.assumptions)


@pytest.mark.parametrize("history", [[0.1] * 12, [0.1, 0.1, 0.1]])
def test_run_learning_rates_from_the_metric(history):
    """One value per step, or one per epoch spread over its steps: the same sum."""
    params = {"optimizer": "adam", "epochs": "3", "batch_size": "32"}
    record, _ = training_from_run(params, history, 100)
    assert record is not None
    assert record.total_lr == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("params", "part"),
    [
        ({}, "no optimizer"),
        ({"optimizer": "lion", "lr": 1, "steps": 2}, "optimizer 'lion' is not known"),
        ({"optimizer": "adam", "lr": 1, "steps": 2}, "batch_size"),
        ({"optimizer": "sgd", "lr": "warm"}, "incomplete"),
        ({"optimizer": "sgd", "epochs": "many"}, "incomplete"),
        ({"optimizer": "sgd", "lr": 0.1, "epochs": 2, "batch_size": 0}, "incomplete"),
    ],
)
def test_run_that_does_not_suffice(params, part):
    """A run that logged too little is no error: there is no record, and a reason."""
    record, reason = training_from_run(params, [], 100)
    assert record is None
    assert part in reason


# --- what people log ----------------------------------------------------------------------------

SGD = {"optimizer": "sgd", "lr": 0.1, "steps": 12}
ADAM_PRINTED = """Adam (
Parameter Group 0
    amsgrad: False
    betas: (0.9, 0.999)
    lr: 0.002
    maximize: False
    weight_decay: 0.03
)"""
LIGHTNING = {  # what mlflow.pytorch.autolog writes: epochs, optimizer_name, optimizer.defaults
    "epochs": "3",
    "optimizer_name": "SGD",
    "lr": "0.1",
    "momentum": "0.9",
    "dampening": "0",
    "weight_decay": "0.001",
    "nesterov": "False",
    "maximize": "False",
    "foreach": "None",
    "differentiable": "False",
    "fused": "None",
}
TRAINER = {  # of transformers.TrainingArguments
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "2",
    "num_train_epochs": "3.0",
    "max_steps": "-1",
    "learning_rate": "5e-05",
    "lr_scheduler_type": "linear",
    "warmup_steps": "0",
    "warmup_ratio": "0.1",
    "weight_decay": "0.01",
    "adam_beta1": "0.9",
    "adam_beta2": "0.999",
    "max_grad_norm": "1.0",
    "optim": "adamw_torch_fused",
}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("SGD", "sgd"),
        ("torch.optim.AdamW", "adamw"),
        ("torch.optim.adam.Adam", "adam"),
        ("<class 'torch.optim.sgd.SGD'>", "sgd"),
        ("Adam(lr=0.1)", "adam"),
        ("adamw_torch", "adamw"),
    ],
)
def test_the_optimizer_by_its_names(text, kind):
    params = {"opt": text, "lr": 0.1, "steps": 5, "batch_size": 4}
    assert read(params).optimizer == kind


@pytest.mark.parametrize("text", ["lion", "adafactor", "adamw_bnb_8bit", "SGDP", "?", "AdamW8bit"])
def test_another_optimizer_is_no_guess(text):
    assert "is not known" in unknown({"optim": text, "lr": 0.1, "steps": 5, "batch_size": 4})


def test_a_printed_optimizer():
    record = read({"Optimizer": ADAM_PRINTED, "steps": 50, "batch_size": 10})
    assert (record.optimizer, record.lr, record.weight_decay) == ("adam", 0.002, 0.03)
    text = str(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.25, momentum=0.5))
    record = read({"optimizer": text, "steps": 50})
    assert (record.optimizer, record.lr, record.momentum) == ("sgd", 0.25, 0.5)
    groups = ADAM_PRINTED.replace(")\n)", "")[:-1] + "Parameter Group 1\n    lr: 0.1\n)"
    assert "log_training" in unknown({"optimizer": groups, "steps": 5, "batch_size": 1})
    maximize = text.replace("maximize: False", "maximize: True")
    assert "maximize" in unknown({"optimizer": maximize, "steps": 5})


@pytest.mark.parametrize(
    "params",
    [
        {"Optimizer": "SGD", "LR": 0.1, "Steps": 12, "WD": 0.02},
        {"opt": "sgd", "learning-rate": 0.1, "max_steps": 12, "weight_decay": 0.02},
        {"optimizer": "sgd", "lr": 0.1, "num_epochs": 3, "train_batch_size": 25, "wd": 0.02},
        {"optimizer": "sgd", "lr": 0.1, "max_epochs": 3, "batch_size": "25", "wd": 0.02},
    ],
)
def test_the_usual_names(params):
    record = read(params)
    assert (record.total_lr, record.steps) == (pytest.approx(1.2), 12)
    assert record.weight_decay == 0.02
    assert "constant learning rate: no schedule was logged" in record.assumptions


def test_lightnings_autolog():
    """Its params hold no batch size: with it the record is complete, without it there is none."""
    assert "sum_lr" in unknown(LIGHTNING)
    record = read(LIGHTNING | {"batch_size": "10"})
    assert (record.optimizer, record.steps, record.momentum) == ("sgd", 30, 0.9)
    assert (record.weight_decay, record.total_lr) == (0.001, pytest.approx(3.0))
    assert not any("Nesterov" in text for text in record.assumptions)
    nesterov = read(LIGHTNING | {"batch_size": "10", "nesterov": "True"})
    assert any("Nesterov" in text for text in nesterov.assumptions)


def test_early_stopping_is_counted_where_its_end_was_logged():
    stopping = LIGHTNING | {"batch_size": "10", "monitor": "val_loss", "patience": "3"}
    assert any("early stopping did not end" in text for text in read(stopping).assumptions)
    record = read(stopping | {"epochs_run": "2"})
    assert record.steps == 20
    assert not any("early stopping" in text for text in record.assumptions)


def test_transformers_trainer():
    """3 epochs of 100 samples, 16 per step: 21 steps, 3 of warm-up, then linear to 0."""
    record = read(TRAINER)
    assert (record.optimizer, record.batch_size, record.steps) == ("adamw", 16, 21)
    assert record.warmup_steps == 3
    wanted = [5e-5 * t / 3 for t in range(3)] + [5e-5 * (21 - t) / 18 for t in range(3, 21)]
    np.testing.assert_allclose(record.learning_rates(), wanted, rtol=1e-12)
    assert record.total_lr == pytest.approx(sum(wanted))
    by_name = record.by_parameter(["bert.encoder.weight", "bert.LayerNorm.weight", "head.bias"])
    assert [item.weight_decay for item in by_name.values()] == [0.01, 0.0, 0.0]
    told = " ".join(record.assumptions)
    for part in ("one device", "16 samples per step", "steps = 21", "clipping", "biases", "linear"):
        assert part in told


def test_transformers_trainer_by_max_steps():
    record = read(TRAINER | {"max_steps": "40", "weight_decay": "0.0"}, [4e-5, 1e-5])
    assert (record.steps, record.warmup_steps, record.groups) == (40, 4, ())
    assert record.total_lr == pytest.approx(5e-5 * (1.5 + sum((40 - t) / 36 for t in range(4, 40))))
    assert "not known" in unknown(TRAINER | {"lr_scheduler_type": "polynomial"})
    assert "not known" in unknown(TRAINER | {"optim": "adafactor"})


# --- schedules ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"schedule": "cosine"}, ("cosine", 0)),
        ({"scheduler": "CosineAnnealingLR"}, ("cosine", 0)),
        ({"scheduler": "CosineAnnealingLR", "T_max": 12}, ("cosine", 0)),
        ({"scheduler": "CosineAnnealingLR", "T_max": 3, "epochs": 3}, ("cosine", 0)),
        ({"lr_scheduler": "torch.optim.lr_scheduler.CosineAnnealingLR"}, ("cosine", 0)),
        ({"lr_scheduler_type": "SchedulerType.LINEAR"}, ("linear", 0)),
        ({"lr_scheduler": "linear_with_warmup", "warmup_steps": 2}, ("linear", 2)),
        ({"lr_scheduler": "cosine_with_warmup", "warmup_ratio": 0.25}, ("cosine", 3)),
        ({"lr_scheduler": "constant", "num_warmup_steps": 2}, ("constant", 2)),
        ({"lr_scheduler": "none"}, ("constant", 0)),
        ({"warmup_steps": 4}, ("constant", 4)),
    ],
)
def test_schedules_by_their_names(given, wanted):
    record = read(SGD | given)
    assert (record.schedule, record.warmup_steps) == wanted


@pytest.mark.parametrize(
    "given",
    [
        {"scheduler": "StepLR"},
        {"scheduler": "LinearLR"},
        {"scheduler": "ConstantLR"},
        {"scheduler": "OneCycleLR"},
        {"scheduler": "ReduceLROnPlateau"},
        {"scheduler": "cosine", "eta_min": 1e-4},
        {"scheduler": "CosineAnnealingLR(T_max=12, eta_min=0.001)"},
        {"scheduler": "cosine", "T_max": 5},
        {"scheduler": "linear_with_warmup"},
        {"optimizer": "sgd", "lr": 0.1, "steps": "", "warmup_ratio": 0.1},
    ],
)
def test_an_unknown_schedule_is_no_guess(given):
    assert "incomplete" in unknown(SGD | given)


def test_our_own_words_are_no_assumption():
    params = SGD | {"schedule": "cosine", "momentum": 0.9, "weight_decay": 0.1}
    assert read(params).assumptions == ()


# --- the learning rate's metric -----------------------------------------------------------------


def test_one_value_per_step_is_exact_whatever_the_schedule():
    history = [0.1 * 0.9**t for t in range(12)]
    params = SGD | {"scheduler": "StepLR", "momentum": 0.9, "weight_decay": 0.1}
    record = read(params, history)
    assert record.total_lr == pytest.approx(sum(history), rel=1e-14)
    assert (record.steps, record.assumptions) == (12, ())


def test_fewer_values_are_spread_and_said_so():
    record = read(SGD | {"scheduler": "StepLR"}, [0.1, 0.05, 0.025])
    assert record.total_lr == pytest.approx(4 * 0.175)
    assert any("(3 values) is spread evenly over the 12 steps" in x for x in record.assumptions)


def test_a_known_schedule_knows_more_than_some_of_its_values():
    params = SGD | {"schedule": "linear"}
    assert read(params, [0.1, 0.05]).total_lr == pytest.approx(read(params).total_lr)


def test_more_values_than_steps_and_steps_unknown():
    record = read(SGD, [0.1] * 15)
    assert (record.steps, record.total_lr) == (15, pytest.approx(1.5))
    assert any("steps = 15" in text for text in record.assumptions)
    record = read({"optimizer": "sgd"}, [0.1] * 7)
    assert record.steps == 7
    assert any("one value per step" in text for text in record.assumptions)
    assert "batch_size" in unknown({"optimizer": "sgd", "epochs": 7}, [0.1] * 7)


def test_defaults_that_are_assumed():
    record = read({"optimizer": "AdamW", "lr": 0.1, "steps": 5, "batch_size": 4})
    assert record.weight_decay == 0.01
    assert any("torch's default" in text for text in record.assumptions)
    record = read(SGD | {"gradient_clip_val": 0.5})
    assert any("clipping" in text for text in record.assumptions)


@pytest.mark.parametrize(
    ("text", "loss"),
    [
        ("CrossEntropyLoss()", "nll"),
        ("torch.nn.modules.loss.MSELoss", "mse"),
        ("cross_entropy", "nll"),
        ("half_mse", "half_mse"),
    ],
)
def test_the_loss_by_its_names(text, loss):
    assert read(SGD | {"loss": text}).loss == loss


def test_another_loss_is_no_guess():
    assert "'SmoothL1Loss' is not known" in unknown(SGD | {"loss": "SmoothL1Loss"})


def test_learning_rates_of_accumulated_batches_are_not_those_of_steps():
    params = SGD | {"batch_size": 4, "accumulate_grad_batches": 2}
    assert "accumulated" in unknown(params, [0.1] * 24)
    assert read(params).batch_size == 8


def test_the_batch_size_from_steps_and_epochs():
    """5 epochs in 20 steps are 4 an epoch: 100 samples in batches of 25."""
    params = {"optimizer": "adamw", "lr": 0.1, "steps": 20, "epochs": 5}
    record = read(params)
    assert record.batch_size == 25
    assert any("batch_size = 25: 20 steps in 5 epochs" in text for text in record.assumptions)
    assert "batch_size" in unknown(params | {"epochs": 40})


def test_label_smoothing_is_told():
    record = read(TRAINER | {"label_smoothing_factor": "0.1"})
    assert any("label smoothing (of 0.1)" in text for text in record.assumptions)
    assert not any("smoothing" in text for text in read(TRAINER).assumptions)
