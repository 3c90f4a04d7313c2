"""How one float32 tensor becomes fewer bytes, and back: one codec per kind of encoding.

| kind       | parts                                             | bytes a number | loses                              |
|------------|---------------------------------------------------|----------------|------------------------------------|
| `float32`  | the tensor                                        | 4              | nothing                            |
| `float16`  | the tensor, rounded to nearest, cut at 65504      | 2              | up to 2^-11 relative               |
| `int8_row` | int8, one float32 scale a row                     | 1              | up to 1/127 of the row's largest   |
| `int4_row` | two codes a byte, one float32 scale a row         | 1/2            | up to 1/7 of the row's largest     |
| `top_k`    | the largest `density` of them, and where they are | 8 `density`    | the others, until feedback adds up |

A row is a slice of the first axis; a tensor of fewer than two axes is one row. Integer codes are symmetric and rounded
stochastically, so that their expectation is exact. Parts come from outside on the gateway: `decode` checks dtype and shape
of each before it uses it, and never allocates more than the tensor itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_sdk.draws import Draws
from edge_sdk.errors import UpdateError
from edge_sdk.tensors import Array

SCALE: Final = "/scale"  # no name of the tensor table holds a slash
INDEX: Final = "/index"
DENSITY_LIMIT: Final = 0.5  # above it an index costs more than the number it saves
_LARGEST_HALF: Final = 65504.0

Parts = Mapping[str, Array]  # by suffix; "" is the part that bears the tensor's own name
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Codec:
    """`suffixes` of its parts; `encode(tensor, density, draws)`; `decode(name, parts, shape)`, which raises `UpdateError`."""

    suffixes: tuple[str, ...]
    lossy: bool
    encode: Callable[[Array, float, Draws], dict[str, Array]]
    decode: Callable[[str, Parts, Shape], Array]


def rows_of(shape: Shape) -> int:
    """How many rows a tensor of this shape has."""
    return shape[0] if len(shape) > 1 else 1


def check_part(name: str, value: Array, dtype: str, shape: Shape) -> None:
    """Raises `UpdateError` unless a part is what it must be."""
    if value.dtype.name != dtype or value.shape != shape:
        raise UpdateError(
            "wrong_shape", f"tensor {name!r} is {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}"
        )


def _plain(delta: Array, density: float, draws: Draws) -> dict[str, Array]:  # noqa: ARG001
    return {"": delta}


def _from_plain(name: str, parts: Parts, shape: Shape) -> Array:
    check_part(name, parts[""], "float32", shape)
    return parts[""]


def _half(delta: Array, density: float, draws: Draws) -> dict[str, Array]:  # noqa: ARG001
    return {"": delta.clip(-_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)}


def _from_half(name: str, parts: Parts, shape: Shape) -> Array:
    check_part(name, parts[""], "float16", shape)
    return parts[""].astype(np.float32)


def _levels(delta: Array, most: int, draws: Draws) -> tuple[Array, Array]:
    """Whole numbers from -most to most as float32 `[rows, n]`, and float32 scales `[rows]`."""
    flat = delta.reshape(rows_of(delta.shape), -1).astype(np.float32)
    scales = (np.abs(flat).max(axis=1, initial=0.0) / most).astype(np.float32)
    steps = np.divide(flat, scales[:, None], out=np.zeros_like(flat), where=scales[:, None] > 0)
    return np.floor(steps + draws.uniform(flat.shape)).clip(-most, most), scales


def _scaled(name: str, codes: Array, parts: Parts, shape: Shape) -> Array:
    scales = parts[SCALE]
    check_part(name + SCALE, scales, "float32", (rows_of(shape),))
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((codes * scales[:, None]).reshape(shape))


def _int8(delta: Array, density: float, draws: Draws) -> dict[str, Array]:  # noqa: ARG001
    codes, scales = _levels(delta, 127, draws)
    return {"": codes.astype(np.int8).reshape(delta.shape), SCALE: scales}


def _from_int8(name: str, parts: Parts, shape: Shape) -> Array:
    check_part(name, parts[""], "int8", shape)
    return _scaled(name, parts[""].reshape(rows_of(shape), -1).astype(np.float32), parts, shape)


def _int4(delta: Array, density: float, draws: Draws) -> dict[str, Array]:  # noqa: ARG001
    codes, scales = _levels(delta, 7, draws)
    nibbles = (codes + 8).astype(np.uint8)
    if nibbles.shape[1] % 2:
        nibbles = np.concatenate([nibbles, np.full((len(nibbles), 1), 8, np.uint8)], axis=1)
    return {"": nibbles[:, ::2] | (nibbles[:, 1::2] << 4), SCALE: scales}


def _from_int4(name: str, parts: Parts, shape: Shape) -> Array:
    rows = rows_of(shape)
    width = math.prod(shape) // rows if rows else 0
    check_part(name, parts[""], "uint8", (rows, -(-width // 2)))
    packed = parts[""]
    codes = np.empty((rows, 2 * packed.shape[1]), np.float32)
    codes[:, ::2], codes[:, 1::2] = packed & 15, packed >> 4
    return _scaled(name, codes[:, :width] - 8, parts, shape)


def _top_k(delta: Array, density: float, draws: Draws) -> dict[str, Array]:  # noqa: ARG001
    flat = delta.reshape(-1).astype(np.float32)
    count = min(max(1, math.ceil(density * flat.size)), flat.size)
    index = np.sort(np.argsort(-np.abs(flat), kind="stable")[:count]).astype(np.int32)
    return {"": flat[index], INDEX: index}


def _from_top_k(name: str, parts: Parts, shape: Shape) -> Array:
    index, size = parts[INDEX], math.prod(shape)
    count = min(len(index) if index.ndim == 1 else 0, size)
    check_part(name + INDEX, index, "int32", (count,))
    check_part(name, parts[""], "float32", (count,))
    if count and not (index[0] >= 0 and index[-1] < size and (index[1:] > index[:-1]).all()):
        raise UpdateError("wrong_shape", f"tensor {name!r}: its indexes do not rise from 0 to below {size}")
    flat = np.zeros(size, np.float32)
    flat[index] = parts[""]
    return flat.reshape(shape)


CODECS: Final[Mapping[str, Codec]] = {
    "float32": Codec(("",), False, _plain, _from_plain),
    "float16": Codec(("",), True, _half, _from_half),
    "int8_row": Codec(("", SCALE), True, _int8, _from_int8),
    "int4_row": Codec(("", SCALE), True, _int4, _from_int4),
    "top_k": Codec(("", INDEX), True, _top_k, _from_top_k),
}
