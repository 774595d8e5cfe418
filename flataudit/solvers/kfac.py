"""Kronecker-factored curvature (KFAC): fast, for layers of any width, and only a rough guide.

For each Linear or Conv2d layer, on its own, G's block is replaced by the product of two averages,

    G_W ~ E[a a'] (x) E[d d'],   G_b = E[d d']      a: inputs, d: backpropagated columns of S
    Q_i = B_i (KFAC + D)^-1 B_i'                     by the eigenvectors of both factors

with B exact (Martens and Grosse 2015, arXiv 1503.05671; the factors are curvlinops', type-2
Fisher, for weights shared over positions 'expand', Eschenhagen et al. 2023, arXiv 2311.00636).
Dropping what couples layers, and inputs to deltas, makes the soft rank too large; by how much it
did so on the benchmark's cases stands in `flataudit.solvers.kfac_reference`; every result says it.

Needs curvlinops (`pip install 'flataudit[kfac]'`), which is imported here alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import Problem, evaluate
from flataudit.errors import InputError
from flataudit.solvers.base import FunctionalVariance, Penalty, Work
from flataudit.solvers.kfac_reference import REFERENCE

BATCH = 512  # samples whose activations are kept at a time


@dataclass(frozen=True, slots=True)
class Kfac:
    """The functional variance under KFAC in place of G."""

    name: str = "kfac"
    exact: bool = False

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        """Factors, their eigenvectors, one chunk of B and the Q_i."""
        factors = sum(p.shape[0] ** 2 + (p[0].numel() ** 2) for p in problem.params.values())
        k = problem.n_columns
        first = next(problem.chunks(4 * k * problem.n_params))
        rows = (first.stop - first.start) * k * problem.n_params
        return int(8 * (4 * factors + 4 * rows + 3 * problem.n_rows * k))

    def solve(self, problem: Problem, penalty: Penalty, work: Work) -> FunctionalVariance:
        """The functional variance; `work` has no say: nothing is random, and it is soon done.

        Raises:
            InputError: curvlinops is missing, parameters outside Linear and Conv2d layers, or a
                penalty that differs within one parameter tensor.
        """
        _scalar_penalties(penalty)
        blocks = _blocks(problem, _factors(problem), penalty)
        n, k = problem.n_samples, problem.n_columns
        q = torch.empty(n, k, k, dtype=torch.float64, device=problem.device)
        trace = 0.0
        mean = {
            name: torch.zeros((), dtype=torch.float64, device=problem.device) for name in blocks
        }
        for at in problem.chunks(4 * k * problem.n_params):
            rows = problem.rows(at)
            trace += float(rows.square().sum())
            q[at] = 0.0
            v = problem.factor.residual[at].reshape(-1)
            parts = rows.split([p.numel() for p in problem.params.values()], dim=2)
            for name, part in zip(problem.params, parts, strict=True):
                half = blocks[name].half(part.flatten(0, 1))
                mean[name] = mean[name] + v @ half
                half = half.view(at.stop - at.start, k, -1)
                q[at] += half @ half.mT
        complement = torch.eye(k, dtype=q.dtype, device=q.device) - q
        notes = [reference_note()]
        beyond = int((torch.linalg.eigvalsh(q)[:, -1] >= 1.0).sum())
        if beyond:
            # No step of leaving such a sample out exists; NaN tells the estimator so.
            complement = torch.full_like(complement, math.nan)
            notes.append(
                f"leverage of {beyond} of {n} samples is 1 or more under KFAC, where the exact one"
                " is below 1: there is no leave-one-out estimate"
            )
        energy = sum(float(part.square().sum()) for part in mean.values())
        return FunctionalVariance(q, complement, energy / n, trace, notes=tuple(notes))


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """One parameter tensor's block U (x) V diag(values) (U (x) V)' with its penalty.

    outer: U (out, out), inner: V (in, in), None for a bias; scale: (values + d)^-1/2, zero on the
    null space where d = 0.
    """

    outer: Tensor
    inner: Tensor | None
    scale: Tensor

    def half(self, rows: Tensor) -> Tensor:
        """Z with Z Z' = rows (block + d)^+ rows', for rows (m, out * in)."""
        if self.inner is None:
            return (rows @ self.outer) * self.scale
        shaped = rows.view(len(rows), len(self.outer), len(self.inner))
        turned: Tensor = (self.outer.T @ shaped @ self.inner) * self.scale
        return turned.flatten(1)


class _Whitened(nn.Module):
    """x -> S_i'f(x_i), whose sum of squares has 2n G as its Gauss-Newton matrix: any family."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.model
        self._x, self._root = problem.x, problem.factor.root

    def forward(self, batch: Mapping[str, slice]) -> Tensor:
        at = batch["at"]
        return torch.einsum("nkj,nk->nj", self._root[at], evaluate(self.model, self._x[at]))


