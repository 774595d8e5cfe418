"""Which outputs judge calibration, the premise test, and the recalibrated model."""

from __future__ import annotations

import math

import pytest
import torch

from flataudit import estimates
from flataudit.audit import audit
from flataudit.families import Bernoulli, Categorical, Gaussian, log_probabilities
from flataudit.fitting import penalised_fit
from flataudit.judgement import (
    SCALE_LIMIT,
    Unseen,
    judge_calibration,
    predicted_accuracy,
    premise_test,
    recalibration_scale,
)
from tests.cases import BY_NAME, build
from tests.dense import dense, from_parts, likelihood

LOGITS = 3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def confidence(family, f: torch.Tensor) -> float:
    return float(log_probabilities(family, f).exp().amax(dim=1).mean())


@pytest.mark.parametrize("accuracy", [0.4, 0.6, 0.8, 0.95, 0.999])
@pytest.mark.parametrize(
    ("family", "f"), [(Categorical(), LOGITS), (Bernoulli(), LOGITS[:, :1])], ids=["k4", "k1"]
)
def test_scaled_confidence_is_the_accuracy(family, f, accuracy):
    if accuracy < 0.5 and family.name == "bernoulli":
        accuracy = 0.55  # a top label is never less likely than 1/2
    scale = recalibration_scale(family, f, accuracy)
    assert confidence(family, scale * f) == pytest.approx(accuracy, abs=1e-9)
    assert (scale < 1) is (confidence(family, f) > accuracy)


def test_scale_is_bounded():
    assert recalibration_scale(Categorical(), LOGITS, 1.0) == pytest.approx(SCALE_LIMIT, rel=1e-6)
    assert recalibration_scale(Categorical(), LOGITS, 0.1) == pytest.approx(
        1 / SCALE_LIMIT, rel=1e-6
    )
    assert recalibration_scale(Gaussian(), LOGITS, 0.5) is None


