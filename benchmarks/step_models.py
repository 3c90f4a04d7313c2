"""The networks that step graphs are tested and timed with, written down once: families, and the four of MLPerf Tiny.

Each entry builds a torch module for `width` (1 is the size that benchmarks time; tests use less), with the shape of a
sample, the loss, and what trains. The MLPerf Tiny networks follow their description (Banbury et al., arXiv 2106.07597,
table 1, and the reference models that it names).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.minilm_net import HEADS, SIZE, TOKENS, WORDS, MiniLm


@dataclass(frozen=True)
class StepModel:
    """A network: how it is made, the shape of a sample, its loss (`cross_entropy` with `classes`, or `mse`), its scope.

    With `words` a sample is text: tokens below that number.
    """

    build: Callable[[float], nn.Module]
    shape: tuple[int, ...]
    classes: int = 10
    loss: str = "cross_entropy"
    scope: str = "full"
    options: dict[str, Any] = field(default_factory=dict)
    words: int = 0

    def make(self, width: float = 1.0, seed: int = 0) -> nn.Module:
        """The module in evaluation mode, its batch norms at the statistics of the example.

        Those of a fresh network would let the signal die out, and time would be that of denormal numbers.
        """
        torch.manual_seed(seed)
        module = self.build(width)
        norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d)]
        for part in norms:
            part.momentum = None  # the mean over all batches seen: here one
        with torch.no_grad():
            module.train()(torch.as_tensor(self.example()[0]))
        return module.eval()

    def example(self, count: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """x float32 (int64 for text) `[count, *shape]`; y labels, or the input where the network is to repeat it."""
        draw = np.random.default_rng(seed)
        if self.words:
            x = draw.integers(1, self.words, (count, *self.shape))
            return x, draw.integers(0, self.classes, count)
        x = draw.normal(size=(count, *self.shape)).astype(np.float32)
        return x, draw.integers(0, self.classes, count) if self.loss == "cross_entropy" else x


def _scaled(channels: int, width: float) -> int:
    return max(4, round(channels * width / 4) * 4)


class Mlp(nn.Sequential):
    """Two hidden layers."""

    def __init__(self, width: float) -> None:
        hidden = _scaled(256, width)
        super().__init__(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def _block(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, group: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=group, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Cnn(nn.Module):
    """Conv, BatchNorm, ReLU, MaxPool, three times."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b, c = (_scaled(channels, width) for channels in (16, 32, 64))
        self.features = nn.Sequential(
            _block(3, a), nn.MaxPool2d(2), _block(a, b), nn.MaxPool2d(2), _block(b, c), nn.MaxPool2d(3, 2, 1)
        )
        self.head = nn.Linear(c * 16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).flatten(1))


class DepthwiseCnn(nn.Module):
    """Depth-wise and point-wise convolutions in turn (Howard et al., arXiv 1704.04861)."""

    def __init__(
        self, width: float, first: int, plan: tuple[tuple[int, int], ...], classes: int, stem: nn.Module
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [stem]
        inputs = _scaled(first, width)
        for channels, stride in plan:
            outputs = _scaled(channels, width)
            layers += [_block(inputs, inputs, 3, stride, inputs), _block(inputs, outputs, 1)]
            inputs = outputs
        self.features, self.pool, self.head = (
            nn.Sequential(*layers),
            nn.AdaptiveAvgPool2d(1),
            nn.Linear(inputs, classes),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


def depthwise(width: float) -> nn.Module:
    """A small depth-wise separable network for 32 x 32 images."""
    plan = ((32, 1), (64, 2), (64, 1), (128, 2))
    return DepthwiseCnn(width, 16, plan, 10, _block(3, _scaled(16, width), 3, 2))


def mobilenet(width: float) -> nn.Module:
    """MobileNetV1 at a quarter of its width, 96 x 96: person or not (MLPerf Tiny, visual wake words)."""
    plan = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1))
    return DepthwiseCnn(width, 8, plan, 2, _block(3, _scaled(8, width), 3, 2))


def ds_cnn(width: float) -> nn.Module:
    """DS-CNN: 49 x 10 cepstral coefficients, 12 words (MLPerf Tiny, keyword spotting)."""
    channels = _scaled(64, width)
    stem = nn.Sequential(
        nn.Conv2d(1, channels, (10, 4), 2, (5, 1), bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.2)
    )
    return DepthwiseCnn(width, 64, ((64, 1),) * 4, 12, stem)


