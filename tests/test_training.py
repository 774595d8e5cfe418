"""The training record: parsing, checks, learning rates, and what a run's log allows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from flataudit.errors import InputError
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


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_momentum_with_a_schedule_is_how_far_torchs_sgd_goes(schedule):
    """T = sum_t lr_t (1 - m^t)/(1 - m): the learning rate multiplies the momentum built up."""
    record = parse_training(
        f"optimizer=sgd,lr=0.2,steps=7,momentum=0.5,schedule={schedule},warmup_steps=2"
    )
    p = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([p], lr=1.0, momentum=0.5)
    for rate in record.learning_rates():
        optimizer.param_groups[0]["lr"] = float(rate)
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert record.training_time() == pytest.approx(-p.item(), rel=1e-12)


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


def test_no_nan_in_learning_rates():
    record = parse_training("optimizer=sgd,lr=0.1,steps=1,schedule=cosine")
    assert record.learning_rates().tolist() == [0.1]
    assert math.isfinite(record.training_time())


def test_a_file_that_is_not_text_is_refused(tmp_path):
    path = tmp_path / "record.yaml"
    path.write_bytes(b"\xff\xfe\x00optimizer")
    with pytest.raises(InputError, match=r"expected valid YAML or JSON in .*check the file"):
        parse_training(path)


# --- groups -------------------------------------------------------------------------------------

NAMES = ["0.weight", "0.bias", "2.weight", "2.bias"]


def with_groups(*groups, **values):
    base = {"optimizer": "sgd", "lr": 0.1, "steps": 10, "momentum": 0.9, "weight_decay": 0.01}
    return parse_training(base | values | {"groups": list(groups)})


def test_groups_by_name_and_pattern():
    record = with_groups(
        {"parameters": ["*.bias"], "weight_decay": 0},
        {"parameters": "2.weight", "lr": 0.02},
    )
    found = record.by_parameter(NAMES)
    assert found["0.weight"] == record
    assert [found[name].weight_decay for name in NAMES] == [0.01, 0.0, 0.01, 0.0]
    assert found["0.bias"].training_time() == pytest.approx(record.training_time())
    assert found["2.weight"].total_lr == pytest.approx(0.2)
    assert found["2.weight"].training_time() == pytest.approx(0.2 * record.training_time())
    assert parse_training(record.to_record()) == record
    shown = record.to_dict()["groups"]
    assert shown == [
        {"parameters": ["*.bias"], "weight_decay": 0.0},
        {"parameters": ["2.weight"], "lr": 0.02},
    ]
    json.dumps(shown)


def test_the_learning_rates_of_a_group():
    group = {"parameters": ["0.bias"], "sum_lr": 0.5}
    bias = with_groups(group, time=8.0).by_parameter(NAMES)["0.bias"]
    assert (bias.total_lr, bias.training_time()) == (0.5, pytest.approx(4.0))
    bias = with_groups(group | {"time": 3.0}, time=8.0).by_parameter(NAMES)["0.bias"]
    assert bias.training_time() == 3.0
    alone = {"optimizer": "sgd", "sum_lr": 2.0, "steps": 10, "groups": [{"parameters": ["0.bias"],
             "lr": 0.3}]}  # fmt: skip
    assert parse_training(alone).by_parameter(NAMES)["0.bias"].total_lr == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        ([{"parameters": ["0.wieght"]}], "'0.wieght'"),
        ([{"parameters": ["*.scale"]}], "'*.scale'"),
        ([{"parameters": ["*.bias"]}, {"parameters": ["0.*"]}], "'0.bias' in two"),
    ],
)
def test_groups_that_do_not_fit_the_model(groups, part):
    with pytest.raises(InputError) as caught:
        with_groups(*groups).by_parameter(NAMES)
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        ("*.bias", "as a list"),
        ({"parameters": ["a"]}, "as a list"),
        (3, "as a list"),
        (["a"], "a training group as"),
        ([{"weight_decay": 0}], "parameters: [names or patterns]"),
        ([{"parameters": [1]}], "parameters: [names or patterns]"),
        ([{"parameters": ["a"], "momentum": 0.5}], "unknown key 'momentum'"),
        ([{"parameters": ["a"], "weight_decay": -1}], "weight_decay"),
        ([{"parameters": ["a"], "lr": 0}], "above 0"),
    ],
)
def test_bad_groups(groups, part):
    with pytest.raises(InputError) as caught:
        parse_training({"optimizer": "sgd", "sum_lr": 1, "steps": 2, "groups": groups})
    assert part in str(caught.value)


def test_a_groups_lr_alone_says_nothing_without_steps():
    with pytest.raises(InputError, match="its lr alone"):
        parse_training(
            {"optimizer": "sgd", "sum_lr": 1, "groups": [{"parameters": ["a"], "lr": 0.1}]}
        )


def test_warm_up_rises_linearly_from_zero():
    """As transformers' linear and cosine schedules with warm-up."""
    record = parse_training("optimizer=sgd,lr=0.4,steps=10,schedule=linear,warmup_steps=4")
    wanted = [0.4 * t / 4 for t in range(4)] + [0.4 * (10 - t) / 6 for t in range(4, 10)]
    np.testing.assert_allclose(record.learning_rates(), wanted, rtol=1e-12)
    record = parse_training("optimizer=sgd,lr=0.4,steps=10,schedule=cosine,warmup_steps=4")
    after = [0.2 * (1 + math.cos(math.pi * t / 6)) for t in range(6)]
    np.testing.assert_allclose(record.learning_rates()[4:], after, rtol=1e-12)


def test_a_recorded_time_is_taken_as_it_is():
    record = parse_training("optimizer=sgd,sum_lr=3,momentum=0.9,time=21.5")
    assert record.training_time() == 21.5
    with pytest.raises(InputError, match="time above 0"):
        parse_training("optimizer=sgd,sum_lr=3,time=0")
