"""The gateway's side of an upload, as a pure state machine: `step(state, event) -> (state, effects)`.

Rules (transport.md, sections 1, 5, 8.2, 10)
--------------------------------------------
1. The receiver drives: bytes come only because they were asked for by index, and nothing stored is asked for
   again.
2. The sender is the topic segment `dev/{id}`; no field of a body names it. Everything here is keyed by that
   id.
3. Size and geometry are checked before anything is written, the signature before everything else; what has none that
   can be read touches no upload that is open.
4. Effects are of two kinds. `Durable` ones are written by the shell in one transaction per batch; the others
   (acks, chunks, verification) follow the commit, so a verdict never precedes what it promises. If the
   transaction fails the shell keeps the old state, which is why the state is immutable.
5. Nothing an upload or a device does can make memory or disk grow without a limit: open uploads, bytes of
   parts, offers per minute and wrong chunks per minute are counted. The first offer for an open task is
   free: we issued it.
6. An event that means nothing is counted in `ignored`, never raised: the network is not a caller.

Transitions of one upload (in this order; the first row that fits)
------------------------------------------------------------------
| state           | event                                      | effects                                         | next            |
|-----------------|--------------------------------------------|-------------------------------------------------|-----------------|
| UNKNOWN         | OfferedUnreadably                          | Refuse, Ack rejected unsupported_version, Alarm | same            |
| any             | Offered, signature wrong                   | Refuse, Ack rejected bad_signature, Alarm       | same            |
| any             | Offered, in the ledger with this digest    | Ack accepted                                    | same            |
| any             | Offered, in the ledger with another digest | Refuse, Ack rejected seq_conflict, Alarm        | same            |
| any             | Offered, seq at or below the replay floor  | Refuse, Ack rejected round_closed               | same            |
| any             | Offered, no task of ours for this device   | Refuse, Ack rejected foreign_task               | same            |
| any             | Offered, task answered                     | Refuse, Ack rejected already_answered           | same            |
| any             | Offered, phase closed                      | Refuse, Ack rejected round_closed               | same            |
| any             | Offered, other base                        | Refuse, Ack rejected wrong_base                 | same            |
| any             | Offered, larger than its program may send  | Refuse, Ack rejected too_large                  | same            |
| any             | Offered, chunks do not fit the size        | Refuse, Ack rejected bad_geometry               | same            |
| any             | Offered, disk or budget full, or too often | Ack wait                                        | same            |
| UNKNOWN         | Restarted, with its offer in the journal   | Verify if it is complete                        | OPEN, VERIFYING |
| UNKNOWN         | Offered                                    | StoreOffer, Ack need(first 32)                  | OPEN            |
| OPEN            | Offered                                    | Ack need(missing)                               | same            |
| OPEN            | ChunkArrived, as asked                     | StoreChunk; half in: need; all in: Verify       | OPEN, VERIFYING |
| OPEN            | ChunkArrived, wrong index or length        | counted; the 16th: DropOffer, Refuse, Alarm*    | OPEN, REJECTED  |
| OPEN            | Ticked: silence                            | Ack need(missing), three times                  | same            |
| OPEN            | Ticked: no chunk for T_reap; PhaseClosed   | DropOffer                                       | UNKNOWN         |
| VERIFYING       | Verified                                   | Accept, Tell UpdateAccepted, Ack accepted       | ACCEPTED        |
| VERIFYING       | VerifyFailed, again, for the first time    | DropParts, Ack need(all)                        | OPEN            |
| VERIFYING       | VerifyFailed                               | DropOffer, Refuse*, Ack rejected bad_content    | REJECTED        |
| VERIFYING       | PhaseClosed                                | none: it is finished, and counted by `rounds`   | same            |
| OPEN, VERIFYING | Revoked                                    | DropOffer of each, ClearRetained                | UNKNOWN         |

(*) and Tell Declined: a device forgets what was rejected, so nobody needs to wait for its answer any longer. The same holds
for every signed offer that is refused while its task is open, unless another upload for the task is under way.

Presence: the pair (boot, connection) of the last birth counts. A new pair gets a `sync` command, and gets it
again when the gateway's own connection was lost, for the command may have been lost with it; an `offline` of another pair is answered with `rebirth`, because the retained copy is now wrong. Two devices
with one id show as a second outbox while the first boot is online, or as a boot that comes back after
another has replaced it: an alarm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from aggregator import rounds

if TYPE_CHECKING:
    from edge_sdk import wire

MINUTE = 60_000  # ms
BAD_CHUNKS = 16  # a minute
REPEATS = 3  # of `need` after a silence
FORMER_BOOTS = 4  # remembered per device
FETCH_BURST = 256  # chunks a device may fetch at once ...
FETCH_RATE = 128  # ... and per second after that


class Stage(StrEnum):
    """Where an upload stands; UNKNOWN, ACCEPTED and REJECTED ones are not in memory."""

    OPEN = "open"
    VERIFYING = "verifying"


@dataclass(frozen=True)
class Limits:
    """What the job allows. Sizes are bytes, times milliseconds."""

    update_bytes: int = 64 << 20
    chunk: int = 65_536
    window: int = 8
    need: int = 32
    open_uploads: int = 32
    part_bytes: int = 512 << 20
    offers_per_minute: int = 12
    silence_ms: int = 4_000  # 2 x the device's shortest verdict timer


@dataclass(frozen=True)
class OpenUpload:
    """An upload whose offer is stored: geometry, and what it answers."""

    device: str
    upload: str
    outbox_id: str
    seq: int
    task: str
    round: int
    phase: str
    start: str  # digest of the tensors the task started from
    digest: str
    size: int  # bytes
    chunk: int  # bytes
    chunks: int
    num_examples: int
    metrics: Mapping[str, float]
    failures: int = 0


@dataclass(frozen=True)
class Presence:
    """What a device last said about itself. `former`: boots it replaced, with their last connection
    number."""

    device: str
    outbox_id: str
    boot: str
    connection: int
    online: bool
    seen: int  # gateway ms
    paused: str = "none"
    entries: int = 0  # waiting in its outbox
    former: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class IssuedTask:
    """A task of the open phase. `update_bytes` is the largest body its program can yield."""

    task: str
    round: int
    phase: str
    start: str
    base: str
    update_bytes: int
    deadline: int  # gateway ms


@dataclass(frozen=True)
class Progress:
    """An upload in memory: which chunks are missing, which were asked for last."""

    info: OpenUpload
    stage: Stage
    missing: frozenset[int]
    asked: frozenset[int] = frozenset()
    asked_count: int = 0
    heard: int = 0  # gateway ms of the last chunk or offer
    repeats: int = 0
    bad: tuple[int, ...] = ()
    reap_ms: int = MINUTE


K = TypeVar("K")
V = TypeVar("V")


def _empty() -> Mapping[Any, Any]:
    return MappingProxyType({})


def _with(mapping: Mapping[K, V], key: K, value: V) -> Mapping[K, V]:
    return MappingProxyType({**mapping, key: value})


def _without(mapping: Mapping[K, V], *keys: K) -> Mapping[K, V]:
    return MappingProxyType({k: v for k, v in mapping.items() if k not in keys})


@dataclass(frozen=True)
class Intake:
    """The whole state. Only `uploads` and `presence` are durable; the rest is learned again."""

    limits: Limits
    nonce: str  # of the journal: makes our task ids recognisable
    uploads: Mapping[tuple[str, str], Progress] = field(default_factory=_empty)  # (device, upload)
    presence: Mapping[str, Presence] = field(default_factory=_empty)
    tasks: Mapping[str, IssuedTask] = field(default_factory=_empty)  # device -> task of the open phase
    public: frozenset[str] = frozenset()  # digests every device may fetch
    synced: frozenset[str] = frozenset()  # devices whose present birth was answered by this process
    offers: Mapping[str, tuple[int, ...]] = field(default_factory=_empty)  # device -> times in the last minute
    fetches: Mapping[str, tuple[float, int]] = field(default_factory=_empty)  # device -> (tokens, at)
    waiting: frozenset[str] = frozenset()  # devices told to wait
    storage_full: bool = False
    ignored: Mapping[str, int] = field(default_factory=_empty)


@dataclass(frozen=True)
class Event:
    """Something that happened, at gateway time `now` (milliseconds)."""

    now: int


@dataclass(frozen=True)
class Restarted(Event):
    """The journal was read: uploads with the chunk indexes that are stored, and what devices last said."""

    uploads: tuple[tuple[OpenUpload, frozenset[int]], ...]
    presence: tuple[Presence, ...]


@dataclass(frozen=True)
class Offered(Event):
    """An offer. `recorded`, `floor` and `answered` are what the journal knows about its seq and task."""

    device: str
    offer: wire.Offer
    signature_ok: bool
    recorded: str | None = None  # digest accepted under this seq
    floor: int = 0
    answered: bool = False


@dataclass(frozen=True)
class OfferedUnreadably(Event):
    """An offer of another major version: neither it nor its signature can be read, only which upload it offers."""

    device: str
    upload: str
    detail: str


@dataclass(frozen=True)
class ChunkArrived(Event):
    """A chunk; `size` is its length in bytes."""

    device: str
    upload: str
    index: int
    size: int


@dataclass(frozen=True)
class FetchAsked(Event):
    """A device asks for chunks of a blob; `size` is the blob's length in bytes, None if it is not here."""

    device: str
    digest: str
    ranges: tuple[tuple[int, int], ...]
    size: int | None


