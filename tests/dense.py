"""The definitions, dense and in float64: the oracle that every solver is held against.

Nothing here is shared with the code under test. The Jacobian is built output by output with
torch.autograd; softmax keeps its K columns and its singular variance; (G + D)^+ is a
pseudo-inverse by eigenvalues. Sizes: n samples, K outputs, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Dense:
    """J (n, K, P), Lambda (n, K, K), r (n, K), G (P, P), A (n, K, K), and what follows."""

    outputs: Tensor
    jacobian: Tensor
    variance: Tensor
    residual: Tensor
    ggn: Tensor
    covariance: Tensor
    functional: Tensor
    leverage: Tensor
    tic: Tensor
    loo_outputs: Tensor
    loo: Tensor
    nll: Tensor
    centred_tic: float
    trace_ggn: float


def call(model: nn.Module, x: Any) -> Tensor:
    """model(x), model(*x) for a tuple or model(**x) for a dict."""
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def jacobian(model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Outputs (n, K) and their derivatives (n, K, P), one backward pass per output."""
    params = [p for p in model.parameters() if p.requires_grad]
    outputs = call(model, x)
    outputs = outputs.reshape(len(outputs), -1)
    rows = []
    for output in outputs.flatten():
        grads = torch.autograd.grad(output, params, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros(p.numel()).double() if g is None else g.reshape(-1)
            for g, p in zip(grads, params, strict=True)
        ]
        rows.append(torch.cat(flat))
    return outputs.detach(), torch.stack(rows).reshape(*outputs.shape, -1)


def likelihood(
    family: str, f: Tensor, y: Tensor, dispersion: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """nll (n,), residual dl/df (n, K) and variance d2l/df2 (n, K, K), from the densities."""
    if family == "categorical":
        p = torch.softmax(f, dim=1)
        nll = -torch.log_softmax(f, dim=1)[torch.arange(len(f)), y]
        hot = torch.nn.functional.one_hot(y, f.shape[1]).double()
        return nll, p - hot, torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    y = y.double().reshape(f.shape)
    if family == "bernoulli":
        p = torch.sigmoid(f)
        nll = -torch.distributions.Bernoulli(logits=f).log_prob(y).sum(dim=1)
        return nll, p - y, torch.diag_embed(p * (1 - p))
    if family == "gaussian":
        normal = torch.distributions.Normal(f, dispersion**0.5)
        eye = torch.eye(f.shape[1]).double().expand(len(f), -1, -1)
        return -normal.log_prob(y).sum(dim=1), (f - y) / dispersion, eye / dispersion
    rate = torch.exp(f)
    nll = -torch.distributions.Poisson(rate).log_prob(y).sum(dim=1)
    return nll, rate - y, torch.diag_embed(rate)


def pseudo_inverse(matrix: Tensor) -> Tensor:
    """(G + D)^+: eigenvalues below 1e-12 of the largest count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    keep = values > 1e-12 * values[-1]
    return vectors[:, keep] / values[keep] @ vectors[:, keep].T


def dense(
    model: nn.Module,
    x: Any,
    y: Tensor,
    family: str,
    penalty: Mapping[str, Tensor],
    dispersion: float = 1.0,
) -> Dense:
    """Everything by its definition; penalty: D by parameter name."""
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    f, jac = jacobian(model, x)
    nll, r, variance = likelihood(family, f, y, dispersion)
    d = torch.cat([penalty[name].flatten() for name in names])
    return from_parts(f, jac, nll, r, variance, d, family, y, dispersion)


def from_parts(
    f: Tensor,
    jac: Tensor,
    nll: Tensor,
    r: Tensor,
    variance: Tensor,
    d: Tensor,
    family: str,
    y: Tensor,
    dispersion: float = 1.0,
) -> Dense:
    """The estimators from J, r, Lambda and D."""
    n, k, _ = jac.shape
    ggn = torch.einsum("nka,nkl,nlb->ab", jac, variance, jac) / n
    gradients = torch.einsum("nka,nk->na", jac, r)
    inverse = pseudo_inverse(ggn + torch.diag(d))
    functional = torch.einsum("nka,ab,nlb->nkl", jac, inverse, jac) / n
    leverage = torch.einsum("nkl,nlk->n", variance, functional)
    tic = torch.einsum("nk,nkl,nl->n", r, functional, r)
    step = torch.linalg.solve(torch.eye(k).double() - variance @ functional, r[:, :, None])
    outputs = f + (functional @ step)[:, :, 0]
    mean = gradients.mean(dim=0)
    return Dense(
        outputs=f,
        jacobian=jac,
        variance=variance,
        residual=r,
        ggn=ggn,
        covariance=gradients.T @ gradients / n,
        functional=functional,
        leverage=leverage,
        tic=tic,
        loo_outputs=outputs,
        loo=likelihood(family, outputs, y, dispersion)[0] - nll,
        nll=nll,
        centred_tic=float(tic.mean() - mean @ inverse @ mean / n),
        trace_ggn=float(ggn.diagonal().sum()),
    )
