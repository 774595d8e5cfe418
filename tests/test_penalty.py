"""D from the argument, the training record and the evidence, against direct formulas."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from flataudit import penalty as module
from flataudit.curvature.problem import make_problem
from flataudit.errors import InputError
from flataudit.families import Categorical
from flataudit.penalty import (
    ADAM_EPS,
    GradientMoments,
    describe,
    evidence,
    from_argument,
    from_training,
    stationarity,
)
from flataudit.solvers import SOLVERS
from flataudit.training import parse_training
from tests.cases import BY_NAME, build

PARAMS = {"weight": torch.ones(2, 3, dtype=torch.float64), "bias": torch.ones(2).double()}


# --- from the argument --------------------------------------------------------------------------


@pytest.mark.parametrize("argument", [0.02, "0.02"])
def test_one_number(argument):
    found = from_argument(argument, PARAMS)
    for name, p in PARAMS.items():
        torch.testing.assert_close(found[name], torch.full_like(p, 0.02), rtol=0, atol=0)


def test_numbers_by_name():
    found = from_argument({"weight": 0.5, "bias": 0}, PARAMS)
    assert found["weight"].unique().tolist() == [0.5]
    assert found["bias"].unique().tolist() == [0.0]


@pytest.mark.parametrize(
    ("argument", "part"),
    [
        (-0.1, "-0.1"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ("much", "'much'"),
        ({"weight": -1.0, "bias": 0.0}, "weight"),
        ({"weight": 1.0}, "no value for 'bias'"),
        ({"weight": 1.0, "bias": 0.0, "scale": 1.0}, "unknown 'scale'"),
    ],
)
def test_bad_argument(argument, part):
    with pytest.raises(InputError) as caught:
        from_argument(argument, PARAMS)
    assert all(word in str(caught.value) for word in ("expected", "got", ";", part))


# --- from the training record -------------------------------------------------------------------


def small_problem():
    """Six samples, so that every mini-batch can be enumerated."""
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (6,), generator=generator)
    model = nn.Linear(3, 3).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return make_problem(model, x, y, Categorical())


def second_moment(problem, batch: int, decay: float = 0.0) -> dict[str, torch.Tensor]:
    """E g_B^2 over all mini-batches of `batch` distinct samples, each gradient from torch."""
    model = problem.model
    params = dict(model.named_parameters())
    total = {name: torch.zeros_like(p.detach()) for name, p in params.items()}
    batches = list(itertools.combinations(range(problem.n_samples), batch))
    for at in batches:
        at = list(at)
        loss = nn.functional.cross_entropy(problem.x[at].call(model), problem.y[at])
        grads = torch.autograd.grad(loss, list(params.values()))
        for (name, p), g in zip(params.items(), grads, strict=True):
            total[name] += (g + decay * p.detach()).square() / len(batches)
    return total


def resolved(problem, text: str, scale: float = 1.0):
    moments = GradientMoments(*problem.gradient_moments())
    return from_training(parse_training(text), problem, moments, scale)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
def test_adam_second_moment_is_that_of_the_minibatch_gradient(batch):
    """Adam: D = w + sqrt(v)/sum lr, v the mean square of g_B + w theta over every mini-batch."""
    problem = small_problem()
    total, objective = resolved(
        problem, f"optimizer=adam,sum_lr=0.5,batch_size={batch},weight_decay=0.1"
    )
    v = second_moment(problem, batch, decay=0.1)
    for name in v:
        wanted = 0.1 + (v[name].sqrt() + ADAM_EPS) / 0.5
        torch.testing.assert_close(total[name], wanted, rtol=1e-9, atol=1e-12)
        assert objective[name].unique().tolist() == [0.1]


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 6])
def test_adamw_second_moment_is_that_of_the_minibatch_gradient(batch):
    """AdamW: D = (w + 1/sum lr) sqrt(v), the decay kept out of the gradient."""
    problem = small_problem()
    total, objective = resolved(
        problem, f"optimizer=adamw,sum_lr=0.5,batch_size={batch},weight_decay=0.1"
    )
    v = second_moment(problem, batch)
    for name in v:
        root = v[name].sqrt() + ADAM_EPS
        torch.testing.assert_close(total[name], (0.1 + 2.0) * root, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(objective[name], 0.1 * root, rtol=1e-9, atol=1e-12)


def test_batches_larger_than_the_data_are_full_batches():
    problem = small_problem()
    full, _ = resolved(problem, "optimizer=adam,sum_lr=1,batch_size=6")
    larger, _ = resolved(problem, "optimizer=adam,sum_lr=1,batch_size=64")
    for name in full:
        torch.testing.assert_close(larger[name], full[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "wanted", "objective"),
    [
        ("optimizer=sgd,sum_lr=40,weight_decay=0.01", 0.01 + 1 / 40, 0.01),
        ("optimizer=sgd,sum_lr=40", 1 / 40, 0.0),
        ("optimizer=sgd,sum_lr=40,momentum=0.9", 1 / 400, 0.0),
        ("optimizer=sgd,sum_lr=40,momentum=0.9,dampening=0.5", 1 / 200, 0.0),
        ("optimizer=converged,weight_decay=0.01", 0.01, 0.01),
        ("optimizer=converged", 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_sgd_and_converged(text, wanted, objective, scale):
    """D = (w + 1/T)/c where the training loss was c times the mean NLL."""
    total, own = resolved(small_problem(), text, scale)
    for name in total:
        torch.testing.assert_close(total[name], torch.full_like(total[name], wanted / scale))
        torch.testing.assert_close(own[name], torch.full_like(own[name], objective / scale))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_does_not_depend_on_the_scale_of_the_loss(optimizer):
    """Adam divides by its gradient's size: without decay its path, so c D, scales like sqrt(v)."""
    problem = small_problem()
    text = f"optimizer={optimizer},sum_lr=0.5,batch_size=2"
    one, _ = resolved(problem, text, 1.0)
    quarter, _ = resolved(problem, text, 0.25)
    for name in one:
        torch.testing.assert_close(quarter[name], one[name], rtol=1e-6, atol=1e-6)


