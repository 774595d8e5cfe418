"""Which estimate to believe, how far, and what to warn of: pure functions of numbers.

The order of `choose_estimator` is the method's decision list; its evidence is in
docs/decisions/0017-selection-rule.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist

from flataudit.results import (
    SEVERITIES,
    AuditWarning,
    Calibration,
    ConfidenceLevel,
    Estimates,
    EstimatorName,
    Gap,
    HeldoutFit,
    PenaltyInfo,
    Premise,
    Severity,
    Shift,
    SolverInfo,
)

Z_95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class SelectionPolicy:
    """Thresholds of the warnings; each is a ratio or a p-value, none depends on a data set."""

    stationarity: float = 0.1  # |grad + D theta| / |grad|
    gradient_noise: float = 0.1  # |grad + D theta| in units of its sampling error sqrt(trC/n)
    premise_ratio: float = 1.5  # information ratio beyond this factor either way ...
    premise_z: float = 2.5758  # ... and significant at 1 %
    disagreement: float = 2.0  # largest over smallest of soft rank, TIC and LOO
    leverage: float = 0.9  # largest eigenvalue of some Q_i
    samples_per_rank: float = 10.0  # n / soft rank below: the sampling error is a lower bound
    shift_level: float = 0.01  # p-value of the inputs' two-sample test below ...
    shift_distance: float = 0.1  # ... and a Kolmogorov distance from here on


# The log-normal standard deviation of log(estimate/gap) beyond sampling: such that 90 % of the
# zoo's models are inside their interval. benchmarks/zoo/rule_fit.py fits them and says how they do
# on data sets they were not fitted to.
MODEL_ERROR: Mapping[EstimatorName, float] = {
    "loo": 0.27,
    "tic": 0.59,
    "soft_rank": 0.42,
    "soft_rank_recalibrated": 0.42,
    "soft_rank_blend": 0.42,
}


def choose_estimator(
    calibration: Calibration,
    *,
    linear: bool,
    saturated: bool,
    has_loo: bool,
    scale: float | None,
) -> tuple[EstimatorName, str]:
    """The estimator and one sentence why, first rule that applies.

    calibrated or within tolerance -> soft rank; shown under-confident, training data not saturated
    -> TIC; linear in the parameters, or calibration unknown -> LOO; else the blend, the geometric
    mean of the soft rank and the recalibrated model's. scale: the recalibration's factor on the
    logits; from 1 on it would sharpen the model, and the soft rank itself is taken; None where it
    is undefined, and LOO stands in, as the soft rank does where there is no LOO.
    """
    verdict, direction = calibration.verdict, calibration.direction
    if verdict in ("calibrated", "within_tolerance"):
        how = "calibrated" if verdict == "calibrated" else "calibrated within tolerance"
        return "soft_rank", f"the model is {how}, so soft rank / n is the expected gap"
    if verdict == "miscalibrated" and direction == "under" and not saturated:
        return "tic", "the model is under-confident, so TIC takes the soft rank's place"
    without_loo = "leave-one-out does not exist here, the soft rank stands in"
    if linear or verdict == "unknown":
        why = (
            "the model is linear in its parameters, where leave-one-out is best"
            if linear
            else "calibration is unknown"
        )
        return ("loo", why) if has_loo else ("soft_rank", f"{why}; {without_loo}")
    kind = _blend_reason(calibration, saturated)
    if scale is not None and scale < 1.0:
        return "soft_rank_blend", (
            f"{kind}, so the gap lies between its soft rank and that of the model recalibrated:"
            " their geometric mean"
        )
    if scale is not None:
        return "soft_rank", f"{kind}; recalibration would sharpen it, so the soft rank is taken"
    if has_loo:
        return "loo", f"{kind}; recalibration is undefined here, so leave-one-out is taken"
    return "soft_rank", f"{kind}; {without_loo}"


def _blend_reason(calibration: Calibration, saturated: bool) -> str:
    if calibration.direction == "over":
        return "the model is over-confident"
    if calibration.direction == "mixed":
        return "the model is over- and under-confident"
    if saturated:
        return "the model is saturated on its training data"
    if calibration.verdict == "insufficient":
        return "too few samples or errors to judge calibration"
    if calibration.verdict == "miscalibrated":
        return "the model is miscalibrated without a direction"
    return "calibration is not shown either way"


def needs_recalibration(calibration: Calibration, *, linear: bool, saturated: bool) -> bool:
    """Whether the decision list asks for the second factorisation."""
    name, _ = choose_estimator(
        calibration, linear=linear, saturated=saturated, has_loo=True, scale=0.5
    )
    return name == "soft_rank_blend"


def widened(gap: float, margin: float, model_error: float, z: float) -> tuple[float, float]:
    """The gap's interval: sampling margin and model error, in quadrature on either side.

    gap, margin: nats, the margin being z standard errors; model_error: the standard deviation tau
    of log(estimate/truth), whose own interval is gap exp(-z tau) to gap exp(z tau). Never narrower
    than gap -+ margin.

    >>> widened(1.0, 0.0, 0.5, 2.0) == (math.exp(-1.0), math.exp(1.0))
    True
    """
    down, up = (abs(gap * math.expm1(sign * z * model_error)) for sign in (-1, 1))
    if gap < 0:
        down, up = up, down
    return gap - math.hypot(margin, down), gap + math.hypot(margin, up)


@dataclass(frozen=True, slots=True)
class Observations:
    """The numbers that the warnings look at."""

    calibration: Calibration
    estimates: Estimates
    premise: Premise | None
    penalty: PenaltyInfo
    gap: Gap
    heldout: HeldoutFit | None
    saturated: bool
    gradient_noise: float  # |grad + D theta| / sqrt(trC / n)
    max_leverage: float | None  # largest eigenvalue of any Q_i, where they are known
    training_time: bool  # D holds a finite training time
    linear: bool = False  # in its parameters
    shift: Shift | None = None  # held-out against training inputs
    solver: SolverInfo | None = None


def choose_confidence(
    seen: Observations, policy: SelectionPolicy | None = None
) -> tuple[ConfidenceLevel, tuple[str, ...]]:
    """May the prediction be relied on: ok, low or refused, and why it is not ok.

    low: the penalty is a guess, the gradients have vanished, a network is over-confident to a high
    degree, the calibration is unknown, leave-one-out extrapolates, the solver's error is unknown,
    or held-out data contradict it. refused: over-confident or saturated, and the penalty a guess.
    Mild over-confidence is within the interval, and a linear model's does not harm leave-one-out.
    """
    policy = policy or SelectionPolicy()
    c = seen.calibration
    guessed, over = seen.penalty.source == "evidence", c.direction in ("over", "mixed")
    reasons = []
    if guessed:
        reasons.append("the penalty is a guess, for no training record was given")
    if seen.saturated:
        reasons.append("the training data are fitted so closely that the gradients have vanished")
    strong = c.severity in ("high", "critical") and not seen.linear
    if over and (guessed or strong):
        how = "strongly " if strong else ""
        reasons.append(f"the model is {how}over-confident")
    if c.verdict == "unknown":
        reasons.append("its calibration could be judged on training data only")
    if seen.gap.estimator == "loo" and _has_high_leverage(seen, policy):
        reasons.append("leave-one-out extrapolates for samples that decide their own prediction")
    if _is_rough(seen):
        reasons.append("the solver's error on this model is unknown")
    if is_contradicted(seen.gap, seen.heldout):
        reasons.append("the gap measured on held-out data contradicts it")
    if guessed and (over or seen.saturated):
        return "refused", tuple(reasons)
    return ("low" if reasons else "ok"), tuple(reasons)


def is_contradicted(gap: Gap, heldout: HeldoutFit | None) -> bool:
    """Whether the measured gap's own interval, at the prediction's level, and the predicted one
    have no point in common."""
    if heldout is None:
        return False
    half = _half_width(gap, heldout)
    return heldout.gap - half > gap.high or heldout.gap + half < gap.low


def _half_width(gap: Gap, heldout: HeldoutFit) -> float:
    """Of the measured gap's interval, at the level of the predicted one."""
    return NormalDist().inv_cdf(0.5 + gap.level / 2) * heldout.gap_se


