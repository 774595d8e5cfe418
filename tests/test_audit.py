"""`flataudit.audit`: the composition, what it refuses, what it leaves alone, what it returns."""

from __future__ import annotations

import copy
import json
import math
import re

import numpy as np
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from torch import Tensor, nn
from torch.export import Dim, export

import flataudit
import flataudit.solvers as solvers
from flataudit import InputError, audit
from flataudit.errors import MemoryPlanError
from flataudit.selection import MODEL_ERROR
from tests.case import first
from tests.cases import CASES, REFERENCES, build, reference
from tests.dense import dense

GENERATOR = torch.Generator().manual_seed(21)
X = torch.randn(60, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(0, 3, (60,), generator=GENERATOR)
X_HELD = torch.randn(25, 4, generator=GENERATOR, dtype=torch.float64)
Y_HELD = torch.randint(0, 3, (25,), generator=GENERATOR)


def network(*head: nn.Module, outputs: int = 3, inputs: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs), *head).double()


def shown(report) -> dict:
    """The report's JSON without what differs from run to run."""
    found = report.to_dict()
    del found["solver"]["seconds"]
    return found


def numbers(report) -> dict:
    """The report's JSON without data identity and model notes as well."""
    found = shown(report)
    for section, key in (("data", "sha256"), ("model", "notes"), ("solver", "peak_bytes")):
        del found[section][key]
    return found


