"""How exact are the matrix-free solvers, and what does a product with their operator cost?

Networks trained on Fashion-MNIST against the exact dual solver, at penalties 1e-2, 1e-3 and 1e-4:

accuracy   lanczos over seeds: the error, the stated error (1.96 standard errors of the probes plus
           the truncation), and how often the former lies inside.
sampling   soft rank, TIC and leave-one-out of the sampling solver over seeds, with their stated
           standard errors.
products   one product per vector in units of a forward and backward pass over the same data, for
           blocks of vectors, and the same with float32 arithmetic together with its error.
memory     peak of a block of products above the process before it, against chunk size, n and P.

    python benchmarks/matrix_free.py [--data FOLDER] [--seeds 10] [--part PART ...]
        [--cases CASE ...] [--operator matrix|product]

accuracy and sampling can do their products with the Gram matrix, formed once: the same to rounding,
and only the solvers' statistics are studied. `--operator product` goes through the network, and
sampling has to where there are fewer parameters than rows. Writes benchmarks/matrix_free.json, part
by part, case by case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from exact_audit import DATA, fashion_mnist, machine, train

HERE = Path(__file__).parent
OUTPUT = HERE / "matrix_free.json"
CASES = {  # network, n
    "mlp-500": ("mlp", 500),
    "lenet-500": ("lenet", 500),
    "logistic-500": ("logistic", 500),
    "transformer-500": ("transformer", 500),
    "mlp-2000": ("mlp", 2000),
    "lenet-2000": ("lenet", 2000),
    "logistic-2000": ("logistic", 2000),
}
QUICK = ["mlp-500", "lenet-500", "logistic-500", "transformer-500"]
PENALTIES = (1e-2, 1e-3, 1e-4)
N = 500


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--seeds", type=int, default=10, help="per case and penalty")
    arguments.add_argument("--part", choices=sorted(PARTS), nargs="+", default=list(PARTS))
    arguments.add_argument("--cases", choices=list(CASES), nargs="+", default=QUICK)
    arguments.add_argument("--penalties", type=float, nargs="+", default=list(PENALTIES))
    arguments.add_argument("--operator", choices=["matrix", "product"], default="matrix")
    arguments.add_argument("--memory-case", nargs=3, type=int, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.memory_case:
        print(json.dumps(memory_case(*given.memory_case)))
        return
    for part in given.part:
        if part in ("accuracy", "sampling"):
            for case in given.cases:
                for value in given.penalties:
                    runs = studied(part, case, value, given)
                    store(part, lambda old, runs=runs: summarised([
                        *(r for r in old.get("runs", []) if not same(r, runs[0])), *runs
                    ]))  # fmt: skip
        else:
            found = PARTS[part](given)
            store(part, lambda old, found=found: found)


def store(part: str, change: Callable) -> None:  # type: ignore[type-arg]
    """The part's entry in the JSON, replaced by `change` of it."""
    stored = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    stored |= {"machine": machine(), part: change(stored.get(part, {}))}
    OUTPUT.write_text(json.dumps(stored, indent=1) + "\n")


def same(run: dict[str, object], other: dict[str, object]) -> bool:
    return all(run.get(key) == other[key] for key in ("case", "penalty", "operator"))


def problem_of(name: str, folder: Path, n: int = N):  # type: ignore[no-untyped-def]
    """The fitted network's problem."""
    import torch

    from benchmarks.common import cases
    from flataudit.curvature.problem import make_problem
    from flataudit.families import Categorical

    x, y = fashion_mnist(folder, n)
    if name in ("logistic", "transformer"):
        torch.manual_seed(0)
        build, epochs = {"logistic": (cases.logistic, 20), "transformer": (cases.Transformer, 40)}[
            name
        ]
        model = build().float()
        cases.fit(model, x.float(), y, epochs)
    else:
        model, _ = train(name, x, y)
    return make_problem(model.double().eval(), x, y, Categorical())


def constant(problem, value: float):  # type: ignore[no-untyped-def]
    import torch

    return {name: torch.full_like(p.detach(), value) for name, p in problem.params.items()}


def studied(part: str, case: str, value: float, given: argparse.Namespace) -> list[dict]:  # type: ignore[type-arg]
    """Runs of one solver on one case at one penalty, over seeds, beside the exact values."""
    from flataudit import estimates
    from flataudit.solvers import MATRIX_FREE, SOLVERS, Work
    from flataudit.solvers import lanczos as by_lanczos
    from flataudit.solvers import sampling as by_sampling
    from flataudit.solvers.operator import CurvatureOperator

    problem = problem_of(*CASES[case][:1], given.data, CASES[case][1])
    if given.operator == "matrix" and part == "sampling" and problem.n_params < problem.n_rows:
        sys.exit(f"{case}: expected P >= N for sampling by a matrix; use --operator product")
    v = problem.factor.residual
    penalty = constant(problem, value)
    exact = SOLVERS["dual"].solve(problem, penalty)
    measures = {
        "soft_rank": estimates.measure_soft_rank,
        "tic": lambda c: estimates.measure_tic(c, v),
    }
    if part == "sampling":
        measures["loo"] = lambda c: _loo(c, v, problem, problem.y)
    wanted = {name: measure(exact).gap for name, measure in measures.items()}
    make: Callable[[], object] = lambda: CurvatureOperator(problem, penalty)  # noqa: E731
    if given.operator == "matrix":
        dense = DenseOperator.of(problem, value, rooted=part == "sampling")
        make = dense.again
    module = by_lanczos if part == "accuracy" else by_sampling
    solver = MATRIX_FREE["lanczos" if part == "accuracy" else "sampling"]
    runs = []
    for seed in range(given.seeds):
        operator = make()
        started = time.process_time()
        run = module._Run(solver, problem, operator, penalty, Work(seed=seed))
        found = run.result()
        row: dict[str, object] = {
            "case": case, "penalty": value, "operator": given.operator, "seed": seed,
            "products": operator.applications, "cpu_seconds": time.process_time() - started,
        }  # fmt: skip
        if part == "sampling":
            row |= {"samples": len(run.ranks), "refined": len(run.refined)}
        for name, measure in measures.items():
            got = measure(found)
            error = got.gap / wanted[name] - 1.0
            probes = got.monte_carlo_se / wanted[name]
            truncation = (got.truncation or 0.0) / wanted[name]
            stated = 1.96 * probes + truncation
            row[name] = {"exact": wanted[name], "error": error, "stated": stated,
                         "monte_carlo_se": probes, "truncation": truncation,
                         "inside": abs(error) <= stated}  # fmt: skip
        runs.append(row)
        print(json.dumps(row), flush=True)
    return runs


