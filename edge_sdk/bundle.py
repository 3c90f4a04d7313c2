"""The bundle, format 1: one signed archive with everything that a device needs to serve and to train a model.

Rules of trust, in this order:

1. A bundle is a ZIP archive whose members are stored, not compressed, with flat names; `manifest.json` comes first.
   Sizes are checked against the limits below before a byte is read into memory.
2. The manifest's signature (`manifest.sig`, Ed25519 over `edgewise/bundle/1`, a zero byte and the manifest) is checked
   before the manifest is parsed, if the caller pins a release key.
3. The manifest names every other member with its size and SHA-256; no member is used before both agree, and there is no
   member that it does not name.
4. Only then are graphs looked at, by rules of their own (`edge_sdk.onnx_wire`): how large they may be, and that they
   read no file but the bundle's weights. What is left is handed to the runtime, from a folder of its own.

What this module does not do: it opens no network connection and runs no graph.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from edge_sdk.errors import BundleError, SignatureError
from edge_sdk.fields import TARGET, FieldSpec
from edge_sdk.keys import VerifyKey
from edge_sdk.onnx_wire import FILE_LIMIT, check_graph
from edge_sdk.tensors import HEADER_LIMIT, Array, Tensors, TensorSpec, digest, pack

log = logging.getLogger(__name__)

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
SIGNATURE: Final = "manifest.sig"
WEIGHTS: Final = "weights.safetensors"
GRAPH_SUFFIX: Final = ".onnx"  # the runtime takes others for formats of its own
SIGNED_PREFIX: Final = b"edgewise/bundle/1\0"
MANIFEST_LIMIT: Final = 4 << 20
GRAPH_LIMIT: Final = FILE_LIMIT  # I13 of the step-graph contract
ARCHIVE_LIMIT: Final = 4 << 30
FILES_LIMIT: Final = 4096
ACCUMULATING: Final = ("describe", "evaluate", "observe")
SCOPES: Final = ("lora", "head", "layer", "progressive", "full", *ACCUMULATING)
MERGES: Final = ("mean", "lora_a", "lora_b", "side_l", "side_q", "moments", "sum", "keep")
TENSOR_KINDS: Final = ("p", "n", "c", "a")

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class TensorEntry:
    """One row of the tensor table: a tensor that travels, and how it merges.

    `kind` is the class of its graph name: `p` trained, `n` running statistic, `c` constant of a round, `a` accumulator. `scale` (alpha/r),
    `rank`, `layer` and `layer_shape` (m, n) are those of a LoRA pair; this table is the only place of the scale.
    """

    name: str
    kind: str
    dtype: str
    shape: tuple[int, ...]
    merge: str
    layer: str | None = None
    scale: float | None = None
    rank: int | None = None
    layer_shape: tuple[int, int] | None = None
    initial: str | None = None

    @property
    def graph_name(self) -> str:
        """The name of the graph input that holds it."""
        return f"{self.kind}.{self.name}"

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape."""
        return TensorSpec(self.name, self.dtype, self.shape)


@dataclass(frozen=True)
class GraphVariant:
    """One graph of a list with equal signatures, drawn with probability proportional to `weight`."""

    file: str
    weight: float


@dataclass(frozen=True)
class Features:
    """What a frozen prefix hands to the step: whether a sample's may be kept, if not why, and bytes of one sample."""

    cacheable: bool = False
    reason: str = "no frozen prefix"
    nbytes: int = 0
    dtype: str = "float32"


@dataclass(frozen=True)
class HyperRange:
    """Default and limits of one hyper-parameter `h.<name>`; a task outside them is refused."""

    default: float
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Score:
    """How an `evaluate` program's sums become one number: `sum / count`, where `better` is "higher" or "lower"."""

    sum: str
    count: str
    better: str


@dataclass(frozen=True)
class HeldOut:
    """Which share of each recording never trains, and how many windows before it belong to neither side."""

    share: float = 0.0
    gap: int = 0


