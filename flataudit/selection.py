"""Which estimate to believe, how far, and what to warn of: pure functions of numbers.

The order of `choose_estimator` is the method's decision list; its evidence is in
docs/decisions/0002-selection.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from flataudit.results import (
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
    samples_per_rank: float = 10.0  # n / soft rank below: the interval is a lower bound
    shift_level: float = 0.01  # p-value of the inputs' two-sample test below ...
    shift_distance: float = 0.1  # ... and a Kolmogorov distance from here on


def choose_estimator(
    calibration: Calibration,
    *,
    linear: bool,
    saturated: bool,
    has_loo: bool,
    has_recalibrated: bool,
) -> tuple[EstimatorName, str]:
    """The estimator and one sentence why, first rule that applies.

    too few samples -> LOO; calibrated or within tolerance -> soft rank; under-confident -> TIC;
    linear in the parameters -> LOO; over-confident, mixed or saturated -> soft rank of the
    recalibrated model; not shown -> LOO. Where the wanted one does not exist, the next best
    stands in and the sentence says so.
    """
    verdict, direction = calibration.verdict, calibration.direction
    wanted: EstimatorName
    if verdict == "insufficient":
        wanted, why = "loo", "too few samples or errors to judge calibration"
    elif verdict in ("calibrated", "within_tolerance"):
        how = "calibrated" if verdict == "calibrated" else "calibrated within tolerance"
        wanted, why = "soft_rank", f"the model is {how}, so soft rank / n is the expected gap"
    elif direction == "under":
        wanted, why = "tic", "the model is under-confident, so TIC takes the soft rank's place"
    elif linear:
        wanted, why = "loo", "the model is linear in its parameters, where leave-one-out is best"
    elif direction in ("over", "mixed") or saturated:
        kind = {"over": "over-confident", "mixed": "over- and under-confident"}.get(
            direction, "saturated on its training data"
        )
        wanted, why = "soft_rank_recalibrated", f"the model is {kind}, so it is recalibrated first"
    elif verdict == "miscalibrated":
        wanted = "soft_rank_recalibrated"
        why = "the model is miscalibrated without a direction, so it is recalibrated first"
    else:
        wanted, why = "loo", "calibration is not shown either way"
    if wanted == "soft_rank_recalibrated" and not has_recalibrated:
        wanted, why = "loo", why.rsplit(",", 1)[0] + "; recalibration is undefined here"
    if wanted == "loo" and not has_loo:
        return "soft_rank", f"{why}; leave-one-out does not exist here, the soft rank stands in"
    return wanted, why


def needs_recalibration(calibration: Calibration, *, linear: bool, saturated: bool) -> bool:
    """Whether the decision list asks for the second factorisation."""
    name, _ = choose_estimator(
        calibration, linear=linear, saturated=saturated, has_loo=True, has_recalibrated=True
    )
    return name == "soft_rank_recalibrated"


def choose_confidence(
    calibration: Calibration, *, penalty_source: str, saturated: bool
) -> ConfidenceLevel:
    """May the prediction be relied on: ok, low or refused, by the contract's rule."""
    doubtful = calibration.direction in ("over", "mixed") or saturated
    if penalty_source == "evidence":
        return "refused" if doubtful else "low"
    return "low" if doubtful or calibration.verdict == "unknown" else "ok"


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
    shift: Shift | None = None  # held-out against training inputs
    solver: SolverInfo | None = None


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
    order: tuple[Severity, ...] = ("critical", "high", "warn", "info", "none")
    return tuple(sorted(found, key=lambda w: order.index(w.severity)))


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
                " and the estimates of an early-stopped network come out too large, often by a"
                " factor of 2 to 4; give --training or --penalty",
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
    if heldout is None:
        return []
    # The measured gap's own interval at the prediction's level; the two have no point in common.
    half = NormalDist().inv_cdf(0.5 + gap.level / 2) * heldout.gap_se
    if heldout.gap - half <= gap.high and heldout.gap + half >= gap.low:
        return []
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
    if chosen.monte_carlo_se is None and chosen.truncation is None:
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
    if seen.max_leverage > policy.leverage or seen.estimates.loo is None:
        found.append(
            AuditWarning(
                "high_leverage",
                "warn" if seen.gap.estimator == "loo" or seen.estimates.loo is None else "info",
                f"some samples determine their own prediction (leverage {seen.max_leverage:.3f} of"
                " 1): leave-one-out extrapolates there; look at the influence table",
            )
        )
    return found