def summarised(runs: list[dict]) -> dict[str, object]:  # type: ignore[type-arg]
    """Runs with a line per case and penalty and a total, by quantity."""
    names = [name for name in ("soft_rank", "tic", "loo") if name in runs[0]]
    keys = sorted({(list(CASES).index(r["case"]), -r["penalty"], r["operator"]) for r in runs})
    rows = []
    for at, value, operator in keys:
        key = {"case": list(CASES)[at], "penalty": -value, "operator": operator}
        rows.append(key | _summary([r for r in runs if same(r, key)], names))
    return {"total": _summary(runs, names), "cases": rows, "runs": runs}


def _summary(runs: list[dict], names: list[str]) -> dict[str, object]:  # type: ignore[type-arg]
    row: dict[str, object] = {
        "runs": len(runs), "mean_products": sum(r["products"] for r in runs) / len(runs)
    }  # fmt: skip
    for name in names:
        errors = [r[name]["error"] for r in runs]
        row[name] = {
            "largest_error": max(abs(e) for e in errors),
            "mean_error": sum(errors) / len(errors),
            "inside": sum(r[name]["inside"] for r in runs),
        }
    return row


class DenseOperator:
    """The operator's interface over a matrix that is already there, without free parameters."""

    def __init__(self, problem, matrix, root) -> None:  # type: ignore[no-untyped-def]
        from flataudit.solvers.free import Held

        self.matrix, self.root, self.applications, self.reason = matrix, root, 0, None
        self.free, self.problem = Held(problem, []), problem
        # Only noise is drawn by their shapes, of which as many numbers serve as there are rows.
        self.tied = list(problem.params)

    @classmethod
    def of(cls, problem, value: float, *, rooted: bool):  # type: ignore[no-untyped-def]
        """rooted: with the square root that posterior samples are drawn by."""
        import torch

        from flataudit.curvature.gram import gram

        matrix = gram(problem, constant(problem, value)).matrix
        matrix.triu_()
        matrix += matrix.triu(1).T
        if not rooted:
            return cls(problem, matrix, None)
        nudged = matrix.clone()
        nudged.diagonal().add_(1e-9 * float(matrix.diagonal().mean()))
        return cls(problem, matrix, torch.linalg.cholesky(nudged))

    def again(self) -> DenseOperator:
        return DenseOperator(self.problem, self.matrix, self.root)

    def project(self, v):  # type: ignore[no-untyped-def]
        return v

    def half(self, u):  # type: ignore[no-untyped-def]
        import torch

        noise = torch.cat([u[name].flatten(1) for name in self.tied], dim=1)
        return self.root @ noise[:, : len(self.root)].T

    def pulled_squares(self, v):  # type: ignore[no-untyped-def]
        return v[0] * 0.0  # tr(G), which is not looked at here

    def __call__(self, v):  # type: ignore[no-untyped-def]
        self.applications += v.shape[1]
        return self.matrix @ v


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
    for name in ("mlp", "lenet", "transformer"):
        problem = problem_of(name, given.data)
        penalty = constant(problem, 1e-3)
        model, x, y = problem.model, problem.x.parts[0], problem.y

        def both(model=model, x=x, y=y) -> None:  # type: ignore[no-untyped-def]
            for at in range(0, N, 100):
                model.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(x[at : at + 100]), y[at : at + 100])
                loss.backward()

        for m in (1, 8, 80):  # lanczos goes on with some 80
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
    """CPU-seconds, which other work on the machine changes least."""
    started = time.process_time()
    f()
    return time.process_time() - started


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
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak (Linux)
    before = status_kib("VmRSS")
    operator(v)
    after = status_kib("VmHWM")
    jacobian = 8 * problem.n_rows * problem.n_params
    return {"n": n, "n_params": problem.n_params, "chunk": chunk, "vectors": 16,
            "peak_bytes": (after - before) * 1024, "vector_bytes": v.numel() * 8,
            "parameter_bytes": 16 * 8 * problem.n_params,
            "jacobian_bytes": jacobian}  # fmt: skip


def status_kib(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


PARTS = {"accuracy": None, "sampling": None, "products": products, "memory": memory}


if __name__ == "__main__":
    main()