@dataclass(frozen=True)
class Program:
    """One program of the bundle; the contract of its graphs is `step-graphs.md`, section 2.

    `tensors` are what it trains or accumulates; `constants` come with the start of a task and stay as they are, such as
    the factor of a LoRA pair that rests in this round. `gradients` and `apply` are the step in two: batches of more than
    `batch_largest` samples go through them in parts.
    """

    id: str
    scope: str
    precision: str
    stage: int
    width: float
    rank: int
    factors: str
    tensors: tuple[str, ...]
    constants: tuple[str, ...]
    infer: str | None
    prefix: tuple[GraphVariant, ...]
    step: tuple[GraphVariant, ...]
    partial_batch: str
    batch_default: int
    batch_minimum: int
    hyper: Mapping[str, HyperRange]
    samples: str
    evaluate: str | None
    score: Score | None
    state_bytes: int
    cost: Mapping[str, Any] = field(default_factory=dict)
    proof: Mapping[str, Any] | None = None
    features: Features = Features()
    gradients: str | None = None
    apply: str | None = None
    batch_largest: int | None = None
    late: tuple[str, ...] = ()

    @property
    def accumulates(self) -> bool:
        """Whether the program only accumulates: no backward pass, no optimizer."""
        return self.scope in ACCUMULATING

    @property
    def reads(self) -> tuple[str, ...]:
        """Every tensor that it trains, accumulates or is given, by table name."""
        return (*self.tensors, *self.constants)

    @property
    def given(self) -> tuple[str, ...]:
        """All that comes with a start but is no input of a graph, too: constants that are handed over at opening."""
        return (*self.reads, *self.late)

    @property
    def graphs(self) -> tuple[str, ...]:
        """The files of all its graphs."""
        single = tuple(name for name in (self.infer, self.gradients, self.apply) if name)
        return single + tuple(variant.file for variant in self.prefix + self.step)


