"""The round as a pure state machine: `step(state, event) -> (state, effects)`.

Rules
-----
1. No clock, no network, no disk, no randomness in here. Every event carries `now` (gateway time, Unix
   milliseconds); every effect is carried out by `aggregator.service`. The same events give the same effects.
2. The state is what the journal stores with every commit. After a crash the shell restores it and sends
   `Restarted`; the effects that follow are those a reader of the state would expect; repeating them does no
   harm.
3. One deadline per round. The phases take their deadlines from it: `train` may use all but the last
   `evaluate_share`, `evaluate` the rest and whatever `train` left over. `measure` takes no more than half of the time to
   train.
4. A round never waits for a device. Quorum or deadline decide; presence is a hint for who gets a task.
5. What decides acceptance is evidence of closed phases only; an update that was still being checked when its
   phase closed is set aside with a reason.

Who takes part: the devices online when a phase opens. A device that comes later gets a task too while at
least half of the phase's time lies ahead (`_has_room`) and the phase has not closed; it then belongs to the
assigned set like the others. A phase closes

* early, when `quorum` updates are accepted, or when every assigned device has answered or declined, unless fewer than
  `minimum` were asked and one of them answered: then another may still come;
* at its deadline. With fewer than `minimum` updates `train` merges nothing: the round is `empty` (none came)
  or `too_few`, the model stays, the next round follows. `measure` and `evaluate` close with the evidence there is.

A round that merges nothing because devices declined is over at once: it does not count towards `rounds`, and the next
one, which asks them again, opens after a pause (`_pause`), or as soon as a device comes. A site whose devices have no
samples yet waits so for its first ones, at a pace that falls to one round per deadline.

A round that follows a rollback begins with `measure`: the devices score the model once more, on the samples they hold
now. Otherwise a change of the data looks like a fault of every candidate (docs/adr/measure-again-after-a-rollback.md).
The same is done where nobody has measured the initial model.

A round opens when `devices_wait` devices are online. If they do not come within the round's deadline it opens
with `minimum` of them, so that a device that died does not end the job.

Buffered rounds (`buffer`; FedBuff, Nguyen et al., arXiv 2106.06639) do not throw the work of slow devices away. A `train`
phase closes with `buffer` updates; a task that is still open then stays with its device, up to `max_staleness` rounds long,
and its update counts for the round in which it comes, discounted by the merge. A device that carries such a task gets no
other; one device contributes to a round once.

Transitions (`TRANSITIONS` is the same table as code; open phase = measure, train or evaluate)
----------------------------------------------------------------------------------
| phase      | event          | what follows                                         | next phase            |
|------------|----------------|------------------------------------------------------|-----------------------|
| wait       | DeviceSeen     | enough online, no pause: OpenPhase, IssueTasks       | train, measure (eval*)|
| wait       | DeadlinePassed | `minimum` online: OpenPhase, IssueTasks              | train, measure (eval*)|
| wait       | DeadlinePassed | of a pause: as if the round before had just ended    | wait, train, measure  |
| open phase | DeviceSeen     | room left: IssueTasks for the device                 | same                  |
| measure    | as below       | closed: OpenPhase train, IssueTasks                  | same, train           |
| open phase | UpdateAccepted | counted; enough: ClosePhase                          | same, merge, judge    |
| open phase | Declined       | counted; the last: ClosePhase; none: FinishRound     | same, merge/judge/wait|
| open phase | DeadlinePassed | ClosePhase, WithdrawTasks; too few: FinishRound      | merge/judge/wait/done |
| merge      | Merged         | OpenPhase evaluate, IssueTasks; no gate: FinishRound | evaluate, wait, done  |
| merge      | MergeFailed    | SetAside, FinishRound failed                         | wait, done            |
| judge      | Judged         | FinishRound accepted or rolled back (0: measured)    | wait, done            |
| any        | UpdateAccepted | of a carried task: counted in the next train         | same                  |
| any        | UpdateAccepted | its phase is closed: LeaveOut                        | same                  |
| any        | DeviceSeen     | remembered for the next phase; DeviceLost likewise   | same                  |
| any        | Discarded      | Discard; its merged update: FinishRound rolled back  | same, wait            |
| any        | Restarted      | SetDeadline, Merge or Judge once more                | same                  |

(*) round 0 has no `train`: it evaluates the initial model, so that round 1 has something to be compared with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final


class Phase(StrEnum):
    """Where a round stands."""

    WAIT = "wait"  # for devices
    MEASURE = "measure"  # the devices score the present model, which a candidate will be compared with
    TRAIN = "train"
    MERGE = "merge"  # the shell folds the accepted updates
    EVALUATE = "evaluate"
    JUDGE = "judge"  # the shell compares the evidence
    DONE = "done"


class Outcome(StrEnum):
    """How a round ended."""

    MEASURED = "measured"  # round 0
    ACCEPTED = "accepted"
    ROLLED_BACK = "rolled_back"
    EMPTY = "empty"
    TOO_FEW = "too_few"
    FAILED = "failed"  # the merge rule refused the updates it was given


class Answer(StrEnum):
    """What became of a device's task."""

    ISSUED = "issued"
    ANSWERED = "answered"
    DECLINED = "declined"


