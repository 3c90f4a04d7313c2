"""The device's side of the protocol as a pure state machine: `step(state, event) -> (state, effects)`.

Rules (transport.md, sections 1, 5, 8.1, 9)
-------------------------------------------
1. The broker is a post office: nothing is forgotten because of a PUBACK. An entry leaves the outbox by a verdict that the
   shell has found signed, and by nothing else here.
2. The receiver drives: a chunk is sent because its index was asked for, at most `window` unacknowledged; a blob is fetched
   a window at a time.
3. No clock, no randomness, no I/O: every event carries `now` (monotonic seconds); jitter is drawn from the seed that
   `Started` carried; effects are carried out by `edge_sdk.device`. The same events give the same effects.
4. Gateway time comes from the signed `sync` command alone, which echoes this birth; later signed messages may move it
   forward, never back. Before it no task is started, so that a retained task of last week does no harm.
5. A round or a task is older than another if it was made earlier by the gateway's clock. Numbers do not tell: a job that
   is begun anew counts from 0 again.
6. An event that means nothing in this state changes nothing: the network is not a caller.

Three regions. Link: OFFLINE, CONNECTING, ONLINE, STOPPING. Upload, one at a time: IDLE, OFFERED, SENDING, WAITING (HELD
entries stand aside until a time). Work: NONE, FETCHING, READY, TRAINING.

| state                     | event                                              | effects                                         | next             |
|---------------------------|----------------------------------------------------|-------------------------------------------------|------------------|
| OFFLINE                   | Started, timer `connect`                           | Connect                                         | CONNECTING       |
| CONNECTING, IDLE          | LinkUp                                             | Subscribe, PublishStatus, go on fetching, offer | ONLINE, OFFERED  |
| any                       | HttpEnded, chunks missing                          | FetchHttp once more, then PublishFetch          | same             |
| any                       | LinkDown                                           | CancelTimer, SetTimer `connect` (full jitter)   | OFFLINE, IDLE    |
| IDLE                      | OutboxChanged, flush                               | PublishOffer, SetTimer `verdict`                | OFFERED          |
| OFFERED, SENDING, WAITING | Ack need                                           | SendChunk for a window, SetTimer `verdict`      | SENDING          |
| SENDING                   | ChunkSent                                          | SendChunk next of the list                      | SENDING, WAITING |
| any                       | Ack accepted                                       | DeleteEntry, PublishOffer of the next           | IDLE, OFFERED    |
| any                       | Ack rejected                                       | DeleteEntry, or Quarantine, or held             | IDLE, OFFERED    |
| any                       | Ack wait                                           | held for retry_after x U(1, 1.5)                | IDLE, OFFERED    |
| any upload                | timer `verdict`, `held`                            | PublishOffer again, later each time             | OFFERED          |
| NONE                      | TaskOffered, good                                  | fetch what is missing                           | FETCHING, READY  |
| any                       | TaskOffered, refused                               | PublishStatus with `declined`                   | same             |
| any                       | TaskRepeated, or TaskOffered of an earlier round   | PublishStatus with `declined`                   | same             |
| FETCHING                  | BlobReady                                          |                                                 | READY            |
| READY                     | Gate open, sync, last blob                         | StartTask, SetTimer `deadline`                  | TRAINING         |
| TRAINING                  | TaskDone                                           | OutboxChanged follows                           | NONE             |
| TRAINING                  | TaskFailed                                         | PublishStatus with `declined`                   | NONE             |
| TRAINING                  | TaskPostponed                                      | (the gate says why and when again)              | READY            |
| FETCHING, READY, TRAINING | newer task, cleared, timer `deadline`, `drop_task` | CancelTask                                      | NONE             |
| any                       | Stop                                               | PublishStatus stopping, Disconnect, CancelTask  | STOPPING         |
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from edge_sdk.wire import WINDOW, Ack, Clock, Command, Order, Paused, Reason, State, Task, Verdict

DELETE: Final = frozenset(
    {
        Reason.ROUND_CLOSED,
        Reason.ALREADY_ANSWERED,
        Reason.TOO_LARGE,
        Reason.BAD_GEOMETRY,
        Reason.WRONG_BASE,
        Reason.BAD_CONTENT,
    }
)
QUARANTINE: Final = frozenset({Reason.SEQ_CONFLICT, Reason.BAD_SIGNATURE, Reason.UNSUPPORTED_VERSION})
_LONGEST_WAIT: Final = 600.0
_STEADY: Final = 10.0  # seconds after which a connection counts as a good one
_SUSPICIOUS: Final = 3  # connections in a row that did not last
_FETCH_AGAIN: Final = 4.0
HTTP_ABOVE: Final = 16 << 20  # bytes; a smaller blob is not worth a connection of its own
_HTTP_TRIES: Final = 2


class LinkState(StrEnum):
    """Whether there is a connection."""

    OFFLINE = "offline"
    CONNECTING = "connecting"
    ONLINE = "online"
    STOPPING = "stopping"


class Stage(StrEnum):
    """Where the one upload stands."""

    IDLE = "idle"
    OFFERED = "offered"
    SENDING = "sending"
    WAITING = "waiting"


class Work(StrEnum):
    """Where the one task stands."""

    NONE = "none"
    FETCHING = "fetching"
    READY = "ready"
    TRAINING = "training"


@dataclass(frozen=True)
class Head:
    """An entry of the outbox: its name and its digest."""

    upload: str
    digest: str
    chunks: int


@dataclass(frozen=True)
class Upload:
    """The upload under way: what was asked for and not yet sent, what is on its way, when it was offered."""

    head: Head
    stage: Stage = Stage.OFFERED
    to: str = ""
    need: tuple[int, ...] = ()
    in_flight: frozenset[int] = frozenset()
    offered_at: float = 0.0
    answered: bool = False
    repeats: int = 0


@dataclass(frozen=True)
class Blob:
    """Something to fetch: digest, bytes, chunk indexes still missing, and those asked for last."""

    digest: str
    size: int
    missing: frozenset[int]
    asked: frozenset[int] = frozenset()
    failures: int = 0
    by_http: bool = False
    http_failures: int = 0


@dataclass(frozen=True)
class Conversation:
    """The whole state. `queue` is what the outbox holds, oldest first; `held` maps uploads to when they may be tried again."""

    boot: str
    seed: int
    link: LinkState = LinkState.OFFLINE
    connection: int = 0
    up_since: float = 0.0
    attempts: int = 0
    brief: int = 0  # connections in a row that did not last
    draws: int = 0
    window: int = WINDOW
    queue: tuple[Head, ...] = ()
    held: Mapping[str, float] = field(default_factory=dict)
    upload: Upload | None = None
    rtt: float = 0.5
    reported: int = 0  # entries that the last status told of
    work: Work = Work.NONE
    task: Task | None = None
    declined: tuple[str, str] | None = None  # the last task, and why; said with every status until there is another
    start: Blob | None = None  # of the task, while it is missing
    model: Blob | None = None  # to serve with, while it is missing
    http: bool = False  # whether the gateway serves big blobs over HTTPS, too
    round: int = 0
    opened: int = 0  # gateway ms: when that round was opened; the later one is the newer, whatever their numbers
    paused: Paused = Paused.NONE
    synced: bool = False
    offset: float = 0.0  # gateway seconds at monotonic 0
    counter: int = 0  # of the last command
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def clock(self) -> Clock:
        """What this device knows of the time."""
        return Clock.SYNCED if self.synced else Clock.UNSET

    def gateway_now(self, now: float) -> float:
        """Gateway time in seconds at monotonic `now`."""
        return now + self.offset


@dataclass(frozen=True)
class Event:
    """Something that happened, at monotonic time `now` in seconds."""

    now: float


@dataclass(frozen=True)
class Started(Event):
    """The shell is up; `queue` is what the outbox holds."""

    queue: tuple[Head, ...]


@dataclass(frozen=True)
class LinkUp(Event):
    """Connected."""

    session_present: bool
    receive_max: int


@dataclass(frozen=True)
class LinkDown(Event):
    """Not connected, or no longer."""

    reason: str


@dataclass(frozen=True)
class AckReceived(Event):
    """An answer to an offer; a final one was found signed."""

    ack: Ack


@dataclass(frozen=True)
class CommandReceived(Event):
    """A signed command."""

    command: Command


@dataclass(frozen=True)
class RoundSeen(Event):
    """The signed round manifest: its number, when it was opened, and the model to serve with, if chunks of it are missing."""

    round: int
    opened: int  # gateway ms
    model: Blob | None


@dataclass(frozen=True)
class TaskOffered(Event):
    """A signed task that was not done before. `refusal`: why this device cannot do it. `start`: what is missing of it."""

    task: Task
    refusal: str | None
    start: Blob | None


@dataclass(frozen=True)
class TaskRepeated(Event):
    """A signed task that was done and answered before: the gateway has forgotten the answer, or it is an old message."""

    task: str


@dataclass(frozen=True)
class TaskCleared(Event):
    """The retained task was withdrawn."""


@dataclass(frozen=True)
class BlobChunk(Event):
    """A chunk of a blob came and was stored."""

    digest: str
    index: int


@dataclass(frozen=True)
class BlobReady(Event):
    """A blob is complete, its digest right."""

    digest: str


@dataclass(frozen=True)
class BlobFailed(Event):
    """A blob was complete and its digest wrong; its chunks were dropped."""

    digest: str
    chunks: int


@dataclass(frozen=True)
class HttpOffered(Event):
    """Whether the gateway serves big blobs over HTTPS."""

    available: bool


@dataclass(frozen=True)
class HttpEnded(Event):
    """No more chunks of this blob come over HTTPS, whether all came or not."""

    digest: str


@dataclass(frozen=True)
class ChunkSent(Event):
    """The broker has taken a chunk (PUBACK), or refused it."""

    upload: str
    index: int


@dataclass(frozen=True)
class OutboxChanged(Event):
    """What the outbox holds now."""

    queue: tuple[Head, ...]


@dataclass(frozen=True)
class TaskDone(Event):
    """The update is in the outbox."""

    task: str


@dataclass(frozen=True)
class TaskFailed(Event):
    """The task cannot be done here."""

    task: str
    reason: str


@dataclass(frozen=True)
class TaskPostponed(Event):
    """The task could not be finished now, and may be begun again."""

    task: str


@dataclass(frozen=True)
class Gate(Event):
    """Whether training is allowed, and if not, why."""

    paused: Paused


@dataclass(frozen=True)
class TimerFired(Event):
    """A timer of `SetTimer` ran out."""

    name: str


@dataclass(frozen=True)
class Stop(Event):
    """The app is going."""


@dataclass(frozen=True)
class Effect:
    """Something the shell must do, in order."""


@dataclass(frozen=True)
class Connect(Effect):
    """Try to connect; the will names this connection number."""

    connection: int


@dataclass(frozen=True)
class Disconnect(Effect):
    """End the connection in order."""


@dataclass(frozen=True)
class Subscribe(Effect):
    """Listen to the device's topics."""


