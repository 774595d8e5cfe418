"""The three estimators, each a short function of the functional variance.

psi_i below is sample i's contribution in nats; the gap is mean_i psi_i. All take Q_i = S_i'A_iS_i
and v_i with r_i = S_i v_i (`flataudit.solvers.base`, `flataudit.families`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flataudit.families import Family
from flataudit.solvers.base import FunctionalVariance


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
    shift, with I - Q_i from the solver, free of cancellation.
    """
    solved, info = torch.linalg.solve_ex(variance.complement, residual[:, :, None])
    if bool((info != 0).any()):
        return None
    b = solved[:, :, 0] - residual
    outputs = f + family.shift(f, y, b)
    psi = family.nll(outputs, y) - family.nll(f, y)
    # The square sum too: steps so long that they have no standard error are no estimate.
    if not bool(torch.isfinite(psi.square().sum()) and torch.isfinite(outputs).all()):
        return None
    return LeaveOneOut(outputs, psi)


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error sd/sqrt(n), ddof 1.

    >>> mean_and_se(torch.tensor([1.0, 3.0], dtype=torch.float64))
    (2.0, 1.0)
    """
    return float(values.mean()), float(values.std(correction=1)) / math.sqrt(len(values))
