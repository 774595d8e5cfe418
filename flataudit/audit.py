"""The method, from a fitted model to a gap prediction that says whether it may be relied on.

Read `audit` from top to bottom: (1) the model and its data as one problem B = S'J/sqrt(n);
(2) the penalty D and the factorisation of G + D, G = B'B; (3) soft rank, TIC and leave-one-out
from one object, the functional variance; (4) calibration on data the fit did not see; (5) the
soft rank of the recalibrated model, where the decision list asks for it, and the estimates at
D/3 and 3D; (6) which estimate to believe, how far, and what to warn of. Source: arXiv 2506.17809;
docs/method.md has the formulas.
"""

from __future__ import annotations

import inspect
import math
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flataudit import estimates as estimators
from flataudit.calibration import is_saturated
from flataudit.calibration.eprocess import EProcess
from flataudit.checkpoint import as_checkpoint
from flataudit.curvature.problem import Problem
from flataudit.display import build_display
from flataudit.errors import InputError, NumericalError
from flataudit.families import Family
from flataudit.fitting import PenalisedFit, penalised_fit
from flataudit.inputs import Inputs
from flataudit.judgement import (
    Unseen,
    judge_calibration,
    likelihood_ratios,
    predicted_accuracy,
    premise_test,
    recalibration_scale,
    to_numpy,
)
from flataudit.labels import with_indices
from flataudit.models.sklearn import as_network
from flataudit.models.torch import PreparedModel
from flataudit.penalty import PenaltyArgument
from flataudit.preparation import heldout_outputs, prepared_problem
from flataudit.results import (
    LEVEL,
    Z_LEVEL,
    AuditReport,
    DataInfo,
    Estimate,
    Estimates,
    Fit,
    Gap,
    HeldoutFit,
    Interval,
    ModelInfo,
    Samples,
    UnseenLabels,
)
from flataudit.selection import (
    MODEL_ERROR,
    Observations,
    SelectionPolicy,
    choose_confidence,
    choose_estimator,
    collect_warnings,
    needs_recalibration,
    widened,
)
from flataudit.sensitivity import penalty_sensitivity, wants_sensitivity
from flataudit.shift import input_shift
from flataudit.slices import class_table, group_by, per_sample, slice_tables
from flataudit.solvers import Checkpoint, Work, check_name
from flataudit.tensors import as_pair, digest, sample_keys
from flataudit.training import parse_training