@dataclass(frozen=True)
class PublishStatus(Effect):
    """Say where this device stands."""

    state: State
    declined: tuple[str, str] | None = None  # task, reason


@dataclass(frozen=True)
class PublishOffer(Effect):
    """Send the stored offer of an upload, byte for byte."""

    upload: str


@dataclass(frozen=True)
class PublishFetch(Effect):
    """Ask for chunks of a blob: inclusive ranges."""

    digest: str
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FetchHttp(Effect):
    """Fetch these chunks (inclusive ranges) over HTTPS; ends in `HttpEnded`."""

    digest: str
    size: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PublishReply(Effect):
    """Answer a command."""

    to: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True)
class SendChunk(Effect):
    """Send one chunk of a body; comes back as `ChunkSent`."""

    upload: str
    index: int
    to: str


@dataclass(frozen=True)
class VerifyBlob(Effect):
    """All chunks are here: comes back as `BlobReady` or `BlobFailed`."""

    digest: str


@dataclass(frozen=True)
class StartTask(Effect):
    """Train."""

    task: Task


@dataclass(frozen=True)
class CancelTask(Effect):
    """Stop training between two steps; the work is thrown away."""

    task: str


@dataclass(frozen=True)
class DeleteEntry(Effect):
    """The upload has ended: `accepted` or `rejected`."""

    upload: str
    fate: str