def _factors(problem: Problem) -> dict[str, tuple[Tensor | None, Tensor]]:
    """(E[a a'] or None, E[d d']) by the parameter's name, of the mean loss."""
    library = _library()
    whitened = _Whitened(problem)
    n, k = problem.n_samples, problem.n_columns
    starts = range(0, n, BATCH)
    batches = [slice(start, min(start + BATCH, n)) for start in starts]
    zeros = problem.outputs.new_zeros(n, k)
    params = list(problem.params.values())
    try:
        operator = library.KFACLinearOperator(
            whitened,
            nn.MSELoss(reduction="sum"),
            params,
            [({"at": at}, zeros[at]) for at in batches],
            fisher_type=library.FisherType.TYPE2,
            kfac_approx=library.KFACType.EXPAND,
            check_deterministic=False,
            separate_weight_and_bias=True,
            num_data=n,
            num_per_example_loss_terms=1,
            batch_size_fn=lambda batch: batch["at"].stop - batch["at"].start,
        )
        positions = operator.compute_parameter_mapping(params, whitened)
    except NotImplementedError as error:
        raise InputError(
            "expected parameters in Linear and Conv2d layers alone for solver=kfac, got others as"
            " well; use solver=lanczos"
        ) from error
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    names = list(problem.params)
    found: dict[str, tuple[Tensor | None, Tensor]] = {}
    for layer, places in positions.items():
        # curvlinops sums both columns and samples, and the Hessian of a square is 2.
        deltas = state["gradient_covariances"][layer] / (2 * n)
        for kind, place in places.items():
            inner = state["input_covariances"][layer] if kind == "weight" else None
            found[names[place]] = (inner, deltas)
    return found


def _blocks(
    problem: Problem, factors: Mapping[str, tuple[Tensor | None, Tensor]], penalty: Penalty
) -> dict[str, _Block]:
    blocks = {}
    for name in problem.params:
        inner, outer = factors[name]
        outer_values, u = torch.linalg.eigh(outer.to(torch.float64))
        values, v = outer_values.clamp_min(0.0), None
        if inner is not None:
            inner_values, v = torch.linalg.eigh(inner.to(torch.float64))
            values = torch.outer(values, inner_values.clamp_min(0.0))
        d = float(penalty[name].reshape(-1)[0])
        floor = values.numel() * torch.finfo(values.dtype).eps * values.max() if d == 0 else 0.0
        total = values + d
        scale = torch.where(total > floor, total.rsqrt(), torch.zeros_like(total))
        blocks[name] = _Block(u, v, scale)
    return blocks


def _scalar_penalties(penalty: Penalty) -> None:
    for name, d in penalty.items():
        if bool((d != d.reshape(-1)[0]).any()):
            raise InputError(
                f"expected one penalty per parameter tensor for solver=kfac, got several within"
                f" {name}, as a training record of Adam gives; use solver=lanczos or a number"
            )


def _library() -> Any:
    """curvlinops, or InputError where the extra is not installed."""
    try:
        with warnings.catch_warnings():
            # A dependency of curvlinops compiles a function the deprecated way on import.
            warnings.simplefilter("ignore", DeprecationWarning)
            import curvlinops
    except ImportError as error:
        raise InputError(
            "expected curvlinops for solver=kfac, got none installed;"
            " pip install 'flataudit[kfac]', or use solver=lanczos"
        ) from error
    return curvlinops


def reference_note() -> str:
    """How far off the soft rank was where the exact one is known.

    >>> reference_note().startswith("KFAC's soft rank was ")
    True
    """
    ratios = [case.kfac / case.exact for case in REFERENCE]
    return (
        f"KFAC's soft rank was {min(ratios):.2g} to {max(ratios):.2g} times the exact one on"
        f" {len(ratios)} reference cases (benchmarks/peers.json)"
    )
