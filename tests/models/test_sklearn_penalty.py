"""The penalty and training record that a scikit-learn estimator's settings imply."""

import numpy as np
import pytest
import torch
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.neural_network._stochastic_optimizers import AdamOptimizer, SGDOptimizer

import flataudit
from flataudit.models.sklearn import as_network, make_twin
from flataudit.models.sklearn_penalty import mlp
from tests.dense import dense, likelihood
from tests.sklearn_cases import CASES, PAIR, THREE, TWO, N, X, fitted, stopped


def problem_of(name):
    """Twin, x, y, family, D by parameter and dispersion, as the audit of the case sees them."""
    y, family = CASES[name][1:3]
    subject = as_network(fitted(name), (X, y), None, "auto")
    report = flataudit.audit(fitted(name), (X, y))
    s2 = 1.0 if report.dispersion is None else report.dispersion.value
    penalty = {
        key: torch.full_like(p, subject.penalty.decay[key] / s2)
        for key, p in subject.model.named_parameters()
    }
    x, y = (torch.from_numpy(np.asarray(a)) for a in subject.train)
    return report, subject.model, x, y, family, penalty, s2


@pytest.mark.parametrize("name", CASES)
def test_penalty_by_the_settings(name):
    *_, weight, bias, _ = CASES[name]
    found = as_network(fitted(name), (X, CASES[name][1]), None, "auto").penalty
    assert found.record.optimizer == "converged"
    for key, value in found.decay.items():
        assert value == pytest.approx(bias if key.endswith("bias") else weight)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_vanishes_with_our_penalty(name):
    """At the fitted optimum: by autograd and by central differences of mean NLL + penalty."""
    report, module, x, y, family, penalty, s2 = problem_of(name)
    tolerance = CASES[name][-1]
    params = dict(module.named_parameters())

    def objective(penalised):
        nll = likelihood(family, module(x), y, s2)[0].mean()
        return nll + penalised * sum((penalty[k] * p.square()).sum() / 2 for k, p in params.items())

    def gradient(penalised):
        grads = torch.autograd.grad(objective(penalised), list(params.values()))
        return torch.cat([g.flatten() for g in grads])

    total, scale = gradient(1.0), gradient(0.0).norm()
    if tolerance is None:  # without a penalty the gradient itself is zero
        tolerance, scale = 1e-5, torch.ones(())
    assert total.norm() <= tolerance * scale
    differences = []
    with torch.no_grad():
        for p in params.values():
            flat = p.view(-1)
            for i in range(len(flat)):
                before, step = flat[i].clone(), 1e-5
                flat[i] = before + step
                above = objective(1.0)
                flat[i] = before - step
                differences.append((above - objective(1.0)) / (2 * step))
                flat[i] = before
    differences = torch.stack(differences)
    assert torch.allclose(differences, total, atol=1e-8 + 1e-4 * float(scale))
    assert differences.norm() <= 2 * tolerance * scale + 1e-8
    assert report.penalty.stationarity <= 2 * tolerance or scale == 1
    assert "not_at_minimum" not in [w.code for w in report.warnings]