def audit(
    model: Any,
    train: Any,
    *,
    heldout: Any = None,
    family: str = "auto",
    penalty: PenaltyArgument = "auto",
    dispersion: float | str = "auto",
    training: Mapping[str, Any] | str | Path | None = None,
    curvature: str = "ggn",
    solver: str = "auto",
    device: str = "auto",
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    recalibrate: bool = False,
    sensitivity: str | bool = "auto",
    chunk_size: int | None = None,
    classes: Sequence[str] | None = None,
    slices: Mapping[str, Any] | None = None,
    steps: Callable[[int, int], None] | None = None,
    checkpoint: Checkpoint | str | Path | None = None,
) -> AuditReport:
    """Predicts a fitted model's generalization gap and says whether to rely on it.

    With G = (1/n) sum J_i' Lambda_i J_i and J = mean NLL + theta'D theta/2, the estimates are, in
    nats per example, soft rank: tr(G (G+D)^-1)/n; TIC: tr(C (G+D)^-1)/n; LOO: the mean rise of
    l_i when sample i is left out; each with per-sample values.

    Args:
        model: A torch.nn.Module, of which a float64 copy in eval mode is audited, or a fitted
            scikit-learn estimator (`flataudit.models.sklearn`), of which an exact torch twin is.
        train: (x, y) the model was fitted to, arrays or tensors, n >= 2 samples first. x may be
            a dict of arrays, by the names of forward's parameters, or a tuple, by position.
        heldout: (x, y) never used in training or selection; judges calibration and shows the
            observed gap. Without it leave-one-out probabilities judge calibration.
        family: auto, categorical, bernoulli, gaussian or poisson (`flataudit.families`).
        penalty: 'auto' (an estimator's own), the weight decay of the mean loss, or
            {parameter name: number} with 0 for unpenalised parameters.
        dispersion: The Gaussian variance, or 'auto' for RSS/(n K - soft rank).
        training: The training record (mapping, file or KEY=VALUE text; `flataudit.training`),
            from which D = weight decay plus training time follows where `penalty` is 'auto'.
        curvature: 'ggn', the generalized Gauss-Newton matrix.
        solver: auto, primal or dual (exact), sampling or lanczos (matrix-free, approximate: they
            state their error, and lanczos has no leave-one-out), or kfac (rough, its error unknown;
            needs the extra of that name). `auto` takes an exact one where
            its matrix fits into memory.
        device: auto, cpu or cuda; the numbers are float64 on each.
        seed: For the randomised parts of calibration and the test of the held-out inputs, and the
            probes and samples of the matrix-free solvers; exact estimates have none.
        progress: Called with a short text as each stage starts.
        recalibrate: Also compute the soft rank of the recalibrated model where not needed.
        sensitivity: Also give the estimates at D/3 and 3D: 'auto' (where min(P, N) is at most
            2,000), True or False.
        chunk_size: Samples per chunk; the default follows from memory. Changes no number.
        classes: The names of the outputs in order, for labels given as text; without it they are
            the sorted training labels, and the report says so.
        slices: {name: one value per training sample}: the gap is also given by these values
            (`flataudit.slices`), as it is by class; not with lanczos, which knows no sample.
        steps: Called from within a matrix-free solver with the matrix products done and expected.
        checkpoint: A folder, or an object with load and save (`flataudit.solvers.base`), from
            which a killed audit with a matrix-free solver goes on.

    Returns:
        A frozen `AuditReport`; `report.to_dict()` is the contract's JSON.

    Raises:
        InputError: bad data or an unsupported model, in one line: expected, got, what to do.
        MemoryPlanError: no solver fits; states the size before any work.
        NumericalError: a factorisation broke down.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> x = torch.randn(300, 3, dtype=torch.float64)
    >>> y = (x @ torch.ones(3, dtype=torch.float64) + torch.randn(300, dtype=torch.float64))
    >>> line = torch.nn.Linear(3, 1).double()
    >>> solution = torch.linalg.lstsq(torch.cat([x, torch.ones(300, 1)], 1), y[:, None]).solution
    >>> with torch.no_grad():
    ...     _ = line.weight.copy_(solution[:3].T), line.bias.copy_(solution[3])
    >>> report = audit(line, (x, y), penalty=0.0)
    >>> round(report.estimates.soft_rank.rank, 9)  # least squares: the number of parameters
    4.0
    """
    say = progress or (lambda stage: None)
    check_name(solver)
    if curvature != "ggn":
        raise InputError(f"unknown curvature {curvature!r}; choose one of: ggn")
    record = None if training is None else parse_training(training)

    # (1) The model at its weights and its data: B = S'J/sqrt(n), so that G = B'B.
    say("reading model and data")
    subject = as_network(model, train, heldout, family)
    train, heldout, names, assumed = with_indices(subject.train, subject.heldout, classes)
    train = as_pair(train, "train")
    grouped = group_by(slices, len(train[1]))
    prepared, problem = prepared_problem(
        subject,
        train,
        names,
        dispersion=_dispersion(dispersion),
        device=device,
        chunk_size=chunk_size,
    )
    unseen = None if heldout is None else _unseen(heldout, train[0], prepared, problem, seed)
    varied = wants_sensitivity(sensitivity, problem)

    # (2) The penalty D and the factorisation of G + D.
    say("factorising the curvature")
    fit = penalised_fit(
        problem,
        penalty=penalty,
        record=record,
        dispersion=dispersion,
        solver=solver,
        own=subject.penalty,
        work=_work(seed, steps, checkpoint),
    )
    problem, variance, likelihood = fit.problem, fit.variance, fit.problem.family
    nll = likelihood.nll(problem.outputs, problem.y)

    # (3) Three estimators, all from the functional variance A_i, with the solver's own errors.
    say("estimating the gap")
    v = problem.factor.residual
    rank = estimators.measure_soft_rank(variance)
    energy = estimators.measure_tic(variance, v)
    without = estimators.measure_loo(variance, v, likelihood, problem.outputs, problem.y)
    left_out = None if without is None else without[0]
    soft_rank = rank.gap * problem.n_samples
    each = per_sample(problem, nll, energy.psi, left_out)
    if grouped and each is None:
        assumed += (f"not sliced: the solver {fit.solver.name} knows no sample by itself",)

    # (4) Calibration on held-out data, else on the leave-one-out outputs; the premise test.
    say("judging calibration")
    judged = judge_calibration(fit, left_out, unseen, seed=seed)
    calibration = judged.calibration
    saturated = is_saturated(calibration.saturation)
    linear = problem.is_linear()
    premise = premise_test(fit, left_out)
    labels = None if unseen is None else _unseen_labels(fit, unseen)

    # (5) The soft rank of the recalibrated model: a second factorisation, where it is needed; how
    # much the estimates depend on D: one more for each of D/3 and 3D, where that is cheap.
    recalibrated = blended = None
    if recalibrate or needs_recalibration(calibration, linear=linear, saturated=saturated):
        say("recalibrating")
        target = judged.loo_accuracy if judged.loo_accuracy is not None else calibration.accuracy
        recalibrated, blended = _recalibrated(fit, nll, rank, target)
    estimates = Estimates(
        soft_rank=_estimate(nll, rank, rank=soft_rank),
        tic=_estimate(nll, energy, centred=energy.gap - variance.mean_gradient / problem.n_samples),
        loo=None
        if without is None
        else _estimate(
            nll,
            without[1],
            accuracy=judged.loo_accuracy,
            mean_confidence=judged.loo_confidence,
        ),
        soft_rank_recalibrated=recalibrated,
        soft_rank_blend=blended,
    )
    penalties = None
    if varied:
        say("varying the penalty")
        penalties = penalty_sensitivity(fit, estimates)

    # (6) Which estimate to believe, how far, and what to warn of.
    policy = SelectionPolicy()
    estimator, reason = choose_estimator(
        calibration,
        linear=linear,
        saturated=saturated,
        has_loo=left_out is not None,
        scale=None if recalibrated is None else recalibrated.scale,
    )
    chosen: Estimate = getattr(estimates, estimator)
    low, high = widened(chosen.gap, chosen.margin(Z_LEVEL), MODEL_ERROR[estimator], Z_LEVEL)
    gap = Gap(
        value=chosen.gap,
        low=low,
        high=high,
        level=LEVEL,
        estimator=estimator,
        reason=reason,
        lower_bound=problem.n_samples < policy.samples_per_rank * soft_rank,
        model_error=MODEL_ERROR[estimator],
    )
    train_nll = float(nll.mean())
    observed = _observed(unseen, likelihood, train_nll, calibration.accuracy)
    sampling_error = math.sqrt(fit.moments.trace / problem.n_samples)
    seen = Observations(
        calibration=calibration,
        estimates=estimates,
        premise=premise,
        penalty=fit.penalty_info,
        gap=gap,
        heldout=observed,
        saturated=saturated,
        gradient_noise=fit.remaining_gradient / sampling_error if sampling_error > 0 else 0.0,
        max_leverage=estimators.largest_leverage(variance),
        training_time=fit.penalty_info.has_training_time,
        linear=linear,
        shift=None if unseen is None else unseen.shift,
        solver=fit.solver,
    )
    confidence, doubts = choose_confidence(seen, policy)
    return AuditReport(
        model=ModelInfo(n_params=problem.n_params, notes=subject.notes + prepared.notes + assumed),
        data=DataInfo(
            n_samples=problem.n_samples,
            n_outputs=problem.n_outputs,
            sha256=subject.sha256
            or digest(train[0], train[1] if names is None else names.sorted_indices(train[1])),
            heldout_samples=None if unseen is None else len(unseen.y),
        ),
        family=likelihood.name,
        dispersion=fit.dispersion,
        penalty=fit.penalty_info,
        train=Fit(train_nll, judged.train_accuracy),
        heldout=observed,
        calibration=calibration,
        estimates=estimates,
        premise=premise,
        gap=gap,
        predicted_test_nll=Interval(
            value=train_nll + gap.value, low=train_nll + gap.low, high=train_nll + gap.high
        ),
        predicted_accuracy=predicted_accuracy(judged, Z_LEVEL),
        confidence=confidence,
        warnings=collect_warnings(seen, policy),
        solver=fit.solver,
        samples=Samples(
            nll=to_numpy(nll),
            leverage=_per_sample(rank.psi, len(nll)),
            tic=_per_sample(energy.psi, len(nll)),
            loo=_per_sample(None if left_out is None else left_out.psi, len(nll)),
        ),
        display=build_display(fit, judged, nll, rank.psi, energy.psi, left_out, names),
        shift=None if unseen is None else unseen.shift,
        sensitivity=penalties,
        confidence_reasons=doubts,
        classes=class_table(each, names),
        slices=slice_tables(grouped, each),
        fresh_labels=None if labels is None else EProcess().extended(labels.log_ratios).to_dict(),
        unseen=labels,
    )