@dataclass(frozen=True)
class Quarantine(Effect):
    """The upload has ended badly; its offer is kept for diagnosis."""

    upload: str
    reason: str


@dataclass(frozen=True)
class SaveCounter(Effect):
    """Remember the number of the last command."""

    counter: int


@dataclass(frozen=True)
class SetPaused(Effect):
    """The gateway asks to pause, or to go on."""

    paused: bool


@dataclass(frozen=True)
class SetTimer(Effect):
    """Send `TimerFired(name)` after `delay` seconds; replaces an earlier one of this name."""

    name: str
    delay: float


@dataclass(frozen=True)
class CancelTimer(Effect):
    """No `TimerFired(name)`."""

    name: str


@dataclass(frozen=True)
class Notify(Effect):
    """Tell the app."""

    kind: str
    detail: str = ""


Effects = tuple[Effect, ...]
Result = tuple[Conversation, Effects]


def step(state: Conversation, event: Event) -> Result:
    """Advance by one event."""
    if state.link is LinkState.STOPPING:
        return state, ()
    handler = HANDLERS[type(event)]
    return handler(state, event)


def _ignore(state: Conversation, what: str) -> Result:
    counts = {**state.ignored, what: state.ignored.get(what, 0) + 1}
    return replace(state, ignored=MappingProxyType(counts)), ()


