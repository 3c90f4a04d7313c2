"""The body of an update: trained tensors as differences from the task's start, accumulators as they are.

A body is a safetensors file (`edge_sdk.tensors`). Its metadata names the program, the digest of the start and the
encoding. A trained tensor (`p`, `n`) travels as its difference from the start,

* `float32`: as it is, or
* `int8_row`: int8 with one float32 scale per row (first axis; tensors of fewer than two axes are one row), symmetric,
  rounded stochastically, so that the expectation is exact. What rounding took away is kept on the device and added to
  the next difference (error feedback; Seide et al. 2014, 1-bit SGD), unless the merge rule changes the basis of the
  tensors every round, in which case a residual of the old basis means nothing and the task says `feedback = clear`
  (methods/lora.md, section 8).

An accumulator (`a`) is always exact. Bodies come from outside: everything is checked against the tensor table, sizes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.draws import Draws
from edge_sdk.errors import TaskError, TensorsError, UpdateError
from edge_sdk.tensors import HEADER_LIMIT, Array, Tensors, pack, unpack

VERSION: Final = "update/1"
KINDS: Final = ("float32", "int8_row")
FEEDBACKS: Final = ("keep", "clear")
_SCALE: Final = "/scale"  # no name of the tensor table holds a slash
_LEVELS: Final = 127


@dataclass(frozen=True)
class Encoding:
    """How trained tensors travel: `kind` is one of `KINDS`, `feedback` one of `FEEDBACKS`."""

    kind: str = "float32"
    feedback: str = "keep"

    @classmethod
    def from_map(cls, values: Mapping[str, str]) -> Encoding:
        """Read a task's `encoding`. Raises `TaskError` for names that this version does not know."""
        unknown = set(values) - {"kind", "feedback"}
        if unknown:
            raise TaskError(
                f"the task's encoding has the unknown key {min(unknown)!r}: upgrade edgewise on this device"
            )
        encoding = cls(**values)
        for name, value, known in (
            ("kind", encoding.kind, KINDS),
            ("feedback", encoding.feedback, FEEDBACKS),
        ):
            if value not in known:
                raise TaskError(f"the task's encoding has {name} {value!r}; this version knows {', '.join(known)}")
        return encoding

    def to_map(self) -> dict[str, str]:
        """The inverse of `from_map`."""
        return {"kind": self.kind, "feedback": self.feedback}


def encode_update(
    program: Program,
    table: Mapping[str, TensorEntry],
    start: Tensors,
    start_digest: str,
    trained: Tensors,
    encoding: Encoding,
    feedback: Tensors,
    seed: int,
) -> tuple[bytes, dict[str, Array]]:
    """Write the body; return it with the residuals to keep for the next update of this program.

    `start` and `trained` hold float32 tensors by table name, `feedback` the residuals of the last update (may be empty).
    The rounding is drawn from `seed`, so a repeated task gives the same bytes.
    """
    draws = Draws(seed, "rounding")
    tensors: dict[str, Array] = {}
    residuals: dict[str, Array] = {}
    for name in _travelling(program, table):
        if table[name].kind == "a":
            tensors[name] = trained[name]
            continue
        delta = trained[name] - start[name]
        if encoding.kind == "float32":
            tensors[name] = delta
            continue
        if encoding.feedback == "keep" and name in feedback:
            delta = delta + feedback[name]
        codes, scales = _quantize(delta, draws)
        tensors[name], tensors[name + _SCALE] = codes, scales
        if encoding.feedback == "keep":
            residuals[name] = delta - _dequantize(codes, scales)
    metadata = {"edgewise": VERSION, "program": program.id, "start": start_digest, "encoding": encoding.kind}
    return pack(tensors, metadata), residuals


def decode_update(
    body: bytes,
    program: Program,
    table: Mapping[str, TensorEntry],
    start: Tensors,
    start_digest: str | None = None,
) -> dict[str, Array]:
    """Read a body into absolute tensors by table name: `start` plus the difference, and accumulators as they are.

    Raises `UpdateError` with a reason for anything that is not exactly what the program and the table say, numbers that
    are not finite included.
    """
    try:
        tensors, metadata = unpack(body)
    except TensorsError as error:
        raise UpdateError("malformed", str(error)) from error
    _expect("malformed", "format", metadata.get("edgewise"), VERSION)
    _expect("wrong_tensors", "program", metadata.get("program"), program.id)
    if start_digest is not None:
        _expect("wrong_start", "start", metadata.get("start"), start_digest)
    kind = metadata.get("encoding", "")
    if kind not in KINDS:
        raise UpdateError("wrong_encoding", f"the encoding is {kind[:32]!r}, expected one of {', '.join(KINDS)}")
    names = _travelling(program, table)
    coded = {name for name in names if table[name].kind != "a"} if kind == "int8_row" else set()
    expected = set(names) | {name + _SCALE for name in coded}
    if set(tensors) != expected:
        odd = min(set(tensors) ^ expected)
        raise UpdateError("wrong_tensors", f"tensor {odd[:80]!r} is {'missing' if odd in expected else 'not expected'}")
    values = {}
    for name in names:
        entry = table[name]
        _check(name, tensors[name], "int8" if name in coded else entry.dtype, entry.shape)
        if name in coded:
            scales = tensors[name + _SCALE]
            _check(name + _SCALE, scales, "float32", (_rows(entry.shape),))
            value = start[name] + _dequantize(tensors[name], scales)
        elif entry.kind == "a":
            value = tensors[name]
        else:
            with np.errstate(over="ignore"):
                value = start[name] + tensors[name]
        if not np.isfinite(value).all():
            raise UpdateError("not_finite", f"tensor {name!r} holds NaN or infinity")
        values[name] = value
    return values


def max_update_bytes(program: Program, table: Mapping[str, TensorEntry]) -> int:
    """An upper bound of the body's size, whatever the encoding."""
    return HEADER_LIMIT + 8 + sum(table[name].spec.nbytes for name in _travelling(program, table))


def _travelling(program: Program, table: Mapping[str, TensorEntry]) -> list[str]:
    """The tensors that an update of this program holds."""
    kinds = ("a",) if program.accumulates else ("p", "n", "a")
    return [name for name in program.tensors if table[name].kind in kinds]


def _quantize(delta: Array, draws: Draws) -> tuple[Array, Array]:
    """int8 codes in the shape of `delta` and float32 scales `[rows]`."""
    flat = delta.reshape(_rows(delta.shape), -1).astype(np.float32)
    scales = (np.abs(flat).max(axis=1) / _LEVELS).astype(np.float32)
    steps = np.divide(flat, scales[:, None], out=np.zeros_like(flat), where=scales[:, None] > 0)
    codes = np.floor(steps + draws.uniform(flat.shape)).clip(-_LEVELS, _LEVELS).astype(np.int8)
    return codes.reshape(delta.shape), scales


def _dequantize(codes: Array, scales: Array) -> Array:
    flat = codes.reshape(len(scales), -1).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((flat * scales[:, None]).reshape(codes.shape))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _expect(reason: str, what: str, found: str | None, expected: str) -> None:
    if found != expected:
        raise UpdateError(reason, f"its {what} is {str(found)[:80]!r}, expected {expected[:80]!r}")


def _check(name: str, value: Array, dtype: str, shape: tuple[int, ...]) -> None:
    if value.dtype.name != dtype or value.shape != shape:
        raise UpdateError(
            "wrong_shape",
            f"tensor {name!r} is {value.dtype} {list(value.shape)}, expected {dtype} {list(shape)}",
        )
