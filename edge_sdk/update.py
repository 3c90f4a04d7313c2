"""The body of an update: trained tensors as differences from the task's start, accumulators as they are.

A body is a safetensors file (`edge_sdk.tensors`), compressed where that makes it smaller. Its metadata names the program,
the digest of the start and the encoding. A trained tensor (`p`, `n`) travels as its difference from the start, in one of
the encodings of `edge_sdk.codecs`. What a lossy one took away is kept on the device and added to the next difference
(error feedback; Seide et al. 2014, 1-bit SGD), unless the merge rule changes the basis of the tensors every round, in which
case a residual of the old basis means nothing and the task says `feedback = clear` (methods/lora.md, section 8).

A compressed body begins with eight bytes that no safetensors header of ours can be: `EWZLIB1` or `EWZSTD1` and a zero, then
the size of the file, eight bytes little-endian. zstd is there with the extra `edgewise[zstd]` only; a device without it
takes zlib.

An accumulator (`a`) is always exact. Bodies come from outside: sizes are checked before anything is unpacked, everything
against the tensor table.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from edge_sdk.bundle import Program, TensorEntry
from edge_sdk.codecs import CODECS, DENSITY_LIMIT, check_part, rows_of
from edge_sdk.draws import Draws
from edge_sdk.errors import TaskError, TensorsError, UpdateError
from edge_sdk.tensors import HEADER_LIMIT, Array, Tensors, pack, unpack

VERSION: Final = "update/1"
KINDS: Final = tuple(CODECS)
FEEDBACKS: Final = ("keep", "clear")
COMPRESSIONS: Final = ("none", "zlib", "zstd")
_ZLIB, _ZSTD = b"EWZLIB1\0", b"EWZSTD1\0"
_KEYS: Final = ("kind", "feedback", "density", "compression", "allowed")


@dataclass(frozen=True)
class Encoding:
    """How trained tensors travel: one each of `KINDS`, `FEEDBACKS` and `COMPRESSIONS`.

    `density`: what `top_k` keeps, above 0 to 0.5. `allowed`: kinds that the device may take instead of `kind`.
    """

    kind: str = "float32"
    feedback: str = "keep"
    density: float = 0.1
    compression: str = "zlib"
    allowed: tuple[str, ...] = ()

    @classmethod
    def from_map(cls, values: Mapping[str, str]) -> Encoding:
        """Read a task's `encoding`. Raises `TaskError` for names that this version does not know."""
        unknown = set(values) - set(_KEYS)
        if unknown:
            raise TaskError(
                f"the task's encoding has the unknown key {min(unknown)!r}: upgrade edgewise on this device"
            )
        parsed: dict[str, Any] = dict(values)
        if "allowed" in parsed:  # a kind of a later version is no choice for this device, and no error
            parsed["allowed"] = tuple(kind for kind in parsed["allowed"].split() if kind in KINDS)
        try:
            parsed["density"] = float(parsed.get("density", cls.density))
        except ValueError:
            raise TaskError(f"the task's encoding has density {parsed['density']!r}, expected a number") from None
        encoding = cls(**parsed)
        for name, value, known in (
            ("kind", encoding.kind, KINDS),
            ("feedback", encoding.feedback, FEEDBACKS),
            ("compression", encoding.compression, COMPRESSIONS),
        ):
            if value not in known:
                raise TaskError(f"the task's encoding has {name} {value!r}; this version knows {', '.join(known)}")
        if not 0 < encoding.density <= DENSITY_LIMIT:
            raise TaskError(
                f"the task's encoding has density {encoding.density:g}, expected above 0 to {DENSITY_LIMIT:g}"
            )
        return encoding

    def to_map(self) -> dict[str, str]:
        """The inverse of `from_map`; what is as by default is left out, so that older devices understand it."""
        changed = {
            "density": "" if self.density == Encoding.density else repr(self.density),
            "compression": "" if self.compression == Encoding.compression else self.compression,
            "allowed": " ".join(self.allowed),
        }
        return {"kind": self.kind, "feedback": self.feedback, **{k: v for k, v in changed.items() if v}}

    def preferring(self, wanted: str | None) -> Encoding:
        """This encoding in the kind that a device wants, where the task allows it."""
        return replace(self, kind=wanted) if wanted is not None and wanted in self.allowed else self


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
    codec = CODECS[encoding.kind]
    tensors: dict[str, Array] = {}
    residuals: dict[str, Array] = {}
    for name in _travelling(program, table):
        if table[name].kind == "a":
            tensors[name] = trained[name]
            continue
        delta = trained[name] - start[name]
        if encoding.feedback == "keep" and name in feedback:
            delta = delta + feedback[name]
        parts = codec.encode(delta, encoding.density, draws)
        tensors.update({name + suffix: part for suffix, part in parts.items()})
        if encoding.feedback == "keep" and codec.lossy:
            residuals[name] = delta - codec.decode(name, parts, delta.shape)
    metadata = {"edgewise": VERSION, "program": program.id, "start": start_digest, "encoding": encoding.kind}
    return _compressed(pack(tensors, metadata), encoding.compression), residuals


