"""The problem: rows of B, gradients, linearity, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flataudit.curvature.problem import make_problem, predict
from flataudit.errors import InputError
from flataudit.families import Categorical, Gaussian
from tests.cases import BY_NAME, CASES, build
from tests.dense import dense, jacobian

NAMES = ["softmax_free_bias", "mlp_tanh_wide", "convolutions", "gru", "embedding", "unused"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_whitened_jacobian(name):
    """Row block i of B is S_i' J_i / sqrt(n), for any columns and any samples."""
    built = build(BY_NAME[name])
    problem = built.problem
    _, jac = jacobian(built.model, built.x)
    wanted = torch.einsum("nkc,nkp->ncp", problem.factor.root, jac) / problem.n_samples**0.5
    torch.testing.assert_close(
        problem.rows(slice(0, problem.n_samples)), wanted, rtol=1e-10, atol=1e-13
    )
    start = 0
    for parameter, p in problem.params.items():
        part = problem.rows(slice(2, 5), [parameter])
        torch.testing.assert_close(
            part, wanted[2:5, :, start : start + p.numel()], rtol=1e-10, atol=1e-13
        )
        assert not part.requires_grad
        start += p.numel()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradient_moments(case):
    """(1/n) sum g_i and (1/n) sum g_i^2, g_i = J_i' r_i: the mean over samples, not the sum."""
    built = build(case, chunk_size=5)
    exact = dense(built.model, built.x, built.y, case.family, built.penalty, case.dispersion)
    gradients = torch.einsum("nkp,nk->np", exact.jacobian, exact.residual)
    mean, second = built.problem.gradient_moments()
    flat = [torch.cat([t.flatten() for t in part.values()]) for part in (mean, second)]
    torch.testing.assert_close(flat[0], gradients.mean(dim=0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat[1], exact.covariance.diagonal(), rtol=1e-9, atol=1e-12)


def test_gradient_is_that_of_the_mean_loss():
    """The mean gradient is what torch computes for a mean-reduced loss."""
    built = build(BY_NAME["mlp_tanh_wide"])
    nn.functional.cross_entropy(built.model(built.x), built.y, reduction="mean").backward()
    mean, _ = built.problem.gradient_moments()
    for name, p in built.model.named_parameters():
        torch.testing.assert_close(mean[name], p.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["gru", "data_dependent", "convolutions", "unused"])
def test_both_jacobian_routes_agree(name, monkeypatch):
    """vmap over samples and the fallback, one sample at a time, give the same rows."""
    problem = build(BY_NAME[name]).problem
    everything = slice(0, problem.n_samples)
    mapped = problem.rows(everything)
    batches: list[int] = []
    problem.model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))

    def refuse(*args, **kwargs):
        raise RuntimeError("vmap cannot trace this")

    monkeypatch.setattr(torch.func, "vmap", refuse)
    torch.testing.assert_close(problem.rows(everything), mapped, rtol=1e-10, atol=1e-14)
    assert batches == [1] * problem.n_samples


def test_vmap_cannot_trace_the_data_dependent_case():
    """Otherwise that case would not test the fallback."""
    built = build(BY_NAME["data_dependent"])
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda row: built.model(row[None]))(built.x)


@pytest.mark.parametrize(
    ("name", "linear"),
    [
        ("ridge", True),
        ("poisson", True),
        ("softmax_free_bias", True),
        ("mlp_tanh_wide", False),
        ("mlp_relu_inplace", False),
        ("convolutions", False),
        ("frozen_weight", False),
        ("embedding", False),
    ],
)
def test_is_linear(name, linear):
    assert build(BY_NAME[name]).problem.is_linear() is linear


def test_a_trained_head_on_frozen_features_is_linear():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    model[0].requires_grad_(False)
    x, y = torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    assert make_problem(model, x, y, Categorical()).is_linear()


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_predict_in_chunks(chunk_size):
    built = build(BY_NAME["convolutions"])
    found = predict(built.model, built.x, chunk_size=chunk_size)
    torch.testing.assert_close(found, built.problem.outputs, rtol=1e-12, atol=1e-14)
    assert not found.requires_grad


def test_sizes():
    problem = build(BY_NAME["mlp_tanh_wide"]).problem
    assert (problem.n_samples, problem.n_outputs, problem.n_columns) == (12, 3, 2)
    assert (problem.n_rows, problem.n_params) == (24, 5 * 10 + 10 + 10 * 3 + 3)
    few = problem.subset([0, 5, 11])
    assert few.n_samples == 3
    torch.testing.assert_close(few.outputs, problem.outputs[[0, 5, 11]], rtol=0, atol=0)


# --- refusals -----------------------------------------------------------------------------------


class Batchwise(nn.Module):
    """Centres its outputs over the batch."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(4, 1)

    def forward(self, x):
        out = self.line(x)
        return out - out.mean(dim=0)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


class Pooled(nn.Linear):
    def forward(self, x):
        return super().forward(x).mean(dim=0)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Batchwise(), ("depend on their own sample", "eval mode")),
        (Pair(4, 1), ("one output tensor, or an object with logits", "tuple", "logits alone")),
        (Pooled(4, 1), ("one output row per sample", "samples come first")),
        (nn.Linear(4, 1).requires_grad_(False), ("trained parameters", "requires_grad")),
    ],
)
def test_refused_models(model, parts):
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    with pytest.raises(InputError) as caught:
        make_problem(model.double(), x, y, Gaussian())
    assert all(part in str(caught.value) for part in ("expected", "got", *parts))
    assert "\n" not in str(caught.value)
