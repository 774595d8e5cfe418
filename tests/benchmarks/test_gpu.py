"""The benchmark for a graphics card runs, here on the processor and on the stand-in for a card."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu
from tests.second_device import second_device


def test_exact_and_products():
    cpu = torch.device("cpu")
    point = gpu.exact(20, cpu)
    assert (point["n_rows"], point["n_params"]) == (180, 79_510)
    assert min(point[key] for key in ("seconds", "cholesky_seconds", "planned_bytes")) > 0
    point = gpu.products(12, 2, cpu)
    assert point["float64"]["error"] == 0.0
    assert 1e-9 < point["float32"]["error"] < 1e-5


def test_on_another_device():
    with second_device() as device:
        assert gpu.exact(10, device)["n_rows"] == 90


def test_the_networks_size():
    assert sum(p.numel() for p in gpu.resnet18().parameters()) == pytest.approx(11.2e6, rel=0.01)


def test_what_does_not_fit_is_a_result():
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert gpu.attempted(full) == {"status": "ran out of memory"}
