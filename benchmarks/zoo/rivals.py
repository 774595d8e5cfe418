"""Rivals of other libraries on the same models: a pass of its own, since they need packages.

    python -m benchmarks.zoo.rivals [--quick] [--store FOLDER] [--data FOLDER]

Columns, all from the training samples alone; where one does not exist, COLUMN_error says why:

    mpe_kfac, mpe_kfac_se   the memory-perturbation equation's leave-one-out with KFAC in place of
        the curvature (curvlinops); layers other than Linear and Conv2d are left out
    mpe, mpe_se             the same with the exact curvature: what KFAC costs it
    randalo                 RandALO of models with one output (its authors' package)
    alpha                   WeightWatcher's mean power-law exponent over the layers; networks only
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.draw import Drawn
from benchmarks.zoo.fit import flat
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import registered_cell, write_results
from flataudit import FlatauditError
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import Family
from flataudit.fitting import PenalisedFit
from flataudit.solvers import Curvature, FunctionalVariance, Work
from flataudit.solvers.kfac import Kfac

Json = dict[str, Any]

KIND = "rivals"
FACTORED = (nn.Linear, nn.Conv2d)  # the layers for which KFAC is defined
MATVECS = 100  # of RandALO, its default
SUBSETS = 50  # of its debiasing, its default


class Undefined(Exception):
    """This rival does not exist for this model: why."""


def rival_cell(name: str, options: Json) -> Json:
    """The rivals of one registered cell; {name, state, seconds}."""

    def row(cell: Cell, uri: str, model: Any, record: Json | None, drawn: Drawn) -> Json:
        return {"name": name} | rivals(cell, model, record, drawn)

    return registered_cell(name, options, KIND, row, "rival_seconds")


def rivals(cell: Cell, model: Any, record: Json | None, drawn: Drawn) -> Json:
    """All rivals of one model."""
    fitted, network = penalised(cell, model, record, drawn)
    row: Json = {}
    row |= attempt("mpe_kfac", lambda: memory_perturbation(fitted, network))
    row |= attempt("mpe", lambda: rise_without(fitted.problem, fitted.variance))
    row |= attempt("randalo", lambda: randalo(cell, model, drawn, fitted.problem.family))
    row |= attempt("alpha", lambda: alpha(cell, model))
    return row


def attempt(name: str, run: Callable[[], tuple[float, float | None]]) -> Json:
    """{name, name_se} or {name_error}."""
    try:
        value, se = run()
    except (Undefined, FlatauditError) as error:
        return {f"{name}_error": str(error)}
    if not math.isfinite(value):
        return {f"{name}_error": f"expected a finite value, got {value}"}
    return {name: value} | ({} if se is None else {f"{name}_se": se})


def memory_perturbation(fitted: PenalisedFit, network: nn.Module) -> tuple[float, float]:
    """mean[l(f_i + A_i r_i) - l(f_i)] with A_i from KFAC, and its standard error.

    The deviation that leaving i out causes, by the memory-perturbation equation (Nickl et al. 2023,
    arXiv 2310.19273, there v_i e_i): one step from the full posterior, without the correction
    (I - Lambda_i A_i)^-1 of leave-one-out. KFAC takes one penalty per tensor: where training gave
    each parameter its own (Adam) its geometric mean over the tensor.
    """
    factored = [
        f"{name}.{kind}" if name else kind
        for name, layer in network.named_modules()
        if isinstance(layer, FACTORED)
        for kind in ("weight", "bias")
    ]
    if not set(factored) & set(fitted.problem.params):
        raise Undefined("no Linear or Conv2d layer")
    trained = {name: p.requires_grad for name, p in network.named_parameters()}
    try:
        for name, p in network.named_parameters():
            p.requires_grad_(name in factored)
        old = fitted.problem
        problem = make_problem(network, old.x, old.y, old.family)
        penalty = {name: one_value(fitted.penalty[name]) for name in problem.params}
        return rise_without(problem, Kfac().solve(problem, penalty, Work()))
    finally:
        for name, p in network.named_parameters():
            p.requires_grad_(trained[name])


def rise_without(problem: Problem, variance: Curvature) -> tuple[float, float]:
    """mean[l(f_i + A_i r_i) - l(f_i)], and its standard error as the other estimates have it."""
    if not isinstance(variance, FunctionalVariance):
        raise Undefined("no values per sample at this size")
    b = torch.einsum("nij,nj->ni", variance.q, problem.factor.residual)
    moved = problem.outputs + problem.family.shift(problem.outputs, problem.y, b)
    own = problem.family.nll(problem.outputs, problem.y)
    rise = problem.family.nll(moved, problem.y) - own
    # Of the predicted test NLL, mean(l_i + psi_i).
    spread = float((own + rise).std(correction=1)) / math.sqrt(problem.n_samples)
    return float(rise.mean()), spread


def one_value(d: Tensor) -> Tensor:
    """The tensor filled with its geometric mean, or with 0 where none of it is penalised."""
    positive = d[d > 0]
    return torch.full_like(d, float(positive.log().mean().exp()) if len(positive) else 0.0)


def randalo(cell: Cell, model: Any, drawn: Drawn, family: Family) -> tuple[float, None]:
    """RandALO's estimate of the mean NLL of left-out samples, minus the training NLL.

    The package's own map of scikit-learn leaves the intercept out of the Jacobian and knows no
    Poisson regression, so it is given the Jacobian dz/dy of the fitted outputs, dense, in closed
    form: -X (X'BX + n D)^-1 X'C, B = d2l/dz2 and C = d2l/dydz summed over samples, with a column
    of ones in X that D leaves free (Nobel, LeJeune, Candes 2024, arXiv 2409.09781).
    """
    if cell.architecture != "glm":
        raise Undefined("defined for linear models")
    if drawn.pools.n_outputs > 2:
        raise Undefined("defined for models with one output, got several classes")
    package, linops = _import("randalo"), _import("linops")
    loss, z, y = scalar_loss(model, drawn)
    jacobian = scalar_jacobian(loss, z, y, flat(drawn.train.x), cell.weight_decay)
    estimator = package.RandALO(
        loss=loss,
        jac=linops.MatrixOperator(jacobian.float()),
        y=y.float(),
        y_hat=z.float(),
        rng=torch.Generator().manual_seed(0),
    )

    def risk(_: Tensor, moved: Tensor) -> float:
        return float(_nll(family, moved.double(), y).mean())

    subsets = [  # as by default, but reproducible
        torch.randperm(MATVECS, generator=torch.Generator().manual_seed(j))[:m].tolist()
        for j, m in enumerate(np.linspace(MATVECS // 2, MATVECS, SUBSETS, dtype=int))
    ]
    found = estimator.evaluate(risk, n_matvecs=MATVECS, subsets=subsets)
    return float(found) - risk(y, z), None


Loss = Callable[[Tensor, Tensor], Tensor]


def scalar_loss(model: Any, drawn: Drawn) -> tuple[Loss, Tensor, Tensor]:
    """The summed loss of (y, z), the fitted outputs z and targets y (labels as -1 and 1)."""
    x, task = flat(drawn.train.x), drawn.pools.task
    y = torch.as_tensor(np.asarray(drawn.train.y, dtype=np.float64))
    z = x @ np.ravel(model.coef_) + float(np.ravel(model.intercept_)[0])
    if task == "classification":
        return lambda y, z: nn.functional.softplus(-y * z).sum(), torch.as_tensor(z), 2 * y - 1
    if task == "counts":
        return lambda y, z: (z.exp() - y * z).sum(), torch.as_tensor(z), y
    return lambda y, z: 0.5 * (y - z).square().sum(), torch.as_tensor(z), y


def scalar_jacobian(
    loss: Loss, z: Tensor, y: Tensor, x: np.ndarray[Any, Any], weight_decay: float
) -> Tensor:
    """dz/dy of the optimum of loss + n weight_decay |coef|^2/2, (n, n)."""
    y, z = y.clone().requires_grad_(True), z.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(loss(y, z), z, create_graph=True)
    both, twice = torch.autograd.grad(slope.sum(), (y, z))
    rows = torch.as_tensor(np.column_stack([x, np.ones(len(x))]))
    penalty = torch.full((rows.shape[1],), len(x) * weight_decay, dtype=torch.float64)
    penalty[-1] = 0.0
    matrix = rows.T @ (twice[:, None] * rows) + torch.diag(penalty)
    return -rows @ torch.linalg.solve(matrix, rows.T * both)


def _nll(family: Family, z: Tensor, y: Tensor) -> Tensor:
    """The NLL per sample, (n,), of outputs of one column and targets as `scalar_loss` has them."""
    labels = (y > 0).double() if family.name == "bernoulli" else y
    return family.nll(z[:, None], family.check(labels[:, None], 1))


def alpha(cell: Cell, model: Any) -> tuple[float, None]:
    """WeightWatcher's alpha: the power-law exponent of each layer's spectrum, the mean over layers.

    Small layers have few eigenvalues; the package fits them all the same, as of ten.
    """
    if cell.architecture == "glm":
        raise Undefined("defined for networks")
    noise = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # it logs and prints as it goes
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its use of pandas
            package = _import("weightwatcher")
            watcher = package.WeightWatcher(model=model)
            found = watcher.get_summary(watcher.analyze())
    finally:
        logging.disable(noise)
    if not found.get("alpha", 0) > 0:
        raise Undefined("no layer with enough eigenvalues")
    return float(found["alpha"]), None


def _import(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise Undefined(f"{name} is not installed ({error}); pip install '.[zoo]'") from None


if __name__ == "__main__":
    from benchmarks.zoo.command import main

    main(__doc__, "benchmarks.zoo.rivals:rival_cell", write_results)
