"""The penalised curvature at the fitted weights: penalty, dispersion and factorisation together.

They belong together because they can depend on each other: the dispersion of a Gaussian model is
RSS/(n K - soft rank), weight decay on a squared loss is rescaled by the dispersion, and the
evidence fixed point needs the soft rank at several penalties. A matrix-free solver gives the soft
rank at every multiple of a penalty from one run (`_RankCurve`), so neither costs a run per trial.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flataudit import penalty as penalties
from flataudit.curvature.problem import Problem
from flataudit.errors import BreakdownError, InputError, MemoryPlanError, NumericalError
from flataudit.estimates import measure_soft_rank
from flataudit.families import Gaussian
from flataudit.penalty import EstimatorPenalty, GradientMoments, PenaltyArgument
from flataudit.results import Dispersion, PenaltyInfo, SolverInfo
from flataudit.solvers import (
    MATRIX_FREE,
    SOLVERS,
    Choice,
    Curvature,
    CurvatureTraces,
    Work,
    choose,
    is_out_of_memory,
    solve,
)
from flataudit.solvers.base import EIGENVALUE_LIMIT
from flataudit.training import TrainingRecord

MAX_ROUNDS = 50
ROUND_TOLERANCE = 1e-9
ROUNDING = 1e-12  # a mean gradient this small beside the samples' own counts as zero


@dataclass(frozen=True, slots=True, eq=False)
class PenalisedFit:
    """The problem with its penalty, and the functional variance, or what is known of it."""

    problem: Problem
    penalty: Mapping[str, Tensor]
    variance: Curvature
    moments: GradientMoments
    penalty_info: PenaltyInfo
    dispersion: Dispersion | None
    solver: SolverInfo
    remaining_gradient: float  # |gbar + D theta| with the objective's D, nats
    work: Work

    def variance_at(self, penalty: Mapping[str, Tensor], scale: float | None = None) -> Curvature:
        """One more factorisation: at another D, and with Lambda at logits times `scale`."""
        problem = self.problem
        if scale is not None:
            factor = problem.family.factor(problem.outputs * scale, problem.y)
            problem = problem.with_factor(factor)
        return solve(self.solver.name, problem, penalty, self.work)


@dataclass(frozen=True, slots=True, eq=False)
class _Resolved:
    total: Mapping[str, Tensor]
    objective: Mapping[str, Tensor]
    source: str
    record: TrainingRecord | None = None


def penalised_fit(
    problem: Problem,
    *,
    penalty: PenaltyArgument,
    record: TrainingRecord | None,
    dispersion: float | str,
    solver: str,
    own: EstimatorPenalty | None = None,
    work: Work | None = None,
) -> PenalisedFit:
    """Resolves penalty and dispersion and factorises G + D.

    penalty: 'auto', a number or numbers by parameter name; record: used where the penalty is
    'auto'; own: the model's own penalty, used where neither is given; dispersion: 'auto' or the
    Gaussian variance; work: how a matrix-free solver runs. A solver that runs out of memory
    or breaks down is followed by the next one where `solver` is 'auto'.
    """
    work = work or Work()
    failed: dict[str, str] = {}
    while True:
        try:
            return _penalised_fit(problem, penalty, record, dispersion, solver, own, work, failed)
        except _OutOfMemoryError as error:
            failed[error.solver] = "ran out of memory"
            if solver != "auto":
                raise MemoryPlanError(
                    f"expected solver={solver} to get through with the memory there is, got an"
                    " allocation that failed; use solver=auto, fewer samples or more memory"
                ) from error
        except BreakdownError:
            if solver != "auto" or "dual" in failed:
                raise
            failed["dual"] = "broke down"
        gc.collect()  # the failed run's arrays hang on its traceback
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class _OutOfMemoryError(Exception):
    def __init__(self, solver: str) -> None:
        super().__init__(solver)
        self.solver = solver


def _solve(
    choice: Choice,
    problem: Problem,
    penalty: Mapping[str, Tensor],
    work: Work,
    *,
    spectrum: bool = False,
) -> Curvature:
    try:
        return solve(choice.name, problem, penalty, work, spectrum=spectrum)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failed = choice.name
    raise _OutOfMemoryError(failed)  # outside the handler, whose traceback holds the arrays


def _penalised_fit(
    problem: Problem,
    penalty: PenaltyArgument,
    record: TrainingRecord | None,
    dispersion: float | str,
    solver: str,
    own: EstimatorPenalty | None,
    work: Work,
    failed: dict[str, str],
) -> PenalisedFit:
    started = time.perf_counter()
    gaussian = problem.family.name == "gaussian"
    automatic = gaussian and dispersion == "auto"
    if automatic:
        problem = problem.with_family(Gaussian(_residual_variance(problem, 0.0)))
    # The plan first: nothing is computed for an audit that cannot be finished.
    planned = choose(solver, problem, _provisional(problem, penalty, record, own), failed)
    curve = None if planned.exact else _RankCurve(work)
    moments = GradientMoments(*problem.gradient_moments())
    if not math.isfinite(moments.trace):
        raise InputError(
            "expected finite derivatives of the model's outputs, got NaN or infinity; look for"
            " square roots, norms and logarithms at zero"
        )
    for _ in range(MAX_ROUNDS):
        resolved = _resolve(problem, penalty, record, own, moments, planned, curve)
        if curve is not None and automatic:
            rank = curve.rank(problem, resolved.total)
        else:
            choice = choose(solver, problem, resolved.total, failed)
            wants_spectrum = min(problem.n_params, problem.n_rows) <= EIGENVALUE_LIMIT
            variance = _solve(
                choice, problem, resolved.total, work, spectrum=wants_spectrum and not automatic
            )
            if not automatic:
                break
            rank = measure_soft_rank(variance).gap * problem.n_samples
        before = problem.family.dispersion  # type: ignore[attr-defined]  # Gaussian, by `automatic`
        after = _residual_variance(problem, rank)
        if abs(after - before) <= ROUND_TOLERANCE * before:
            automatic = False  # one last round, with the spectrum
            continue
        moments = _rescaled(moments, before / after)
        problem = problem.with_family(Gaussian(after))
    else:
        raise NumericalError(
            "expected the dispersion RSS/(n - soft rank) to settle, got no fixed point in"
            f" {MAX_ROUNDS} rounds; likely cause: a soft rank near n; give --dispersion"
        )
    residual = penalties.remaining_gradient(resolved.objective, problem, moments.mean)
    rounding = ROUNDING * math.sqrt(moments.trace)
    stationarity = penalties.stationarity(resolved.objective, problem, moments.mean)
    settled = None
    if gaussian:
        value = problem.family.dispersion  # type: ignore[attr-defined]  # Gaussian
        settled = Dispersion(value, "residuals" if dispersion == "auto" else "argument")
    return PenalisedFit(
        problem,
        resolved.total,
        variance,
        moments,
        penalties.describe(
            resolved.total,
            resolved.source,
            resolved.record,
            0.0 if residual <= rounding else stationarity,
        ),
        settled,
        _solver_info(choice, problem, variance, time.perf_counter() - started),
        residual,
        work,
    )


class _RankCurve:
    """Soft ranks at many penalties from few runs of the lanczos solver.

    K scales with the inverse of D, and of a Gaussian's dispersion, so that one spectral density
    gives the soft rank at every multiple; a run is repeated where the multiple is large, since its
    errors were bounded at the penalty it was made for.
    """

    REACH = 3.0  # a run counts for multiples within this factor

    def __init__(self, work: Work) -> None:
        self._work = work
        self._penalty: Mapping[str, Tensor] | None = None
        self._dispersion = 1.0
        self._traces: CurvatureTraces | None = None

    def rank(self, problem: Problem, penalty: Mapping[str, Tensor]) -> float:
        """The soft rank of this problem at this penalty."""
        dispersion = getattr(problem.family, "dispersion", 1.0)
        multiple = None if self._penalty is None else _multiple(penalty, self._penalty)
        if multiple is not None:
            multiple *= dispersion / self._dispersion
        if (
            self._traces is None
            or multiple is None
            or not (1.0 / self.REACH <= multiple <= self.REACH)
        ):
            found = MATRIX_FREE["lanczos"].solve(problem, penalty, self._work)
            assert isinstance(found, CurvatureTraces)
            self._traces, self._penalty, self._dispersion = found, dict(penalty), dispersion
            multiple = 1.0
        return self._traces.rank_at(1.0 / multiple)


def _multiple(penalty: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float | None:
    """c with penalty = c other, or None."""
    ratios = torch.cat([(penalty[k] / other[k])[other[k] > 0].flatten() for k in other])
    if not len(ratios):
        return 1.0
    low, high = float(ratios.min()), float(ratios.max())
    same = all(bool(((penalty[k] > 0) == (other[k] > 0)).all()) for k in other)
    return low if same and high - low <= 1e-9 * high else None


def _provisional(
    problem: Problem,
    penalty: PenaltyArgument,
    record: TrainingRecord | None,
    own: EstimatorPenalty | None,
) -> Mapping[str, Tensor]:
    """A penalty with the final one's free parameters, which is all that a plan depends on."""
    if not _is_auto(penalty):
        return penalties.from_argument(penalty, problem.params)
    if record is None and own is not None and own.record.optimizer == "converged":
        return penalties.from_argument(own.decay, problem.params)
    return penalties.from_argument(1.0, problem.params)


