"""Baselines on the same models: what else could be asked of a trained model.

    python -m benchmarks.zoo.baselines [--quick] [--store FOLDER] [--data FOLDER]

A pass of its own over the registered models, resumable like the others; the rows join the measured
ones by name in the results. Columns, all from the training samples alone:

    cv_gap, cv_gap_se     5-fold cross-validation, five refits, where that is affordable
    hessian_trace, _se, hessian_top   of the mean training NLL: Hutchinson, Lanczos
    trace_ratio           tr C/tr G
    sam                   rise of the loss at SAM_RADIUS along the gradient
    path_norm             of networks of linear, convolution and pooling layers
    parameter_norm, aic   |theta|^2 and P/n
    waic, waic_se         mean variance of the log likelihood under the Laplace posterior
"""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from benchmarks.zoo.data import Pool
from benchmarks.zoo.draw import Drawn
from benchmarks.zoo.fit import TrainingFailed, fit
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import FAMILY, nll_of, pair, registered_cell, write_results
from flataudit import FlatauditError
from flataudit.curvature.problem import Problem, make_problem
from flataudit.families import Family, make_family
from flataudit.fitting import PenalisedFit, penalised_fit
from flataudit.models.sklearn import as_network
from flataudit.solvers import FunctionalVariance
from flataudit.training import TrainingRecord, parse_training

Json = dict[str, Any]

KIND = "baselines"
FOLDS = 5
CV_STEPS = 6_000  # optimizer steps of a cell up to which five refits are affordable
PROBES = 32  # of Hutchinson's estimator
SAM_RADIUS = 0.05
DRAWS = 200  # of the posterior, for WAIC


def baseline_cell(name: str, options: Json) -> Json:
    """The baselines of one registered cell; {name, state, seconds}."""

    def row(cell: Cell, uri: str, model: Any, record: Json | None, drawn: Drawn) -> Json:
        try:
            found = baselines(cell, model, record, drawn)
        except FlatauditError as error:
            found = {"baseline_error": str(error)}
        return {"name": name} | found

    return registered_cell(name, options, KIND, row, "baseline_seconds")


def baselines(cell: Cell, model: Any, record: Json | None, drawn: Drawn) -> Json:
    """All baselines of one model."""
    fitted, network = penalised(cell, model, record, drawn)
    problem, likelihood = fitted.problem, fitted.problem.family  # with its dispersion
    x = problem.x.parts[0]
    loss = Loss(network, x, problem.y, likelihood)
    theta = loss.at()
    trace, trace_se = hutchinson(loss, theta)
    row: Json = {
        "hessian_trace": trace,
        "hessian_trace_se": trace_se,
        "hessian_top": top_eigenvalue(loss, theta),
        "trace_ratio": fitted.moments.trace / fitted.variance.trace_ggn,
        "sam": sharpness(loss, theta),
        "path_norm": path_norm(network, x[:1]),
        "parameter_norm": float(theta.square().sum()),
        "aic": problem.n_params / problem.n_samples,
    }
    if isinstance(fitted.variance, FunctionalVariance):
        row["waic"], row["waic_se"] = waic(problem, fitted.variance)
    return row | cross_validation(cell, drawn, model, likelihood)


def penalised(
    cell: Cell, model: Any, record: Json | TrainingRecord | None, drawn: Drawn
) -> tuple[PenalisedFit, nn.Module]:
    """The penalised fit that the audit makes, and the network (an estimator's twin) in float64."""
    subject = as_network(model, pair(cell, drawn.train), None, FAMILY[drawn.pools.task])
    network = copy.deepcopy(subject.model).double().eval()
    for p in network.parameters():
        p.requires_grad_(True)
    x, y = (torch.as_tensor(np.asarray(part)) for part in subject.train)
    x = x.double()
    k = network(x[:2]).shape[1]
    likelihood = make_family(subject.family, y, k)
    problem = make_problem(network, x, likelihood.check(y, k), likelihood)
    fitted = penalised_fit(
        problem,
        penalty="auto",
        record=parse_training(record) if isinstance(record, dict) else record,
        dispersion="auto",
        solver="auto",
        own=subject.penalty,
    )
    return fitted, network


class Loss:
    """The mean NLL as a function of the flat parameter vector."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, family: Family) -> None:
        self.network, self.x, self.y, self.family = network, x, y, family
        self.names = [name for name, p in network.named_parameters() if p.requires_grad]

    def at(self) -> Tensor:
        """The network's own parameters, flat."""
        own = dict(self.network.named_parameters())
        return torch.cat([own[name].detach().reshape(-1) for name in self.names])

    def __call__(self, theta: Tensor) -> Tensor:
        own = dict(self.network.named_parameters())
        parts = theta.split([own[name].numel() for name in self.names])
        values = {name: t.view_as(own[name]) for name, t in zip(self.names, parts, strict=True)}
        outputs = torch.func.functional_call(self.network, values, (self.x,))
        return self.family.nll(outputs, self.y).mean()

    def hessian_product(self, theta: Tensor, v: Tensor) -> Tensor:
        """H v, by differentiating the gradient along v."""
        at = theta.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(self(at), at, create_graph=True)
        (product,) = torch.autograd.grad(gradient @ v, at)
        return product


