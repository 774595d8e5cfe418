"""Stochastic Lanczos quadrature in output space: soft rank and TIC without any matrix.

With f(x) = x/(1 + x), K from `flataudit.solvers.operator` and R = blockdiag(v_i'),

    soft rank = rank(B0) + tr f(K) = rank(B0) + E z'f(K) z          z random signs (N,)
    n TIC gap = |Q0'R'|^2 + tr(R f(K) R') = ... + E w'R f(K) R'w     w random signs (n,)

A first block starts from random signs z and from R'e_i for the samples i of the largest |v_i|,
whose part of TIC is thus known by quadrature, without a probe (`flataudit.solvers.known`). It also
finds the largest eigenvalues x_l and their vectors V (`flataudit.solvers.krylov`), which carry most
of either trace and are summed exactly: tr f(K) = sum f(x_l) + E z'P f(K) P z with P = I - V V'
(deflation as in Hutch++, Meyer et al. 2021). Fresh probes, in the complement of V where few steps
suffice, and for TIC zero on the samples that are known, follow until the stated error is below the
tolerance. The signs of the first block are not used again: V leans towards them, and their
remainder is too small (by 3 standard errors in two of 21 trials).

V is not quite invariant; the same probes estimate what that does to the traces, without a further
product (`flataudit.solvers.deflation`; left out, TIC was 1 to 2 % too large where hundreds of
directions were summed).

Two errors are kept apart: the probes' standard error (`flataudit.solvers.probes`) and the
quadrature's truncation. A quadrature is too large, by no more than a bound: half of it is taken
off, and half is the truncation. What those of the known samples are too large by is estimated
instead, by the same probes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flataudit.curvature.problem import Problem
from flataudit.solvers.base import CurvatureTraces, Penalty, Trace, Work
from flataudit.solvers.deflation import Deflation
from flataudit.solvers.known import KnownSamples
from flataudit.solvers.krylov import BlockLanczos
from flataudit.solvers.operator import CurvatureOperator, operator_bytes
from flataudit.solvers.probes import CONFIDENCE, ProbeSums
from flataudit.solvers.resume import Resume, State


@dataclass(frozen=True, slots=True)
class Lanczos:
    """Soft rank and TIC by probes and Krylov spaces.

    tolerance: relative, on 1.96 standard errors plus truncation, of both traces (1 % is then 4.3
    standard errors out); first: random starts of the first block, and the samples whose part of TIC
    is known from it; settle: its steps beyond what its quadrature takes, as Ritz vectors converge
    later; further: probes of each kind in a later block, at most; max_probes: of each kind;
    max_basis: columns of a Krylov basis; deflation: Ritz vectors with residuals below this times
    sqrt(1 + x) are summed exactly; dtype: of the network's arithmetic.
    """

    name: str = "lanczos"
    exact: bool = False
    tolerance: float = 0.0045
    first: int = 40
    settle: int = 2
    further: int = 32
    max_probes: int = 512
    max_basis: int = 1024
    deflation: float = 0.1
    dtype: torch.dtype | None = None

    def plan(self, problem: Problem, penalty: Penalty) -> int:
        block = max(2 * self.first + 1, 2 * self.further)
        basis = min(problem.n_rows, self.max_basis)
        # The basis with its larger copy while it grows, and the Ritz vectors kept.
        vectors = 8 * problem.n_rows * (3 * basis + 7 * block) + 8 * 6 * basis**2
        return vectors + operator_bytes(problem, penalty, block)

    def solve(self, problem: Problem, penalty: Penalty, work: Work) -> CurvatureTraces:
        operator = CurvatureOperator(problem, penalty, dtype=self.dtype)
        return _Run(self, problem, operator, penalty, work).result()


class _Run:
    """One solve, resumable between two products with the operator."""

    def __init__(
        self,
        settings: Lanczos,
        problem: Problem,
        operator: CurvatureOperator,
        penalty: Penalty,
        work: Work,
    ) -> None:
        self.settings, self.problem, self.operator, self.work = settings, problem, operator, work
        n, n_rows, device = problem.n_samples, problem.n_rows, problem.device
        self.v = problem.factor.residual
        self.soft, self.tic = ProbeSums(n_rows, n, device), ProbeSums(n, n, device)
        empty = torch.zeros(0, dtype=torch.float64, device=device)
        self.nodes, self.weights = empty.clone(), empty.clone()
        self.energy, self.trace_ggn = empty.new_zeros(()), empty.new_zeros(())
        self.known = KnownSamples(self.v, settings.first)
        self._deflate(Deflation.none(empty.new_zeros(n_rows)))
        self.round = self.settled = 0
        self.notes: list[str] = []
        self.resume = Resume(problem, penalty, work, settings)

    def result(self) -> CurvatureTraces:
        """Runs to the end, or from where a checkpoint stands."""
        saved = self._load()
        with self.resume:
            if self.round == 0:
                self._first(saved)
                saved = None
            while not self._done():
                self._further(saved)
                saved = None
        self.resume.offer(self._state, last=True)
        return self._traces()

    # --- rounds -------------------------------------------------------------------------------

    def _first(self, saved: State | None) -> None:
        """The shared block; its converged Ritz vectors are what later rounds deflate."""
        m = self.settings.first
        signs, _, _ = self._starts(m, 0)
        start = torch.cat([signs, self._lifted(self.known.units), self.v.reshape(-1, 1)], dim=1)
        if saved is None and self.operator.tied:
            self.trace_ggn = self.operator.pulled_squares(signs).mean()
        lanczos = self._space(start, saved)
        known = slice(m, m + len(self.known))
        self._grow(lanczos, slice(0, m), known, settle=self.settings.settle)
        self.settled = 0
        self.known.take(lanczos.quadratures()[0][known], lanczos.residuals()[:, known])
        ritz = lanczos.ritz()
        self.energy = ((ritz.coefficients[:, -1]).square() * _f(ritz.values)).sum()
        self._deflate(Deflation.of(lanczos, ritz, self.settings.deflation))
        self.round = 1
        self.resume.offer(self._state)

    def _deflate(self, deflation: Deflation) -> None:
        """Takes V, and per sample what it adds to soft rank (n,) and TIC (n,)."""
        self.deflated = deflation
        f = _f(deflation.values)
        rows = deflation.vectors.square() @ f
        self.exact_soft = rows.view(self.problem.n_samples, -1).sum(dim=1)
        self.exact_soft += self.operator.free.leverage
        # The samples that are known have all of theirs already.
        self.others = self.known.without(self._down(deflation.vectors))
        self.exact_tic = self.operator.free.tic + self.known.tic + self.others.square() @ f

    def _further(self, saved: State | None) -> None:
        """Another block of probes in the complement of V."""
        wanted = [self._missing(sums) for sums in (self.soft, self.tic)]
        a, b = (min(self.settings.further, w) for w in wanted)
        signs, lifted, signs_n = self._starts(a, b)
        lanczos = self._space(torch.cat([signs, lifted], dim=1), saved)
        self._grow(lanczos, slice(0, a), slice(a, a + b))
        self._collect(lanczos, signs, signs_n)
        self.round += 1
        self.resume.offer(self._state)

    def _starts(self, a: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """Signs z (N, a), R'w (N, b) and w (n, b) of this round, the same on every machine.

        w is zero on the samples that are known already.
        """
        generator = torch.Generator().manual_seed((self.work.seed * 1_000_003 + self.round) % 2**63)
        n, k = self.problem.n_samples, self.problem.n_columns
        device = self.problem.device
        z = (2.0 * torch.randint(0, 2, (n * k, a), generator=generator) - 1.0).double().to(device)
        w = (2.0 * torch.randint(0, 2, (n, b), generator=generator) - 1.0).double().to(device)
        w = self.known.without(w)
        return z, self._lifted(w), w

    def _space(self, start: Tensor, saved: State | None) -> BlockLanczos:
        against = self.deflated.vectors if len(self.deflated.values) else None
        lanczos = BlockLanczos(
            self.operator,
            self.operator.project(start),
            against=against,
            capacity=self.settings.max_basis,
        )
        if saved is not None:
            krylov = {k[7:]: t for k, t in saved.items() if k.startswith("krylov.")}
            if krylov:
                lanczos.restore(krylov)
        return lanczos

    def _grow(self, lanczos: BlockLanczos, soft: slice, tic: slice, *, settle: int = 0) -> None:
        """Until the truncation is a tenth of the tolerance, `settle` steps on, or no more fits."""
        while not lanczos.exhausted:
            if self.settled or (lanczos.steps and self._converged(lanczos, soft, tic)):
                if self.settled == settle or lanczos.full:
                    return
                self.settled += 1
            elif lanczos.full:
                if self.round:  # no probe of the first block counts
                    self._note(
                        f"the Krylov space reached {lanczos.size} columns before its truncation"
                        " was below tolerance"
                    )
                return
            lanczos.extend()
            krylov = {f"krylov.{k}": t for k, t in lanczos.state().items()}
            self.resume.offer(partial(_joined, self._state(), krylov))
            self._tick()

    def _converged(self, lanczos: BlockLanczos, soft: slice, tic: slice) -> bool:
        values, bounds = lanczos.quadratures()
        share = 0.1 * self.settings.tolerance
        return all(
            self._truncated(values[at], bounds[at], exact) <= share
            for at, exact in ((soft, self.exact_soft), (tic, self.exact_tic))
        )

    @staticmethod
    def _truncated(values: Tensor, bounds: Tensor, exact: Tensor) -> float:
        """The mean bound of these columns relative to the trace as known so far."""
        if not len(values):
            return 0.0
        total = float(exact.sum()) + float((values - bounds).mean())
        return float(bounds.mean()) / total if total > 0 else math.inf

    def _collect(self, lanczos: BlockLanczos, signs: Tensor, signs_n: Tensor) -> None:
        """Adds this round's probes, soft rank's first, to the sums."""
        a, b = signs.shape[1], signs_n.shape[1]
        ritz = lanczos.ritz()
        weights = ritz.coefficients.square()
        values = (weights * _f(ritz.values)[:, None]).sum(dim=0)
        _, bounds = lanczos.quadratures()
        images = lanczos.basis @ (ritz.vectors @ (_f(ritz.values)[:, None] * ritz.coefficients))
        left = lanczos.begun - images  # (I + P K P)^-1 of what each probe leaves in the complement
        coupling = self.deflated.beyond(left)
        if a:
            self.deflated.probe(signs, left[:, :a])
            self.known.probe(self.deflated, signs, left[:, :a])
            self.soft.add(values[:a], bounds[:a], signs * images[:, :a], coupling[:a])
            self.nodes = torch.cat([self.nodes, ritz.values])
            self.weights = torch.cat([self.weights, weights[:, :a].sum(dim=1)])
        if b:
            across = signs_n * self._down(2.0 * self.deflated.across(left[:, a:]))
            inside = signs_n * self._down(images[:, a:])
            self.tic.add(values[a:] + across.sum(dim=0), bounds[a:], inside + across, coupling[a:])

    def _lifted(self, w: Tensor) -> Tensor:
        """R'w (N, m) for w (n, m)."""
        return (self.v[:, :, None] * w[:, None, :]).flatten(0, 1)

    def _down(self, u: Tensor) -> Tensor:
        """R u (n, m) for u (N, m)."""
        n, k = self.v.shape
        return (u.view(n, k, -1) * self.v[:, :, None]).sum(dim=1)

    # --- when to stop ---------------------------------------------------------------------------

    def _missing(self, sums: ProbeSums) -> int:
        """How many more probes of this kind its error asks for."""
        have = int(sums.count)
        if not have:
            # For TIC half as many are nearly always enough.
            return self.settings.further // (1 if sums is self.soft else 2)
        trace = self._trace(sums)
        if trace.value <= 0:
            return 0
        allowed = self.settings.tolerance * trace.value
        own = sums.widening**2 * sums.variance
        others = trace.monte_carlo_se**2 - own / have
        left = max(allowed - trace.truncation, 0.0) / CONFIDENCE
        # What these probes cannot help leaves them at least half of the tolerance.
        room = max(left**2 - others, (0.5 * allowed / CONFIDENCE) ** 2)
        needed = math.ceil(own / room)
        return max(0, min(needed, self.settings.max_probes) - have)

    def _done(self) -> bool:
        return self._missing(self.soft) == 0 and self._missing(self.tic) == 0

    def _tick(self) -> None:
        done = self.operator.applications
        if not self.round:  # before anything is known: ten steps, then half as many products
            self.work.tick(done, max(done, 15 * (2 * self.settings.first + 1)))
            return
        # The complement's spectrum ends where V's begins: six steps a probe, or fewer.
        left = 6 * (self._missing(self.soft) + self._missing(self.tic))
        self.work.tick(done, done + left)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    # --- results -------------------------------------------------------------------------------

    def _trace(self, sums: ProbeSums) -> Trace:
        ratio = self.deflated.ratio
        if sums is self.soft:
            return sums.trace(self.exact_soft, self.deflated.within(), ratio)
        found = sums.trace(self.exact_tic, self.deflated.within(self.others), ratio)
        # By the probes of the soft rank, which are there whenever those of TIC are.
        return self.known.less_excess(found, self.deflated, self.soft.widening)

    def _traces(self) -> CurvatureTraces:
        values = self.deflated.values
        nodes = torch.cat([values, self.nodes])
        weights = torch.cat([torch.ones_like(values), self.weights / self.soft.count])
        notes = [*self.notes]
        if self.operator.reason:
            notes.append(f"derivatives {self.operator.reason}")
        soft, tic = self._trace(self.soft), self._trace(self.tic)
        for name, trace in (("soft rank", soft), ("TIC", tic)):
            error = CONFIDENCE * trace.monte_carlo_se + trace.truncation
            if error > self.settings.tolerance * abs(trace.value) * 1.001:
                share = error / abs(trace.value) if trace.value else math.inf
                notes.append(
                    f"the {name} is known to {share:.1%} only, where {self.settings.tolerance:.1%}"
                    " was asked for"
                )
        return CurvatureTraces(
            soft_rank=soft,
            tic=tic,
            mean_gradient=(self.operator.free.energy + float(self.energy)) / self.problem.n_samples,
            trace_ggn=float(self.trace_ggn) + self.operator.free.trace,
            nodes=nodes,
            weights=weights,
            free_rank=self.operator.free.rank,
            notes=tuple(notes),
        )

    # --- checkpoints ------------------------------------------------------------------------------

    def _state(self) -> State:
        state = {
            "round": torch.tensor(self.round),
            "settled": torch.tensor(self.settled),
            "nodes": self.nodes,
            "weights": self.weights,
            "energy": self.energy,
            "trace_ggn": self.trace_ggn,
            "applications": torch.tensor(self.operator.applications),
        }
        state |= {f"deflated.{k}": t for k, t in self.deflated.state().items()}
        state |= {f"known.{k}": t for k, t in self.known.state().items()}
        for label, sums in (("soft", self.soft), ("tic", self.tic)):
            # Clones: the sums go on in place.
            state |= {f"{label}.{k}": getattr(sums, k).clone() for k in ProbeSums.NAMES}
        return state

    def _load(self) -> State | None:
        saved = self.resume.load()
        if saved is None:
            return None
        device = self.problem.device
        self.round, self.settled = int(saved["round"]), int(saved["settled"])
        for name in ("nodes", "weights", "energy", "trace_ggn"):
            setattr(self, name, saved[name].to(device))
        self.known.restore({k: saved[f"known.{k}"].to(device) for k in KnownSamples.NAMES})
        self._deflate(
            Deflation.restored({k: saved[f"deflated.{k}"].to(device) for k in Deflation.NAMES})
        )
        self.operator.applications = int(saved["applications"])
        for label, sums in (("soft", self.soft), ("tic", self.tic)):
            for k in ProbeSums.NAMES:
                setattr(sums, k, saved[f"{label}.{k}"].to(device))
        return saved


def _joined(one: State, other: State) -> State:
    return one | other


def _f(x: Tensor) -> Tensor:
    return x / (1.0 + x)
