"""What each warning is called, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping

# code: (title, what to do first, what else helps)
_WARNINGS: Mapping[str, tuple[str, str, str]] = {
    "overconfident": (
        "Over-confident",
        "Measure the gap on held-out data (--heldout) before deploying.",
        "Fit a temperature on held-out data; more decay, fewer epochs or more data help too.",
    ),
    "underconfident": (
        "Under-confident",
        "The gap is read from TIC; fit a temperature on held-out data if probabilities are used.",
        "The model is right more often than it says, which is safe but wastes information.",
    ),
    "train_saturated": (
        "Training data fitted to the last detail",
        "Do not rely on the number: audit an earlier checkpoint, or give held-out data.",
        "The training loss is so small that its derivatives no longer say anything about the gap.",
    ),
    "not_at_minimum": (
        "Not at a minimum of the stated objective",
        "Check that the penalty and the data are the ones used in training.",
        "For a model stopped early pass the training record (--training).",
    ),
    "premise_violated": (
        "Errors do not match the stated probabilities",
        "Read the leave-one-out estimate, and measure on held-out data where you can.",
        "The soft rank needs both to agree; label errors among the influential samples are a "
        "common cause.",
    ),
    "estimators_disagree": (
        "The estimators disagree",
        "Read why this estimator was chosen; in doubt take their whole range as the uncertainty.",
        "Held-out data settles which one is right.",
    ),
    "high_leverage": (
        "A few samples decide the fit",
        "Look through the influential training samples for wrong labels and rare cases.",
        "Collect more samples like them, or increase the penalty.",
    ),
    "penalty_unknown": (
        "It is not known how the model was trained",
        "Pass the training record (--training): optimizer, sum of learning rates, momentum, batch "
        "size, weight decay.",
        "Log them as parameters of the training run and the next audit finds them. Without them "
        "gaps of early-stopped nets come out too large.",
    ),
    "indefinite_hessian": (
        "The Hessian has negative directions",
        "Use --curvature ggn (the default), or train until the loss no longer falls.",
        "With negative curvature the formula means nothing.",
    ),
    "few_calibration_samples": (
        "Too few samples to judge the calibration",
        "Give at least 200 held-out samples with at least 10 errors, or more training samples.",
        "Until then calibration is neither shown nor refuted.",
    ),
    "approximate_solver": (
        "Computed approximately",
        "Repeat with an exact solver (--solver primal or dual) where memory allows.",
        "A GPU or more memory raises the limit; the solver's reason says why this one was used.",
    ),
    "data_mismatch": (
        "The data may not be the training data",
        "Audit with exactly the data this version was trained on, preprocessed the same way.",
        "Compare the sha256 below with the data set logged by the training run.",
    ),
    "prediction_contradicted": (
        "The measured gap contradicts the prediction",
        "Trust the measurement, and do not rely on the prediction for this model.",
        "Check that the held-out data come from the same source as the training data.",
    ),
    "gap_regressed": (
        "The gap rose since the last audit",
        "Compare this audit with the last one (flataudit compare) before the version is used.",
        "Fewer data, less decay or longer training raise the gap; other data change it as well.",
    ),
    "calibration_refuted": (
        "Labels that came in contradict the stated probabilities",
        "Fit a temperature on these labels before the probabilities are used, or train anew.",
        "Data that drifted, or a training that was never calibrated, show so; the alarm stays "
        "with this version, another one starts anew.",
    ),
    "outside_theory": (
        "Partly outside what the theory covers",
        "Treat the number as a rough indication and confirm it on held-out data.",
        "The message names the part of the model, its training or its data that is not covered.",
    ),
}
# The same where held-out data were given: (what to do first, what else helps)
_MEASURED: Mapping[str, tuple[str, str]] = {
    "overconfident": (
        "Fit a temperature on held-out data before its probabilities are used.",
        "More decay, fewer epochs or more data help too.",
    ),
    "train_saturated": (
        "Trust the measurement on held-out data, or audit an earlier checkpoint.",
        "The training loss is so small that its derivatives no longer say anything about the gap.",
    ),
}
WARNING_CODES: tuple[str, ...] = tuple(_WARNINGS)
_UNKNOWN_REMEDY = "Follow the warning's message; this version has no further advice on it."


def remedy(code: str, *, measured: bool = False) -> str:
    """What to do about a warning; a general hint for a code this version does not know.

    measured: held-out data were given, so that to ask for them is no remedy.
    """
    if measured and code in _MEASURED:
        return " ".join(_MEASURED[code])
    return " ".join(_WARNINGS[code][1:]) if code in _WARNINGS else _UNKNOWN_REMEDY


def first_step(code: str, *, measured: bool = False) -> str:
    """The first sentence of `remedy`: the thing to do now."""
    if measured and code in _MEASURED:
        return _MEASURED[code][0]
    return _WARNINGS[code][1] if code in _WARNINGS else _UNKNOWN_REMEDY


def warning_title(code: str) -> str:
    """A warning's name in words; the code itself where it is not known."""
    return _WARNINGS[code][0] if code in _WARNINGS else code
