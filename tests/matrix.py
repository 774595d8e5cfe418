"""docs/matrix.md: every kind of model, measured; `python -m tests.matrix` writes the page anew.

Nothing on the page is typed in: a cell says that a difference is within the tolerance in its
column's head, or by how much it is not, and a refusal is the message that was raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flataudit
from flataudit.curvature.problem import make_problem
from flataudit.errors import InputError
from flataudit.families import make_family
from flataudit.fitting import penalised_fit
from flataudit.models.sklearn import as_network, is_estimator
from flataudit.models.torch import prepare
from flataudit.tensors import as_pair
from flataudit.training import parse_training
from tests.dense import dense, likelihood
from tests.matrix_rows import REFUSED, SKLEARN, TORCH, Refused, Row, Subject

PAGE = Path(__file__).parents[1] / "docs" / "matrix.md"
PREDICTIONS, ESTIMATES = 1e-10, 1e-8


@dataclass(frozen=True)
class Measured:
    """One row's differences.

    predictions: the largest, absolute, of a probability, rate or target; gradient: |grad J| over
    |grad NLL| at the fitted optimum (|grad J| where D is 0), by central differences, and its
    tolerance, None where D was given or the training stopped before the optimum; soft_rank, tic,
    loo: largest difference of a sample's value, relative to the largest value.
    """

    family: str
    predictions: float
    gradient: tuple[float, float] | None
    soft_rank: float
    tic: float
    loo: float

    def within(self) -> bool:
        """Whether every difference is within its tolerance."""
        return (
            self.predictions <= PREDICTIONS
            and (self.gradient is None or self.gradient[0] <= self.gradient[1])
            and max(self.soft_rank, self.tic, self.loo) <= ESTIMATES
        )


@cache
def measured(row: Row) -> Measured:
    """Audits the row's model as a caller would, and holds it against the dense definition."""
    made = row.make()
    report = flataudit.audit(made.model, (made.x, made.y), **made.options)
    assert report.family == made.family
    twin = as_network(made.model, (made.x, made.y), None, made.family)
    data = as_pair(twin.train, "train")
    prepared = prepare(twin.model, data[0], torch.device("cpu"))
    s2 = 1.0 if report.dispersion is None else report.dispersion.value
    penalty = _penalty(made, twin, prepared.module, data, s2)
    if made.definition is None:
        network, x, y = twin.model, data[0].parts[0], data[1]
    else:
        network, x, y = made.definition
        # The same parameters by the names that the definition's network gives them.
        names = [name for name, p in network.named_parameters() if p.requires_grad]
        penalty = dict(zip(names, penalty.values(), strict=True))
    exact = dense(network, x, torch.as_tensor(y), made.family, penalty, s2)
    found = report.samples
    return Measured(
        family=made.family,
        predictions=_predictions(made, prepared.module, data, exact.outputs),
        gradient=_gradient(made, network, x, torch.as_tensor(y), penalty, s2),
        soft_rank=_relative(found.leverage, exact.leverage),
        tic=_relative(found.tic, exact.tic),
        loo=_relative(found.loo, exact.loo),
    )


def refusal(row: Refused) -> str:
    """The message of the InputError that the row's model ends in."""
    try:
        row.attempt()
    except InputError as error:
        return str(error)
    raise AssertionError(f"{row.kind} was not refused")


def _penalty(
    made: Subject, twin: Any, module: nn.Module, data: Any, s2: float
) -> dict[str, Tensor]:
    """D by parameter, as the audit resolves it."""
    x, y = data
    outputs = x.call(module)
    n_outputs = outputs.reshape(len(outputs), -1).shape[1]
    family = make_family(made.family, y, n_outputs, s2)
    problem = make_problem(module, x, family.check(y, n_outputs), family)
    record = made.options.get("training")
    fit = penalised_fit(
        problem,
        penalty=made.options.get("penalty", "auto"),
        record=None if record is None else parse_training(record),
        dispersion=s2 if made.family == "gaussian" else "auto",
        solver="auto",
        own=twin.penalty,
    )
    return {name: torch.as_tensor(d) for name, d in fit.penalty.items()}


def _predictions(made: Subject, module: nn.Module, data: Any, outputs: Tensor) -> float:
    """An estimator's own predictions against its twin's; a network's own against the copy's."""
    with torch.no_grad():
        f = data[0].call(module)
    found = _means(made.family, f.reshape(len(f), -1))
    if not is_estimator(made.model):
        return float((found - _means(made.family, outputs)).abs().max())
    classifies = made.family in ("categorical", "bernoulli")
    own = made.model.predict_proba(made.x) if classifies else made.model.predict(made.x)
    return float((found - torch.from_numpy(np.asarray(own)).reshape(found.shape)).abs().max())