@dataclass(frozen=True)
class StatusSeen(Event):
    """A device's status, or its will."""

    device: str
    status: wire.Status


@dataclass(frozen=True)
class Verified(Event):
    """The body is what its offer says and what its program may send. `evidence` is (sum, count) of an
    evaluation."""

    device: str
    upload: str
    norm: float | None = None
    evidence: tuple[float, float] | None = None


@dataclass(frozen=True)
class VerifyFailed(Event):
    """The body was refused; `again` when another transfer may help (its digest was wrong)."""

    device: str
    upload: str
    detail: str
    again: bool


@dataclass(frozen=True)
class Ticked(Event):
    """A second or so has passed."""


@dataclass(frozen=True)
class PhaseOpened(Event):
    """Devices may fetch these models."""

    public: frozenset[str]


@dataclass(frozen=True)
class TasksIssued(Event):
    """Tasks that may be answered from now on."""

    tasks: Mapping[str, IssuedTask]


@dataclass(frozen=True)
class PhaseClosed(Event):
    """Uploads for the open tasks are no longer welcome, but for those of the devices `keep`."""

    keep: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Revoked(Event):
    """A device belongs no longer; what it had accepted stays."""

    device: str


@dataclass(frozen=True)
class LinkRestored(Event):
    """The gateway is connected again; what it sent last may have been lost."""


