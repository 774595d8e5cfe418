"""How cost grows with n, P and K, beside the least it could be.

    python benchmarks/scaling.py [--data FOLDER] [--again]

exact     the dual solver (Gram, Cholesky, inverse, all three estimates) against one Cholesky of the
          same size N = n (K - 1), over n, over P (width of the MLP) and over K; the primal solver
          against a Cholesky of size P, over P.
choice    both exact solvers on logistic regressions, CPU time beside the operations each counts
          before it starts (`solver.work`), by which `auto` chooses, on both sides of the crossover.
product   one product of the matrix-free operator with one vector, in blocks of 8, against one
          forward and backward pass over the same data, over n and over P.

Each point is measured in a process of its own, in CPU-seconds on one thread. Points are written to
benchmarks/scaling.json one by one; what is there already is not measured again without --again.
Exponents are least-squares slopes of log cost on log size over the points of a series.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common.cases import DATA, PENALTY, fashion_mnist
from benchmarks.common.machine import machine
from benchmarks.common.measure import measure

RESULT = Path(__file__).parent / "scaling.json"
# series: (kind, what varies, the points as n, hidden width, K)
SERIES: dict[str, tuple[str, str, list[tuple[int, int, int]]]] = {
    "dual-n": ("dual", "n_rows", [(n, 100, 10) for n in (125, 250, 500, 1000)]),
    "dual-p": ("dual", "n_params", [(250, h, 10) for h in (25, 100, 400, 1600)]),
    "dual-k": ("dual", "n_rows", [(250, 100, k) for k in (3, 5, 9, 17)]),
    "primal-p": ("primal", "n_params", [(1000, h, 10) for h in (1, 2, 4)]),
    "choice": (
        "choice",
        "n_rows",
        [  # n, side of the image, K
            *[(n, 14, 10) for n in (125, 250, 500, 1000)],
            *[(n, 20, 10) for n in (250, 500, 1000)],
        ],
    ),
    "product-n": ("product", "n", [(n, 100, 10) for n in (500, 1000, 2000, 4000)]),
    "product-p": ("product", "n_params", [(1000, h, 10) for h in (25, 100, 400, 1600)]),
}
VECTORS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        kind, *sizes = given.child
        measured = choice if kind == "choice" else partial(point, kind)
        print(json.dumps(measured(*map(int, sizes), given.data)))
        return
    found = json.loads(given.out.read_text()) if given.out.exists() else {"points": []}
    if found["points"] and found["machine"] != machine(1) and not given.again:
        print("The points there are from another machine or other versions; measure with --again.")
        return
    for series in given.series:
        kind, varies, sizes = SERIES[series]
        for n, hidden, k in sizes:
            key = {"series": series, "n": n, "hidden": hidden, "k": k}
            same = [p for p in found["points"] if key.items() <= p.items()]
            if same and not given.again:
                continue
            row = measure(
                ["--data", str(given.data), "--child", kind, str(n), str(hidden), str(k)],
                threads=1,
                module="benchmarks.scaling",
            )
            points = [p for p in found["points"] if p not in same]
            found = {
                "machine": machine(1),
                "penalty": PENALTY,
                "vectors": VECTORS,
                "points": [*points, {**key, "varies": varies, **row}],
            }
            given.out.write_text(json.dumps(found, indent=1) + "\n")
            print(series, key, {k: row.get(k) for k in ("cpu_seconds", "limit_cpu_seconds")})


def exponents(points: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By series: slopes of log CPU time, of the limit's, and of log peak memory above the start."""
    found: dict[str, dict[str, float]] = {}
    for series in SERIES:
        mine = [p for p in points if p["series"] == series and p["status"] == "done"]
        if len(mine) < 3 or series == "choice":
            continue
        sizes = [float(p[p["varies"]]) for p in mine]
        found[series] = {
            "time": slope(sizes, [p["cpu_seconds"] for p in mine]),
            "limit": slope(sizes, [p["limit_cpu_seconds"] for p in mine]),
            "memory": slope(sizes, [p["peak_bytes"] - p["base_bytes"] for p in mine]),
        }
    return found


