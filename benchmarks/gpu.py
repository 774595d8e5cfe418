"""What one graphics card takes: the exact solver up to N = 60,000, products on a ResNet-18.

    python benchmarks/gpu.py [--device cuda] [--quick]

exact      the dual solver on an MLP 784-100-10 (untrained: cost depends on sizes alone), with
           N = n (K - 1) rows, beside a Cholesky of the same size in place; peak memory beside what
           was planned.
products   blocks of 8 vectors through the matrix-free operator of a ResNet-18 (11 million
           parameters) on 50,000 images of 32 x 32, in forward and backward passes, in float64 and
           in float32 with its error.

Reckoned at some ten minutes on a card of 80 GB; it has not run on one yet. A point that does not
fit is recorded as such. Writes benchmarks/gpu.json point by point, nothing without a card.
--quick: small sizes, nothing is written.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.cases import N_CLASSES, PENALTY, Residual, mlp
from benchmarks.common.machine import machine
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import Categorical
from flataudit.inputs import Inputs
from flataudit.memory import available_bytes
from flataudit.penalty import from_argument
from flataudit.solvers import SOLVERS, is_out_of_memory
from flataudit.solvers.operator import CurvatureOperator
from flataudit.solvers.triangular import cholesky_

RESULT = Path(__file__).parent / "gpu.json"
SAMPLES = (1_000, 2_000, 5_000, 6_667)  # N = 9,000 to 60,003
IMAGES = 50_000
VECTORS = 8
BATCH = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        print("No CUDA device; nothing is measured.")
        return
    device = torch.device(given.device)
    result: dict[str, Any] = {"machine": machine(torch.get_num_threads()), "points": []}
    if device.type == "cuda":
        result["card"] = torch.cuda.get_device_name(device)
    samples, images, width = ((20, 40), 20, 4) if given.quick else (SAMPLES, IMAGES, 64)
    exact(20, device)  # first calls, which are not counted
    runs = [("exact", n, lambda n=n: exact(n, device)) for n in samples]
    runs.append(("products", images, lambda: products(images, width, device)))
    for part, n, run in runs:
        point = {"part": part, "n": n, **attempted(run)}
        print(json.dumps(point), flush=True)
        result["points"].append(point)
        if not given.quick:
            RESULT.write_text(json.dumps(result, indent=1) + "\n")


def attempted(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or that it does not fit."""
    try:
        return {"status": "done", **run()}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"status": "ran out of memory"}


def exact(n: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak bytes of the dual solver, and of the Cholesky inside."""
    torch.manual_seed(0)
    x, y = torch.rand(n, 1, 28, 28, dtype=torch.float64), torch.arange(n) % N_CLASSES
    problem = problem_of(mlp(), x, y, device)
    penalty = from_argument(PENALTY, problem.params)
    row = {
        "n_rows": problem.n_rows, "n_params": problem.n_params,
        "available_bytes": available_bytes(device),
        "planned_bytes": SOLVERS["dual"].plan(problem, penalty),
    }  # fmt: skip
    row |= measured(lambda: SOLVERS["dual"].solve(problem, penalty), device)
    matrix = torch.full((problem.n_rows,) * 2, 1e-6, dtype=torch.float64, device=device)
    matrix.diagonal().fill_(1.0)
    cholesky = measured(lambda: cholesky_(matrix), device)
    return row | {f"cholesky_{key}": value for key, value in cholesky.items()}


def products(n: int, width: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak bytes of a block of products, beside a pass over the same data."""
    torch.manual_seed(0)
    x, y = torch.rand(n, 3, 32, 32, dtype=torch.float64), torch.arange(n) % N_CLASSES
    problem = problem_of(resnet18(width), x, y, device)
    penalty = from_argument(PENALTY, problem.params)
    row: dict[str, Any] = {
        "n_rows": problem.n_rows, "n_params": problem.n_params, "vectors": VECTORS
    }  # fmt: skip
    v = torch.randn(problem.n_rows, VECTORS, dtype=torch.float64).to(device)
    reference = None
    for dtype in (torch.float64, torch.float32):
        label = str(dtype).removeprefix("torch.")
        model = copy.deepcopy(problem.model).to(dtype)
        both = measured(lambda m=model, d=dtype: one_pass(problem, m, d), device)
        operator = CurvatureOperator(problem, penalty, dtype=dtype)
        got: list[Tensor] = []
        block = measured(lambda o=operator, g=got: g.append(o(v)), device)
        reference = got[0] if reference is None else reference
        row[label] = {
            "pass_seconds": both["seconds"],
            **block,
            "passes_per_vector": block["seconds"] / VECTORS / both["seconds"],
            "error": float((got[0] - reference).norm() / reference.norm()),
        }
    return row


def problem_of(model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> Problem:
    inputs = Inputs.of(x).to(torch.float64, device)
    return make_problem(model.double().eval().to(device), inputs, y.to(device), Categorical())


def one_pass(problem: Problem, model: nn.Module, dtype: torch.dtype) -> None:
    """Forward and backward through the whole data, in batches."""
    for at in range(0, problem.n_samples, BATCH):
        part = problem.x[at : at + BATCH].to(dtype)
        loss = nn.functional.cross_entropy(part.call(model), problem.y[at : at + BATCH])
        torch.autograd.grad(loss, list(model.parameters()))


def measured(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds, and on a card the peak of the bytes allocated, what was there before included."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    found = {"seconds": time.perf_counter() - started}
    return found | {"peak_bytes": torch.cuda.max_memory_allocated(device)} if cuda else found


def resnet18(width: int = 64) -> nn.Module:
    """Eight residual blocks behind a stem of 3 x 3, as for images of 32 x 32."""
    blocks, inside = [], width
    for outside, stride in ((1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1), (8, 2), (8, 1)):
        blocks.append(Residual(inside, outside * width, stride))
        inside = outside * width
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), *blocks,
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, N_CLASSES),
    )  # fmt: skip


if __name__ == "__main__":
    main()