class Residual(nn.Module):
    """Two convolutions beside an identity, or a strided 1 x 1 convolution (He et al., arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _block(inputs, outputs, 3, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.BatchNorm2d(outputs))
        self.skip = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.second(self.first(x)) + self.skip(x))


class ResNet8(nn.Module):
    """Three residual blocks for 32 x 32 images (MLPerf Tiny, image classification)."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b, c = (_scaled(channels, width) for channels in (16, 32, 64))
        self.features = nn.Sequential(_block(3, a), Residual(a, a, 1), Residual(a, b, 2), Residual(b, c, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(c, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class FcAutoencoder(nn.Sequential):
    """640-128-128-128-128-8 and back: the sound of a machine (MLPerf Tiny, anomaly detection)."""

    def __init__(self, width: float) -> None:
        hidden, inner = _scaled(128, width), 8
        sizes = [640, *[hidden] * 4, inner, *[hidden] * 4]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.Linear(hidden, 640))


class Conv1dNet(nn.Module):
    """Vibration of three axes: strided convolutions along time."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b, c = (_scaled(channels, width) for channels in (16, 32, 64))
        self.features = nn.Sequential(
            nn.Conv1d(3, a, 9, 2, 4), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(a, b, 5, 2, 2), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(b, c, 3, padding=1, groups=4), nn.GELU(),
        )  # fmt: skip
        self.pool, self.head = nn.AdaptiveAvgPool1d(1), nn.Linear(c, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class Recurrent(nn.Module):
    """A recurrent layer of 16 steps and a linear one on its last state."""

    def __init__(self, kind: str, width: float) -> None:
        super().__init__()
        hidden = _scaled(64, width)
        self.cells, self.head = getattr(nn, kind)(8, hidden, batch_first=True), nn.Linear(hidden, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.cells(x)
        return self.head(y[:, -1])


class Attention(nn.Module):
    """Multi-head attention with projections of their own."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, size = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(batch, tokens, self.heads, size // self.heads).transpose(1, 2)

        scores = split(self.q(x)) @ split(self.k(x)).transpose(2, 3) / (size // self.heads) ** 0.5
        mixed = (scores.softmax(-1) @ split(self.v(x))).transpose(1, 2)
        return self.out(mixed.reshape(batch, tokens, size))


class TransformerBlock(nn.Module):
    """LayerNorm, attention, LayerNorm, two linear layers with GELU; residual around each half."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(size), Attention(size, heads), nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Vit(nn.Module):
    """Patches of 4 x 4 of a 32 x 32 image, a learned position, four blocks (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(self, width: float, depth: int = 4) -> None:
        super().__init__()
        size = _scaled(128, width)
        self.patches = nn.Conv2d(3, size, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 64, size) * 0.02)
        self.blocks = nn.ModuleList(TransformerBlock(size, 4) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Encoder(nn.Module):
    """torch's own encoder layer over a sequence of sensor readings."""

    def __init__(self, width: float) -> None:
        super().__init__()
        size = _scaled(64, width)
        self.embed = nn.Linear(6, size)
        self.layer = nn.TransformerEncoderLayer(size, 4, 2 * size, batch_first=True, activation="gelu")
        self.head = nn.Linear(size, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


class ConvAutoencoder(nn.Module):
    """Strided convolutions down, transposed ones up, with group normalization between."""

    def __init__(self, width: float) -> None:
        super().__init__()
        a, b = _scaled(16, width), _scaled(32, width)
        self.down = nn.Sequential(
            nn.Conv2d(1, a, 3, 2, 1), nn.GroupNorm(2, a), nn.LeakyReLU(0.1), nn.Conv2d(a, b, 3, 2, 1), nn.SiLU()
        )
        self.up = nn.Sequential(
            nn.ConvTranspose2d(b, a, 3, 2, 1, output_padding=1), nn.Hardswish(), nn.ConvTranspose2d(a, 1, 4, 2, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.hardsigmoid(self.up(self.down(x)))


def minilm_of(width: float) -> nn.Module:
    """all-MiniLM-L6-v2 by its form: what a step costs does not depend on the values of the weights."""
    return MiniLm(10, HEADS * max(1, round(SIZE // HEADS * width)))


_QV: Final = {"rank": 4, "targets": ["*.attention.q", "*.attention.v"]}

STEP_MODELS: Final[dict[str, StepModel]] = {
    "mlp": StepModel(Mlp, (64,)),
    "mlp_adapter": StepModel(
        lambda width: nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024)),
        (1024,),
        loss="mse",
        scope="lora",
        options={"rank": 4, "targets": ["*"]},
    ),
    "cnn_all": StepModel(Cnn, (3, 32, 32)),
    "cnn_last": StepModel(Cnn, (3, 32, 32), scope="layer", options={"modules": ["features.4.*", "head"]}),
    "depthwise_all": StepModel(depthwise, (3, 32, 32)),
    "conv1d_all": StepModel(Conv1dNet, (3, 2048)),
    "gru": StepModel(lambda width: Recurrent("GRU", width), (16, 8)),
    "lstm": StepModel(lambda width: Recurrent("LSTM", width), (16, 8)),
    "encoder": StepModel(Encoder, (12, 6)),
    "vit_all": StepModel(Vit, (3, 32, 32)),
    "vit_lora": StepModel(Vit, (3, 32, 32), scope="lora", options=_QV),
    "vit_layer": StepModel(Vit, (3, 32, 32), scope="layer", options={"modules": ["blocks.3.*"]}),
    "minilm_lora": StepModel(
        minilm_of, (TOKENS,), scope="lora", options={"rank": 8, "targets": ["layers.[45].[qv]"]}, words=WORDS
    ),
    "autoencoder": StepModel(ConvAutoencoder, (1, 28, 28), loss="mse"),
    "tiny_resnet8": StepModel(ResNet8, (3, 32, 32)),
    "tiny_ds_cnn": StepModel(ds_cnn, (1, 49, 10), classes=12),
    "tiny_mobilenet": StepModel(mobilenet, (3, 96, 96), classes=2),
    "tiny_autoencoder": StepModel(FcAutoencoder, (640,), loss="mse"),
}
