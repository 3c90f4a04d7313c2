"""The gateway's process: broker, link, journal and clock around the two pure machines (`rounds`, `intake`).

One thread does everything but the network: it takes messages in batches, runs them through the machines, writes what must
not be lost in one transaction, receipts the messages (PUBACK), then sends what follows from the commit. Heavy work
(checking a body, the fold, the gate) happens between batches, one piece at a time, so no more than one update and two
models are in memory.

If a transaction fails because the disk is full, the machines' states go back to what they were (they are immutable),
nothing new is accepted (`wait`), an alarm is raised, and the work goes on when a probe can write again. Any other failure of
storage, as a damaged model, does not mend itself: it ends `run`.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
import logging
import queue
import random
import secrets
import shutil
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from aggregator import fold, intake, rounds
from aggregator.assign import Question, Worked
from aggregator.assign.uniform import Assignment, assign
from aggregator.blob_server import BlobServer
from aggregator.blobs import BlobStore, DiskFullError, storage_error, sync_folder, write_through
from aggregator.broker import SESSION_EXPIRY, Broker, Security
from aggregator.job import Job, check_against
from aggregator.journal import Identity, Journal, LedgerRow, RoundRecord, Status
from devices.authority import SERVER, AuthorityError, Issued
from devices.registry import Registry, RegistryError
from devices.roles import initial_config
from edge_sdk import faults, wire
from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import EdgewiseError, LinkError, StorageError
from edge_sdk.keys import SigningKey, VerifyKey
from edge_sdk.link import QUEUE, Link, LinkDown, LinkEvent, LinkUp, Message, TooLarge
from edge_sdk.update import max_update_bytes

log = logging.getLogger(__name__)

INGEST: Final = wire.AGGREGATOR
BATCH: Final = 32  # messages in one transaction
PROGRESS_SECONDS: Final = 0.5
LINGER_SECONDS: Final = 2.0  # of silence at the end, so that every device hears its last verdict
LINGER_LIMIT: Final = 15.0
PROBE_SECONDS: Final = 1.0  # between looks at the disk
CERTIFICATE_SECONDS: Final = 21_600.0  # between looks at the gateway's certificates
ACK_EXPIRY, COMMAND_EXPIRY, BLOB_EXPIRY = 300, 60, 60  # seconds (transport.md, section 3)
MODEL_FILE: Final = "model.safetensors"
SUMMARY_FILE: Final = "summary.json"
_ASSIGNER: Final = (
    "assigner"  # of the journal's named values: the assigner's state, and the last ledger row it knows of
)
_DIGESTS_KEPT: Final = 4096
_STRANGERS_TOLD: Final = 256  # ids that the log names, until the registry changes


class GatewayClock:
    """Gateway time in Unix milliseconds: the wall clock at the start, monotonic from then on, never before `floor`."""

    def __init__(self, floor: int = 0) -> None:
        self._base = max(time.time_ns() // 1_000_000, floor)
        self._started = time.monotonic()

    def now(self) -> int:
        """Milliseconds since 1970."""
        return self._base + int((time.monotonic() - self._started) * 1000)


@dataclass(frozen=True)
class _Merged:
    """The fold is stored as a blob; to be committed with the rows it covers."""

    effect: rounds.Merge
    folded: fold.Folded


@dataclass(frozen=True)
class _MergeRefused:
    effect: rounds.Merge
    reason: str


@dataclass(frozen=True)
class _Judged:
    effect: rounds.Judge
    verdict: fold.Judgement


@dataclass(frozen=True)
class _Alarmed:
    """An alarm that no machine raised."""

    kind: str
    device: str
    detail: str


@dataclass(frozen=True)
class _Retained(intake.Effect):
    """Publish what the journal holds for a topic."""

    topic: str
    payload: bytes
    expires: int | None


@dataclass(frozen=True)
class _Command(intake.Effect):
    effect: intake.SendCommand
    counter: int


@dataclass(frozen=True)
class _Saved:
    """What goes back when a transaction fails."""

    rounds: rounds.Rounds
    intake: intake.Intake
    record: RoundRecord | None
    deadline: int | None
    traffic: dict[str, list[int]]


@dataclass(frozen=True)
class _Outgoing:
    """A message for the link; `device` is whose traffic it counts as."""

    topic: str
    payload: bytes
    kind: str
    device: str = ""
    retain: bool = False
    expiry: int | None = None


_Work = intake.Verify | rounds.Merge | rounds.Judge | rounds.FinishJob
_Result = _Merged | _MergeRefused | _Judged | _Alarmed
_Input = Message | intake.Event | rounds.Event | _Result
_Outward = intake.Effect | rounds.Effect


class Service:
    """Runs one job until its rounds are done or `stop` is called.

    `on_progress` is called from the service's thread with a fresh `Status` at most twice a second and once at the end.
    `reserve_bytes`: below so much free disk nothing new is accepted (default: 1 GiB or 10 % of the disk, whichever is
    less). `broker_kind` forces `mosquitto` or `iotcore`.
    """

    def __init__(
        self,
        job: Job,
        *,
        demo: bool = False,
        on_progress: Callable[[Status], None] | None = None,
        reserve_bytes: int | None = None,
        broker_kind: str = "auto",
    ) -> None:
        self._job = job
        self._demo, self._broker_kind = demo, broker_kind
        self._on_progress = on_progress
        self._reserve = reserve_bytes
        self._inbox: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self._outbox: deque[_Outgoing] = deque()
        self._stopping = threading.Event()
        self._work: deque[_Work] = deque()
        self._deadline: int | None = None
        self._record: RoundRecord | None = None
        self._traffic: dict[str, list[int]] = {}
        self._served: Counter[str] = Counter()  # device -> bytes over HTTPS, from its threads
        self._serving = threading.Lock()
        self._digests: OrderedDict[str, str] = OrderedDict()  # upload -> digest of its last offer
        self._blocked = False  # the disk is full: nothing can be committed
        self._held: dict[str, Message] = {}  # device -> its last status, for when the disk has room again
        self._strangers: set[str] = set()
        self._finished = False
        self._reconnect_at: float | None = None
        self._subscribed = False
        self._told_down = False  # that there is no connection; said once until there is one
        self._heard = self._ticked = self._shown = self._certificates_at = 0.0

    def stop(self) -> None:
        """Ask `run` to end after what it is doing; may be called from any thread or a signal handler."""
        self._stopping.set()

    def run(self) -> Status:
        """Run the job. Returns its status: `done`, or `stopped` when it was asked to stop. Raises `EdgewiseError`."""
        job = self._job
        with ExitStack() as stack:
            self._prepare(stack)
            security = self._security()
            self._broker = Broker(
                job.state / "broker", job.broker, demo=self._demo, kind=self._broker_kind, security=security
            )
            url = self._broker.start()
            stack.callback(self._broker.stop)
            with self._journal.transaction():
                self._journal.set_meta("broker", self._broker.description)
            self._link = Link(
                url,
                INGEST,
                on_event=self._inbox.put,
                manual_ack=True,
                session_expiry=SESSION_EXPIRY,
                tls=None if security is None else security.aggregator,
            )
            stack.callback(self._link.close)
            self._resume()
            if job.blobs.port and security is not None:
                server = BlobServer(
                    job.broker.address,
                    job.blobs.port,
                    security.folder,
                    find=self._find_blob,
                    served=self._note_served,
                )
                server.start()
                stack.callback(server.stop)
            self._link.connect()
            self._loop()
            self._flush_traffic(self._rounds.round)
            status = self._journal.status(job.rounds)
            if self._finished:
                text = json.dumps(status.to_json(), indent=1, sort_keys=True) + "\n"
                _write(job.state / SUMMARY_FILE, text.encode())
            else:
                status = replace(status, state="stopped")
        if self._on_progress is not None:
            self._on_progress(status)
        return status

    def _security(self) -> Security | None:
        job = self._job
        if job.security.folder is None:
            return None

        def roles() -> str:
            return initial_config(job.prefix, job.site, Registry.load(job.devices.registry).active)

        return Security(job.security.folder, roles)

    def _prepare(self, stack: ExitStack) -> None:
        job = self._job
        try:
            job.state.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{job.state}: the state folder cannot be made ({error.strerror})") from error
        release = None if job.keys.release is None else VerifyKey.load(job.keys.release)
        self._bundle = stack.enter_context(Bundle.open(job.bundle, release_key=release, unpack_to=job.state / "bundle"))
        check_against(job, self._bundle)
        self._program = self._bundle.program(job.program)
        self._key = SigningKey.load(job.keys.control)
        self._registry, self._registry_seen = Registry.load(job.devices.registry), _stamp(job.devices.registry)
        identity = Identity(site=job.site, job=job.job, bundle=self._bundle.digest, program=job.program)
        self._journal = Journal(job.state, identity)
        stack.callback(self._journal.close)
        self._blobs = BlobStore(job.state / "blobs")
        self._fold = fold.Fold(job, self._bundle, self._journal, self._blobs)
        for note in self._fold.assigner.notes:
            log.warning("%s", note)
        self._settings = rounds.Settings(
            rounds=job.rounds,
            nonce=self._journal.nonce,
            quorum=job.round.quorum,
            minimum=job.round.minimum,
            deadline_ms=round(job.round.deadline_seconds * 1000),
            devices_wait=job.round.devices_wait,
            evaluate_share=job.round.evaluate_share,
            evaluates=job.gate.enabled and self._program.evaluate is not None,
            buffer=job.round.buffer,
            max_staleness=job.round.max_staleness,
        )
        saved = self._journal.rounds_state()
        if saved is None:
            self._rounds = rounds.initial(self._settings, self._blobs.put(self._bundle.start_blob(self._program)))
        else:
            self._rounds = rounds.from_json(self._settings, saved)
        self._clock = GatewayClock(floor=self._rounds.phase_opened)
        limits = intake.Limits(
            update_bytes=job.limits.update_bytes,
            chunk=wire.CHUNK,
            window=wire.WINDOW,
            open_uploads=job.limits.open_uploads,
            part_bytes=job.limits.part_bytes,
            offers_per_minute=job.limits.offers_per_minute,
        )
        self._intake = intake.initial(limits, self._journal.nonce)
        self._address = wire.Address(job.prefix, job.site, job.job)
        self._boot = secrets.token_hex(8)

    def _resume(self) -> None:
        """Bring the machines to where the journal says they were."""
        now = self._clock.now()
        self._record = self._journal.round(self._rounds.round)
        state = self._rounds
        events: list[_Input] = [
            intake.Restarted(now, tuple(self._journal.offers()), tuple(self._journal.presences())),
            intake.PhaseOpened(now, self._public()),
        ]
        if state.phase in rounds.OPEN:
            events.append(self._still_issued(state.phase, state.tasks, state.phase_deadline))
        if state.carried:
            events.append(self._still_issued(rounds.Phase.TRAIN, state.carried, state.deadline))
        with self._journal.transaction():
            self._journal.publish(self._address.job_topic, self._sign(self._job_manifest()), None)
            self._journal.save_rounds_state(rounds.to_json(state))
        self._process([*events, rounds.Restarted(now)])
        present = {device for device, presence in self._intake.presence.items() if presence.online}
        self._shut_out(sorted(present - set(self._registry.active)))
        self._discard(_discarding(self._registry))

    def _loop(self) -> None:
        while not self._stopping.is_set() and not self._is_over():
            events = self._collect()
            self._watch_registry()  # before the first word of a device that has just been entered is read
            self._handle(events)
            if self._work and not self._blocked:
                self._do(self._work.popleft())
            self._send()
            self._tick()
            if self._broker.failure is not None:
                raise self._broker.failure

    def _is_over(self) -> bool:
        """Whether the job is done and everything it had to say is said."""
        if not self._finished or self._work or self._blocked:
            return False
        silent = time.monotonic() - self._heard
        waiting = any(p.online and p.entries for p in self._intake.presence.values())
        settled = not self._intake.uploads and not waiting and not self._outbox and self._link.pending == 0
        return silent > (LINGER_SECONDS if settled else LINGER_LIMIT)

    # Messages in, one transaction, receipts, effects.

    def _collect(self) -> list[LinkEvent]:
        """Up to a batch of what the link delivered; waits a moment if there is nothing to do."""
        events: list[LinkEvent] = []
        wait = 0.0 if self._work and not self._blocked else 0.05
        try:
            events.append(self._inbox.get(timeout=wait) if wait else self._inbox.get_nowait())
            while len(events) < BATCH:
                events.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return events

    def _handle(self, events: list[LinkEvent]) -> None:
        messages: list[Message] = []
        for event in events:
            if isinstance(event, Message):
                messages.append(event)
                continue
            self._take(messages)
            messages = []
            self._on_link(event)
        self._take(messages)

    def _take(self, messages: list[Message]) -> None:
        """Handle messages and receipt them: after the commit, or after they were answered without one."""
        self._process(messages)
        if any("/up/chunk/" in message.topic for message in messages):
            faults.point("A4")
        if self._blocked:
            # Chunks that could not be stored are asked for again; statuses are held.
            log.debug("%d messages were answered without the disk", len(messages))
        for message in messages:
            self._link.ack(message)

    def _on_link(self, event: LinkEvent) -> None:
        if isinstance(event, LinkUp):
            log.log(logging.WARNING if self._told_down else logging.INFO, "connected to the broker")
            self._told_down = False
            again = self._subscribed
            # Whatever the broker says of a session: it may be one of an attempt whose answer was lost.
            self._attempt(lambda: self._link.subscribe(self._address.aggregator_subscriptions()))
            self._subscribed = True
            self._outbox.clear()
            for topic, payload, expires in self._journal.published():
                self._queue_retained(topic, payload, expires)
            if again:
                self._process([intake.LinkRestored(self._clock.now())])
        elif isinstance(event, LinkDown):
            if not self._told_down:
                log.warning("no connection to the broker: %s; trying again until it answers", event.reason)
                self._told_down = True
            self._reconnect_at = time.monotonic() + random.uniform(0.1, 1.0)  # noqa: S311 - jitter

    def _process(self, items: Iterable[_Input]) -> bool:
        """Run a batch through the machines, commit it, carry out the rest. False if the disk is full."""
        items = list(items)
        if not items:
            return True
        if self._blocked:
            self._without_disk(items)
            return False
        saved = _Saved(self._rounds, self._intake, self._record, self._deadline, self._traffic)
        out: list[_Outward] = []
        try:
            with self._journal.transaction():
                for item in items:
                    self._dispatch(item, out)
                if self._rounds is not saved.rounds:
                    self._journal.save_rounds_state(rounds.to_json(self._rounds))
                if self._record is not None and self._record is not saved.record:
                    self._journal.save_round(self._record)
        except DiskFullError as error:
            self._go_back(saved)
            self._block(error)
            self._without_disk(items)
            return False
        except EdgewiseError:
            raise
        except Exception:
            self._go_back(saved)
            if len(items) > 1:  # find out which it was
                done = [self._process([item]) for item in items]
                return all(done)
            if not isinstance(items[0], Message):
                raise  # ours
            log.exception("a message to %s could not be handled", items[0].topic)
            return self._spoilt(items[0])
        for effect in out:
            self._carry_out(effect)
        return True

    def _go_back(self, saved: _Saved) -> None:
        self._rounds, self._intake = saved.rounds, saved.intake
        self._record, self._deadline = saved.record, saved.deadline
        self._traffic = saved.traffic

    def _spoilt(self, message: Message) -> bool:
        """A message that no check refuses and that cannot be handled all the same: it costs its sender, not the job."""
        parsed = self._address.parse(message.topic)
        device = "" if parsed is None or parsed.device is None else parsed.device
        return self._process(
            [_Alarmed("unhandled_message", device, f"{len(message.payload)} bytes to {message.topic}")]
        )

    def _dispatch(self, item: _Input, out: list[_Outward]) -> None:
        if isinstance(item, Message):
            self._heard = time.monotonic()
            event = self._understand(item)
            if event is not None:
                self._intake_step(event, out, item.payload)
        elif isinstance(item, intake.Event):
            self._intake_step(item, out)
        elif isinstance(item, rounds.Event):
            self._rounds_step(item, out)
        else:
            self._result(item, out)

    def _understand(self, message: Message) -> intake.Event | None:
        """A message as an event, None for one that is refused: it costs its sender, not us."""
        parsed = self._address.parse(message.topic)
        if parsed is None or parsed.device is None:
            return None
        device, now, payload = parsed.device, self._clock.now(), message.payload
        key = self._key_of(device)
        if key is None:
            return None
        self._count(device, up=len(message.topic) + len(payload))
        try:
            match parsed.kind:
                case "status" if payload:
                    status = wire.decode(wire.Status, payload, address=self._address, device=device)
                    return intake.StatusSeen(now, device, status)
                case "offer":
                    return self._understand_offer(device, payload, key, now)
                case "chunk" if parsed.ingest == INGEST and parsed.upload is not None and parsed.index is not None:
                    return intake.ChunkArrived(now, device, parsed.upload, parsed.index, len(payload))
                case "fetch":
                    fetch = wire.decode(wire.Fetch, payload, address=self._address, device=device)
                    size = self._blobs.size(fetch.digest)
                    return intake.FetchAsked(now, device, fetch.digest, fetch.ranges, size)
                case "reply":
                    reply = wire.decode(wire.Reply, payload, address=self._address, device=device)
                    log.info("%s answers command %s: %s %s", device, reply.to, reply.ok, reply.detail)
        except wire.WireError as error:
            log.warning("a message of %s was refused: %s", device, error)
        return None

    def _understand_offer(
        self, device: str, payload: bytes, key: VerifyKey, now: int
    ) -> intake.Offered | intake.OfferedUnreadably:
        signed = True
        try:
            offer = wire.decode(wire.Offer, payload, address=self._address, device=device, key=key)
        except wire.WireError as error:
            upload = wire.upload_of(payload) if error.reason == "unsupported_version" else None
            if upload is not None:
                told = f"version {error.found} of the protocol, this gateway speaks {wire.VERSION}"
                return intake.OfferedUnreadably(now, device, upload, told)
            if error.reason != "bad_signature":
                raise
            signed = False
            offer = wire.decode(wire.Offer, payload, address=self._address, device=device)
        self._digests[offer.upload] = offer.digest
        while len(self._digests) > _DIGESTS_KEPT:
            self._digests.popitem(last=False)
        return intake.Offered(
            now,
            device,
            offer,
            signed,
            recorded=self._journal.recorded(device, offer.outbox_id, offer.seq),
            floor=self._journal.floor(device, offer.outbox_id),
            answered=self._journal.answered(device, offer.task),
        )

    def _key_of(self, device: str) -> VerifyKey | None:
        """The key of a device in the registry; None, and one line in the log, for a stranger."""
        key = self._registry.key(device)
        if key is None and device not in self._strangers and len(self._strangers) < _STRANGERS_TOLD:
            self._strangers.add(device)
            log.warning("device %r is not in %s, or revoked: it is not heard", device, self._job.devices.registry)
        return key

    def _intake_step(self, event: intake.Event, out: list[_Outward], payload: bytes = b"") -> None:
        self._intake, effects = intake.step(self._intake, event)
        for effect in effects:
            if isinstance(effect, intake.Durable):
                self._write(effect, payload, out)
            elif isinstance(effect, intake.SendCommand):
                out.append(_Command(effect, self._journal.next_counter(effect.device, event.now)))
            else:
                out.append(effect)

    def _write(self, effect: intake.Durable, payload: bytes, out: list[_Outward]) -> None:
        journal, now = self._journal, self._clock.now()
        match effect:
            case intake.StoreOffer(upload):
                faults.point("A1")
                journal.store_offer(upload)
            case intake.StoreChunk(device, upload_name, index):
                faults.point("A3")
                journal.store_chunk(device, upload_name, index, payload)
            case intake.DropParts(upload):
                journal.drop_parts(upload.device, upload.upload)
                journal.store_offer(upload)
            case intake.DropOffer(device, upload_name):
                journal.drop_offer(device, upload_name)
            case intake.Accept(upload, norm, evidence):
                journal.accept(upload, norm=norm, now=now)
                if evidence is not None:
                    # A program of another rank starts from a slice: the evidence is on the model, not on the slice.
                    model = self._rounds.candidate or self._rounds.model
                    journal.add_evidence(model, upload.device, upload.task, *evidence)
                faults.point("A6")
                log.info("round %d: %s update of %s accepted", upload.round, upload.phase, upload.device)
            case intake.Refuse(device, upload_name, reason, detail):
                journal.refuse(device, upload_name, self._rounds.round, reason, detail, now)
                log.warning("update %s of %s refused: %s: %s", upload_name, device, reason, detail)
            case intake.Alarm(kind, device, detail):
                journal.raise_alarm(kind, device, detail, now)
                log.warning("alarm %s, device %s: %s", kind, device or "-", detail)
            case intake.SavePresence(presence):
                journal.save_presence(presence)
            case intake.Tell(event):
                self._rounds_step(event, out)
            case intake.ClearRetained(device):
                for topic in (self._address.assign(device), self._address.status(device)):
                    self._retain(topic, b"", None, out)

    def _rounds_step(self, event: rounds.Event, out: list[_Outward]) -> None:
        before = self._rounds.tasks
        self._rounds, effects = rounds.step(self._rounds, event)
        training = self._rounds.phase is rounds.Phase.TRAIN and self._rounds.tasks is not before
        if training and self._record is not None and self._record.round == self._rounds.round:
            self._note_tasks()
        for effect in effects:
            self._apply(effect, out)

    def _note_tasks(self) -> None:
        assert self._record is not None
        tasks = self._rounds.tasks
        declined = {d: held.reason for d, held in tasks.items() if held.answer is rounds.Answer.DECLINED}
        self._record = replace(self._record, assigned=sorted(tasks), declined=declined)

    def _apply(self, effect: rounds.Effect, out: list[_Outward]) -> None:
        journal, keep = self._journal, self._job.journal.keep_updates
        match effect:
            case rounds.SetDeadline(at):
                self._deadline = at
            case rounds.OpenPhase():
                self._open_phase(effect, out)
            case rounds.IssueTasks():
                self._issue(effect, out)
            case rounds.WithdrawTasks(devices):
                for device in devices:
                    self._retain(self._address.assign(device), b"", None, out)
            case rounds.ClosePhase(number, phase, kept, declined):
                if phase is rounds.Phase.TRAIN and self._record is not None:
                    self._record = replace(self._record, declined=declined)
                if phase is rounds.Phase.MEASURE:  # its evidence stands from now on
                    journal.mark_merged(journal.updates(number, phase), number, keep_bodies=keep)
                self._intake_step(intake.PhaseClosed(self._clock.now(), kept), out)
            case rounds.SetAside(number, phase, reason):
                trained = phase is rounds.Phase.TRAIN
                rows = journal.unmerged(number) if trained else journal.updates(number, phase)
                journal.set_aside(rows, reason, keep_bodies=keep)
            case rounds.LeaveOut(device, task, reason):
                row = journal.row_of_task(device, task)
                if row is not None:
                    journal.set_aside([row], reason, keep_bodies=keep)
            case rounds.Discard(device):
                journal.set_aside(journal.unmerged_of(device), "revoked", keep_bodies=keep)
            case rounds.FinishRound():
                self._finish_round(effect)
                out.append(effect)
            case rounds.FinishJob():
                self._announce(self._rounds.deadline, out)
                out.append(effect)
            case _:
                out.append(effect)

    def _open_phase(self, effect: rounds.OpenPhase, out: list[_Outward]) -> None:
        if self._record is None or self._record.round != effect.round:
            self._record = RoundRecord(
                round=effect.round,
                program=self._program.id,
                opened=effect.opened,
                start=effect.start,
                phase=effect.phase,
            )
        self._record = replace(self._record, phase=effect.phase.value)
        if effect.phase is rounds.Phase.TRAIN:
            self._note_tasks()
        self._announce(effect.deadline, out)
        log.info("round %d: %s with model %s", effect.round, effect.phase, effect.start[:12])

    def _announce(self, deadline: int, out: list[_Outward]) -> None:
        """The round manifest: it names the accepted model, which every device may fetch and serve with."""
        state, now = self._rounds, self._clock.now()
        manifest = wire.RoundManifest(
            **self._common(),
            round=state.round,
            base=self._bundle.base,
            model=state.model,
            model_bytes=self._blobs.size(state.model) or 0,
            opened=state.opened,
            deadline=deadline,
            now=now,
            quorum=self._settings.quorum or max(1, len(state.tasks)),
            staleness=self._settings.max_staleness,
        )
        self._retain(self._address.round_topic, self._sign(manifest), None, out)
        self._intake_step(intake.PhaseOpened(now, self._public()), out)

    def _public(self) -> frozenset[str]:
        return frozenset({self._rounds.model, self._rounds.candidate or self._rounds.model})

    def _issue(self, effect: rounds.IssueTasks, out: list[_Outward]) -> None:
        if effect.phase is rounds.Phase.TRAIN:
            self._choose(effect.round, sorted(effect.tasks))
        refactorises = self._fold.merger(effect.round).refactorises
        for device, task_id in sorted(effect.tasks.items()):
            program = self._fold.program(effect.round, effect.phase, device)
            assigned = assign(self._job, program, effect.round, [device], refactorises=refactorises)
            task = self._task(effect, task_id, program, assigned[device])
            self._retain(self._address.assign(device), self._sign(task, device), effect.deadline, out)
        tasks = dict(effect.tasks)
        self._intake_step(self._issued(effect.round, effect.phase, effect.start, effect.deadline, tasks), out)

    def _choose(self, number: int, devices: Sequence[str]) -> None:
        """Ask the assigner what these devices train, and write the answer down before anything follows from it."""
        assert self._record is not None
        journal, now = self._journal, self._clock.now()
        saved = json.loads(journal.meta(_ASSIGNER) or "null") or {"row": 0, "state": None}
        last, rows = journal.accepted_since(saved["row"])
        records = {number: journal.round(number) for number in {row.round for row, _ in rows}}
        question = Question(
            number=number,
            rounds=self._job.rounds + self._rounds.uncounted,
            devices=devices,
            present=self._rounds.online.union(devices),
            worked=[_work_of(row, records[row.round], accepted) for row, accepted in rows],
            loss=self._fold.validation_loss(number - 1),
        )
        answer = self._fold.assigner.answer(saved["state"], question)
        told = {device: (program, answer.reasons.get(device, ""), now) for device, program in answer.programs.items()}
        self._record = replace(self._record, programs={**self._record.programs, **told})
        journal.save_round(self._record)
        journal.set_meta(_ASSIGNER, json.dumps({"row": last, "state": answer.state}))

    def _task(self, effect: rounds.IssueTasks, task_id: str, program: Program, assigned: Assignment) -> wire.Task:
        start = self._fold.start_of(effect.round, effect.start, program)
        return wire.Task(
            **self._common(),
            task=task_id,
            round=effect.round,
            program=program.id,
            start=start,
            start_bytes=self._blobs.size(start) or 0,
            base=self._bundle.base,
            deadline=effect.deadline,
            now=self._clock.now(),
            steps=assigned.steps,
            epochs=assigned.epochs,
            batch_size=assigned.batch_size,
            learning_rate=assigned.learning_rate,
            hyper=assigned.hyper,
            seed=assigned.seed,
            encoding=assigned.encoding.to_map(),
        )

    def _issued(
        self, number: int, phase: rounds.Phase, start: str, deadline: int, tasks: dict[str, str]
    ) -> intake.TasksIssued:
        issued = {}
        for device, task in tasks.items():
            program = self._fold.program(number, phase, device)
            issued[device] = intake.IssuedTask(
                task=task,
                round=number,
                phase=phase.value,
                start=self._fold.start_of(number, start, program),
                base=self._bundle.base,
                update_bytes=max_update_bytes(program, self._bundle.tensors),
                deadline=deadline,
            )
        return intake.TasksIssued(self._clock.now(), MappingProxyType(issued))

    def _still_issued(
        self, phase: rounds.Phase, tasks: Mapping[str, rounds.TaskState], deadline: int
    ) -> intake.TasksIssued:
        """Tasks that a restored state holds open, each of its own round."""
        issued: dict[str, intake.IssuedTask] = {}
        for device, held in tasks.items():
            found = self._issued(held.round, phase, held.model, deadline, {device: held.task})
            issued |= found.tasks
        return intake.TasksIssued(self._clock.now(), MappingProxyType(issued))

    def _retain(self, topic: str, payload: bytes, expires: int | None, out: list[_Outward]) -> None:
        self._journal.publish(topic, payload, expires)
        out.append(_Retained(topic, payload, expires))

    def _result(self, item: _Result, out: list[_Outward]) -> None:
        now, journal, keep = self._clock.now(), self._journal, self._job.journal.keep_updates
        match item:
            case _Merged(effect, folded):
                journal.mark_merged(folded.rows, effect.round, keep_bodies=keep)
                if self._record is not None:
                    self._record = replace(
                        self._record, candidate=folded.candidate, merge=folded.report, metrics=folded.metrics
                    )
                for alarm in folded.alarms:
                    journal.raise_alarm(alarm.kind, "", alarm.detail, now)
                    log.warning("alarm %s: %s", alarm.kind, alarm.detail)
                self._rounds_step(rounds.Merged(now, folded.candidate), out)
            case _MergeRefused(effect, reason):
                log.error("round %d: the merge failed: %s", effect.round, reason)
                self._rounds_step(rounds.MergeFailed(now, reason), out)
            case _Judged(effect, verdict):
                if self._record is not None:
                    self._record = replace(
                        self._record,
                        score_before=verdict.before,
                        score_after=verdict.after,
                        evidence=verdict.evidence,
                        validation_before=verdict.validation_before,
                        validation_after=verdict.validation_after,
                    )
                rows = journal.updates(effect.round, rounds.Phase.EVALUATE)
                journal.mark_merged(rows, effect.round, keep_bodies=keep)
                self._rounds_step(rounds.Judged(now, verdict.accepted, verdict.reason), out)
            case _Alarmed(kind, device, detail):
                journal.raise_alarm(kind, device, detail, now)

    def _finish_round(self, effect: rounds.FinishRound) -> None:
        self._flush_traffic(effect.round)
        self._journal.prune_evidence([effect.model])
        if self._record is not None:
            record = replace(
                self._record,
                phase="closed",
                closed=self._clock.now(),
                outcome=effect.outcome.value,
                reason=effect.reason,
                model=effect.model,
            )
            self._journal.save_round(record)
            self._record = record
        log.info("round %d: %s (%s)", effect.round, effect.outcome, effect.reason or "no reason given")

    # Traffic: payloads and topics of messages.

    def _count(self, device: str, *, up: int = 0, down: int = 0) -> None:
        held = self._traffic.setdefault(device, [0, 0])
        held[0] += up
        held[1] += down

    def _find_blob(self, device: str, digest: str) -> Path | None:
        """For the threads of the blob server, which read the state as it is at this moment."""
        if self._registry.key(device) is None or not intake.may_fetch(self._intake, device, digest):
            return None
        return self._blobs.path(digest)

    def _note_served(self, device: str, count: int) -> None:
        with self._serving:
            self._served[device] += count

    def _flush_traffic(self, number: int) -> None:
        """Store the counts and start new ones; the old ones stay as they are, for a transaction that fails goes back to them."""
        with self._serving:
            served, self._served = self._served, Counter()
        for device, count in served.items():
            self._count(device, down=count)
        for device, (up, down) in self._traffic.items():
            self._journal.add_traffic(number, device, up, down)
        self._traffic = {}

    # What follows a commit.

    def _carry_out(self, effect: _Outward) -> None:
        match effect:
            case _Retained(topic, payload, expires):
                self._queue_retained(topic, payload, expires)
            case intake.SendAck():
                self._send_ack(effect)
            case intake.SendBlobChunk(device, digest, index):
                data = self._blobs.chunk(digest, index, wire.CHUNK)
                if data is not None:
                    topic = self._address.blob(device, digest, index)
                    self._outbox.append(_Outgoing(topic, data, "", device, expiry=BLOB_EXPIRY))
            case rounds.FinishRound():
                self._prune_blobs()
            case _Command(command, counter):
                self._send_command(command, counter)
            case intake.Verify() | rounds.Merge() | rounds.Judge() | rounds.FinishJob():
                self._work.append(effect)
            case _:
                raise AssertionError(f"no one carries out {effect}")

    def _send_ack(self, effect: intake.SendAck) -> None:
        faults.point("A2" if effect.status == "need" else "A7")
        ack = wire.Ack(
            **self._common(),
            upload=effect.upload,
            status=wire.Verdict(effect.status),
            digest=self._digests.get(effect.upload),
            need=effect.need,
            to=INGEST,
            retry_after_ms=effect.retry_after_ms,
            reason=None if effect.reason is None else wire.Reason(effect.reason),
            detail=effect.detail[:64],
            now=self._clock.now(),
        )
        topic = self._address.ack(effect.device)
        self._outbox.append(_Outgoing(topic, self._sign(ack, effect.device), "ack", effect.device, expiry=ACK_EXPIRY))

    def _send_command(self, effect: intake.SendCommand, counter: int) -> None:
        command = wire.Command(
            **self._common(),
            command=wire.Order(effect.command),
            args={"boot": effect.boot, "connection": effect.connection},
            counter=counter,
            now=self._clock.now(),
        )
        topic = self._address.command(effect.device)
        body = self._sign(command, effect.device)
        self._outbox.append(_Outgoing(topic, body, "command", effect.device, expiry=COMMAND_EXPIRY))

    def _queue_retained(self, topic: str, payload: bytes, expires: int | None) -> None:
        expiry = None
        if expires is not None:
            left = (expires - self._clock.now()) // 1000
            if left <= 0:
                payload = b""
            else:
                expiry = int(left)
        parsed = self._address.parse(topic)
        device = "" if parsed is None or parsed.device is None else parsed.device
        kind = "" if parsed is None else parsed.kind
        self._outbox.append(_Outgoing(topic, payload, kind, device, retain=True, expiry=expiry))

    def _send(self) -> None:
        """Hand over what waits, as far as the link's queue takes it."""
        while self._outbox and self._link.pending < QUEUE - 8:
            message = self._outbox[0]
            try:
                self._link.publish(
                    message.topic, message.payload, retain=message.retain, expiry=message.expiry, kind=message.kind
                )
            except TooLarge as error:
                log.error("not sent: %s", error)
            except LinkError as error:
                log.debug("not sent: %s", error)
                return
            self._outbox.popleft()
            if message.device:
                self._count(message.device, down=len(message.topic) + len(message.payload))

    def _attempt(self, send: Callable[[], None]) -> None:
        try:
            send()
        except LinkError as error:
            log.debug("not sent: %s", error)

    def _common(self) -> dict[str, Any]:
        return {"id": secrets.token_hex(8), "boot": self._boot, "at": time.time_ns() // 1_000_000}

    def _sign(self, message: wire.Message, device: str = "*") -> bytes:
        return wire.encode(message, self._key, self._address, device)

    def _job_manifest(self) -> wire.JobManifest:
        limits = self._job.limits
        trained = [self._bundle.program(program_id) for program_id in self._fold.assigner.programs]
        programs = list(dict.fromkeys([p.id for p in trained] + [p.evaluate for p in trained if p.evaluate]))
        return wire.JobManifest(
            **self._common(),
            job=self._job.job,
            bundle=self._bundle.digest,
            base=self._bundle.base,
            table=self._bundle.table_digest,
            programs=tuple(programs),
            limits=wire.Limits(
                update_bytes=limits.update_bytes, offers_per_minute=limits.offers_per_minute, norm=limits.norm
            ),
            key=base64.b64decode(self._key.verify_key.text).hex(),
            blob_port=self._job.blobs.port,
        )

    # Heavy work, one piece at a time.

    def _do(self, work: _Work) -> None:
        try:
            results = self._worked(work)
        except DiskFullError as error:
            self._block(error)
            return
        self._process(results)
        if isinstance(work, rounds.Merge):
            faults.point("A9")

    def _worked(self, work: _Work) -> Sequence[_Input]:
        match work:
            case intake.Verify(upload):
                faults.point("A5")
                if (upload.device, upload.upload) not in self._intake.uploads:
                    return []
                try:
                    checked = self._fold.check(upload, self._rounds.round)
                except fold.BodyRefusedError as refused:
                    now = self._clock.now()
                    return [intake.VerifyFailed(now, upload.device, upload.upload, refused.detail, again=refused.again)]
                now = self._clock.now()
                return [intake.Verified(now, upload.device, upload.upload, checked.norm, checked.evidence)]
            case rounds.Merge(number, model, tasks):
                if self._rounds.phase is not rounds.Phase.MERGE:
                    return []
                try:
                    folded = self._fold.merge(number, model, tasks)
                except StorageError:
                    raise
                except EdgewiseError as error:
                    return [_MergeRefused(work, str(error))]
                faults.point("A8")
                return [_Merged(work, folded)]
            case rounds.Judge(number, model, candidate):
                if self._rounds.phase is not rounds.Phase.JUDGE:
                    return []
                return [_Judged(work, self._fold.judge(number, model, candidate))]
            case rounds.FinishJob(model):
                self._finish_job(model)
                return []

    def _prune_blobs(self) -> None:
        """Delete what neither a device may fetch nor a check, a merge or the gate will read again."""
        state = self._rounds
        held = (*state.tasks.values(), *state.carried.values())
        uploads = [progress.info.start for progress in self._intake.uploads.values()]
        unmerged = [row.start for row in self._journal.unmerged(state.round)]
        starts = [task.start for task in self._intake.tasks.values()]
        self._fold.prune({*self._public(), *uploads, *unmerged, *starts, *(task.model for task in held)}, state.round)

    def _finish_job(self, model: str) -> None:
        target = self._job.state / MODEL_FILE
        _write(target, self._blobs.read(model))
        self._fold.prune({model}, self._rounds.round)
        self._finished = True
        self._heard = time.monotonic()
        log.info("the job is done; its model lies in %s", target)

    # Time, disk, progress.

    def _tick(self) -> None:
        now = time.monotonic()
        if self._deadline is not None and self._clock.now() >= self._deadline:
            self._deadline = None
            self._process([rounds.DeadlinePassed(self._clock.now())])
        if self._reconnect_at is not None and now >= self._reconnect_at:
            self._reconnect_at = None
            self._link.connect()
        if now >= self._certificates_at:
            self._certificates_at = now + CERTIFICATE_SECONDS
            self._watch_certificates()
        if now - self._ticked >= PROBE_SECONDS:
            self._ticked = now
            self._watch_disk()
            self._watch_registry()
            self._process([intake.Ticked(self._clock.now())])
        if self._on_progress is not None and now - self._shown >= PROGRESS_SECONDS:
            self._shown = now
            self._on_progress(self._journal.status(self._job.rounds))

    def _watch_registry(self) -> None:
        """Hear of devices that were admitted or shut out while the job runs."""
        path = self._job.devices.registry
        stamp = _stamp(path)
        if stamp == self._registry_seen or self._blocked:
            return
        self._registry_seen = stamp
        former, discarding = set(self._registry.active), _discarding(self._registry)
        try:
            self._registry = Registry.load(path)
        except RegistryError as error:
            log.error("the devices known before stay: %s", error)
            self._process([_Alarmed("registry", "", f"{error}; the devices known before stay")])
            return
        self._strangers.clear()
        self._shut_out(sorted(former & {name for name in self._registry.ids if self._registry.entries[name].revoked}))
        self._discard(_discarding(self._registry) - discarding)

    def _shut_out(self, devices: Sequence[str]) -> None:
        """Forget what revoked devices have not finished, and clear what the broker retains of theirs."""
        for device in devices:
            log.warning("device %s is revoked: it is heard no more", device)
        self._process([intake.Revoked(self._clock.now(), device) for device in devices])

    def _discard(self, devices: Iterable[str]) -> None:
        """Take out of the open round what revoked devices gave to it."""
        for device in sorted(devices):
            merged = self._journal.has_merged(device, self._rounds.round)
            self._process([rounds.Discarded(self._clock.now(), device, merged)])

    def _watch_certificates(self) -> None:
        """Raise an alarm while there is time to renew what the gateway shows to others."""
        folder = self._job.security.folder
        if folder is None:
            return
        now = dt.datetime.now(dt.UTC)
        for name in (SERVER, wire.AGGREGATOR):
            try:
                held = Issued.read(name, folder / f"{name}.pem")
            except AuthorityError as error:
                log.error("%s", error)
                continue
            if held.due <= now:
                told = f"{name}.pem ends at {held.ends.isoformat(timespec='minutes')}: `edgewise devices renew {name}`"
                log.warning(told)
                self._process([_Alarmed(f"certificate_{name}", "", told)])

    def _watch_disk(self) -> None:
        """Notice a disk that runs full before it is, and one that has room again."""
        usage = shutil.disk_usage(self._job.state)
        reserve = min(1 << 30, usage.total // 10) if self._reserve is None else self._reserve
        short = usage.free < reserve
        if self._blocked:
            if not short and self._can_write():
                self._unblock()
        elif short is not self._intake.storage_full:
            log.warning("%d MB free on %s, %d MB wanted", usage.free >> 20, self._job.state, reserve >> 20)
            self._process([intake.StorageChanged(self._clock.now(), full=short)])

    def _can_write(self) -> bool:
        try:
            with self._journal.transaction():
                self._journal.set_meta("probe", "x" * 262_144)
            with self._journal.transaction():
                self._journal.set_meta("probe", "")
        except DiskFullError:
            return False
        return True

    def _block(self, error: DiskFullError) -> None:
        log.error("nothing can be stored, nothing new is accepted: %s", error)
        self._blocked = True
        self._work.clear()  # asked for again when there is room
        self._intake, _ = intake.step(self._intake, intake.StorageChanged(self._clock.now(), full=True))

    def _unblock(self) -> None:
        log.warning("there is room on the disk again")
        self._blocked = False
        now = self._clock.now()
        held, self._held = list(self._held.values()), {}
        alarm = _Alarmed("disk_full", "", "a transaction had to wait for space; nothing that was accepted is lost")
        restored = [intake.StorageChanged(now, full=False), intake.LinkRestored(now)]
        self._process([alarm, *restored, *held, rounds.Restarted(now)])

    def _without_disk(self, items: Sequence[_Input]) -> None:
        """What can be answered while nothing can be written: offers (`wait`, or a verdict from the ledger), fetches."""
        for item in items:
            if not isinstance(item, Message):
                continue  # timers fire again, work is done again
            event = self._understand(item)
            if isinstance(event, intake.StatusSeen):
                self._held[event.device] = item
            elif isinstance(event, intake.Offered | intake.FetchAsked):
                self._intake, effects = intake.step(self._intake, event)
                for effect in effects:
                    if isinstance(effect, intake.SendAck | intake.SendBlobChunk):
                        self._carry_out(effect)


def _work_of(row: LedgerRow, record: RoundRecord | None, accepted: int) -> Worked:
    program, _, since = ({} if record is None else record.programs).get(row.device, ("", "", accepted))
    return Worked(row.device, program, (accepted - since) / 1000, row.num_examples, row.metrics)


def _write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, also when the power fails. Raises `StorageError`, `DiskFullError`."""
    aside = path.with_suffix(".tmp")
    try:
        write_through(aside, data)
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error(f"{path}: cannot be written ({error.strerror})", error) from error


def _discarding(registry: Registry) -> set[str]:
    return {name for name, entry in registry.entries.items() if entry.revoked and entry.discard_round}


def _stamp(path: Path) -> tuple[int, int]:
    """What shows that a file was replaced; zeros where there is none."""
    try:
        found = path.stat()
    except OSError:
        return (0, 0)
    return (found.st_mtime_ns, found.st_ino)
