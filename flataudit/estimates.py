"""The three estimators, each a short function of the functional variance.

`soft_rank`, `tic` and `loo` give values per sample; `measure_*` give the gaps with their numerical
errors, also from a solver that knows the traces alone.

psi_i below is sample i's contribution in nats; the gap is mean_i psi_i. All take Q_i = S_i'A_iS_i
and v_i with r_i = S_i v_i (`flataudit.solvers.base`, `flataudit.families`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from flataudit.families import Family
from flataudit.results import Estimate
from flataudit.solvers.base import Curvature, CurvatureTraces, FunctionalVariance, Trace


def soft_rank(variance: FunctionalVariance) -> Tensor:
    """Leverages h_i = tr(Lambda_i A_i) = tr(Q_i), (n,).

    Their sum tr(G (G + D)^-1) is the soft rank, the expected gap times n of a calibrated model
    (arXiv 2506.17809).
    """
    return variance.q.diagonal(dim1=1, dim2=2).sum(dim=1)


def tic(variance: FunctionalVariance, residual: Tensor) -> Tensor:
    """r_i' A_i r_i = v_i' Q_i v_i, (n,).

    Their sum is tr(C (G + D)^-1), C the uncentred gradient covariance (Takeuchi 1976).
    """
    return torch.einsum("ni,nij,nj->n", residual, variance.q, residual)


def centred_tic(variance: FunctionalVariance, residual: Tensor) -> float:
    """The TIC gap with the centred gradient covariance: minus gbar'(G + D)^-1 gbar / n."""
    psi = tic(variance, residual)
    return float(psi.mean()) - variance.mean_gradient / len(psi)


@dataclass(frozen=True, slots=True, eq=False)
class LeaveOneOut:
    """outputs: f_i^(-i) (n, K), for softmax up to a constant; psi: l(f_i^(-i)) - l(f_i), (n,)."""

    outputs: Tensor
    psi: Tensor