def overconfident(n: int = 60):
    """A random network with labels that follow flatter probabilities than it claims."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)
    ).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
        y = torch.multinomial(torch.softmax(0.2 * model(x), dim=1), 1, generator=generator)[:, 0]
    return model, x, y


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_recalibrated_soft_rank_is_its_definition(solver):
    """Lambda at s f, where mean confidence is the leave-one-out accuracy; D and J as they are."""
    model, x, y = overconfident()
    report = audit(model, (x, y), penalty=0.05, solver=solver, recalibrate=True)
    found = report.estimates.soft_rank_recalibrated
    scale = found.scale
    d = {name: torch.full_like(p.detach(), 0.05) for name, p in model.named_parameters()}
    exact = dense(model, x, y, "categorical", d)
    hits = (exact.loo_outputs.argmax(dim=1) == y).double()
    assert report.estimates.loo.accuracy == pytest.approx(float(hits.mean()))
    assert confidence(Categorical(), scale * exact.outputs) == pytest.approx(
        float(hits.mean()), abs=1e-9
    )
    assert scale < 1
    _, r, variance = likelihood("categorical", scale * exact.outputs, y)
    flat = torch.cat([t.flatten() for t in d.values()])
    again = from_parts(
        exact.outputs, exact.jacobian, exact.nll, r, variance, flat, "categorical", y
    )
    assert found.rank == pytest.approx(float(again.leverage.sum()), rel=1e-9)
    assert found.gap == pytest.approx(float(again.leverage.mean()), rel=1e-9)
    se = float((exact.nll + again.leverage).std()) / math.sqrt(len(y))
    assert found.se == pytest.approx(se, rel=1e-9)
    assert found.rank != pytest.approx(report.estimates.soft_rank.rank, rel=0.05)


def test_recalibration_of_a_model_at_its_accuracy_changes_nothing():
    """s = 1 gives the soft rank itself."""
    built = build(BY_NAME["mlp_tanh_wide"])
    family, f = built.problem.family, built.problem.outputs
    scale = recalibration_scale(family, f, confidence(family, f))
    assert scale == pytest.approx(1.0, rel=1e-9)


# --- what is judged -----------------------------------------------------------------------------


def fitted(name="mlp_relu_inplace"):
    case = BY_NAME[name]
    built = build(case)
    fit = penalised_fit(
        built.problem,
        penalty=0.05,
        record=None,
        dispersion=case.dispersion,
        solver="primal",
    )
    v = fit.problem.factor.residual
    left_out = estimates.loo(
        fit.variance, v, fit.problem.family, fit.problem.outputs, fit.problem.y
    )
    return fit, left_out


def test_heldout_comes_first_then_loo_then_training():
    fit, left_out = fitted()
    f, y = fit.problem.outputs, fit.problem.y
    unseen = Unseen(f[:10] / 2, y[:10])
    for held, left, evidence, outputs in (
        (unseen, left_out, "heldout", unseen.outputs),
        (None, left_out, "loo", left_out.outputs),
        (None, None, "train", f),
    ):
        found = judge_calibration(fit, left, held)
        assert found.calibration.evidence == evidence
        assert found.calibration.n == len(outputs)
        torch.testing.assert_close(found.outputs, outputs, rtol=0, atol=0)
        assert found.train_accuracy == pytest.approx(float((f.argmax(dim=1) == y).double().mean()))


def test_training_outputs_give_no_verdict_and_no_predicted_accuracy():
    fit, _ = fitted()
    found = judge_calibration(fit, None, None)
    assert found.calibration.verdict == "unknown"
    assert predicted_accuracy(found, 1.645) is None


def test_leave_one_out_accuracy_and_confidence():
    fit, left_out = fitted()
    found = judge_calibration(fit, left_out, None)
    p = torch.softmax(left_out.outputs, dim=1)
    hits = (p.argmax(dim=1) == fit.problem.y).double()
    assert found.loo_accuracy == pytest.approx(float(hits.mean()))
    assert found.loo_confidence == pytest.approx(float(p.amax(dim=1).mean()))


@pytest.mark.parametrize("name", ["ridge", "gaussian_outputs", "poisson", "poisson_outputs"])
def test_regression_has_no_accuracy(name):
    fit, left_out = fitted(name)
    found = judge_calibration(fit, left_out, None)
    assert found.train_accuracy is None
    assert found.loo_accuracy is None
    assert found.calibration.accuracy is None
    assert predicted_accuracy(found, 1.645) is None
    assert found.calibration.evidence == "loo"


def test_predicted_accuracy_is_binomial_and_stays_within_0_and_1():
    fit, left_out = fitted()
    found = judge_calibration(fit, left_out, None)
    interval = predicted_accuracy(found, 2.0)
    a, n = found.calibration.accuracy, found.calibration.n
    half = 2.0 * math.sqrt(a * (1 - a) / n)
    assert interval.value == a
    assert interval.low == pytest.approx(a - half)
    assert interval.high == pytest.approx(min(1.0, a + half))


# --- the premise test ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mlp_tanh_wide", "logistic", "ridge", "gaussian_outputs", "poisson"]
)
def test_premise_is_its_definition(name):
    """sum r'Ar / sum h with residuals at the leave-one-out outputs; z on paired differences."""
    case = BY_NAME[name]
    fit, left_out = fitted(name)
    built = build(case)
    d = {k: torch.full_like(p.detach(), 0.05) for k, p in built.problem.params.items()}
    exact = dense(built.model, built.x, built.y, case.family, d, case.dispersion)
    for left, outputs, evidence in (
        (left_out, exact.loo_outputs, "loo"),
        (None, exact.outputs, "train"),
    ):
        _, r, _ = likelihood(case.family, outputs, built.y, case.dispersion)
        energy = torch.einsum("nk,nkl,nl->n", r, exact.functional, r)
        difference = (energy - exact.leverage).numpy()
        found = premise_test(fit, left)
        assert found.evidence == evidence
        ratio = float(energy.sum() / exact.leverage.sum())
        assert found.information_ratio == pytest.approx(ratio, rel=1e-8)
        z = difference.mean() / (difference.std(ddof=1) / math.sqrt(len(difference)))
        assert found.z == pytest.approx(z, rel=1e-8)


def test_premise_holds_on_labels_drawn_from_the_model():
    """Information-matrix equality: over 200 draws of the labels, r'Ar averages h."""
    model, x, _ = overconfident(40)
    d = {name: torch.full_like(p.detach(), 0.05) for name, p in model.named_parameters()}
    with torch.no_grad():
        p = torch.softmax(model(x), dim=1)
    generator = torch.Generator().manual_seed(12)
    labels = torch.multinomial(p, 200, replacement=True, generator=generator)
    exact = dense(model, x, labels[:, 0], "categorical", d)
    hot = torch.nn.functional.one_hot(labels, 3).double()
    r = p[:, None, :] - hot
    energy = torch.einsum("nsk,nkl,nsl->s", r, exact.functional, r).numpy()
    wanted = float(exact.leverage.sum())
    assert abs(energy.mean() - wanted) < 4 * energy.std(ddof=1) / math.sqrt(200)
    assert energy.std(ddof=1) / math.sqrt(200) < 0.1 * wanted