class Bundle:
    """An opened, verified bundle. Close it when its graphs are no longer needed.

    `signed` says that it carries a signature, not whose: only `open` with a release key tells that. `files` maps the
    name of every file but manifest and signature to its bytes.
    """

    def __init__(self, path: Path, directory: Path, manifest: bytes, *, signed: bool, temporary: bool) -> None:
        content = _parse(manifest, path)
        reader = _Reader(content, path)
        self.path = path
        self.directory = directory
        self.digest = digest(manifest)
        self.signed = signed
        self.files: Mapping[str, int] = {name: row["bytes"] for name, row in content["files"].items()}
        self.name = reader.text("name")
        self.base = reader.hex64("base")
        self.table_digest = reader.hex64("table")
        self.report: Mapping[str, Any] = content.get("report", {})
        self.held_out, self.fields = reader.held_out(), reader.fields()
        self.classes = reader.classes(self.fields)
        self.tensors: Mapping[str, TensorEntry] = reader.tensors()
        self.programs: Mapping[str, Program] = reader.programs(self.tensors)
        self._temporary = temporary

    @classmethod
    def open(cls, path: Path | str, *, release_key: VerifyKey | None = None, unpack_to: Path | None = None) -> Bundle:
        """Verify a bundle and unpack its files.

        `path` is the archive, or a folder that holds an unpacked one. The files go to `unpack_to/<digest>` and stay
        there, or to a temporary folder that `close` removes. With a release key the signature must be good. Raises
        `BundleError` naming file, finding and remedy; `SignatureError` where the signature is the finding.
        """
        path = Path(path)
        if path.is_dir():
            manifest = _read_file(path / MANIFEST, MANIFEST_LIMIT)
            signature = _optional(path / SIGNATURE)
            _check_signature(path, manifest, signature, release_key)
            _verify_folder(path, manifest, path)
            return cls._looked_into(path, path, manifest, signed=signature is not None, temporary=False)
        with _Archive(path) as archive:
            manifest = archive.read(MANIFEST, MANIFEST_LIMIT)
            signature = archive.read(SIGNATURE, 256) if SIGNATURE in archive.sizes else None
            _check_signature(path, manifest, signature, release_key)
            directory = _unpack(archive, manifest, signature, unpack_to)
        return cls._looked_into(path, directory, manifest, signed=signature is not None, temporary=unpack_to is None)

    @classmethod
    def _looked_into(cls, path: Path, directory: Path, manifest: bytes, *, signed: bool, temporary: bool) -> Bundle:
        """The bundle, once its manifest is read and its graphs keep the rules."""
        try:
            bundle = cls(path, directory, manifest, signed=signed, temporary=temporary)
            for name in bundle.files:
                if name.endswith(GRAPH_SUFFIX):
                    check_graph(directory / name, WEIGHTS)
        except BundleError:
            if temporary:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        return bundle

    def program(self, program_id: str) -> Program:
        """The program of that id. Raises `BundleError` listing the ids that exist."""
        try:
            return self.programs[program_id]
        except KeyError:
            raise BundleError(
                f"{self.path}: has no program {program_id!r}; it has {', '.join(sorted(self.programs))}"
            ) from None

    def predicting_with(self, tensors: Tensors) -> tuple[Program, ...]:
        """The programs that predict from exactly these tensors (table name, dtype, shape), in the manifest's order."""
        given = {name: (value.dtype.name, value.shape) for name, value in tensors.items()}
        return tuple(
            program
            for program in self.programs.values()
            if program.infer is not None
            and given == {entry.name: (entry.dtype, entry.shape) for entry in self.starting(program)}
        )

    def starting(self, program: Program) -> tuple[TensorEntry, ...]:
        """The tensors that `program` starts from: all that it is given but its accumulators."""
        return tuple(entry for name in program.given if (entry := self.tensors[name]).kind != "a")

    def start_limit(self, program: Program) -> int:
        """The most bytes that a file of its starting tensors can have."""
        return HEADER_LIMIT + 8 + sum(entry.spec.nbytes for entry in self.starting(program))

    def file(self, name: str) -> Path:
        """Where a verified file of the bundle lies."""
        return self.directory / name

    def initial(self, program: Program) -> dict[str, Array]:
        """The values that `program` starts from in a new job: all that it reads but accumulators, by table name."""
        from safetensors.numpy import load_file

        stored = load_file(self.file(WEIGHTS))
        values = {}
        for entry in self.starting(program):
            value = stored.get(entry.initial or "")
            if value is None or value.shape != entry.shape or value.dtype.name != entry.dtype:
                found = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise BundleError(
                    f"{self.path}: {WEIGHTS} should hold the initial value of {entry.name!r} as {entry.dtype} "
                    f"{list(entry.shape)} under {entry.initial!r}, found {found}: export the bundle again"
                )
            values[entry.name] = np.array(value)
        return values

    def start_blob(self, program: Program) -> bytes:
        """The initial values as the bytes that travel and whose digest a task names."""
        return pack(self.initial(program))

    def close(self) -> None:
        """Remove the unpacked files, if they were unpacked to a temporary folder. May be called twice."""
        if self._temporary:
            shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Archive:
    """The ZIP archive, with its directory checked before anything is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = path.stat().st_size
            if self._size > ARCHIVE_LIMIT:
                raise BundleError(f"{path}: has {self._size} bytes, at most {ARCHIVE_LIMIT} are allowed")
            self._zip = zipfile.ZipFile(path)
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror or error})") from error
        except (zipfile.BadZipFile, ValueError, NotImplementedError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{path}: not a whole bundle ({error}): it was cut short or is another kind of file; copy it again"
            ) from error
        self.sizes = self._checked_sizes()

    def _checked_sizes(self) -> dict[str, int]:
        infos = self._zip.infolist()
        if len(infos) > FILES_LIMIT:
            raise BundleError(f"{self.path}: holds {len(infos)} files, at most {FILES_LIMIT} are allowed")
        sizes: dict[str, int] = {}
        for info in infos:
            if not _NAME.fullmatch(info.filename) or info.filename in sizes:
                raise BundleError(f"{self.path}: holds a file named {info.filename[:80]!r}, which no bundle has")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise BundleError(f"{self.path}: {info.filename} is compressed; the files of a bundle are stored")
            if info.file_size > self._size:
                raise BundleError(f"{self.path}: {info.filename} claims {info.file_size} bytes, more than the archive")
            sizes[info.filename] = info.file_size
        if MANIFEST not in sizes:
            raise BundleError(f"{self.path}: has no {MANIFEST}: not an Edgewise bundle")
        return sizes

    def read(self, name: str, limit: int) -> bytes:
        size = self.sizes[name]
        if size > limit:
            raise BundleError(f"{self.path}: {name} has {size} bytes, at most {limit} are allowed")
        try:
            return self._zip.read(name)
        except (
            zipfile.BadZipFile,
            OSError,
            EOFError,
            ValueError,
            NotImplementedError,
            RuntimeError,
        ) as error:
            raise _damaged(self.path, name, str(error)) from error

    def copy(self, name: str, target: Path, size: int, expected: str) -> None:
        """Copy a member out, a piece at a time, and check its digest."""
        hasher = hashlib.sha256()
        left = size
        try:
            with self._zip.open(name) as source, target.open("wb") as sink:
                while piece := source.read(min(1 << 20, left + 1)):
                    left -= len(piece)
                    if left < 0:
                        break
                    hasher.update(piece)
                    sink.write(piece)
                sink.flush()
                os.fsync(sink.fileno())
        except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
            raise _damaged(self.path, name, str(error)) from error
        if left != 0 or hasher.hexdigest() != expected:
            raise _damaged(
                self.path,
                name,
                f"its SHA-256 should be {expected[:16]}..., found {hasher.hexdigest()[:16]}...",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()


class _Reader:
    """Reads the manifest's fields into dataclasses, naming the field that is wrong."""

    def __init__(self, content: Mapping[str, Any], path: Path) -> None:
        self._content = content
        self._path = path

    def text(self, key: str) -> str:
        return str(self._typed(self._content, key, str))

    def hex64(self, key: str) -> str:
        value = self.text(key)
        if not _HEX64.fullmatch(value):
            raise self._error(key, value, "64 hexadecimal digits")
        return value

    def classes(self, fields: tuple[FieldSpec, ...]) -> tuple[str, ...] | None:
        if self._content.get("classes") is None:
            return None
        names = tuple(str(label) for label in self._typed(self._content, "classes", list))
        for entry in fields:
            if entry.name == TARGET and entry.classes != len(names):
                raise self._error("classes", list(names), f"{entry.classes} names, as {TARGET} has classes")
        return names

    def held_out(self) -> HeldOut:
        content = self._content.get("held_out", {})
        share, gap = float(content.get("share", 0.0)), int(content.get("gap", 0))
        if not 0 <= share < 1 or gap < 0:
            raise self._error("held_out", content, "a share from 0 to below 1 and a gap of 0 or more")
        return HeldOut(share, gap)

    def fields(self) -> tuple[FieldSpec, ...]:
        rows = self._typed(self._content, "fields", list)
        return tuple(
            FieldSpec(
                self._typed(row, "name", str),
                self._typed(row, "dtype", str),
                self._shape(row),
                row.get("classes"),
            )
            for row in rows
        )

    def tensors(self) -> dict[str, TensorEntry]:
        table = {}
        for row in self._typed(self._content, "tensors", list):
            name = self._typed(row, "name", str)
            merge, kind = self._typed(row, "merge", str), self._typed(row, "kind", str)
            if merge not in MERGES or kind not in TENSOR_KINDS:
                raise self._error(
                    f"tensors.{name}", f"{merge}, {kind}", f"a merge of {MERGES} and a kind of {TENSOR_KINDS}"
                )
            layer_shape = row.get("layer_shape")
            table[name] = TensorEntry(
                name=name,
                kind=kind,
                dtype=self._typed(row, "dtype", str),
                shape=self._shape(row),
                merge=merge,
                layer=row.get("layer"),
                scale=row.get("scale"),
                rank=row.get("rank"),
                layer_shape=(layer_shape[0], layer_shape[1]) if layer_shape else None,
                initial=row.get("initial"),
            )
        return table

    def programs(self, table: Mapping[str, TensorEntry]) -> dict[str, Program]:
        programs = {}
        for row in self._typed(self._content, "programs", list):
            program = self._program(row)
            unknown = [name for name in program.given if name not in table]
            if unknown:
                raise self._error(f"programs.{program.id}.tensors", unknown[0], "a name of the tensor table")
            absent = [n for n in program.graphs if n not in self._content["files"] or not n.endswith(GRAPH_SUFFIX)]
            if absent:
                raise self._error(
                    f"programs.{program.id}", absent[0], f"a file of the bundle that ends in {GRAPH_SUFFIX}"
                )
            programs[program.id] = program
        for program in programs.values():
            if program.evaluate is not None and program.evaluate not in programs:
                raise self._error(f"programs.{program.id}.evaluate", program.evaluate, "the id of a program")
        return programs

    def _program(self, row: Mapping[str, Any]) -> Program:
        scope = self._typed(row, "scope", str)
        if scope not in SCOPES:
            raise self._error("programs.scope", scope, f"one of {', '.join(SCOPES)}")
        batch = self._typed(row, "batch", dict)
        score = row.get("score")
        return Program(
            id=self._typed(row, "id", str),
            scope=scope,
            precision=self._typed(row, "precision", str),
            stage=int(row.get("stage", 0)),
            width=float(row.get("width", 1.0)),
            rank=int(row.get("rank", 0)),
            factors=str(row.get("factors", "")),
            tensors=tuple(self._typed(row, "tensors", list)),
            constants=tuple(row.get("constants", ())),
            infer=row.get("infer"),
            prefix=self._variants(row.get("prefix", [])),
            step=self._variants(self._typed(row, "step", list)),
            partial_batch=str(row.get("partial_batch", "mask")),
            batch_default=self._typed(batch, "default", int),
            batch_minimum=self._typed(batch, "minimum", int),
            hyper={
                name: HyperRange(*(float(limits[key]) for key in ("default", "minimum", "maximum")))
                for name, limits in row.get("hyper", {}).items()
            },
            samples=str(row.get("samples", "train")),
            evaluate=row.get("evaluate"),
            score=Score(score["sum"], score["count"], score["better"]) if score else None,
            state_bytes=self._typed(row, "state_bytes", int),
            cost=row.get("cost", {}),
            proof=row.get("proof"),
            features=self._features(row),
            gradients=row.get("gradients"),
            apply=row.get("apply"),
            late=tuple(row.get("late", ())),
            batch_largest=self._typed(batch, "largest", int) if "largest" in batch else None,
        )

    def _features(self, row: Mapping[str, Any]) -> Features:
        content = row.get("features", {})
        if not row.get("prefix"):
            return Features(reason=str(content.get("reason", Features.reason)))
        return Features(
            cacheable=self._typed(content, "cacheable", bool),
            reason=str(content.get("reason", "")),
            nbytes=self._typed(content, "bytes", int),
            dtype=str(content.get("dtype", "float32")),
        )

    def _variants(self, rows: list[Mapping[str, Any]]) -> tuple[GraphVariant, ...]:
        return tuple(GraphVariant(self._typed(row, "file", str), float(row.get("weight", 1.0))) for row in rows)

    def _shape(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        shape = self._typed(row, "shape", list)
        if not all(type(size) is int and size >= 0 for size in shape):
            raise self._error(f"{row.get('name')}.shape", shape, "whole numbers")
        return tuple(shape)

    def _typed(self, content: Any, key: str, kind: type) -> Any:
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, kind):
            raise self._error(key, value, kind.__name__)
        return value

    def _error(self, key: str, found: object, expected: str) -> BundleError:
        return BundleError(
            f"{self._path}: {key} in {MANIFEST} is {str(found)[:80]!r}, expected {expected}: export the bundle again"
        )