def _resolve(
    problem: Problem,
    penalty: PenaltyArgument,
    record: TrainingRecord | None,
    own: EstimatorPenalty | None,
    moments: GradientMoments,
    planned: Choice,
    curve: _RankCurve | None,
) -> _Resolved:
    """The first that is given: penalty, training record, the model's own penalty; else evidence."""
    if not _is_auto(penalty):
        given = penalties.from_argument(penalty, problem.params)
        return _Resolved(given, given, "argument")
    if record is not None:
        scale = _loss_scale(record, problem)
        found = penalties.from_training(record, problem, moments, scale)
        return _Resolved(*found, "training", record)
    if own is not None:
        scale = _loss_scale(own.record, problem)
        found = penalties.from_training(own.record, problem, moments, scale, own.decay)
        shown = None if own.record.optimizer == "converged" else own.record
        return _Resolved(*found, "estimator", shown)
    value = _evidence(problem, planned, curve)
    tied = penalties.from_argument(value, problem.params)
    return _Resolved(tied, tied, "evidence")


def _is_auto(penalty: PenaltyArgument) -> bool:
    return isinstance(penalty, str) and penalty == "auto"


def _loss_scale(record: TrainingRecord, problem: Problem) -> float:
    """c with training loss = c (mean NLL) + constant; torch's MSELoss is a Gaussian's default."""
    dispersion = getattr(problem.family, "dispersion", None)
    if dispersion is None:
        if record.loss not in (None, "nll"):
            raise InputError(
                f"expected training loss nll for the {problem.family.name} family, got"
                f" {record.loss}; mse and half_mse belong to family=gaussian"
            )
        return 1.0
    loss = record.loss or "mse"
    scales = {"nll": 1.0, "half_mse": dispersion, "mse": 2.0 * dispersion / problem.n_outputs}
    return float(scales[loss])


