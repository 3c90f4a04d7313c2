"""Topics and messages: typed, versioned, size-limited (transport.md, sections 3 and 4).

Rules:

1. The broker is a post office, not a safe: nothing here treats a PUBACK as delivery.
2. The sender is the topic segment `dev/{id}`; no field of a body names it.
3. A message is parsed in this order, and each step may refuse it with `WireError`: length, signature (where the kind
   demands one), UTF-8, JSON (no duplicate names, no NaN, at most 8 deep, at most 4,096 values), version, fields.
   Unknown fields are ignored, unknown enum values and missing fields are errors.
4. What was signed is what is on the wire: the JSON text, a newline, the base64 signature. The signed text binds the
   logical address, so an offer of one device does not verify as another's.

What this module does not do: it opens no connection and keeps no state.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import StrEnum
from typing import Any, ClassVar, Final, TypeVar

from edge_sdk.errors import EdgewiseError
from edge_sdk.keys import SigningKey, VerifyKey

VERSION: Final = 1
CHUNK: Final = 65_536  # bytes
WINDOW: Final = 8  # chunks in flight
ROOT: Final = "edgewise/v1"
AGGREGATOR, ENROLLER = "aggregator", "enroller"
RESERVED: Final = (AGGREGATOR, ENROLLER, "sparkplug", "bridge")
_DEPTH, _NODES = 8, 4096
_SIGNATURE_TEXT = 88  # base64 of 64 bytes

SEGMENT: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_UPLOAD = re.compile(r"[0-9a-f]{8}-[0-9]{8,16}-[0-9a-f]{12}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
_HEX64 = re.compile(r"[0-9a-f]{64}")


class WireError(EdgewiseError):
    """A message that is not what its kind must be: a short `reason`, the field, what was found, what was expected."""

    def __init__(self, reason: str, name: str, found: object, expected: str) -> None:
        super().__init__(f"message refused ({reason}): {name} is {str(found)[:80]!r}, expected {expected}")
        self.reason, self.field, self.found, self.expected = reason, name, str(found)[:80], expected


class State(StrEnum):
    """Whether a device is there."""

    ONLINE = "online"
    OFFLINE = "offline"
    STOPPING = "stopping"


class Paused(StrEnum):
    """Why a device does not train."""

    NONE = "none"
    USER = "user"
    BUSY = "busy"
    HEAT = "heat"
    DISK = "disk"


class Clock(StrEnum):
    """What a device knows of the time."""

    UNSET = "unset"
    FLOOR = "floor"
    SYNCED = "synced"


class Verdict(StrEnum):
    """What an ack says."""

    NEED = "need"
    WAIT = "wait"
    ACCEPTED = "accepted"
    REJECTED = "rejected"


class Reason(StrEnum):
    """Why an upload was rejected; what the device then does stands in transport.md, section 4.2."""

    ROUND_CLOSED = "round_closed"
    ALREADY_ANSWERED = "already_answered"
    TOO_LARGE = "too_large"
    BAD_GEOMETRY = "bad_geometry"
    WRONG_BASE = "wrong_base"
    BAD_CONTENT = "bad_content"
    SEQ_CONFLICT = "seq_conflict"
    BAD_SIGNATURE = "bad_signature"
    UNSUPPORTED_VERSION = "unsupported_version"
    FOREIGN_TASK = "foreign_task"
    UNKNOWN_JOB = "unknown_job"


class Order(StrEnum):
    """What a command asks for."""

    PAUSE = "pause"
    RESUME = "resume"
    FLUSH = "flush"
    REBIRTH = "rebirth"
    SYNC = "sync"
    RENEW = "renew"
    DROP_TASK = "drop_task"
    INSTALL = "install"
    ROLLBACK = "rollback"


# Checks of values, attached to fields as metadata.

Check = Callable[[Any, str], None]


def _refuse(name: str, found: object, expected: str) -> typing.NoReturn:
    raise WireError("bad_field", name, found, expected)


def _whole(most: int) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not int or not 0 <= value <= most:
            _refuse(name, value, f"a whole number from 0 to {most}")

    return check


def _matches(pattern: re.Pattern[str], expected: str) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not str or not pattern.fullmatch(value):
            _refuse(name, value, expected)

    return check


def _text(most: int) -> Check:
    def check(value: Any, name: str) -> None:
        if type(value) is not str or len(value) > most:
            _refuse(name, value, f"text of at most {most} characters")

    return check


def _number(value: Any, name: str) -> None:
    if type(value) not in (int, float) or not math.isfinite(value):
        _refuse(name, value, "a finite number")


def _flag(value: Any, name: str) -> None:
    if type(value) is not bool:
        _refuse(name, value, "true or false")


def _hex(digits: int) -> Check:
    return _matches(re.compile(f"[0-9a-f]{{{digits}}}"), f"{digits} hexadecimal digits")


_u32, _u53 = _whole((1 << 32) - 1), _whole((1 << 53) - 1)
_id = _matches(SEGMENT, "1 to 32 lower-case letters, digits and hyphens")


def _value(check: Check, **more: Any) -> Any:
    return field(metadata={"check": check}, **more)


def _each(check: Check, most: int, **more: Any) -> Any:
    return field(metadata={"each": check, "most": most}, **more)


def _map(check: Check, most: int, key: int = 32) -> Any:
    return field(default_factory=dict, metadata={"map": check, "most": most, "key": key})


@dataclass(frozen=True, kw_only=True)
class Message:
    """What every message has: a random id for logs, the sender's boot id, the sender's clock (informative only)."""

    KIND: ClassVar[str] = ""
    LIMIT: ClassVar[int] = 8192  # bytes of JSON
    SIGNED: ClassVar[bool] = False

    id: str = _value(_hex(16))
    boot: str = _value(_hex(16))
    at: int = _value(_u53)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Sizes that a job sets for every upload; `norm` 0 is off."""

    update_bytes: int = _value(_u53, default=64 << 20)
    chunk: int = _value(_u32, default=CHUNK)
    window: int = _value(_u32, default=WINDOW)
    offers_per_minute: int = _value(_u32, default=12)
    norm: float = _value(_number, default=0.0)