def _parse(manifest: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(manifest)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: {MANIFEST} is not JSON: {str(error)[:120]}") from error
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise BundleError(f"{path}: {MANIFEST} names no format: not an Edgewise bundle")
    if content["format"] != FORMAT:
        raise BundleError(
            f"{path}: has bundle format {content['format']}, this Edgewise reads format {FORMAT}: "
            "upgrade edgewise on this machine, or export the bundle with the older version"
        )
    files = content.get("files")
    if not isinstance(files, dict):
        raise BundleError(f"{path}: {MANIFEST} lists no files")
    for name, row in files.items():
        if (
            not _NAME.fullmatch(name)
            or name in (MANIFEST, SIGNATURE)
            or not isinstance(row, dict)
            or type(row.get("bytes")) is not int
            or not _HEX64.fullmatch(str(row.get("sha256")))
        ):
            raise BundleError(f"{path}: {MANIFEST} describes the file {name[:80]!r} wrongly")
        if name.endswith(GRAPH_SUFFIX) and row["bytes"] > GRAPH_LIMIT:
            raise BundleError(f"{path}: {name} has {row['bytes']} bytes, a graph has at most {GRAPH_LIMIT}")
    return content


def _check_signature(path: Path, manifest: bytes, signature: bytes | None, key: VerifyKey | None) -> None:
    if key is None:
        log.info("%s: no release key is pinned here; only digests are checked", path)
        return
    if signature is None:
        raise SignatureError(
            f"{path}: is not signed, and only bundles signed by the pinned release key are opened here"
        )
    try:
        raw = base64.b64decode(signature, validate=True)
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != 64 or not key.verify(raw, SIGNED_PREFIX + manifest):
        raise SignatureError(f"{path}: the signature is not one of the pinned release key ({key.text[:12]}...)")


def _unpack(archive: _Archive, manifest: bytes, signature: bytes | None, unpack_to: Path | None) -> Path:
    files = _parse(manifest, archive.path)["files"]
    _check_members(archive.path, archive.sizes, files)
    if unpack_to is None:
        target = Path(tempfile.mkdtemp(prefix="edgewise-bundle-"))
    else:
        target = unpack_to / digest(manifest)
        if (target / MANIFEST).is_file():
            try:
                _verify_folder(target, manifest, archive.path)
            except BundleError:
                log.warning("%s: the unpacked copy is damaged and is made again", target)
            else:
                return target
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    try:
        for name, row in files.items():
            archive.copy(name, target / name, row["bytes"], row["sha256"])
        if signature is not None:
            (target / SIGNATURE).write_bytes(signature)
        (target / MANIFEST).write_bytes(manifest)  # last: a folder with a manifest is complete
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise BundleError(f"{archive.path}: cannot be unpacked to {target} ({error.strerror})") from error
    except BundleError:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return target


def _check_members(path: Path, sizes: Mapping[str, int], files: Mapping[str, Any]) -> None:
    present = set(sizes) - {MANIFEST, SIGNATURE}
    for name in sorted(present ^ set(files)):
        where = "is missing from the archive" if name in files else f"is not named by {MANIFEST}"
        raise BundleError(f"{path}: {name} {where}: copy or export the bundle again")
    for name, row in files.items():
        if sizes[name] != row["bytes"]:
            raise _damaged(path, name, f"it has {sizes[name]} bytes, expected {row['bytes']}")


def _verify_folder(folder: Path, manifest: bytes, path: Path) -> None:
    for name, row in _parse(manifest, path)["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != row["bytes"]:
            raise _damaged(path, name, "it is missing or has another size")
        with file.open("rb") as source:
            if hashlib.file_digest(source, "sha256").hexdigest() != row["sha256"]:
                raise _damaged(path, name, "its SHA-256 differs from the manifest's")


def _damaged(path: Path, name: str, finding: str) -> BundleError:
    return BundleError(f"{path}: {name} is damaged ({finding}): copy the bundle again")


def _read_file(path: Path, limit: int) -> bytes:
    try:
        if path.stat().st_size > limit:
            raise BundleError(f"{path}: has {path.stat().st_size} bytes, at most {limit} are allowed")
        return path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error


def _optional(path: Path) -> bytes | None:
    return _read_file(path, 256) if path.exists() else None


__all__ = [
    "Bundle",
    "Features",
    "FieldSpec",
    "GraphVariant",
    "HeldOut",
    "HyperRange",
    "Program",
    "Score",
    "TensorEntry",
]
