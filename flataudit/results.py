"""What an audit returns: frozen dataclasses and their JSON.

Units are nats per example throughout; `None` stands for what does not exist and becomes null.
A non-finite number is never a result: `AuditReport.to_dict` turns it into null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
LEVEL = 0.90  # of every interval of a gap, a loss or an accuracy
Z_LEVEL = 1.6448536269514722  # the normal's upper 5 % point

FamilyName = Literal["categorical", "bernoulli", "gaussian", "poisson"]
Evidence = Literal["heldout", "loo", "train"]
Verdict = Literal[
    "calibrated", "within_tolerance", "not_shown", "miscalibrated", "insufficient", "unknown"
]
Direction = Literal["over", "under", "mixed", "none"]
Severity = Literal["none", "info", "warn", "high", "critical"]
EstimatorName = Literal["soft_rank", "tic", "loo", "soft_rank_recalibrated", "soft_rank_blend"]
ConfidenceLevel = Literal["ok", "low", "refused"]

SEVERITIES: tuple[Severity, ...] = ("none", "info", "warn", "high", "critical")


@dataclass(frozen=True, slots=True)
class AuditWarning:
    """One reason for care: a stable `code`, a severity and a sentence with its remedy."""

    code: str
    severity: Severity
    message: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """One estimator's gap (nats per example) and standard error sd(l + psi)/sqrt(n), ddof 1.

    `rank` is the soft rank where the estimator has one; `scale` the factor on the logits of the
    recalibrated model; `accuracy` and `mean_confidence` come from leave-one-out logits;
    `centred` is TIC with the mean gradient's outer product removed. From an approximate solver,
    `monte_carlo_se` is the standard error of its probes or samples and `truncation` a bound on what
    its iteration leaves out, both of the gap; None from an exact one.
    """

    gap: float
    se: float
    rank: float | None = None
    scale: float | None = None
    accuracy: float | None = None
    mean_confidence: float | None = None
    centred: float | None = None
    monte_carlo_se: float | None = None
    truncation: float | None = None

    def margin(self, z: float) -> float:
        """Half the interval's width: z standard errors of data and probes, plus the truncation."""
        return z * math.hypot(self.se, self.monte_carlo_se or 0.0) + (self.truncation or 0.0)


@dataclass(frozen=True, slots=True)
class Estimates:
    """All estimators side by side; `loo` is None where a leave-one-out step is not finite."""

    soft_rank: Estimate
    tic: Estimate
    loo: Estimate | None = None
    soft_rank_recalibrated: Estimate | None = None
    soft_rank_blend: Estimate | None = None  # geometric mean of it and the soft rank, if scale < 1


@dataclass(frozen=True, slots=True)
class PenaltyPoint:
    """The gaps by each estimator at `factor` times the penalty; None where there is none."""

    factor: float
    soft_rank: float | None
    tic: float | None
    loo: float | None
    soft_rank_recalibrated: float | None = None
    soft_rank_blend: float | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration metrics, tests and the verdict drawn from them.

    `slope` is the factor on the log probabilities that fits the labels best (below 1:
    over-confident); `confidence_gap` is mean(top-label confidence - hit) (above 0:
    over-confident). Intervals are the ones that decide the direction. `ece`, `mce` and `ace` are
    None without netcal and for regression.
    """

    evidence: Evidence
    n: int
    verdict: Verdict
    direction: Direction
    severity: Severity
    ece: float | None = None
    ece_if_calibrated: float | None = None
    mce: float | None = None
    ace: float | None = None
    mean_confidence: float | None = None
    accuracy: float | None = None
    slope: float | None = None
    slope_ci: tuple[float, float] | None = None
    confidence_gap: float | None = None
    confidence_gap_ci: tuple[float, float] | None = None
    p_values: Mapping[str, float] = dataclasses.field(default_factory=dict)
    saturation: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Premise:
    """Information-matrix equality: ratio = sum r'Ar / sum h and its paired z-test."""

    information_ratio: float
    z: float
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Gap:
    """The gap to act on: value and interval in nats per example, and why this estimator.

    The interval holds the sampling error and the estimator's own, of log-normal standard
    deviation `model_error` (`flataudit.selection.widened`).
    """

    value: float
    low: float
    high: float
    level: float
    estimator: EstimatorName
    reason: str
    lower_bound: bool = False  # n / soft rank below 10: the sampling error is underestimated
    model_error: float = 0.0


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval at the gap's level."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model was audited; the registry's fields are None for a model given in Python."""

    n_params: int
    uri: str | None = None
    name: str | None = None
    version: str | None = None
    model_id: str | None = None
    flavor: str | None = None
    notes: tuple[str, ...] = ()  # what was assumed about the model's outputs and dtype


@dataclass(frozen=True, slots=True)
class DataInfo:
    """The training data the estimates are computed on; sha256 of dtype, shape and bytes."""

    n_samples: int
    n_outputs: int
    sha256: str
    heldout_samples: int | None = None


@dataclass(frozen=True, slots=True)
class Dispersion:
    """The Gaussian family's variance and where it came from."""

    value: float
    source: Literal["argument", "residuals"]