@dataclass(frozen=True)
class Settings:
    """What the job file says about rounds (`aggregator.job`), and the journal's identity.

    `quorum` None means every assigned device. `buffer` above 0: buffered rounds of so many updates, `max_staleness` how
    many rounds late one may be. Durations are milliseconds. `nonce` makes task ids differ
    between two runs of one job in different state folders: a device never trains a task id twice.
    """

    rounds: int
    nonce: str
    quorum: int | None = None
    minimum: int = 1
    deadline_ms: int = 600_000
    devices_wait: int = 1
    evaluate_share: float = 0.3
    evaluates: bool = True
    buffer: int = 0
    max_staleness: int = 0


@dataclass(frozen=True)
class TaskState:
    """A task: its id (hex16), what became of it, and the round and model (digest) that it belongs to."""

    task: str
    answer: Answer = Answer.ISSUED
    reason: str = ""
    round: int = 0
    model: str = ""


def _no_tasks() -> Mapping[str, TaskState]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Rounds:
    """The whole state. `model` and `candidate` are digests (hex64); times are gateway milliseconds."""

    settings: Settings
    round: int
    phase: Phase
    model: str
    candidate: str | None = None
    opened: int = 0
    deadline: int = 0  # of the round
    phase_opened: int = 0
    phase_deadline: int = 0
    tasks: Mapping[str, TaskState] = field(default_factory=_no_tasks)
    carried: Mapping[str, TaskState] = field(
        default_factory=_no_tasks
    )  # of closed train phases; in `tasks` while one is open
    online: frozenset[str] = frozenset()
    patient: bool = True  # waiting for all of `devices_wait`, not yet for `minimum` alone
    measures: bool = False  # the evidence on the model is missing or in doubt: the next round measures it first
    uncounted: int = 0  # rounds so far that devices declined and that do not count towards `settings.rounds`
    paused_until: int = 0  # no round opens before; 0: no pause

    def count(self, answer: Answer) -> int:
        """How many tasks of the open phase have this answer."""
        return sum(state.answer is answer for state in self.tasks.values())


def initial(settings: Settings, model: str) -> Rounds:
    """The state before the first event: round 0 if there is something to measure, else round 1."""
    return Rounds(settings=settings, round=0 if settings.evaluates else 1, phase=Phase.WAIT, model=model)


@dataclass(frozen=True)
class Event:
    """Something that happened, at gateway time `now` (milliseconds)."""

    now: int


@dataclass(frozen=True)
class Restarted(Event):
    """The shell has restored this state, with the published messages and open tasks that belong to it, or is
    new."""


