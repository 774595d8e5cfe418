"""The identities that docs/method.md states, each as an equation that the audit must satisfy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor, nn

from flataudit import audit
from flataudit.results import AuditReport


def classifier(n: int = 40, k: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    """A small network at no minimum in particular: the identities are about its derivatives."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, k, (n,), generator=generator)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, k)).double()
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return network, x, y


def audited(network: nn.Module, x: Tensor, y: Tensor, penalty: float) -> AuditReport:
    return audit(network, (x, y), family="categorical", penalty=penalty, sensitivity=False)


def test_tic_is_the_soft_rank_in_expectation_over_the_model_s_own_labels():
    """sum_k p_k r'Ar = tr(Lambda A), sample by sample: the step from TIC to the soft rank."""
    network, x, y = classifier()
    p = torch.softmax(network(x), dim=1).detach().numpy()
    tic = [audited(network, x, torch.full_like(y, k), 0.1).samples.tic for k in range(3)]
    expected = (p * np.stack(tic, axis=1)).sum(axis=1)
    report = audited(network, x, y, 0.1)
    assert expected == pytest.approx(report.samples.leverage, rel=1e-10)
    assert report.estimates.soft_rank.gap == pytest.approx(expected.mean(), rel=1e-10)
    # With the labels that are there it is another number.
    assert report.estimates.tic.gap != pytest.approx(report.estimates.soft_rank.gap, rel=0.05)


def test_leave_one_out_is_tic_to_first_order_in_leverage():
    """The difference falls as fast as the leverage: ten times the penalty, a tenth of it."""
    network, x, y = classifier()
    reports = [audited(network, x, y, penalty) for penalty in (1e2, 1e3, 1e4)]
    leverage = [float(r.samples.leverage.max()) for r in reports]
    off = [abs(r.estimates.loo.gap / r.estimates.tic.gap - 1.0) for r in reports]
    for before, after in ((0, 1), (1, 2)):
        assert leverage[after] == pytest.approx(leverage[before] / 10, rel=0.05)
        assert off[after] == pytest.approx(off[before] / 10, rel=0.1)
    assert off[0] < 5 * leverage[0]


def ridge(x: np.ndarray, y: np.ndarray, alpha: float) -> np.ndarray:
    return Ridge(alpha=alpha).fit(x, y).predict(x)


@pytest.mark.parametrize("alpha", [1e-6, 3.0, 200.0])
def test_ridge_s_gap_at_fixed_inputs_is_soft_rank_over_n_exactly(alpha):
    """Whatever the penalty, and though the true mean is no linear function of x.

    Losses are quadratic in the labels, whose expectation over N(m, s2 I) is the mean over the 2n
    points m +- sqrt(n s2) e_i.
    """
    rng = np.random.default_rng(5)
    n, variance = 30, 0.7
    x = rng.standard_normal((n, 4))
    mean = np.sin(2 * x[:, 0]) + x[:, 1] ** 2
    gaps = []
    for step in np.sqrt(n * variance) * np.concatenate([np.eye(n), -np.eye(n)]):
        fitted = ridge(x, mean + step, alpha)
        new = (mean - fitted) ** 2 + variance
        gaps.append(float((new - (mean + step - fitted) ** 2).mean() / (2 * variance)))
    y = mean + np.sqrt(variance) * rng.standard_normal(n)
    report = audit(Ridge(alpha=alpha).fit(x, y), (x, y), dispersion=variance, sensitivity=False)
    assert report.estimates.soft_rank.gap == pytest.approx(np.mean(gaps), rel=1e-9)


def test_ridge_s_leave_one_out_gap_is_that_of_true_refits():
    rng = np.random.default_rng(6)
    n, variance, alpha = 25, 0.5, 2.0
    x = rng.standard_normal((n, 3))
    y = x[:, 0] + rng.standard_normal(n)
    model = Ridge(alpha=alpha).fit(x, y)
    rise = []
    for i in range(n):
        keep = np.arange(n) != i
        without = Ridge(alpha=alpha).fit(x[keep], y[keep]).predict(x[i : i + 1])[0]
        before = model.predict(x[i : i + 1])[0]
        rise.append(((y[i] - without) ** 2 - (y[i] - before) ** 2) / (2 * variance))
    report = audit(model, (x, y), dispersion=variance, sensitivity=False)
    assert report.samples.loo == pytest.approx(np.asarray(rise), rel=1e-9)
    assert report.estimates.loo.gap == pytest.approx(np.mean(rise), rel=1e-9)


def test_factor_n_duplicated_data_keep_the_soft_rank_and_halve_the_gap():
    network, x, y = classifier()
    once = audited(network, x, y, 0.1).estimates
    twice = audited(network, torch.cat([x, x]), torch.cat([y, y]), 0.1).estimates
    assert twice.soft_rank.rank == pytest.approx(once.soft_rank.rank, rel=1e-10)
    assert twice.soft_rank.gap == pytest.approx(once.soft_rank.gap / 2, rel=1e-10)
    assert twice.tic.gap == pytest.approx(once.tic.gap / 2, rel=1e-10)
