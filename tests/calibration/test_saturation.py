"""Saturation: each sign alone, what is not known, and how many signs count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flataudit.calibration import is_saturated, saturation_flags
from flataudit.errors import InputError

SATURATED = {
    "accuracy": 1.0,
    "nll": 1e-4,
    "log_p": np.log(np.tile([0.9999, 0.0001], (100, 1))),
    "labels": np.zeros(100),
    "trace_ratio": 10.0,
    "slope": 4.0,
}
HEALTHY = {
    "accuracy": 0.9,
    "nll": 0.3,
    "log_p": np.log(np.tile([0.9, 0.1], (100, 1))),
    "labels": np.arange(100) < 10,
    "trace_ratio": 1.0,
    "slope": 1.0,
}


def test_saturation_flags():
    names = ("accuracy", "nll", "curvature", "residuals", "trace_ratio", "slope")
    assert saturation_flags(**SATURATED) == names
    assert saturation_flags(**HEALTHY) == ()
    for name in ("accuracy", "nll", "trace_ratio", "slope"):
        assert saturation_flags(**(HEALTHY | {name: SATURATED[name]})) == (name,)
    assert saturation_flags(
        **(HEALTHY | {"log_p": SATURATED["log_p"], "labels": np.zeros(100)})
    ) == (
        "curvature",
        "residuals",
    )
    for ratio in (0.2, math.nan, math.inf):
        assert saturation_flags(**(HEALTHY | {"trace_ratio": ratio})) == ("trace_ratio",)
    assert saturation_flags(**(HEALTHY | {"trace_ratio": None, "slope": None})) == ()
    assert "slope" in saturation_flags(**(SATURATED | {"slope": None}))
    assert not is_saturated(("slope",))
    assert is_saturated(("accuracy", "slope"))


def test_probabilities_are_checked():
    with pytest.raises(InputError, match="expected"):
        saturation_flags(**(HEALTHY | {"log_p": np.full((100, 2), 3.0)}))
