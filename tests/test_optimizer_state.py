"""What an optimizer's state_dict says of the training."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flataudit.optimizer_state import read_state, states_in
from flataudit.run_records import training_from_run


def stepped(make, steps=3):
    line = nn.Linear(2, 1)
    optimizer = make(line)
    for _ in range(steps):
        line(torch.ones(4, 2)).sum().backward()
        optimizer.step()
    return optimizer.state_dict()


KINDS = {
    "sgd": (lambda m: torch.optim.SGD(m.parameters(), lr=0.1), "sgd", None),
    "adam": (lambda m: torch.optim.Adam(m.parameters(), lr=0.1), "adam", 3),
    "adamw": (lambda m: torch.optim.AdamW(m.parameters(), lr=0.1), "adamw", 3),
    "nadam": (lambda m: torch.optim.NAdam(m.parameters(), lr=0.1), "unnamed", 3),
    "radam": (lambda m: torch.optim.RAdam(m.parameters(), lr=0.1), "unnamed", 3),
    "rmsprop": (lambda m: torch.optim.RMSprop(m.parameters(), lr=0.1), "unnamed", 3),
    "adagrad": (lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1), "unnamed", 3),
}


@pytest.mark.parametrize("name", KINDS)
def test_kind_and_steps(name):
    make, kind, steps = KINDS[name]
    found = read_state(stepped(make))
    assert found.settings.get("optimizer") == kind
    assert found.steps == steps
    assert found.groups == []


def test_an_adam_that_an_old_torch_saved_may_be_either():
    state = stepped(KINDS["adamw"][0])
    for group in state["param_groups"]:
        del group["decoupled_weight_decay"]
    found = read_state(state)
    assert "optimizer" not in found.settings
    params = {"batch_size": 4}
    record, _ = training_from_run(params | {"optimizer": "AdamW"}, [], 4, found)
    assert record is not None
    assert (record.optimizer, record.weight_decay) == ("adamw", 0.01)
    record, reason = training_from_run(params, [], 4, found)
    assert record is None
    assert "does not tell Adam from AdamW" in reason


def test_a_scheduler_that_varies_the_momentum():
    def cycled(line):
        optimizer = torch.optim.SGD(line.parameters(), lr=0.1, momentum=0.9)
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return optimizer

    found = read_state(stepped(cycled))
    record, reason = training_from_run({"optimizer": "SGD", "steps": 3}, [0.1] * 3, 4, found)
    assert record is None
    assert "cycled-momentum" in reason


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_whose_training_time_is_not_known(option):
    found = read_state(stepped(lambda m: torch.optim.Adam(m.parameters(), **{option: True})))
    record, reason = training_from_run({"batch_size": 4}, [], 4, found)
    assert record is None
    assert option in reason


def test_where_checkpoints_keep_them():
    state = stepped(KINDS["sgd"][0])
    lightning = {"optimizer_states": [state], "global_step": 12, "epoch": 3, "state_dict": {}}
    assert [found.steps for found in states_in(lightning)] == [12]
    for key in ("optimizer", "optimizer_state_dict", "optim"):
        assert [found.steps for found in states_in({key: state, "model": {}})] == [None]
    assert [found.settings["lr"] for found in states_in(state)] == [0.1]
    for other in ({}, [state], None, {"optimizer": "sgd"}, {"state": {}, "param_groups": []}):
        assert list(states_in(other)) == []
    assert list(states_in(nn.Linear(2, 1).state_dict())) == []


def test_groups_that_differ_in_more_than_decay_and_rate():
    def groups(line):
        first, second = line.named_parameters()
        return torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}], lr=0.1)

    assert read_state(stepped(groups)).groups is None
