"""A torch layer with an adapter beside it: what LoRA is in torch."""

from __future__ import annotations

import torch
from torch import nn


class Adapted(nn.Module):
    """A frozen linear layer beside a product of two factors: y = W x + b + s B (A x)."""

    def __init__(self, layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        assert isinstance(layer, nn.Linear)
        self.layer, self.scale = layer, scale
        bound = (3.0 / layer.in_features) ** 0.5
        self.a = nn.Parameter(torch.empty(rank, layer.in_features).uniform_(-bound, bound))
        self.b = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.scale * ((x @ self.a.T) @ self.b.T)
