"""Cases for the kinds of layers and inputs that torch networks are made of, each tiny."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.case import Case, constant, elementwise


class Recurring(nn.Module):
    """A recurrent layer of any kind and a layer on its last output."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        directions = 2 if recurrent.bidirectional else 1
        self.head = nn.Linear(directions * (recurrent.proj_size or recurrent.hidden_size), 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class SelfAttention(nn.Module):
    """Multi-head attention alone, which returns a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0].mean(dim=1))


class AttentionByHand(nn.Module):
    """Query, key and value as layers of their own; the softmax does not see the keys' bias."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.query(x) @ self.key(x).transpose(1, 2) / 2
        x = self.norm(x + scores.softmax(dim=-1) @ self.value(x))
        return self.head(x.mean(dim=1))


class Encoder(nn.Module):
    """torch's own encoder stack with a final norm."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(dim=1))


class TextClassifier(nn.Module):
    """Token and position embeddings, an encoder layer, a mean over positions, a layer.

    `pooled` False: the mean takes the padding too, where torch's fused kernels write zeros.
    """

    def __init__(self, pooled: bool = True) -> None:
        super().__init__()
        self.pooled = pooled
        self.embed = nn.Embedding(9, 4, padding_idx=0)
        self.position = nn.Parameter(torch.randn(1, 5, 4) / 3)
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        padding = None if mask is None else ~mask
        h = self.encoder(self.embed(ids) + self.position, src_key_padding_mask=padding)
        if mask is None or not self.pooled:
            return self.head(h.mean(dim=1))
        weight = mask[:, :, None].to(h.dtype)
        return self.head((h * weight).sum(dim=1) / weight.sum(dim=1))


class Towers(nn.Module):
    """Two inputs, a layer on each, joined; one number per sample scales the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.left(a) + self.right(b))
        return self.head(h if scale is None else h * scale[:, None])


class Pair(nn.Module):
    """A bilinear layer: x_1' W x_2."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(3, 2, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.pair(a, b)


class SharedEmbedding(nn.Module):
    """One matrix embeds the tokens and scores them: the language model's tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.mix = nn.Linear(3, 3)
        self.score = nn.Linear(3, 4)
        self.score.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.score(torch.tanh(self.mix(self.embed(x).mean(dim=1))))


def _after_training(model: nn.Module, x: Tensor) -> nn.Module:
    with torch.no_grad():
        model(x)  # in training mode: gathers running statistics
    return model


def _batchnorm_2d() -> nn.Module:
    return _after_training(
        nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False),
            nn.BatchNorm2d(3),
            nn.ReLU(inplace=True),
            nn.Dropout2d(0.2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        torch.randn(20, 2, 5, 5),
    )


def _frozen_batchnorm() -> nn.Module:
    """The usual fine-tuning: everything below the head is frozen, its statistics too."""
    model = _after_training(
        nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)),
        torch.randn(20, 5),
    )
    model[:2].requires_grad_(False)
    return model


def _flattened(*layers: nn.Module, width: int) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(width, 3))


def _ids(n: int) -> Tensor:
    return torch.randint(0, 9, (n, 5))


def _text(n: int) -> dict[str, Tensor]:
    """Tokens padded with zeros, and the mask of the true ones; the first sample is full."""
    lengths = torch.randint(1, 6, (n,))
    lengths[0] = 5
    mask = torch.arange(5) < lengths[:, None]
    return {"ids": torch.randint(1, 9, (n, 5)) * mask, "mask": mask}


def _labels() -> Tensor:
    return torch.randint(0, 3, (8,))


