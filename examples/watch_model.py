"""The base model of the demo: a 1-D CNN over windows of a wrist watch, trained on the workstation with torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from examples.datasets import WATCH_CLASSES

LEARNING_RATE = 3e-3
LAST_FRACTION = 0.1
BATCH = 32


class WatchNet(nn.Module):
    """Three convolutions and a linear head, 13,455 parameters: `[batch, 6, 100]` to logits `[batch, 7]`.

    The input is normalised inside the network, with mean and deviation (each `[6]`) of the people it was first trained
    on, so that a device feeds what its sensor says.
    """

    def __init__(self, mean: np.ndarray, deviation: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).reshape(1, 6, 1))
        self.register_buffer("deviation", torch.as_tensor(deviation, dtype=torch.float32).reshape(1, 6, 1))
        self.conv1 = nn.Conv1d(6, 24, 9, padding=4)
        self.conv2 = nn.Conv1d(24, 32, 7, padding=3)
        self.conv3 = nn.Conv1d(32, 40, 5, padding=2)
        self.pool = nn.MaxPool1d(2)
        self.average = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(40, len(WATCH_CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = (x - self.mean) / self.deviation
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.head(self.average(x).flatten(1))


def train_centrally(x: np.ndarray, y: np.ndarray, *, normalise_by: np.ndarray, steps: int, seed: int) -> WatchNet:
    """Ordinary training with everything in one place: AdamW, learning rate falling linearly to a tenth.

    `x` float32 `[n, 6, 100]`, `y` int64 `[n]`; `normalise_by` gives mean and deviation, in the shape of `x`.
    """
    torch.set_num_threads(1)  # the net is too small for two, and two wait for each other on a busy machine
    torch.manual_seed(seed)
    net = WatchNet(normalise_by.mean(axis=(0, 2)), normalise_by.std(axis=(0, 2)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, LAST_FRACTION, total_iters=steps)
    samples, labels = torch.as_tensor(x), torch.as_tensor(y)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        index = torch.randint(0, len(samples), (BATCH,), generator=draw)
        loss = nn.functional.cross_entropy(net(samples[index]), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def accuracy(net: WatchNet, x: np.ndarray, y: np.ndarray) -> float:
    """The share of windows that the network names rightly."""
    with torch.no_grad():
        return float((net(torch.as_tensor(x)).argmax(1).numpy() == y).mean())
