"""The grid: at least 300 cells, each legal, each pair of a group comparable."""

import dataclasses
from collections import Counter

import pytest
import torch

from benchmarks.zoo import grid as g
from benchmarks.zoo.networks import ACTIVATIONS, NETWORKS, make_network
from flataudit.solvers.base import EIGENVALUE_LIMIT

SHAPES = {"fashion-mnist": (1, 28, 28), "mnist": (1, 28, 28), "digits": (1, 8, 8),
          "letter": (16,), "satellite": (36,), "shuttle": (9,), "dna": (180,),
          "breast-cancer": (30,), "diabetes": (10,), "randhie": (9,)}  # fmt: skip
OUTPUTS = {"fashion-mnist": 10, "mnist": 10, "digits": 10, "letter": 26, "satellite": 6,
           "shuttle": 3, "dna": 3, "breast-cancer": 2, "diabetes": 1, "randhie": 1}  # fmt: skip


def n_params(cell: g.Cell) -> int:
    shape, k = SHAPES[cell.data], OUTPUTS[cell.data]
    if cell.architecture == "glm":
        return (torch.Size(shape).numel() + 1) * k
    network = make_network(
        cell.architecture, shape, k, width=cell.width, depth=cell.depth,
        activation=cell.activation, pooling=cell.pooling,
    )  # fmt: skip
    return sum(p.numel() for p in network.parameters())


def test_enough_models_of_every_kind():
    cells = g.grid()
    assert len(cells) >= 300
    assert {cell.data for cell in cells} == set(SHAPES)
    assert {cell.architecture for cell in cells} == {"glm", *NETWORKS}
    assert {cell.optimizer for cell in cells} == {"converged", "sgd", "adam", "adamw"}
    assert any(cell.early_stopping for cell in cells)
    assert max(Counter(cell.group for cell in cells).values()) < 40


def test_names_and_digests_are_unique():
    cells = g.grid()
    assert (
        len({cell.name for cell in cells}) == len({cell.digest() for cell in cells}) == len(cells)
    )
    assert not any(set(cell.name) & set("/:'%\"") for cell in cells)  # MLflow's forbidden ones


def test_the_name_tells_every_field_apart():
    cell = g.by_name()["zoo-mlp-digits-n300-wd0.001-w16-d1-relu-sgd-e60-s0"]
    changes = {"n": 7, "weight_decay": 0.5, "width": 3, "depth": 4, "activation": "tanh",
               "epochs": 2, "optimizer": "adam", "label_noise": 0.1, "early_stopping": True,
               "schedule": "cosine", "seed": 9}  # fmt: skip
    names = {dataclasses.replace(cell, **{k: v}).name for k, v in changes.items()}
    assert len(names | {cell.name}) == len(changes) + 1


def test_each_audit_takes_seconds():
    slow = []
    for cell in g.grid():
        rows = cell.n * max(1, OUTPUTS[cell.data] - 1)
        size = min(n_params(cell), rows)  # up to EIGENVALUE_LIMIT the audit has a spectrum
        if not (n_params(cell) < rows or cell.n <= 400) or size > EIGENVALUE_LIMIT:
            slow.append((cell.name, n_params(cell), rows))
        assert cell.activation in ACTIVATIONS or cell.architecture == "glm"
    assert slow == []


def test_quick_is_a_part_of_every_kind():
    quick = g.grid(quick=True)
    assert 12 <= len(quick) <= 24
    assert {cell.data for cell in quick} == set(g.QUICK_SETS)
    assert {cell.architecture for cell in quick} == {"glm", *NETWORKS}
    assert {cell.optimizer for cell in quick} == {"converged", "sgd", "adam", "adamw"}
    assert {cell.name for cell in quick} <= set(g.by_name())


def test_pairs_differ_in_one_hyper_parameter_of_a_group():
    def row(**change):
        cell = g.by_name()["zoo-mlp-digits-n300-wd0.001-w16-d1-relu-sgd-e60-s0"]
        changed = dataclasses.replace(cell, **change)
        return dataclasses.asdict(changed) | {"group": changed.group}

    assert g.differ_in_one(row(), row(width=5)) == "width"
    assert g.differ_in_one(row(), row(optimizer="adam", lr=1e-3)) == "optimizer"
    assert g.differ_in_one(row(), row(width=5, depth=2)) is None
    assert g.differ_in_one(row(), row()) is None
    assert g.differ_in_one(row(), row(seed=1, width=5)) is None  # other training samples


def test_a_star_has_the_base_first_and_one_change_each():
    block = g.Block("b", ("digits",), {"architecture": "mlp", "n": 10, "weight_decay": 0.1,
                                       "optimizer": "sgd"},
                    {"n": (10, 20), "optimizer": ("adam",)},
                    also=({"n": 5, "epochs": 3},))  # fmt: skip
    cells = list(block.cells())
    assert [(c.n, c.optimizer, c.epochs) for c in cells] == [
        (10, "sgd", 0), (20, "sgd", 0), (10, "adam", 0), (5, "sgd", 3)
    ]  # fmt: skip
    assert [c.lr for c in cells] == [0.02, 0.02, 2e-3, 0.02]


@pytest.mark.parametrize("architecture", sorted(NETWORKS))
def test_networks_take_images_and_return_outputs(architecture):
    torch.manual_seed(0)
    network = make_network(
        architecture, (1, 28, 28), 10, width=6, depth=2, activation="gelu", pooling=2
    ).eval()
    x = torch.randn(3, 1, 28, 28)
    out = network(x)
    assert out.shape == (3, 10)
    assert torch.allclose(out[1:2], network(x[1:2]), atol=1e-5)  # samples do not mix


def test_unknown_or_unfit_architectures_are_named():
    with pytest.raises(KeyError, match="choose one of: mlp, cnn"):
        make_network("lstm", (4,), 2, width=3, depth=1, activation="relu")
    with pytest.raises(ValueError, match="expected images for architecture cnn"):
        make_network("cnn", (4,), 2, width=3, depth=1, activation="relu")
