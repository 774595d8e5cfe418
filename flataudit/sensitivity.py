"""How much the estimates depend on the penalty: the same ones at D/3, D and 3D.

One more factorisation per other penalty, two where the model is recalibrated.
"""

from __future__ import annotations

import math

from flataudit import estimates as estimators
from flataudit.curvature.problem import Problem
from flataudit.errors import InputError, NumericalError
from flataudit.fitting import PenalisedFit
from flataudit.results import Estimates, PenaltyPoint

LIMIT = 2000  # min(P, N) up to which `auto` computes it
FACTORS = (1.0 / 3.0, 1.0, 3.0)


def wants_sensitivity(asked: str | bool, problem: Problem) -> bool:
    """Whether to compute it: as asked, or for small problems.

    Raises:
        InputError: neither 'auto', True nor False.
    """
    if isinstance(asked, bool):
        return asked
    if asked != "auto":
        raise InputError(
            f"expected sensitivity to be 'auto', True or False, got {asked!r}; choose one"
        )
    return min(problem.n_params, problem.n_rows) <= LIMIT


def penalty_sensitivity(
    fit: PenalisedFit, at_penalty: Estimates
) -> tuple[PenaltyPoint, ...] | None:
    """The estimates' gaps at D times each factor, dispersion and recalibration held fixed.

    None where D is zero: then no factor changes it.
    """
    if not any(bool(d.any()) for d in fit.penalty.values()):
        return None
    recalibrated, blend = at_penalty.soft_rank_recalibrated, at_penalty.soft_rank_blend
    here = PenaltyPoint(
        1.0,
        at_penalty.soft_rank.gap,
        at_penalty.tic.gap,
        None if at_penalty.loo is None else at_penalty.loo.gap,
        None if recalibrated is None else recalibrated.gap,
        None if blend is None else blend.gap,
    )
    scale = None if recalibrated is None else recalibrated.scale
    return tuple(here if factor == 1.0 else _point(fit, factor, scale) for factor in FACTORS)


def _point(fit: PenalisedFit, factor: float, scale: float | None) -> PenaltyPoint:
    problem, family = fit.problem, fit.problem.family
    penalty = {name: factor * d for name, d in fit.penalty.items()}
    try:
        variance = fit.variance_at(penalty)
        v = problem.factor.residual
        left_out = estimators.measure_loo(variance, v, family, problem.outputs, problem.y)
        recalibrated = None
        if scale is not None:
            again = fit.variance_at(penalty, scale)
            recalibrated = estimators.measure_soft_rank(again).gap
    except NumericalError:  # a neighbouring penalty is no reason for the audit to fail
        return PenaltyPoint(factor, None, None, None, None)
    soft_rank = estimators.measure_soft_rank(variance).gap
    return PenaltyPoint(
        factor,
        soft_rank,
        estimators.measure_tic(variance, v).gap,
        None if left_out is None else left_out[1].gap,
        recalibrated,
        math.sqrt(soft_rank * recalibrated)
        if scale is not None and scale < 1.0 and recalibrated is not None
        else None,
    )