@dataclass(frozen=True, kw_only=True)
class JobManifest(Message):
    """What a job is: bundle, base, tensor table, programs, limits, the control key in use."""

    KIND = "job"
    LIMIT = 61_440
    SIGNED = True
    job: str = _value(_id)
    bundle: str = _value(_hex(64))
    base: str = _value(_hex(64))
    table: str = _value(_hex(64))
    programs: tuple[str, ...] = _each(_text(64), 256)
    limits: Limits
    key: str = _value(_hex(64))
    blob_port: int = _value(_whole(65_535), default=0)  # of the broker's host, for big blobs over HTTPS; 0: none


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Tensors that every device of a round, or one device, may fetch by digest."""

    name: str = _value(_text(64))
    digest: str = _value(_hex(64))
    bytes: int = _value(_u53)


@dataclass(frozen=True, kw_only=True)
class RoundManifest(Message):
    """The open round; times are gateway milliseconds."""

    KIND = "round"
    LIMIT = 16_384
    SIGNED = True
    round: int = _value(_u53)
    base: str = _value(_hex(64))
    model: str | None = _value(_hex(64))
    model_bytes: int = _value(_u53)
    opened: int = _value(_u53)
    deadline: int = _value(_u53)
    now: int = _value(_u53)
    quorum: int = _value(_u32)
    staleness: int = _value(_u32)
    constants: tuple[Constant, ...] = _each(_text(0), 64, default=())


@dataclass(frozen=True, kw_only=True)
class Task(Message):
    """What one device is to do in a round; exactly one of `steps` and `epochs` is not 0."""

    KIND = "task"
    LIMIT = 16_384
    SIGNED = True
    task: str = _value(_hex(16))
    round: int = _value(_u53)
    program: str = _value(_text(64))
    start: str = _value(_hex(64))
    start_bytes: int = _value(_u53)
    base: str = _value(_hex(64))
    deadline: int = _value(_u53)
    now: int = _value(_u53)
    steps: int = _value(_u32)
    epochs: int = _value(_u32)
    batch_size: int = _value(_u32)
    learning_rate: float = _value(_number)
    hyper: Mapping[str, float] = _map(_number, 16)
    seed: int = _value(_u53)
    encoding: Mapping[str, str] = _map(_text(64), 16)
    constants: tuple[Constant, ...] = _each(_text(0), 64, default=())

    def __post_init__(self) -> None:
        if (self.steps == 0) == (self.epochs == 0):
            _refuse("steps, epochs", f"{self.steps}, {self.epochs}", "exactly one of them above 0")
        if self.batch_size < 1:
            _refuse("batch_size", self.batch_size, "at least 1")


@dataclass(frozen=True, kw_only=True)
class OutboxSummary:
    """What waits on a device."""

    entries: int = _value(_u32, default=0)
    bytes: int = _value(_u53, default=0)
    dropped: int = _value(_u53, default=0)
    oldest_round: int = _value(_u53, default=0)


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a device is: profile name, bytes of RAM and flash, cores, widths and precisions it can run."""

    profile: str = _value(_text(32), default="")
    ram: int = _value(_u53, default=0)
    flash: int = _value(_u53, default=0)
    cores: int = _value(_u32, default=0)
    widths: tuple[float, ...] = _each(_number, 8, default=())
    precisions: tuple[str, ...] = _each(_text(16), 8, default=())


