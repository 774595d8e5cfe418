"""Posterior samples: the functional variance sample by sample, without any matrix.

With eps (N,) and eps_0 (P,) standard normal, Pi and K from `flataudit.solvers.operator`,

    e = (Pi (I + K) Pi)^+ (eps - B1 D1^-1/2 eps_0)      covariance I - Q
    g = eps - e                                          covariance Q = B (G + D)^+ B'

and g, which is S'J zeta for a posterior sample zeta ~ N(0, (G + D)^-1/n), is independent of e.
Hence, over s samples, mean g_i g_i' is unbiased for Q_i, and, as the inverse of a Wishart matrix
has the mean s/(s - K' - 1) (I - Q_i)^-1, so is

    (s - K' - 1)/s  mean(g_i g_i') mean(e_i e_i')^-1   for   Q_i (I - Q_i)^-1        s > K' + 1

which leave-one-out needs. The systems are solved by block conjugate gradients in output space,
where D is the preconditioner: the spectrum is 1 + K's, and the columns of a block share one Krylov
space, so that large eigenvalues cost no iterations of their own (Dubrulle 2001, BCGrQ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.errors import NumericalError
from flataudit.solvers.base import FunctionalVariance, Penalty, Work
from flataudit.solvers.operator import CurvatureOperator, operator_bytes
from flataudit.solvers.resume import Resume, State

GROUPS = 8  # of samples, each left out once by the jackknife


@dataclass(frozen=True, slots=True)
class Sampling:
    """Soft rank, TIC and leave-one-out from posterior samples.

    tolerance: relative standard error of soft rank, TIC and leave-one-out (to first order in its
    steps) at which sampling ends; block: samples solved together; most: samples at most; residual:
    |r| of each system relative to |g|.
    """

    name: str = "sampling"
    exact: bool = False
    tolerance: float = 0.02
    block: int = 64
    most: int = 1024
    residual: float = 1e-3
    iterations: int = 1000
    dtype: torch.dtype | None = None

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        moments = 8 * 2 * (GROUPS + 2) * problem.n_rows * problem.n_columns
        # Replicates hold their own Q_i and complement.
        moments += 8 * 2 * GROUPS * problem.n_rows * problem.n_columns
        vectors = 8 * 9 * problem.n_rows * (self.block + 1)
        return moments + vectors + operator_bytes(problem, penalty, self.block + 1)

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
        self.energy, self.trace_ggn = 0.0, 0.0
        self.left = 0.0  # largest |r|/|g| of any system
        self.resume = Resume(problem, penalty, work, settings)

    def result(self) -> FunctionalVariance:
        """Runs to the end, or from where a checkpoint stands."""
        saved = self._load()
        with self.resume:
            while self._missing() > 0:
                self._sample(saved)
                saved = None
                self.resume.offer(self._state)
        self.resume.offer(self._state, last=True)
        return self._variance()

    def _sample(self, saved: State | None) -> None:
        """Draws a block of samples and adds them to the moments."""
        settings, problem, operator = self.settings, self.problem, self.operator
        index, first = len(self.ranks), not len(self.ranks)
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
                    pulled = operator.pull(eps)
                    self.trace_ggn = sum(float(t.square().sum()) for t in pulled.values()) / m
                    del pulled
                noise = {name: normal(m, *problem.params[name].shape) for name in operator.tied}
                right = right - operator.half(noise)
                del noise
            if first:  # the mean gradient's own system
                right = torch.cat([right, operator.project(flat)], dim=1)
        solution = self._solve(right, eps, saved)
        if first:
            self.energy = float(flat.square().sum() - (right[:, -1] * solution[:, -1]).sum())
            solution = solution[:, :-1]
        self._add(eps - solution, solution)

    def _add(self, g: Tensor, e: Tensor) -> None:
        n, k = self.v.shape
        m = g.shape[1]
        for group in range(GROUPS):
            for total, values in ((self.gg, g), (self.ee, e)):
                block = values.view(n, k, m)[:, :, group::GROUPS]
                total[group] += block @ block.mT
            self.counts[group] += len(range(group, m, GROUPS))
        self.ranks = torch.cat([self.ranks, g.square().sum(dim=0)])
        along = (g.view(n, k, m) * self.v[:, :, None]).sum(dim=1).square().sum(dim=0)
        self.tics = torch.cat([self.tics, along])

    def _solve(self, right: Tensor, eps: Tensor, saved: State | None) -> Tensor:
        """x with (I + Pi K Pi) x = right, by block conjugate gradients; residuals are checked.

        X, Q, P: solutions, orthonormal residual directions, search directions; the residuals are
        Q C, so that their norms are those of C's columns.
        """
        if saved is not None and "cg.x" in saved:
            x, q, p, c = (saved[f"cg.{name}"].to(right.device) for name in "xqpc")
        else:
            x = torch.zeros_like(right)
            q, c = torch.linalg.qr(right)
            p = q
        m = eps.shape[1]
        start = float(right.norm(dim=0).max())
        for step in range(self.settings.iterations):
            if float(c.norm(dim=0).max()) <= self._allowed(eps - x[:, :m]):
                break
            z = p + self.operator(p)
            gram = p.T @ z
            alpha = torch.linalg.solve((gram + gram.T) / 2, torch.eye(len(gram)).to(gram))
            x = x + p @ (alpha @ c)
            q, s = torch.linalg.qr(q - z @ alpha)
            c = s @ c
            p = q + p @ s.T
            state = {"cg.right": right, "cg.x": x, "cg.q": q, "cg.p": p, "cg.c": c}
            self.resume.offer(partial(_joined, self._state, state))
            self._tick(float(c.norm(dim=0).max()), self._allowed(eps - x[:, :m]), start, step + 1)
        # The recurrence's residual can drift from the true one: the latter counts.
        true = (right - x - self.operator(x)).norm(dim=0)
        allowed = self._allowed(eps - x[:, :m])
        reached = float(true.max())
        if not reached <= 10.0 * allowed:
            raise NumericalError(
                f"expected conjugate gradients to reach a residual of {allowed:.1e}, got"
                f" {reached:.1e} after {self.settings.iterations} iterations or fewer; likely"
                " causes: a penalty far below the curvature, or weights near overflow; raise the"
                " penalty or use solver=lanczos"
            )
        self.left = max(self.left, reached / allowed * self.settings.residual)
        return x

    def _allowed(self, g: Tensor) -> float:
        """The residual's norm at which the samples are known well enough: |r| bounds the error."""
        return self.settings.residual * max(float(g.norm(dim=0).min()), 1e-12)

    def _missing(self) -> int:
        """How many more samples the standard errors ask for."""
        settings, have = self.settings, len(self.ranks)
        least = max(settings.block, 8 * (self.v.shape[1] + 2))
        if have < least:
            return least - have
        worst = max(self._errors().values())
        return math.ceil(min(have * (worst / settings.tolerance) ** 2, settings.most)) - have

    def _errors(self) -> dict[str, float]:
        """Relative standard errors of what is estimated."""
        found = {}
        for name, sums in (("soft rank", self.ranks), ("TIC", self.tics)):
            mean = float(sums.mean())
            sd = float(sums.std(correction=1)) if mean > 0 else 0.0
            found[name] = sd / len(sums) ** 0.5 / mean if mean > 0 else 0.0
        parts = torch.tensor([self._step(*self._moments(group)) for group in range(GROUPS)])
        mean = float(parts.mean())
        spread = math.sqrt((GROUPS - 1) * float(parts.var(correction=0)))
        found["LOO"] = spread / abs(mean) if math.isfinite(spread) and mean != 0 else 0.0
        return found

    def _step(self, q: Tensor, complement: Tensor) -> float:
        """sum_i r_i'(f_i^(-i) - f_i) = sum_i v_i'Q_i (I - Q_i)^-1 v_i, infinite where undefined."""
        solved, info = torch.linalg.solve_ex(complement, self.v[:, :, None])
        if bool((info != 0).any()):
            return math.inf
        return float((self.v * (q @ solved)[:, :, 0]).sum())

    def _variance(self) -> FunctionalVariance:
        whole = self._moments(None)
        notes = []
        for name, share in self._errors().items():
            if share > 1.001 * self.settings.tolerance:
                notes.append(
                    f"the {name} has a standard error of {share:.1%}, where"
                    f" {self.settings.tolerance:.1%} was asked for"
                )
        if self.operator.reason:
            notes.append(f"derivatives {self.operator.reason}")
        return FunctionalVariance(
            *whole,
            mean_gradient=self.energy / self.problem.n_samples,
            trace_ggn=self.trace_ggn + self.operator.trace_free,
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

    def _moments(self, without: int | None) -> tuple[Tensor, Tensor]:
        """Q_i, and the complement whose inverse is unbiased, from all groups but one."""
        count = float(self.counts.sum())
        gg, ee = self.gg.sum(dim=0), self.ee.sum(dim=0)
        if without is not None:
            count -= float(self.counts[without])
            gg, ee = gg - self.gg[without], ee - self.ee[without]
        return gg / count, ee / (count - self.v.shape[1] - 1)

    def _tick(self, residual: float, allowed: float, start: float, step: int) -> None:
        """Products done, and expected if this block goes on as it began and the others alike."""
        width = self.settings.block
        fallen = math.log(max(start / residual, 1.0 + 1e-9))
        steps = min(step * math.log(max(start / allowed, 1.0)) / fallen, self.settings.iterations)
        done = self.operator.applications
        blocks = math.ceil(max(self._missing() - width, 0) / width)
        expected = done + width * (max(steps - step, 0.0) + 1 + blocks * (steps + 2))
        self.work.tick(done, int(expected))

    def _state(self) -> State:
        return {
            "gg": self.gg,
            "ee": self.ee,
            "counts": self.counts,
            "ranks": self.ranks,
            "tics": self.tics,
            "numbers": torch.tensor(
                [self.energy, self.trace_ggn, self.left, float(self.operator.applications)],
                dtype=torch.float64,
            ),
        }

    def _load(self) -> State | None:
        saved = self.resume.load()
        if saved is None:
            return None
        device = self.problem.device
        for name in ("gg", "ee", "counts", "ranks", "tics"):
            setattr(self, name, saved[name].to(device))
        self.energy, self.trace_ggn, self.left, done = saved["numbers"].tolist()
        self.operator.applications = int(done)
        return saved


def _joined(one: object, other: State) -> State:
    return one() | other  # type: ignore[operator, no-any-return]
