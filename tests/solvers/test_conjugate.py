"""Block conjugate gradients: solutions, residuals, deficient right-hand sides, restarts."""

from __future__ import annotations

import pytest
import torch

from flataudit.solvers.conjugate import block_cg

N = 90


def matrix() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator).double()).Q
    return q @ torch.diag(1e4 * torch.arange(1, N + 1).double() ** -3.0) @ q.T


def rights(m: int) -> torch.Tensor:
    return torch.randn(N, m, generator=torch.Generator().manual_seed(1)).double()


def below(limit):
    return lambda x, c: float(c.norm(dim=0).max()) <= limit


def exact(k: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(torch.eye(N).double() + k, b)


@pytest.mark.parametrize("m", [1, 6])
def test_solves(m):
    k, b = matrix(), rights(m)
    steps = []
    x = block_cg(
        lambda v: k @ v,
        b,
        below(1e-9),
        iterations=300,
        after_step=lambda state, step: steps.append((state, step)),
    )
    assert float((x - exact(k, b)).norm()) < 1e-8
    assert [step for _, step in steps] == list(range(1, len(steps) + 1))
    # C's columns are as long as the residuals.
    state = steps[len(steps) // 2][0]
    residual = b - state["x"] - k @ state["x"]
    torch.testing.assert_close(residual.norm(dim=0), state["c"].norm(dim=0), rtol=1e-5, atol=1e-8)


def test_a_block_needs_fewer_steps_than_a_vector():
    k, counts = matrix(), []
    for m in (1, 12):
        steps = []
        block_cg(
            lambda v: k @ v,
            rights(m),
            below(1e-6),
            iterations=300,
            after_step=lambda state, step, to=steps: to.append(step),
        )
        counts.append(len(steps))
    assert counts[1] < counts[0]


def test_dependent_and_zero_columns():
    k, b = matrix(), rights(3)
    b = torch.cat([b, b[:, :1], torch.zeros(N, 1).double()], dim=1)
    x = block_cg(lambda v: k @ v, b, below(1e-8), iterations=300)
    torch.testing.assert_close(x, exact(k, b), rtol=0, atol=1e-7)


def test_goes_on_from_a_state():
    k, b = matrix(), rights(4)
    states = []
    whole = block_cg(
        lambda v: k @ v,
        b,
        below(1e-8),
        iterations=300,
        after_step=lambda state, step: states.append(state),
    )
    again = []
    x = block_cg(
        lambda v: k @ v,
        b,
        below(1e-8),
        iterations=300,
        state=states[4],
        after_step=lambda state, step: again.append(state),
    )
    assert torch.equal(x, whole)
    assert len(again) == len(states) - 5


def test_ends_after_its_iterations():
    k, b = matrix(), rights(2)
    x = block_cg(lambda v: k @ v, b, below(0.0), iterations=3)
    assert float((b - x - k @ x).norm()) > 1e-3
