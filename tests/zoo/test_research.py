"""The research passes: each new estimate is the ordinary one where it has to be."""

import argparse
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from benchmarks.common.pages import BLOCK
from benchmarks.zoo.baselines import penalised
from benchmarks.zoo.draw import draw
from benchmarks.zoo.fit import fit, rate_at
from benchmarks.zoo.grid import Cell
from benchmarks.zoo.measure import RESULTS
from benchmarks.zoo.research import (
    candidates,
    command,
    page,
    path_estimates,
    paths,
    scoring,
    summary,
    training,
)
from benchmarks.zoo.research import curvature as c
from benchmarks.zoo.research import recalibrate as r
from benchmarks.zoo.research import trajectory as t
from benchmarks.zoo.rules import SOFT_RANK
from benchmarks.zoo.scores import read, rounded
from flataudit import FlatauditError, audit, estimates
from flataudit.families import Categorical

NET = Cell("r", "digits", "mlp", 60, 1e-2, width=4, depth=1, activation="relu", pooling=2,
           optimizer="sgd", lr=0.05, epochs=40, batch_size=20)  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    drawn = draw(NET)
    network, record, path = path_estimates.with_path(NET, drawn)
    return penalised(NET, network, record, drawn)[0], path, network, drawn, record


# --- Lambda ---------------------------------------------------------------------------------------


def test_at_the_models_own_lambda_and_residuals_the_estimates_are_the_audits(trained):
    found = trained[0]
    problem, variance, family = found.problem, found.variance, found.problem.family
    jacobian = c.scaled_jacobian(problem, found.penalty)
    own = c.categorical_variance(torch.log_softmax(problem.outputs, dim=1))
    a = c.functional_variance(jacobian, c.square_root(own))
    soft_rank = float(estimates.soft_rank(variance).mean())
    assert c.RankAt(jacobian)(problem.factor.root) == pytest.approx(soft_rank, rel=1e-9)
    assert float((own * a).sum()) / len(a) == pytest.approx(soft_rank, rel=1e-9)
    residual = family.residual(problem.outputs, problem.y)
    tic = float(estimates.tic(variance, problem.factor.residual).mean())
    assert c.gap_of_energy(a, residual) == pytest.approx(tic, rel=1e-8)
    left = estimates.loo(variance, problem.factor.residual, family, problem.outputs, problem.y)
    moved = c.left_out_outputs(a, own, residual, problem.outputs)
    value = c.rise(family, moved, problem.outputs, problem.y)
    assert value == pytest.approx(float(left.psi.mean()), rel=1e-6)


def test_the_gram_matrix_gives_the_same_rank_as_the_jacobian():
    torch.manual_seed(0)
    jacobian = torch.randn(6, 3, 40, dtype=torch.float64)
    log_p = torch.randn(6, 3, dtype=torch.float64).log_softmax(1)
    roots = (c.square_root(c.categorical_variance(log_p)),
             Categorical().factor(log_p, torch.zeros(6, dtype=torch.int64)).root)  # fmt: skip
    for root in roots:  # with K columns and with K - 1
        by_parameters = c.functional_variance(jacobian, root)
        wanted = float((c.categorical_variance(log_p) * by_parameters).sum()) / 6
        assert c.RankAt(jacobian)(root) == pytest.approx(wanted, rel=1e-10)


def test_a_parameter_without_penalty_is_refused(trained):
    problem = trained[0].problem
    free = {name: torch.zeros_like(p) for name, p in problem.params.items()}
    with pytest.raises(ValueError, match="penalty above 0"):
        c.scaled_jacobian(problem, free)


def test_undone_training_begins_as_leave_one_out(trained):
    """One Euler step of the whole length is leave-one-out; a small variance leaves no more."""
    found = trained[0]
    problem, family = found.problem, found.problem.family
    heavy = found.variance_at({k: 1e4 * d for k, d in found.penalty.items()})
    left = estimates.loo(heavy, problem.factor.residual, family, problem.outputs, problem.y)
    moved = c.undo_own_training(heavy, family, problem.outputs, problem.y)
    value = c.rise(family, moved, problem.outputs, problem.y)
    assert value == pytest.approx(float(left.psi.mean()), rel=1e-3)


