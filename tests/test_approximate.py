"""Audits with the matrix-free solvers: what the report says, falls back to, and goes on from."""

from __future__ import annotations

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import flataudit
from flataudit import audit
from flataudit.errors import MemoryPlanError
from flataudit.report import html, terminal, words
from flataudit.solvers import MATRIX_FREE, SOLVERS
from tests.cases import BY_NAME, build

GENERATOR = torch.Generator().manual_seed(3)
X = torch.randn(300, 6, generator=GENERATOR)
Y = (X[:, 0] + torch.randn(300, generator=GENERATOR) > 0).long() + (X[:, 1] > 1).long()
PENALTY = 0.01


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.03, weight_decay=PENALTY)
        for _ in range(150):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), Y).backward()
            optimizer.step()
    return model


@pytest.fixture(scope="module")
def exact():
    return audit(network(), (X, Y), penalty=PENALTY, solver="dual")


@pytest.fixture(scope="module")
def approximate():
    """The same audit by a matrix-free solver, made once."""
    return cache(lambda solver: audit(network(), (X, Y), penalty=PENALTY, solver=solver))


def codes(report) -> dict[str, str]:
    return {w.code: w.severity for w in report.warnings}


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
def test_estimates_and_labels(solver, exact, approximate):
    report = approximate(solver)
    assert report.solver.name == solver
    assert report.solver.exact is False
    assert codes(report)["approximate_solver"] == "info"
    assert "approximate_solver" not in codes(exact)
    for name in ("soft_rank", "tic"):
        got, wanted = getattr(report.estimates, name), getattr(exact.estimates, name)
        assert got.gap == pytest.approx(wanted.gap, rel=0.06)
        assert got.se == pytest.approx(wanted.se, rel=0.05)
        assert wanted.monte_carlo_se is None
        assert wanted.truncation is None
        assert got.monte_carlo_se >= 0
        assert got.truncation >= 0
    tic = report.estimates.tic
    assert tic.centred == pytest.approx(exact.estimates.tic.centred, rel=0.06)
    chosen = getattr(report.estimates, report.gap.estimator)
    margin = 1.6448536 * math.hypot(chosen.se, chosen.monte_carlo_se) + chosen.truncation
    own = chosen.gap * math.expm1(1.6448536 * report.gap.model_error)
    half = math.hypot(margin, own)
    assert report.gap.high - report.gap.value == pytest.approx(half, rel=1e-6)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["solver"]["exact"] is False
    assert found["estimates"]["tic"]["monte_carlo_se"] == tic.monte_carlo_se


def test_lanczos_knows_no_sample_by_itself(approximate):
    report = approximate("lanczos")
    assert report.estimates.loo is None
    assert report.premise is None
    assert report.calibration.evidence == "train"
    assert report.calibration.verdict == "unknown"
    assert report.gap.estimator == "soft_rank"
    assert "high_leverage" not in codes(report)
    assert report.confidence == "low"
    for values in (report.samples.leverage, report.samples.tic, report.samples.loo):
        assert values.shape == (300,)
        assert np.isnan(values).all()
    assert np.isfinite(report.samples.nll).all()
    assert report.display["influence"] == []
    assert report.display["spectrum"]["leverage"] == []
    assert report.to_dict()["estimates"]["loo"] is None
    assert [point.loo for point in report.sensitivity] == [None] * 3


def test_lanczos_with_heldout_data_judges_and_recalibrates(exact):
    data = (X[:250], Y[:250])
    given = {"heldout": (X[250:], Y[250:]), "penalty": PENALTY, "recalibrate": True}
    report = audit(network(), data, solver="lanczos", **given)
    wanted = audit(network(), data, solver="primal", **given)
    assert report.calibration.evidence == "heldout"
    found = report.estimates.soft_rank_recalibrated
    # Its scale is set by the leave-one-out accuracy where there is one, else by the held-out one.
    assert found.monte_carlo_se is not None
    assert found.rank > 0
    assert wanted.estimates.soft_rank_recalibrated.scale != found.scale


