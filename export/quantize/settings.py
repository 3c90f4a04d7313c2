"""How quantization-aware training on the workstation goes: apart from `qat`, which needs torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QatSettings:
    """Steps of Adam with this batch size and peak learning rate, which falls to zero along a cosine."""

    steps: int = 150
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 0
