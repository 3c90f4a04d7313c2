"""Fake quantization in torch, written for itself: what step graphs of the precision `qat<b>` are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_LAYERS = (functional.linear, torch.conv1d, torch.conv2d, functional.conv1d, functional.conv2d)


class FakeQuantized(TorchFunctionMode):
    """Inside, the layers whose weight requires a gradient compute with quantized weights and inputs."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.layers = bits, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in _LAYERS and args[1].requires_grad:
            self.layers += 1
            args = (unsigned(args[0]), signed(args[1], self.bits), *args[2:])
        return function(*args, **(kwargs or {}))


def signed(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Symmetric, one scale per output channel (axis 0)."""
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        scale = (weight.abs().flatten(1).amax(1) / most).reshape(-1, *[1] * (weight.ndim - 1))
        rounded = torch.round(weight / scale) * scale
    return _Through.apply(weight, rounded)


def unsigned(x: torch.Tensor) -> torch.Tensor:
    """8 bits, one range per sample that holds zero."""
    with torch.no_grad():
        rows = x.flatten(1)
        shape = (-1, *[1] * (x.ndim - 1))
        low, high = rows.amin(1).clamp(max=0).reshape(shape), rows.amax(1).clamp(min=0).reshape(shape)
        scale = (high - low) / 255
        zero_point = torch.round(-low / scale)
        codes = torch.clamp(torch.round(x / scale) + zero_point, 0, 255)
        rounded = (codes - zero_point) * scale
    return _Through.apply(x, rounded)


class _Through(torch.autograd.Function):
    """The rounded value forward, the gradient as it is backward."""

    @staticmethod
    def forward(_context: Any, _value: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None
