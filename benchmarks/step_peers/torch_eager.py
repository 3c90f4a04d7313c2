"""torch, eager, one thread: `torch_eager.py NET SCOPE_JSON batch.npz`. The same net, trained tensors, loss and AdamW."""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.append(str(Path(__file__).resolve().parent))
sys.path.append(str(Path(__file__).resolve().parents[2]))

from adapted import Adapted
from protocol import serve

from benchmarks.step_models import STEP_MODELS


def prepare(net: nn.Module, scope: str, options: dict) -> list[nn.Parameter]:
    """Freeze what does not train, add adapters where the scope says so; return what trains."""
    if scope == "full":
        return list(net.parameters())
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    if scope == "layer":
        chosen = [
            parameter
            for name, parameter in net.named_parameters()
            if any(fnmatch.fnmatchcase(name.rpartition(".")[0], pattern) for pattern in options["modules"])
        ]
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen
    rank, targets = options["rank"], options.get("targets", ["*"])
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear) and any(fnmatch.fnmatchcase(name, target) for target in targets):
            parent, _, leaf = name.rpartition(".")
            setattr(net.get_submodule(parent), leaf, Adapted(layer, rank, 2.0))
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


def main() -> None:
    """Build the net and serve."""
    torch.set_num_threads(1)
    model = STEP_MODELS[sys.argv[1]]
    net = model.make()
    trained = prepare(net, model.scope, json.loads(sys.argv[2]))
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    with np.load(sys.argv[3]) as file:
        x, y = torch.as_tensor(file["x"]), torch.as_tensor(file["y"])
        for group in optimizer.param_groups:
            group["lr"] = float(file["learning_rate"])
    loss_of = nn.functional.cross_entropy if model.loss == "cross_entropy" else nn.functional.mse_loss

    def step() -> float:
        loss = loss_of(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    serve(step)


main()
