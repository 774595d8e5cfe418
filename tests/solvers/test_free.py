"""Unpenalised directions, held and streamed: one projection, one rank, one plan."""

from __future__ import annotations

import pytest
import torch

from flataudit import estimates
from flataudit.solvers import MATRIX_FREE, SOLVERS, Work
from flataudit.solvers import free as free_module
from flataudit.solvers.free import Held, Streamed, free_bytes, free_directions
from flataudit.solvers.operator import CurvatureOperator
from flataudit.solvers.sampling import Sampling
from tests.cases import BY_NAME, build

# softmax_all_free and collinear have dependent free columns.
FREE = ["mlp_free_biases", "layernorm", "softmax_all_free", "collinear"]


def names(built):
    return [name for name in built.problem.params if not bool(built.penalty[name].any())]


@pytest.mark.parametrize("name", FREE)
def test_streamed_directions_are_the_held_ones(name):
    built = build(BY_NAME[name])
    held, streamed = Held(built.problem, names(built)), Streamed(built.problem, names(built))
    assert streamed.rank == held.rank
    assert streamed.trace == pytest.approx(held.trace)
    assert streamed.energy == pytest.approx(held.energy, rel=1e-7, abs=1e-12)
    torch.testing.assert_close(streamed.leverage, held.leverage, rtol=0, atol=1e-8)
    torch.testing.assert_close(streamed.tic, held.tic, rtol=1e-7, atol=1e-9)
    v = torch.randn(built.problem.n_rows, 3, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(streamed.project(v), held.project(v), rtol=0, atol=1e-8)
    assert float((held.project(v).T @ held.basis).abs().max()) < 1e-12
    assert float(held.leverage.sum()) == pytest.approx(held.rank)


def test_held_where_it_is_small(monkeypatch):
    built = build(BY_NAME["layernorm"])
    assert isinstance(free_directions(built.problem, names(built)), Held)
    monkeypatch.setattr(free_module, "HELD_BYTES", 1000)
    assert isinstance(free_directions(built.problem, names(built)), Streamed)
    assert isinstance(free_directions(built.problem, []), Held)


def test_streaming_takes_the_columns_out_of_the_plan(monkeypatch):
    built = build(BY_NAME["layernorm"], copies=50)
    problem = built.problem
    columns = sum(problem.params[name].numel() for name in names(built))
    held = free_bytes(problem, built.penalty, 8)
    assert held >= 8 * 3 * problem.n_rows * columns
    monkeypatch.setattr(free_module, "HELD_BYTES", 0)
    monkeypatch.setattr(free_module, "CHUNK_BYTES", 0)
    more = build(BY_NAME["layernorm"], copies=100).problem
    grown = free_bytes(more, built.penalty, 8) - free_bytes(problem, built.penalty, 8)
    assert grown == 8 * 8 * 2 * (more.n_rows - problem.n_rows)  # vectors alone, no columns


@pytest.mark.parametrize("name", ["mlp_free_biases", "layernorm", "collinear"])
def test_lanczos_with_streamed_directions(name, monkeypatch):
    built = build(BY_NAME[name])
    v = built.problem.factor.residual
    exact = SOLVERS["dual"].solve(built.problem, built.penalty)
    monkeypatch.setattr(free_module, "HELD_BYTES", 0)
    found = MATRIX_FREE["lanczos"].solve(built.problem, built.penalty, Work(seed=1))
    wanted = float(estimates.soft_rank(exact).sum())
    assert found.soft_rank.value == pytest.approx(wanted, rel=1e-6)
    assert found.tic.value == pytest.approx(float(estimates.tic(exact, v).sum()), rel=1e-6)
    assert found.mean_gradient == pytest.approx(exact.mean_gradient, rel=1e-5, abs=1e-10)
    torch.testing.assert_close(
        found.soft_rank.rough, estimates.soft_rank(exact), rtol=1e-5, atol=1e-6
    )


def test_sampling_with_streamed_directions_is_that_with_held_ones(monkeypatch):
    """The same draws, the same projections."""
    built = build(BY_NAME["mlp_free_biases"])
    solver = Sampling(block=64, most=64, residual=1e-8)
    first = solver.solve(built.problem, built.penalty, Work(seed=3))
    monkeypatch.setattr(free_module, "HELD_BYTES", 0)
    second = solver.solve(built.problem, built.penalty, Work(seed=3))
    torch.testing.assert_close(second.q, first.q, rtol=1e-5, atol=1e-6)


def test_operator_with_streamed_directions(monkeypatch):
    built = build(BY_NAME["layernorm"])
    eye = torch.eye(built.problem.n_rows).double()
    held = CurvatureOperator(built.problem, built.penalty)(eye)
    monkeypatch.setattr(free_module, "HELD_BYTES", 0)
    streamed = CurvatureOperator(built.problem, built.penalty)(eye)
    scale = float(held.abs().max())
    assert float((streamed - held).abs().max()) <= 1e-8 * scale