@dataclass(frozen=True, slots=True)
class PenaltyInfo:
    """The penalty D of J = mean NLL + theta'D theta/2, and where it came from.

    `value` is None where D differs by parameter (then `low` and `high` give its range over
    penalised parameters); `stationarity` is |grad + D theta|/|grad| with the objective's own D.
    """

    value: float | None
    free_params: int
    source: Literal["argument", "estimator", "training", "evidence"]
    training: Mapping[str, Any] | None
    stationarity: float | None
    low: float | None = None
    high: float | None = None
    assumptions: tuple[str, ...] = ()

    @property
    def has_training_time(self) -> bool:
        """Whether D holds a finite training time."""
        return self.training is not None and self.training["optimizer"] != "converged"


@dataclass(frozen=True, slots=True)
class Fit:
    """Mean NLL (nats per example, constants included) and accuracy (None for regression)."""

    nll: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class HeldoutFit:
    """Loss on held-out data and the observed gap with its standard error."""

    nll: float
    accuracy: float | None
    gap: float
    gap_se: float


@dataclass(frozen=True, slots=True)
class Shift:
    """Two-sample test of the held-out against the training inputs (`flataudit.shift`).

    `statistic` is the largest |z| of a feature's location and scale; `p_value` that of the
    whole test. `worst_distance` is the worst feature's Kolmogorov distance, `joint_distance` the
    same along the direction that tells the two samples apart; features are counted flattened.
    """

    p_value: float
    statistic: float
    n_features_shifted: int
    worst_feature: int
    worst_distance: float
    joint_distance: float
    n_features: int  # how many were looked at one by one


@dataclass(frozen=True, slots=True)
class SliceRow:
    """One class or slice of the training samples (`flataudit.slices`).

    `gap_se` is None for a single sample; accuracies are None for regression, and the predicted
    one, from leave-one-out outputs, where there are none.
    """

    value: str
    n: int
    train_nll: float
    gap: float
    gap_se: float | None
    train_accuracy: float | None
    predicted_accuracy: Interval | None


@dataclass(frozen=True, slots=True)
class SliceTable:
    """The slices by one column, the largest gap first, those of fewer than 10 samples last.

    `gap` is the estimator's over all samples: the mean of the slices' gaps, weighted by n.
    """

    column: str
    estimator: Literal["loo", "tic"]
    gap: float
    rows: tuple[SliceRow, ...]


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """How the curvature was factorised."""

    name: str
    exact: bool
    reason: str
    device: str
    dtype: str
    seconds: float
    peak_bytes: int  # planned peak of the solver's own arrays, stated before the work
    notes: tuple[str, ...] = ()  # what went otherwise than planned, tolerances missed


@dataclass(frozen=True, slots=True)
class Samples:
    """Per-sample contributions, each (n,) float64; their mean is the gap by that estimator.

    NaN throughout where they do not exist, as those but nll with solver=lanczos.
    """

    nll: NDArray[np.float64]
    leverage: NDArray[np.float64]
    tic: NDArray[np.float64]
    loo: NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class UnseenLabels:
    """What held-out labels say of the stated probabilities, one row per sample.

    keys: of the samples' inputs (`flataudit.tensors.sample_keys`), (m,) uint64; log_ratios: of
    `flataudit.calibration.eprocess`, (m, slopes) float64, nats.
    """

    keys: NDArray[np.uint64]
    log_ratios: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The whole answer. `to_dict()` is the JSON of the contract; `display` feeds the figures.

    `display` holds plain JSON values only (reliability bins, spectrum, influential samples).
    """

    model: ModelInfo
    data: DataInfo
    family: FamilyName
    dispersion: Dispersion | None
    penalty: PenaltyInfo
    train: Fit
    heldout: HeldoutFit | None
    calibration: Calibration
    estimates: Estimates
    premise: Premise | None
    gap: Gap
    predicted_test_nll: Interval
    predicted_accuracy: Interval | None
    confidence: ConfidenceLevel
    warnings: tuple[AuditWarning, ...]
    solver: SolverInfo
    samples: Samples = dataclasses.field(repr=False)
    display: Mapping[str, Any] = dataclasses.field(repr=False, default_factory=dict)
    shift: Shift | None = None  # held-out against training inputs
    sensitivity: tuple[PenaltyPoint, ...] | None = None
    confidence_reasons: tuple[str, ...] = ()  # why the confidence is not ok
    classes: SliceTable | None = None  # by label; None for regression
    slices: tuple[SliceTable, ...] = ()  # by the columns asked for
    # The e-process over held-out labels (`flataudit.calibration.eprocess`); in a report from a
    # store over all audits of the model, else over this one. None without held-out labels.
    fresh_labels: Mapping[str, Any] | None = None
    unseen: UnseenLabels | None = dataclasses.field(repr=False, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values: numbers are float64 or null, never NaN or inf.

        Returns:
            A dict that `json.dumps(..., allow_nan=False)` accepts, with the keys of the contract.
        """
        arrays = ("samples", "display", "unseen")
        fields = (f.name for f in dataclasses.fields(self) if f.name not in arrays)
        return {"schema": SCHEMA} | {name: to_json(getattr(self, name)) for name in fields}


def to_json(value: Any) -> Any:
    """Plain JSON values from dataclasses, arrays and numpy scalars; non-finite becomes None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return to_json(value.tolist())
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, np.generic):
        return to_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