LAYER_CASES = (
    Case(
        "batchnorm_2d",
        _batchnorm_2d,
        lambda: torch.randn(8, 2, 5, 5),
        _labels,
        layers=("0.weight", "1.weight", "6.weight"),
    ),
    Case(
        "layernorm_of_two_axes",
        lambda: nn.Sequential(nn.LayerNorm((2, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)),
        lambda: torch.randn(8, 2, 3),
        _labels,
        penalty=elementwise(0.01, 1.0),
        layers=("0.weight", "3.weight"),
    ),
    Case(
        "layernorm_of_sequences",
        lambda: nn.Sequential(
            nn.LayerNorm(3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(6, 3)
        ),
        lambda: torch.randn(8, 2, 3),
        _labels,
        layers=("0.weight", "3.weight"),
    ),
    Case(
        "norm_without_a_scale",
        lambda: nn.Sequential(
            nn.Linear(5, 4), nn.LayerNorm(4, elementwise_affine=False), nn.Tanh(), nn.Linear(4, 3)
        ),
        lambda: torch.randn(8, 5),
        _labels,
        layers=("0.weight", "3.weight"),
    ),
    Case(
        "frozen_batchnorm",
        _frozen_batchnorm,
        lambda: torch.randn(8, 5),
        _labels,
        layers=("3.weight",),
    ),
    Case(
        "groupnorm",
        lambda: _flattened(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), width=16),
        lambda: torch.randn(8, 2, 4, 4),
        _labels,
        penalty=constant(0.02, free=("1.weight", "1.bias")),
        layers=("0.weight", "1.weight", "4.weight"),
    ),
    Case(
        "dropout",
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 3)),
        lambda: torch.randn(8, 5),
        _labels,
        layers=("0.weight", "3.weight"),
    ),
    Case(
        "convolution_1d",
        lambda: _flattened(nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), width=6),
        lambda: torch.randn(8, 2, 6),
        _labels,
    ),
    Case(
        "convolution_3d",
        lambda: _flattened(nn.Conv3d(1, 2, 2), nn.ReLU(), nn.AvgPool3d(2), width=2),
        lambda: torch.randn(8, 1, 3, 3, 3),
        _labels,
    ),
    Case(
        "transposed_1d",
        lambda: _flattened(nn.ConvTranspose1d(2, 2, 3, stride=2), nn.Tanh(), width=14),
        lambda: torch.randn(8, 2, 3),
        _labels,
    ),
    Case(
        "transposed_2d",
        lambda: _flattened(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.ConvTranspose2d(2, 1, 2, groups=1), width=9
        ),
        lambda: torch.randn(8, 1, 4, 4),
        _labels,
    ),
    Case(
        "transposed_3d",
        lambda: _flattened(nn.ConvTranspose3d(1, 2, 2, stride=2), nn.Tanh(), width=128),
        lambda: torch.randn(8, 1, 2, 2, 2),
        _labels,
    ),
    Case(
        "rnn",
        lambda: Recurring(nn.RNN(3, 3, batch_first=True)),
        lambda: torch.randn(8, 4, 3),
        _labels,
    ),
    Case(
        "lstm",
        lambda: Recurring(nn.LSTM(3, 2, num_layers=2, dropout=0.3, batch_first=True)),
        lambda: torch.randn(8, 4, 3),
        _labels,
    ),
    Case(
        "lstm_bidirectional",
        lambda: Recurring(nn.LSTM(3, 3, proj_size=2, bidirectional=True, batch_first=True)),
        lambda: torch.randn(8, 3, 3),
        _labels,
    ),
    Case(
        "embedding_bag",
        lambda: nn.Sequential(nn.EmbeddingBag(9, 4, mode="mean"), nn.Tanh(), nn.Linear(4, 3)),
        lambda: _ids(8),
        _labels,
    ),
    Case(
        "embedding_max_norm",
        lambda: nn.Sequential(nn.Embedding(9, 2, max_norm=0.7), nn.Flatten(), nn.Linear(10, 3)),
        lambda: _ids(8),
        _labels,
        layers=("2.weight",),
    ),
    Case("tied_embedding", SharedEmbedding, lambda: torch.randint(0, 4, (8, 3)), _labels),
    Case(
        "weight_norm",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)
        ),
        lambda: torch.randn(8, 5),
        _labels,
        layers=("2.weight",),
    ),
    Case(
        "spectral_and_orthogonal",
        lambda: nn.Sequential(
            parametrizations.spectral_norm(nn.Linear(5, 4)),
            nn.Tanh(),
            parametrizations.orthogonal(nn.Linear(4, 3)),
        ),
        lambda: torch.randn(8, 5),
        _labels,
        layers=(),
    ),
    Case("multihead", SelfAttention, lambda: torch.randn(8, 3, 4), _labels),
    Case("attention_by_hand", AttentionByHand, lambda: torch.randn(8, 5, 6), _labels),
    Case("transformer_encoder", Encoder, lambda: torch.randn(8, 3, 4), _labels),
    Case("text_classifier", TextClassifier, lambda: _ids(8), _labels),
    Case("text_by_name", TextClassifier, lambda: _text(8), _labels),
    Case("text_padding_pooled", lambda: TextClassifier(False), lambda: _text(8), _labels),
    Case(
        "towers_by_position",
        Towers,
        lambda: (torch.randn(8, 3), torch.randn(8, 2)),
        _labels,
        layers=("left.weight", "right.weight", "head.weight"),
    ),
    Case(
        "towers_by_name",
        Towers,
        lambda: {"scale": torch.rand(8), "b": torch.randn(8, 2), "a": torch.randn(8, 3)},
        _labels,
        penalty=constant(0.02, free=("bias",)),
        layers=("left.weight", "right.weight", "head.weight"),
    ),
    Case(
        "bilinear",
        Pair,
        lambda: (torch.randn(8, 3), torch.randn(8, 2)),
        lambda: torch.randn(8, 3),
        family="gaussian",
    ),
)