def test_sampling_gives_what_an_exact_solver_gives(exact, approximate):
    report = approximate("sampling")
    assert report.calibration.evidence == "loo"
    assert report.gap.estimator == exact.gap.estimator
    assert report.estimates.loo.gap == pytest.approx(exact.estimates.loo.gap, rel=0.06)
    assert report.premise.information_ratio == pytest.approx(
        exact.premise.information_ratio, rel=0.1
    )
    ranks = [np.argsort(-each.samples.tic)[:30] for each in (report, exact)]
    assert len(np.intersect1d(*ranks)) >= 20
    for values in (report.samples.leverage, report.samples.tic, report.samples.loo):
        assert np.isfinite(values).all()
    assert len(report.display["influence"]) == 50


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
def test_page_and_terminal(solver, approximate):
    report = approximate(solver)
    shown = report.to_dict()
    page = html.render(shown, dict(report.display))
    assert "nan" not in page.lower().replace("nanosecond", "")
    assert "approximate" in page
    text = terminal.render(shown)
    assert f"{solver} on cpu" in text
    assert "approximate_solver" in text
    assert words.verdict(shown) in ("pass", "warn", "fail")


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
@pytest.mark.parametrize("name", ["gaussian_outputs", "ridge"])
def test_dispersion_settles(solver, name):
    built = build(BY_NAME[name])
    given = {"family": "gaussian", "penalty": 0.3}
    wanted = audit(built.model, (built.x, built.y), solver="dual", **given)
    report = audit(built.model, (built.x, built.y), solver=solver, **given)
    assert report.dispersion.source == "residuals"
    assert report.dispersion.value == pytest.approx(wanted.dispersion.value, rel=1e-5)


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
def test_evidence_penalty(solver):
    wanted = audit(network(), (X, Y), solver="dual")
    report = audit(network(), (X, Y), solver=solver)
    assert report.penalty.source == "evidence"
    assert report.penalty.value == pytest.approx(wanted.penalty.value, rel=0.03)


def test_training_record_and_free_parameters():
    """Adam's penalty differs by element; biases free by argument: both through lanczos."""
    record = "optimizer=adam,lr=0.03,steps=150,batch_size=300,weight_decay=0.01"
    free = {"0.weight": 0.02, "0.bias": 0.0, "2.weight": 0.02, "2.bias": 0.0}
    for given in ({"training": record}, {"penalty": free}):
        wanted = audit(network(), (X, Y), solver="dual", **given)
        report = audit(network(), (X, Y), solver="lanczos", **given)
        assert report.estimates.soft_rank.rank == pytest.approx(
            wanted.estimates.soft_rank.rank, rel=0.01
        )


# --- what happens when memory does not suffice ----------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    ],
)
def test_out_of_memory_falls_back_with_the_reason(message, monkeypatch):
    tried = []

    def fails(name, error):
        def solve(self, *args, **kwargs):
            tried.append(name)
            raise error

        return solve

    monkeypatch.setattr(
        type(SOLVERS["primal"]), "solve", fails("primal", torch.OutOfMemoryError("no memory"))
    )
    monkeypatch.setattr(type(SOLVERS["dual"]), "solve", fails("dual", RuntimeError(message)))
    monkeypatch.setattr(
        type(MATRIX_FREE["sampling"]), "solve", fails("sampling", MemoryPlanError("too large"))
    )
    report = audit(network(), (X, Y), penalty=PENALTY)
    assert tried == ["primal", "dual", "sampling"]
    assert report.solver.name == "lanczos"
    for name in tried:
        assert f"{name} ran out of memory" in report.solver.reason
    with pytest.raises(MemoryPlanError, match=r"expected solver=dual to get through .*, got"):
        audit(network(), (X, Y), penalty=PENALTY, solver="dual")


def test_other_errors_do_not_fall_back(monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(type(SOLVERS["primal"]), "solve", broken)
    with pytest.raises(RuntimeError, match="something else"):
        audit(network(), (X, Y), penalty=PENALTY)


# --- progress and checkpoints ---------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["lanczos", "sampling"])
def test_steps_and_resume(solver, tmp_path):
    seen = []
    whole = audit(
        network(), (X, Y), penalty=PENALTY, solver=solver, sensitivity=False,
        steps=lambda done, expected: seen.append((done, expected)),
    )  # fmt: skip
    assert all(0 < done <= expected for done, expected in seen)

    def interrupt(done, expected):
        if done >= seen[len(seen) // 2][0]:
            raise KeyboardInterrupt

    given = {"penalty": PENALTY, "solver": solver, "sensitivity": False}
    with pytest.raises(KeyboardInterrupt):
        audit(network(), (X, Y), steps=interrupt, checkpoint=tmp_path / "kept", **given)
    assert len(list((tmp_path / "kept").iterdir())) == 1
    again = []
    resumed = audit(
        network(), (X, Y), checkpoint=str(tmp_path / "kept"),
        steps=lambda done, expected: again.append(done), **given,
    )  # fmt: skip
    assert len(again) < len(seen)
    assert resumed.estimates.tic.gap == pytest.approx(whole.estimates.tic.gap, rel=1e-9)
    assert resumed.gap.value == pytest.approx(whole.gap.value, rel=1e-9)


def test_public_signature():
    assert flataudit.audit.__signature__.parameters["checkpoint"].default is None