def test_early_stopped_descent_is_a_penalty():
    """Along an eigen-direction gradient descent keeps 1 - (1 - lr h)^t, and 1 - exp(-h T) of
    gradient flow; both agree with h/(h + 1/T) where h T is small, which fixes the factor in T."""
    record = parse_training("optimizer=sgd,lr=0.1,steps=50")
    t = record.training_time()
    for h in (1e-4, 1e-5):
        kept = 1.0 - (1.0 - 0.1 * h) ** 50
        assert kept == pytest.approx(h / (h + 1.0 / t), rel=h * t)


@pytest.mark.parametrize(("momentum", "dampening"), [(0.0, 0.0), (0.9, 0.0), (0.8, 0.3)])
def test_training_time_is_that_of_torch_sgd(momentum, dampening):
    """On a linear loss torch's own SGD moves by -T g: T counts each step's remaining momentum."""
    theta = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([theta], lr=0.3, momentum=momentum, dampening=dampening)
    for _ in range(20):
        optimizer.zero_grad()
        (2.0 * theta).sum().backward()
        optimizer.step()
    record = parse_training(
        {"optimizer": "sgd", "lr": 0.3, "steps": 20, "momentum": momentum, "dampening": dampening}
    )
    # torch starts its momentum buffer at the first gradient, undampened.
    first = dampening * 0.3 * sum(momentum**u for u in range(20)) if momentum else 0.0
    assert record.training_time() + first == pytest.approx(-theta.item() / 2.0, rel=1e-10)


# --- evidence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax_free_bias", "mlp_tanh_wide", "convolutions"])
def test_evidence_is_the_fixed_point(name):
    """lambda n |theta|^2 = softrank_lambda, with the soft rank from a solver."""
    built = build(BY_NAME[name])
    problem = built.problem

    def rank(value: float) -> float:
        d = from_argument(value, problem.params)
        q = SOLVERS["primal"].solve(problem, d).q
        return float(q.diagonal(dim1=1, dim2=2).sum())

    limit = min(problem.n_params, problem.n_rows)
    found = evidence(rank, limit, problem.params, problem.n_samples)
    norm = sum(float(p.detach().square().sum()) for p in problem.params.values())
    assert found * problem.n_samples * norm == pytest.approx(rank(found), rel=1e-5)


def test_evidence_has_one_solution():
    """A single direction of curvature h: h/(h + lambda) = lambda n theta^2, a quadratic."""
    h, n, theta2 = 0.3, 50, 0.8
    params = {"w": torch.tensor([math.sqrt(theta2)], dtype=torch.float64)}
    found = evidence(lambda value: h / (h + value), 1, params, n)
    wanted = (-h + math.sqrt(h * h + 4 * h / (n * theta2))) / 2
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("params", "rank", "part"),
    [
        ({"w": torch.zeros(3).double()}, lambda value: 1.0, "not all zero"),
        ({"w": torch.ones(3).double()}, lambda value: 0.0, "curvature above rounding"),
    ],
)
def test_evidence_refusals(params, rank, part):
    with pytest.raises(InputError, match=part) as caught:
        evidence(rank, 3, params, 10)
    assert all(word in str(caught.value) for word in ("expected", "got", ";"))


# --- stationarity and description ---------------------------------------------------------------


def test_stationarity():
    """0 at the minimum of mean NLL + w |theta|^2/2, 1 for a free model anywhere."""
    problem = small_problem()
    theta = problem.params
    leaves = list(theta.values())
    optimizer = torch.optim.LBFGS(leaves, max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(problem.x.call(problem.model), problem.y)
        loss = loss + 0.05 * sum(p.square().sum() for p in leaves) / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = make_problem(problem.model, problem.x, problem.y, Categorical())
    mean, _ = fitted.gradient_moments()
    assert stationarity(from_argument(0.05, fitted.params), fitted, mean) < 1e-8
    assert stationarity(from_argument(0.0, fitted.params), fitted, mean) == 1.0
    assert stationarity(from_argument(0.1, fitted.params), fitted, mean) == pytest.approx(1.0)
    zero = {name: torch.zeros_like(t) for name, t in mean.items()}
    assert stationarity(from_argument(0.1, fitted.params), fitted, zero) == 0.0


def test_describe_one_value():
    info = describe(from_argument({"weight": 0.5, "bias": 0.0}, PARAMS), "argument", None, 0.1)
    assert (info.value, info.free_params, info.low, info.high) == (0.5, 2, 0.5, 0.5)
    assert (info.source, info.training, info.stationarity) == ("argument", None, 0.1)


def test_describe_many_values():
    record = parse_training("optimizer=sgd,sum_lr=3")
    info = describe(from_argument({"weight": 0.5, "bias": 0.2}, PARAMS), "training", record, None)
    assert (info.value, info.free_params, info.low, info.high) == (None, 0, 0.2, 0.5)
    assert info.training == record.to_dict()
    assert info.assumptions == record.assumptions


def test_describe_all_free():
    info = describe(from_argument(0.0, PARAMS), "argument", None, None)
    assert (info.value, info.free_params) == (0.0, 8)


def test_epsilon_is_torchs():
    assert torch.optim.Adam([nn.Parameter(torch.zeros(1))]).defaults["eps"] == module.ADAM_EPS
