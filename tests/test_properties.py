"""Whatever the input, an audit gives finite numbers or a named error.

The examples are drawn afresh from the same seed in each run (derandomize), so a failure repeats.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flataudit import audit
from flataudit.errors import FlatauditError, InputError
from flataudit.results import AuditReport
from flataudit.shift import input_shift
from flataudit.tensors import as_pair

BOUNDED = {
    "derandomize": True,
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
PENALTIES = (0.0, 1e-300, 1e-12, 1e-3, 1.0, 1e12, 1e300, "auto")
RECORDS = (
    None,
    "optimizer=sgd,sum_lr=3,momentum=0.9",
    "optimizer=sgd,sum_lr=1e-300",
    "optimizer=adam,sum_lr=1e300,batch_size=2",
    "optimizer=adamw,lr=0.1,steps=5,batch_size=1,weight_decay=1",
    "optimizer=converged",
)


def assert_finite(value: Any, path: str = "report") -> None:
    """No float anywhere in a report is NaN or infinite; what does not exist is None."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            if field.name not in ("samples", "display"):
                assert_finite(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for key, item in value.items():
            assert_finite(item, f"{path}.{key}")
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            assert_finite(item, f"{path}[{i}]")
    elif isinstance(value, float):
        assert math.isfinite(value), f"{path} is {value}"


def audited(*args: Any, **options: Any) -> AuditReport | None:
    """The report, checked; None where the audit refuses by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            report = audit(*args, **options)
        except FlatauditError as error:
            message = str(error)
        else:
            message = ""
    if message:
        assert "\n" not in message
        assert message.startswith(("expected", "unknown")), message
        return None
    assert_finite(report)
    json.dumps(report.to_dict(), allow_nan=False)
    json.dumps(report.display, allow_nan=False)
    assert np.isfinite(report.samples.nll).all()
    assert np.isfinite(report.samples.leverage).all()
    assert (report.estimates.loo is None) or np.isfinite(report.samples.loo).all()
    return report


@st.composite
def problems(draw: st.DrawFn, family: str) -> tuple[nn.Module, tuple[Tensor, Tensor], dict]:
    """A network, its data and options; everything but the shape of things comes from one seed."""
    n, p = draw(st.integers(2, 14)), draw(st.integers(1, 6))
    outputs = 1 if family == "bernoulli" else draw(st.integers(1, 4))
    outputs = max(outputs, 2) if family == "categorical" else outputs
    g = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    x = torch.randn(n, p, generator=g, dtype=torch.float64)
    if draw(st.booleans()):
        x[:, 0] = 3.0  # a constant feature
    if draw(st.booleans()):
        x[1:] = x[:1]  # one row, many times
    x = x * draw(st.sampled_from([1.0, 0.0, 1e-30, 1e4, 1e30]))
    if draw(st.booleans()):
        x = x.to(draw(st.sampled_from([torch.float32, torch.float64])))
    bound = draw(st.integers(1, outputs))  # below the number of outputs: some class is missing
    if family == "categorical":
        y = torch.randint(0, bound, (n,), generator=g)
    elif family == "bernoulli":
        y = torch.randint(0, draw(st.integers(1, 2)), (n,), generator=g)
    elif family == "poisson":
        y = torch.randint(0, draw(st.sampled_from([1, 5, 10_000])), (n, outputs), generator=g)
    else:
        y = torch.randn(n, outputs, generator=g, dtype=torch.float64)
        y = y * draw(st.sampled_from([0.0, 1e-200, 1.0, 1e150]))
    scale = draw(st.sampled_from([0.0, 1e-4, 1.0, 1e4]))
    layers = [nn.Linear(p, outputs, bias=draw(st.booleans()))]
    if draw(st.booleans()):
        layers = [nn.Linear(p, 2), nn.Tanh(), nn.Linear(2, outputs)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=g))
    options = {
        "penalty": draw(st.sampled_from(PENALTIES)),
        "solver": draw(st.sampled_from(["auto", "primal", "dual"])),
        "training": draw(st.sampled_from(RECORDS)),
        "recalibrate": draw(st.booleans()),
        "heldout": (x, y) if draw(st.booleans()) else None,
    }
    return model, (x, y), options


@pytest.mark.parametrize("family", ["categorical", "bernoulli", "gaussian", "poisson"])
def test_any_problem(family):
    @settings(max_examples=100, **BOUNDED)
    @given(problems(family))
    def check(problem):
        model, data, options = problem
        audited(model, data, family=family, **options)

    check()


@settings(max_examples=40, **BOUNDED)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 10),
    vocabulary=st.integers(1, 5),
    penalty=st.sampled_from(PENALTIES),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_tokens(seed, n, vocabulary, penalty, dtype):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, vocabulary, (n, 3), generator=g).to(dtype)
    y = torch.randint(0, 3, (n,), generator=g)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = nn.Sequential(nn.Embedding(vocabulary, 2), nn.Flatten(), nn.Linear(6, 3))
    audited(words, (x, y), heldout=(x[:2], y[:2]), penalty=penalty)


DTYPES = ["float16", "float32", "float64", ">f8", "int8", "uint8", "int64", "uint64", "bool"]


@settings(max_examples=80, **BOUNDED)
@given(
    shape=st.lists(st.integers(0, 4), min_size=0, max_size=4),
    dtype=st.sampled_from([*DTYPES, "complex64", "U3", "O", "datetime64[s]"]),
    labels=st.sampled_from([*DTYPES, "U3", "S3", "O", "datetime64[s]"]),
    family=st.sampled_from(["auto", "categorical", "bernoulli", "gaussian", "poisson"]),
    outputs=st.integers(1, 3),
    column=st.booleans(),
)
def test_any_shape_and_dtype(shape, dtype, labels, family, outputs, column):
    """Arrays of all kinds through a network that takes a batch of vectors."""
    n = shape[0] if shape else 3
    x = (np.arange(math.prod(shape)).reshape(shape) % 3).astype(dtype)
    y = (np.arange(n) % 2).astype(labels)
    width = math.prod(shape[1:]) or 1
    model = nn.Sequential(nn.Flatten(), nn.Linear(width, outputs))
    audited(model, (x, y[:, None] if column else y), family=family, penalty=0.1)


@settings(max_examples=60, **BOUNDED)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 30),
    m=st.integers(1, 30),
    p=st.integers(1, 5),
    scale=st.sampled_from([0.0, 1e-300, 1.0, 1e300]),
    levels=st.sampled_from([None, 1, 2, 300]),
)
def test_any_inputs_can_be_compared(seed, n, m, p, scale, levels):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n + m, p)) if levels is None else rng.integers(0, levels, (n + m, p))
    x = torch.from_numpy(x if levels else x * scale)
    found = input_shift(x[:n], x[n:], seed=seed)
    assert_finite(found)
    assert 0 < found.p_value <= 1
    assert 0 <= found.worst_feature < p
    assert 0 <= found.n_features_shifted <= p


def test_inputs_without_a_feature_are_refused():
    with pytest.raises(InputError, match="expected at least one feature in train x"):
        as_pair((np.zeros((3, 0)), [0, 1, 0]), "train")
