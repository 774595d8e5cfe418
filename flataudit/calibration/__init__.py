"""Are the model's probabilities honest: metrics, tests and the verdict drawn from them.

`metrics` holds the published numbers (ECE, MCE, ACE by netcal where it is installed), `tests`
the statistics with known null distributions, `verdict` what is concluded from them. The verdict
never depends on netcal: a plug-in ECE below .05 rejects many perfectly calibrated models.
"""

from __future__ import annotations

from flataudit.calibration.metrics import (
    CalibrationErrors,
    calibration_errors,
    ece_if_calibrated,
    expected_calibration_error,
    pit_display,
    reliability_display,
    top_label,
)
from flataudit.calibration.saturation import is_saturated, saturation_flags
from flataudit.calibration.tests import gaussian_pit, poisson_pit
from flataudit.calibration.verdict import (
    CalibrationPolicy,
    assess_classification,
    assess_gaussian,
    assess_poisson,
)

__all__ = [
    "CalibrationErrors",
    "CalibrationPolicy",
    "assess_classification",
    "assess_gaussian",
    "assess_poisson",
    "calibration_errors",
    "ece_if_calibrated",
    "expected_calibration_error",
    "gaussian_pit",
    "is_saturated",
    "pit_display",
    "poisson_pit",
    "reliability_display",
    "saturation_flags",
    "top_label",
]
