"""Small networks of the families that the exporter supports, and examples for them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(7, 12), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


class Conv1d(nn.Module):
    """Normalises inside; a buffer is called like an operator's result, on purpose."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.randn(1, 3, 1))
        self.conv1, self.conv2 = nn.Conv1d(3, 6, 5, padding=2), nn.Conv1d(6, 8, 3, stride=2)
        self.pool, self.average, self.head = nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(1), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv1(x - self.mean)))
        return self.head(self.average(torch.relu(self.conv2(x))).flatten(1))


class Conv2d(nn.Module):
    """Strides, padding, groups, frozen batch normalization, all poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 12, 3, groups=2)
        self.average, self.maximum = nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.MaxPool2d(3, 2, 1)
        self.whole, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.depthwise(torch.relu(self.norm(self.conv(x)))))
        x = self.maximum(self.average(torch.relu(self.grouped(x))))
        return self.head(self.whole(x).flatten(1))


NETS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "mlp": (Mlp, (7,)),
    "conv1d": (Conv1d, (3, 21)),
    "conv2d": (Conv2d, (3, 19, 19)),
}


def net(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETS[name][0]().eval()


def example(name: str, count: int = 16, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x float32, y int64 of four classes."""
    draw = np.random.default_rng(seed)
    return draw.normal(size=(count, *NETS[name][1])).astype(np.float32), draw.integers(0, 4, count)
