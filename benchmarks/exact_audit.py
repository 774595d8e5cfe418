"""How long does a whole exact audit take, in Choleskys of the same size?

Each case runs in a process of its own: a network trained on Fashion-MNIST, audited by the dual
solver with leave-one-out and calibration, beside `torch.linalg.cholesky` of an N x N matrix,
N = n (K - 1), in the same process and with the same threads. The limit is about 2: a Cholesky and a
triangular inverse. The recalibrated soft rank, a second factorisation where the decision list asks
for one, is timed apart.

    python benchmarks/exact_audit.py [--data FOLDER] [--quick]

Fashion-MNIST's idx files are read from FOLDER (Debian: `apt-get install dataset-fashion-mnist`).
Writes benchmarks/exact_audit.json.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
DATA = Path("/usr/share/datasets/fashion-mnist")
CASES = [("mlp", 500), ("lenet", 500), ("mlp", 2000), ("lenet", 2000)]
BOUNDS = {"mlp": 3.0, "lenet": 3.6}  # at n = 2,000
PENALTY = 1e-3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--quick", action="store_true", help="n = 500 alone")
    arguments.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.case:
        print(json.dumps(measure(given.case[0], int(given.case[1]), given.data)))
        return
    rows = []
    for name, n in CASES:
        if given.quick and n > 500:
            continue
        command = [sys.executable, __file__, "--data", str(given.data), "--case", name, str(n)]
        row = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        rows.append(row)
        print(
            f"{name:6} n = {n:5} N = {row['n_rows']:6}: audit {row['audit_seconds']:7.2f} s,"
            f" Cholesky {row['cholesky_seconds']:6.2f} s, ratio {row['ratio']:.2f},"
            f" peak {row['peak_bytes'] / 1e9:.1f} GB (planned {row['planned_bytes'] / 1e9:.1f})",
            flush=True,
        )
    if not given.quick:
        result = {"machine": machine(), "bounds_at_n_2000": BOUNDS, "cases": rows}
        (HERE / "exact_audit.json").write_text(json.dumps(result, indent=2) + "\n")


def measure(name: str, n: int, folder: Path) -> dict[str, object]:
    """One case: the audit's stages and the Cholesky, in this process."""
    import torch

    import flataudit
    from flataudit.calibration import calibration_errors

    x, y = fashion_mnist(folder, n)
    model, steps = train(name, x, y)
    # The first use of netcal imports it; that is not part of the audit.
    calibration_errors(torch.rand(50).double().numpy(), (torch.rand(50) < 0.5).numpy())
    n_rows = 9 * n
    marks: list[tuple[str, float]] = []
    started = time.perf_counter()
    report = flataudit.audit(
        model,
        (x, y),
        penalty=PENALTY,
        solver="dual",
        progress=lambda stage: marks.append((stage, time.perf_counter())),
    )
    ended = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    choleskys = [cholesky_seconds(n_rows) for _ in range(2)]
    stages = {
        stage: stop - start
        for (stage, start), stop in zip(marks, [t for _, t in marks[1:]] + [ended], strict=True)
    }
    apart = stages.get("recalibrating", 0.0)
    cholesky = statistics.mean(choleskys)
    return {
        "case": name,
        "n": n,
        "n_rows": n_rows,
        "n_params": report.model.n_params,
        "training_steps": steps,
        "audit_seconds": ended - started - apart,
        "recalibrated_seconds": apart,
        "stage_seconds": stages,
        "cholesky_seconds": cholesky,
        "cholesky_runs": choleskys,
        "ratio": (ended - started - apart) / cholesky,
        "soft_rank": report.estimates.soft_rank.rank,
        "peak_bytes": peak,
        "planned_bytes": report.solver.peak_bytes,
        "threads": torch.get_num_threads(),
    }


def cholesky_seconds(size: int) -> float:
    """One torch.linalg.cholesky of a random positive definite matrix."""
    import torch

    matrix = torch.randn(size, size, dtype=torch.float64)
    matrix = (matrix + matrix.T).div_(2 * size**0.5)
    matrix.diagonal().add_(3.0)
    started = time.perf_counter()
    torch.linalg.cholesky(matrix)
    return time.perf_counter() - started


def fashion_mnist(folder: Path, n: int):  # type: ignore[no-untyped-def]
    """The first n training images (n, 1, 28, 28) in [0, 1] and labels."""
    import numpy as np
    import torch

    def read(name: str, offset: int):  # type: ignore[no-untyped-def]
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=offset)

    images = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:n]
    labels = read("train-labels-idx1-ubyte.gz", 8)[:n]
    return (
        torch.from_numpy(images.astype(np.float64) / 255.0),
        torch.from_numpy(labels.astype(np.int64)),
    )


def train(name: str, x, y):  # type: ignore[no-untyped-def]
    """A few epochs of SGD; returns the network and its number of steps."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    if name == "mlp":
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
    x = x.float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=PENALTY)
    steps = 0
    for _ in range(20):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            steps += 1
    return model, steps


def machine() -> dict[str, object]:
    """What the numbers were measured on."""
    import torch

    named = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": named[0] if named else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
