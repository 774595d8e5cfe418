"""Replayed learning rates against those that torch's schedulers set, step by step."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from flataudit.errors import InputError
from flataudit.schedules import replayed_rates

STEPS = 30
SCHEDULERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.95),
    "StepLR": lambda o: schedulers.StepLR(o, 7, 0.5),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [5, 9], 0.1),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: schedulers.LinearLR(o, 0.1, 1.0, 10),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 30, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 20, 1e-3),
    "WarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 5, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(
        o, [1.0, 0.5], total_steps=40, cycle_momentum=False
    ),
    "CyclicLR": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, 5, mode="exp_range", gamma=0.99, cycle_momentum=False
    ),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.1, 1.0, 5), schedulers.CosineAnnealingLR(o, 25)], [5]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.1, 5), schedulers.ExponentialLR(o, 0.9)], o
    ),
}


def two_groups(momentum: float = 0.9):
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    return torch.optim.SGD(
        [{"params": [first]}, {"params": [second], "lr": 0.01}], lr=0.3, momentum=momentum
    )


def one_group(**settings):
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], **({"lr": 0.3} | settings))


def rates_of(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def trained(optimizer, scheduler, every=1, steps=STEPS):
    """Takes the steps and returns the learning rates that each had, as torch set them."""
    seen = []
    for t in range(steps):
        seen.append(rates_of(optimizer))
        optimizer.step()
        if (t + 1) % every == 0:
            scheduler.step()
    return np.array(seen)


def settings_of(optimizer):
    return [
        {k: copy.copy(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_replayed_rates_are_torchs(name, every):
    """After training, by step or by epoch: each step's rates, and nothing of the caller's moved."""
    optimizer = two_groups()
    scheduler = SCHEDULERS[name](optimizer)
    wanted = trained(optimizer, scheduler, every)
    before, state = settings_of(optimizer), str(sorted(scheduler.state_dict().items(), key=str))
    found, assumptions = replayed_rates(optimizer, scheduler, STEPS, None)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert assumptions == ()
    assert settings_of(optimizer) == before
    assert str(sorted(scheduler.state_dict().items(), key=str)) == state


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(SCHEDULERS))
def test_replayed_before_training_is_what_training_then_does(name):
    optimizer = two_groups()
    scheduler = SCHEDULERS[name](optimizer)
    planned, assumptions = replayed_rates(optimizer, scheduler, STEPS, None)
    np.testing.assert_allclose(planned, trained(optimizer, scheduler), rtol=1e-12)
    assert any("before training" in text for text in assumptions)


def test_the_scheduler_of_each_epoch_before_training():
    optimizer = one_group()
    scheduler = schedulers.StepLR(optimizer, 2, 0.5)
    planned, assumptions = replayed_rates(optimizer, scheduler, 12, 3)
    np.testing.assert_allclose(planned[:, 0], [0.3] * 6 + [0.15] * 6)
    assert assumptions == ()


def test_no_scheduler_is_a_constant_rate_and_says_so():
    found, assumptions = replayed_rates(one_group(), None, 4, None)
    assert found.tolist() == [[0.3]] * 4
    assert assumptions == ("constant learning rate: no scheduler was given",)


def refused(call):
    with pytest.raises(InputError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.filterwarnings("ignore")
def test_schedules_that_cannot_be_replayed():
    optimizer = one_group(momentum=0.9)
    plateau = schedulers.ReduceLROnPlateau(optimizer)
    text = refused(lambda: replayed_rates(optimizer, plateau, 5, None))
    assert "ReduceLROnPlateau" in text
    assert "TrainingRecorder" in text

    class Own(schedulers.LambdaLR):
        pass

    own = Own(optimizer, lambda t: 1.0)
    assert "Own, which cannot" in refused(lambda: replayed_rates(optimizer, own, 5, None))
    cycle = schedulers.OneCycleLR(optimizer, 1.0, total_steps=9)
    assert "cycle_momentum" in refused(lambda: replayed_rates(optimizer, cycle, 5, None))
    short = schedulers.OneCycleLR(one_group(), 1.0, total_steps=9, cycle_momentum=False)
    text = refused(lambda: replayed_rates(short.optimizer, short, 20, None))
    assert "to go on for 19 steps" in text


@pytest.mark.filterwarnings("ignore")
def test_contradictions_between_scheduler_optimizer_and_steps():
    optimizer = one_group()
    scheduler = schedulers.StepLR(optimizer, 2, 0.5)
    other = one_group()
    assert "of another" in refused(lambda: replayed_rates(other, scheduler, 5, None))
    trained(optimizer, scheduler, steps=7)
    assert "7 of its steps in 12" in refused(lambda: replayed_rates(optimizer, scheduler, 12, None))
    assert "at least 1" in refused(lambda: replayed_rates(optimizer, scheduler, 7, 0))
    assert "give the scheduler" in refused(lambda: replayed_rates(optimizer, None, 7, None))
    optimizer.param_groups[0]["lr"] = 0.07
    assert "changed otherwise" in refused(lambda: replayed_rates(optimizer, scheduler, 7, None))
