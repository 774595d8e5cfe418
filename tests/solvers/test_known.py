"""The samples whose part of TIC is known by quadrature: which, and what they are too large by."""

from __future__ import annotations

import pytest
import torch

from flataudit.solvers.base import Trace
from flataudit.solvers.deflation import Deflation
from flataudit.solvers.known import KnownSamples
from flataudit.solvers.krylov import BlockLanczos

N_SAMPLES, COLUMNS = 40, 2
N = N_SAMPLES * COLUMNS
EYE = torch.eye(N).double()


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """v (n, K') of which a few rows are long, and K (N, N) with a decaying spectrum."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(N_SAMPLES, COLUMNS, generator=generator).double()
    v *= torch.randn(N_SAMPLES, 1, generator=generator).double().exp()
    q = torch.linalg.qr(torch.randn(N, N, generator=generator).double()).Q
    return v, q @ torch.diag(100.0 * torch.arange(1, N + 1).double() ** -1.5) @ q.T


def test_the_longest_and_at_most_half():
    v, _ = problem()
    known = KnownSamples(v, 6)
    length = v.norm(dim=1)
    assert len(known) == 6
    others = [i for i in range(N_SAMPLES) if i not in known.index.tolist()]
    assert float(length[known.index].min()) >= float(length[others].max())
    assert torch.equal(known.units.argmax(dim=0), known.index)
    assert torch.equal(known.units.sum(dim=0), torch.ones(6, dtype=torch.int64))
    rows = torch.ones(N_SAMPLES, 3).double()
    left = known.without(rows)
    assert float(left[known.index].abs().max()) == 0.0
    assert torch.equal(left[others], rows[others])
    assert float(rows.min()) == 1.0
    assert len(KnownSamples(v, 1000)) == N_SAMPLES // 2


def test_of_equal_length_the_first():
    """So that a solve that is resumed on another machine means the same samples."""
    known = KnownSamples(torch.ones(10, 1).double(), 4)
    assert known.index.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_less_what_the_quadratures_are_too_large_by(steps):
    """Probes along an orthonormal basis: their mean is the excess, to the next order in what
    couples the deflated directions (none after two steps)."""
    v, k = problem()
    known = KnownSamples(v, 6)
    start = (v[:, :, None] * known.units[:, None, :]).flatten(0, 1)
    lanczos = BlockLanczos(lambda u: k @ u, start, capacity=N)
    for _ in range(steps):
        lanczos.extend()
    values, _ = lanczos.quadratures()
    known.take(values, lanczos.residuals())
    assert torch.equal(known.tic[known.index], values)
    assert float(known.without(known.tic).abs().max()) == 0.0
    exact = float((start * (start - torch.linalg.solve(EYE + k, start))).sum())
    deflation = Deflation.of(lanczos, lanczos.ritz(), 0.3)
    p = EYE - deflation.vectors @ deflation.vectors.T
    left = torch.linalg.inv(EYE + p @ k @ p) @ p
    for at in range(0, N, 16):  # in several rounds
        z = EYE[:, at : at + 16] * N**0.5
        deflation.probe(z, left @ z)
        known.probe(deflation, z, left @ z)
    plain = float(values.sum())
    trace = Trace(plain, 0.03, 0.01, known.tic.clone(), 0.0)
    found = known.less_excess(trace, deflation, widening=1.5)
    assert plain - exact > 1e-6
    assert found.value < plain
    assert -1e-9 <= found.value - exact <= found.truncation - 0.01 + 1e-9
    assert float(found.rough.sum()) == pytest.approx(found.value)
    assert float(known.without(found.rough - known.tic).abs().max()) == 0.0
    told = torch.cat([deflation.excess(known.residuals, EYE[:, [i]] * N**0.5,
                                       left[:, [i]] * N**0.5) for i in range(N)])  # fmt: skip
    se = 1.5 * float(told.std(correction=1)) * N**-0.5
    assert found.monte_carlo_se == pytest.approx((0.03**2 + se**2) ** 0.5)


def test_nothing_to_take_off():
    v, _ = problem()
    known = KnownSamples(v, 6)
    known.take(torch.ones(6).double(), torch.zeros(3, 6).double())
    trace = Trace(2.0, 0.1, 0.01, torch.ones(N_SAMPLES).double(), 0.0)
    assert known.less_excess(trace, Deflation.none(EYE[0]), widening=1.0) is trace


def test_restored_goes_on_where_it_was():
    v, _ = problem()
    one, other = KnownSamples(v, 6), KnownSamples(v, 6)
    one.take(torch.arange(6).double(), torch.ones(3, 6).double())
    one.excess += 2.0
    state = one.state()
    one.excess += 1.0
    one.tic += 1.0
    other.restore(state)
    assert other.tic[other.index].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert torch.equal(other.residuals, torch.ones(3, 6).double())
    assert other.excess.tolist() == [2.0, 2.0]
    other.excess += 5.0
    assert state["excess"].tolist() == [2.0, 2.0]
