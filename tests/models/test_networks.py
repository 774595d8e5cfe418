"""What torch networks return and hold: output objects, probabilities, odd layers and attributes."""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flataudit import InputError, audit, estimates
from flataudit.curvature.problem import make_problem
from flataudit.families import make_family
from flataudit.models.torch import prepare
from flataudit.solvers import SOLVERS
from tests.dense import dense

CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (20,), generator=GENERATOR)
YES = torch.randint(0, 2, (20,), generator=GENERATOR)


def seeded(make: Any, *args: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(6)
        return make(*args)


def layers(outputs: int = 3) -> list[nn.Module]:
    return [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)]


def plain(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(*layers(outputs))).double()


def assert_same(found, wanted) -> None:
    for field in ("nll", "leverage", "tic", "loo"):
        np.testing.assert_allclose(
            getattr(found.samples, field), getattr(wanted.samples, field), rtol=1e-9, atol=1e-13
        )


# --- probabilities ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize(
    ("head", "outputs", "family", "y"),
    [(nn.Softmax(dim=1), 3, "categorical", Y), (nn.Sigmoid(), 1, "bernoulli", YES)],
    ids=["softmax", "sigmoid"],
)
def test_probability_heads_equal_the_definition_without_the_head(head, outputs, family, y, solver):
    prepared = prepare(nn.Sequential(*plain(outputs), head), X, CPU)
    likelihood = make_family(family, y, outputs, 1.0)
    problem = make_problem(prepared.module, X, likelihood.check(y, outputs), likelihood)
    d = {name: torch.full_like(p.detach(), 0.03) for name, p in problem.params.items()}
    exact = dense(plain(outputs), X, y, family, d)
    found = SOLVERS[solver].solve(problem, d)
    v = problem.factor.residual
    left_out = estimates.loo(found, v, likelihood, problem.outputs, problem.y)
    assert left_out is not None
    for got, wanted in (
        (estimates.soft_rank(found), exact.leverage),
        (estimates.tic(found, v), exact.tic),
        (left_out.psi, exact.loo),
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


# --- output objects -----------------------------------------------------------------------------

Output = namedtuple("Output", ["logits", "state"])


@dataclass
class ModelOutput(OrderedDict):  # as transformers' outputs: attributes, and items where not None
    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        self.update({k: v for k, v in vars(self).items() if v is not None})


class Returns(nn.Sequential):
    """A network that returns something around its logits."""

    def __init__(self, wrap: Any) -> None:
        super().__init__(*seeded(layers))
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(super().forward(x), x)


WRAPS = {
    "dict": lambda f, x: {"logits": f, "state": x},
    "namedtuple": lambda f, x: Output(f, x),
    "model_output": lambda f, x: ModelOutput(logits=f, hidden_states=(x,)),
}


@pytest.mark.parametrize("solver", sorted(SOLVERS))
@pytest.mark.parametrize("kind", WRAPS)
def test_logits_are_taken_from_output_objects(kind, solver):
    found = audit(Returns(WRAPS[kind]), (X, Y), penalty=0.03, solver=solver)
    assert_same(found, audit(plain(), (X, Y), penalty=0.03, solver=solver))


def test_a_head_of_probabilities_inside_an_output_object():
    model = Returns(lambda f, x: {"logits": torch.softmax(f, dim=1)})
    assert_same(audit(model, (X, Y), penalty=0.03), audit(plain(), (X, Y), penalty=0.03))


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (lambda f, x: (f, x), "got tuple"),
        (lambda f, x: [f], "got list"),
        (lambda f, x: {"scores": f}, "got dict"),
        (lambda f, x: {"logits": None}, "got dict"),
        (lambda f, x: None, "got NoneType"),
        (lambda f, x: f.mean(), "got shape ()"),
    ],
)
def test_outputs_without_logits_are_refused(wrap, got):
    with pytest.raises(InputError) as caught:
        audit(Returns(wrap), (X, Y), penalty=0.03)
    assert got in str(caught.value)
    assert "\n" not in str(caught.value)