def assert_close(found, wanted, rel=1e-9, path="") -> None:
    """Two JSON values are equal, their numbers to `rel`."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), path
        for key in wanted:
            assert_close(found[key], wanted[key], rel, f"{path}.{key}")
    elif isinstance(wanted, list):
        assert len(found) == len(wanted), path
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            assert_close(a, b, rel, f"{path}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=rel, abs=1e-10), path
    else:
        assert found == wanted, path


# --- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("values", REFERENCES, ids=lambda values: values["name"])
def test_reference(values, solver):
    fitted = reference(values)
    report = audit(
        fitted.model,
        (fitted.x, fitted.y),
        family=values["family"],
        penalty=values["penalty"],
        dispersion=values["dispersion"],
        solver=solver,
    )
    estimates = report.estimates
    assert estimates.soft_rank.rank == pytest.approx(values["soft_rank"], rel=1e-8)
    assert estimates.soft_rank.gap == pytest.approx(values["gap_soft_rank"], rel=1e-8)
    assert estimates.tic.gap == pytest.approx(values["gap_tic_uncentred"], rel=1e-8)
    assert estimates.tic.centred == pytest.approx(values["gap_tic_centred"], rel=1e-8)
    assert estimates.loo.gap == pytest.approx(values["gap_loo"], rel=1e-8)
    assert report.train.nll == pytest.approx(values["train_nll"], rel=1e-8)
    assert report.penalty.stationarity == pytest.approx(values["stationarity"], rel=1e-3)
    assert report.penalty.source == "argument"
    assert report.data.n_samples == values["n_samples"]
    assert report.model.n_params == values["n_params"]
    assert report.solver.name == solver
    samples = report.samples
    n = values["n_samples"]
    for array in (samples.nll, samples.leverage, samples.tic, samples.loo):
        assert array.shape == (n,)
        assert array.dtype == np.float64
    # The standard error is that of the predicted test NLL: sd(l + psi)/sqrt(n), ddof 1.
    for name, psi in (
        ("soft_rank", samples.leverage),
        ("tic", samples.tic),
        ("loo", samples.loo),
    ):
        estimate = getattr(estimates, name)
        assert estimate.gap == pytest.approx(psi.mean(), rel=1e-12)
        se = (samples.nll + psi).std(ddof=1) / math.sqrt(n)
        assert estimate.se == pytest.approx(se, rel=1e-10)


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
@pytest.mark.parametrize("chunk_size", [1, 7, 64, None])
def test_any_chunk_size_and_solver_give_the_same_report(chunk_size, solver):
    model = network()
    options = {"penalty": 0.05, "heldout": (X_HELD, Y_HELD), "recalibrate": True}
    wanted = numbers(audit(model, (X, Y), solver="primal", chunk_size=60, **options))
    found = numbers(audit(model, (X, Y), solver=solver, chunk_size=chunk_size, **options))
    for report in (found, wanted):
        del report["solver"]["reason"]
        del report["solver"]["name"]
    assert_close(found, wanted, rel=1e-8)


def test_gap_interval_and_predictions_belong_together():
    report = audit(network(), (X, Y), penalty=0.05)
    gap = report.gap
    chosen = getattr(report.estimates, gap.estimator)
    assert gap.value == chosen.gap
    assert gap.level == 0.9
    assert gap.model_error == MODEL_ERROR[gap.estimator] > 0
    for end, sign in ((gap.low, -1), (gap.high, 1)):
        own = gap.value * math.expm1(sign * 1.6448536 * gap.model_error)
        half = math.hypot(1.6448536 * chosen.se, own)
        assert end == pytest.approx(gap.value + sign * half, rel=1e-6)
    predicted = report.predicted_test_nll
    for field in ("value", "low", "high"):
        assert getattr(predicted, field) == pytest.approx(report.train.nll + getattr(gap, field))
    assert gap.reason


@pytest.mark.parametrize(("penalty", "bound"), [(10.0, False), (1e-4, True)])
def test_few_samples_per_rank_make_a_lower_bound(penalty, bound):
    report = audit(network(), (X, Y), penalty=penalty)
    assert (60 / report.estimates.soft_rank.rank < 10) is bound
    assert report.gap.lower_bound is bound


def test_heldout_is_the_observed_gap():
    model = network()
    report = audit(model, (X, Y), heldout=(X_HELD, Y_HELD), penalty=0.05)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model(X_HELD), Y_HELD, reduction="none")
        train = nn.functional.cross_entropy(model(X), Y).item()
        hits = (model(X_HELD).argmax(dim=1) == Y_HELD).double().mean().item()
    held = report.heldout
    assert held.nll == pytest.approx(losses.mean().item(), rel=1e-12)
    assert held.gap == pytest.approx(losses.mean().item() - train, rel=1e-10)
    assert held.gap_se == pytest.approx(losses.std().item() / 5, rel=1e-12)
    assert held.accuracy == pytest.approx(hits)
    assert report.data.heldout_samples == 25
    assert (report.calibration.evidence, report.calibration.n) == ("heldout", 25)
    assert report.predicted_accuracy.value == pytest.approx(hits)


def test_without_heldout_leave_one_out_judges():
    report = audit(network(), (X, Y), penalty=0.05)
    assert report.heldout is None
    assert report.data.heldout_samples is None
    assert (report.calibration.evidence, report.calibration.n) == ("loo", 60)
    assert report.estimates.loo.accuracy == report.calibration.accuracy
    assert report.predicted_accuracy.value == report.calibration.accuracy


def test_training_record_sets_the_penalty():
    record = {"optimizer": "sgd", "sum_lr": 20, "momentum": 0.5, "weight_decay": 0.01}
    report = audit(network(), (X, Y), training=record)
    assert report.penalty.source == "training"
    assert report.penalty.value == pytest.approx(0.01 + 1 / 40)
    assert report.penalty.training["sum_lr"] == 20
    by_hand = audit(network(), (X, Y), penalty=0.01 + 1 / 40)
    assert report.estimates.soft_rank.rank == pytest.approx(by_hand.estimates.soft_rank.rank)
    text = audit(
        network(), (X, Y), training="optimizer=sgd,sum_lr=20,momentum=0.5,weight_decay=0.01"
    )
    assert_close(shown(text), shown(report))


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_record_gives_a_penalty_per_parameter(optimizer):
    record = {"optimizer": optimizer, "sum_lr": 2, "batch_size": 10, "weight_decay": 0.01}
    model = network()
    found = {}
    for solver in ("primal", "dual"):
        report = audit(model, (X, Y), training=record, solver=solver)
        assert report.penalty.value is None
        assert 0 < report.penalty.low < report.penalty.high
        found[solver] = report.estimates.soft_rank.rank
    assert found["primal"] == pytest.approx(found["dual"], rel=1e-9)


def test_no_record_is_evidence_with_a_warning():
    report = audit(network(), (X, Y))
    assert report.penalty.source == "evidence"
    assert "penalty_unknown" in {w.code for w in report.warnings}
    assert report.confidence in ("low", "refused")


@pytest.mark.parametrize(
    ("options", "noise"),
    [({"penalty": 0.05}, "warn"), ({"training": {"optimizer": "sgd", "sum_lr": 20}}, "info")],
)
def test_random_weights_are_not_at_a_minimum(options, noise):
    """With a record of finite training that is expected, and only said."""
    report = audit(network(), (X, Y), **options)
    found = {w.code: w.severity for w in report.warnings}
    assert found["not_at_minimum"] == noise


def test_leverage_warning_uses_the_largest_eigenvalue():
    """h_i = tr Q_i may exceed 1 with several outputs; the warning looks at lambda_max(Q_i)."""
    model, x = network(), X.clone()
    x[0] = 50.0
    report = audit(model, (x, Y), penalty=1e-6)
    d = {name: torch.full_like(p.detach(), 1e-6) for name, p in model.named_parameters()}
    exact = dense(model, x, Y, "categorical", d)
    eigenvalues = torch.linalg.eigvals(exact.variance @ exact.functional).real
    assert (float(eigenvalues.max()) > 0.9) is (
        "high_leverage" in {w.code for w in report.warnings}
    )
    assert "high_leverage" in {w.code for w in report.warnings}


def test_recalibrate_on_demand():
    calm = audit(network(), (X, Y), penalty=0.05)
    asked = audit(network(), (X, Y), penalty=0.05, recalibrate=True)
    assert asked.estimates.soft_rank_recalibrated is not None
    assert asked.estimates.soft_rank == calm.estimates.soft_rank
    assert asked.gap.estimator == calm.gap.estimator


def test_overconfident_network_is_recalibrated():
    """Labels from flatter probabilities than the network claims: found, warned of, recalibrated."""
    n = 400
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(8.0)
        p = torch.softmax(model(x) / 8, dim=1)
        y = torch.multinomial(p, 1, generator=generator)[:, 0]
    report = audit(model, (x, y), penalty=0.05)
    assert report.calibration.direction == "over"
    assert report.gap.estimator == "soft_rank_blend"
    assert report.estimates.soft_rank_recalibrated.scale < 1
    parts = report.estimates.soft_rank, report.estimates.soft_rank_recalibrated
    blend = report.estimates.soft_rank_blend
    assert blend.gap == pytest.approx(math.sqrt(parts[0].gap * parts[1].gap), rel=1e-12)
    assert min(p.se for p in parts) - 1e-9 <= blend.se <= max(p.se for p in parts) + 1e-9
    assert (report.calibration.severity, report.confidence) == ("critical", "low")
    assert report.confidence_reasons == ("the model is strongly over-confident",)
    assert "overconfident" in {w.code for w in report.warnings}
    assert audit(model, (x, y)).confidence == "refused"
    linear = nn.Linear(4, 3).double()
    with torch.no_grad():
        linear.weight.mul_(30.0)
        y = torch.multinomial(torch.softmax(linear(x) / 30, dim=1), 1, generator=generator)[:, 0]
    report = audit(linear, (x, y), penalty=0.05)
    assert (report.calibration.direction, report.gap.estimator) == ("over", "loo")


def test_calibrated_network_takes_the_soft_rank():
    n = 1500
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(3.0)
        y = torch.multinomial(torch.softmax(model(x), dim=1), 1, generator=generator)[:, 0]
    report = audit(model, (x, y), penalty=0.05)
    assert report.calibration.verdict == "calibrated"
    assert report.gap.estimator == "soft_rank"
    assert report.confidence == "ok"


# --- the JSON -----------------------------------------------------------------------------------

KEYS = {
    "": "schema model data family dispersion penalty train heldout calibration estimates premise"
    " gap predicted_test_nll predicted_accuracy confidence confidence_reasons warnings solver",
    "model": "uri name version model_id flavor n_params",
    "data": "n_samples n_outputs sha256 heldout_samples",
    "dispersion": "value source",
    "penalty": "value free_params source training stationarity",
    "penalty.training": "optimizer sum_lr momentum batch_size weight_decay",
    "train": "nll accuracy",
    "heldout": "nll accuracy gap gap_se",
    "calibration": "evidence n ece ece_if_calibrated mce ace mean_confidence accuracy slope"
    " slope_ci confidence_gap confidence_gap_ci p_values verdict direction severity",
    "calibration.p_values": "slope bins bias",
    "estimates": "soft_rank tic loo soft_rank_recalibrated soft_rank_blend",
    "estimates.soft_rank": "gap se rank",
    "estimates.tic": "gap se",
    "estimates.loo": "gap se accuracy mean_confidence",
    "estimates.soft_rank_recalibrated": "gap se rank scale",
    "estimates.soft_rank_blend": "gap se",
    "premise": "information_ratio z evidence",
    "gap": "value low high level estimator reason model_error",
    "predicted_test_nll": "value low high",
    "predicted_accuracy": "value low high",
    "solver": "name exact reason device dtype seconds peak_bytes",
}
NULLABLE = {
    "dispersion",
    "penalty.training",
    "heldout",
    "estimates.loo",
    "estimates.soft_rank_recalibrated",
    "estimates.soft_rank_blend",
    "predicted_accuracy",
    "premise",
}
ALLOWED = {
    "family": {"categorical", "bernoulli", "gaussian", "poisson"},
    "penalty.source": {"argument", "estimator", "training", "evidence"},
    "calibration.evidence": {"heldout", "loo", "train"},
    "calibration.direction": {"over", "under", "mixed", "none"},
    "calibration.severity": {"none", "info", "warn", "high", "critical"},
    "gap.estimator": {"soft_rank", "tic", "loo", "soft_rank_recalibrated", "soft_rank_blend"},
    "confidence": {"ok", "low", "refused"},
}


def lookup(report: dict, path: str):
    for part in filter(None, path.split(".")):
        if report is None:
            return None
        report = report[part]
    return report


def assert_contract(report: dict) -> None:
    json.dumps(report, allow_nan=False)
    assert report["schema"] == 1
    for path, keys in KEYS.items():
        section = lookup(report, path)
        if section is None:
            assert path in NULLABLE, path
        else:
            assert set(keys.split()) <= section.keys(), path
    for path, allowed in ALLOWED.items():
        assert lookup(report, path) in allowed, path
    for warning in report["warnings"]:
        assert {"code", "severity", "message"} <= warning.keys()
    for ci in ("slope_ci", "confidence_gap_ci"):
        value = report["calibration"][ci]
        assert value is None or len(value) == 2


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_gives_the_contracts_json(case):
    built = build(case)
    penalty = {name: float(d.mean()) for name, d in built.penalty.items()}
    report = audit(
        built.model,
        (built.x, built.y),
        heldout=(first(built.x, 5), built.y[:5]),
        family=case.family,
        penalty=penalty,
        dispersion=case.dispersion,
    )
    assert_contract(report.to_dict())
    assert report.family == case.family
    assert (report.dispersion is not None) is (case.family == "gaussian")
    assert (report.train.accuracy is None) is (case.family in ("gaussian", "poisson"))
    json.dumps(report.display, allow_nan=False)


@pytest.mark.parametrize("values", REFERENCES, ids=lambda values: values["name"])
@pytest.mark.parametrize("training", [None, "optimizer=adam,sum_lr=3,batch_size=32"])
def test_fitted_models_give_the_contracts_json(values, training):
    fitted = reference(values)
    report = audit(
        fitted.model,
        (fitted.x, fitted.y),
        family=values["family"],
        training=training,
        recalibrate=True,
    )
    assert_contract(report.to_dict())
    assert report.penalty.source == ("training" if training else "evidence")


def test_the_same_twice():
    options = {"penalty": 0.05, "heldout": (X_HELD, Y_HELD)}
    first, second = (audit(network(), (X, Y), **options) for _ in range(2))
    assert json.dumps(shown(first), sort_keys=True) == json.dumps(shown(second), sort_keys=True)
    assert first.display == second.display
    for field in ("nll", "leverage", "tic", "loo"):
        assert np.array_equal(getattr(first.samples, field), getattr(second.samples, field))


def test_report_is_frozen():
    report = audit(network(), (X, Y), penalty=0.05)
    with pytest.raises(AttributeError):
        report.confidence = "ok"


def test_sha_follows_the_data():
    model = network()
    digests = {
        audit(model, data, penalty=0.05).data.sha256
        for data in ((X, Y), (X.numpy(), Y.numpy()), (X + 1, Y), (X, 2 - Y))
    }
    assert len(digests) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", sha) for sha in digests)


def test_progress_is_told():
    stages: list[str] = []
    audit(network(), (X, Y), penalty=0.05, progress=stages.append)
    assert len(stages) >= 4
    assert all(isinstance(stage, str) and stage for stage in stages)


def test_the_module_is_the_function():
    import flataudit.audit as module

    assert callable(flataudit.audit)
    report = module(network(), (X, Y), penalty=0.05)
    assert_close(shown(report), shown(flataudit.audit(network(), (X, Y), penalty=0.05)))


# --- the caller's model -------------------------------------------------------------------------


def test_the_callers_module_is_untouched():
    """Weights, gradients, dtype, modes, flags, hooks, buffers and both random generators."""
    calls: list[int] = []
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(inplace=True), nn.Dropout(0.4), nn.Linear(5, 3)
    )
    model[0].bias.requires_grad_(False)
    model[1].eval()
    model[4].weight.grad = torch.ones(3, 5)
    model.register_forward_hook(lambda *args: calls.append(1))
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) for m in model.modules()]
    x, y = X.clone(), Y.clone()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()

    audit(model, (x, y), penalty=0.05, heldout=(X_HELD, Y_HELD), recalibrate=True)

    assert torch.equal(x, X)
    assert torch.equal(y, Y)
    assert [m.training for m in model.modules()] == modes
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [p.requires_grad for p in model.parameters()] == [True, False, *[True] * 4]
    assert model[0].weight.grad is None
    assert torch.equal(model[4].weight.grad, torch.ones(3, 5))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32


def test_training_mode_is_audited_as_eval_mode():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.4), nn.Linear(5, 3))
    wanted = audit(copy.deepcopy(model).eval(), (X, Y), penalty=0.05)
    assert_close(shown(audit(model.train(), (X, Y), penalty=0.05)), shown(wanted))


def test_under_no_grad():
    wanted = shown(audit(network(), (X, Y), penalty=0.05))
    with torch.no_grad():
        assert_close(shown(audit(network(), (X, Y), penalty=0.05)), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_types_of_model_and_data(dtype):
    """Weights and data as stored are audited in float64: no arithmetic in lower precision."""
    model = network().to(dtype)
    wanted = audit(copy.deepcopy(model).double(), (X.to(dtype).double(), Y), penalty=0.05)
    found = audit(model, (X.to(dtype), Y), penalty=0.05)
    assert found.solver.dtype == "float64"
    assert_close(shown(found), shown(wanted))


class Casts(nn.Module):
    """Casts its input to float32, so that it cannot run in float64."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(torch.float32))


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_float32_fallback(solver):
    """A graph that cannot run in float64: stated, and within float32 of the float64 numbers."""
    found = audit(Casts(network()), (X, Y), penalty=0.05, solver=solver)
    assert "float32" in found.solver.dtype
    assert any("float32" in note for note in found.model.notes)
    wanted = audit(network(), (X, Y), penalty=0.05, solver=solver)
    assert found.samples.leverage.dtype == np.float64
    np.testing.assert_allclose(found.samples.leverage, wanted.samples.leverage, rtol=1e-4)
    np.testing.assert_allclose(found.samples.loo, wanted.samples.loo, rtol=1e-3, atol=1e-5)
    assert_contract(found.to_dict())


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_softmax_head_equals_logits(solver):
    options = {
        "penalty": {"0.weight": 0.05, "0.bias": 0.0, "2.weight": 0.05, "2.bias": 0.0},
        "solver": solver,
        "recalibrate": True,
        "heldout": (X_HELD, Y_HELD),
    }
    found = audit(network(nn.Softmax(dim=1)), (X, Y), **options)
    assert_close(numbers(found), numbers(audit(network(), (X, Y), **options)), rel=1e-8)


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_sigmoid_head_equals_the_logit(solver):
    options = {"penalty": 0.05, "solver": solver, "recalibrate": True}
    y = (Y > 0).long()
    found = audit(network(nn.Sigmoid(), outputs=1), (X, y), **options)
    assert found.family == "bernoulli"
    assert_close(numbers(found), numbers(audit(network(outputs=1), (X, y), **options)), rel=1e-8)