def _has_high_leverage(seen: Observations, policy: SelectionPolicy) -> bool:
    return seen.max_leverage is not None and seen.max_leverage > policy.leverage


def _is_rough(seen: Observations) -> bool:
    """Whether the chosen gap is an approximation whose error is unknown."""
    if seen.solver is None or seen.solver.exact:
        return False
    chosen = getattr(seen.estimates, seen.gap.estimator)
    return chosen.monte_carlo_se is None and chosen.truncation is None


def collect_warnings(
    seen: Observations, policy: SelectionPolicy | None = None
) -> tuple[AuditWarning, ...]:
    """All warnings that apply, the gravest first."""
    policy = policy or SelectionPolicy()
    found = [
        *_calibration_warnings(seen),
        *_penalty_warnings(seen, policy),
        *_estimate_warnings(seen, policy),
        *_heldout_warnings(seen),
        *_shift_warnings(seen, policy),
        *_solver_warnings(seen),
    ]
    return tuple(sorted(found, key=lambda w: -SEVERITIES.index(w.severity)))


def _calibration_warnings(seen: Observations) -> list[AuditWarning]:
    c = seen.calibration
    found = []
    if c.direction in ("over", "mixed"):
        severity: Severity = "info" if c.severity == "none" else c.severity
        gap = "" if c.confidence_gap is None else f" by {c.confidence_gap:.3f} on average"
        found.append(
            AuditWarning(
                "overconfident",
                severity,
                f"the model is over-confident{gap}: its confidence exceeds its accuracy, so the"
                " curvature estimates are less certain; recalibrate it or train it for less long",
            )
        )
    if c.direction in ("under", "mixed"):
        found.append(
            AuditWarning(
                "underconfident",
                "info",
                "the model is under-confident: it is right more often than it claims; the soft"
                " rank would be too large, TIC is used where the decision list says so",
            )
        )
    if seen.saturated:
        found.append(
            AuditWarning(
                "train_saturated",
                "critical",
                "the model fits its training data almost perfectly"
                f" ({', '.join(c.saturation)}): the gradients have vanished and flatness says"
                " little; judge it on held-out data",
            )
        )
    if c.verdict == "insufficient":
        found.append(
            AuditWarning(
                "few_calibration_samples",
                "warn",
                f"calibration cannot be judged from {c.n} samples (at least 200 with 10 errors"
                " are needed); give --heldout data or more training samples",
            )
        )
    return found