def _unseen(
    heldout: Any, x_train: Inputs, prepared: PreparedModel, problem: Problem, seed: int
) -> Unseen:
    given, y = as_pair(heldout, "heldout")
    x = given.to(prepared.dtype, problem.device)
    if x.sample_shapes != problem.x.sample_shapes:
        raise InputError(
            f"expected heldout x of shape {problem.x.shapes_of_any} as in training, got"
            f" {x.shapes}; give the same features"
        )
    y = problem.family.check(y, problem.n_outputs).to(problem.device)
    outputs = heldout_outputs(prepared.module, x, chunk_size=problem.chunk_size)
    shift = input_shift(x_train.flattened, given.flattened, seed=seed)
    return Unseen(outputs, y, shift, sample_keys(given))


def _unseen_labels(fit: PenalisedFit, unseen: Unseen) -> UnseenLabels | None:
    """What each held-out label says of the stated probabilities, for repeated audits."""
    spread = None if fit.dispersion is None else fit.dispersion.value
    ratios = likelihood_ratios(fit.problem.family, unseen.outputs, unseen.y, spread)
    if ratios is None or unseen.keys is None:
        return None
    return UnseenLabels(unseen.keys, ratios)


def _recalibrated(
    fit: PenalisedFit, nll: Tensor, rank: estimators.Measured, accuracy: float | None
) -> tuple[Estimate | None, Estimate | None]:
    """Soft rank with Lambda at the logits scaled to the accuracy foreseen; D and J as they are.

    And its blend with the soft rank, where the scale is below 1.
    """
    problem, family = fit.problem, fit.problem.family
    if accuracy is None:
        return None, None
    scale = recalibration_scale(family, problem.outputs, accuracy)
    if scale is None:
        return None, None
    found = estimators.measure_soft_rank(fit.variance_at(fit.penalty, scale))
    recalibrated = _estimate(nll, found, rank=found.gap * problem.n_samples, scale=scale)
    blended = _estimate(nll, estimators.blend(rank, found)) if scale < 1.0 else None
    return recalibrated, blended


