"""Integers with scales: dequantize each with its own scale, then average in float; never average integers.

    W_new = sum_k p_k (s_k * I_k),      |W_new - sum_k p_k W_k| <= 1/2 sum_k p_k s_k  elementwise

(methods/precision.md, section 5; FedHQ's own rule could not be consulted, FedMPQ, arXiv 2311.18129, states this one.) Nothing here
takes integers without their scales. The sum is that of `aggregator.merge.sums`, a monoid of float64 sums. This is for updates
that are integers of the weights themselves, as in the study of `benchmarks.precision`; a device's updates are encoded changes,
which `edge_sdk.update` decodes with their own scales. Ranges of activations are `edge_sdk.ranges`' business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from aggregator.merge import MergeError
from edge_sdk.tensors import Array

BITS: Final = (2, 8)  # of weights, least and most


@dataclass(frozen=True)
class Quantized:
    """One tensor: `codes` int8 `[channels, ...]` in ±(2^(bits-1) - 1), `scales` float32 `[channels]`, one a channel.

    Raises `MergeError` for integers without scales, codes out of range, and scales that are not finite or not above 0.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bits: int

    def __post_init__(self) -> None:
        least, most = BITS
        if not least <= self.bits <= most:
            raise MergeError(f"weights of {self.bits} bits, expected {least} to {most}")
        for what, value, dtype in (("codes", self.codes, np.int8), ("scales", self.scales, np.float32)):
            if not isinstance(value, np.ndarray) or value.dtype != dtype:
                found = getattr(value, "dtype", type(value).__name__)
                raise MergeError(
                    f"{what} are {found}, expected {np.dtype(dtype)}: integers mean nothing without scales"
                )
        if self.codes.ndim < 1 or self.scales.shape != self.codes.shape[:1]:
            raise MergeError(
                f"scales of shape {list(self.scales.shape)} for codes of shape {list(self.codes.shape)}, expected one a channel"
            )
        largest = levels(self.bits)
        found = int(np.abs(self.codes.astype(np.int16)).max(initial=0))
        if found > largest:
            raise MergeError(f"a code of {found}, at most {largest} with {self.bits} bits")
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise MergeError("a scale is not finite, or not above 0")


def levels(bits: int) -> int:
    """The largest code; -2^(bits-1) is never used."""
    return int(2 ** (bits - 1) - 1)


def quantize(value: Array, bits: int) -> Quantized:
    """Symmetric per output channel (the first axis), `s_j = max|W_j| / (2^(bits-1) - 1)`, rounded to nearest.

    A channel of zeros has scale 1.
    """
    largest = levels(bits)
    flat = value.reshape(len(value), -1).astype(np.float32)
    scales = (np.abs(flat).max(axis=1, initial=0.0) / largest).astype(np.float32)
    scales = np.where(scales > 0, scales, np.float32(1))
    codes = np.rint(flat / scales[:, None]).clip(-largest, largest).astype(np.int8)
    return Quantized(codes.reshape(value.shape), scales, bits)


def dequantize(value: Quantized) -> Array:
    """`s * I`, exact: float64 in the shape of the codes."""
    shape = [-1] + [1] * (value.codes.ndim - 1)
    return np.asarray(value.codes.astype(np.float64) * value.scales.reshape(shape))


def dequantized(
    tensors: Mapping[str, Quantized | Array],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    bits: int,
    base: str,
    expected: str,
) -> dict[str, Array]:
    """What a mean takes: float64 tensors by name, or float32 where they came so.

    `bits` are those of the device's program; `base` is the digest of what the device trained on, `expected` that of the
    round. Raises `MergeError` naming the tensor.
    """
    if base != expected:
        raise MergeError(f"trained on base {base[:12]!r}, expected {expected[:12]!r}: the mean of both means nothing")
    values: dict[str, Array] = {}
    for name, value in tensors.items():
        if isinstance(value, Quantized) and value.bits != bits:
            raise MergeError(f"tensor {name!r} has {value.bits} bits, its program {bits}")
        if not isinstance(value, Quantized) and value.dtype != np.float32:
            raise MergeError(f"tensor {name!r} is {value.dtype}, expected float32 or integers with scales")
        found = dequantize(value) if isinstance(value, Quantized) else value
        if name not in shapes or found.shape != shapes[name]:
            wanted = list(shapes[name]) if name in shapes else "no such tensor"
            raise MergeError(f"tensor {name!r} has shape {list(found.shape)}, expected {wanted}")
        values[name] = found
    return values