def loo(
    variance: FunctionalVariance, residual: Tensor, family: Family, f: Tensor, y: Tensor
) -> LeaveOneOut | None:
    """Leave-one-out outputs, f + A_i (I - Lambda_i A_i)^-1 r_i; None where a step is not finite.

    One Gauss-Newton step of retraining without sample i, n D held fixed: exact for quadratic
    losses (Rad and Maleki 2020). In whitened form b = (I - Q_i)^-1 v_i - v_i is S_i' times the
    shift, with I - Q_i from the solver, free of cancellation. Sampled Q_i take its other form,
    Q_i (I - Q_i)^-1 v_i, of whose two factors the samples are independent.
    """
    solved, info = torch.linalg.solve_ex(variance.complement, residual[:, :, None])
    if bool((info != 0).any()):
        return None
    b = (variance.q @ solved)[:, :, 0] if variance.sampled else solved[:, :, 0] - residual
    outputs = f + family.shift(f, y, b)
    psi = family.nll(outputs, y) - family.nll(f, y)
    # The square sum too: steps so long that they have no standard error are no estimate.
    if not bool(torch.isfinite(psi.square().sum()) and torch.isfinite(outputs).all()):
        return None
    return LeaveOneOut(outputs, psi)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A gap (nats per example) with the solver's own errors; zero where it is exact.

    psi: contributions (n,), or None where only their mean is known; monte_carlo_se: the standard
    error from probes or samples; truncation: a bound on what the iteration leaves out; rough,
    noise: unbiased but noisy contributions and the mean variance of that noise.
    """

    gap: float
    psi: Tensor | None
    monte_carlo_se: float | None = None
    truncation: float | None = None
    rough: Tensor | None = None
    noise: float = 0.0

    def estimate(self, nll: Tensor, **extra: float | None) -> Estimate:
        """With the standard error of the predicted test NLL, sd(l + psi)/sqrt(n), ddof 1.

        Where psi_i is noisy the noise's variance is taken off that of l + psi again, down to that
        of l alone at most: the samples with a large loss have a large psi.
        """
        psi = self.psi if self.psi is not None else self.rough
        assert psi is not None
        n = len(nll)
        variance = float((nll + psi).var(correction=1))
        if self.noise > 0:
            variance = max(variance - self.noise, float(nll.var(correction=1)))
        return Estimate(
            gap=self.gap,
            se=math.sqrt(variance) / math.sqrt(n),
            monte_carlo_se=self.monte_carlo_se,
            truncation=self.truncation,
            **extra,
        )


def measure_soft_rank(variance: Curvature) -> Measured:
    """Soft rank / n."""
    if isinstance(variance, CurvatureTraces):
        return _from_trace(variance.soft_rank)
    return _jackknifed(soft_rank, variance)


def measure_tic(variance: Curvature, residual: Tensor) -> Measured:
    """The TIC gap."""
    if isinstance(variance, CurvatureTraces):
        return _from_trace(variance.tic)
    return _jackknifed(lambda each: tic(each, residual), variance)


def measure_loo(
    variance: Curvature, residual: Tensor, family: Family, f: Tensor, y: Tensor
) -> tuple[LeaveOneOut, Measured] | None:
    """The leave-one-out outputs and gap; None where they do not exist or are not known."""
    if isinstance(variance, CurvatureTraces):
        return None
    whole = loo(variance, residual, family, f, y)
    if whole is None:
        return None

    def psi(each: FunctionalVariance) -> Tensor:
        found = whole if each is variance else loo(each, residual, family, f, y)
        return whole.psi * math.nan if found is None else found.psi

    measured = _jackknifed(psi, variance)
    if measured.psi is None or not math.isfinite(measured.gap + (measured.monte_carlo_se or 0.0)):
        return None
    return LeaveOneOut(whole.outputs, measured.psi), measured


def largest_leverage(variance: Curvature) -> float | None:
    """The largest eigenvalue of any Q_i, at most 1; None where they are not known.

    Of sampled Q_i that relative to Q_i + (I - Q_i) as sampled, which cannot exceed 1 either.
    """
    if isinstance(variance, CurvatureTraces):
        return None
    q = variance.q
    if variance.sampled:
        lower, info = torch.linalg.cholesky_ex(q + variance.complement)
        if bool((info != 0).any()):
            return 1.0
        half = torch.linalg.solve_triangular(lower, q, upper=False)
        q = torch.linalg.solve_triangular(lower, half.mT, upper=False)
    return float(torch.linalg.eigvalsh(q).max())


def blend(first: Measured, second: Measured) -> Measured:
    """The geometric mean b of two gaps a_1 and a_2, with b/2 (psi_1/a_1 + psi_2/a_2) per sample.

    Those are its contributions to first order, and their mean is b; errors add up likewise, since
    two runs of one solver share their probes.
    """
    gap = math.sqrt(max(first.gap, 0.0) * max(second.gap, 0.0))
    weights = tuple(gap / (2.0 * part.gap) if gap > 0 else 0.0 for part in (first, second))

    def mixed(a: Any, b: Any) -> Any:
        return None if a is None or b is None else weights[0] * a + weights[1] * b

    return Measured(
        gap=gap,
        psi=mixed(first.psi, second.psi),
        monte_carlo_se=mixed(first.monte_carlo_se, second.monte_carlo_se),
        truncation=mixed(first.truncation, second.truncation),
        rough=mixed(first.rough, second.rough),
        noise=weights[0] ** 2 * first.noise + weights[1] ** 2 * second.noise,
    )


def _from_trace(trace: Trace) -> Measured:
    n = len(trace.rough)
    return Measured(
        trace.value / n,
        None,
        trace.monte_carlo_se / n,
        trace.truncation / n,
        trace.rough,
        trace.noise,
    )


def _jackknifed(
    statistic: Callable[[FunctionalVariance], Tensor], variance: FunctionalVariance
) -> Measured:
    """The statistic's mean; of sampled values with the delete-a-group jackknife's error.

    The jackknife also takes off the bias of order 1/s that a nonlinear statistic has (Quenouille).
    """
    psi = statistic(variance)
    groups = len(variance.replicates)
    if not groups:
        return Measured(float(psi.mean()), psi)
    total, means = torch.zeros_like(psi), []
    for replicate in variance.replicates:
        part = statistic(replicate)
        total += part
        means.append(float(part.mean()))
    centre = sum(means) / groups
    error = math.sqrt((groups - 1) / groups * sum((mean - centre) ** 2 for mean in means))
    # Known from so few groups only: wider, so that a normal 90 % interval is Student's.
    error *= float(stats.t.ppf(0.95, groups - 1) / stats.norm.ppf(0.95))
    psi = groups * psi - (groups - 1) / groups * total
    # sd(l + psi) keeps the noise of sampled psi: it makes the interval wider, not narrower.
    gap = float(psi.mean())
    return Measured(gap, psi, error, variance.truncation * abs(gap))


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error sd/sqrt(n), ddof 1.

    >>> mean_and_se(torch.tensor([1.0, 3.0], dtype=torch.float64))
    (2.0, 1.0)
    """
    return float(values.mean()), float(values.std(correction=1)) / math.sqrt(len(values))