def _draw(state: Conversation, low: float, high: float) -> tuple[Conversation, float]:
    """A number between, from the seed and how many were drawn before."""
    text = f"{state.seed}/{state.draws}".encode()
    share = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
    return replace(state, draws=state.draws + 1), low + (high - low) * share


# Link.


def _started(state: Conversation, event: Started) -> Result:
    state = replace(state, queue=event.queue, link=LinkState.CONNECTING, connection=state.connection + 1)
    return state, (Connect(state.connection),)


def _link_up(state: Conversation, event: LinkUp) -> Result:
    if state.link is not LinkState.CONNECTING:
        return _ignore(state, "link_up")
    window = max(1, min(WINDOW, event.receive_max))
    state = replace(state, link=LinkState.ONLINE, up_since=event.now, window=window, reported=len(state.queue))
    effects: Effects = (Notify("online"),)
    # Whatever the broker says of a session: it may be one of an attempt whose answer was lost, before any subscription.
    effects += (Subscribe(),)
    effects += (PublishStatus(State.ONLINE, state.declined),)
    state, more = _fetch(state, event.now)
    state, offered = _offer_next(state, event.now)
    return state, (*effects, *more, *offered)


def _link_down(state: Conversation, event: LinkDown) -> Result:
    was_up = state.link is LinkState.ONLINE
    # A connection that did not last is no reason to hurry: somebody may use the same name.
    steady = was_up and event.now - state.up_since >= _STEADY
    attempts = 0 if steady else state.attempts
    brief = state.brief if not was_up else 0 if steady else state.brief + 1
    state = replace(
        state,
        link=LinkState.OFFLINE,
        attempts=attempts + 1,
        brief=brief,
        upload=None,
        start=_unasked(state.start),
        model=_unasked(state.model),
    )
    longest = 5.0 if was_up and attempts == 0 else min(60.0, 2.0 ** min(attempts, 6))
    state, delay = _draw(state, 0.0, longest)
    effects: Effects = (CancelTimer("verdict"), CancelTimer("fetch"), CancelTimer("held"))
    effects += (SetTimer("connect", delay), Notify("offline", event.reason))
    if was_up and brief and brief % _SUSPICIOUS == 0:  # before MQTT 5, and in mosquitto 2.0, no broker says why
        told = f"{brief} connections in a row ended within {_STEADY:g} s: does another device use this id?"
        effects += (Notify("error", told),)
    return state, effects


def _unasked(blob: Blob | None) -> Blob | None:
    return None if blob is None else replace(blob, asked=frozenset())


# Upload.


def _outbox_changed(state: Conversation, event: OutboxChanged) -> Result:
    names = {head.upload for head in event.queue}
    held = {name: until for name, until in state.held.items() if name in names}
    state = replace(state, queue=event.queue, held=MappingProxyType(held))
    if state.upload is not None and state.upload.head.upload not in names:
        state = replace(state, upload=None)
    return _offer_next(state, event.now)


def _offer_next(state: Conversation, now: float) -> Result:
    """Offer the oldest entry that is not held, unless something is under way."""
    if state.link is not LinkState.ONLINE or state.upload is not None:
        return state, ()
    free = [head for head in state.queue if state.held.get(head.upload, 0.0) <= now]
    if free:
        state = replace(state, upload=Upload(free[0], offered_at=now))
        state, timer = _verdict_timer(state, now)
        return state, (PublishOffer(free[0].upload), timer)
    if state.queue:
        soonest = min(state.held[head.upload] for head in state.queue)
        return state, (SetTimer("held", max(0.1, soonest - now)),)
    if state.reported:  # the gateway waits for a device that said it has something
        return replace(state, reported=0), (PublishStatus(State.ONLINE, state.declined),)
    return state, ()


