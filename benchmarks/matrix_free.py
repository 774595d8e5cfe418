"""How exact are the matrix-free solvers, and what does a product with their operator cost?

Networks trained on Fashion-MNIST (those of exact_audit.py), n = 500, against the exact dual solver:

accuracy   lanczos on the MLP and LeNet at penalties 1e-2, 1e-3 and 1e-4, over seeds: the error, the
           stated error (1.96 standard errors of the probes plus the truncation), and how often the
           former lies inside. Here the operator is the Gram matrix, formed once: the numbers are
           the same to rounding and only the probes' statistics are studied.
sampling   soft rank, TIC and leave-one-out of the sampling solver with the real operator.
products   one product per vector in units of a forward and backward pass over the same data, for
           blocks of vectors, and the same with float32 arithmetic together with its error.
memory     peak of a block of products above the process before it, against chunk size, n and P.

    python benchmarks/matrix_free.py [--data FOLDER] [--seeds 10] [--part PART]

Writes benchmarks/matrix_free.json, part by part.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from exact_audit import DATA, fashion_mnist, machine, train

HERE = Path(__file__).parent
OUTPUT = HERE / "matrix_free.json"
NETWORKS = ("mlp", "lenet")
PENALTIES = (1e-2, 1e-3, 1e-4)
N = 500


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--seeds", type=int, default=10, help="per network and penalty")
    arguments.add_argument("--part", choices=sorted(PARTS), action="append")
    arguments.add_argument("--memory-case", nargs=3, type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.memory_case:
        print(json.dumps(memory_case(*given.memory_case)))
        return
    for part in given.part or list(PARTS):
        found = PARTS[part](given)
        stored = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
        stored |= {"machine": machine(), part: found}
        OUTPUT.write_text(json.dumps(stored, indent=1) + "\n")


def problem_of(name: str, folder: Path, n: int = N):  # type: ignore[no-untyped-def]
    """The fitted network's problem."""
    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical

    x, y = fashion_mnist(folder, n)
    model, _ = train(name, x, y)
    return make_problem(model.double().eval(), x, y, Categorical())


def constant(problem, value: float):  # type: ignore[no-untyped-def]
    import torch

    return {name: torch.full_like(p.detach(), value) for name, p in problem.params.items()}


def accuracy(given: argparse.Namespace) -> dict[str, object]:
    """lanczos over seeds."""
    import torch

    from flataudit import estimates
    from flataudit.curvature.gram import gram
    from flataudit.solvers import SOLVERS, Work
    from flataudit.solvers.lanczos import Lanczos, _Run

    rows, runs = [], []
    for name in NETWORKS:
        problem = problem_of(name, given.data)
        v = problem.factor.residual
        matrix = gram(problem, constant(problem, 1.0)).matrix
        matrix = matrix.triu() + matrix.triu(1).T
        for value in PENALTIES:
            penalty = constant(problem, value)
            found = SOLVERS["dual"].solve(problem, penalty)
            exact = {
                "soft_rank": float(estimates.soft_rank(found).sum()),
                "tic": float(estimates.tic(found, v).sum()),
            }
            here = []
            for seed in range(given.seeds):
                operator = _Dense(problem, matrix / value)
                solver = Lanczos()
                traces = _Run(solver, problem, operator, penalty, Work(seed=seed)).result()
                run = {"network": name, "penalty": value, "seed": seed,
                       "products": operator.applications}  # fmt: skip
                for quantity in exact:
                    trace = getattr(traces, quantity)
                    error = trace.value - exact[quantity]
                    stated = 1.96 * trace.monte_carlo_se + trace.truncation
                    run[quantity] = {
                        "error": error / exact[quantity],
                        "stated": stated / exact[quantity],
                        "monte_carlo_se": trace.monte_carlo_se / exact[quantity],
                        "truncation": trace.truncation / exact[quantity],
                        "inside": abs(error) <= stated,
                    }
                here.append(run)
            runs += here
            row = {"network": name, "penalty": value, "exact": exact,
                   "mean_products": sum(r["products"] for r in here) / len(here)}  # fmt: skip
            for quantity in exact:
                errors = torch.tensor([r[quantity]["error"] for r in here])
                row[quantity] = {
                    "largest_error": float(errors.abs().max()),
                    "mean_error": float(errors.mean()),
                    "rms_error": float(errors.square().mean().sqrt()),
                    "inside": sum(r[quantity]["inside"] for r in here),
                }
            rows.append(row)
            print(json.dumps(row), flush=True)
    total = len(runs)
    summary = {
        quantity: {
            "runs": total,
            "inside": sum(r[quantity]["inside"] for r in runs),
            "within_1_percent": sum(abs(r[quantity]["error"]) <= 0.01 for r in runs),
        }
        for quantity in ("soft_rank", "tic")
    }
    print(json.dumps(summary), flush=True)
    return {"n": N, "seeds": given.seeds, "summary": summary, "cases": rows, "runs": runs}


class _Dense:
    """The operator's interface over a matrix that is already there."""

    def __init__(self, problem, matrix) -> None:  # type: ignore[no-untyped-def]
        self.matrix, self.applications, self.reason = matrix, 0, None
        self.free_basis = matrix.new_zeros(len(matrix), 0)
        self.free_rank, self.trace_free, self.tied = 0, 0.0, []
        self.problem = problem

    def project(self, v):  # type: ignore[no-untyped-def]
        return v

    def __call__(self, v):  # type: ignore[no-untyped-def]
        self.applications += v.shape[1]
        return self.matrix @ v


