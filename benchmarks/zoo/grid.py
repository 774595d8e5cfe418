"""The grid: which models the zoo holds, as a table of blocks.

A block is a base cell and axes; `product` takes every combination, `star` the base and one change
at a time. The cells of one block, data set and seed draw the same training samples and the same
initial weights, so that two of them differ in what their fields say and in nothing else; other
groups draw their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

QUICK_SETS = ("digits", "breast-cancer", "diabetes")  # they come with scikit-learn
QUICK_EVERY = 7


@dataclass(frozen=True, slots=True)
class Cell:
    """One model of the zoo: data, architecture, and how it is trained.

    weight_decay: of the mean training loss (AdamW: decoupled); early_stopping: with the best
    weights on a fifth of the n samples, which are not trained on; pooling: see `make_network`.
    """

    block: str
    data: str
    architecture: str
    n: int
    weight_decay: float
    width: int = 0
    depth: int = 0
    activation: str = "none"
    pooling: int = 1
    label_noise: float = 0.0
    optimizer: str = "converged"
    lr: float = 0.0
    epochs: int = 0
    batch_size: int = 50
    schedule: str = "constant"
    early_stopping: bool = False
    seed: int = 0

    @property
    def name(self) -> str:
        """Unique, readable, and a legal name of a registered model."""
        parts = [self.block, self.data, f"n{self.n}", f"wd{self.weight_decay:g}"]
        if self.architecture != "glm":
            parts += [f"w{self.width}", f"d{self.depth}", self.activation, self.optimizer]
            parts += [f"e{self.epochs}"] + ["es"] * self.early_stopping
            parts += ["cosine"] * (self.schedule == "cosine")
        parts += [f"noise{self.label_noise:g}"] * (self.label_noise > 0)
        return "zoo-" + "-".join(parts) + f"-s{self.seed}"

    @property
    def group(self) -> str:
        """Cells of a group share training samples and initial weights."""
        return f"{self.block}-{self.data}-s{self.seed}"

    @property
    def draw_seed(self) -> int:
        """The seed of the group's samples and initial weights."""
        return zlib.crc32(self.group.encode())

    def digest(self) -> str:
        """Changes with any field: a cell that was defined otherwise is trained anew."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Block:
    """Cells that belong together; `also` adds combinations to a star."""

    name: str
    data: Sequence[str]
    base: Mapping[str, Any]
    axes: Mapping[str, Sequence[Any]]
    design: str = "star"
    seeds: Sequence[int] = (0,)
    also: Sequence[Mapping[str, Any]] = ()

    def cells(self) -> Iterator[Cell]:
        """The block's cells, the base first."""
        for data, seed in itertools.product(self.data, self.seeds):
            for change in self._changes():
                values = {**self.base, **change}
                if "optimizer" in values and "lr" not in values:
                    values["lr"] = RATES[values["optimizer"]]
                yield Cell(block=self.name, data=data, seed=seed, **values)

    def _changes(self) -> Iterator[dict[str, Any]]:
        if self.design == "product":
            for combination in itertools.product(*self.axes.values()):
                yield dict(zip(self.axes, combination, strict=True))
            return
        yield {}
        for axis, values in self.axes.items():
            yield from ({axis: value} for value in values if value != self.base.get(axis))
        yield from (dict(change) for change in self.also)