def test_a_linear_model_with_a_head_is_still_linear():
    """Both forms of one logistic regression get the same estimator for the same reason."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(400, 4, generator=generator, dtype=torch.float64)
    line = nn.Linear(4, 3).double()
    with torch.no_grad():
        line.weight.mul_(30.0)
        y = torch.multinomial(torch.softmax(line(x) / 30, dim=1), 1, generator=generator)[:, 0]
    plain = audit(line, (x, y), penalty=0.05)
    head = audit(nn.Sequential(line, nn.Softmax(dim=1)), (x, y), penalty=0.05)
    assert plain.gap.estimator == "loo"
    assert (head.gap.estimator, head.gap.reason) == (plain.gap.estimator, plain.gap.reason)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_exported_graph_equals_the_module(solver, chunk_size):
    model = network().float().eval()
    graph = export(
        model, (X[:4].float(),), dynamic_shapes=({0: Dim("n", min=2, max=4096)},)
    ).module()
    options = {"penalty": 0.05, "solver": solver, "heldout": (X_HELD, Y_HELD)}
    found = audit(graph, (X, Y), chunk_size=chunk_size, **options)
    assert_close(numbers(found), numbers(audit(model, (X, Y), **options)), rel=1e-8)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning")
def test_exported_in_training_mode_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3)).train()
    graph = export(
        model, (X[:4].float(),), dynamic_shapes=({0: Dim("n", min=2, max=4096)},)
    ).module()
    with pytest.raises(InputError, match="frozen in training"):
        audit(graph, (X, Y), penalty=0.05)


class Squeezes(nn.Module):
    """squeeze() without an axis: a batch of one loses its batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.line(x).squeeze()


