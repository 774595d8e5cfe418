"""Nothing is made or left on the wrong device: audits on a second one (`tests.second_device`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from flataudit import audit
from flataudit.results import AuditReport
from flataudit.solvers import MATRIX_FREE
from flataudit.solvers.lanczos import Lanczos
from flataudit.solvers.sampling import Sampling
from tests.cases import BY_NAME, build
from tests.second_device import DEVICE, second_device

MODELS = [
    "softmax_free_bias",
    "poisson",
    "gaussian_outputs",
    "mlp_elementwise",
    "convolutions",
    "layernorm",
    "batchnorm",
    "attention",
    "embedding",
    "text_by_name",
]


@pytest.fixture(autouse=True)
def there(monkeypatch):
    """Where the name of the device is that of the second one."""

    def resolve(name: str) -> torch.device:
        return DEVICE if name == "second" else torch.device("cpu")

    monkeypatch.setattr("flataudit.preparation.resolve_device", resolve)
    # To look at every line of theirs, not at what they find.
    monkeypatch.setitem(MATRIX_FREE, "lanczos", Lanczos(tolerance=0.03, first=2, further=4))
    monkeypatch.setitem(MATRIX_FREE, "sampling", Sampling(tolerance=0.1, block=32, most=64))


def audited(name: str, device: str, **options: Any) -> AuditReport:
    case = BY_NAME[name]
    built = build(case)
    heldout = (built.x[:6], built.y[:6]) if isinstance(built.x, torch.Tensor) else None
    return audit(
        built.model,
        (built.x, built.y),
        heldout=heldout,
        family=case.family,
        penalty={key: float(d.mean()) for key, d in built.penalty.items()},
        dispersion=case.dispersion,
        device=device,
        **options,
    )


def same(found: AuditReport, wanted: AuditReport) -> None:
    assert (found.solver.device, wanted.solver.device) == (DEVICE.type, "cpu")
    for field in ("nll", "leverage", "tic", "loo"):
        one, other = (getattr(report.samples, field) for report in (found, wanted))
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    assert found.gap.value == pytest.approx(wanted.gap.value, rel=1e-9)
    assert found.calibration.verdict == wanted.calibration.verdict


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("name", MODELS)
def test_exact_audit(name, solver):
    options = {"solver": solver, "recalibrate": True, "sensitivity": True}
    wanted = audited(name, "cpu", **options)
    with second_device():
        found = audited(name, "second", **options)
    same(found, wanted)


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
@pytest.mark.parametrize("name", ["softmax_free_bias", "mlp_elementwise", "batchnorm", "embedding"])
def test_matrix_free_audit_and_its_resumption(name, solver, tmp_path):
    options = {"solver": solver, "sensitivity": False}
    wanted = audited(name, "cpu", **options)
    ticks = []

    def interrupt(done: int, expected: int) -> None:
        ticks.append(done)
        if len(ticks) == 2:
            raise KeyboardInterrupt

    with second_device():
        with pytest.raises(KeyboardInterrupt):
            audited(name, "second", checkpoint=tmp_path, steps=interrupt, **options)
        assert list(tmp_path.iterdir())
        found = audited(name, "second", checkpoint=tmp_path, **options)
    same(found, wanted)


def test_the_second_device_refuses_what_a_gpu_would():
    with second_device() as device:
        there, here = torch.ones(3, 2, device=device), torch.ones(3, 2)
        for mixed in (lambda: there + here, lambda: here @ there.T, lambda: here[there[:, 0] > 0]):
            with pytest.raises(RuntimeError, match="one device"):
                mixed()
        with pytest.raises((RuntimeError, TypeError)):
            there.numpy()
        with pytest.raises(RuntimeError, match="change of shape in place"):
            there.unsqueeze_(0)
        assert there.device == device
        assert there[torch.tensor([0, 2])].device == device
        assert (there + torch.tensor(1.0)).sum().item() == 12.0
        assert there.cpu().numpy().sum() == 6.0
