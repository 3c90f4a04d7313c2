"""A small convolution net that has learned the digits, and what is done to it: measured once for all tests here."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional

from benchmarks.step_models import STEP_MODELS
from export.quantize.fold import fold_normalizations, fold_transposes
from export.quantize.kernels import quiet
from export.quantize.pipeline import Data, outputs_of, score
from export.torch_import import forward_graph

FAMILIES = (
    "cnn_all",
    "depthwise_all",
    "conv1d_all",
    "tiny_resnet8",
    "tiny_ds_cnn",
    "tiny_mobilenet",
    "tiny_autoencoder",
)


class SmallCnn(nn.Module):
    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.conv2 = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.Conv2d(12, 16, 3, stride=2)
        self.activation, self.pool, self.head = activation(), nn.MaxPool2d(3), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.norm(self.conv1(x)))
        x = self.activation(self.conv2(self.activation(self.depthwise(x))))
        return self.head(self.pool(x).flatten(1))


@cache
def digits() -> Data:
    """1,200 to train, 597 to test; float32 [n, 1, 8, 8]."""
    held = load_digits()
    order = np.random.default_rng(0).permutation(len(held.target))
    x, y = (held.images[order, None] / 16).astype(np.float32), held.target[order].astype(np.int64)
    return Data(x[:1200], y[:1200], x[1200:], y[1200:])


@cache
def trained(activation: type[nn.Module] = nn.ReLU, steps: int = 250) -> nn.Module:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    net, data, draw = SmallCnn(activation), digits(), np.random.default_rng(0)
    optimizer = torch.optim.Adam(net.parameters(), 5e-3)
    for _ in range(steps):
        rows = draw.integers(0, len(data.x), 64)
        loss = functional.cross_entropy(net(torch.tensor(data.x[rows])), torch.tensor(data.y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return net.eval()


def graph_of(module: nn.Module, x: np.ndarray) -> ir.Model:
    model = forward_graph(module, x[:2])
    fold_normalizations(model)
    fold_transposes(model)
    return model


def family(name: str) -> tuple[ir.Model, np.ndarray]:
    """One of the benchmark's networks, untrained, and samples for it."""
    entry = STEP_MODELS[name]
    x, _ = entry.example(24)
    return graph_of(entry.make(), x), x


def run(model: bytes, x: np.ndarray) -> np.ndarray:
    return outputs_of(onnxruntime.InferenceSession(model, quiet()), x)


def accuracy(model: bytes) -> float:
    return score(run(model, digits().held_x), digits().held_y)