def hutchinson(loss: Loss, theta: Tensor, probes: int = PROBES) -> tuple[float, float]:
    """tr H from Rademacher probes, with its standard error."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(probes):
        v = torch.randint(0, 2, theta.shape, generator=generator).to(theta) * 2 - 1
        values.append(float(v @ loss.hessian_product(theta, v)))
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(probes)


def top_eigenvalue(loss: Loss, theta: Tensor) -> float:
    """The largest eigenvalue of the Hessian, by Lanczos (ARPACK)."""
    size = len(theta)

    def product(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return loss.hessian_product(theta, torch.as_tensor(v.reshape(-1))).numpy()

    start = np.random.default_rng(0).normal(size=size)
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    values = eigsh(operator, k=1, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)
    return float(values[0])


def sharpness(loss: Loss, theta: Tensor, radius: float = SAM_RADIUS) -> float:
    """L(theta + radius g/|g|) - L(theta), g the full-batch gradient (arXiv 2010.01412)."""
    at = theta.clone().requires_grad_(True)
    value = loss(at)
    (gradient,) = torch.autograd.grad(value, at)
    norm = gradient.norm()
    if norm == 0:
        return 0.0
    with torch.no_grad():
        return float(loss(theta + radius * gradient / norm) - value)


def path_norm(network: nn.Module, example: Tensor) -> float | None:
    """sqrt(sum over paths of the product of squared weights); None with other kinds of layers.

    A forward pass of ones through the layers with squared weights and without activations, biases
    as weights from an input of one (arXiv 1506.02617).
    """
    plain = (nn.Linear, nn.Conv2d, nn.Flatten, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    steps = (nn.ReLU, nn.Tanh, nn.GELU, nn.Identity)
    layers = [m for m in network.modules() if not isinstance(m, nn.Sequential)]
    if not all(isinstance(m, plain + steps) for m in layers):
        return None
    squared = copy.deepcopy(network)
    with torch.no_grad():
        for p in squared.parameters():
            p.square_()
        value = torch.ones_like(example)
        for layer in (m for m in squared.modules() if not isinstance(m, nn.Sequential)):
            value = value if isinstance(layer, steps) else layer(value)
        return float(value.sum().sqrt())


def waic(problem: Problem, variance: FunctionalVariance, draws: int = DRAWS) -> tuple[float, float]:
    """The mean of var log p(y_i|f) over f ~ N(f_i, A_i): WAIC's penalty (Watanabe 2010)."""
    generator = torch.Generator().manual_seed(0)
    n, k = problem.n_samples, problem.n_columns
    values, vectors = torch.linalg.eigh(variance.q)
    root = vectors * values.clamp_min(0.0).sqrt()[:, None, :]
    drawn = []
    for _ in range(draws):
        b = (root @ torch.randn(n, k, 1, generator=generator, dtype=root.dtype))[:, :, 0]
        outputs = problem.outputs + problem.family.shift(problem.outputs, problem.y, b)
        drawn.append(problem.family.nll(outputs, problem.y))
    spread = torch.stack(drawn).var(dim=0, correction=1)
    return float(spread.mean()), float(spread.std(correction=1)) / math.sqrt(n)


def cross_validation(cell: Cell, drawn: Drawn, model: Any, likelihood: Family) -> Json:
    """The mean NLL of left-out folds minus that of the model on its training samples.

    The refits take the cell's own recipe at 4/5 of its samples. Nothing where that costs too much.
    """
    train, task = drawn.train, drawn.pools.task
    if cell.epochs * math.ceil(len(train) / cell.batch_size) > CV_STEPS:
        return {}
    order = np.random.default_rng(cell.draw_seed).permutation(len(train))
    left = np.empty(len(train))
    for fold in np.array_split(order, FOLDS):
        rest = np.setdiff1d(order, fold)
        part = dataclasses.replace(drawn, train=_take(train, rest))
        try:
            again = fit(cell, part).model
            left[fold] = nll_of(again, pair(cell, _take(train, fold)), pair(cell, part.train),
                                FAMILY[task], likelihood)  # fmt: skip
        except (TrainingFailed, FlatauditError, ValueError) as error:
            return {"cv_error": str(error)}
    own = nll_of(model, pair(cell, train), pair(cell, train), FAMILY[task], likelihood)
    return {
        "cv_gap": float(left.mean() - own.mean()),
        "cv_gap_se": float(left.std(ddof=1)) / math.sqrt(len(left)),
    }


def _take(pool: Pool, index: Any) -> Pool:
    return pool.take(np.asarray(index))


if __name__ == "__main__":
    from benchmarks.zoo.command import main

    main(__doc__, "benchmarks.zoo.baselines:baseline_cell", write_results)