def slope(x: list[float], y: list[float]) -> float:
    """Least-squares slope of log y on log x; nan where a y is not positive.

    >>> round(slope([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]), 9)
    2.0
    """
    if min(y) <= 0:
        return math.nan
    u, v = [math.log(a) for a in x], [math.log(b) for b in y]
    middle, level = sum(u) / len(u), sum(v) / len(v)
    return sum((a - middle) * (b - level) for a, b in zip(u, v, strict=True)) / sum(
        (a - middle) ** 2 for a in u
    )


def choice(n: int, side: int, k: int, data: Path) -> dict[str, Any]:
    """Both exact solvers in this process, on a linear model of images of that side."""
    import torch
    from torch import nn

    from benchmarks.common.measure import clocked
    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical
    from flataudit.inputs import Inputs
    from flataudit.penalty import from_argument
    from flataudit.solvers import SOLVERS

    def problem_of(n: int, side: int):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        x = nn.functional.adaptive_avg_pool2d(fashion_mnist(data, n)[0], side)
        model = nn.Sequential(nn.Flatten(), nn.Linear(side**2, k)).double().eval()
        return make_problem(model, Inputs.of(x), torch.arange(n) % k, Categorical())

    problem, small = problem_of(n, side), problem_of(20, 2)
    penalty = from_argument(PENALTY, problem.params)
    row: dict[str, Any] = {
        "status": "done", "n_rows": problem.n_rows, "n_params": problem.n_params
    }  # fmt: skip
    for name, solver in SOLVERS.items():
        solver.solve(small, from_argument(PENALTY, small.params))
        _, clock = clocked(lambda s=solver: s.solve(problem, penalty), lambda: None)  # type: ignore[misc]
        row[name] = {"work": solver.work(problem, penalty), **clock}
    row["cpu_seconds"] = min(row[name]["cpu_seconds"] for name in SOLVERS)
    return row


def point(kind: str, n: int, hidden: int, k: int, data: Path) -> dict[str, Any]:
    """One point in this process: an untrained MLP 784-hidden-k with random labels 0..k-1.

    Cost depends on sizes alone; the weights' values do not matter to it.
    """
    import torch
    from torch import nn

    from benchmarks.common.measure import clocked
    from flataudit import estimates
    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical
    from flataudit.inputs import Inputs
    from flataudit.penalty import from_argument
    from flataudit.solvers import SOLVERS
    from flataudit.solvers.operator import CurvatureOperator

    def problem_of(n: int, hidden: int, k: int):  # type: ignore[no-untyped-def]
        torch.manual_seed(0)
        x, _ = fashion_mnist(data, n)
        y = torch.arange(n) % k
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, k))
        return make_problem(model.double().eval(), Inputs.of(x), y, Categorical())

    def work(problem):  # type: ignore[no-untyped-def]
        penalty = from_argument(PENALTY, problem.params)
        if kind == "product":
            operator = CurvatureOperator(problem, penalty)
            block = torch.randn(problem.n_rows, VECTORS, dtype=torch.float64)
            return lambda: operator(block)
        v = problem.factor.residual

        def exact() -> None:
            variance = SOLVERS[kind].solve(problem, penalty)
            estimates.soft_rank(variance), estimates.tic(variance, v)
            estimates.loo(variance, v, problem.family, problem.outputs, problem.y)

        return exact

    def limit(problem):  # type: ignore[no-untyped-def]
        if kind == "product":
            x, y = problem.x.parts[0], problem.y
            loss = nn.CrossEntropyLoss()
            return lambda: [  # in batches, as memory has it for either
                torch.autograd.grad(loss(problem.model(a), b), list(problem.params.values()))
                for a, b in zip(x.split(500), y.split(500), strict=True)
            ]
        size = problem.n_rows if kind == "dual" else problem.n_params
        matrix = torch.randn(size, size, dtype=torch.float64)
        matrix = (matrix + matrix.T).div_(2 * size**0.5)
        matrix.diagonal().add_(3.0)
        return lambda: torch.linalg.cholesky(matrix)

    work(problem_of(20, 2, 3))()
    problem = problem_of(n, hidden, k)
    _, clock = clocked(work(problem), lambda: None)
    _, least = clocked(limit(problem), lambda: None)
    return {
        "status": "done",
        "n_rows": problem.n_rows,
        "n_params": problem.n_params,
        **clock,
        "limit_cpu_seconds": least["cpu_seconds"],
        "limit_wall_seconds": least["wall_seconds"],
    }


if __name__ == "__main__":
    main()