def _verdict_timer(state: Conversation, now: float) -> tuple[Conversation, SetTimer]:
    """clamp(4 RTT, 2 s, 10 s) x 1.5^repeats x U(0.7, 1.2), at most clamp(T / 20, 8 s, 60 s)."""
    repeats = 0 if state.upload is None else state.upload.repeats
    left = 600.0
    if state.task is not None and state.synced:
        left = state.task.deadline / 1000 - state.gateway_now(now)
    cap = min(60.0, max(8.0, left / 20))
    state, jitter = _draw(state, 0.7, 1.2)
    delay = min(max(4 * state.rtt, 2.0), 10.0) * 1.5 ** min(repeats, 20) * jitter
    return state, SetTimer("verdict", min(cap, delay))


def _ack(state: Conversation, event: AckReceived) -> Result:
    ack = event.ack
    head = next((head for head in state.queue if head.upload == ack.upload), None)
    if head is None or (ack.digest is not None and ack.digest != head.digest):
        return _ignore(state, "unknown_upload")
    current = state.upload
    if current is not None and current.head.upload == ack.upload and not current.answered:
        sample = min(max(event.now - current.offered_at, 0.0), 30.0)
        state = replace(state, rtt=0.8 * state.rtt + 0.2 * sample, upload=replace(current, answered=True))
    if ack.final and state.synced:
        state = _forward(state, event.now, ack.now)
    match ack.status:
        case Verdict.NEED:
            return _need(state, event)
        case Verdict.WAIT:
            return _hold(state, ack.upload, ack.retry_after_ms / 1000, event.now)
        case Verdict.ACCEPTED:
            return _end(
                state, head, DeleteEntry(head.upload, "accepted"), Notify("update_accepted", head.upload), event
            )
        case Verdict.REJECTED:
            reason = ack.reason
            assert reason is not None
            told = Notify("update_rejected", f"{head.upload}: {reason}: {ack.detail}")
            if reason in DELETE:
                return _end(state, head, DeleteEntry(head.upload, "rejected"), told, event)
            if reason in QUARANTINE:
                return _end(state, head, Quarantine(head.upload, reason), told, event)
            state, effects = _hold(state, ack.upload, max(ack.retry_after_ms / 1000, 60.0), event.now)
            return state, (told, *effects)


def _end(state: Conversation, head: Head, done: Effect, told: Notify, event: Event) -> Result:
    queue = tuple(other for other in state.queue if other.upload != head.upload)
    upload = state.upload if state.upload is not None and state.upload.head.upload != head.upload else None
    state, effects = _offer_next(replace(state, queue=queue, upload=upload), event.now)
    stop: Effects = () if upload is not None or state.upload is not None else (CancelTimer("verdict"),)
    return state, (done, told, *stop, *effects)


def _hold(state: Conversation, upload: str, seconds: float, now: float) -> Result:
    state, factor = _draw(state, 1.0, 1.5)
    until = now + min(max(seconds, 0.5), _LONGEST_WAIT) * factor
    state = replace(state, held=MappingProxyType({**state.held, upload: until}))
    if state.upload is not None and state.upload.head.upload == upload:
        state = replace(state, upload=None)
    return _offer_next(state, now)


def _need(state: Conversation, event: AckReceived) -> Result:
    upload = state.upload
    if upload is None or upload.head.upload != event.ack.upload:
        return _ignore(state, "need_for_another")
    wanted = tuple(i for i in event.ack.need if i < upload.head.chunks and i not in upload.in_flight)
    upload = replace(upload, stage=Stage.SENDING, need=wanted, to=event.ack.to, repeats=0)
    return _send(replace(state, upload=upload), event.now)