# --- layers and attributes ----------------------------------------------------------------------


def test_the_older_weight_norm_keeps_a_product_that_no_copy_can_take():
    def make(normed: Any) -> nn.Module:
        first, act, last = seeded(layers)
        return nn.Sequential(normed(first), act, last)

    with pytest.warns(FutureWarning, match="weight_norm"):
        older = make(nn.utils.weight_norm)
    newer = make(nn.utils.parametrizations.weight_norm)
    before = older[0].weight
    found = audit(older, (X, Y), penalty=0.03)
    assert_same(found, audit(newer, (X, Y), penalty=0.03))
    assert older[0].weight is before
    assert found.model.n_params == sum(p.numel() for p in newer.parameters())


@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_made_dense(layer):
    def make(sparse: bool) -> nn.Module:
        embed = layer(9, 4, sparse=sparse)
        return nn.Sequential(embed, nn.Flatten(), nn.LazyLinear(3))

    ids = torch.randint(0, 9, (20, 3), generator=GENERATOR)
    models = [seeded(make, sparse) for sparse in (False, True)]
    for model in models:
        seeded(model, ids)
    found = [audit(model, (ids, Y), penalty=0.03) for model in models]
    assert_same(*found)
    assert models[1][0].sparse


def test_recurrent_layers_are_prepared_for_cudnn():
    """cuDNN has no backward pass in eval mode; in training mode without dropout it is the same."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True)
            self.drop, self.head = nn.Dropout(0.5), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            h, state = self.lstm(x)
            return Output(self.head(self.drop(h[:, -1])), state)

    model, x = seeded(Last), X.reshape(20, 1, 4).expand(-1, 3, -1)
    prepared = prepare(model, x, CPU).module
    assert prepared.lstm.training
    assert prepared.lstm.dropout == 0.0
    assert not prepared.drop.training
    assert model.lstm.dropout == 0.5
    with torch.no_grad():
        wanted = model.double().eval()(x).logits
        torch.testing.assert_close(prepared(x), wanted, rtol=1e-12, atol=1e-13)


class Trainer:
    """Stands for what a training framework hangs onto its modules."""

    def __init__(self) -> None:
        self.callbacks = [lambda: None]


class LightningLike(nn.Module):
    """A module with training steps, hyperparameters, metrics and a property that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.hparams = {"lr": 0.1}
        self.example_input_array = torch.zeros(1, 4)
        self.network = plain()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self._trainer = Trainer()

    @property
    def trainer(self) -> Trainer:
        raise RuntimeError("the module is not attached to a Trainer")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def test_modules_of_training_frameworks():
    names = [name for name, _ in plain().named_parameters()]
    d = {name: 0.03 * ("weight" in name) for name in names}
    found = audit(LightningLike(), (X, Y), penalty={f"network.{k}": v for k, v in d.items()})
    assert_same(found, audit(plain(), (X, Y), penalty=d))


def test_wrappers_are_taken_off():
    wanted = audit(plain(), (X, Y), penalty=0.03)
    for wrapped in (nn.DataParallel(plain()), torch.compile(plain(), backend="eager")):
        assert_same(audit(wrapped, (X, Y), penalty=0.03), wanted)


class AlwaysDrops(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))  # training=True is the default


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: AlwaysDrops(4, 3), "same outputs at every call, got random ones"),
        (lambda: nn.LazyLinear(3), "got lazy ones that have no values yet"),
        (
            lambda: nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)),
            "depend on their own sample alone",
        ),
    ],
)
def test_refused_by_name(make, part):
    with pytest.raises(InputError) as caught:
        audit(seeded(make), (X, Y), penalty=0.03)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_holds_a_lock_is_refused():
    model = plain()
    model.lock = threading.Lock()
    with pytest.raises(InputError, match=r"expected a network that can be copied, got: .*lock"):
        audit(model, (X, Y), penalty=0.03)
