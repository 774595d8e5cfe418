"""Writing a training record: recorded steps, groups, and the run it goes to."""

from __future__ import annotations

import subprocess
import sys

import mlflow
import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import flataudit
from flataudit.models.registry import resolve, training_record
from flataudit.penalty import GradientMoments, from_training
from flataudit.recording import make_record
from flataudit.training import parse_training
from tests.mlflow_store import REQUIREMENTS, make_store, tracking
from tests.test_schedules import one_group, refused

# --- the record ---------------------------------------------------------------------------------


def sgd_travel(rates, momentum, dampening, nesterov):
    """How far SGD moves under a gradient of 1: its training time. torch's own first step is not
    dampened, which a start from a gradient of 0 avoids."""
    p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [p], lr=1.0, momentum=momentum, dampening=dampening, nesterov=nesterov
    )
    p.grad = torch.zeros_like(p)
    optimizer.step()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = float(rate)
        p.grad = torch.ones_like(p)
        optimizer.step()
    return -p.item()


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(0.0, 0.0, False), (0.9, 0.0, False), (0.9, 0.3, False), (0.8, 0.0, True)],
)
def test_training_time_is_how_far_sgd_goes(momentum, dampening, nesterov):
    rates = np.linspace(0.5, 0.01, 25)
    optimizer = one_group(momentum=momentum, dampening=dampening, nesterov=nesterov)
    record = make_record(optimizer, rates[:, None], 8, None, None, ())
    wanted = sgd_travel(rates, momentum, dampening, nesterov)
    assert record.training_time() == pytest.approx(wanted, rel=1e-12)
    assert record.total_lr == pytest.approx(rates.sum(), rel=1e-14)
    assert (record.steps, record.momentum, record.dampening) == (25, momentum, dampening)
    assert parse_training(record.to_record()) == record


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (torch.optim.Adam, "adam"),
        (torch.optim.AdamW, "adamw"),
        (lambda p, **k: torch.optim.Adam(p, decoupled_weight_decay=True, **k), "adamw"),
    ],
)
def test_adam(make, kind):
    optimizer = make([nn.Parameter(torch.zeros(1))], lr=0.01, weight_decay=0.1)
    record = make_record(optimizer, np.full((5, 1), 0.01), 16, "nll", None, ())
    assert (record.optimizer, record.weight_decay, record.batch_size) == (kind, 0.1, 16)
    assert (record.total_lr, record.time, record.loss) == (pytest.approx(0.05), None, "nll")
    text = refused(lambda: make_record(optimizer, np.full((5, 1), 0.01), None, None, None, ()))
    assert "batch_size" in text


class Wrapped(torch.optim.SGD):
    """Not torch's own: it may do anything."""


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda p: torch.optim.RMSprop(p, lr=0.1), "SGD, Adam and AdamW, got RMSprop"),
        (lambda p: Wrapped(p, lr=0.1), "got Wrapped"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True), "amsgrad"),
    ],
)
def test_other_optimizers_are_refused(make, part):
    optimizer = make([nn.Parameter(torch.zeros(1))])
    text = refused(lambda: flataudit.log_training(optimizer, None, 3, 8, run_id="none"))
    assert part in text


def test_steps_are_needed_and_compared_with_adams_own():
    p = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([p], lr=0.1)
    for bad in (None, 0, 2.5):
        text = refused(lambda bad=bad: flataudit.log_training(optimizer, None, bad, 8))
        assert "optimizer steps" in text
    p.grad = torch.ones(1)
    optimizer.step()
    text = refused(lambda: flataudit.log_training(optimizer, None, 3, 8))
    assert "expected steps=1" in text


# --- groups -------------------------------------------------------------------------------------


def grouped():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    weights = [p for n, p in model.named_parameters() if n.endswith("weight")]
    optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 0.02}], lr=0.5
    )
    return model, optimizer


def test_groups_by_parameter_name():
    model, optimizer = grouped()
    rates = np.tile([0.5, 0.02], (10, 1))
    record = make_record(optimizer, rates, 8, None, model, ())
    assert (record.weight_decay, record.total_lr) == (0.1, pytest.approx(5.0))
    (group,) = record.groups
    assert group.parameters == ("0.bias", "2.bias")
    assert (group.weight_decay, group.sum_lr) == (0.0, pytest.approx(0.2))
    assert parse_training(record.to_record()) == record
    by_name = record.by_parameter([n for n, _ in model.named_parameters()])
    assert by_name["0.weight"].training_time() == pytest.approx(5.0)
    assert by_name["2.bias"].training_time() == pytest.approx(0.2)
    assert "model=" in refused(lambda: make_record(optimizer, rates, 8, None, None, ()))


def test_names_are_those_of_the_network_inside_its_wrapper():
    model, optimizer = grouped()
    rates = np.tile([0.5, 0.02], (10, 1))
    record = make_record(optimizer, rates, 8, None, nn.DataParallel(model), ())
    assert record.groups[0].parameters == ("0.bias", "2.bias")