def _send(state: Conversation, now: float) -> Result:
    upload = state.upload
    assert upload is not None
    count = max(0, state.window - len(upload.in_flight))
    chosen, rest = upload.need[:count], upload.need[count:]
    in_flight = upload.in_flight | set(chosen)
    stage = Stage.SENDING if in_flight else Stage.WAITING
    state = replace(state, upload=replace(upload, need=rest, in_flight=in_flight, stage=stage))
    state, timer = _verdict_timer(state, now)
    return state, (*(SendChunk(upload.head.upload, index, upload.to) for index in chosen), timer)


def _chunk_sent(state: Conversation, event: ChunkSent) -> Result:
    upload = state.upload
    if upload is None or upload.head.upload != event.upload or event.index not in upload.in_flight:
        return _ignore(state, "chunk_sent")
    state = replace(state, upload=replace(upload, in_flight=upload.in_flight - {event.index}))
    return _send(state, event.now)


def _reoffer(state: Conversation, now: float) -> Result:
    upload = state.upload
    if upload is None or state.link is not LinkState.ONLINE:
        return _ignore(state, "timer")
    upload = Upload(upload.head, offered_at=now, repeats=upload.repeats + 1)
    state, timer = _verdict_timer(replace(state, upload=upload), now)
    return state, (PublishOffer(upload.head.upload), timer)


# Work.


def _round(state: Conversation, event: RoundSeen) -> Result:
    if event.opened < state.opened:
        return _ignore(state, "old_round")
    state = replace(state, round=event.round, opened=event.opened, model=_known(state, event.model))
    effects: Effects = ()
    if state.task is not None and state.task.now < event.opened:
        state, effects = _drop(state)
    state, more = _fetch(state, event.now)
    return state, (*effects, *more)


def _task(state: Conversation, event: TaskOffered) -> Result:
    task = event.task
    if state.task is not None and state.task.task == task.task:
        return _ignore(state, "same_task")
    late = state.synced and state.gateway_now(event.now) * 1000 >= task.deadline
    if task.now < state.opened:
        state, _ = _ignore(state, "old_task")
        return _tell_gone(state, task.task, "of an earlier round")
    if late:
        return _ignore(state, "old_task")
    state, effects = _drop(state)
    if event.refusal is not None:
        state, told = _decline(state, task.task, event.refusal)
        return state, (*effects, *told)
    work = Work.READY if event.start is None else Work.FETCHING
    state = replace(state, task=task, work=work, start=_known(state, event.start), declined=None)
    state, more = _fetch(state, event.now)
    state, begun = _begin(state, event.now)
    return state, (*effects, *more, *begun)


def _repeated(state: Conversation, event: TaskRepeated) -> Result:
    return _tell_gone(state, event.task, "answered before")


def _tell_gone(state: Conversation, task: str, why: str) -> Result:
    """Nobody will do this task. It matters where the gateway was put back from a copy, and waits for it."""
    return state, (PublishStatus(State.ONLINE, (task, why)),) if state.link is LinkState.ONLINE else ()


def _cleared(state: Conversation, _event: TaskCleared) -> Result:
    return _drop(state)


def _drop(state: Conversation) -> Result:
    task = state.task
    effects: Effects = (CancelTimer("deadline"),) if task is not None else ()
    if task is not None and state.work is Work.TRAINING:
        effects += (CancelTask(task.task), Notify("task_cancelled", task.task))
    return replace(state, work=Work.NONE, task=None, start=None), effects


def _begin(state: Conversation, now: float) -> Result:
    if state.work is not Work.READY or not state.synced or state.paused is not Paused.NONE:
        return state, ()
    task = state.task
    assert task is not None
    left = task.deadline / 1000 - state.gateway_now(now)
    if left <= 0:
        return _drop(state)
    return replace(state, work=Work.TRAINING), (SetTimer("deadline", left), StartTask(task))


def _task_done(state: Conversation, event: TaskDone) -> Result:
    if state.task is None or state.task.task != event.task:
        return _ignore(state, "task_done")
    state, effects = _drop(replace(state, work=Work.NONE))
    return state, (*effects, Notify("task_done", event.task))


def _task_failed(state: Conversation, event: TaskFailed) -> Result:
    if state.task is None or state.task.task != event.task:
        return _ignore(state, "task_failed")
    state, effects = _drop(replace(state, work=Work.NONE))
    state, told = _decline(state, event.task, event.reason)
    return state, (*effects, *told)


def _decline(state: Conversation, task: str, reason: str) -> Result:
    state = replace(state, declined=(task, reason[:64]))
    return state, (PublishStatus(State.ONLINE, state.declined), Notify("declined", reason))