@dataclass(frozen=True, kw_only=True)
class DeclinedTask:
    """A task that the device cannot do, and why."""

    task: str = _value(_hex(16))
    reason: str = _value(_text(64))


@dataclass(frozen=True, kw_only=True)
class Status(Message):
    """Birth, state and will of a device; `connection` counts up within a boot."""

    KIND = "status"
    LIMIT = 8192
    state: State
    connection: int = _value(_u32)
    outbox_id: str = _value(_hex(16))
    sdk: str = _value(_text(32), default="")
    bundle: str = _value(_hex(64))
    slot: str = _value(_matches(re.compile("[ab]"), "a or b"), default="a")
    caps: Caps = Caps()
    outbox: OutboxSummary = OutboxSummary()
    paused: Paused = Paused.NONE
    task: str | None = _value(_hex(16), default=None)
    declined: DeclinedTask | None = None
    clock: Clock = Clock.UNSET


@dataclass(frozen=True, kw_only=True)
class Offer(Message):
    """An update that waits on the device: identity, geometry, digest. Signed with the device's key."""

    KIND = "offer"
    LIMIT = 4096
    SIGNED = True
    upload: str = _value(_matches(_UPLOAD, "8 hex - 8 digits - 12 hex"))
    outbox_id: str = _value(_hex(16))
    task: str = _value(_hex(16))
    seq: int = _value(_u53)
    round: int = _value(_u53)
    size: int = _value(_u53)
    num_examples: int = _value(_u53)
    base: str = _value(_hex(64))
    digest: str = _value(_hex(64))
    chunk: int = _value(_u32)
    chunks: int = _value(_u32)
    metrics: Mapping[str, float] = _map(_number, 32)


def _range(value: Any, name: str) -> None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        _refuse(name, value, "a pair of chunk indexes")
    for index in value:
        _u32(index, name)
    if value[0] > value[1]:
        _refuse(name, value, "first <= last")


@dataclass(frozen=True, kw_only=True)
class Fetch(Message):
    """A device asks for chunks of a blob: inclusive index ranges, at most `WINDOW` chunks in all."""

    KIND = "fetch"
    LIMIT = 2048
    digest: str = _value(_hex(64))
    ranges: tuple[tuple[int, int], ...] = _each(_range, 8)

    def __post_init__(self) -> None:
        count = sum(last - first + 1 for first, last in self.ranges)
        if not 1 <= count <= WINDOW:
            _refuse("ranges", count, f"1 to {WINDOW} chunks")


@dataclass(frozen=True, kw_only=True)
class Ack(Message):
    """The gateway's answer to an offer; signed when it ends the upload."""

    KIND = "ack"
    LIMIT = 4096
    upload: str = _value(_matches(_UPLOAD, "8 hex - 8 digits - 12 hex"))
    status: Verdict
    digest: str | None = _value(_hex(64), default=None)
    need: tuple[int, ...] = _each(_u32, 32, default=())
    to: str = _value(_id, default="aggregator")
    retry_after_ms: int = _value(_u32, default=0)
    reason: Reason | None = None
    detail: str = _value(_text(64), default="")
    now: int = _value(_u53)

    def __post_init__(self) -> None:
        if any(later <= earlier for earlier, later in zip(self.need, self.need[1:], strict=False)):
            _refuse("need", self.need, "strictly rising indexes")
        if self.status is Verdict.REJECTED and self.reason is None:
            _refuse("reason", None, "a reason of the rejection")

    @property
    def final(self) -> bool:
        """Whether it ends the upload, and is therefore signed."""
        return self.status in (Verdict.ACCEPTED, Verdict.REJECTED)