def _evidence(problem: Problem, planned: Choice, curve: _RankCurve | None) -> float:
    """MacKay's lambda; from one spectrum where that is affordable, else one solve per trial.

    Without a matrix: from a few runs, each good for penalties around its own.
    """
    ones: dict[str, Tensor] = {
        name: torch.ones_like(p.detach(), dtype=torch.float64) for name, p in problem.params.items()
    }
    limit = min(problem.n_params, problem.n_rows)
    if curve is not None:

        def from_curve(value: float) -> float:
            return curve.rank(problem, {name: value * d for name, d in ones.items()})

        return penalties.evidence(
            from_curve, limit, problem.params, problem.n_samples, tolerance=0.02
        )
    chosen = SOLVERS[planned.name]
    side = problem.n_params if planned.name == "primal" else problem.n_rows
    if side <= EIGENVALUE_LIMIT:
        ratios = chosen.solve(problem, ones, spectrum=True).ratios
        assert ratios is not None
        eigenvalues = ratios.cpu().numpy()

        def from_spectrum(value: float) -> float:
            return float(np.sum(eigenvalues / (eigenvalues + value)))

        return penalties.evidence(from_spectrum, limit, problem.params, problem.n_samples)

    def from_solve(value: float) -> float:
        scaled = {name: value * d for name, d in ones.items()}
        q = chosen.solve(problem, scaled).q
        return float(q.diagonal(dim1=1, dim2=2).sum())

    return penalties.evidence(from_solve, limit, problem.params, problem.n_samples, tolerance=0.02)


def _residual_variance(problem: Problem, rank: float) -> float:
    rss = float((problem.outputs - problem.y).square().sum())
    freedom = problem.n_samples * problem.n_outputs - rank
    if rss <= 0 or freedom <= 0:
        raise InputError(
            "expected residuals to estimate the dispersion from, got a model that interpolates its"
            " training targets; give --dispersion"
        )
    return rss / freedom


def _rescaled(moments: GradientMoments, ratio: float) -> GradientMoments:
    """The moments of the gradients times `ratio`: a new dispersion."""
    return GradientMoments(
        {k: t * ratio for k, t in moments.mean.items()},
        {k: t * ratio**2 for k, t in moments.second.items()},
    )


def _solver_info(
    choice: Choice, problem: Problem, variance: Curvature, seconds: float
) -> SolverInfo:
    dtype: Any = next(iter(problem.params.values())).dtype
    name = str(dtype).removeprefix("torch.")
    return SolverInfo(
        name=choice.name,
        exact=choice.exact,
        reason=choice.reason,
        device=problem.device.type,
        dtype="float64" if name == "float64" else f"{name} model, float64 accumulation",
        seconds=seconds,
        peak_bytes=choice.peak_bytes,
        notes=variance.notes,
    )
