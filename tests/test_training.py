"""The training record: parsing, checks, learning rates, and what a run's log allows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from flataudit.errors import InputError
from flataudit.run_records import training_from_run
from flataudit.training import parse_training

TEXT = "optimizer=sgd,lr=0.1,steps=30,momentum=0.9,weight_decay=0.001,batch_size=32"
VALUES = {
    "optimizer": "sgd",
    "lr": 0.1,
    "steps": 30,
    "momentum": 0.9,
    "weight_decay": 0.001,
    "batch_size": 32,
}


def test_every_form_gives_the_same_record(tmp_path):
    written = tmp_path / "record.json"
    written.write_text(json.dumps(VALUES), encoding="utf-8")
    yaml = tmp_path / "record.yaml"
    yaml.write_text("".join(f"{key}: {value}\n" for key, value in VALUES.items()))
    wanted = parse_training(VALUES)
    for source in (TEXT, written, str(written), yaml, str(yaml)):
        assert parse_training(source) == wanted
    assert (wanted.optimizer, wanted.lr, wanted.steps) == ("sgd", 0.1, 30)
    assert (wanted.momentum, wanted.weight_decay, wanted.batch_size) == (0.9, 0.001, 32)


def test_defaults():
    record = parse_training("optimizer=SGD,sum_lr=4")
    assert (record.optimizer, record.momentum, record.dampening) == ("sgd", 0.0, 0.0)
    assert (record.weight_decay, record.schedule, record.loss) == (0.0, "constant", None)


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ("constant", lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=40)),
        (
            "linear",
            lambda o: torch.optim.lr_scheduler.LinearLR(
                o, start_factor=1.0, end_factor=0.0, total_iters=40
            ),
        ),
    ],
)
def test_schedules_are_torchs(schedule, make):
    """The learning rate of each step, as torch's scheduler, stepped after each, sets it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = make(optimizer)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    record = parse_training(
        {"optimizer": "sgd", "lr": 0.3, "steps": 40, "schedule": schedule, "momentum": 0.0}
    )
    np.testing.assert_allclose(record.learning_rates(), rates, rtol=1e-9, atol=1e-12)
    assert record.total_lr == pytest.approx(sum(rates), rel=1e-9)
    assert record.training_time() == pytest.approx(sum(rates), rel=1e-9)


def test_twenty_steps_of_momentum():
    """Momentum .9 for 20 steps counts 6.0 per unit of learning rate, not 10."""
    record = parse_training("optimizer=sgd,lr=1,steps=20,momentum=0.9")
    wanted = sum((1 - 0.9**u) / 0.1 for u in range(1, 21))
    assert record.training_time() == pytest.approx(wanted, rel=1e-12)
    assert record.training_time() / 20 == pytest.approx(6.0, abs=0.06)


def test_long_run_without_steps():
    assert parse_training("optimizer=sgd,sum_lr=3,momentum=0.9").training_time() == pytest.approx(
        30.0
    )


def test_momentum_with_a_schedule_weights_early_steps_more():
    """T = sum_u lr_u (1 - m^u)/(1 - m), u steps before the end: the first step counts most."""
    record = parse_training("optimizer=sgd,lr=0.2,steps=7,momentum=0.5,schedule=linear")
    rates = [0.2 * (1 - t / 7) for t in range(7)]
    wanted = sum(r * (1 - 0.5 ** (7 - t)) / 0.5 for t, r in enumerate(rates))
    assert record.training_time() == pytest.approx(wanted, rel=1e-12)


def test_a_known_sum_rescales_the_schedule():
    record = parse_training("optimizer=sgd,lr=0.2,steps=7,sum_lr=3,schedule=linear")
    assert record.learning_rates().sum() == pytest.approx(3.0)
    assert record.total_lr == 3.0
    spread = parse_training("optimizer=sgd,steps=6,sum_lr=3")
    assert spread.learning_rates().tolist() == [0.5] * 6


BAD = [
    ("optimizer=rmsprop,sum_lr=1", ("optimizer", "'rmsprop'", "converged")),
    ("sum_lr=1", ("optimizer", "None")),
    ("optimizer=sgd", ("sum_lr", "neither")),
    ("optimizer=sgd,lr=0.1", ("sum_lr", "steps")),
    ("optimizer=adam,sum_lr=1", ("batch_size", "adam")),
    ("optimizer=adamw,sum_lr=1", ("batch_size", "adamw")),
    ("optimizer=sgd,sum_lr=0", ("above 0",)),
    ("optimizer=sgd,sum_lr=-1", ("sum_lr", "'-1'")),
    ("optimizer=sgd,sum_lr=nan", ("sum_lr", "'nan'")),
    ("optimizer=sgd,sum_lr=much", ("sum_lr", "'much'")),
    ("optimizer=sgd,sum_lr=1,momentum=1", ("momentum", "1.0")),
    ("optimizer=sgd,sum_lr=1,momentum=0.9,dampening=1", ("dampening", "1.0")),
    ("optimizer=sgd,lr=1,steps=2.5", ("steps", "2.5")),
    ("optimizer=adam,sum_lr=1,batch_size=0", ("batch_size", "0")),
    ("optimizer=sgd,sum_lr=1,schedule=step,steps=3", ("schedule", "'step'")),
    ("optimizer=sgd,sum_lr=1,loss=huber", ("loss", "'huber'")),
    ("optimizer", ("KEY=VALUE", "'optimizer'")),
    ("", ("KEY=VALUE",)),
]


@pytest.mark.parametrize(("text", "parts"), BAD)
def test_bad_record(text, parts):
    """Each message is one line: expected, got, what to do."""
    with pytest.raises(InputError) as caught:
        parse_training(text)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", ";", *parts))
    assert "\n" not in message


def test_unknown_key():
    with pytest.raises(InputError, match="unknown training key 'momentun'; choose from: batch"):
        parse_training({"optimizer": "sgd", "sum_lr": 1, "momentun": 0.9})


@pytest.mark.parametrize("name", ["none.yaml", "none.json"])
def test_missing_file(tmp_path, name):
    with pytest.raises(InputError, match="no file at"):
        parse_training(tmp_path / name)


@pytest.mark.parametrize("text", ["[1, 2]", "{not json", "3"])
def test_file_without_a_mapping(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        parse_training(path)
    assert all(part in str(caught.value) for part in ("expected", "got", ";"))


def test_to_dict_is_json_with_the_contracts_keys():
    for text in (TEXT, "optimizer=converged", "optimizer=adam,sum_lr=1,batch_size=8"):
        shown = parse_training(text).to_dict()
        assert {"optimizer", "sum_lr", "momentum", "batch_size", "weight_decay"} <= set(shown)
        json.dumps(shown, allow_nan=False)
    assert parse_training(TEXT).to_dict()["sum_lr"] == pytest.approx(3.0)
    assert parse_training("optimizer=converged").to_dict()["sum_lr"] is None


# --- from a run ---------------------------------------------------------------------------------


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
        ({"optimizer": "lion", "lr": 1, "steps": 2}, "incomplete"),
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


def test_no_nan_in_learning_rates():
    record = parse_training("optimizer=sgd,lr=0.1,steps=1,schedule=cosine")
    assert record.learning_rates().tolist() == [0.1]
    assert math.isfinite(record.training_time())


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "record.yaml"
    path.write_bytes(b"\xff\xfe\x00optimizer")
    with pytest.raises(InputError, match=r"expected valid YAML or JSON in .*check the file"):
        parse_training(path)
