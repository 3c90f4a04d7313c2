"""The training task of `benchmarks.footprint` as a Flower client with torch, without a network.

Run by the Python of an environment with flwr and torch only: `python -I flower.py net.pt data.npz`. Prints one
line of JSON. Stands alone, because that environment has no Edgewise.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

CLASSES = 7
SHAPE = (6, 100)


class Net(nn.Module):
    """A 1-D CNN of the size of the demo's, 13,455 parameters: `[batch, 6, 100]` to logits `[batch, 7]`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(6, 24, 9, padding=4)
        self.conv2 = nn.Conv1d(24, 32, 7, padding=3)
        self.conv3 = nn.Conv1d(32, 40, 5, padding=2)
        self.pool = nn.MaxPool1d(2)
        self.average = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x)))
        x = torch.relu(self.conv3(x))
        return self.head(self.average(x).flatten(1))


def main(weights: str, data: str) -> None:
    """Train as the settings in `data` say and print what it took."""
    from flwr.client import NumPyClient

    with np.load(data) as file:
        x, y, order = file["x"], file["y"], file["order"]
        settings: dict[str, Any] = json.loads(str(file["settings"]))
    torch.set_num_threads(1)
    net = Net()
    net.load_state_dict(torch.load(weights, weights_only=True))

    class Client(NumPyClient):
        def fit(self, parameters: list[np.ndarray], config: dict[str, Any]) -> tuple[Any, int, dict[str, Any]]:
            for held, given in zip(net.parameters(), parameters, strict=True):
                held.data = torch.as_tensor(given)
            losses = train(net, x, y, order, config)
            return [held.detach().numpy() for held in net.parameters()], len(x), {"losses": losses}

    began = time.perf_counter(), time.process_time()
    _, _, metrics = Client().fit([held.detach().numpy().copy() for held in net.parameters()], settings)
    seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "losses": metrics["losses"],
    }
    print(json.dumps(found))


def train(net: Net, x: np.ndarray, y: np.ndarray, order: np.ndarray, config: dict[str, Any]) -> list[float]:
    """AdamW over batches in `order` (int64 `[epochs, n]`); the loss of each step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=config["learning_rate"], weight_decay=config["weight_decay"])
    losses = []
    for rows in order.reshape(-1, config["batch_size"]):
        loss = nn.functional.cross_entropy(net(torch.as_tensor(x[rows])), torch.as_tensor(y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
