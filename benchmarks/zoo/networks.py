"""The zoo's networks: MLP, CNN, a small ResNet with BatchNorm, a small transformer.

All take images (n, 1, H, W) or tables (n, d) and return the family's natural parameters (n, K).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


def make_network(
    architecture: str,
    shape: Sequence[int],
    n_outputs: int,
    *,
    width: int,
    depth: int,
    activation: str,
    pooling: int = 1,
) -> nn.Module:
    """A network by name, with torch's default initialisation from the global seed.

    shape: of one sample; pooling: images are averaged over squares of this side first, which keeps
    the number of parameters below that of the rows of an audit.
    """
    if architecture not in NETWORKS:
        raise KeyError(
            f"unknown architecture {architecture!r}; choose one of: {', '.join(NETWORKS)}"
        )
    image = len(shape) == 3
    if not image and architecture != "mlp":
        raise ValueError(
            f"expected images for architecture {architecture}, got shape {tuple(shape)}"
        )
    shape = (shape[0], *(side // pooling for side in shape[1:])) if image else tuple(shape)
    body = NETWORKS[architecture](shape, n_outputs, width, depth, ACTIVATIONS[activation])
    return nn.Sequential(nn.AvgPool2d(pooling), body) if image and pooling > 1 else body


def _mlp(shape: Sequence[int], k: int, width: int, depth: int, act: type[nn.Module]) -> nn.Module:
    sizes = [math.prod(shape), *[width] * depth]
    layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
    for size, following in itertools.pairwise(sizes):
        layers += [nn.Linear(size, following), act()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], k))


def _cnn(shape: Sequence[int], k: int, width: int, depth: int, act: type[nn.Module]) -> nn.Module:
    """`depth` convolutions, the channels doubled at the second, then one linear layer."""
    channels = [shape[0], width, *[2 * width] * (depth - 1)]
    layers: list[nn.Module] = []
    for at, (size, following) in enumerate(itertools.pairwise(channels)):
        layers += [nn.Conv2d(size, following, 3, stride=2 if at < 2 else 1, padding=1), act()]
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels[-1], k)]
    return nn.Sequential(*layers, *head)


class Residual(nn.Module):
    """conv, BatchNorm, activation, conv, BatchNorm, plus the input."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            act(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(x + self.body(x))
        return out


def _resnet(
    shape: Sequence[int], k: int, width: int, depth: int, act: type[nn.Module]
) -> nn.Module:
    stem = [
        nn.Conv2d(shape[0], width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(width),
        act(),
    ]
    blocks = [Residual(width, act) for _ in range(depth)]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, k)
    )


class Attention(nn.Module):
    """Self-attention over tokens (n, t, d), `heads` heads."""

    def __init__(self, d: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        parts = self.qkv(x).reshape(n, t, 3, self.heads, d // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(d // self.heads), dim=-1)
        mixed: Tensor = self.out((scores @ v).transpose(1, 2).reshape(n, t, d))
        return mixed


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, d: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention = Attention(d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), act(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Transformer(nn.Module):
    """Image patches as tokens, learned positions, `depth` layers, the mean token to the outputs."""

    def __init__(
        self,
        shape: Sequence[int],
        k: int,
        d: int,
        depth: int,
        act: type[nn.Module],
        per_side: int = 4,
    ) -> None:
        super().__init__()
        patch = shape[-1] // per_side
        self.embed = nn.Conv2d(shape[0], d, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(per_side**2, d))
        self.layers = nn.Sequential(*[Layer(d, act) for _ in range(depth)])
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, k)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x).flatten(2).transpose(1, 2) + self.position
        out: Tensor = self.head(self.norm(self.layers(tokens)).mean(dim=1))
        return out


Builder = Callable[[Sequence[int], int, int, int, type[nn.Module]], nn.Module]
NETWORKS: dict[str, Builder] = {
    "mlp": _mlp,
    "cnn": _cnn,
    "resnet": _resnet,
    "transformer": Transformer,
}
