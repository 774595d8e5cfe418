"""From a model and its data, as given, to the problem that is solved: for audits and plans."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flataudit.curvature.problem import Problem, make_problem, predict
from flataudit.errors import InputError
from flataudit.families import make_family
from flataudit.inputs import Inputs
from flataudit.labels import ClassNames
from flataudit.models.sklearn import Subject
from flataudit.models.torch import PreparedModel, prepare
from flataudit.tensors import resolve_device


def prepared_problem(
    subject: Subject,
    train: tuple[Inputs, Tensor],
    names: ClassNames | None,
    *,
    dispersion: float,
    device: str,
    chunk_size: int | None = None,
) -> tuple[PreparedModel, Problem]:
    """The model's copy, prepared, and the problem B = S'J/sqrt(n) at its weights.

    Args:
        subject: The network to audit, and the family asked for.
        train: (x, y) as tensors.
        names: Of the classes, where labels were text.
        dispersion: The Gaussian variance to begin with.
        device: auto, cpu or cuda.
        chunk_size: Samples per chunk; by memory without it.

    Raises:
        InputError: data that do not fit the model or the family.
    """
    where = resolve_device(device)
    x, y = train
    prepared = prepare(subject.model, x, where)
    x = x.to(prepared.dtype, where)
    n_outputs = predict(prepared.module, x[:2]).shape[1]
    likelihood = make_family(subject.family, y, n_outputs, dispersion)
    if names is not None:
        names.check(n_outputs, likelihood.name)
    y = likelihood.check(y, n_outputs).to(where)
    return prepared, make_problem(prepared.module, x, y, likelihood, chunk_size=chunk_size)


def heldout_outputs(module: nn.Module, x: Inputs, *, chunk_size: int | None = None) -> Tensor:
    """The model's outputs (n, K) on data that it was not fitted to.

    Raises:
        InputError: NaN or infinity among them.
    """
    outputs = predict(module, x, chunk_size=chunk_size)
    if not bool(torch.isfinite(outputs).all()):
        raise InputError(
            "expected finite model outputs on the heldout data, got NaN or infinity; check x"
        )
    return outputs
