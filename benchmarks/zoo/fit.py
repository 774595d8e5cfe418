"""Fits one cell: scikit-learn's GLMs to the optimum, networks by torch's optimizers."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.zoo.data import Pool
from benchmarks.zoo.draw import Drawn
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.networks import make_network
from flataudit import TrainingRecorder

MOMENTUM = 0.9  # SGD's
PATIENCE = 10  # epochs without a better validation loss
WARMUP = 0.3  # share of the steps in which one_cycle's learning rate rises
DROPS = ((0.5, 0.1), (0.75, 0.01))  # step's learning rates, from these shares of the steps on


class TrainingFailed(Exception):
    """The loss left the finite numbers, or the optimum was not reached."""


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A trained model; record: of networks, as `flataudit.audit(..., training=record)` takes it."""

    model: Any
    record: Any = None
    epochs: int | None = None  # after which the weights stand


def fit(cell: Cell, drawn: Drawn) -> Fitted:
    """Trains the cell's model; the same numbers on every run on one machine.

    Raises:
        TrainingFailed: it diverged, or the solver did not converge.
    """
    if cell.architecture == "glm":
        return Fitted(fit_glm(drawn.train, drawn.pools.task, cell.weight_decay))
    return fit_network(cell, drawn)


def fit_glm(train: Pool, task: str, weight_decay: float) -> Any:
    """The optimum of (half the mean squared error or mean NLL) + weight_decay |coef|^2/2."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, PoissonRegressor, Ridge

    x, n = flat(train.x), len(train)
    if task == "regression":
        model = Ridge(alpha=n * weight_decay)
    elif task == "counts":
        model = PoissonRegressor(
            alpha=weight_decay, solver="newton-cholesky", tol=1e-9, max_iter=200
        )
    else:
        model = LogisticRegression(C=1.0 / (n * weight_decay), tol=1e-8, max_iter=20_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        try:
            return model.fit(x, train.y)
        except ConvergenceWarning as warning:
            raise TrainingFailed(
                f"expected the optimum, got: {str(warning).splitlines()[0]}"
            ) from None


def flat(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Samples as rows of float64, for scikit-learn."""
    return x.reshape(len(x), -1).astype(np.float64)


def rate_at(schedule: str, step: int, steps: int) -> float:
    """The learning rate of a step, counted from 0, over the schedule's largest.

    Raises:
        KeyError: unknown schedule.

    >>> [round(rate_at("one_cycle", step, 10), 2) for step in (0, 2, 3, 9)]
    [0.33, 1.0, 1.0, 0.05]
    """
    share = step / steps
    if schedule == "constant":
        return 1.0
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * share))
    if schedule == "step":
        return min([1.0] + [rate for start, rate in DROPS if share >= start])
    if schedule == "one_cycle":
        if share < WARMUP:
            return (step + 1) / math.ceil(WARMUP * steps)
        return 0.5 * (1 + math.cos(math.pi * (share - WARMUP) / (1 - WARMUP)))
    raise KeyError(
        f"unknown schedule {schedule!r}; choose one of: constant, cosine, step, one_cycle"
    )


def fit_network(
    cell: Cell, drawn: Drawn, watch: Callable[[nn.Module, int], None] | None = None
) -> Fitted:
    """The network after its epochs, or with early stopping after the best of them so far.

    watch: called with the network and the steps taken, before training and after every step.
    """
    torch.manual_seed(cell.draw_seed)
    pools = drawn.pools
    network = make_network(
        cell.architecture,
        drawn.train.x.shape[1:],
        pools.n_outputs,
        width=cell.width,
        depth=cell.depth,
        activation=cell.activation,
        pooling=cell.pooling,
    )
    x, y = tensors(drawn.train, pools.task)
    unseen = None if drawn.validation is None else tensors(drawn.validation, pools.task)
    optimizer = make_optimizer(cell, network)
    steps = cell.epochs * math.ceil(len(x) / cell.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate_at(cell.schedule, step, steps)
    )
    loss = losses(pools.task)
    generator = torch.Generator().manual_seed(cell.draw_seed)
    best: tuple[float, int, Any, Any] = (math.inf, 0, None, None)
    name = "mse" if pools.task == "regression" else None
    taken = 0
    if watch is not None:
        watch(network, taken)
    with TrainingRecorder(optimizer, cell.batch_size, loss=name, model=network) as recorder:
        for epoch in range(1, cell.epochs + 1):
            network.train()
            for index in torch.randperm(len(x), generator=generator).split(cell.batch_size):
                optimizer.zero_grad()
                value = loss(network(x[index]), y[index])
                value.backward()
                optimizer.step()
                schedule.step()
                taken += 1
                if watch is not None:
                    watch(network, taken)
            if not math.isfinite(value.item()):
                raise TrainingFailed(f"expected a finite loss, got {value.item()} in epoch {epoch}")
            if unseen is None:
                continue
            network.eval()
            with torch.no_grad():
                now = float(loss(network(unseen[0]), unseen[1]))
            if now < best[0]:
                best = (now, epoch, copy.deepcopy(network.state_dict()), recorder.record())
            elif epoch - best[1] >= PATIENCE:
                break
        record = recorder.record()
    if unseen is None:
        return Fitted(network.eval(), record, cell.epochs)
    network.load_state_dict(best[2])
    return Fitted(network.eval(), best[3], best[1])


def tensors(pool: Pool, task: str) -> tuple[Tensor, Tensor]:
    """Inputs float32 and targets as the loss takes them."""
    x, y = (
        torch.from_numpy(np.ascontiguousarray(pool.x)),
        torch.from_numpy(np.ascontiguousarray(pool.y)),
    )
    return x, y if task == "classification" else y.float()[:, None]


def losses(task: str) -> nn.Module:
    """The mean training loss of a task."""
    if task == "classification":
        return nn.CrossEntropyLoss()
    return nn.MSELoss() if task == "regression" else nn.PoissonNLLLoss(log_input=True)


def make_optimizer(cell: Cell, network: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW."""
    p, lr, decay = network.parameters(), cell.lr, cell.weight_decay
    if cell.optimizer == "sgd":
        return torch.optim.SGD(p, lr=lr, momentum=MOMENTUM, weight_decay=decay)
    if cell.optimizer == "adam":
        return torch.optim.Adam(p, lr=lr, weight_decay=decay)
    if cell.optimizer == "adamw":
        return torch.optim.AdamW(p, lr=lr, weight_decay=decay)
    raise KeyError(f"unknown optimizer {cell.optimizer!r}; choose one of: sgd, adam, adamw")