def _estimate(nll: Tensor, found: estimators.Measured, **extra: float | None) -> Estimate:
    """The gap with its errors; NumericalError where float64 cannot hold them."""
    estimate = found.estimate(nll, **extra)
    _finite(estimate.gap, estimate.se)
    return estimate


def _per_sample(psi: Tensor | None, n: int) -> NDArray[np.float64]:
    """Contributions (n,), NaN where they do not exist."""
    return np.full(n, np.nan) if psi is None else to_numpy(psi)


def _work(
    seed: int,
    steps: Callable[[int, int], None] | None,
    checkpoint: Checkpoint | str | Path | None,
) -> Work:
    kept = as_checkpoint(checkpoint)
    return Work(seed=seed, checkpoint=kept) if steps is None else Work(seed, steps, kept)


def _observed(
    unseen: Unseen | None, family: Family, train_nll: float, accuracy: float | None
) -> HeldoutFit | None:
    """The gap seen on held-out data; its standard error takes the training NLL as given."""
    if unseen is None:
        return None
    nll, se = _mean_and_se(family.nll(unseen.outputs, unseen.y))
    return HeldoutFit(nll=nll, accuracy=accuracy, gap=nll - train_nll, gap_se=se)


def _mean_and_se(losses: Tensor) -> tuple[float, float]:
    """Mean and standard error of losses in nats; NumericalError where float64 cannot hold them."""
    mean, se = estimators.mean_and_se(losses)
    _finite(mean, se)
    return mean, se


def _finite(*values: float) -> None:
    if not all(math.isfinite(value) for value in values):
        raise NumericalError(
            "expected losses within float64's range, got an overflow; likely causes: outputs far"
            " from the targets, as rates of 0 for counts above 0, or weights near overflow"
        )


def _dispersion(value: float | str) -> float:
    if value == "auto":
        return 1.0
    try:
        return float(value)
    except ValueError:
        raise InputError(
            f"expected dispersion to be 'auto' or a number above 0, got {value!r}; give the"
            " variance"
        ) from None


class _CallableModule(types.ModuleType):
    """`flataudit.audit(...)` and `flataudit.audit.audit(...)` are the same function.

    Importing this module binds it to the package's `audit`; without this the public function
    would turn into a module after the first such import.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> AuditReport:
        return audit(*args, **kwargs)


__signature__ = inspect.signature(audit)  # of the module, which stands in for the function
sys.modules[__name__].__class__ = _CallableModule