@pytest.mark.parametrize("name", CASES)
def test_audit_against_the_dense_definition(name):
    report, module, x, y, family, penalty, s2 = problem_of(name)
    wanted = dense(module, x, y, family, penalty, s2)
    np.testing.assert_allclose(report.samples.leverage, wanted.leverage, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(report.samples.tic, wanted.tic, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(report.samples.loo, wanted.loo.detach(), rtol=1e-7, atol=1e-9)
    assert report.penalty.source == "estimator"
    assert report.penalty.training is None
    assert "penalty_unknown" not in [w.code for w in report.warnings]


def test_mean_over_steps_of_one_over_batch():
    """n = 41 in batches of 40: (1/40 + 1/1)/2 of alpha, as the fitted weights show."""
    x, y, alpha = X[:41], TWO[:41], 0.4
    estimator = MLPClassifier(
        (), solver="sgd", alpha=alpha, batch_size=40, learning_rate_init=0.005, momentum=0.0,
        max_iter=2500, tol=0.0, n_iter_no_change=10**6, random_state=0,
    )  # fmt: skip
    stopped(estimator, x, y)
    weight = mlp(estimator, 41).weight
    assert weight == pytest.approx(alpha * (1 / 40 + 1) / 2)
    module = make_twin(estimator)
    outputs = module(torch.from_numpy(x))
    nll = likelihood("bernoulli", outputs, torch.from_numpy(y))[0].mean()
    theta = module[0].weight
    (gradient,) = torch.autograd.grad(nll, [theta])
    theta = theta.detach()
    implied = -float((gradient * theta).sum() / theta.square().sum())
    # within the noise of single-sample steps; alpha/40 and alpha are far away
    assert implied == pytest.approx(weight, rel=0.15)


SCHEDULES = {
    "constant": {"solver": "sgd"},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "power_t": 0.3},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "tol": 1e-2, "n_iter_no_change": 3},
    "adaptive_early": {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "early_stopping": True,
        "n_iter_no_change": 2,
        "tol": 0.05,
    },
    "early": {"solver": "sgd", "early_stopping": True},
    "adam": {"solver": "adam", "beta_1": 0.8},
    "adam_early": {"solver": "adam", "early_stopping": True, "validation_fraction": 0.23},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_record_of_a_stochastic_fit(name, monkeypatch):
    """The record's learning rates are those that scikit-learn's optimizer really used."""
    rates, batches = [], []
    for kind in (SGDOptimizer, AdamOptimizer):
        plain = kind.update_params

        def update(self, *args, plain=plain):
            own = self.learning_rate if hasattr(self, "momentum") else self.learning_rate_init
            rates.append(own)
            return plain(self, *args)

        monkeypatch.setattr(kind, "update_params", update)
    options = {
        "hidden_layer_sizes": (4,),
        "alpha": 0.3,
        "batch_size": 32,
        "learning_rate_init": 0.05,
        "max_iter": 60,
        "random_state": 3,
    }
    estimator = stopped(MLPClassifier(**(options | SCHEDULES[name])), X, THREE)
    objective = mlp(estimator, N)
    record = objective.record
    n_train = N
    if estimator.early_stopping:
        n_train -= int(np.ceil(estimator.validation_fraction * N))
    batches = [min(32, n_train - start) for start in range(0, n_train, 32)]
    epochs = estimator.n_iter_
    if estimator.early_stopping:
        epochs = int(np.argmax(estimator.validation_scores_)) + 1
        assert epochs < estimator.n_iter_
    used = rates[: epochs * len(batches)]
    assert record.steps == len(used)
    assert record.total_lr == pytest.approx(sum(used), rel=1e-12)
    assert record.optimizer == estimator.solver
    assert record.momentum == (0.9 if estimator.solver == "sgd" else 0.0)
    assert record.weight_decay == pytest.approx(0.3 * np.mean([1 / b for b in batches]))
    assert record.batch_size == 32
    assert ("early stopping held out" in " ".join(record.assumptions)) == estimator.early_stopping
    if name.startswith("adaptive"):
        assert len(set(np.round(used, 12))) > 1

    report = flataudit.audit(estimator, (X, THREE))
    assert report.penalty.source == "estimator"
    assert report.penalty.training["sum_lr"] == pytest.approx(sum(used))
    assert report.penalty.assumptions == record.assumptions
    codes = {w.code: w.severity for w in report.warnings}
    assert codes.get("not_at_minimum", "info") == "info"


def test_training_time_is_added_to_every_parameter():
    """sgd, squared error: (w + 1/T)/s2 on weights, (1/T)/s2 on biases."""
    options = {"hidden_layer_sizes": (3,), "solver": "sgd", "max_iter": 30, "random_state": 0}
    estimator = stopped(MLPRegressor(alpha=4.0, momentum=0.5, **options), X, PAIR)
    report = flataudit.audit(estimator, (X, PAIR))
    record = mlp(estimator, N).record
    assert record.loss == "half_mse"
    s2 = report.dispersion.value
    assert report.penalty.low == pytest.approx(1 / record.training_time() / s2)
    assert report.penalty.high == pytest.approx((4.0 / N + 1 / record.training_time()) / s2)
    assert report.penalty.free_params == 0
    module = make_twin(estimator)
    d = {
        k: torch.full_like(p, report.penalty.low if k.endswith("bias") else report.penalty.high)
        for k, p in module.named_parameters()
    }
    wanted = dense(module, torch.from_numpy(X), torch.from_numpy(PAIR), "gaussian", d, s2)
    np.testing.assert_allclose(report.samples.leverage, wanted.leverage, rtol=1e-8)


def test_fitted_in_several_calls():
    estimator = MLPClassifier((3,), random_state=0)
    for _ in range(4):
        estimator.partial_fit(X, THREE, classes=[0, 1, 2])
    record = mlp(estimator, N).record
    assert record.steps == 4
    assert "several calls" in record.assumptions[0]