# --- recalibration --------------------------------------------------------------------------------


def test_a_scale_of_one_gives_the_soft_rank_back(trained):
    found = trained[0]
    family, f = found.problem.family, found.problem.outputs
    confidence = r.confidence(torch.log_softmax(f, dim=1))
    labels = f.argmax(dim=1)
    wrong = round(len(f) * (1 - confidence))
    labels[:wrong] = (labels[:wrong] + 1) % f.shape[1]  # accuracy is confidence, up to one sample
    scale = r.accuracy_scale(family, f, (f, labels))
    assert scale == pytest.approx(1.0, abs=0.1)
    rank_at = c.RankAt(c.scaled_jacobian(found.problem, found.penalty))
    own = family.factor(torch.log_softmax(f, dim=1), found.problem.y).root
    soft_rank = float(estimates.soft_rank(found.variance).mean())
    assert rank_at(own) == pytest.approx(soft_rank, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("method", sorted(r.SCALINGS))
def test_netcal_leaves_a_calibrated_model_and_softens_a_sharp_one(method, classes):
    pytest.importorskip("netcal")
    generator = torch.Generator().manual_seed(0)
    f = 2 * torch.randn(1500, classes, generator=generator, dtype=torch.float64)
    y = torch.multinomial(torch.softmax(f, dim=1), 1, generator=generator)[:, 0]
    at = f[:50]
    wanted = r.confidence(torch.log_softmax(at, dim=1))
    same = r.scaled_by_netcal(method, (f, y), at)
    assert same.shape == at.shape
    assert torch.allclose(same.exp().sum(dim=1), torch.ones(50, dtype=torch.float64))
    assert r.confidence(same) == pytest.approx(wanted, abs=0.05)
    softer = r.scaled_by_netcal(method, (3 * f, y), 3 * at)
    assert r.confidence(softer) == pytest.approx(wanted, abs=0.05)


def test_a_class_without_labels_is_no_obstacle():
    pytest.importorskip("netcal")
    f = torch.randn(60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for method in r.SCALINGS:
        found = r.scaled_by_netcal(method, (f, torch.arange(60) % 2), f)
        assert bool(torch.isfinite(found).all())


def test_the_row_holds_the_audits_own_numbers(trained, monkeypatch):
    pytest.importorskip("netcal")
    monkeypatch.setattr(r, "SCALINGS", {"temperature": r.SCALINGS["temperature"]})  # quick
    network, drawn = trained[2:4]
    record = {"optimizer": "sgd", "time": 60.0, "sum_lr": 6.0, "weight_decay": 1e-2}
    row = r.recalibrations(NET, network, record, drawn)
    fitted = penalised(NET, network, record, drawn)[0]
    assert row["soft_rank"] == pytest.approx(float(estimates.soft_rank(fitted.variance).mean()))
    scaled = fitted.variance_at(fitted.penalty, row["scale"])
    assert row["loo_accuracy"] == pytest.approx(float(estimates.soft_rank(scaled).mean()), rel=1e-8)
    assert row["loo_accuracy_sharper"] == (row["scale"] >= 1.0)
    assert all(value is None or math.isfinite(value) for value in row.values())
    real = argparse.Namespace(pools=argparse.Namespace(task="regression"))
    assert r.recalibrations(NET, None, None, real) == {}


# --- times and averages ---------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", training.SCHEDULES)
def test_every_schedule_takes_the_time_that_was_asked_for(schedule):
    cell = training.timed(NET, schedule, 20, 60, 3.0)
    fitted = fit(cell, draw(cell))
    assert fitted.record.steps == 60
    assert fitted.record.training_time() == pytest.approx(3.0, rel=1e-9)
    assert t.times_of(schedule, 60, cell.lr)[-1] == pytest.approx(3.0, rel=1e-12)


def test_schedules_begin_and_end_where_they_should():
    assert [rate_at("step", k, 100) for k in (0, 49, 50, 74, 75, 99)] == [
        1,
        1,
        0.1,
        0.1,
        0.01,
        0.01,
    ]
    rates = [rate_at("one_cycle", k, 100) for k in range(100)]
    assert max(rates) == 1.0
    assert rates.index(1.0) == 29
    assert 0 < rates[0] < 0.05 > rates[-1] > 0
    with pytest.raises(KeyError, match="choose one of"):
        rate_at("linear", 0, 10)


def test_a_group_of_the_series_shares_time_steps_and_samples():
    groups = {}
    for cell in training.cells():
        if cell.optimizer != "sgd":
            continue
        steps = cell.epochs * math.ceil(cell.n / cell.batch_size)
        time = t.times_of(cell.schedule, steps, cell.lr)[-1]
        shared = (cell.draw_seed, steps, round(float(time), 9))
        groups.setdefault((cell.group, cell.label_noise), set()).add(shared)
    assert all(len(shared) == 1 for shared in groups.values())
    names = [training.name_of(cell) for cell in training.cells()]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="whole epochs"):
        training.timed(NET, "constant", 20, 61, 1.0)


def test_weights_of_checkpoints():
    times = np.array([0.0, 1.0, 2.0, 6.0])
    assert t.average_weights(times, "time") @ times == pytest.approx(3.0)  # of time itself: T/2
    assert t.average_weights(times, "plain").tolist() == [0.25] * 4
    assert t.average_weights(times, "early").tolist() == [0.25, 0.5, 0.25, 0.0]
    for kind in ("final", *t.AVERAGES):
        assert t.average_weights(times[-1:], kind).tolist() == [1.0]
        assert t.average_weights(times, kind).sum() == pytest.approx(1.0)
    with pytest.raises(KeyError, match="choose one of"):
        t.average_weights(times, "late")


def test_a_single_checkpoint_gives_the_ordinary_estimates(trained):
    found, path, _, _, record = trained
    last = t.Path(path.times[-1:], path.outputs[-1:])
    row = path_estimates.along_path(found, record, last, both=True)
    problem, family = found.problem, found.problem.family
    v = problem.factor.residual
    left = estimates.loo(found.variance, v, family, problem.outputs, problem.y)
    for kind in t.AVERAGES:
        rank = float(estimates.soft_rank(found.variance).mean())
        assert row[f"rank_{kind}"] == pytest.approx(rank, rel=1e-8)
        for both in ("", "_both"):
            tic = float(estimates.tic(found.variance, v).mean())
            assert row[f"tic_{kind}{both}"] == pytest.approx(tic, rel=1e-7)
            assert row[f"loo_{kind}{both}"] == pytest.approx(float(left.psi.mean()), rel=1e-6)


def test_a_path_of_constant_residuals_is_gradient_flows_response():
    """J (1 - exp(-T(G + w)))/(G + w) J'r/n, by the dense matrix."""
    torch.manual_seed(0)
    n, k, p, time, decay = 5, 2, 4, 3.0, 0.1
    raw = torch.randn(n, k, p, dtype=torch.float64)
    root, r_i = torch.randn(n, k, k, dtype=torch.float64), torch.randn(n, k, dtype=torch.float64)
    b = (root.mT @ raw).flatten(0, 1)
    h = b.T @ b / n + decay * torch.eye(p, dtype=torch.float64)
    flow = torch.linalg.solve(h, torch.eye(p, dtype=h.dtype) - torch.matrix_exp(-time * h))
    wanted = torch.einsum("nkp,pq,nlq,nl->nk", raw, flow, raw, r_i) / n
    penalty = decay + 1 / time
    times = np.array([0.0, 0.5, 2.0, time])
    found = t.path_shift(
        raw / math.sqrt(n * penalty), root, r_i.expand(4, n, k), times, penalty, decay
    )
    assert torch.allclose(found, wanted, rtol=1e-9)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_flows_metric_gives_the_audits_penalty(optimizer):
    cell = dataclasses.replace(NET, optimizer=optimizer, lr=0.02, epochs=5, weight_decay=0.05)
    drawn = draw(cell)
    network, record, path = path_estimates.with_path(cell, drawn)
    found = penalised(cell, network, record, drawn)[0]
    metric, p, w = path_estimates.flow_metric(found, record)
    for name, d in found.penalty.items():
        m = metric[name] / p  # Adam's weight decay is in theta's own units, the others' in M's
        assert torch.allclose(d, m * (p - w) + (0.05 if optimizer == "adam" else 0.05 * m))
    assert path.times[-1] == pytest.approx(1 / (p - w))


def test_the_path_ends_where_early_stopping_did():
    cell = dataclasses.replace(NET, early_stopping=True, epochs=300, lr=0.1, weight_decay=0.0)
    drawn = draw(cell)
    network, record, path = path_estimates.with_path(cell, drawn)
    assert path.times[-1] == pytest.approx(record.training_time())
    with torch.no_grad():
        assert torch.allclose(path.outputs[-1], network(torch.as_tensor(drawn.train.x)).double())


def test_networks_of_the_zoo_are_drawn_in_proportion():
    rows = command.open_branch()
    assert len(rows) == 200
    assert max(row["n_params"] for row in paths.chosen(rows)) <= paths.MOST
    first = [row["data"] for row in rows[: len(rows) // 2]]
    for data in {row["data"] for row in rows}:
        whole = sum(row["data"] == data for row in rows)
        assert abs(first.count(data) - whole / 2) <= 1


def test_checkpoints_are_whole_steps_from_the_first_to_the_last(trained):
    steps = t.checkpoints(1200, 40)
    assert (steps[0], steps[-1]) == (0, 1200)
    assert steps == sorted(set(steps))
    path, network, drawn = trained[1:4]
    assert path.times[0] == 0.0
    x = torch.as_tensor(drawn.train.x)
    with torch.no_grad():
        assert torch.allclose(path.outputs[-1], network(x).double(), atol=1e-6)


def test_more_time_is_a_smaller_penalty(trained):
    row = training.with_other_times(trained[0], NET.weight_decay)
    assert row["at_1_soft_rank"] == pytest.approx(
        float(estimates.soft_rank(trained[0].variance).mean()), rel=1e-9
    )
    ranks = [row[f"at_{factor:g}_soft_rank"] for factor in training.FACTORS]
    assert ranks == sorted(ranks)


def test_a_pass_writes_rows_once_and_only_those_that_match(tmp_path, capsys, monkeypatch):
    cell = dataclasses.replace(NET, block="series-mlp", epochs=3)
    arguments = ["--store", str(tmp_path), "--only", "*digits*"]
    items = [(training.name_of(cell), cell), ("other", None)]
    assert command.run("", items, training.train_cell, arguments) == 0
    assert "done" in capsys.readouterr().out
    assert command.run("", items, training.train_cell, arguments) == 0
    assert "skipped" in capsys.readouterr().out
    (written,) = (tmp_path / training.KIND).iterdir()
    row = json.loads(written.read_text(encoding="utf-8"))
    assert row["at_1_soft_rank"] == pytest.approx(row["record_soft_rank"], rel=1e-9)
    assert row["at_1_loo"] == pytest.approx(row["record_loo"], rel=1e-9)
    assert row["list"] == pytest.approx(candidates.by_list(row))

    def fails(*_):
        raise FlatauditError("no")

    monkeypatch.setattr(training, "measured", fails)
    arguments[1] = str(tmp_path / "other")
    assert command.run("", items, training.train_cell, arguments) == 1
    assert not (tmp_path / "other").exists()


def test_a_network_of_the_zoo_trained_again():
    cell = dataclasses.replace(NET, optimizer="adamw", lr=0.02, epochs=10)
    drawn = draw(cell)
    row = paths.retraced(cell, drawn)
    trained = fit(cell, drawn)
    report = audit(trained.model, (drawn.train.x, drawn.train.y),
                   training=trained.record.to_record(), sensitivity=False)  # fmt: skip
    assert row["own_nll"] == pytest.approx(report.train.nll, rel=1e-9)
    record = trained.record.to_record()
    longer = audit(trained.model, (drawn.train.x, drawn.train.y), sensitivity=False,
                   training=record | {"sum_lr": 2 * record["sum_lr"]})  # fmt: skip
    assert row["twice_soft_rank"] == pytest.approx(longer.estimates.soft_rank.gap, rel=1e-9)
    assert row["twice_loo"] == pytest.approx(longer.estimates.loo.gap, rel=1e-9)


# --- scores ---------------------------------------------------------------------------------------


def made(name, data, ratio=2.0):
    return {"name": name, "data": data, "group": f"{data}-{name}", "gap": 0.5, "floor": 0.0,
            "record_soft_rank": 0.5 * ratio, "list": 0.5 * ratio**2}  # fmt: skip


ROWS = [made(i, data) for data in "ab" for i in range(6)]


def test_the_better_rule_wins_out_of_data_set():
    rules = {"list": candidates.column("list"), "soft rank": SOFT_RANK}
    found = scoring.out_of_data_set(ROWS, rules, 20)
    assert found["choice"] == {"a": "soft rank", "b": "soft rank"}
    assert found["minus_list"]["value"] == pytest.approx(-math.log(2.0))
    assert found["minus_list"]["high"] < 0
    assert scoring.scored(ROWS, rules, 20)["list"]["bias"] == pytest.approx(math.log(4.0))


def test_a_data_set_has_no_say_in_what_is_chosen_for_it():
    odd = [made(i, "a", ratio=0.9) for i in range(6)] + ROWS[6:]
    rules = {"list": lambda row: row["gap"], "soft rank": SOFT_RANK} | {
        "right on a": lambda row: row["gap"] if row["data"] == "a" else 9.0
    }
    assert scoring.out_of_data_set(odd, rules, 5)["choice"]["b"] != "soft rank"
    assert scoring.out_of_data_set(odd, rules, 5)["choice"]["a"] == "list"


def test_factors_of_time_are_interpolated():
    row = {f"at_{factor:g}_soft_rank": factor**0.5 for factor in training.FACTORS}
    assert candidates.at_factor("soft_rank", 3.0)(row) == pytest.approx(math.sqrt(3.0))
    assert candidates.at_factor("soft_rank", 9.0)(row) == pytest.approx(2.0)  # within FACTORS
    assert candidates.at_factor("blend", 2.0)(row) == pytest.approx(math.sqrt(2.0))  # no classes


def test_the_committed_scores_are_those_of_the_committed_rows():
    found = json.loads(summary.OUT.read_text(encoding="utf-8"))
    tables = summary.from_file(summary.OUT)
    assert len(tables["recalibration"]) >= 100
    assert len(tables["training"]) >= 40
    again = rounded(summary.summarise(tables, read(RESULTS), 4), summary.DECIMALS)

    def values(node, at=()):
        for key, value in node.items():
            if isinstance(value, dict):
                yield from values(value, (*at, key))
            elif key not in ("low", "high"):  # of the bootstrap, whose draws are fewer here
                yield (*at, key), value

    del found["rows"], found["environment"]
    assert dict(values(again)) == pytest.approx(dict(values(found)), nan_ok=True)


def test_the_file_reads_back(tmp_path):
    path = tmp_path / "research.json"
    rows = {"training": [summary.significant({"name": "x", "gap": 1 / 3, "loo": None})]}
    path.write_text(summary.text_of({"environment": {}, "models": 1}, rows), encoding="utf-8")
    assert summary.from_file(path)["training"] == [{"name": "x", "gap": 0.333333, "loo": None}]


def test_the_decision_shows_the_committed_scores():
    found = json.loads(summary.OUT.read_text(encoding="utf-8"))
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text, found) == text
    assert sorted(name for _, name, _ in BLOCK.findall(text)) == sorted(page.TABLES)


def test_only_what_is_surely_better_than_the_list_is_bold():
    cases = [(-0.05, -0.09, -0.01), (-0.05, -0.09, 0.01), (0.05, 0.01, 0.09), (-1.05, None, None)]
    shown = [
        page.difference({"minus_list": {"value": value, "low": low, "high": high}})
        for value, low, high in cases
    ]
    assert shown == [
        "**-.050 (-.090 to -.010)**",
        "-.050 (-.090 to +.010)",
        "+.050 (+.010 to +.090)",
        "-1.050",
    ]