def _task_postponed(state: Conversation, event: TaskPostponed) -> Result:
    if state.task is None or state.task.task != event.task or state.work is not Work.TRAINING:
        return _ignore(state, "task_postponed")
    return _begin(replace(state, work=Work.READY), event.now)


def _gate(state: Conversation, event: Gate) -> Result:
    if event.paused is state.paused:
        return _begin(state, event.now)
    state = replace(state, paused=event.paused)
    effects: Effects = (Notify("paused" if event.paused is not Paused.NONE else "resumed", event.paused),)
    if state.link is LinkState.ONLINE:
        effects += (PublishStatus(State.ONLINE, state.declined),)
    state, begun = _begin(state, event.now)
    return state, (*effects, *begun)


# Blobs: the task's start first, then the model to serve with.


def _fetch(state: Conversation, now: float) -> Result:
    """Ask for the next window of the first blob that misses chunks, unless that has been done."""
    blob = state.start or state.model
    if blob is None or state.link is not LinkState.ONLINE:
        return state, ()
    if blob.by_http:
        return state, ()
    if state.http and blob.missing and blob.size > HTTP_ABOVE and blob.http_failures < _HTTP_TRIES:
        state = _with_blob(state, replace(blob, by_http=True, asked=frozenset()))
        return state, (CancelTimer("fetch"), FetchHttp(blob.digest, blob.size, _ranges(sorted(blob.missing))))
    waiting = blob.asked & blob.missing
    if not blob.missing or 2 * len(waiting) > len(blob.asked):
        return state, ()
    return _ask(state, blob, now)


def _known(state: Conversation, blob: Blob | None) -> Blob | None:
    """A blob as it is being fetched already, if it is."""
    if blob is None:
        return None
    return next((held for held in (state.start, state.model) if held is not None and held.digest == blob.digest), blob)


def _http_offered(state: Conversation, event: HttpOffered) -> Result:
    return replace(state, http=event.available), ()


def _http_ended(state: Conversation, event: HttpEnded) -> Result:
    blob = next((b for b in (state.start, state.model) if b is not None and b.digest == event.digest), None)
    if blob is None or not blob.by_http:
        return _ignore(state, "http_ended")
    failures = blob.http_failures + bool(blob.missing)
    return _fetch(_with_blob(state, replace(blob, by_http=False, http_failures=failures)), event.now)


def _ask(state: Conversation, blob: Blob, _now: float) -> Result:
    chosen = sorted(blob.missing)[: state.window]
    state = _with_blob(state, replace(blob, asked=frozenset(chosen)))
    return state, (PublishFetch(blob.digest, _ranges(chosen)), SetTimer("fetch", _FETCH_AGAIN))


def _with_blob(state: Conversation, blob: Blob) -> Conversation:
    if state.start is not None and state.start.digest == blob.digest:
        state = replace(state, start=blob)
    if state.model is not None and state.model.digest == blob.digest:
        state = replace(state, model=blob)
    return state


def _ranges(indexes: list[int]) -> tuple[tuple[int, int], ...]:
    """Rising indexes as inclusive ranges."""
    ranges: list[list[int]] = []
    for index in indexes:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return tuple((first, last) for first, last in ranges)


def _blob_chunk(state: Conversation, event: BlobChunk) -> Result:
    blob = next((b for b in (state.start, state.model) if b is not None and b.digest == event.digest), None)
    if blob is None or event.index not in blob.missing:
        return _ignore(state, "stray_chunk")
    blob = replace(blob, missing=blob.missing - {event.index})
    state = _with_blob(state, blob)
    if not blob.missing:
        return state, (CancelTimer("fetch"), VerifyBlob(blob.digest))
    return _fetch(state, event.now)


def _blob_ready(state: Conversation, event: BlobReady) -> Result:
    if state.model is not None and state.model.digest == event.digest:
        state = replace(state, model=None)
    if state.start is not None and state.start.digest == event.digest:
        state = replace(state, start=None, work=Work.READY if state.work is Work.FETCHING else state.work)
    state, effects = _fetch(state, event.now)
    state, begun = _begin(state, event.now)
    return state, (*effects, *begun)