@dataclass(frozen=True, kw_only=True)
class Command(Message):
    """An order to one device; `counter` rises for ever."""

    KIND = "command"
    LIMIT = 4096
    SIGNED = True
    command: Order
    args: Mapping[str, str | int] = field(default_factory=dict, metadata={"map": None, "most": 8, "key": 32})
    counter: int = _value(_u53)
    now: int = _value(_u53)


@dataclass(frozen=True, kw_only=True)
class Reply(Message):
    """The answer to a command."""

    KIND = "reply"
    to: str = _value(_hex(16))
    ok: bool = _value(_flag)
    detail: str = _value(_text(256), default="")


@dataclass(frozen=True, kw_only=True)
class Metrics(Message):
    """Numbers for a dashboard; may be lost."""

    KIND = "metrics"
    values: Mapping[str, float] = _map(_number, 64)


KINDS: Final[Mapping[str, type[Message]]] = {
    kind.KIND: kind for kind in (JobManifest, RoundManifest, Task, Status, Offer, Fetch, Ack, Command, Reply, Metrics)
}


@dataclass(frozen=True)
class Parsed:
    """A topic, taken apart; what it does not hold is None."""

    kind: str
    device: str | None = None
    upload: str | None = None
    digest: str | None = None
    index: int | None = None
    ingest: str | None = None


@dataclass(frozen=True)
class Address:
    """The topics of one job: `[{prefix}/]edgewise/v1/{site}/{job}/...`. Raises `WireError` for names that are no segments."""

    prefix: str
    site: str
    job: str

    def __post_init__(self) -> None:
        for name, value in (("site", self.site), ("job", self.job)):
            _id(value, name)
        levels = self.prefix.split("/") if self.prefix else []
        if len(levels) > 6 or any(not SEGMENT.fullmatch(level) for level in levels):
            _refuse("prefix", self.prefix, "at most 6 segments of lower-case letters, digits and hyphens")

    @property
    def root(self) -> str:
        """What every topic of the job begins with."""
        return "/".join(part for part in (self.prefix, ROOT, self.site, self.job) if part)

    @property
    def job_topic(self) -> str:
        """The retained job manifest."""
        return f"{self.root}/cfg/job"

    @property
    def round_topic(self) -> str:
        """The retained round manifest."""
        return f"{self.root}/cfg/round"

    def _up(self, device: str, rest: str) -> str:
        _id(device, "device")
        return f"{self.root}/dev/{device}/up/{rest}"

    def _down(self, device: str, rest: str) -> str:
        _id(device, "device")
        return f"{self.root}/dev/{device}/down/{rest}"

    def status(self, device: str) -> str:
        """A device's retained status, also its will."""
        return self._up(device, "status")

    def offer(self, device: str) -> str:
        """Where a device offers updates."""
        return self._up(device, "offer")

    def chunk(self, device: str, ingest: str, upload: str, index: int) -> str:
        """One chunk of an update, to the worker that asked for it."""
        return self._up(device, f"chunk/{ingest}/{upload}/{index}")

    def fetch(self, device: str) -> str:
        """Where a device asks for chunks of a blob."""
        return self._up(device, "fetch")

    def metrics(self, device: str) -> str:
        """A device's metrics."""
        return self._up(device, "metrics")

    def reply(self, device: str) -> str:
        """A device's answers to commands."""
        return self._up(device, "reply")

    def ack(self, device: str) -> str:
        """The gateway's answers to offers."""
        return self._down(device, "ack")

    def assign(self, device: str) -> str:
        """A device's retained task."""
        return self._down(device, "assign")

    def blob(self, device: str, digest: str, index: int) -> str:
        """One chunk of a blob."""
        return self._down(device, f"blob/{digest}/{index}")

    def command(self, device: str) -> str:
        """Commands to a device."""
        return self._down(device, "cmd")

    def device_subscriptions(self, device: str) -> tuple[str, ...]:
        """What a device listens to."""
        return (f"{self.root}/cfg/#", self._down(device, "#"))

    def aggregator_subscriptions(self) -> tuple[str, ...]:
        """What the gateway listens to."""
        return (f"{self.root}/dev/+/up/#",)

    def parse(self, topic: str) -> Parsed | None:
        """Take a topic of this job apart; None for anything else."""
        if len(topic) > 512 or not topic.startswith(self.root + "/"):
            return None
        match topic[len(self.root) + 1 :].split("/"):
            case ["cfg", "job" | "round" as kind]:
                return Parsed(kind)
            case ["dev", device, "up", "status" | "offer" | "fetch" | "metrics" | "reply" as kind]:
                parsed = Parsed(kind, device)
            case ["dev", device, "up", "chunk", ingest, upload, index] if (
                SEGMENT.fullmatch(ingest) and _UPLOAD.fullmatch(upload) and _INDEX.fullmatch(index)
            ):
                parsed = Parsed("chunk", device, upload=upload, index=int(index), ingest=ingest)
            case ["dev", device, "down", "ack" as kind]:
                parsed = Parsed(kind, device)
            case ["dev", device, "down", "assign"]:
                parsed = Parsed("task", device)
            case ["dev", device, "down", "cmd"]:
                parsed = Parsed("command", device)
            case ["dev", device, "down", "blob", digest, index] if _HEX64.fullmatch(digest) and _INDEX.fullmatch(index):
                parsed = Parsed("blob", device, digest=digest, index=int(index))
            case _:
                return None
        return parsed if SEGMENT.fullmatch(parsed.device or "") else None