@dataclass(frozen=True)
class DeviceSeen(Event):
    """A device is online."""

    device: str


@dataclass(frozen=True)
class DeviceLost(Event):
    """A device went offline."""

    device: str


@dataclass(frozen=True)
class UpdateAccepted(Event):
    """The update for `task` is in the ledger."""

    device: str
    task: str


@dataclass(frozen=True)
class Declined(Event):
    """A device cannot do its task and says why."""

    device: str
    task: str
    reason: str


@dataclass(frozen=True)
class Discarded(Event):
    """What a revoked device gave to the open round shall not count. `merged`: the candidate was made with it."""

    device: str
    merged: bool


@dataclass(frozen=True)
class DeadlinePassed(Event):
    """The timer of the last `SetDeadline` fired."""


@dataclass(frozen=True)
class Merged(Event):
    """The fold is done and its result stored under this digest."""

    candidate: str


@dataclass(frozen=True)
class MergeFailed(Event):
    """The merge rule refused the updates."""

    reason: str


@dataclass(frozen=True)
class Judged(Event):
    """The gate's verdict on the candidate."""

    accepted: bool
    reason: str


@dataclass(frozen=True)
class Effect:
    """Something the shell must do, in order."""


@dataclass(frozen=True)
class SetDeadline(Effect):
    """Send `DeadlinePassed` at this gateway time; replaces an earlier one. None: no deadline."""

    at: int | None


@dataclass(frozen=True)
class OpenPhase(Effect):
    """Publish the round manifest; uploads for this phase are welcome from now on."""

    round: int
    phase: Phase
    start: str
    opened: int
    deadline: int  # of the round
    closes: int  # of the phase


@dataclass(frozen=True)
class IssueTasks(Effect):
    """Publish a task to each of these devices: device -> task id."""

    round: int
    phase: Phase
    start: str
    deadline: int
    tasks: Mapping[str, str]


@dataclass(frozen=True)
class WithdrawTasks(Effect):
    """Clear the retained tasks of these devices."""

    devices: tuple[str, ...]


@dataclass(frozen=True)
class ClosePhase(Effect):
    """Uploads for this phase are no longer welcome, but for those of the devices `keep`. `declined`: device -> why."""

    round: int
    phase: Phase
    keep: frozenset[str] = frozenset()
    declined: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Merge(Effect):
    """Fold the accepted updates of this round; comes back as `Merged` or `MergeFailed`.

    `tasks`: in buffered rounds, those that were counted; an update that has come since belongs to the next round.
    """

    round: int
    model: str
    tasks: frozenset[str] | None = None


@dataclass(frozen=True)
class Judge(Effect):
    """Compare the candidate with the model; comes back as `Judged`."""

    round: int
    model: str
    candidate: str


@dataclass(frozen=True)
class SetAside(Effect):
    """The accepted updates of this phase will not be merged."""

    round: int
    phase: Phase
    reason: str


@dataclass(frozen=True)
class LeaveOut(Effect):
    """This one accepted update came after its phase had closed, or is too old to be merged."""

    device: str
    task: str
    reason: str


@dataclass(frozen=True)
class Discard(Effect):
    """Set aside what was accepted of this device and is not merged."""

    device: str


@dataclass(frozen=True)
class FinishRound(Effect):
    """The round is over; `model` is what the next one starts from."""

    round: int
    outcome: Outcome
    reason: str
    model: str


@dataclass(frozen=True)
class FinishJob(Effect):
    """All rounds are done."""

    model: str


Effects = tuple[Effect, ...]
Result = tuple[Rounds, Effects]
OPEN: Final = (Phase.MEASURE, Phase.TRAIN, Phase.EVALUATE)
_PAUSES: Final = 20  # the first pause is this part of a round's deadline ...
_SHORTEST_PAUSE: Final = 1_000  # ms, or this, if that is more