def _means(family: str, f: Tensor) -> Tensor:
    if family == "bernoulli":
        return torch.sigmoid(torch.cat([-f, f], dim=1))
    if family == "categorical":
        return torch.softmax(f, dim=1)
    return f.exp() if family == "poisson" else f


def _gradient(
    made: Subject, network: nn.Module, x: Any, y: Tensor, penalty: dict[str, Tensor], s2: float
) -> tuple[float, float] | None:
    """|grad J| at the fitted weights by central differences, as a share of |grad NLL|."""
    if made.optimum is None:
        return None
    params = dict(network.named_parameters())

    def nll() -> Tensor:
        return likelihood(made.family, network(x), y, s2)[0].mean()

    def objective() -> float:
        return float(nll() + sum((penalty[k] * p.square()).sum() / 2 for k, p in params.items()))

    grads = torch.autograd.grad(nll(), list(params.values()))
    free = not any(bool(d.any()) for d in penalty.values())
    scale = 1.0 if free else float(torch.cat([g.flatten() for g in grads]).norm())
    total = 0.0
    with torch.no_grad():
        for p in params.values():
            flat = p.view(-1)
            for i in range(len(flat)):
                before, step = flat[i].clone(), 1e-4
                flat[i] = before + step
                above = objective()
                flat[i] = before - step
                total += ((above - objective()) / (2 * step)) ** 2
                flat[i] = before
    return total**0.5 / scale, made.optimum


def _relative(found: Any, exact: Tensor) -> float:
    wanted = exact.detach().numpy()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


# --- the page -----------------------------------------------------------------------------------

HEAD = """# The model matrix

Made by `make matrix` (`tests/matrix.py`) from models that are fitted and audited there;
`tests/test_matrix.py` measures every row again and compares the page. Sizes: n samples, P
parameters, K outputs.

- **Predictions**: those of the network that is audited against the model's own, largest difference.
  For an estimator these are `predict_proba` and `predict`.
- **D** is the penalty of the mean loss, J = mean NLL + θ'Dθ/2, as the audit reads it from the
  model. *argument*: given to the audit. s² is the dispersion.
- **Gradient**: |grad J| at the fitted weights, by central differences with that D, is at most this
  share of |grad NLL| (of 1 where D is 0). How near zero it comes is the optimizer's doing. A dash:
  nothing to prove, or stopped before the optimum.
- **Soft rank, TIC, LOO**: each sample's value from `flataudit.audit` against the definition in
  dense float64 (`tests/dense.py`: the full Jacobian, (G + D)⁺ by eigenvalues), the largest
  difference relative to the largest value.
"""
COLUMNS = (
    "Model", "Family", f"Predictions, {PREDICTIONS:.0e}", "D", "Gradient",
    f"Soft rank, {ESTIMATES:.0e}", f"TIC, {ESTIMATES:.0e}", f"LOO, {ESTIMATES:.0e}",
)  # fmt: skip


def render() -> str:
    """The whole page."""
    return "\n".join(
        [
            HEAD.replace("e-0", "e-"),
            *_table("scikit-learn", SKLEARN),
            *_table("PyTorch", TORCH),
            "## Refused",
            "",
            "One line on stderr and exit code 2; nothing is written to the registry.",
            "",
            _line(("Model", "Message")),
            "|---|---|",
            *(_line((row.kind, refusal(row))) for row in REFUSED),
            "",
        ]
    )


def _table(title: str, rows: tuple[Row, ...]) -> list[str]:
    head = [column.replace("e-0", "e-") for column in COLUMNS]
    body = [_line(_cells(row, measured(row))) for row in rows]
    return [f"## {title}", "", _line(head), "|" + "---|" * len(head), *body, ""]


def _cells(row: Row, found: Measured) -> tuple[str, ...]:
    gradient = "–" if found.gradient is None else _held(*found.gradient, shown=True)
    estimates = (_held(value, ESTIMATES) for value in (found.soft_rank, found.tic, found.loo))
    predictions = _held(found.predictions, PREDICTIONS)
    return (row.kind, found.family, predictions, row.penalty, gradient, *estimates)


def _held(value: float, tolerance: float, *, shown: bool = False) -> str:
    if not value <= tolerance:
        return f"**no: {value:.1g}**"
    return f"{tolerance:.0e}".replace("e-0", "e-") if shown else "yes"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