@pytest.mark.parametrize("solver", ["primal", "dual"])
def test_a_network_that_squeezes_a_batch_of_one(solver):
    model = Squeezes().double()
    options = {"penalty": 0.05, "dispersion": 1.0, "solver": solver}
    found = audit(model, (X, X[:, 0] ** 2), **options)
    assert_close(numbers(found), numbers(audit(model.line, (X, X[:, 0] ** 2), **options)))


# --- what is refused ----------------------------------------------------------------------------


class Broken(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 0.0


TRAIN = (X, Y)
#   what is wrong -> model, data, options, words of the message
REFUSED = {
    "lengths": (network, (X, Y[:-1]), {}, ("same length", "(60, 4)", "(59,)")),
    "nan": (network, (torch.where(X > 2, torch.nan, X), Y), {}, ("finite values", "NaN")),
    "infinity": (network, (torch.where(X > 2, torch.inf, X), Y), {}, ("finite values",)),
    "one_sample": (network, (X[:1], Y[:1]), {}, ("at least 2 samples", "1")),
    "no_samples": (network, (X[:0], Y[:0]), {}, ("at least 2 samples", "0")),
    "no_pair": (network, X, {}, ("pair (x, y)",)),
    "text": (network, (np.full((60, 4), "a"), Y), {}, ("numbers",)),
    "labels_high": (network, (X, Y + 1), {}, ("labels 0..2", "1 to 3")),
    "labels_low": (network, (X, Y - 1), {}, ("labels 0..2", "-1 to 1")),
    "label_nan": (network, (X, Y.double() * torch.nan), {"family": "categorical"}, ("labels",)),
    "target_nan": (
        lambda: network(outputs=1),
        (X, Y.double() * torch.nan),
        {},
        ("finite targets",),
    ),
    "target_columns": (network, (X, Y.double()), {}, ("3 column(s)", "(60,)")),
    "counts": (lambda: network(outputs=1), (X, X[:, 0]), {"family": "poisson"}, ("counts",)),
    "outputs": (lambda: Broken(4, 3), TRAIN, {}, ("finite model outputs", "60 of 60")),
    "no_parameters": (nn.ReLU, TRAIN, {}, ("trained parameters",)),
    "frozen": (lambda: network().requires_grad_(False), TRAIN, {}, ("trained parameters",)),
    "forest": (RandomForestClassifier, TRAIN, {}, ("tree ensemble", "RandomForestClassifier")),
    "no_model": (lambda: None, TRAIN, {}, ("torch.nn.Module", "NoneType")),
    "width": (lambda: network(inputs=7), TRAIN, {}, ("(60, 4)",)),
    "heldout_width": (
        network,
        TRAIN,
        {"heldout": (X_HELD[:, :3], Y_HELD)},
        ("heldout", "(25, 3)"),
    ),
    "heldout_lengths": (network, TRAIN, {"heldout": (X_HELD, Y)}, ("heldout", "same length")),
    "heldout_labels": (network, TRAIN, {"heldout": (X_HELD, Y_HELD + 1)}, ("labels 0..2",)),
    "heldout_nan": (network, TRAIN, {"heldout": (X_HELD * torch.nan, Y_HELD)}, ("heldout",)),
    "penalty": (network, TRAIN, {"penalty": -0.1}, ("-0.1", "weight decay")),
    "penalty_nan": (network, TRAIN, {"penalty": math.nan}, ("nan",)),
    "penalty_text": (network, TRAIN, {"penalty": "none"}, ("'none'",)),
    "penalty_none": (network, TRAIN, {"penalty": None}, ("None",)),
    "penalty_name": (network, TRAIN, {"penalty": {"w": 1.0}}, ("'w'", "0.weight")),
    "dispersion": (lambda: network(outputs=1), (X, X[:, 0]), {"dispersion": -1.0}, ("-1.0",)),
    "dispersion_text": (
        lambda: network(outputs=1),
        (X, X[:, 0]),
        {"dispersion": "much"},
        ("'much'",),
    ),
    "training": (network, TRAIN, {"training": {"optimizer": "lion"}}, ("'lion'", "sgd")),
    "adam": (
        network,
        TRAIN,
        {"training": {"optimizer": "adam", "sum_lr": 1}},
        ("batch_size", "adam"),
    ),
    "solver": (network, TRAIN, {"solver": "kfca"}, ("unknown solver 'kfca'", "primal")),
    "family": (network, TRAIN, {"family": "gamma"}, ("unknown family 'gamma'", "poisson")),
    "device": (network, TRAIN, {"device": "tpu"}, ("unknown device 'tpu'", "cuda")),
    "curvature": (network, TRAIN, {"curvature": "fisher"}, ("unknown curvature", "ggn")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """One line that says what was expected, what was found and what to do; exit code 2."""
    make, data, options, parts = REFUSED[name]
    with pytest.raises(InputError) as caught:
        audit(make(), data, **{"penalty": 0.05, **options})
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert all(part in message for part in parts), message
    assert "\n" not in message
    if message.startswith("unknown"):
        assert "; choose one of: " in message
    else:
        assert "expected" in message
        assert "got" in message
        assert ";" in message or ":" in message


@pytest.mark.parametrize("solver", ["auto", "primal", "dual"])
def test_too_large_raises_before_the_work(monkeypatch, solver):
    monkeypatch.setattr(solvers, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryPlanError) as caught:
        audit(network(), (X, Y), penalty=0.05, solver=solver)
    message = str(caught.value)
    assert all(part in message for part in ("expected", "got", "1 kB", "memory"))


def test_cuda_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="CUDA device"):
        audit(network(), (X, Y), penalty=0.05, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("solver", ["primal", "dual"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cuda_gives_the_cpus_numbers(case, solver):
    built = build(case)
    options = {
        "family": case.family,
        "penalty": {name: float(d.mean()) for name, d in built.penalty.items()},
        "dispersion": case.dispersion,
        "solver": solver,
    }
    data = (built.x, built.y)
    cpu = audit(built.model, data, device="cpu", **options)
    cuda = audit(built.model, data, device="cuda", **options)
    assert cuda.solver.device == "cuda"
    for field in ("nll", "leverage", "tic", "loo"):
        wanted = getattr(cpu.samples, field)
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(
            getattr(cuda.samples, field), wanted, rtol=1e-10, atol=1e-10 * scale
        )


# --- the docstrings -----------------------------------------------------------------------------


def test_every_core_module_is_collected_for_doctests(request):
    """pytest runs the package's doctests because testpaths names it."""
    assert "flataudit" in request.config.getini("testpaths")
    assert "--doctest-modules" in request.config.getini("addopts")
