"""Posterior samples: the functional variance sample by sample, without any matrix.

With eps (N,) and eps_0 (P,) standard normal, Pi and K from `flataudit.solvers.operator`,

    e = (Pi (I + K) Pi)^+ (eps - B1 D1^-1/2 eps_0)      covariance I - Q
    g = eps - e                                          covariance Q = B (G + D)^+ B'

and g, which is S'J zeta for a posterior sample zeta ~ N(0, (G + D)^-1/n), is independent of e.
Hence, over s samples, mean g_i g_i' is unbiased for Q_i, and, as the inverse of a Wishart matrix
has the mean s/(s - K' - 1) (I - Q_i)^-1, so is

    (s - K' - 1)/s  mean(g_i g_i') mean(e_i e_i')^-1   for   Q_i (I - Q_i)^-1        s > K' + 1

which leave-one-out needs. The systems are solved in output space, where D is the preconditioner:
the spectrum is 1 + K's (`flataudit.solvers.conjugate`).

The steps are unbiased, but the loss is convex in them: where leverages are near 1 a few samples
carry most of the error and of the bias of the leave-one-out gap. Those are refined: with the K'
unit vectors E_i of one sample,

    I - Q_i = E_i'(Pi (I + K) Pi)^+ E_i = E_i'x + x'r + r'(I + K)^-1 r,    r = E_i - (I + K) x

is known up to r'r, exactly for all that matters. More samples or refined ones: whichever needs
fewer systems (`flataudit.solvers.refinement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError
from flataudit.solvers.base import FunctionalVariance, Penalty, Work
from flataudit.solvers.conjugate import block_cg
from flataudit.solvers.free import free_parameters
from flataudit.solvers.operator import CurvatureOperator, operator_bytes
from flataudit.solvers.refinement import Uncertainty, cheapest, largest_ratio, uncertainty
from flataudit.solvers.resume import Resume, State

GROUPS = 32  # of samples, each left out once by the jackknife


@dataclass(frozen=True, slots=True)
class Sampling:
    """Soft rank, TIC and leave-one-out from posterior samples.

    tolerance: relative standard error of soft rank, TIC and the leave-one-out gap, and the latter's
    bias before it is taken off, at which sampling ends; block: systems solved together; most:
    systems at most; residual: |r| of each posterior sample relative to |g|, and the relative error
    of a refined I - Q_i.
    """

    name: str = "sampling"
    exact: bool = False
    tolerance: float = 0.01
    block: int = 64
    most: int = 2048
    residual: float = 1e-3
    iterations: int = 1000
    dtype: torch.dtype | None = None

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        # Sums of each group and in all; each replicate's own Q_i and complement.
        moments = 8 * 2 * (2 * GROUPS + 2) * problem.n_rows * problem.n_columns
        width = max(self.block, problem.n_columns) + 1
        vectors = 8 * 9 * problem.n_rows * width
        noise = 8 * self.block * (problem.n_params - free_parameters(problem, penalty))
        return moments + vectors + noise + operator_bytes(problem, penalty, width)

    def solve(self, problem: Problem, penalty: Penalty, work: Work) -> FunctionalVariance:
        operator = CurvatureOperator(problem, penalty, dtype=self.dtype)
        return _Run(self, problem, operator, penalty, work).result()


class _Run:
    """One solve, resumable between two products with the operator."""

    def __init__(
        self,
        settings: Sampling,
        problem: Problem,
        operator: CurvatureOperator,
        penalty: Penalty,
        work: Work,
    ) -> None:
        self.settings, self.problem, self.operator, self.work = settings, problem, operator, work
        n, k, device = problem.n_samples, problem.n_columns, problem.device
        self.v = problem.factor.residual
        # Sums over the samples of each group: g g' and e e' (groups, n, K', K').
        self.gg = torch.zeros(GROUPS, n, k, k, dtype=torch.float64, device=device)
        self.ee = torch.zeros_like(self.gg)
        self.counts = torch.zeros(GROUPS, dtype=torch.float64, device=device)
        self.ranks = torch.zeros(0, dtype=torch.float64, device=device)  # |g|^2 by sample
        self.tics = torch.zeros_like(self.ranks)
        self.order = torch.zeros(0, dtype=torch.int64, device=device)  # to refine, or none
        self.refined = self.order.clone()  # samples (h,), the first of that order
        self.known = torch.zeros(0, k, k, dtype=torch.float64, device=device)  # their I - Q_i
        self.energy, self.trace_ggn = 0.0, 0.0
        self.left = 0.0  # the largest relative error that a system's residual leaves
        self.pilot, self.planned, self.drawn = True, 0, 0  # samples to refine; systems sampled
        self.to_come = 2 * settings.block  # systems after this block, as far as is known
        self.resume = Resume(problem, penalty, work, settings)

    def result(self) -> FunctionalVariance:
        """Runs to the end, or from where a checkpoint stands."""
        saved = self._load()
        with self.resume:
            if saved is not None and "cg.chosen" in saved:
                self._refine(saved["cg.chosen"].to(self.problem.device), saved)
                saved = None
            while True:
                wanted, chosen = self._next()
                if len(chosen):
                    self._refine(chosen, None)
                elif wanted > len(self.ranks):
                    self._sample(saved)
                    saved = None
                else:
                    break
                self.resume.offer(self._state)
        self.resume.offer(self._state, last=True)
        return self._variance()

    # --- what to do next --------------------------------------------------------------------------

    def _next(self) -> tuple[int, Tensor]:
        """Posterior samples wanted in all, and the samples of the data to refine now."""
        settings, have = self.settings, len(self.ranks)
        k = self.v.shape[1]
        least = math.ceil(max(settings.block, 8 * (k + 2)) / settings.block) * settings.block
        left = settings.most - self.drawn - k * len(self.refined)
        if have >= least and self.pilot:
            self._end_pilot(left - least)
            have = len(self.ranks)
        wanted, refine = max(have, least), self.planned - len(self.refined)
        if have >= least and refine <= 0:
            worst = max(self._trace_errors().values())
            wanted = max(math.ceil(have * (worst / settings.tolerance) ** 2), have)
            found = self._uncertainty()
            if found is not None:
                among = range(len(self.refined), len(self.order) + 1)
                self.planned, samples = cheapest(found, settings.tolerance, have, k, among)
                refine = self.planned - len(self.refined)
                wanted = max(wanted, samples)
        refine = max(0, min(refine, left // k))
        now = min(refine, max(1, settings.block // k))
        wanted = max(min(wanted, have + left - k * refine), have)
        self.to_come = max((refine - now) * k + wanted - have - (0 if now else settings.block), 0)
        start = len(self.refined)
        return wanted, self.order[start : start + now]

    def _end_pilot(self, left: int) -> None:
        """Which samples to refine; if any, what chose them is not used again.

        left: systems that may go to refinement.

        A sample that looks worse than it is would be refined and one that looks better would not,
        so that the gap would come out too small (by 0.6 +- 0.3 % over twelve runs, decision 7).
        """
        self.pilot = False
        found = self._uncertainty()
        k = self.v.shape[1]
        if found is None or left < k:
            return
        self.planned, _ = cheapest(found, self.settings.tolerance, len(self.ranks), k)
        self.planned = min(self.planned, left // k)
        if not self.planned:
            return
        self.order = found.order
        for name in ("gg", "ee", "counts"):
            setattr(self, name, torch.zeros_like(getattr(self, name)))
        self.ranks, self.tics = self.ranks[:0], self.tics[:0]

    def _trace_errors(self) -> dict[str, float]:
        """Relative standard errors of the two traces, over posterior samples."""
        found = {}
        for name, sums in (("soft rank", self.ranks), ("TIC", self.tics)):
            mean = float(sums.mean())
            sd = float(sums.std(correction=1)) if mean > 0 else 0.0
            found[name] = sd / len(sums) ** 0.5 / mean if mean > 0 else 0.0
        return found

    def _uncertainty(self) -> Uncertainty | None:
        """Of the leave-one-out gap; None where it is not finite."""
        parts = torch.stack([self._left_out(*self._moments(group)) for group in range(GROUPS)])
        order = self.order if len(self.order) else None
        return uncertainty(self._left_out(*self._moments(None)), parts, order)

    def _left_out(self, q: Tensor, complement: Tensor) -> Tensor:
        """l(f_i^(-i)) - l(f_i) with S_i' times the step b_i = Q_i (I - Q_i)^-1 v_i, (n,)."""
        family, f, y = self.problem.family, self.problem.outputs, self.problem.y
        solved, info = torch.linalg.solve_ex(complement, self.v[:, :, None])
        b = (q @ solved)[:, :, 0]
        psi = family.nll(f + family.shift(f, y, b), y) - family.nll(f, y)
        return torch.where(info == 0, psi, math.nan)

    # --- the two kinds of systems -----------------------------------------------------------------

    def _sample(self, saved: State | None) -> None:
        """Draws a block of posterior samples and adds them to the moments."""
        settings, problem, operator = self.settings, self.problem, self.operator
        index, first = self.drawn, not self.drawn
        generator = torch.Generator().manual_seed((self.work.seed * 1_000_003 + index) % 2**63)
        m, device = settings.block, problem.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

        eps = normal(problem.n_rows, m)
        flat = self.v.reshape(-1, 1)
        if saved is not None and "cg.right" in saved:
            right = saved["cg.right"].to(device)
        else:
            right = operator.project(eps)
            if operator.tied:
                if first:
                    self.trace_ggn = float(operator.pulled_squares(eps).mean())
                noise = {name: normal(m, *problem.params[name].shape) for name in operator.tied}
                right = right - operator.half(noise)
                del noise
            if first:  # the mean gradient's own system
                right = torch.cat([right, operator.project(flat)], dim=1)

        def relative(x: Tensor, residuals: Tensor) -> float:
            """The longest residual, whose length bounds the error, over the shortest g."""
            shortest = float((eps - x[:, :m]).norm(dim=0).min())
            return float(residuals.norm(dim=0).max()) / max(shortest, 1e-12)

        x, residuals = self._solve(right, relative, {"right": right}, saved)
        self._check(relative(x, residuals))
        if first:
            self.energy = float(flat.square().sum() - (right[:, -1] * x[:, -1]).sum())
            x = x[:, :-1]
        self._add(eps - x, x)

    def _refine(self, chosen: Tensor, saved: State | None) -> None:
        """I - Q_i of these samples, from their K' unit vectors each."""
        problem, operator = self.problem, self.operator
        h, k = len(chosen), self.v.shape[1]
        every = torch.arange(h, device=problem.device)
        units = torch.zeros(problem.n_samples, k, h, k, dtype=torch.float64, device=problem.device)
        units[chosen, :, every] = torch.eye(k, dtype=torch.float64, device=problem.device)
        right = operator.project(units.view(problem.n_rows, h * k))
        del units

        def own(x: Tensor) -> Tensor:
            """E_i'x by sample, (h, K', K')."""
            return x.view(problem.n_samples, k, h, k)[chosen, :, every]

        def products(a: Tensor, b: Tensor) -> Tensor:
            """a'b by sample, (h, K', K')."""
            return torch.einsum("ahk,ahl->hkl", a.view(-1, h, k), b.view(-1, h, k))

        def relative(x: Tensor, residuals: Tensor) -> float:
            """The largest eigenvalue of r'r relative to I - Q_i as it stands."""
            return largest_ratio(products(residuals, residuals), _symmetric(own(x)))

        x, residuals = self._solve(right, relative, {"chosen": chosen}, saved)
        x = operator.project(x)
        known = _symmetric(own(x) + products(x, residuals))
        self._check(largest_ratio(products(residuals, residuals), known))
        self.refined = torch.cat([self.refined, chosen])
        self.known = torch.cat([self.known, known])

    def _solve(
        self,
        right: Tensor,
        relative: Callable[[Tensor, Tensor], float],
        label: State,
        saved: State | None,
    ) -> tuple[Tensor, Tensor]:
        """x with (I + Pi K Pi) x = right, and its true residuals."""
        first = relative(torch.zeros_like(right), right)
        state = None
        if saved is not None and "cg.x" in saved:
            state = {name: saved[f"cg.{name}"] for name in ("x", "q", "p", "c")}

        def after_step(state: State, step: int) -> None:
            kept = {f"cg.{name}": t for name, t in (state | label).items()}
            self.resume.offer(partial(_joined, self._state, kept))
            self._tick(relative(state["x"], state["c"]), first, step, right.shape[1])

        x = block_cg(
            self.operator,
            right,
            lambda x, c: relative(x, c) <= self.settings.residual,
            iterations=self.settings.iterations,
            state=state,
            after_step=after_step,
        )
        return x, right - x - self.operator(x)

    def _check(self, reached: float) -> None:
        """Whether the true residuals, from which the recurrence's drift, are small."""
        if not reached <= 10.0 * self.settings.residual:
            raise NumericalError(
                "expected conjugate gradients to reach a relative residual of"
                f" {self.settings.residual:.1e}, got {reached:.1e} after"
                f" {self.settings.iterations} iterations or fewer; likely causes: a penalty far"
                " below the curvature, or weights near overflow; raise the penalty or use"
                " solver=lanczos"
            )
        self.left = max(self.left, reached)

    # --- sums and results -------------------------------------------------------------------------

    def _add(self, g: Tensor, e: Tensor) -> None:
        n, k = self.v.shape
        m = g.shape[1]
        self.drawn += m
        for group in range(GROUPS):
            for total, values in ((self.gg, g), (self.ee, e)):
                block = values.view(n, k, m)[:, :, group::GROUPS]
                total[group] += block @ block.mT
            self.counts[group] += len(range(group, m, GROUPS))
        self.ranks = torch.cat([self.ranks, g.square().sum(dim=0)])
        along = (g.view(n, k, m) * self.v[:, :, None]).sum(dim=1).square().sum(dim=0)
        self.tics = torch.cat([self.tics, along])

    def _moments(self, without: int | None) -> tuple[Tensor, Tensor]:
        """Q_i, and the complement whose inverse is unbiased, from all groups but one."""
        count = float(self.counts.sum())
        gg, ee = self.gg.sum(dim=0), self.ee.sum(dim=0)
        if without is not None:
            count -= float(self.counts[without])
            gg, ee = gg - self.gg[without], ee - self.ee[without]
        k = self.v.shape[1]
        q, complement = gg / count, ee / (count - k - 1)
        eye = torch.eye(k, dtype=q.dtype, device=q.device)
        q[self.refined], complement[self.refined] = eye - self.known, self.known
        return q, complement

    def _variance(self) -> FunctionalVariance:
        notes = []
        errors, found = self._trace_errors(), self._uncertainty()
        if found is not None:
            errors["leave-one-out gap"] = found.now  # its bias included
        for name, share in errors.items():
            if share > 1.001 * self.settings.tolerance:
                notes.append(
                    f"the {name} has a standard error of {share:.2%}, where"
                    f" {self.settings.tolerance:.2%} was asked for"
                )
        if self.operator.reason:
            notes.append(f"derivatives {self.operator.reason}")
        return FunctionalVariance(
            *self._moments(None),
            mean_gradient=self.energy / self.problem.n_samples,
            trace_ggn=self.trace_ggn + self.operator.free.trace,
            sampled=True,
            replicates=tuple(
                FunctionalVariance(
                    *self._moments(group), mean_gradient=0.0, trace_ggn=0.0, sampled=True
                )
                for group in range(GROUPS)
            ),
            truncation=2.0 * self.left,
            notes=tuple(notes),
        )

    def _tick(self, residual: float, first: float, step: int, width: int) -> None:
        """Products done, and expected if this block goes on as it began and the others alike."""
        steps = 2.0 * step  # until the residuals are known to be finite, and fall
        if math.isfinite(first) and residual < first:
            target = max(first / self.settings.residual, 1.0)
            steps = step * math.log(target) / math.log(first / max(residual, 1e-300))
        steps = min(steps, self.settings.iterations)
        done = self.operator.applications
        expected = done + width * (max(steps - step, 0.0) + 1) + self.to_come * (steps + 2)
        self.work.tick(done, int(expected))

    # --- checkpoints ------------------------------------------------------------------------------

    TENSORS = ("gg", "ee", "counts", "ranks", "tics", "order", "refined", "known")

    def _state(self) -> State:
        numbers = [self.energy, self.trace_ggn, self.left, float(self.operator.applications)]
        return {name: getattr(self, name) for name in self.TENSORS} | {
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "counters": torch.tensor([int(self.pilot), self.planned, self.drawn]),
        }

    def _load(self) -> State | None:
        saved = self.resume.load()
        if saved is None:
            return None
        device = self.problem.device
        for name in self.TENSORS:
            setattr(self, name, saved[name].to(device))
        self.energy, self.trace_ggn, self.left, done = saved["numbers"].tolist()
        self.operator.applications = int(done)
        pilot, self.planned, self.drawn = saved["counters"].tolist()
        self.pilot = bool(pilot)
        return saved


def _symmetric(blocks: Tensor) -> Tensor:
    return (blocks + blocks.mT) / 2


def _joined(one: Callable[[], State], other: State) -> State:
    return one() | other