def sampling(given: argparse.Namespace) -> list[dict[str, object]]:
    """The sampling solver against exact values, with the real operator (the MLP)."""
    from flataudit import estimates
    from flataudit.solvers import SOLVERS, Work
    from flataudit.solvers.sampling import Sampling

    rows = []
    problem = problem_of("mlp", given.data)
    v, y = problem.factor.residual, problem.y
    for value in PENALTIES:
        penalty = constant(problem, value)
        exact = SOLVERS["dual"].solve(problem, penalty)
        for seed in range(2):
            products: list[int] = []
            found = Sampling().solve(
                problem, penalty, Work(seed=seed, tick=lambda a, b, to=products: to.append(a))
            )
            row: dict[str, object] = {"network": "mlp", "penalty": value, "seed": seed,
                                      "products": products[-1],
                                      "truncation": found.truncation}  # fmt: skip
            for name, each in {
                "soft_rank": estimates.measure_soft_rank,
                "tic": lambda c: estimates.measure_tic(c, v),
                "loo": lambda c: _loo(c, v, problem, y),
            }.items():
                got, wanted = each(found), each(exact)
                row[name] = {"error": got.gap / wanted.gap - 1.0,
                             "monte_carlo_se": got.monte_carlo_se / wanted.gap}  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def _loo(curvature, v, problem, y):  # type: ignore[no-untyped-def]
    from flataudit import estimates

    found = estimates.measure_loo(curvature, v, problem.family, problem.outputs, y)
    assert found is not None
    return found[1]


def products(given: argparse.Namespace) -> list[dict[str, object]]:
    """Time of a product per vector over that of a forward and backward pass."""
    import torch

    from flataudit.solvers.operator import CurvatureOperator

    rows = []
    for name in NETWORKS:
        problem = problem_of(name, given.data)
        penalty = constant(problem, 1e-3)
        model, x, y = problem.model, problem.x.parts[0], problem.y

        def both(model=model, x=x, y=y) -> None:  # type: ignore[no-untyped-def]
            for at in range(0, N, 100):
                model.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[at : at + 100]), y[at : at + 100])
                loss.backward()

        for m in (1, 8, 32, 64):
            v = torch.randn(problem.n_rows, m, dtype=torch.float64)
            row: dict[str, object] = {"network": name, "vectors": m}
            reference = None
            for dtype in (torch.float64, torch.float32):
                operator = CurvatureOperator(problem, penalty, dtype=dtype)
                # Alternating, so that both see the same neighbours on the machine.
                passes, each = zip(
                    *[(seconds(both), seconds(lambda o=operator, w=v: o(w)) / m)
                      for _ in range(4)], strict=True)  # fmt: skip
                got = operator(v)
                label = str(dtype).removeprefix("torch.")
                row[label] = {"pass_seconds": min(passes), "product_seconds": min(each),
                              "ratio": min(each) / min(passes)}  # fmt: skip
                if reference is None:
                    reference = got
                else:
                    off = (got - reference).norm() / reference.norm()
                    row[label]["error"] = float(off)  # type: ignore[index]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def seconds(f) -> float:  # type: ignore[no-untyped-def]
    started = time.perf_counter()
    f()
    return time.perf_counter() - started


def memory(given: argparse.Namespace) -> list[dict[str, object]]:
    """Peak memory of products with 16 vectors, each case in a process of its own."""
    rows = []
    for n, width, chunk in (
        (1000, 100, 50), (1000, 100, 200), (1000, 100, 1000),
        (4000, 100, 50), (4000, 100, 200), (16000, 100, 200),
        (4000, 400, 200), (4000, 1600, 200),
    ):  # fmt: skip
        command = [sys.executable, __file__, "--memory-case", str(n), str(width), str(chunk)]
        done = subprocess.run(command, check=True, capture_output=True, env=os.environ)
        rows.append(json.loads(done.stdout))
        print(json.dumps(rows[-1]), flush=True)
    return rows


def memory_case(n: int, width: int, chunk: int) -> dict[str, object]:
    """An MLP of the given width on n random images; bytes above those before the products."""
    import torch
    from torch import nn

    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical
    from flataudit.solvers.operator import CurvatureOperator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, width), nn.ReLU(), nn.Linear(width, 10)).double().eval()
    x, y = torch.randn(n, 784, dtype=torch.float64), torch.randint(0, 10, (n,))
    problem = make_problem(model, x, y, Categorical(), chunk_size=chunk)
    operator = CurvatureOperator(problem, constant(problem, 1e-3))
    v = torch.randn(problem.n_rows, 16, dtype=torch.float64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    operator(v)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jacobian = 8 * problem.n_rows * problem.n_params
    return {"n": n, "n_params": problem.n_params, "chunk": chunk, "vectors": 16,
            "peak_bytes": (after - before) * 1024, "vector_bytes": v.numel() * 8,
            "parameter_bytes": 16 * 8 * problem.n_params,
            "jacobian_bytes": jacobian}  # fmt: skip


PARTS = {"accuracy": accuracy, "sampling": sampling, "products": products, "memory": memory}


if __name__ == "__main__":
    main()
