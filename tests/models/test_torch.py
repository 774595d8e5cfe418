"""Preparing a caller's network: a float64 copy in eval mode, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.export import Dim, export

from flataudit.errors import InputError
from flataudit.models.torch import is_exported, prepare, refuse_training_export

# torch's own, on copying an exported graph.
pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")

CPU = torch.device("cpu")
X = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(*head: nn.Module, outputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs), *head)


def exported(model: nn.Module) -> nn.Module:
    return export(
        model, (X[:4].float(),), dynamic_shapes=({0: Dim("n", min=2, max=4096)},)
    ).module()


class CastsToHalf(nn.Module):
    """Its own casts keep it from running in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x.to(torch.float32))


def test_a_float64_copy_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, X, CPU)
    assert prepared.dtype == torch.float64
    assert prepared.notes == ()
    assert not prepared.module.training
    assert all(p.dtype == torch.float64 for p in prepared.module.parameters())
    assert prepared.module is not model
    assert model.training
    assert all(m.training for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    mine = {id(p) for p in model.parameters()}
    assert not mine & {id(p) for p in prepared.module.parameters()}


def test_parameter_names_and_frozen_flags_are_kept():
    """Penalties are given by parameter name, so no wrapper may rename a parameter."""
    for model in (network(), network(nn.Softmax(dim=1)), network(nn.Sigmoid(), outputs=1)):
        model[0].weight.requires_grad_(False)
        prepared = prepare(model, X, CPU)
        wanted = {name: p.requires_grad for name, p in model.named_parameters()}
        found = {name: p.requires_grad for name, p in prepared.module.named_parameters()}
        assert found == wanted


def test_float32_where_float64_breaks():
    prepared = prepare(CastsToHalf(), X, CPU)
    assert prepared.dtype == torch.float32
    assert "float32" in prepared.notes[0]
    assert prepared.module(X.float()).dtype == torch.float32


def test_integer_inputs_stay_integer():
    words = torch.randint(0, 9, (10, 3), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(6, 3))
    prepared = prepare(model, words, CPU)
    assert prepared.dtype == torch.float64
    assert prepared.module(words).dtype == torch.float64


@pytest.mark.parametrize("head", [nn.Softmax(dim=1), nn.Softmax(dim=-1)])
def test_softmax_head_is_undone(head):
    """log p differs from the logits by the constant that softmax ignores."""
    plain, probable = network().double(), network(head).double()
    prepared = prepare(probable, X, CPU)
    assert "probabilities" in prepared.notes[0]
    with torch.no_grad():
        f, log_p = plain(X), prepared.module(X)
    torch.testing.assert_close(log_p, torch.log_softmax(f, dim=1), rtol=1e-12, atol=1e-12)


def test_sigmoid_head_is_undone():
    plain, probable = network(outputs=1).double(), network(nn.Sigmoid(), outputs=1).double()
    prepared = prepare(probable, X, CPU)
    assert "log odds" in prepared.notes[0]
    with torch.no_grad():
        torch.testing.assert_close(prepared.module(X), plain(X), rtol=1e-12, atol=1e-12)


def test_certain_probabilities_stay_finite():
    """Probabilities that round to 0 and 1 give finite natural parameters and derivatives."""
    for model in (network(nn.Softmax(dim=1)), network(nn.Sigmoid(), outputs=1)):
        with torch.no_grad():
            model[2].weight.mul_(1e4)
        prepared = prepare(model, X, CPU)
        out = prepared.module(X)
        assert bool(torch.isfinite(out).all())
        grads = torch.autograd.grad(out.sum(), list(prepared.module.parameters()))
        assert all(bool(torch.isfinite(g).all()) for g in grads)


def test_logits_that_happen_to_be_positive_are_logits():
    model = network()
    with torch.no_grad():
        model[2].bias.fill_(9.0)
    assert prepare(model, X, CPU).notes == ()
    # One positive output is a rate or a mean, not a probability, unless a sigmoid made it.
    assert prepare(network(nn.Softplus(), outputs=1), X, CPU).notes == ()


# --- exported graphs ----------------------------------------------------------------------------


def test_exported_graph_is_the_module():
    model = network().eval()
    graph = exported(model)
    assert is_exported(graph)
    assert not is_exported(model)
    prepared = prepare(graph, X, CPU)
    assert prepared.dtype == torch.float64
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(X)
        torch.testing.assert_close(prepared.module(X), wanted, rtol=1e-12, atol=1e-13)


def test_exported_heads_are_seen():
    assert "probabilities" in prepare(exported(network(nn.Softmax(1)).eval()), X, CPU).notes[0]
    graph = exported(network(nn.Sigmoid(), outputs=1).eval())
    assert "log odds" in prepare(graph, X, CPU).notes[0]


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.3), nn.BatchNorm1d(5)], ids=["dropout", "batch_norm"]
)
def test_exported_in_training_mode_is_refused(layer):
    model = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3))
    with pytest.raises(InputError, match=r"expected .* eval mode, got .*; call model.eval"):
        prepare(exported(model.train()), X, CPU)
    refuse_training_export(exported(model.eval()))
    refuse_training_export(model.train())  # a module: its copy is put in eval mode


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (RandomForestClassifier(), ("RandomForestClassifier", "tree ensemble", "gradient")),
        (GradientBoostingClassifier(), ("GradientBoostingClassifier", "tree ensemble")),
        (LogisticRegression(), ("LogisticRegression", "torch.nn.Module")),
        (lambda x: x, ("function", "torch.nn.Module")),
        (None, ("NoneType", "torch.nn.Module")),
        (nn.ReLU(), ("trained parameters",)),
        (network().requires_grad_(False), ("trained parameters",)),
        (nn.Linear(7, 3), ("(30, 4)",)),
        (nn.Conv2d(1, 2, 3), ("(30, 4)",)),
    ],
)
def test_refused(model, parts):
    with pytest.raises(InputError) as caught:
        prepare(model, X, CPU)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", *parts))
    assert "\n" not in message


def test_torchscript_is_refused():
    """torch.func cannot swap the parameters of a compiled module: say so, not a traceback."""
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(network().eval())
    with pytest.raises(InputError, match=r"expected .* got .*;"):
        prepare(scripted, X, CPU)