def test_groups_that_do_not_differ_need_no_names():
    first, second = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=0.1)
    assert make_record(optimizer, np.full((3, 2), 0.1), 8, None, None, ()).groups == ()


def test_what_groups_may_not_do():
    model, optimizer = grouped()
    extra = nn.Sequential(model, nn.Linear(3, 3))
    rates = np.tile([0.5, 0.02], (10, 1))
    text = refused(lambda: make_record(optimizer, rates, 8, None, extra, ()))
    assert "'1.weight'" in text
    optimizer.param_groups[0]["momentum"] = 0.9
    assert "one momentum" in refused(lambda: make_record(optimizer, rates, 8, None, model, ()))


def test_penalty_by_group():
    """D of each parameter from its group's own weight decay and training time."""
    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical

    model, optimizer = grouped()
    x = torch.randn(9, 3, dtype=torch.float64)
    problem = make_problem(model, x, torch.arange(9) % 3, Categorical())
    record = make_record(optimizer, np.tile([0.5, 0.02], (10, 1)), 8, None, model, ())
    moments = GradientMoments(*problem.gradient_moments())
    total, objective = from_training(record, problem, moments, 1.0)
    for name, d in total.items():
        decay, time = (0.0, 0.2) if name.endswith("bias") else (0.1, 5.0)
        torch.testing.assert_close(d, torch.full_like(d, decay + 1 / time))
        torch.testing.assert_close(objective[name], torch.full_like(d, decay))


# --- the recorder -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_recorder_follows_what_no_scheduler_can_foretell():
    optimizer = one_group(momentum=0.9)
    plateau = schedulers.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    wanted = []
    with flataudit.TrainingRecorder(optimizer, batch_size=4) as recorder:
        for t in range(12):
            wanted.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            plateau.step(1.0 + t)
    optimizer.step()  # after the recorder was closed
    record = recorder.record()
    assert record.total_lr == pytest.approx(sum(wanted), rel=1e-14)
    assert (record.steps, record.batch_size, record.assumptions) == (12, 4, ())
    assert record.time == pytest.approx(sgd_travel(wanted, 0.9, 0.0, False), rel=1e-12)


def test_recorder_without_steps_and_with_new_groups():
    optimizer = one_group()
    recorder = flataudit.TrainingRecorder(optimizer)
    assert "got none" in refused(recorder.record)
    optimizer.step()
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    optimizer.step()
    assert "added on the way" in refused(recorder.record)


# --- the run ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store():
    made = make_store()
    with tracking(made.uri):
        yield made


def test_no_run_to_write_to(store):
    assert "active MLflow run" in refused(lambda: flataudit.log_training(one_group(), None, 3))


def test_a_run_that_does_not_exist(store):
    with pytest.raises(flataudit.FlatauditError) as caught:
        flataudit.log_training(one_group(), None, 3, run_id="0" * 32)
    assert "\n" not in str(caught.value)


def test_from_training_script_to_audit(store):
    """A training script with the one line; its audit finds the exact sum of learning rates."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.from_numpy(store.x), torch.from_numpy(store.y)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9, weight_decay=0.01)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 15)
    seen = []
    experiment = mlflow.get_experiment_by_name("training").experiment_id
    with mlflow.start_run(experiment_id=experiment) as run:
        for _ in range(15):
            for at in torch.arange(80).split(20):
                seen.append(optimizer.param_groups[0]["lr"])
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[at]), y[at]).backward()
                optimizer.step()
            scheduler.step()
        written = flataudit.log_training(optimizer, scheduler, 60, 20)
        model = mlflow.pytorch.log_model(
            net, name="m", serialization_format="pickle", pip_requirements=REQUIREMENTS
        )
    source = resolve(model.model_uri)
    record, origin = training_record(source, 80)
    assert origin == "flataudit/training.json of the source run"
    assert record == parse_training(written)
    assert record.assumptions == ()
    assert record.sum_lr == pytest.approx(sum(seen), rel=1e-14)

    from flataudit.config import AuditOptions
    from flataudit.stages import run_audit

    np.savez(store.folder / "script.npz", x=store.x, y=store.y)
    options = AuditOptions(tracking_uri=store.uri)
    data = str(store.folder / "script.npz")
    report = run_audit(model.model_uri, data, None, options, write=False)["report"]
    assert report["penalty"]["source"] == "training"
    assert report["penalty"]["assumptions"] == []
    assert report["penalty"]["training"]["sum_lr"] == pytest.approx(sum(seen), rel=1e-14)
    time = sgd_travel(seen, 0.9, 0.0, False)
    assert report["penalty"]["value"] == pytest.approx(0.01 + 1 / time, rel=1e-12)
    again = flataudit.log_training(optimizer, scheduler, 60, 20, run_id=run.info.run_id)
    assert again == written


def test_importing_the_recorder_imports_no_mlflow():
    code = (
        "import sys, flataudit; flataudit.log_training; flataudit.TrainingRecorder;"
        "assert 'mlflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
