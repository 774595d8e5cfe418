"""What the figures and the influence table show, as plain JSON values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flataudit.calibration import gaussian_pit, pit_display, poisson_pit, reliability_display
from flataudit.estimates import LeaveOneOut
from flataudit.families import log_probabilities
from flataudit.fitting import PenalisedFit
from flataudit.judgement import Judged, class_labels, standardised, to_numpy
from flataudit.results import to_json
from flataudit.solvers.base import EIGENVALUE_LIMIT

INFLUENTIAL = 50
QUANTILES = 500


def build_display(
    fit: PenalisedFit,
    judged: Judged,
    nll: Tensor,
    leverage: Tensor | None,
    tic: Tensor | None,
    left_out: LeaveOneOut | None,
) -> dict[str, Any]:
    """Reliability bins, the spectrum (eigenvalues of the ggn over the penalty) and the samples
    that matter most, by leave-one-out loss where there is one, else by TIC; none where the solver
    knows no sample by itself."""
    return {
        "reliability": _reliability(fit, judged),
        "spectrum": _spectrum(fit, leverage),
        "influence": _influence(fit, nll, leverage, tic, left_out),
    }


def _reliability(fit: PenalisedFit, judged: Judged) -> dict[str, Any]:
    log_p = log_probabilities(fit.problem.family, judged.outputs)
    if log_p is not None:
        shown = reliability_display(to_numpy(log_p), to_numpy(class_labels(judged.y)))
    elif fit.dispersion is not None:
        shown = pit_display(gaussian_pit(standardised(fit, judged.outputs, judged.y)))
    else:
        counts = to_numpy(judged.y.reshape(-1))
        shown = pit_display(poisson_pit(counts, to_numpy(judged.outputs.exp().reshape(-1))))
    return shown | {"evidence": judged.calibration.evidence}


def _spectrum(fit: PenalisedFit, leverage: Tensor | None) -> dict[str, Any]:
    ratios = fit.variance.ratios
    reason = None
    if ratios is None:
        size = min(fit.problem.n_params, fit.problem.n_rows)
        reason = f"{size} eigenvalues: more than the {EIGENVALUE_LIMIT} that are computed"
        if not fit.solver.exact:
            reason = f"solver {fit.solver.name} computes no eigenvalues"
    if leverage is None:
        return {"ratios": None, "reason": reason, "leverage": []}
    ordered = np.sort(to_numpy(leverage))[::-1]
    picked = np.unique(np.linspace(0, len(ordered) - 1, QUANTILES).round().astype(int))
    return {
        "ratios": None if ratios is None else to_json(to_numpy(ratios)),
        "reason": reason,
        "leverage": to_json(ordered[picked]),
    }


def _influence(
    fit: PenalisedFit,
    nll: Tensor,
    leverage: Tensor | None,
    tic: Tensor | None,
    left_out: LeaveOneOut | None,
) -> list[dict[str, Any]]:
    problem = fit.problem
    if leverage is None or tic is None:
        return []
    ranking = tic if left_out is None else left_out.psi
    top = torch.argsort(ranking, descending=True)[:INFLUENTIAL]
    log_p = log_probabilities(problem.family, problem.outputs)
    if log_p is not None:
        labels, predicted = class_labels(problem.y), log_p.argmax(dim=1)
    else:
        labels = problem.y[:, 0]
        rate = problem.family.name == "poisson"
        predicted = problem.outputs[:, 0].exp() if rate else problem.outputs[:, 0]
    return [
        {
            "index": i,
            "label": labels[i].item(),
            "predicted": predicted[i].item(),
            "leverage": leverage[i].item(),
            "tic": tic[i].item(),
            "loo": None if left_out is None else left_out.psi[i].item(),
            "nll": nll[i].item(),
        }
        for i in top.tolist()
    ]
