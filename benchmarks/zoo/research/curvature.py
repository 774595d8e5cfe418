"""Estimates at any variance Lambda and any residuals, from one Jacobian per model: pure functions.

The audit's solvers take Lambda and residual of the outputs themselves. Here both are free, as
Lambda of a recalibrated model or residuals averaged over training are no model's at its outputs.
Shapes: n samples, K outputs, P parameters; gaps in nats per example; everything float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.families import Factor, Family
from flataudit.solvers import FunctionalVariance
from flataudit.solvers.base import Penalty

STEPS = 100  # of the integration in `undo_own_training`


def scaled_jacobian(problem: Problem, penalty: Penalty) -> Tensor:
    """J_i D^-1/2 / sqrt(n), (n, K, P): with it G + D becomes I + sum_i J_i'Lambda_i J_i.

    Raises:
        ValueError: a parameter without a penalty.
    """
    d = torch.cat([penalty[name].flatten() for name in problem.params])
    if not bool((d > 0).all()):
        raise ValueError("expected a penalty above 0 on every parameter, got some of 0")
    n, k = problem.n_samples, problem.n_outputs
    eye = torch.eye(k, dtype=torch.float64).expand(n, k, k)
    plain = problem.with_factor(Factor(eye, eye[:, 0]))
    rows = [plain.rows(at) * d.rsqrt() for at in plain.chunks(3 * k * problem.n_params)]
    return torch.cat(rows)


def categorical_variance(log_p: Tensor) -> Tensor:
    """Lambda = diag(p) - p p', (n, K, K)."""
    p = log_p.exp()
    return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]


def square_root(variance: Tensor) -> Tensor:
    """S with S S' = Lambda (n, K, K), of any positive semi-definite Lambda."""
    values, vectors = torch.linalg.eigh(variance)
    return vectors * values.clamp_min(0.0).sqrt()[:, None, :]


class RankAt:
    """Soft rank / n as a function of the root S (n, K, K') of Lambda = S S'.

    Where the parameters outnumber the rows, n K of them, only their Gram matrix is kept.
    """

    def __init__(self, jacobian: Tensor) -> None:
        self._n, self._k, p = jacobian.shape
        flat = jacobian.flatten(0, 1)
        self._gram = flat @ flat.T if p > len(flat) else None
        self._jacobian = jacobian

    def __call__(self, root: Tensor) -> float:
        n, k, columns = root.shape
        if self._gram is None:
            b = (root.mT @ self._jacobian).flatten(0, 1)
            inner = b.T @ b
        else:  # S'J J'S by blocks
            left = root.mT @ self._gram.view(n, k, n * k)
            right = left.reshape(n * columns, n, k).transpose(0, 1) @ root
            inner = right.transpose(0, 1).reshape(n * columns, n * columns)
        inner.diagonal().add_(1.0)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(inner))
        return (len(inner) - float(inverse.diagonal().sum())) / n


def functional_variance(jacobian: Tensor, root: Tensor) -> Tensor:
    """A_i = J_i (G + D)^-1 J_i' / n, (n, K, K), G with Lambda = S S'."""
    b = (root.mT @ jacobian).flatten(0, 1)
    inner = b.T @ b
    inner.diagonal().add_(1.0)
    lower = torch.linalg.cholesky(inner)
    half = torch.linalg.solve_triangular(lower, jacobian.flatten(0, 1).T, upper=False)
    blocks = half.T.reshape(*jacobian.shape[:2], -1)
    return blocks @ blocks.mT


def gap_of_energy(a: Tensor, residual: Tensor) -> float:
    """mean r_i'A_i r_i: TIC at these residuals (n, K)."""
    return float(torch.einsum("nk,nkl,nl->n", residual, a, residual).mean())


def left_out_outputs(a: Tensor, variance: Tensor, residual: Tensor, f: Tensor) -> Tensor:
    """f_i + A_i (I - Lambda_i A_i)^-1 r_i, (n, K): leave-one-out's outputs at these residuals."""
    eye = torch.eye(a.shape[1], dtype=a.dtype)
    solved = torch.linalg.solve(eye - variance @ a, residual[:, :, None])
    return f + (a @ solved)[:, :, 0]


def rise(family: Family, moved: Tensor, f: Tensor, y: Tensor) -> float:
    """mean [l(moved_i) - l(f_i)]."""
    return float((family.nll(moved, y) - family.nll(f, y)).mean())


def undo_own_training(
    variance: FunctionalVariance, family: Family, f: Tensor, y: Tensor, steps: int = STEPS
) -> Tensor:
    """The outputs (n, K) from which each sample's own gradient steps led to f: saturation inverted.

    Left out, sample i would have been met at f_i(1) of df_i/ds = A_i^(-i) r_i(f_i), f_i(0) = f_i,
    A_i^(-i) = A_i (I - Lambda_i A_i)^-1: its own training backwards, along which the residual that
    has vanished grows again. Leave-one-out is the first Euler step of length 1. Midpoint rule, in
    the whitened coordinates of `flataudit.estimates.loo`.
    """
    eye = torch.eye(variance.q.shape[1], dtype=variance.q.dtype)
    others = torch.linalg.solve(variance.complement, eye.expand_as(variance.q)) - eye

    def slope(b: Tensor) -> Tensor:
        r = family.residual(f + family.shift(f, y, b), y)
        return (others @ family.whiten(f, y, r)[:, :, None])[:, :, 0]

    b = torch.zeros_like(family.whiten(f, y, family.residual(f, y)))
    for _ in range(steps):
        b = b + slope(b + 0.5 / steps * slope(b)) / steps
    return f + family.shift(f, y, b)
