"""Block Lanczos: quadratures of x/(1 + x), their bounds, invariant spaces and restarts."""

from __future__ import annotations

import pytest
import torch

from flataudit.errors import NumericalError
from flataudit.solvers.krylov import BlockLanczos

N = 120


def matrix(rank: int = N) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator).double()).Q
    values = 1e3 * torch.arange(1, N + 1).double() ** -2.0
    values[rank:] = 0.0
    return q @ torch.diag(values) @ q.T


def starts(m: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2.0 * torch.randint(0, 2, (N, m), generator=generator).double() - 1.0


def exact(k: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    eye = torch.eye(N).double()
    return (z * torch.linalg.solve(eye + k, k @ z)).sum(dim=0)


@pytest.mark.parametrize("m", [1, 4])
def test_quadrature_is_too_large_by_at_most_its_bound(m):
    k, z = matrix(), starts(m)
    lanczos = BlockLanczos(lambda v: k @ v, z, capacity=N)
    previous = torch.full((m,), torch.inf).double()
    for _ in range(20):
        lanczos.extend()
        values, bounds = lanczos.quadratures()
        excess = values - exact(k, z)
        assert bool((excess >= -1e-9).all())
        assert bool((excess <= bounds + 1e-9).all())
        assert bool((values <= previous + 1e-9).all())
        previous = values
    assert float(bounds.max()) < 1e-3
    basis = lanczos.basis
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(lanczos.size).double(), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(basis.T @ k @ basis, lanczos.projected, atol=1e-9, rtol=0)


def test_ritz_residuals_are_those_of_the_vectors():
    k, z = matrix(), starts(3)
    lanczos = BlockLanczos(lambda v: k @ v, z, capacity=N)
    for _ in range(8):
        lanczos.extend()
    ritz = lanczos.ritz()
    vectors = lanczos.basis @ ritz.vectors
    residuals = (k @ vectors - vectors * ritz.values).norm(dim=0)
    torch.testing.assert_close(ritz.residuals, residuals, rtol=1e-6, atol=1e-9)
    weights = ritz.coefficients.square() * (ritz.values / (1 + ritz.values))[:, None]
    torch.testing.assert_close(weights.sum(dim=0), lanczos.quadratures()[0])


def test_invariant_space_ends_with_the_exact_value():
    k, z = matrix(rank=7), starts(2)
    lanczos = BlockLanczos(lambda v: k @ v, torch.cat([z, z], dim=1), capacity=N)
    while not lanczos.exhausted:
        lanczos.extend()
    assert lanczos.size == 9  # seven directions and what of two starts lies in the null space
    values, bounds = lanczos.quadratures()
    assert float(bounds.max()) < 1e-12
    torch.testing.assert_close(values[:2], exact(k, z))
    torch.testing.assert_close(values[2:], values[:2])


def test_empty_start():
    lanczos = BlockLanczos(lambda v: v, torch.zeros(N, 2).double(), capacity=N)
    assert lanczos.exhausted
    assert lanczos.quadratures()[0].tolist() == [0.0, 0.0]


def test_deflated_space_stays_orthogonal():
    k, z = matrix(), starts(2)
    vectors = torch.linalg.eigh(k).eigenvectors[:, -5:]
    z = z - vectors @ (vectors.T @ z)
    lanczos = BlockLanczos(lambda v: k @ v, z, against=vectors, capacity=N)
    for _ in range(10):
        lanczos.extend()
    assert float((vectors.T @ lanczos.basis).abs().max()) < 1e-12


def test_nearly_dependent_starts_stay_orthogonal():
    """What is left of one beside the other is cleaned again: it cancelled almost entirely."""
    k, z = matrix(), starts(3)
    vectors = torch.linalg.eigh(k).eigenvectors[:, -5:]
    z[:, 1] = z[:, 0] + 1e-7 * z[:, 1]
    lanczos = BlockLanczos(lambda v: k @ v, z, against=vectors, capacity=N)
    for _ in range(5):
        lanczos.extend()
    basis = lanczos.basis
    assert float((vectors.T @ basis).abs().max()) < 1e-13
    assert float((basis.T @ basis - torch.eye(15).double()).abs().max()) < 1e-13


def test_capacity_is_kept():
    """And the bound still counts what did not fit."""
    k, z = matrix(), starts(4)
    lanczos = BlockLanczos(lambda v: k @ v, z, capacity=30)
    while not lanczos.full:
        lanczos.extend()
    assert not lanczos.exhausted
    assert lanczos.size == 28
    values, bounds = lanczos.quadratures()
    excess = values - exact(k, z)
    assert bool((excess <= bounds).all())
    assert bool((excess > 0).all())


def test_restored_state_goes_on_as_if_nothing_had_happened():
    k, z = matrix(), starts(3)
    whole = BlockLanczos(lambda v: k @ v, z, capacity=N)
    for _ in range(4):
        whole.extend()
    state = {name: t.clone() for name, t in whole.state().items()}
    again = BlockLanczos(lambda v: k @ v, z, capacity=N)
    again.restore(state)
    for lanczos in (whole, again):
        for _ in range(3):
            lanczos.extend()
    assert torch.equal(whole.projected, again.projected)
    assert torch.equal(whole.basis, again.basis)


def test_an_operator_that_is_not_positive_is_a_numerical_error():
    """As rounding makes it where the curvature is beyond 1e16: no error of torch's own."""
    lanczos = BlockLanczos(lambda v: -2.0 * v, starts(2), capacity=N)
    lanczos.extend()
    with pytest.raises(NumericalError, match="expected a positive semi-definite curvature, got"):
        lanczos.quadratures()
