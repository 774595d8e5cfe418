"""The benchmark's cases: networks trained on Fashion-MNIST by SGD, float64, penalty 1e-3.

Every method gets the same weights: a case is trained once and its state kept in a folder.
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, relu

DATA = Path("/usr/share/datasets/fashion-mnist")
PENALTY = 1e-3  # D = PENALTY on every parameter: the weight decay of the mean loss
N_CLASSES = 10


class Attention(nn.Module):
    """Single-head self-attention of plain linear layers, which every library can read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).mT / math.sqrt(x.shape[-1])
        attended: Tensor = self.out(torch.softmax(scores, dim=-1) @ self.value(x))
        return attended


class Transformer(nn.Module):
    """A pre-norm encoder over the 28 rows of an image, and a linear layer on their mean."""

    def __init__(self, width: int = 32, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(28, width)
        self.attention = nn.ModuleList(Attention(width) for _ in range(blocks))
        self.before = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.between = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.narrow = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.head = nn.Linear(width, N_CLASSES)
        self.register_buffer("position", torch.randn(28, width) / 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, 0]) + self.position
        for i, attention in enumerate(self.attention):
            h = h + attention(self.before[i](h))
            h = h + self.narrow[i](relu(self.wide[i](self.between[i](h))))
        logits: Tensor = self.head(h.mean(dim=1))
        return logits


class Residual(nn.Module):
    """Two 3 x 3 convolutions with batch norm, and a shortcut (1 x 1 where the shape changes)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.second = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        same = stride == 1 and inside == outside
        self.shortcut = (
            nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = relu(self.norm1(self.first(x)))
        return relu(self.norm2(self.second(h)) + self.shortcut(x))


class ResNet8(nn.Module):
    """Stem, three residual blocks, linear layer: eight layers with weights on the longest path."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Residual(width, width, 1),
            Residual(width, 2 * width, 2),
            Residual(2 * width, 4 * width, 2),
        )
        self.head = nn.Linear(4 * width, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(avg_pool2d(h, h.shape[-1]).flatten(1))
        return logits


def mlp(hidden: int = 100) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, N_CLASSES)
    )


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, N_CLASSES),
    )  # fmt: skip


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, N_CLASSES))


def small_logistic() -> nn.Module:
    """P = 500, below N = 1,800."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, N_CLASSES))


@dataclass(frozen=True)
class Case:
    """One problem: `build` makes the network, n samples, epochs of training, whether a matrix of
    side min(P, N) is meant to fit."""

    name: str
    title: str
    build: Callable[[], nn.Module]
    n: int
    epochs: int = 20
    exact: bool = True


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("mlp-500", "MLP 784-100-10", mlp, 500),
        Case("lenet-500", "CNN (LeNet)", lenet, 500),
        Case("transformer-500", "Transformer, two blocks", Transformer, 500, epochs=40),
        Case("logistic-2000", "Logistic regression", logistic, 2000),
        Case("mlp-2000", "MLP 784-100-10", mlp, 2000),
        Case("lenet-2000", "CNN (LeNet)", lenet, 2000),
        Case("resnet8-10000", "ResNet-8", ResNet8, 10_000, epochs=3, exact=False),
        # Not in the published table: a second or two for all methods. Warm-up, and tests.
        Case("tiny-mlp", "MLP 784-2-10", lambda: mlp(2), 20, epochs=5),
        Case("tiny-lenet", "CNN (LeNet)", lenet, 20, epochs=5),
        Case("tiny-transformer", "Transformer", lambda: Transformer(8, 1), 20, epochs=5),
        Case("tiny-logistic", "Logistic regression", small_logistic, 200, epochs=5),
    )
}


@dataclass(frozen=True, eq=False)
class Task:
    """A trained case: `model` float64 in eval mode, x (n, 1, 28, 28), y (n,) class labels."""

    case: Case
    model: nn.Module
    x: Tensor
    y: Tensor

    @property
    def n(self) -> int:
        return len(self.x)

    @property
    def n_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    @property
    def n_rows(self) -> int:
        return self.n * (N_CLASSES - 1)

    @cached_property
    def logits(self) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.model(part) for part in self.x.split(500)])


def fashion_mnist(folder: Path, n: int) -> tuple[Tensor, Tensor]:
    """The first n training images (n, 1, 28, 28) in [0, 1] and their labels."""

    def read(name: str, offset: int) -> np.ndarray:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), dtype=np.uint8, offset=offset)

    images = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:n]
    labels = read("train-labels-idx1-ubyte.gz", 8)[:n]
    x = torch.from_numpy(images.astype(np.float64) / 255.0)
    return x, torch.from_numpy(labels.astype(np.int64))


def synthetic(n: int) -> tuple[Tensor, Tensor]:
    """Images of noise around one mean per class: for tests, where the data set is not installed."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(n) % N_CLASSES
    means = torch.rand(N_CLASSES, 1, 28, 28, generator=generator, dtype=torch.float64)
    noise = torch.rand(n, 1, 28, 28, generator=generator, dtype=torch.float64)
    return (means[y] + noise) / 2, y


def load(name: str, folder: Path | None, weights: Path | None = None) -> Task:
    """The trained case; folder None: synthetic images; weights: a folder that keeps states."""
    case = CASES[name]
    x, y = synthetic(case.n) if folder is None else fashion_mnist(folder, case.n)
    torch.manual_seed(0)
    model = case.build().float()
    kept = None if weights is None else weights / f"{name}.pt"
    if kept is not None and kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        fit(model, x.float(), y, case.epochs)
        if kept is not None:
            torch.save(model.state_dict(), kept)
    return Task(case, model.double().eval(), x, y)


def fit(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    """SGD with momentum, batches of 50, weight decay PENALTY."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=PENALTY)
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(50):
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