def _penalty_warnings(seen: Observations, policy: SelectionPolicy) -> list[AuditWarning]:
    p = seen.penalty
    found = []
    if p.source == "evidence":
        found.append(
            AuditWarning(
                "penalty_unknown",
                "high",
                "no penalty and no training record were given: the evidence fixed point stands in"
                " and the estimates of an early-stopped network come out too large: of the networks"
                " in docs/evidence.md half by a third or more, one in ten by a factor of 2.8 or"
                " more; give --training or --penalty",
            )
        )
    moved = p.stationarity is not None and p.stationarity > policy.stationarity
    if moved and seen.gradient_noise > policy.gradient_noise:
        expected = " as its training record says" if seen.training_time else ""
        found.append(
            AuditWarning(
                "not_at_minimum",
                "info" if seen.training_time else "warn",
                f"the weights are not at a minimum of the penalised loss{expected} (stationarity"
                f" residual {p.stationarity:.2g}); "
                + (
                    "the training time in the penalty accounts for it"
                    if seen.training_time
                    else "check the penalty, or give the training record with --training"
                ),
            )
        )
    return found


def _heldout_warnings(seen: Observations) -> list[AuditWarning]:
    gap, heldout = seen.gap, seen.heldout
    if heldout is None or not is_contradicted(gap, heldout):
        return []
    half = _half_width(gap, heldout)
    return [
        AuditWarning(
            "prediction_contradicted",
            "high",
            f"the gap measured on held-out data, {heldout.gap:.3g} +- {half:.2g}, lies outside the"
            f" predicted {gap.low:.3g} to {gap.high:.3g}; trust the measurement",
        )
    ]