def decode_update(
    body: bytes,
    program: Program,
    table: Mapping[str, TensorEntry],
    start: Tensors,
    start_digest: str | None = None,
    *,
    allowed: Sequence[str] = KINDS,
) -> dict[str, Array]:
    """Read a body into absolute tensors by table name: `start` plus the difference, and accumulators as they are.

    `allowed`: the kinds of encoding that the task let the device choose from. Raises `UpdateError` with a reason for
    anything that is not exactly what the program and the table say, numbers that are not finite included.
    """
    try:
        tensors, metadata = unpack(_decompressed(body, max_update_bytes(program, table)))
    except TensorsError as error:
        raise UpdateError("malformed", str(error)) from error
    _expect("malformed", "format", metadata.get("edgewise"), VERSION)
    _expect("wrong_tensors", "program", metadata.get("program"), program.id)
    if start_digest is not None:
        _expect("wrong_start", "start", metadata.get("start"), start_digest)
    kind = metadata.get("encoding", "")
    if kind not in allowed or kind not in CODECS:
        raise UpdateError("wrong_encoding", f"the encoding is {kind[:32]!r}, expected one of {', '.join(allowed)}")
    codec = CODECS[kind]
    names = _travelling(program, table)
    expected = {name + suffix for name in names for suffix in (("",) if table[name].kind == "a" else codec.suffixes)}
    if set(tensors) != expected:
        odd = min(set(tensors) ^ expected)
        raise UpdateError("wrong_tensors", f"tensor {odd[:80]!r} is {'missing' if odd in expected else 'not expected'}")
    values = {}
    for name in names:
        entry = table[name]
        if entry.kind == "a":
            check_part(name, tensors[name], entry.dtype, entry.shape)
            value = tensors[name]
        else:
            change = codec.decode(name, {suffix: tensors[name + suffix] for suffix in codec.suffixes}, entry.shape)
            with np.errstate(over="ignore", invalid="ignore"):
                value = start[name] + change
        if not np.isfinite(value).all():
            raise UpdateError("not_finite", f"tensor {name!r} holds NaN or infinity")
        values[name] = value
    return values


def compresses_with_zstd() -> bool:
    """Whether the extra `edgewise[zstd]` is installed."""
    try:
        import zstandard  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def max_update_bytes(program: Program, table: Mapping[str, TensorEntry]) -> int:
    """An upper bound of the body's size, whatever the encoding: float32, or codes and a scale a row."""
    specs = [table[name].spec for name in _travelling(program, table)]
    return HEADER_LIMIT + 8 + sum(spec.nbytes + 4 * rows_of(spec.shape) for spec in specs)


def _travelling(program: Program, table: Mapping[str, TensorEntry]) -> list[str]:
    """The tensors that an update of this program holds."""
    kinds = ("a",) if program.accumulates else ("p", "n", "a")
    return [name for name in program.tensors if table[name].kind in kinds]


def _compressed(data: bytes, how: str) -> bytes:
    if how == "none":
        return data
    size = len(data).to_bytes(8, "little")
    if how == "zstd" and compresses_with_zstd():
        import zstandard

        smaller = _ZSTD + size + zstandard.ZstdCompressor(level=9).compress(data)
    else:
        smaller = _ZLIB + size + zlib.compress(data, 6)
    return smaller if len(smaller) < len(data) else data


def _decompressed(body: bytes, most: int) -> bytes:
    """The safetensors file of a body. Raises `UpdateError` before it holds more than `most` bytes of it."""
    if body[:8] not in (_ZLIB, _ZSTD):
        return body
    size = int.from_bytes(body[8:16], "little")
    if size > most:
        raise UpdateError("malformed", f"the body unpacks to {size} bytes, at most {most} are allowed")
    try:
        if body[:8] == _ZLIB:
            data = zlib.decompressobj().decompress(body[16:], size + 1)
        elif compresses_with_zstd():
            import zstandard

            with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body[16:]) as reader:
                data = reader.read(size + 1)
        else:
            raise UpdateError("wrong_encoding", "the body is compressed with zstd: pip install 'edgewise[zstd]' here")
    except (zlib.error, ValueError, EOFError) as error:
        raise UpdateError("malformed", f"the body cannot be unpacked: {error}") from error
    except Exception as error:  # what zstandard raises is known only where it is installed
        if type(error).__module__.startswith("zstandard"):
            raise UpdateError("malformed", f"the body cannot be unpacked: {error}") from error
        raise
    if len(data) != size:
        raise UpdateError("malformed", f"the body unpacks to another size than the {size} bytes that it claims")
    return data


def _expect(reason: str, what: str, found: str | None, expected: str) -> None:
    if found != expected:
        raise UpdateError(reason, f"its {what} is {str(found)[:80]!r}, expected {expected[:80]!r}")
