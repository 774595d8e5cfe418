"""Fitting: GLMs at their optimum, networks reproducible, with a record of what was done."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch

from benchmarks.zoo import fit as f
from benchmarks.zoo.data import Pool
from benchmarks.zoo.draw import draw
from benchmarks.zoo.grid import Cell
from flataudit import audit

NET = Cell("b", "digits", "mlp", 60, 1e-2, width=4, depth=1, activation="relu", pooling=2,
           optimizer="sgd", lr=0.05, epochs=6)  # fmt: skip


@pytest.mark.parametrize(("data", "n"), [("digits", 100), ("breast-cancer", 80), ("diabetes", 60)])
def test_glms_are_at_the_optimum_of_the_penalty_that_the_audit_finds(data, n):
    cell = Cell("b", data, "glm", n, 1e-2)
    drawn = draw(cell)
    fitted = f.fit(cell, drawn)
    assert fitted.record is None
    report = audit(fitted.model, (f.flat(drawn.train.x), drawn.train.y))
    assert report.penalty.source == "estimator"
    assert report.penalty.stationarity < 1e-3


def test_counts_are_at_the_optimum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3)).astype(np.float32)
    model = f.fit_glm(Pool(x, rng.poisson(np.exp(x[:, 0])).astype(float)), "counts", 1e-2)
    report = audit(model, (f.flat(x), rng.poisson(1, 200).astype(float)))
    assert report.penalty.value == pytest.approx(1e-2)
    assert model.coef_[0] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_networks_are_reproducible_and_recorded(optimizer):
    cell = dataclasses.replace(NET, optimizer=optimizer, schedule="cosine")
    first, again = f.fit(cell, draw(cell)), f.fit(cell, draw(cell))
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.model.training
    assert (first.record.optimizer, first.record.batch_size) == (optimizer, 50)
    assert first.record.steps == 6 * 2  # two batches of 60 samples
    at = np.arange(12)
    assert first.record.total_lr == pytest.approx(
        (0.05 * 0.5 * (1 + np.cos(np.pi * at / 12))).sum()
    )


def test_early_stopping_keeps_the_best_epoch_and_its_record():
    cell = dataclasses.replace(NET, early_stopping=True, epochs=300, lr=0.1, weight_decay=0.0)
    drawn = draw(cell)
    fitted = f.fit(cell, drawn)
    assert fitted.epochs < 300 - f.PATIENCE
    assert fitted.record.steps == fitted.epochs * 1  # 48 samples, one batch
    # The same run for exactly that long ends with the same weights.
    short = dataclasses.replace(cell, epochs=fitted.epochs)
    same = f.fit_network(short, dataclasses.replace(drawn, validation=None))
    for a, b in zip(fitted.model.parameters(), same.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_did_not_converge_is_an_error():
    cell = dataclasses.replace(NET, lr=1e6, epochs=20)
    with pytest.raises(f.TrainingFailed, match="expected a finite loss"):
        f.fit(cell, draw(cell))
    with pytest.raises(KeyError, match="choose one of: sgd, adam, adamw"):
        f.make_optimizer(dataclasses.replace(NET, optimizer="lion"), torch.nn.Linear(1, 1))
    hard = Pool(np.eye(3, dtype=np.float32), np.array([0, 1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f.fit_glm(hard, "classification", 1e-2)