def upload_name(outbox_id: str, seq: int, digest: str) -> str:
    """The name of an upload in topics: outbox, number, digest, each cut to what tells uploads apart."""
    return f"{outbox_id[:8]}-{seq:08d}-{digest[:12]}"


def chunk_count(size: int, chunk: int = CHUNK) -> int:
    """How many chunks of `chunk` bytes hold `size` bytes."""
    return -(-size // chunk)


def encode(message: Message, key: SigningKey | None, address: Address, device: str = "*") -> bytes:
    """A message as bytes, signed where its kind demands it.

    `device` is the id that the topic names, `*` for what goes to all. Raises `WireError` for a message that `decode`
    would refuse.
    """
    body = {"v": VERSION, "kind": message.KIND, **_plain(message)}
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    if len(text) > message.LIMIT:
        raise WireError("too_long", message.KIND, len(text), f"at most {message.LIMIT} bytes")
    if not _is_signed(message):
        return text
    if key is None:
        raise WireError("bad_signature", message.KIND, "no key", "a key to sign with")
    return text + b"\n" + base64.b64encode(key.sign(_signed_text(address, device, message.KIND, text)))


M = TypeVar("M", bound=Message)


def decode(kind: type[M], data: bytes, *, address: Address, device: str = "*", key: VerifyKey | None = None) -> M:
    """Read a message of this kind, trusting nothing. Raises `WireError` and no other error.

    Without a key the signature of a kind that demands one is not checked: only for a reader who needs none.
    """
    if len(data) > kind.LIMIT + 1 + _SIGNATURE_TEXT:
        raise WireError("too_long", kind.KIND, len(data), f"at most {kind.LIMIT} bytes")
    text, _, signature = data.partition(b"\n")
    good = key is not None and _verify(key, signature, _signed_text(address, device, kind.KIND, text))
    if kind.SIGNED and key is not None and not good:
        raise WireError("bad_signature", kind.KIND, f"{len(signature)} bytes", "a signature of the key that is pinned")
    if len(text) > kind.LIMIT:
        raise WireError("too_long", kind.KIND, len(text), f"at most {kind.LIMIT} bytes")
    content = _parse_json(text)
    if content.get("v") != VERSION or type(content["v"]) is not int:
        raise WireError("unsupported_version", "v", content.get("v"), str(VERSION))
    if content.get("kind") != kind.KIND:
        _refuse("kind", content.get("kind"), kind.KIND)
    message: M = _build(kind, content, "")
    if isinstance(message, Ack) and message.final and key is not None and not good:
        raise WireError("bad_signature", kind.KIND, f"{len(signature)} bytes", "a signature of the key that is pinned")
    return message


def upload_of(data: bytes) -> str | None:
    """Which upload an offer names that is of another major version and cannot be read; None if it names none."""
    if len(data) > Offer.LIMIT + 1 + _SIGNATURE_TEXT:
        return None
    try:
        name = _parse_json(data.partition(b"\n")[0]).get("upload")
    except WireError:
        return None
    return name if isinstance(name, str) and _UPLOAD.fullmatch(name) else None


def _is_signed(message: Message) -> bool:
    return message.final if isinstance(message, Ack) else message.SIGNED


def _signed_text(address: Address, device: str, kind: str, text: bytes) -> bytes:
    return b"edgewise/v1\0" + f"{address.site}\0{address.job}\0{device}\0{kind}\0".encode() + text


def _verify(key: VerifyKey, signature: bytes, text: bytes) -> bool:
    try:
        raw = base64.b64decode(signature, validate=True)
    except (ValueError, binascii.Error):
        return False
    return len(raw) == 64 and key.verify(raw, text)


def _plain(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        return {part.name: _plain(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in sorted(value.items())}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _parse_json(text: bytes) -> dict[str, Any]:
    def no_constant(name: str) -> typing.NoReturn:
        raise WireError("bad_json", "JSON", name, "finite numbers")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) != len(items):
            raise WireError("bad_json", "JSON", "a name that occurs twice", "each name once")
        return content

    def whole(digits: str) -> int:
        if len(digits) > 20:
            raise WireError("bad_json", "JSON", f"a number of {len(digits)} digits", "at most 20 digits")
        return int(digits)

    _check_depth(text)
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=pairs, parse_constant=no_constant, parse_int=whole)
    except (ValueError, RecursionError) as error:
        raise WireError("bad_json", "JSON", str(error), "one JSON object in UTF-8") from error
    if not isinstance(content, dict):
        raise WireError("bad_json", "JSON", type(content).__name__, "one object")
    return content


def _check_depth(text: bytes) -> None:
    """Count nesting and values before the parser builds anything."""
    depth = deepest = 0
    inside = escaped = False
    for byte in text:
        if inside:
            if escaped:
                escaped = False
            elif byte == 0x5C:
                escaped = True
            elif byte == 0x22:
                inside = False
        elif byte == 0x22:
            inside = True
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
    if deepest > _DEPTH:
        raise WireError("bad_json", "JSON", f"{deepest} levels", f"at most {_DEPTH} levels")
    if text.count(b",") + text.count(b":") > _NODES:
        raise WireError("bad_json", "JSON", "too many values", f"at most {_NODES} values")


def _build(kind: type[Any], content: Any, where: str) -> Any:
    if not isinstance(content, dict):
        _refuse(where or "message", content, "an object")
    values: dict[str, Any] = {}
    hints = _hints(kind)
    for part in fields(kind):
        name = f"{where}{part.name}"
        if part.name not in content:
            if part.default is MISSING and part.default_factory is MISSING:
                raise WireError("missing_field", name, "nothing", "a value")
            continue
        values[part.name] = _field(part.metadata, hints[part.name], content[part.name], name)
    return kind(**values)


def _field(rules: Mapping[str, Any], hint: Any, value: Any, name: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    inner = next(option for option in options if option is not type(None))
    if "check" in rules:
        rules["check"](value, name)
        return float(value) if inner is float else value
    if "map" in rules:
        return _read_map(rules, value, name)
    if "each" in rules:
        if not isinstance(value, list) or len(value) > rules["most"]:
            _refuse(name, value, f"a list of at most {rules['most']} values")
        item = typing.get_args(inner)[0]
        if hasattr(item, "__dataclass_fields__"):
            return tuple(_build(item, entry, f"{name}.") for entry in value)
        for entry in value:
            rules["each"](entry, name)
        return tuple(tuple(entry) if isinstance(entry, list) else entry for entry in value)
    if isinstance(inner, type) and issubclass(inner, StrEnum):
        if value not in [member.value for member in inner]:
            _refuse(name, value, "one of " + ", ".join(inner))
        return inner(value)
    return _build(inner, value, f"{name}.")


def _read_map(rules: Mapping[str, Any], value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict) or len(value) > rules["most"]:
        _refuse(name, value, f"an object of at most {rules['most']} values")
    for key, item in value.items():
        _text(rules["key"])(key, name)
        if rules["map"] is not None:
            rules["map"](item, f"{name}.{key}")
        elif type(item) is int:
            _u53(item, f"{name}.{key}")
        else:
            _text(256)(item, f"{name}.{key}")
    return types.MappingProxyType(dict(value))


_HINTS: dict[type[Any], dict[str, Any]] = {}


def _hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = typing.get_type_hints(kind)
    return _HINTS[kind]
