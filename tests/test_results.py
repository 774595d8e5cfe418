"""The report's JSON: the contract's keys, and numbers that exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from flataudit.results import SEVERITIES, Interval, to_json


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (Interval(1.0, math.nan, math.inf), {"value": 1.0, "low": None, "high": None}),
        (np.float64(2.5), 2.5),
        (np.float32("nan"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1.0, -np.inf], [np.nan, 2.0]]), [[1.0, None], [None, 2.0]]),
        ((1, "a", None, False), [1, "a", None, False]),
        ({"a": (math.nan,), 3: {"b": np.int8(1)}}, {"a": [None], "3": {"b": 1}}),
        (float("-inf"), None),
    ],
)
def test_to_json(value, wanted):
    found = to_json(value)
    assert found == wanted
    json.dumps(found, allow_nan=False)


def test_severities_rise():
    assert SEVERITIES == ("none", "info", "warn", "high", "critical")