def task_id(settings: Settings, number: int, phase: Phase, opened: int, device: str) -> str:
    """The id (hex16) of a device's task in the phase that was opened at `opened` (gateway ms).

    Eleven digits are that moment, so a journal that was put back from a copy and comes to the same round once more does not
    ask with an id that the device has answered. Five are a proof that no other journal gives: `is_task_of`.
    """
    text = f"{settings.nonce}/{number}/{phase}/{opened}/{device}"
    return f"{opened:011x}"[-11:] + hashlib.sha256(text.encode()).hexdigest()[:5]


def is_task_of(settings: Settings, number: int, device: str, task: str) -> bool:
    """Whether this could be a task of this journal: ids prove it themselves, so no list of old ones is kept."""
    opened = int(task[:11], 16)
    return any(task_id(settings, number, phase, opened, device) == task for phase in OPEN)


def step(state: Rounds, event: Event) -> Result:
    """Advance by one event. An event that means nothing in this phase changes nothing."""
    if isinstance(event, DeviceSeen):
        if event.device not in state.online:  # it may have what the others lack
            state = replace(state, paused_until=min(state.paused_until, event.now))
        state = replace(state, online=state.online | {event.device})
    elif isinstance(event, DeviceLost):
        state = replace(state, online=state.online - {event.device})
    elif isinstance(event, UpdateAccepted) and not _is_open_task(state, event.device, event.task):
        if not _is_carried(state, event.device, event.task):
            return state, (LeaveOut(event.device, event.task, "phase_closed"),)
        answered = replace(state.carried[event.device], answer=Answer.ANSWERED)
        return replace(state, carried=MappingProxyType({**state.carried, event.device: answered})), ()
    elif isinstance(event, Declined) and _is_carried(state, event.device, event.task):
        if state.carried[event.device].answer is Answer.ANSWERED:
            return state, ()
        rest = {device: held for device, held in state.carried.items() if device != event.device}
        return replace(state, carried=MappingProxyType(rest)), ()
    elif isinstance(event, Discarded):
        return _discarded(state, event)
    elif isinstance(event, Restarted):
        return _resume(state, event)
    handler = TRANSITIONS.get((state.phase, type(event)))
    return (state, ()) if handler is None else handler(state, event)


def _is_open_task(state: Rounds, device: str, task: str) -> bool:
    held = state.tasks.get(device)
    return state.phase in OPEN and held is not None and held.task == task


def _is_carried(state: Rounds, device: str, task: str) -> bool:
    held = state.carried.get(device)
    return held is not None and held.task == task


def _resume(state: Rounds, event: Restarted) -> Result:
    if state.phase is Phase.DONE:
        if state.round - state.uncounted < state.settings.rounds:  # the job file now asks for more rounds
            return _wait(replace(state, round=state.round + 1), event.now)
        return state, (FinishJob(state.model),)
    if state.phase is Phase.WAIT:
        return _wait(state, event.now)
    if state.phase is Phase.MERGE:
        return state, (_merge_effect(state),)
    if state.phase is Phase.JUDGE:
        return state, (_judge_effect(state),)
    if not state.settings.evaluates and state.phase is not Phase.TRAIN:  # evaluation was switched off meanwhile
        return _close(state, event.now)
    # The job file may have lowered the quorum meanwhile.
    closed, effects = _close_if_enough(state, event.now)
    return closed, (SetDeadline(state.phase_deadline), *effects)


def _wait(state: Rounds, now: int) -> Result:
    state = replace(state, phase=Phase.WAIT, tasks=_no_tasks(), candidate=None, patient=True)
    if now < state.paused_until:
        return state, (SetDeadline(state.paused_until),)
    state = replace(state, paused_until=0)
    opened, effects = _open_if_enough(state, now, state.settings.devices_wait)
    return (opened, effects) if effects else (opened, (SetDeadline(now + state.settings.deadline_ms),))


