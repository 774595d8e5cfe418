"""Directions that are not quite invariant: both traces to within the next order."""

from __future__ import annotations

import pytest
import torch

from flataudit.solvers.deflation import Deflation
from flataudit.solvers.krylov import BlockLanczos

N = 80
EYE = torch.eye(N).double()


def unfinished(steps: int) -> tuple[torch.Tensor, torch.Tensor, BlockLanczos]:
    """A dense K, a start, and the Krylov space of both that has not ended."""
    generator = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(N, N, generator=generator).double()).Q
    k = q @ torch.diag(100.0 * torch.arange(1, N + 1).double() ** -1.5) @ q.T
    z = torch.randn(N, 4, generator=generator).double()
    lanczos = BlockLanczos(lambda v: k @ v, z, capacity=N)
    for _ in range(steps):
        lanczos.extend()
    return k, z, lanczos


def deflation(lanczos: BlockLanczos) -> Deflation:
    """Of the Ritz vectors that are nearly converged."""
    ritz = lanczos.ritz()
    keep = ritz.residuals <= 0.3 * (1.0 + ritz.values).sqrt()
    assert float(ritz.residuals[keep].max()) > 0.01
    found = Deflation.of(lanczos, ritz, 0.3)
    assert torch.equal(found.values, ritz.values[keep])
    return found


def half_converged(steps: int) -> tuple[torch.Tensor, Deflation]:
    k, _, lanczos = unfinished(steps)
    return k, deflation(lanczos)


def test_what_deflation_says_of_the_operator():
    k, found = half_converged(5)
    v = found.vectors
    torch.testing.assert_close(
        k @ v, v * found.values + found.block @ found.outside, atol=1e-10, rtol=0
    )
    torch.testing.assert_close(v.T @ v, torch.eye(v.shape[1]).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("steps", [4, 5, 7])
@pytest.mark.parametrize("quantity", ["soft rank", "TIC"])
def test_traces(steps, quantity):
    """Probes along an orthonormal basis: their mean is the trace itself, and no luck is left."""
    k, found = half_converged(steps)
    v = found.vectors
    p = EYE - v @ v.T
    f = EYE - torch.linalg.inv(EYE + k)
    inverse = torch.linalg.inv(EYE + p @ k @ p)
    z = EYE * N**0.5
    left = inverse @ p @ z
    found.probe(z, left)
    r = torch.eye(N).double()
    if quantity == "TIC":  # a few rows of large weight, as of mispredicted samples
        r = torch.diag(torch.randn(N, generator=torch.Generator().manual_seed(1)).double().exp())
    exact = float((r @ f @ r).trace())
    x = r @ z
    left = inverse @ p @ x
    plain = float((r @ v).square().sum(dim=0) @ (found.values / (1.0 + found.values)))
    plain += float((x * (p @ x - left)).sum(dim=0).mean())
    across = float((x * 2.0 * found.across(left)).sum(dim=0).mean())
    beyond, within = float(found.beyond(left).mean()), found.within(r @ v)
    assert beyond > 0
    assert within > 0
    if quantity == "soft rank":
        assert across == pytest.approx(0.0, abs=1e-12)
        assert within == pytest.approx(found.within())
    corrected = plain + across - beyond - within
    assert found.ratio < 0.5
    allowed = found.ratio / (1.0 - found.ratio) * (abs(across) + beyond + within)
    assert abs(corrected - exact) <= allowed
    assert abs(corrected - exact) < 0.2 * abs(plain - exact)


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_excess_of_quadratures_that_have_not_converged(steps):
    """Of the start's own columns: far below the bound, and known to the next order."""
    k, start, lanczos = unfinished(steps)
    found = deflation(lanczos)
    p = EYE - found.vectors @ found.vectors.T
    values, bounds = lanczos.quadratures()
    exact = (start * (start - torch.linalg.solve(EYE + k, start))).sum(dim=0)
    excess = float((values - exact).sum())
    z = EYE * N**0.5
    told = found.excess(lanczos.residuals(), z, torch.linalg.inv(EYE + p @ k @ p) @ p @ z)
    assert excess > 1e-6
    assert excess < 0.5 * float(bounds.sum())
    assert 0.0 <= excess - float(told.mean()) <= found.ratio / (1.0 - found.ratio) * excess


def test_no_directions():
    found = Deflation.none(torch.zeros(5).double())
    z = torch.ones(5, 2).double()
    found.probe(z, z)
    assert found.ratio == 0.0
    assert found.within() == 0.0
    assert float(found.beyond(z).sum()) == 0.0
    assert float(found.across(z).abs().sum()) == 0.0


def test_restored_goes_on_where_it_was():
    k, found = half_converged(5)
    z = torch.ones(N, 2).double()
    found.probe(z, k @ z)
    state = found.state()
    again = Deflation.restored(state)
    for each in (found, again):
        each.probe(2.0 * z, z)
    assert again.within() == found.within()
    assert float(state["count"]) == 2.0