def _blob_failed(state: Conversation, event: BlobFailed) -> Result:
    blob = next((b for b in (state.start, state.model) if b is not None and b.digest == event.digest), None)
    if blob is None:
        return _ignore(state, "blob_failed")
    if blob.failures == 0:
        everything = frozenset(range(event.chunks))
        fresh = Blob(blob.digest, blob.size, everything, failures=1, http_failures=_HTTP_TRIES)
        return _fetch(_with_blob(state, fresh), event.now)
    told = Notify("fetch_failed", event.digest)
    if state.task is not None and state.start is not None and state.start.digest == event.digest:
        state, effects = _task_failed(state, TaskFailed(event.now, state.task.task, "fetch_failed"))
        return state, (told, *effects)
    return replace(state, model=None), (told,)


# Commands and time.


def _command(state: Conversation, event: CommandReceived) -> Result:
    command = event.command
    if command.counter <= state.counter:
        return _ignore(state, "old_command")
    state = replace(state, counter=command.counter)
    saved = SaveCounter(command.counter)
    match command.command:
        case Order.SYNC:
            if command.args.get("boot") != state.boot or command.args.get("connection") != state.connection:
                state, effects = _ignore(state, "other_sync")
                return state, (saved, *effects)
            if not state.synced:
                state = replace(state, synced=True, offset=command.now / 1000 - event.now)
            state = _forward(state, event.now, command.now)
            state, effects = _begin(state, event.now)
            return state, (saved, *effects)
        case Order.REBIRTH:
            return state, (saved, PublishStatus(State.ONLINE, state.declined))
        case Order.PAUSE | Order.RESUME:
            paused = command.command is Order.PAUSE
            return state, (saved, SetPaused(paused), PublishReply(command.id, True))
        case Order.FLUSH:
            state = replace(state, held=MappingProxyType({}))
            state, effects = _offer_next(state, event.now)
            return state, (saved, *effects, PublishReply(command.id, True))
        case Order.DROP_TASK:
            state, effects = _drop(state)
            return state, (saved, *effects, PublishReply(command.id, True))
        case _:
            detail = f"{command.command} is not supported by this version"
            return state, (saved, PublishReply(command.id, False, detail))


def _forward(state: Conversation, now: float, gateway_ms: int) -> Conversation:
    return replace(state, offset=max(state.offset, gateway_ms / 1000 - now))


def _timer(state: Conversation, event: TimerFired) -> Result:
    match event.name:
        case "connect" if state.link is LinkState.OFFLINE:
            state = replace(state, link=LinkState.CONNECTING, connection=state.connection + 1)
            return state, (Connect(state.connection),)
        case "verdict":
            return _reoffer(state, event.now)
        case "held":
            return _offer_next(state, event.now)
        case "fetch":
            blob = state.start or state.model
            if blob is not None and blob.missing and not blob.by_http and state.link is LinkState.ONLINE:
                return _ask(state, blob, event.now)
        case "deadline" if state.task is not None:
            state, effects = _drop(state)
            return state, effects
    return state, ()


def _stop(state: Conversation, _event: Stop) -> Result:
    effects: Effects = ()
    if state.task is not None and state.work is Work.TRAINING:
        effects += (CancelTask(state.task.task),)
    if state.link is LinkState.ONLINE:
        effects += (PublishStatus(State.STOPPING),)
    return replace(state, link=LinkState.STOPPING, upload=None), (*effects, Disconnect())


# One handler per event type; each takes exactly that type, which a mapping cannot express.
HANDLERS: Final[Mapping[type[Event], Callable[[Conversation, Any], Result]]] = MappingProxyType(
    {
        Started: _started,
        LinkUp: _link_up,
        LinkDown: _link_down,
        AckReceived: _ack,
        CommandReceived: _command,
        RoundSeen: _round,
        TaskOffered: _task,
        TaskRepeated: _repeated,
        TaskCleared: _cleared,
        BlobChunk: _blob_chunk,
        BlobReady: _blob_ready,
        BlobFailed: _blob_failed,
        HttpOffered: _http_offered,
        HttpEnded: _http_ended,
        ChunkSent: _chunk_sent,
        OutboxChanged: _outbox_changed,
        TaskDone: _task_done,
        TaskFailed: _task_failed,
        TaskPostponed: _task_postponed,
        Gate: _gate,
        TimerFired: _timer,
        Stop: _stop,
    }
)