@dataclass(frozen=True)
class StorageChanged(Event):
    """The disk is full, or has room again."""

    full: bool


@dataclass(frozen=True)
class Effect:
    """Something the shell must do, in order."""


@dataclass(frozen=True)
class Durable(Effect):
    """Written in the transaction of the batch."""


@dataclass(frozen=True)
class StoreOffer(Durable):
    """Remember this upload."""

    upload: OpenUpload


@dataclass(frozen=True)
class StoreChunk(Durable):
    """Store the chunk that just came."""

    device: str
    upload: str
    index: int


@dataclass(frozen=True)
class DropParts(Durable):
    """Forget the bytes; the upload starts again."""

    upload: OpenUpload


@dataclass(frozen=True)
class DropOffer(Durable):
    """Forget the upload and its bytes."""

    device: str
    upload: str


@dataclass(frozen=True)
class Accept(Durable):
    """The ledger row, and the end of the offer."""

    upload: OpenUpload
    norm: float | None
    evidence: tuple[float, float] | None


@dataclass(frozen=True)
class Refuse(Durable):
    """Record why an upload was refused."""

    device: str
    upload: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Alarm(Durable):
    """Tell an operator."""

    kind: str
    device: str
    detail: str


@dataclass(frozen=True)
class SavePresence(Durable):
    """Store what a device said about itself."""

    presence: Presence


@dataclass(frozen=True)
class ClearRetained(Durable):
    """Clear the device's status and task at the broker."""

    device: str


