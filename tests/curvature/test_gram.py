"""The Gram matrix by layers: equal to the Jacobian route, and only where that is right."""

from __future__ import annotations

import pytest
import torch

from flataudit.curvature import gram as module
from flataudit.curvature.gram import gram, gram_bytes
from tests.cases import BY_NAME, CASES, Built, build


def upper(matrix: torch.Tensor) -> torch.Tensor:
    return torch.triu(matrix)


def by_jacobian(built: Built) -> torch.Tensor:
    """B1 D1^-1 B1' from the rows of B, formed at once."""
    problem = built.problem
    rows = problem.rows(slice(0, problem.n_samples)).flatten(0, 1)
    d = torch.cat([built.penalty[name].flatten() for name in problem.params])
    tied = d > 0
    return (rows[:, tied] / d[tied]) @ rows[:, tied].T


def layer_names(built: Built) -> tuple[str, ...]:
    return tuple(layer.weight for layer in module.trusted_layers(built.problem))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gram_equals_the_jacobian_route(case):
    built = build(case)
    wanted = by_jacobian(built)
    found = gram(built.problem, built.penalty)
    scale = max(float(wanted.abs().max()), 1e-300)
    assert float((upper(found.matrix) - upper(wanted)).abs().max()) <= 1e-12 * scale
    assert not found.matrix.requires_grad
    assert not found.b0.requires_grad


@pytest.mark.parametrize("case", [c for c in CASES if c.layers is not None], ids=lambda c: c.name)
def test_layers_that_go_layer_by_layer(case):
    """The fast route is really taken where it can be, and not where it would be wrong."""
    assert layer_names(build(case)) == case.layers


@pytest.mark.parametrize("name", ["time_first_2", "time_first_3", "time_first_12"])
def test_time_first_takes_the_jacobian_route(name):
    """The axis of time is no axis of samples, whatever its length."""
    assert "inner.weight" not in layer_names(build(BY_NAME[name]))


def test_reused_module_would_lose_its_cross_terms():
    """Summing a twice-called layer's own Gram per call is off by far more than rounding."""
    built = build(BY_NAME["called_twice"])
    problem, inner = built.problem, built.problem.model.inner
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = inner.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    out = problem.model(built.x)
    handle.remove()
    assert len(seen) == 2
    root = problem.factor.root / problem.n_samples**0.5
    wrong = torch.zeros(problem.n_rows, problem.n_rows, dtype=torch.float64)
    for a, output in seen:
        delta = torch.stack(
            [
                torch.autograd.grad(out, output, root[:, :, j], retain_graph=True)[0]
                for j in range(problem.n_columns)
            ],
            dim=1,
        ).flatten(0, 1)
        inputs = a.detach().repeat_interleave(problem.n_columns, dim=0)
        wrong += (delta @ delta.T) * (inputs @ inputs.T + 1.0)
    rows = problem.rows(slice(0, problem.n_samples), ["inner.weight", "inner.bias"])
    right = rows.flatten(0, 1) @ rows.flatten(0, 1).T
    assert float((wrong - right).abs().max()) > 0.05 * float(right.abs().max())


@pytest.mark.parametrize("name", ["called_twice", "tied", "borrowed"])
def test_shared_weights_take_the_jacobian_route(name):
    built = build(BY_NAME[name])
    shared = {"called_twice": "inner.weight", "tied": "head.weight", "borrowed": "inner.weight"}
    assert shared[name] in built.problem.params
    assert shared[name] not in layer_names(built)


def test_untrustworthy_layers_are_refused(monkeypatch):
    """Where three samples disagree with the Jacobian route, no layer is trusted."""
    built = build(BY_NAME["mlp_tanh_wide"])
    assert layer_names(built)
    right = module._add_hadamard

    def wrong(matrix, a, delta, inverse):
        right(matrix, a * 1.001, delta, inverse)

    monkeypatch.setattr(module, "_add_hadamard", wrong)
    assert layer_names(built) == ()


@pytest.mark.parametrize(
    "name", ["convolutions", "convolutions_elementwise", "odd_convolutions", "layernorm_penalised"]
)
@pytest.mark.parametrize("n_bytes", [1, 2000, 8000])
def test_column_groups_of_any_size(name, n_bytes, monkeypatch):
    """Cutting the explicit rows into groups of columns bounds memory and changes no number."""
    built = build(BY_NAME[name])
    wanted = by_jacobian(built)
    monkeypatch.setattr(module, "GROUP_BYTES", n_bytes)
    found = gram(built.problem, built.penalty)
    scale = float(wanted.abs().max())
    assert float((upper(found.matrix) - upper(wanted)).abs().max()) <= 1e-12 * scale


@pytest.mark.parametrize("name", ["mlp_tanh_wide", "mlp_elementwise", "mlp_free_biases"])
@pytest.mark.parametrize("tile_rows", [1, 8, 20])
def test_tiles_of_any_size(name, tile_rows, monkeypatch):
    built = build(BY_NAME[name])
    wanted = by_jacobian(built)
    monkeypatch.setattr(module, "TILE_ROWS", tile_rows)
    found = gram(built.problem, built.penalty)
    scale = float(wanted.abs().max())
    assert float((upper(found.matrix) - upper(wanted)).abs().max()) <= 1e-12 * scale


def test_plan_counts_the_matrix_and_the_free_columns():
    free = build(BY_NAME["mlp_free_biases"])
    n_rows = free.problem.n_rows
    tied = {name: torch.ones_like(p) for name, p in free.penalty.items()}
    assert gram_bytes(free.problem, tied) >= 8 * n_rows**2
    assert gram_bytes(free.problem, free.penalty) > gram_bytes(free.problem, tied)