def _wait_seen(state: Rounds, event: Event) -> Result:
    if event.now < state.paused_until:
        return state, ()
    if state.paused_until:
        return _wait(state, event.now)
    enough = state.settings.devices_wait if state.patient else state.settings.minimum
    return _open_if_enough(state, event.now, enough)


def _wait_deadline(state: Rounds, event: Event) -> Result:
    if state.paused_until:
        return _wait(state, event.now)
    opened, effects = _open_if_enough(state, event.now, state.settings.minimum)
    # Not even `minimum` are here: open as soon as they are.
    return (opened, effects) if effects else (replace(state, patient=False), (SetDeadline(None),))


def _open_if_enough(state: Rounds, now: int, enough: int) -> Result:
    if len(state.online) < max(1, enough):
        return state, ()
    deadline = now + state.settings.deadline_ms
    state = replace(state, opened=now, deadline=deadline)
    if state.round == 0:
        return _open(replace(state, candidate=state.model), Phase.EVALUATE, now, deadline)
    if state.measures and state.settings.evaluates:
        most = min(_evaluation_ms(state), (state.settings.deadline_ms - _evaluation_ms(state)) // 2)
        return _open(state, Phase.MEASURE, now, now + most)  # half of the time to train is left, or more
    return _open_training(state, now)


def _evaluation_ms(state: Rounds) -> int:
    return round(state.settings.deadline_ms * state.settings.evaluate_share) if state.settings.evaluates else 0


def _open_training(state: Rounds, now: int) -> Result:
    return _open(state, Phase.TRAIN, now, state.deadline - _evaluation_ms(state))


def _open(state: Rounds, phase: Phase, now: int, closes: int) -> Result:
    state, effects = _take_up(state) if phase is Phase.TRAIN else (state, ())
    kept = state.tasks if phase is Phase.TRAIN else _no_tasks()
    state = replace(state, phase=phase, phase_opened=now, phase_deadline=closes)
    free = sorted(state.online - kept.keys() - _busy(state))
    ids = {device: task_id(state.settings, state.round, phase, now, device) for device in free}
    tasks = {device: TaskState(task, round=state.round, model=_start(state)) for device, task in ids.items()}
    state = replace(state, tasks=MappingProxyType({**kept, **tasks}))
    effects += (_open_effect(state),)
    if ids:
        effects += (IssueTasks(state.round, phase, _start(state), _until(state), MappingProxyType(ids)),)
    effects += (SetDeadline(closes),)
    state, more = _close_if_enough(state, now) if kept else (state, ())
    return state, (*effects, *more)


def _take_up(state: Rounds) -> Result:
    """Carried tasks become tasks of the train phase that opens; those that are too old by now are given up."""
    tasks: dict[str, TaskState] = {}
    effects: Effects = ()
    old = []
    for device, held in sorted(state.carried.items()):
        if state.round - held.round <= state.settings.max_staleness:
            tasks[device] = held
        elif held.answer is Answer.ANSWERED:
            effects += (LeaveOut(device, held.task, "too_stale"),)
        else:
            old.append(device)
    if old:
        effects += (WithdrawTasks(tuple(old)),)
    return replace(state, tasks=MappingProxyType(tasks), carried=_no_tasks()), effects


def _busy(state: Rounds) -> set[str]:
    """Devices that still train for an earlier round: no task of the evaluation may take its place."""
    return {device for device, held in state.carried.items() if held.answer is Answer.ISSUED}


def _until(state: Rounds) -> int:
    """Until when a task may be worked on: to the end of its phase, in buffered rounds for as long as it may be carried."""
    if state.phase is Phase.TRAIN and state.settings.buffer:
        return state.phase_deadline + state.settings.max_staleness * state.settings.deadline_ms
    return state.phase_deadline


def _start(state: Rounds) -> str:
    return state.candidate if state.phase is Phase.EVALUATE and state.candidate is not None else state.model


def _open_effect(state: Rounds) -> OpenPhase:
    return OpenPhase(state.round, state.phase, _start(state), state.opened, state.deadline, state.phase_deadline)


def _has_room(state: Rounds, now: int) -> bool:
    """Whether a device that comes now still gets a task: half of the phase's time must lie ahead."""
    return 2 * (now - state.phase_opened) <= state.phase_deadline - state.phase_opened


def _late(state: Rounds, event: Event) -> Result:
    assert isinstance(event, DeviceSeen)
    if event.device in state.tasks or event.device in _busy(state) or not _has_room(state, event.now):
        return state, ()
    task = task_id(state.settings, state.round, state.phase, state.phase_opened, event.device)
    tasks = {**state.tasks, event.device: TaskState(task, round=state.round, model=_start(state))}
    state = replace(state, tasks=MappingProxyType(tasks))
    issued = MappingProxyType({event.device: task})
    return state, (IssueTasks(state.round, state.phase, _start(state), _until(state), issued),)


def _answered(state: Rounds, event: Event) -> Result:
    assert isinstance(event, UpdateAccepted)
    return _close_if_enough(_with_answer(state, event.device, Answer.ANSWERED, ""), event.now)


def _declined(state: Rounds, event: Event) -> Result:
    assert isinstance(event, Declined)
    if not _is_open_task(state, event.device, event.task):
        return state, ()
    if state.tasks[event.device].answer is not Answer.ISSUED:
        return state, ()
    return _close_if_enough(_with_answer(state, event.device, Answer.DECLINED, event.reason), event.now)


def _discarded(state: Rounds, event: Discarded) -> Result:
    effects: Effects = (Discard(event.device),)
    carried = {device: held for device, held in state.carried.items() if device != event.device}
    state = replace(state, carried=MappingProxyType(carried))
    if event.merged and state.phase in (Phase.EVALUATE, Phase.JUDGE) and state.round > 0:
        if state.phase is Phase.EVALUATE:
            effects += (ClosePhase(state.round, state.phase, frozenset(_busy(state))),)
            effects += (
                WithdrawTasks(tuple(sorted(state.tasks))),
                SetAside(state.round, state.phase, "round_discarded"),
            )
        reason = f"the candidate was made with an update of {event.device}, which was revoked"
        return _finish(state, event.now, Outcome.ROLLED_BACK, reason, effects)
    if state.phase in OPEN and event.device in state.tasks:
        state, closed = _close_if_enough(_with_answer(state, event.device, Answer.DECLINED, "revoked"), event.now)
        return state, (*effects, *closed)
    return state, effects


def _with_answer(state: Rounds, device: str, answer: Answer, reason: str) -> Rounds:
    changed = replace(state.tasks[device], answer=answer, reason=reason)
    return replace(state, tasks=MappingProxyType({**state.tasks, device: changed}))


def _close_if_enough(state: Rounds, now: int) -> Result:
    answered = state.count(Answer.ANSWERED)
    quorum = state.settings.quorum
    if state.phase is Phase.TRAIN and state.settings.buffer:
        quorum = state.settings.buffer
    if quorum is not None and answered >= max(quorum, state.settings.minimum):
        return _close(state, now)
    if state.tasks and state.count(Answer.ISSUED) == 0 and (not answered or len(state.tasks) >= state.settings.minimum):
        return _close(state, now)
    return state, ()


def _deadline(state: Rounds, event: Event) -> Result:
    return _close(state, event.now)


def _close(state: Rounds, now: int) -> Result:
    answered = state.count(Answer.ANSWERED)
    carried = _carried_on(state, answered)
    missing = tuple(
        sorted(d for d, held in state.tasks.items() if held.answer is not Answer.ANSWERED and d not in carried)
    )
    declined = {d: held.reason for d, held in sorted(state.tasks.items()) if held.answer is Answer.DECLINED}
    state = replace(state, carried=carried)
    effects: Effects = (ClosePhase(state.round, state.phase, frozenset(_busy(state)), declined),)
    if missing:
        effects += (WithdrawTasks(missing),)
    if state.phase is Phase.MEASURE:
        state, opened = _open_training(replace(state, measures=answered == 0), now)
        return state, (*effects, *opened)
    if state.phase is Phase.EVALUATE:
        state = replace(state, phase=Phase.JUDGE, measures=state.round == 0 and answered == 0)
        return state, (*effects, SetDeadline(None), _judge_effect(state))
    if answered == 0 or answered < state.settings.minimum:
        return _unmerged(state, now, answered, declined, effects)
    state = replace(state, phase=Phase.MERGE)
    return state, (*effects, SetDeadline(None), _merge_effect(state))


def _unmerged(state: Rounds, now: int, answered: int, declined: Mapping[str, str], effects: Effects) -> Result:
    """The end of a round with too few updates. Where devices declined before the deadline, the next one is to wait."""
    early = now < state.phase_deadline
    found = f"{answered} of at least {state.settings.minimum} updates arrived" + (
        "" if early else " before the deadline"
    )
    reason = "; ".join([found, *(f"{device}: {why}" for device, why in declined.items())])
    if early:
        state = replace(state, uncounted=state.uncounted + 1)
        state = replace(state, paused_until=now + _pause(state))
    if answered == 0:
        return _finish(state, now, Outcome.EMPTY, reason, effects)
    if not state.settings.buffer:
        effects += (SetAside(state.round, state.phase, "too_few_updates"),)
    return _finish(state, now, Outcome.TOO_FEW, reason, effects)


def _pause(state: Rounds) -> int:
    """How long devices that declined are left alone: longer each time, up to a round's deadline."""
    longest = state.settings.deadline_ms
    return max(_SHORTEST_PAUSE, min(longest, longest * state.uncounted // _PAUSES))


def _carried_on(state: Rounds, answered: int) -> Mapping[str, TaskState]:
    """What a closing phase leaves open: in buffered rounds its unanswered tasks, and too few answers to be merged."""
    if state.phase is not Phase.TRAIN or not state.settings.buffer:
        return state.carried
    wanted = {Answer.ISSUED} if answered >= state.settings.minimum else {Answer.ISSUED, Answer.ANSWERED}
    return MappingProxyType({device: held for device, held in state.tasks.items() if held.answer in wanted})


def _merge_effect(state: Rounds) -> Merge:
    if not state.settings.buffer:
        return Merge(state.round, state.model)
    counted = frozenset(held.task for held in state.tasks.values() if held.answer is Answer.ANSWERED)
    return Merge(state.round, state.model, counted)


def _judge_effect(state: Rounds) -> Judge:
    return Judge(state.round, state.model, state.candidate or state.model)


def _merged(state: Rounds, event: Event) -> Result:
    assert isinstance(event, Merged)
    state = replace(state, candidate=event.candidate)
    if not state.settings.evaluates:
        return _finish(replace(state, model=event.candidate), event.now, Outcome.ACCEPTED, "the job has no gate", ())
    # The rest of the round belongs to the evaluation, but a slow merge does not leave it without any time.
    closes = max(state.deadline, event.now + _evaluation_ms(state))
    return _open(state, Phase.EVALUATE, event.now, closes)


def _merge_failed(state: Rounds, event: Event) -> Result:
    assert isinstance(event, MergeFailed)
    aside = SetAside(state.round, Phase.TRAIN, "merge_failed")  # with it what came meanwhile for carried tasks
    still = {device: held for device, held in state.carried.items() if held.answer is Answer.ISSUED}
    state = replace(state, carried=MappingProxyType(still))
    return _finish(state, event.now, Outcome.FAILED, event.reason, (aside,))


def _judged(state: Rounds, event: Event) -> Result:
    assert isinstance(event, Judged)
    if state.round == 0:
        return _finish(state, event.now, Outcome.MEASURED, event.reason, ())
    if not event.accepted:
        return _finish(state, event.now, Outcome.ROLLED_BACK, event.reason, ())
    state = replace(state, model=state.candidate or state.model)
    return _finish(state, event.now, Outcome.ACCEPTED, event.reason, ())


def _finish(state: Rounds, now: int, outcome: Outcome, reason: str, before: Effects) -> Result:
    effects = (*before, FinishRound(state.round, outcome, reason, state.model))
    in_doubt = outcome is Outcome.ROLLED_BACK or (state.measures and outcome is not Outcome.ACCEPTED)
    state = replace(state, measures=in_doubt)
    if state.round - state.uncounted >= state.settings.rounds:
        done = replace(state, phase=Phase.DONE, tasks=_no_tasks(), candidate=None)
        return done, (*effects, SetDeadline(None), FinishJob(state.model))
    state, opened = _wait(replace(state, round=state.round + 1), now)
    return state, (*effects, *opened)


Handler = Callable[[Rounds, Event], Result]
TRANSITIONS: Mapping[tuple[Phase, type[Event]], Handler] = MappingProxyType(
    {
        (Phase.WAIT, DeviceSeen): _wait_seen,
        (Phase.WAIT, DeadlinePassed): _wait_deadline,
        **{(phase, DeviceSeen): _late for phase in OPEN},
        **{(phase, UpdateAccepted): _answered for phase in OPEN},
        **{(phase, Declined): _declined for phase in OPEN},
        **{(phase, DeadlinePassed): _deadline for phase in OPEN},
        (Phase.MERGE, Merged): _merged,
        (Phase.MERGE, MergeFailed): _merge_failed,
        (Phase.JUDGE, Judged): _judged,
    }
)


def _tasks_to_json(tasks: Mapping[str, TaskState]) -> dict[str, list[Any]]:
    return {d: [held.task, held.answer.value, held.reason, held.round, held.model] for d, held in tasks.items()}


def _tasks_from_json(saved: Mapping[str, Any]) -> Mapping[str, TaskState]:
    return MappingProxyType(
        {d: TaskState(task, Answer(answer), reason, *more) for d, (task, answer, reason, *more) in saved.items()}
    )


def to_json(state: Rounds) -> dict[str, Any]:
    """What the journal stores. Who was online is part of it: online until the broker says otherwise."""
    return {
        "online": sorted(state.online),
        "patient": state.patient,
        "measures": state.measures,
        "uncounted": state.uncounted,
        "paused_until": state.paused_until,
        "round": state.round,
        "phase": state.phase.value,
        "model": state.model,
        "candidate": state.candidate,
        "opened": state.opened,
        "deadline": state.deadline,
        "phase_opened": state.phase_opened,
        "phase_deadline": state.phase_deadline,
        "tasks": _tasks_to_json(state.tasks),
        "carried": _tasks_to_json(state.carried),
    }


def from_json(settings: Settings, saved: Mapping[str, Any]) -> Rounds:
    """The inverse of `to_json`, under the settings of the job file as it is now."""
    return Rounds(
        settings=settings,
        round=saved["round"],
        phase=Phase(saved["phase"]),
        model=saved["model"],
        candidate=saved["candidate"],
        opened=saved["opened"],
        deadline=saved["deadline"],
        phase_opened=saved["phase_opened"],
        phase_deadline=saved["phase_deadline"],
        tasks=_tasks_from_json(saved["tasks"]),
        carried=_tasks_from_json(saved.get("carried", {})),
        online=frozenset(saved["online"]),
        patient=saved["patient"],
        measures=saved.get("measures", False),
        uncounted=saved.get("uncounted", 0),
        paused_until=saved.get("paused_until", 0),
    )