@dataclass(frozen=True)
class Tell(Durable):
    """An event for `aggregator.rounds`, handled in the same transaction."""

    event: rounds.Event


@dataclass(frozen=True)
class SendAck(Effect):
    """Answer an offer; accepted and rejected are signed by the shell."""

    device: str
    upload: str
    status: str
    need: tuple[int, ...] = ()
    reason: str | None = None
    detail: str = ""
    retry_after_ms: int = 0


@dataclass(frozen=True)
class SendBlobChunk(Effect):
    """Publish one chunk of a blob to a device."""

    device: str
    digest: str
    index: int


@dataclass(frozen=True)
class SendCommand(Effect):
    """`sync` (echoing boot and connection) or `rebirth`."""

    device: str
    command: str
    boot: str
    connection: int


@dataclass(frozen=True)
class Verify(Effect):
    """All parts are here: check the body; comes back as `Verified` or `VerifyFailed`."""

    upload: OpenUpload


Effects = tuple[Effect, ...]
Result = tuple[Intake, Effects]


def initial(limits: Limits, nonce: str) -> Intake:
    """The state before `Restarted`."""
    return Intake(limits=limits, nonce=nonce)


def step(state: Intake, event: Event) -> Result:
    """Advance by one event."""
    return HANDLERS[type(event)](state, event)


def _ignore(state: Intake, what: str) -> Result:
    return replace(state, ignored=_with(state.ignored, what, state.ignored.get(what, 0) + 1)), ()


def _restarted(state: Intake, event: Restarted) -> Result:
    uploads: dict[tuple[str, str], Progress] = {}
    effects: list[Effect] = []
    for info, stored in event.uploads:
        missing = frozenset(range(info.chunks)) - stored
        progress = Progress(info, Stage.OPEN, missing, heard=event.now)
        if not missing:
            progress = replace(progress, stage=Stage.VERIFYING)
            effects.append(Verify(info))
        uploads[info.device, info.upload] = progress
    presence = {presence.device: presence for presence in event.presence}
    return (
        replace(state, uploads=MappingProxyType(uploads), presence=MappingProxyType(presence)),
        tuple(effects),
    )


