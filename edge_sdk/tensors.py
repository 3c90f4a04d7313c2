"""Named tensors as bytes: the safetensors layout, written by us so that equal tensors are equal bytes.

Layout (safetensors, format page of the project): 8 bytes little-endian header length, a JSON header
`{name: {dtype, shape, data_offsets}}` with an optional `__metadata__` map of strings, then the data.

Rules of reading, since the bytes may come from anybody: the header's length is checked before the header is read
(64 KiB at most), names and numbers before any array is made, and the ranges must tile the data exactly: no gap, no
overlap, nothing behind. Arrays are views of the given buffer where alignment allows; nothing is allocated that the
buffer does not already hold.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import TensorsError

Array = npt.NDArray[Any]
Tensors = Mapping[str, Array]

HEADER_LIMIT = 65_536
_ALIGNMENT = 8
_TO_CODE = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_TO_DTYPE = {code: np.dtype(name) for name, code in _TO_CODE.items()}


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor must look like: NumPy dtype name and static shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def pack(tensors: Tensors, metadata: Mapping[str, str] | None = None) -> bytes:
    """Write tensors and metadata; the same content gives the same bytes. Raises `TensorsError` for a dtype without a code."""
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    parts = []
    offset = 0
    # Wide types first, so that each tensor begins at a multiple of its item size; then by name.
    for name, value in sorted(tensors.items(), key=lambda item: (-np.asarray(item[1]).dtype.itemsize, item[0])):
        array = np.asarray(value)
        code = _TO_CODE.get(array.dtype.name)
        if code is None:
            raise TensorsError(
                f"tensor {name!r} has dtype {array.dtype}, expected one of {', '.join(sorted(_TO_CODE))}"
            )
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {
            "dtype": code,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        offset += len(data)
        parts.append(data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise TensorsError(
            f"the header of {len(tensors)} tensors takes {len(text)} bytes, at most {HEADER_LIMIT} are allowed"
        )
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def unpack(
    data: bytes | bytearray | memoryview, *, limit_header: int = HEADER_LIMIT
) -> tuple[dict[str, Array], dict[str, str]]:
    """Read tensors and metadata, trusting nothing; raises `TensorsError` and no other error.

    The arrays are read-only views of `data`.
    """
    view = memoryview(data).toreadonly().cast("B")
    header, body = _header(view, limit_header)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TensorsError("the metadata of a tensor file must map text to text")
    ranges = []
    tensors = {}
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry)
        expected = math.prod(shape) * dtype.itemsize
        if end - begin != expected or end > len(body):
            raise TensorsError(
                f"tensor {name!r} of {dtype} {list(shape)} claims bytes {begin} to {end}; "
                f"it takes {expected} and the file holds {len(body)}"
            )
        ranges.append((begin, end, name))
        tensors[name] = np.frombuffer(body[begin:end], dtype=dtype.newbyteorder("<")).reshape(shape)
    position = 0
    for begin, end, name in sorted(ranges):
        if begin != position:
            raise TensorsError(f"tensor {name!r} begins at byte {begin}, expected {position}: no gaps, no overlaps")
        position = end
    if position != len(body):
        raise TensorsError(f"{len(body) - position} bytes lie behind the last tensor")
    return tensors, metadata


def digest(data: bytes | bytearray | memoryview) -> str:
    """SHA-256 in 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _header(view: memoryview, limit: int) -> tuple[dict[str, Any], memoryview]:
    if len(view) < 8:
        raise TensorsError(f"a tensor file has at least 8 bytes, found {len(view)}")
    length = int.from_bytes(view[:8], "little")
    if length > limit or length > len(view) - 8:
        raise TensorsError(
            f"the header claims {length} bytes; at most {limit} are allowed and {len(view) - 8} are there"
        )
    try:
        header = json.loads(bytes(view[8 : 8 + length]).decode(), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise TensorsError(f"the header is not JSON: {str(error)[:120]}") from error
    if not isinstance(header, dict):
        raise TensorsError("the header must be a JSON object")
    return header, view[8 + length :]


def _entry(name: str, entry: Any) -> tuple[np.dtype[Any], tuple[int, ...], int, int]:
    try:
        dtype = _TO_DTYPE[entry["dtype"]]
        shape, offsets = entry["shape"], entry["data_offsets"]
        begin, end = offsets
    except (KeyError, TypeError, ValueError) as error:
        raise TensorsError(f"the entry of tensor {name!r} is malformed") from error
    numbers = [begin, end, *shape] if isinstance(shape, list) and len(shape) <= 16 else [None]
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise TensorsError(f"the entry of tensor {name!r} is malformed: shape and offsets must be small whole numbers")
    return dtype, tuple(shape), begin, end


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result
