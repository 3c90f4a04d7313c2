"""`EdgeDevice`: what an app embeds. It predicts, keeps samples, and trains in the background when the gateway asks.

    with EdgeDevice.open("device.toml") as device:
        device.start()
        scores = device.predict(window)
        device.record(window, label)

Threads: the app's own (`predict`, `record`, ...), one that runs the conversation with the gateway, one that trains, and
paho's. Decisions are made by `edge_sdk.conversation`; this is the shell around it. Training runs between predictions: a
step is the smallest unit, so a prediction never waits for more than one.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import itertools
import logging
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import urlsplit

import numpy as np

from edge_sdk import __version__, faults, wire
from edge_sdk import conversation as talk
from edge_sdk.blob_http import fetch_chunks
from edge_sdk.bundle import Bundle, Program
from edge_sdk.config import DeviceConfig
from edge_sdk.downloads import Downloads
from edge_sdk.errors import BundleError, EdgewiseError, LinkError, StorageError, TaskError, TensorsError
from edge_sdk.keys import SigningKey, VerifyKey
from edge_sdk.link import Link, LinkDown, LinkEvent, LinkUp, Message, Sent, Will
from edge_sdk.outbox import Draft, Outbox
from edge_sdk.runtime import Predictor, RuntimeProfile, StepResult
from edge_sdk.samples import Ids, SampleStore
from edge_sdk.tensors import Array, digest, unpack
from edge_sdk.training import THERMAL_ZONES, Outcome, TaskCancelled, TaskSpec, hottest_zone, run_task
from edge_sdk.update import Encoding, max_update_bytes
from edge_sdk.wire import Address, Paused, WireError

log = logging.getLogger(__name__)
M = TypeVar("M", bound=wire.Message)
T = TypeVar("T")

_INBOX: Final = 64  # messages from the gateway that may wait; chunks of blobs go first, they are asked for again
_LOOK_AGAIN: Final = 2.0  # seconds between looks at temperature and disk while one of them holds training back
_COOLER: Final = 2.0  # degrees below the limit before training goes on
_PATIENCE: Final = 1.0  # seconds that a step waits for predictions to end, so that training is not starved
_FLOOR_STEP: Final = 3600  # seconds between two writes of the time that has certainly passed
_GRACE: Final = 5.0  # seconds for the threads to end


@dataclass(frozen=True)
class DeviceEvent:
    """Something the app may want to know.

    `kind`: online, offline, task_started, task_done, task_cancelled, declined, update_accepted, update_rejected,
    model_changed, fetch_failed, paused, resumed, error.
    """

    kind: str
    detail: str = ""


@dataclass(frozen=True)
class DeviceStatus:
    """Where a device stands. Bytes are payloads and topics since `start`; updates are counted since the store was made.

    `updates_dropped` is 0: an outbox without room makes the device pause and drops nothing.
    """

    device: str
    link: str
    paused: str
    clock: str
    task: str | None
    program: str | None
    step: int
    steps: int
    round: int
    model: str
    samples: int
    sample_bytes: int
    outbox_entries: int
    outbox_bytes: int
    updates_made: int
    updates_accepted: int
    updates_rejected: int
    updates_dropped: int
    bytes_up: int
    bytes_down: int
    temperature: float | None
    refused_messages: int


class EdgeDevice:
    """One device. Open it with `EdgeDevice.open`; safe to use from several threads.

    `on_event` is called with a `DeviceEvent` from a background thread; what it raises is logged and changes nothing.
    `thermal_zones` is where Linux tells temperatures.
    """

    def __init__(
        self,
        config: DeviceConfig,
        *,
        on_event: Callable[[DeviceEvent], None] | None = None,
        thermal_zones: Path = THERMAL_ZONES,
    ) -> None:
        self.config = config
        self.on_event = on_event
        self._thermal_zones = thermal_zones
        with contextlib.ExitStack() as stack:
            self._lock_file = _lock(config.store)
            stack.callback(os.close, self._lock_file)
            release = None if config.release_key is None else VerifyKey.load(config.release_key)
            self._key, self._control = SigningKey.load(config.device_key), VerifyKey.load(config.control_key)
            self._bundle = Bundle.open(config.bundle, release_key=release, unpack_to=config.store / "bundle")
            limits = config.limits
            self._samples = SampleStore(
                config.store / "samples.sqlite", self._bundle.fields, max_bytes=limits.sample_bytes
            )
            stack.callback(self._samples.close)
            self._outbox = Outbox(
                config.store / "outbox.sqlite", max_entries=limits.outbox_entries, max_bytes=limits.outbox_bytes
            )
            stack.callback(self._outbox.close)
            self._downloads = Downloads(config.store / "blobs", self._outbox)
            self._profile = RuntimeProfile(
                threads=limits.threads, cache_bytes=limits.cache_bytes, memory_bytes=limits.memory_bytes
            )
            self._initial = {
                digest(self._bundle.start_blob(program)): program.id
                for program in self._bundle.programs.values()
                if program.infer is not None
            }
            self._servable = _servable(self._bundle, config.program)
            self._model, self._program, tensors = self._stored_model()
            self._predictor = Predictor(self._bundle, self._program, tensors, self._profile)
            stack.pop_all()
        self._address = Address(config.prefix, config.site, config.job)
        self._time_floor = int(self._outbox.meta("time_floor") or 0)
        self._link = Link(config.broker, config.id, on_event=self._took, tls=config.tls, floor=lambda: self._time_floor)
        self._courtesy = _Courtesy()
        self._events: queue.Queue[talk.Event | LinkEvent | None] = queue.Queue()
        self._undone: dict[str, Message | talk.Effect] = {}  # what a full disk prevented, to be done when there is room
        self._timers: list[tuple[float, int, str]] = []
        self._timer_ids: dict[str, int] = {}
        self._numbers = itertools.count()
        self._sent: dict[int, tuple[str, int]] = {}  # mid -> the chunk it carries
        self._blob_port = 0
        self._http: dict[str, _Stream] = {}  # digest -> the blob that comes over HTTPS
        self._http_received = 0  # bytes
        self._state = talk.Conversation(boot=secrets.token_hex(8), seed=secrets.randbits(53))
        self._blob_sizes: dict[str, int] = {}
        self._serve: str | None = None  # digest of the model to serve with, once it is here
        self._lifecycle = threading.Lock()  # around start, stop and close, never while one waits
        self._shift: _Shift | None = None  # of the last start
        self._app_pause = threading.Event()  # two wishes, each taken back only by whoever made it
        self._gateway_pause = threading.Event()
        if self._outbox.meta("paused"):  # the gateway's holds until the gateway ends it, over any restart
            self._gateway_pause.set()
            self._state = replace(self._state, paused=Paused.USER)
        self._progress = (0, 0)
        self._refused = 0
        self._closed = False
        self._released = False
        self._release_later = False  # by the last of the threads, one of which asked for it

    @classmethod
    def open(cls, path: Path | str, *, on_event: Callable[[DeviceEvent], None] | None = None) -> EdgeDevice:
        """Open the device that a `device.toml` describes. Raises `EdgewiseError` naming file and remedy."""
        return cls(DeviceConfig.load(Path(path)), on_event=on_event)

    def predict(self, x: Array | Mapping[str, Array]) -> Array | dict[str, Array]:
        """The model's output for one sample `[*shape]` or a batch `[n, *shape]`; raises `SampleError` for anything else.

        Serves the newest model that the gateway accepted and this device has fetched, the bundle's own before.
        """
        with self._courtesy.serving():
            return self._predictor.predict(x)

    def record(self, x: Array | Mapping[str, Array], y: Any, *, recording: str = "") -> int:
        """Keep one sample with its label or target; returns its id. It never leaves this device.

        `recording` groups samples that follow each other in time: the last part of each group is kept out of training, to
        judge models with. Raises `SampleError` for a sample that does not fit, `StorageError` when the disk is full.
        """
        self._check_open()
        return self._samples.add(x, y, recording=recording)

    def record_many(self, x: Array | Mapping[str, Array], y: Array, *, recording: str = "") -> Ids:
        """Keep a batch `[n, *shape]`, all of it or, when a sample does not fit, none; otherwise as `record`."""
        self._check_open()
        return self._samples.add_many(x, y, recording=recording)

    def has_recording(self, recording: str) -> bool:
        """Whether samples of this recording are stored."""
        self._check_open()
        return self._samples.has(recording)

    def start(self) -> None:
        """Connect and train in the background whenever the gateway asks; after `pause`, go on.

        A pause that the gateway ordered stays until the gateway ends it. Raises `TaskError` if the device is closed, or if
        a callback `on_event` has not yet returned from before the last `stop`.
        """
        self._check_open()
        if self._app_pause.is_set():
            self._app_pause.clear()
            self._look()
        with self._lifecycle:
            former = self._shift
            if former is not None and not former.ending.is_set():
                return
            if former is not None and former.worker.is_alive():
                raise TaskError("this device is still stopping: let on_event return, then start it again")
            counter, waiting = int(self._outbox.meta("counter") or 0), self._queue()
            self._state = talk.Conversation(
                boot=secrets.token_hex(8), seed=secrets.randbits(53), counter=counter, paused=self._state.paused
            )
            self._shift = shift = _Shift(self._run, self._train)
            shift.worker.start()
            shift.trainer.start()
            self._put(talk.Started(_now(), waiting))
        if self._state.paused is not Paused.NONE:
            self._look()

    def pause(self) -> None:
        """Train no further until `start`; a task that runs stops after its present step. Predictions and uploads go on."""
        self._check_open()
        self._app_pause.set()
        self._look()

    def stop(self) -> None:
        """End training after the present step, say goodbye, disconnect. `start` begins anew.

        From `on_event` it returns at once and the device stops when the callback has returned; otherwise it waits, at
        most some seconds.
        """
        with self._lifecycle:
            shift = self._shift
            if shift is None:
                return
            if not shift.ending.is_set():
                shift.ending.set()
                shift.tasks.put(None)
                self._put(talk.Stop(_now()))
                self._events.put(None)
        if shift.is_mine():
            return
        shift.worker.join(_GRACE)
        shift.trainer.join(_GRACE)
        self._link.close()

    def close(self) -> None:
        """Stop and close all files; from `on_event`, when the callback has returned. May be called twice."""
        with self._lifecycle:
            if self._closed:
                return
            self._closed = True
            self._release_later = self._shift is not None and self._shift.is_mine()
        self.stop()
        if not self._release_later:
            self._release()

    @property
    def _present(self) -> _Shift:
        assert self._shift is not None
        return self._shift

    def _release(self) -> None:
        with self._lifecycle:
            if self._released:
                return
            self._released = True
        self._samples.close()
        self._outbox.close()
        self._bundle.close()
        os.close(self._lock_file)

    def _check_open(self) -> None:
        if self._closed:
            raise TaskError("this device is closed: open it again")

    def status(self) -> DeviceStatus:
        """Where this device stands. Raises `TaskError` once it is closed."""
        self._check_open()
        state, waiting = self._state, self._outbox.summary()
        step, steps = self._progress
        return DeviceStatus(
            device=self.config.id,
            link=state.link,
            paused=state.paused,
            clock=self._clock(),
            task=None if state.task is None else state.task.task,
            program=None if state.task is None else state.task.program,
            step=step,
            steps=steps,
            round=state.round,
            model=self._model,
            samples=len(self._samples),
            sample_bytes=self._samples.bytes,
            outbox_entries=waiting.entries,
            outbox_bytes=waiting.bytes,
            updates_made=waiting.made,
            updates_accepted=waiting.accepted,
            updates_rejected=waiting.rejected,
            updates_dropped=waiting.dropped,
            bytes_up=self._link.bytes_sent,
            bytes_down=self._link.bytes_received + self._http_received,
            temperature=hottest_zone(self._thermal_zones),
            refused_messages=self._refused,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # The thread of the conversation.

    def _took(self, event: LinkEvent) -> None:
        """From paho's thread: enqueue and nothing else. A flood of blob chunks is cut; they will be asked for again."""
        if isinstance(event, Message) and self._events.qsize() >= _INBOX and _is_blob(event):
            return
        self._events.put(event)

    def _put(self, event: talk.Event) -> None:
        self._events.put(event)

    def _run(self, shift: _Shift) -> None:
        self._converse()
        for stream in self._http.values():
            stream.over.set()
        self._link.close()
        self._leave(shift)

    def _leave(self, shift: _Shift) -> None:
        """At the end of each thread: a callback may have left the closing to the last."""
        with self._lifecycle:
            shift.present -= 1
            last = shift.present == 0
        if last and self._release_later:
            self._release()

    def _converse(self) -> None:
        while True:
            self._guarded(self._fire)  # also while events never cease
            timeout = max(0.0, self._timers[0][0] - _now()) if self._timers else None
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                continue
            if event is None:
                return
            self._guarded(self._handle, event)

    def _guarded(self, act: Callable[..., None], *arguments: Any) -> None:
        """Nothing that goes wrong here may end the thread: the next event may mend it."""
        try:
            act(*arguments)
        except StorageError as error:
            self._held_disk(error)
        except Exception as error:
            log.exception("%s: an event could not be handled", self.config.id)
            self._tell("error", f"{type(error).__name__}: {error}")

    def _handle(self, event: talk.Event | LinkEvent) -> None:
        match event:
            case Message():
                self._message(event)
            case LinkUp():
                self._advance(talk.LinkUp(_now(), event.session_present, event.receive_max))
            case LinkDown():
                self._sent.clear()
                self._advance(talk.LinkDown(_now(), event.reason))
            case Sent():
                chunk = self._sent.pop(event.mid, None)
                if chunk is not None:
                    self._advance(talk.ChunkSent(_now(), *chunk))
                    if self._state.upload is not None and self._state.upload.stage is talk.Stage.WAITING:
                        faults.point("D5")
            case _Streamed():
                self._streamed(event)
            case _StreamEnded():
                self._stream_ended(event)
            case _Look():
                self._set_timer("look", _LOOK_AGAIN)
            case _OutboxGrew():
                self._advance(talk.OutboxChanged(_now(), self._queue()))
            case _:
                self._advance(event)

    def _advance(self, event: talk.Event) -> None:
        self._state, effects = talk.step(self._state, event)
        for effect in effects:
            self._perform(effect)

    def _perform(self, effect: talk.Effect) -> None:
        """Carry out an effect; one that fails does not keep the others from happening. A full disk is tried again."""
        try:
            self._carry_out(effect)
        except StorageError as error:
            self._undone[repr(effect)] = effect
            self._held_disk(error)
        except Exception as error:
            log.exception("%s: %s could not be done", self.config.id, type(effect).__name__)
            self._tell("error", f"{type(error).__name__}: {error}")
            if isinstance(effect, talk.Connect):
                self._put(talk.LinkDown(_now(), str(error)))  # or nobody would try again

    def _do_undone(self) -> None:
        """Once more what a full disk prevented."""
        undone, self._undone = self._undone, {}
        for item in undone.values():
            if isinstance(item, Message):
                self._message(item)
            else:
                self._perform(item)
        if undone:
            self._advance(talk.OutboxChanged(_now(), self._queue()))

    def _fire(self) -> None:
        now = _now()
        while self._timers and self._timers[0][0] <= now:
            _, number, name = heapq.heappop(self._timers)
            if self._timer_ids.get(name) == number:
                del self._timer_ids[name]
                if name == "look":
                    self._do_undone()
                    self._look()
                else:
                    self._advance(talk.TimerFired(now, name))

    def _set_timer(self, name: str, delay: float) -> None:
        number = next(self._numbers)
        self._timer_ids[name] = number
        heapq.heappush(self._timers, (_now() + delay, number, name))

    def _carry_out(self, effect: talk.Effect) -> None:
        match effect:
            case talk.Connect():
                self._link.connect(Will(self._address.status(self.config.id), self._status(wire.State.OFFLINE, None)))
            case talk.Disconnect():
                self._settle()
                self._link.disconnect()
            case talk.Subscribe():
                self._try(lambda: self._link.subscribe(self._address.device_subscriptions(self.config.id)))
            case talk.PublishStatus(state, declined):
                body = self._status(state, declined)
                self._publish(self._address.status(self.config.id), body, "status", retain=True)
            case talk.PublishOffer(upload):
                self._offer(upload)
            case talk.PublishFetch(name, ranges):
                fetch = wire.Fetch(**self._common(), digest=name, ranges=ranges)
                self._publish(self._address.fetch(self.config.id), self._encode(fetch), "fetch", expiry=30)
            case talk.FetchHttp(name, size, ranges):
                if name in self._http:  # of a task that was cleared: its end is not that of this one
                    self._http[name].over.set()
                self._http[name] = stream = _Stream()
                arguments = (stream, name, size, ranges)
                threading.Thread(target=self._stream, args=arguments, name="edgewise-http", daemon=True).start()
            case talk.PublishReply(to, ok, detail):
                reply = wire.Reply(**self._common(), to=to, ok=ok, detail=detail)
                self._publish(self._address.reply(self.config.id), self._encode(reply), "reply", expiry=60)
            case talk.SendChunk(upload, index, to):
                self._send_chunk(upload, index, to)
            case talk.VerifyBlob(name):
                self._verify(name)
            case talk.StartTask(task):
                self._present.tasks.put(task)
                self._tell("task_started", f"{task.program} of round {task.round}")
            case talk.CancelTask(task):
                self._present.cancelled.add(task)
            case talk.DeleteEntry(upload, fate):
                if fate == "accepted":
                    faults.point("D6")
                self._outbox.delete(upload, fate)
                faults.point("D7")
            case talk.Quarantine(upload, reason):
                log.error("%s: the gateway found update %s %s; its offer is kept", self.config.id, upload, reason)
                self._outbox.quarantine(upload, reason)
            case talk.SaveCounter(counter):
                self._outbox.set_meta("counter", str(counter))
            case talk.SetPaused(paused):
                self._undone.pop(repr(talk.SetPaused(not paused)), None)
                (self._gateway_pause.set if paused else self._gateway_pause.clear)()
                self._look()
                self._outbox.set_meta("paused", "gateway" if paused else "")
            case talk.SetTimer(name, delay):
                self._set_timer(name, delay)
            case talk.CancelTimer(name):
                self._timer_ids.pop(name, None)
            case talk.Notify(kind, detail):
                self._tell(kind, detail)

    def _settle(self) -> None:
        """Let the goodbye reach the broker."""
        until = _now() + 1.0
        while self._link.pending and _now() < until:
            time.sleep(0.01)

    def _tell(self, kind: str, detail: str = "") -> None:
        log.info("%s: %s %s", self.config.id, kind, detail)
        if self.on_event is not None:
            try:
                self.on_event(DeviceEvent(kind, detail))
            except Exception:
                log.exception("on_event failed for %s", kind)

    # What comes from the gateway.

    def _message(self, message: Message) -> None:
        parsed = self._address.parse(message.topic)
        if parsed is None or parsed.device not in (None, self.config.id):
            self._refuse(f"topic {message.topic}")
            return
        self._undone.pop(message.topic, None)  # a newer one replaces it
        try:
            self._understand(parsed, message)
        except WireError as error:
            self._refuse(f"{parsed.kind}: {error}")
        except StorageError as error:
            if not _is_blob(message):  # a chunk is asked for again
                self._undone[message.topic] = message
            self._held_disk(error)

    def _refuse(self, what: str) -> None:
        self._refused += 1
        log.warning("%s: a message was refused: %s", self.config.id, what[:300])

    def _understand(self, parsed: wire.Parsed, message: Message) -> None:
        now, payload = _now(), message.payload
        match parsed.kind:
            case "blob":
                self._chunk(parsed, payload)
            case "task" if not payload:
                self._advance(talk.TaskCleared(now))
            case "task":
                self._task(self._decode(wire.Task, payload, self.config.id))
            case "ack":
                self._advance(talk.AckReceived(now, self._decode(wire.Ack, payload, self.config.id)))
            case "command":
                command = self._decode(wire.Command, payload, self.config.id)
                if not message.retain:
                    self._note_time(command.now // 1000)
                    self._advance(talk.CommandReceived(now, command))
            case "round" if payload:
                self._round(self._decode(wire.RoundManifest, payload, "*"))
            case "job" if payload:
                job = self._decode(wire.JobManifest, payload, "*")
                self._blob_port = job.blob_port
                self._advance(talk.HttpOffered(now, job.blob_port > 0 and self.config.tls is not None))
                if job.base != self._bundle.base:
                    detail = f"the job trains base {job.base[:12]}, this bundle has {self._bundle.base[:12]}"
                    self._tell("error", f"{detail}: flash the bundle of the job")

    def _clock(self) -> wire.Clock:
        known = self._state.clock
        below = known is wire.Clock.UNSET and time.time() < self._time_floor
        return wire.Clock.FLOOR if below else known

    def _note_time(self, seconds: int) -> None:
        """Keep the gateway's time (Unix seconds): it has passed, whatever this device's clock says after a restart."""
        if seconds >= self._time_floor + _FLOOR_STEP:
            self._outbox.set_meta("time_floor", str(seconds))
            self._time_floor = seconds

    def _decode(self, kind: type[M], payload: bytes, device: str) -> M:
        return wire.decode(kind, payload, address=self._address, device=device, key=self._control)

    def _round(self, manifest: wire.RoundManifest) -> None:
        model = None
        # A larger one belongs to a program that does not predict here.
        fits = 0 < manifest.model_bytes <= max(self._bundle.start_limit(program) for program in self._servable)
        if manifest.model is not None and fits and manifest.opened >= self._state.opened:
            self._serve = manifest.model
            if manifest.model != self._model:
                model = self._blob(manifest.model, manifest.model_bytes)
                if model is None:
                    self._adopt()
        self._advance(talk.RoundSeen(_now(), manifest.round, manifest.opened, model))

    def _task(self, task: wire.Task) -> None:
        if self._outbox.task_done(task.task):
            if all(entry.task != task.task for entry in self._outbox.entries()):
                self._advance(talk.TaskRepeated(_now(), task.task))
            return
        refusal = self._reason_against(task)
        start = None
        if refusal is None:
            start = self._blob(task.start, task.start_bytes)
        self._advance(talk.TaskOffered(_now(), task, refusal, start))
        self._prune()

    def _reason_against(self, task: wire.Task) -> str | None:
        """Why this device cannot do a task, at most 64 characters, or None."""
        if task.base != self._bundle.base:
            return f"wrong_base: this bundle has base {self._bundle.base[:12]}"
        program = self._bundle.programs.get(task.program)
        if program is None:
            return f"unknown_program: {task.program}"[:64]
        if task.constants:
            return "unsupported: this version cannot run the task"
        if not 0 < task.start_bytes <= self._bundle.start_limit(program):
            return f"bad_start: {task.start_bytes} bytes"
        try:
            Encoding.from_map(task.encoding)
        except TaskError:
            return "unsupported: encoding"
        hyper = {"lr": task.learning_rate, **task.hyper} if "lr" in program.hyper else dict(task.hyper)
        for name, value in hyper.items():
            limits = program.hyper.get(name)
            if limits is None or not limits.minimum <= value <= limits.maximum:
                return f"bad_hyper: {name} = {value:g}"[:64]
        return None

    def _blob(self, name: str, size: int) -> talk.Blob | None:
        """What is missing of a blob, None if nothing is. Initial tensors are made here rather than fetched."""
        if self._downloads.path(name) is None and name in self._initial:
            self._downloads.put(name, self._bundle.start_blob(self._bundle.program(self._initial[name])))
        missing = self._downloads.missing(name, size)
        if not missing and self._downloads.path(name) is None and not self._downloads.finish(name):
            missing = self._downloads.missing(name, size)
        self._blob_sizes[name] = size
        return talk.Blob(name, size, missing) if missing else None

    def _chunk(self, parsed: wire.Parsed, data: bytes) -> None:
        assert parsed.digest is not None
        assert parsed.index is not None
        wanted = [blob for blob in (self._state.start, self._state.model) if blob is not None]
        blob = next((blob for blob in wanted if blob.digest == parsed.digest and parsed.index in blob.missing), None)
        if blob is None:
            return
        if not self._downloads.store(parsed.digest, blob.size, parsed.index, data):
            self._refuse(f"chunk {parsed.index} of {parsed.digest[:12]} with {len(data)} bytes")
            return
        self._advance(talk.BlobChunk(_now(), parsed.digest, parsed.index))

    def _stream(self, stream: _Stream, name: str, size: int, ranges: tuple[tuple[int, int], ...]) -> None:
        """The thread that fetches a blob over HTTPS, never more than a window ahead of what is on disk."""
        host, tls = urlsplit(self.config.broker).hostname, self.config.tls
        assert host is not None
        assert tls is not None
        try:
            for index, data in fetch_chunks(
                host,
                self._blob_port,
                tls,
                self._time_floor,
                digest=name,
                size=size,
                ranges=ranges,
                is_over=stream.over.is_set,
            ):
                while not stream.room.acquire(timeout=0.2):
                    if stream.over.is_set():
                        return
                self._put(_Streamed(_now(), stream, name, index, data))
        except EdgewiseError as error:
            log.info("%s: %s; going on over MQTT if it happens again", self.config.id, error)
        except Exception:
            log.exception("%s: a blob could not be fetched over HTTPS", self.config.id)
        finally:
            self._put(_StreamEnded(_now(), stream, name))

    def _stream_ended(self, event: _StreamEnded) -> None:
        if self._http.get(event.digest) is event.stream:
            del self._http[event.digest]
            self._advance(talk.HttpEnded(event.now, event.digest))

    def _streamed(self, event: _Streamed) -> None:
        stream = event.stream
        stream.room.release()
        self._http_received += len(event.data)
        if stream.over.is_set():
            return
        if all(b is None or b.digest != event.digest for b in (self._state.start, self._state.model)):
            stream.over.set()  # nobody needs it any longer
            return
        self._chunk(wire.Parsed("blob", digest=event.digest, index=event.index), event.data)

    def _verify(self, name: str) -> None:
        if self._downloads.finish(name):
            self._adopt()
            self._advance(talk.BlobReady(_now(), name))
        else:
            log.warning("%s: blob %s came damaged", self.config.id, name[:12])
            self._advance(talk.BlobFailed(_now(), name, wire.chunk_count(self._blob_sizes[name])))

    # Models.

    def _stored_model(self) -> tuple[str, Program, dict[str, Array]]:
        """The model served last, if it is still here and belongs to this bundle; else the bundle's own."""
        name = self._outbox.meta("model")
        if name is not None and self._outbox.meta("model.base") == self._bundle.base:
            try:
                tensors = self._tensors(name)
                return name, self._program_of(tensors), tensors
            except EdgewiseError as error:
                log.warning("%s: %s; serving with the bundle's own tensors", self.config.id, error)
        program = self._servable[0]
        return digest(self._bundle.start_blob(program)), program, self._bundle.initial(program)

    def _program_of(self, tensors: Mapping[str, Array]) -> Program:
        """The program that predicts with these tensors. Raises `TaskError` if none that may serve here does."""
        for program in self._bundle.predicting_with(tensors):
            if program in self._servable:
                return program
        raise TaskError("these tensors belong to no program that predicts here")

    def _tensors(self, name: str) -> dict[str, Array]:
        path = self._downloads.path(name)
        if path is None:
            raise TaskError(f"the tensors {name[:12]} are not on this device")
        data = path.read_bytes()
        if digest(data) != name:
            path.unlink()
            raise TaskError(f"the tensors {name[:12]} were damaged on disk; they will be fetched again")
        try:
            return unpack(data)[0]
        except TensorsError as error:
            raise TaskError(f"the tensors {name[:12]} are malformed: {error}") from error

    def _adopt(self) -> None:
        """Serve with the gateway's model, if it is here and not served already."""
        name = self._serve
        if name is None or name == self._model or self._downloads.path(name) is None:
            return
        try:
            tensors = self._tensors(name)
            program = self._program_of(tensors)
            if program is self._program:
                self._predictor.set_tensors(tensors)
            else:
                self._predictor = Predictor(self._bundle, program, tensors, self._profile)
        except EdgewiseError as error:
            log.info("%s: not serving %s: %s", self.config.id, name[:12], error)
            return
        self._model, self._program = name, program
        self._outbox.set_meta("model", name)
        self._outbox.set_meta("model.base", self._bundle.base)
        self._prune()
        self._tell("model_changed", name)

    def _prune(self) -> None:
        """Keep the blobs that are served with, trained from or under way."""
        state = self._state
        used = {self._model, self._serve, state.task and state.task.start}
        used |= {blob.digest for blob in (state.start, state.model) if blob is not None}
        self._downloads.prune({name for name in used if name})

    # What goes to the gateway.

    def _common(self) -> dict[str, Any]:
        return {"id": secrets.token_hex(8), "boot": self._state.boot, "at": time.time_ns() // 1_000_000}

    def _encode(self, message: wire.Message) -> bytes:
        return wire.encode(message, self._key, self._address, self.config.id)

    def _status(self, state: wire.State, declined: tuple[str, str] | None) -> bytes:
        held, waiting = self._state, self._outbox.summary()
        return self._encode(
            wire.Status(
                **self._common(),
                state=state,
                connection=held.connection,
                outbox_id=self._outbox.outbox_id,
                sdk=__version__,
                bundle=self._bundle.digest,
                caps=wire.Caps(cores=os.cpu_count() or 0, ram=_memory(), precisions=self._precisions()),
                outbox=wire.OutboxSummary(
                    entries=waiting.entries,
                    bytes=waiting.bytes,
                    dropped=waiting.dropped,
                    oldest_round=waiting.oldest_round,
                ),
                paused=held.paused,
                task=None if held.task is None else held.task.task,
                declined=None if declined is None else wire.DeclinedTask(task=declined[0], reason=declined[1]),
                clock=self._clock(),
            )
        )

    def _precisions(self) -> tuple[str, ...]:
        return tuple(sorted({program.precision for program in self._bundle.programs.values()}))[:8]

    def _offer(self, upload: str) -> None:
        entry = next((entry for entry in self._outbox.entries() if entry.upload == upload), None)
        if entry is not None:
            faults.point("D2")
            self._publish(self._address.offer(self.config.id), entry.offer, "offer", expiry=30)
            faults.point("D3")

    def _send_chunk(self, upload: str, index: int, to: str) -> None:
        data = self._outbox.chunk(upload, index)
        if data is None:
            return
        topic = self._address.chunk(self.config.id, to, upload, index)
        mid = self._publish(topic, data, "", expiry=30)
        if mid is not None:
            self._sent[mid] = (upload, index)
        faults.point("D4")

    def _publish(
        self, topic: str, payload: bytes, kind: str, *, retain: bool = False, expiry: int | None = None
    ) -> int | None:
        """Hand a message to the link; None if it was not taken, which the state machine's timers repair."""
        return self._try(lambda: self._link.publish(topic, payload, retain=retain, expiry=expiry, kind=kind))

    def _try(self, send: Callable[[], T]) -> T | None:
        try:
            return send()
        except LinkError as error:
            log.debug("%s: %s", self.config.id, error)
            return None

    def _queue(self) -> tuple[talk.Head, ...]:
        return tuple(talk.Head(entry.upload, entry.digest, entry.chunks) for entry in self._outbox.entries())

    # Whether training is allowed.

    def _look(self) -> None:
        """Ask app, thermometer and disk; tell the conversation what they say."""
        self._put_gate(self._obstacle(self._state.paused))

    def _put_gate(self, reason: Paused) -> None:
        """Tell the conversation; heat and disk do not say when they are over, so look again, whatever becomes of the task."""
        self._put(talk.Gate(_now(), reason))
        if reason not in (Paused.HEAT, Paused.DISK):
            return
        if self._shift is not None and threading.current_thread() is self._shift.worker:
            self._set_timer("look", _LOOK_AGAIN)
        else:
            self._put(_Look(_now()))

    def _obstacle(self, present: Paused) -> Paused:
        held = self._brake(present)
        if held is not Paused.NONE:
            return held
        if self._undone:
            return Paused.DISK
        largest = max(max_update_bytes(program, self._bundle.tensors) for program in self._bundle.programs.values())
        return Paused.NONE if self._outbox.has_room(largest) else Paused.DISK

    def _brake(self, present: Paused) -> Paused:
        """What stops training between two steps: somebody's wish, or heat."""
        if self._app_pause.is_set() or self._gateway_pause.is_set():
            return Paused.USER
        limit = self.config.limits.temperature_celsius
        if limit is not None:
            hottest = hottest_zone(self._thermal_zones)
            if hottest is not None and hottest > limit - (_COOLER if present is Paused.HEAT else 0.0):
                return Paused.HEAT
        return Paused.NONE

    # The thread that trains.

    def _train(self, shift: _Shift) -> None:
        while (task := shift.tasks.get()) is not None:
            try:
                event = self._do(task, shift)
            except Exception as error:
                log.warning("%s: task %s failed", self.config.id, task.task, exc_info=True)
                event = talk.TaskFailed(_now(), task.task, _reason(f"{type(error).__name__}: {error}"))
            shift.cancelled.discard(task.task)
            self._progress = (0, 0)
            # After a stop only what was stored counts: the next start may have begun the same task again.
            if isinstance(event, talk.TaskDone) or (event is not None and not shift.ending.is_set()):
                self._report(event)
        self._leave(shift)

    def _report(self, event: talk.Event) -> None:
        self._put(event)
        self._put(_OutboxGrew(_now()))

    def _do(self, task: wire.Task, shift: _Shift) -> talk.Event | None:
        if self._obstacle(Paused.NONE) is Paused.DISK:
            self._look()
            return talk.TaskPostponed(_now(), task.task)
        spec = TaskSpec(
            program=task.program,
            start_digest=task.start,
            steps=task.steps,
            epochs=task.epochs,
            batch_size=task.batch_size,
            learning_rate=task.learning_rate,
            seed=task.seed,
            hyper=task.hyper,
            encoding=Encoding.from_map(task.encoding).preferring(self.config.encoding),
        )
        try:
            outcome = run_task(
                self._bundle,
                spec,
                self._tensors(task.start),
                self._samples,
                profile=self._profile,
                feedback=self._feedback(task),
                before_step=lambda: self._before_step(task.task, shift),
                on_step=self._on_step,
                seconds=self.config.limits.seconds,
            )
        except TaskCancelled:
            return None
        except EdgewiseError as error:
            log.warning("%s: task %s cannot be done: %s", self.config.id, task.task, error)
            return talk.TaskFailed(_now(), task.task, _reason(str(error)))
        faults.point("D1")
        try:
            self._store(task, outcome)
        except StorageError as error:
            self._held_disk(error)
            return talk.TaskPostponed(_now(), task.task)
        except TaskError as error:
            return talk.TaskFailed(_now(), task.task, _reason(str(error)))
        return talk.TaskDone(_now(), task.task)

    def _held_disk(self, error: StorageError) -> None:
        """The disk has just refused: hold training back, and look again later."""
        log.error("%s", error)
        self._tell("error", str(error))
        self._put_gate(Paused.DISK)

    def _before_step(self, task: str, shift: _Shift) -> None:
        """Between two steps: predictions first, then pause and heat; the task may have been withdrawn."""
        self._courtesy.give_way()
        told = Paused.NONE
        while True:
            if task in shift.cancelled or shift.ending.is_set():
                raise TaskCancelled(f"task {task} was withdrawn")
            reason = self._brake(told)
            if reason is not told:
                self._put_gate(reason)
                told = reason
            if reason is Paused.NONE:
                return
            time.sleep(0.1)

    def _on_step(self, _result: StepResult, done: int, total: int) -> None:
        self._progress = (done, total)

    def _feedback(self, task: wire.Task) -> dict[str, Array]:
        held = self._outbox.feedback(task.program)
        program, table = self._bundle.program(task.program), self._bundle.tensors
        fitting = all(name in program.tensors and value.shape == table[name].shape for name, value in held.items())
        return held if fitting else {}

    def _store(self, task: wire.Task, outcome: Outcome) -> None:
        metrics = {name[:32]: float(value) for name, value in outcome.metrics.items() if np.isfinite(value)}

        def sign(draft: Draft) -> bytes:
            return self._encode(
                wire.Offer(
                    **self._common(),
                    upload=draft.upload,
                    outbox_id=draft.outbox_id,
                    task=task.task,
                    seq=draft.seq,
                    round=task.round,
                    size=draft.size,
                    num_examples=outcome.num_examples,
                    base=self._bundle.base,
                    digest=draft.digest,
                    chunk=wire.CHUNK,
                    chunks=wire.chunk_count(draft.size),
                    metrics=dict(list(metrics.items())[:32]),
                )
            )

        self._outbox.commit(
            task=task.task,
            number=task.round,
            program=task.program,
            body=outcome.body,
            feedback=outcome.feedback,
            sign=sign,
        )


@dataclass(frozen=True)
class _Look(talk.Event):
    """Look again at what holds training back, after a while."""


@dataclass(frozen=True)
class _Streamed(talk.Event):
    """A chunk that came over HTTPS."""

    stream: _Stream
    digest: str
    index: int
    data: bytes


@dataclass(frozen=True)
class _StreamEnded(talk.Event):
    """No more comes of it."""

    stream: _Stream
    digest: str


class _Stream:
    """A blob that comes over HTTPS: room for chunks that are not yet on disk, and whether it is to end."""

    def __init__(self) -> None:
        self.room = threading.Semaphore(wire.WINDOW)
        self.over = threading.Event()


@dataclass(frozen=True)
class _OutboxGrew(talk.Event):
    """Read the outbox, on the thread that deletes from it: what the training thread sees may end before it is told."""


class _Shift:
    """The two threads of one `start`. A trainer that outlives its `stop` hears nothing of what the next one is told."""

    def __init__(self, converse: Callable[[_Shift], None], train: Callable[[_Shift], None]) -> None:
        self.present = 2
        self.ending = threading.Event()
        self.tasks: queue.Queue[wire.Task | None] = queue.Queue()
        self.cancelled: set[str] = set()
        self.worker = threading.Thread(target=converse, args=(self,), name="edgewise-device", daemon=True)
        self.trainer = threading.Thread(target=train, args=(self,), name="edgewise-trainer", daemon=True)

    def is_mine(self) -> bool:
        """Whether one of its threads asks; neither can wait for itself."""
        return threading.current_thread() in (self.worker, self.trainer)


class _Courtesy:
    """Predictions go first: a step waits while one is under way, but not for ever."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._serving = 0

    @contextlib.contextmanager
    def serving(self) -> Any:
        """Around a prediction."""
        with self._condition:
            self._serving += 1
        try:
            yield
        finally:
            with self._condition:
                self._serving -= 1
                self._condition.notify_all()

    def give_way(self) -> None:
        """Before a step."""
        with self._condition:
            self._condition.wait_for(lambda: self._serving == 0, timeout=_PATIENCE)


def _reason(text: str) -> str:
    """Why a task was declined, as the gateway may read it: without this device's paths, at most 64 characters."""
    text = re.sub(r"(?<!\S)/[^:]*: ", "", text)
    return text if len(text) <= 64 else text[:61].rsplit(" ", 1)[0].rstrip(",:;") + "..."


def _is_blob(message: Message) -> bool:
    return "/down/blob/" in message.topic


def _now() -> float:
    return time.monotonic()


def _lock(store: Path) -> int:
    """One process per store: two would answer for each other."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        handle = os.open(store / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageError(f"{store}: the store cannot be used ({error.strerror})") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise StorageError(f"{store}: another process uses this store: stop it, or give this device its own") from error
    return handle


def _servable(bundle: Bundle, wanted: str | None) -> tuple[Program, ...]:
    """The programs that may predict here: the one that `device.toml` names, or each that can."""
    if wanted is not None:
        return (bundle.program(wanted),)
    found = tuple(program for program in bundle.programs.values() if program.infer is not None)
    if not found:
        raise BundleError(f"{bundle.path}: no program can predict")
    return found


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