def _offered(state: Intake, event: Offered) -> Result:
    offer, device, limits = event.offer, event.device, state.limits
    task = state.tasks.get(device)
    is_open = task is not None and task.task == offer.task
    if not (event.signature_ok and is_open and not event.answered and (device, offer.upload) not in state.uploads):
        # Anything but the first offer for an open task is rationed.
        state, told_to_wait = _ration(state, device, offer.upload, event.now)
        if told_to_wait:
            return state, told_to_wait
    if not event.signature_ok:
        detail = "the offer is not signed by this device's key"
        return _reject(state, event, "bad_signature", detail, alarm=True)
    if event.recorded == offer.digest:
        return state, (SendAck(device, offer.upload, "accepted"),)
    if event.recorded is not None:
        detail = f"number {offer.seq} of outbox {offer.outbox_id} was accepted with another digest"
        return _reject(state, event, "seq_conflict", detail, alarm=True)
    if offer.seq <= event.floor:
        return _reject(state, event, "round_closed", f"number {offer.seq} is closed since long")
    settings = rounds.Settings(rounds=0, nonce=state.nonce)
    if not is_open and not rounds.is_task_of(settings, offer.round, device, offer.task):
        return _reject(state, event, "foreign_task", f"task {offer.task} was not issued here to this device")
    if event.answered:
        return _reject(state, event, "already_answered", f"task {offer.task} has been answered")
    if task is None or not is_open:
        return _reject(state, event, "round_closed", f"round {offer.round} takes no more updates for this task")
    if offer.base != task.base:
        return _reject(state, event, "wrong_base", f"base {offer.base[:12]}, expected {task.base[:12]}")
    most = min(task.update_bytes, limits.update_bytes)
    if offer.size > most:
        return _reject(state, event, "too_large", f"{offer.size} bytes, at most {most} for this task's program")
    if offer.chunk != limits.chunk or offer.chunks != -(-offer.size // offer.chunk) or offer.size < 1:
        detail = f"{offer.size} bytes in {offer.chunks} chunks of {offer.chunk}, expected chunks of {limits.chunk}"
        return _reject(state, event, "bad_geometry", detail)
    if offer.num_examples < 1:
        return _reject(state, event, "bad_content", "num_examples is 0, at least 1 was expected")
    state, effects = _check_outbox(state, device, offer.outbox_id)
    state, more = _admit(state, event, task)
    return state, (*effects, *more)


def _ration(state: Intake, device: str, upload: str, now: int) -> Result:
    """Count an offer; what it is answered with if there were too many of this device within a minute."""
    most = state.limits.offers_per_minute
    recent = (*(at for at in state.offers.get(device, ()) if at > now - MINUTE), now)
    state = replace(state, offers=_with(state.offers, device, recent[-most - 1 :]))
    return state, () if len(recent) <= most else (_wait(upload, device, recent[-most] + MINUTE - now),)


def _offered_unreadably(state: Intake, event: OfferedUnreadably) -> Result:
    key = (event.device, event.upload)
    if key in state.uploads:
        return state, ()  # it was offered under a signature; this one nobody can check
    state, told_to_wait = _ration(state, *key, event.now)
    if told_to_wait:
        return state, told_to_wait
    reason = "unsupported_version"
    ack = SendAck(*key, "rejected", reason=reason, detail=event.detail[:64])
    return state, (Refuse(*key, reason, event.detail), Alarm(reason, event.device, event.detail), ack)


def _reject(state: Intake, event: Offered, reason: str, detail: str, *, alarm: bool = False) -> Result:
    device, upload = event.device, event.offer.upload
    effects: Effects = (Refuse(device, upload, reason, detail),)
    task = state.tasks.get(device)
    was_its_answer = event.signature_ok and not event.answered and task is not None and task.task == event.offer.task
    if was_its_answer and not any(p.info.task == event.offer.task for p in state.uploads.values()):
        effects += (_unanswered(event, event.offer.task, reason),)
    if reason == "foreign_task":
        ack = SendAck(device, upload, "rejected", reason=reason, detail=detail[:64], retry_after_ms=10 * MINUTE)
    else:
        ack = SendAck(device, upload, "rejected", reason=reason, detail=detail[:64])
    if alarm:
        effects += (Alarm(reason, device, detail),)
    return state, (*effects, ack)


def _unanswered(event: Offered | ChunkArrived | VerifyFailed, task: str, reason: str) -> Tell:
    return Tell(rounds.Declined(event.now, event.device, task, f"update refused: {reason}"))


def _wait(upload: str, device: str, retry_after_ms: int) -> SendAck:
    return SendAck(device, upload, "wait", retry_after_ms=max(500, min(retry_after_ms, 10 * MINUTE)))


def _admit(state: Intake, event: Offered, task: IssuedTask) -> Result:
    offer, device, limits = event.offer, event.device, state.limits
    held = state.uploads.get((device, offer.upload))
    if held is not None:
        if held.info.digest != offer.digest or held.info.size != offer.size:
            return _reject(state, event, "bad_geometry", "another body was offered under this name")
        if held.stage is Stage.VERIFYING:
            return state, ()  # the verdict is on its way
        return _ask(state, replace(held, heard=event.now, repeats=0))
    if state.storage_full:
        return state, (_wait(offer.upload, device, 10_000),)
    others = [progress for progress in state.uploads.values() if progress.info.device == device]
    if any(progress.info.task == offer.task for progress in others):
        return state, (_wait(offer.upload, device, 5_000),)  # another outbox of this id answers already
    parts = sum(progress.info.size for progress in state.uploads.values())
    if len(state.uploads) >= limits.open_uploads or parts + offer.size > limits.part_bytes:
        state = replace(state, waiting=state.waiting | {device})
        return state, (_wait(offer.upload, device, 1_000 + 250 * len(state.waiting)),)
    info = OpenUpload(
        device=device,
        upload=offer.upload,
        outbox_id=offer.outbox_id,
        seq=offer.seq,
        task=offer.task,
        round=task.round,
        phase=task.phase,
        start=task.start,
        digest=offer.digest,
        size=offer.size,
        chunk=offer.chunk,
        chunks=offer.chunks,
        num_examples=offer.num_examples,
        metrics=MappingProxyType(dict(offer.metrics)),
    )
    reap = min(max((task.deadline - event.now) // 4, MINUTE), 15 * MINUTE)
    missing = frozenset(range(offer.chunks))
    state = replace(state, waiting=state.waiting - {device})
    state, effects = _ask(state, Progress(info, Stage.OPEN, missing, heard=event.now, reap_ms=reap))
    return state, (StoreOffer(info), *effects)


def _ask(state: Intake, progress: Progress) -> Result:
    need = tuple(sorted(progress.missing)[: state.limits.need])
    progress = replace(progress, asked=frozenset(need), asked_count=len(need))
    key = (progress.info.device, progress.info.upload)
    state = replace(state, uploads=_with(state.uploads, key, progress))
    return state, (SendAck(*key, "need", need=need),)


def _chunk(state: Intake, event: ChunkArrived) -> Result:
    key = (event.device, event.upload)
    progress = state.uploads.get(key)
    if progress is None:
        return _ignore(state, "orphan_chunk")
    if progress.stage is not Stage.OPEN:
        return _ignore(state, "duplicate_chunk")
    info = progress.info
    last = info.chunks - 1
    expected = info.size - last * info.chunk if event.index == last else info.chunk
    if not 0 <= event.index <= last or event.size != expected:
        return _bad_chunk(state, event, progress)
    if event.index not in progress.missing:
        return _ignore(state, "duplicate_chunk")
    if state.storage_full:
        return _ignore(state, "chunk_without_space")
    progress = replace(
        progress,
        missing=progress.missing - {event.index},
        asked=progress.asked - {event.index},
        heard=event.now,
        repeats=0,
    )
    store = StoreChunk(event.device, event.upload, event.index)
    if not progress.missing:
        progress = replace(progress, stage=Stage.VERIFYING)
        return replace(state, uploads=_with(state.uploads, key, progress)), (store, Verify(info))
    if 2 * len(progress.asked) <= progress.asked_count and progress.missing != progress.asked:
        state, effects = _ask(state, progress)
        return state, (store, *effects)
    return replace(state, uploads=_with(state.uploads, key, progress)), (store,)


def _bad_chunk(state: Intake, event: ChunkArrived, progress: Progress) -> Result:
    key = (event.device, event.upload)
    bad = (*(at for at in progress.bad if at > event.now - MINUTE), event.now)
    state, _ = _ignore(state, "bad_chunk")
    if len(bad) < BAD_CHUNKS:
        return replace(state, uploads=_with(state.uploads, key, replace(progress, bad=bad))), ()
    detail = f"{len(bad)} chunks of a wrong index or length within a minute"
    return replace(state, uploads=_without(state.uploads, key)), (
        DropOffer(*key),
        Refuse(*key, "bad_geometry", detail),
        Alarm("bad_chunks", event.device, detail),
        _unanswered(event, progress.info.task, "bad_geometry"),
        SendAck(*key, "rejected", reason="bad_geometry", detail=detail[:64]),
    )


def _verified(state: Intake, event: Verified) -> Result:
    key = (event.device, event.upload)
    progress = state.uploads.get(key)
    if progress is None or progress.stage is not Stage.VERIFYING:
        return _ignore(state, "stray_verdict")
    return replace(state, uploads=_without(state.uploads, key)), (
        Accept(progress.info, event.norm, event.evidence),
        Tell(rounds.UpdateAccepted(event.now, event.device, progress.info.task)),
        SendAck(*key, "accepted"),
    )


def _verify_failed(state: Intake, event: VerifyFailed) -> Result:
    key = (event.device, event.upload)
    progress = state.uploads.get(key)
    if progress is None or progress.stage is not Stage.VERIFYING:
        return _ignore(state, "stray_verdict")
    if event.again and progress.info.failures == 0:
        info = replace(progress.info, failures=1)
        fresh = Progress(info, Stage.OPEN, frozenset(range(info.chunks)), heard=event.now, reap_ms=progress.reap_ms)
        state, effects = _ask(state, fresh)
        return state, (DropParts(info), *effects)
    return replace(state, uploads=_without(state.uploads, key)), (
        DropOffer(*key),
        Refuse(*key, "bad_content", event.detail),
        _unanswered(event, progress.info.task, "bad_content"),
        SendAck(*key, "rejected", reason="bad_content", detail=event.detail[:64]),
    )


def _ticked(state: Intake, event: Ticked) -> Result:
    effects: Effects = ()
    for key, progress in state.uploads.items():
        if progress.stage is not Stage.OPEN:
            continue
        silent = event.now - progress.heard
        if silent >= progress.reap_ms:
            state = replace(state, uploads=_without(state.uploads, key))
            effects += (DropOffer(*key),)
        elif (
            silent >= state.limits.silence_ms * (progress.repeats + 1)
            and progress.repeats < REPEATS
            and not state.storage_full
        ):
            state, more = _ask(state, replace(progress, repeats=progress.repeats + 1))
            effects += more
    return state, effects


def _phase_opened(state: Intake, event: PhaseOpened) -> Result:
    return replace(state, public=event.public), ()


def _tasks_issued(state: Intake, event: TasksIssued) -> Result:
    return replace(state, tasks=MappingProxyType({**state.tasks, **event.tasks})), ()


def _phase_closed(state: Intake, event: PhaseClosed) -> Result:
    closed = [
        key for key, progress in state.uploads.items() if progress.stage is Stage.OPEN and key[0] not in event.keep
    ]
    kept = MappingProxyType({device: task for device, task in state.tasks.items() if device in event.keep})
    effects = tuple(DropOffer(*key) for key in closed)
    return replace(state, uploads=_without(state.uploads, *closed), tasks=kept), effects


def _revoked(state: Intake, event: Revoked) -> Result:
    """Its uploads end, its task counts as declined, and it is not there."""
    device = event.device
    open_uploads = [key for key in state.uploads if key[0] == device]
    effects: Effects = (*(DropOffer(*key) for key in open_uploads), ClearRetained(device))
    known = state.presence.get(device)
    if known is not None:
        gone = replace(known, online=False, seen=event.now)
        state = replace(state, presence=_with(state.presence, device, gone), synced=state.synced - {device})
        effects += (SavePresence(gone),)
    effects += (Tell(rounds.DeviceLost(event.now, device)),)
    task = state.tasks.get(device)
    if task is not None:
        effects += (Tell(rounds.Declined(event.now, device, task.task, "revoked")),)
    return replace(state, uploads=_without(state.uploads, *open_uploads)), effects


def _link_restored(state: Intake, _event: LinkRestored) -> Result:
    greeted = [presence for device, presence in sorted(state.presence.items()) if device in state.synced]
    return state, tuple(SendCommand(p.device, "sync", p.boot, p.connection) for p in greeted)


def _storage(state: Intake, event: StorageChanged) -> Result:
    was, state = state.storage_full, replace(state, storage_full=event.full)
    if event.full and not was:
        return state, (Alarm("disk_full", "", "nothing new is accepted until there is space"),)
    if event.full or not was:
        return state, ()
    effects: Effects = ()
    for progress in state.uploads.values():
        if progress.stage is Stage.OPEN:
            state, more = _ask(state, replace(progress, heard=event.now, repeats=0))
            effects += more
        else:
            effects += (Verify(progress.info),)
    return state, effects


def may_fetch(state: Intake, device: str, digest: str) -> bool:
    """Whether a device gets this blob: a model of the open round, or what its own task starts from."""
    task = state.tasks.get(device)
    return digest in state.public or (task is not None and task.start == digest)


def _fetch(state: Intake, event: FetchAsked) -> Result:
    if not may_fetch(state, event.device, event.digest) or event.size is None:
        return _ignore(state, "fetch_refused")
    chunks = -(-event.size // state.limits.chunk)
    wanted = [i for first, last in event.ranges for i in range(first, min(last, chunks - 1, first + 64) + 1)]
    tokens, at = state.fetches.get(event.device, (float(FETCH_BURST), event.now))
    tokens = min(float(FETCH_BURST), tokens + (event.now - at) * FETCH_RATE / 1000)
    wanted = wanted[: min(state.limits.window, int(tokens))]
    state = replace(state, fetches=_with(state.fetches, event.device, (tokens - len(wanted), event.now)))
    return state, tuple(SendBlobChunk(event.device, event.digest, index) for index in wanted)


def _check_outbox(state: Intake, device: str, outbox_id: str) -> Result:
    """An offer from an outbox that is not the one its device was born with."""
    known = state.presence.get(device)
    if known is None or not known.online or known.outbox_id == outbox_id:
        return state, ()
    detail = f"an offer from outbox {outbox_id} while outbox {known.outbox_id} is online"
    return state, (Alarm("duplicate_identity", device, detail),)


def _status(state: Intake, event: StatusSeen) -> Result:
    status, device = event.status, event.device
    known = state.presence.get(device)
    same = known is not None and (known.boot, known.connection) == (status.boot, status.connection)
    if status.state != "online":
        return _offline(state, event, known, same)
    effects: Effects = ()
    former: Mapping[str, int] = {} if known is None else known.former
    if known is not None and not same:
        if known.boot == status.boot:
            if status.connection < known.connection:
                return _ignore(state, "old_status")
        elif status.connection <= former.get(status.boot, -1):
            return _ignore(state, "old_status")
        else:
            other = known.online and known.outbox_id != status.outbox_id
            if other or status.boot in former:
                detail = f"outbox {status.outbox_id} and outbox {known.outbox_id} speak by turns under this id"
                effects += (Alarm("duplicate_identity", device, detail),)
            newest = [*former.items(), (known.boot, known.connection)][-FORMER_BOOTS:]
            former = MappingProxyType(dict(newest))
    presence = Presence(
        device=device,
        outbox_id=status.outbox_id,
        boot=status.boot,
        connection=status.connection,
        online=True,
        seen=event.now,
        paused=str(status.paused),
        entries=status.outbox.entries,
        former=former,
    )
    effects += (SavePresence(presence),)
    birth = not same or known is None or not known.online or device not in state.synced
    state = replace(state, presence=_with(state.presence, device, presence), synced=state.synced | {device})
    if birth:
        effects += (SendCommand(device, "sync", status.boot, status.connection),)
    effects += (Tell(rounds.DeviceSeen(event.now, device)),)
    if status.declined is not None:
        reason = status.declined.reason
        effects += (Tell(rounds.Declined(event.now, device, status.declined.task, reason)),)
    return state, effects


def _offline(state: Intake, event: StatusSeen, known: Presence | None, same: bool) -> Result:
    status, device = event.status, event.device
    if known is not None and not same:
        if not known.online:
            return _ignore(state, "old_status")
        # The will of an earlier connection came late; the retained copy now says offline, which is wrong.
        state, _ = _ignore(state, "old_will")
        return state, (SendCommand(device, "rebirth", known.boot, known.connection),)
    presence = Presence(
        device=device,
        outbox_id=status.outbox_id,
        boot=status.boot,
        connection=status.connection,
        online=False,
        seen=event.now,
        former={} if known is None else known.former,
    )
    state = replace(state, presence=_with(state.presence, device, presence), synced=state.synced - {device})
    return state, (SavePresence(presence), Tell(rounds.DeviceLost(event.now, device)))


# One handler per event type; each takes exactly that type, which a mapping cannot express.
HANDLERS: Mapping[type[Event], Callable[[Intake, Any], Result]] = MappingProxyType(
    {
        Restarted: _restarted,
        Offered: _offered,
        OfferedUnreadably: _offered_unreadably,
        ChunkArrived: _chunk,
        FetchAsked: _fetch,
        StatusSeen: _status,
        Verified: _verified,
        VerifyFailed: _verify_failed,
        Ticked: _ticked,
        PhaseOpened: _phase_opened,
        TasksIssued: _tasks_issued,
        PhaseClosed: _phase_closed,
        Revoked: _revoked,
        LinkRestored: _link_restored,
        StorageChanged: _storage,
    }
)