def is_shifted(shift: Shift, policy: SelectionPolicy | None = None) -> bool:
    """Whether the held-out inputs differ significantly and materially from the training inputs."""
    policy = policy or SelectionPolicy()
    distance = max(
        shift.worst_distance if shift.n_features_shifted else 0.0,
        shift.joint_distance,
    )
    return shift.p_value < policy.shift_level and distance >= policy.shift_distance


def _shift_warnings(seen: Observations, policy: SelectionPolicy) -> list[AuditWarning]:
    shift = seen.shift
    if shift is None or not is_shifted(shift, policy):
        return []
    what = (
        f"feature {shift.worst_feature} most (counted from 0, flattened), whose distributions are"
        f" {shift.worst_distance:.2f} of 1 apart; {shift.n_features_shifted} of"
        f" {shift.n_features} differ"
        if shift.n_features_shifted
        else f"no feature by itself, but jointly they are {shift.joint_distance:.2f} of 1 apart"
    )
    return [
        AuditWarning(
            "outside_theory",
            "warn",
            f"the held-out inputs differ from the training inputs (p = {shift.p_value:.2g}):"
            f" {what}; the prediction is for data like the training data, so rely on the measured"
            " loss, and train on data like those to come",
        )
    ]


def _solver_warnings(seen: Observations) -> list[AuditWarning]:
    solver = seen.solver
    if solver is None or solver.exact:
        return []
    chosen = getattr(seen.estimates, seen.gap.estimator)
    if _is_rough(seen):
        return [
            AuditWarning(
                "approximate_solver",
                "high",
                f"solver {solver.name} is an approximation whose error on this model is unknown,"
                " and not within the gap's interval"
                + "".join(f"; {note}" for note in solver.notes)
                + "; use solver=auto where it fits",
            )
        ]
    error = Z_95 * (chosen.monte_carlo_se or 0.0) + (chosen.truncation or 0.0)
    missed = [note for note in solver.notes if "asked for" in note or "tolerance" in note]
    return [
        AuditWarning(
            "approximate_solver",
            "warn" if missed else "info",
            f"solver {solver.name} is an approximation: its numerical error, within the gap's"
            + (f" interval, is {error:.2g} nats at 95 %" if error > 1e-9 else " interval, is nil")
            + "".join(f"; {note}" for note in missed)
            + (
                ""
                if seen.estimates.loo
                else "; it gives no leave-one-out and no values per sample"
                if solver.name == "lanczos"
                else ""
            ),
        )
    ]


def _estimate_warnings(seen: Observations, policy: SelectionPolicy) -> list[AuditWarning]:
    found = []
    premise = seen.premise
    if premise is not None:
        off = max(premise.information_ratio, 1.0 / max(premise.information_ratio, 1e-300))
        if off > policy.premise_ratio and abs(premise.z) > policy.premise_z:
            side = "larger" if premise.information_ratio > 1 else "smaller"
            found.append(
                AuditWarning(
                    "premise_violated",
                    "warn" if seen.gap.estimator == "soft_rank" else "info",
                    f"errors weighted by curvature are {side} than the model's own variance"
                    f" (information ratio {premise.information_ratio:.2f}): the premise of the"
                    " soft rank does not hold; compare it with LOO before relying on it",
                )
            )
    gaps = [e.gap for e in (seen.estimates.soft_rank, seen.estimates.tic, seen.estimates.loo) if e]
    spread = max(gaps) / min(gaps) if min(gaps) > 0 else math.inf
    if spread > policy.disagreement:
        found.append(
            AuditWarning(
                "estimators_disagree",
                "warn" if seen.gap.estimator == "soft_rank" else "info",
                f"soft rank, TIC and LOO range over {min(gaps):.3g} to {max(gaps):.3g} nats;"
                " read the reason for the one chosen before acting on it",
            )
        )
    if seen.max_leverage is None:
        return found
    if _has_high_leverage(seen, policy) or seen.estimates.loo is None:
        found.append(
            AuditWarning(
                "high_leverage",
                "warn" if seen.gap.estimator == "loo" or seen.estimates.loo is None else "info",
                f"some samples determine their own prediction (leverage {seen.max_leverage:.3f} of"
                " 1): leave-one-out extrapolates there; look at the influence table",
            )
        )
    return found