RATES = {"sgd": 0.02, "adam": 2e-3, "adamw": 2e-3}  # SGD's with momentum 0.9
LINEAR = {"architecture": "glm"}
MLP = {
    "architecture": "mlp", "n": 300, "weight_decay": 1e-3, "width": 16, "depth": 1,
    "activation": "relu", "pooling": 2, "optimizer": "sgd", "epochs": 60,
}  # fmt: skip
TABLE_MLP = MLP | {"pooling": 1, "width": 12, "n": 400}
CNN = MLP | {"architecture": "cnn", "n": 400, "width": 6, "depth": 2, "pooling": 2, "epochs": 80}
RESNET = CNN | {"architecture": "resnet", "depth": 1, "epochs": 40}
TRANSFORMER = CNN | {
    "architecture": "transformer", "width": 12, "depth": 1, "activation": "gelu", "pooling": 1,
    "optimizer": "adam", "epochs": 60,
}  # fmt: skip
LONG = {"epochs": 400, "weight_decay": 1e-2}  # to a minimum of the penalised loss
BLOCKS = (
    Block("glm", ("fashion-mnist", "mnist", "digits", "satellite", "shuttle", "dna"),
          LINEAR, {"n": (100, 250), "weight_decay": (1e-3, 1e-2, 1e-1)}, "product", seeds=(0, 1)),
    Block("glm-letter", ("letter",),  # fewer samples would miss some of the 26 classes
          LINEAR, {"n": (250, 400), "weight_decay": (1e-3, 1e-2, 1e-1)}, "product", seeds=(0, 1)),
    Block("glm-noise", ("fashion-mnist", "digits", "satellite"),
          LINEAR, {"n": (250,), "weight_decay": (1e-2, 1e-1), "label_noise": (0.2, 0.4)},
          "product"),
    Block("glm-large", ("letter", "satellite", "shuttle"),
          LINEAR, {"n": (800, 1600), "weight_decay": (1e-4, 1e-2)}, "product"),
    Block("glm-binary", ("breast-cancer",),
          LINEAR, {"n": (80, 200), "weight_decay": (1e-3, 1e-2, 1e-1)}, "product", seeds=(0, 1)),
    Block("glm-real", ("diabetes",),
          LINEAR, {"n": (60, 180), "weight_decay": (1e-3, 1e-1)}, "product", seeds=(0, 1, 2)),
    Block("glm-counts", ("randhie",),
          LINEAR, {"n": (200, 1000, 4000), "weight_decay": (1e-4, 1e-1)}, "product", seeds=(0, 1)),
    Block("mlp", ("fashion-mnist", "mnist", "digits"), MLP,
          {"n": (100, 200), "width": (6, 48), "depth": (2,), "activation": ("tanh", "gelu"),
           "weight_decay": (0.0, 1e-2), "label_noise": (0.2, 0.4), "optimizer": ("adam", "adamw"),
           "epochs": (10, 200), "early_stopping": (True,), "schedule": ("cosine",)},
          also=(LONG, LONG | {"epochs": 800, "weight_decay": 3e-2}, LONG | {"label_noise": 0.2})),
    Block("mlp-table", ("letter", "satellite", "dna", "shuttle"), TABLE_MLP,
          {"n": (150, 1200), "width": (5, 30), "depth": (2,), "weight_decay": (1e-2,),
           "label_noise": (0.2,), "optimizer": ("adam", "adamw"), "epochs": (10, 200),
           "early_stopping": (True,)}, also=(LONG,)),
    Block("mlp-time", ("fashion-mnist", "satellite"), MLP | {"width": 8, "n": 250},
          {"optimizer": ("sgd", "adam", "adamw"), "epochs": (10, 60, 300),
           "weight_decay": (1e-3, 3e-2)}, "product"),
    Block("mlp-large", ("fashion-mnist",), MLP | {"pooling": 4, "width": 8},
          {"n": (500, 1500), "weight_decay": (1e-4, 1e-2), "epochs": (20, 100)}, "product"),
    Block("mlp-small", ("breast-cancer",), MLP | {"pooling": 1, "width": 6, "n": 200},
          {"weight_decay": (0.0, 1e-2), "epochs": (15, 300), "optimizer": ("sgd", "adamw")},
          "product"),
    Block("mlp-real", ("diabetes",), MLP | {"pooling": 1, "width": 6, "n": 180, "lr": 5e-3},
          {"weight_decay": (0.0, 1e-2, 1e-1), "epochs": (15, 200)}, "product"),
    Block("mlp-counts", ("randhie",), MLP | {"pooling": 1, "width": 8, "n": 1000, "lr": 1e-3},
          {"weight_decay": (1e-3, 1e-1), "epochs": (10, 60)}, "product"),
    Block("cnn", ("fashion-mnist", "mnist"), CNN,
          {"n": (200, 800), "width": (3, 10), "depth": (3,), "activation": ("tanh",),
           "weight_decay": (1e-2,), "label_noise": (0.2,), "optimizer": ("adam", "adamw"),
           "epochs": (15, 250), "early_stopping": (True,)}, also=(LONG,)),
    Block("resnet", ("fashion-mnist", "mnist"), RESNET,
          {"n": (200,), "weight_decay": (1e-2,), "label_noise": (0.2,), "optimizer": ("adam",),
           "epochs": (10, 120), "early_stopping": (True,)}),
    Block("transformer", ("fashion-mnist", "mnist"), TRANSFORMER,
          {"n": (200,), "depth": (2,), "label_noise": (0.2,), "optimizer": ("adamw", "sgd"),
           "epochs": (15, 200), "early_stopping": (True,)}),
)  # fmt: skip

SMALL = {"n": 150, "width": 4, "depth": 1, "pooling": 1, "epochs": 20}
QUICK_BLOCKS = (  # the architectures that the grid trains on larger images alone
    Block("quick-cnn", ("digits",), CNN | SMALL | {"optimizer": "adam"}, {}),
    Block("quick-resnet", ("digits",), RESNET | SMALL, {}),
    Block("quick-transformer", ("digits",), TRANSFORMER | SMALL | {"optimizer": "adamw"}, {}),
)


def grid(*, quick: bool = False) -> list[Cell]:
    """All cells; with `quick` one or two dozen, of every architecture, that need no download."""
    cells = [cell for block in BLOCKS for cell in block.cells()]
    if not quick:
        return cells
    small = [cell for cell in cells if cell.data in QUICK_SETS]
    return small[::QUICK_EVERY] + [cell for block in QUICK_BLOCKS for cell in block.cells()]


def by_name() -> dict[str, Cell]:
    """The cells of the grid and of its quick subset by name."""
    return {cell.name: cell for cell in (*grid(), *grid(quick=True))}


def differ_in_one(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """The one hyper-parameter in which two cells of a group differ; None where it is not one.

    Learning rates follow from the optimizer (`RATES`) and do not count by themselves.
    """
    if first["group"] != second["group"]:
        return None
    found = [name for name in HYPERPARAMETERS if first[name] != second[name]]
    return found[0] if len(found) == 1 else None


HYPERPARAMETERS = (
    "n", "weight_decay", "width", "depth", "activation", "label_noise", "optimizer", "epochs",
    "schedule", "early_stopping",
)  # fmt: skip
