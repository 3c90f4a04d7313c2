"""PTQ or QAT for each device, round by round: `decide(state, events) -> (state, assignment, reasons)`, after FedHQ.

The coarse step (`precision_coarse`) runs when it has reason to: devices come, go or are measured for the first time, a
device takes more than 1.5 times what was expected of it in two rounds running, or `fine.every` rounds have passed. Between
those looks nothing moves, so noise in the times does not either. The fine step (`precision_fine`) changes single devices
against it, and takes a change back when two looks running find the validation loss worse than before.

`decide` is pure: the round's number comes with `Opened`, every random choice from `fine.seed` and that number. The state is
what the journal stores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np

from aggregator.assign.precision_coarse import (
    Allocation,
    Choice,
    Profile,
    Reason,
    Verdict,
    allocate,
    round_seconds,
)
from aggregator.assign.precision_fine import (
    Scale,
    Statistics,
    is_worse,
    phi_of,
    shares_of,
    to_json,
)
from aggregator.assign.settings import PrecisionSettings

HALF: Final = 0.5  # the weight of the newest measurement
SLOW: Final = 1.5  # times the expected seconds, ...
SLOW_ROUNDS: Final = 2  # ... in so many rounds running
STRIKES: Final = 2
REST: Final = 3  # looks for which a device that was changed back stays as it is
STEP_MS_LIMITS: Final = (1e-4, 1e8)  # of what a device says a step takes: 0.1 us to a day
_LONGEST: Final = 1e12
_NO_RATIO: Final = 1000.0
_EPOCH: Final = 5  # rounds of a look where the fine step is off


@dataclass(frozen=True)
class Event:
    """Something that became known."""


@dataclass(frozen=True)
class Joined(Event):
    """A device takes part. `ratio`: what a QAT step costs in PTQ steps, a guess unless `measured` there; `drop`: what PTQ costs."""

    device: str
    bits: int
    ratio: float
    drop: float
    fits: bool = True
    measured: bool = False


@dataclass(frozen=True)
class Left(Event):
    """A device takes part no more; what is known of it stays."""

    device: str


@dataclass(frozen=True)
class Trained(Event):
    """An update: ms of a step, steps, seconds from task to acceptance, examples. All but `seconds` is self-reported."""

    device: str
    choice: Choice
    step_ms: float
    steps: int
    seconds: float
    num_examples: float


@dataclass(frozen=True)
class Profiled(Event):
    """What a device measured of its data: `skew` (kappa, nats), `drop` (delta, accuracy); None: not this time."""

    device: str
    skew: float | None = None
    drop: float | None = None


@dataclass(frozen=True)
class Validated(Event):
    """The loss of the deployed, quantized model on the gateway's validation samples, after a round."""

    loss: float


@dataclass(frozen=True)
class Opened(Event):
    """Round `round` of `rounds` is about to begin: decide."""

    round: int
    rounds: int


@dataclass(frozen=True)
class Known:
    """What is known of one device; times are smoothed. `ratio` is the first guess until it is `measured`.

    `expected`: seconds of a round when it was last allocated; `slow`: rounds running above 1.5 times that. `refused`: why
    a number that it sent was not used.
    """

    bits: int
    guess: float  # of the ratio, before it is measured
    ratio: float
    drop: float
    fits: bool = True
    measured: bool = False  # whether `ratio` is
    present: bool = True
    step_ms: Mapping[str, float] = field(default_factory=dict)  # by program, as of now
    last: str = ""  # the program it trained last
    other_seconds: float = 0.0
    num_examples: float = 1.0
    steps: int = 1
    skew: float = 0.0
    expected: float = 0.0
    slow: int = 0
    refused: str = ""

    @property
    def profile(self) -> Profile:
        """For the coarse step; without a measured step it has no use (`Profile.refusal`)."""
        ptq = self.step_ms.get(Choice.PTQ, math.nan)
        qat = self.step_ms.get(Choice.QAT, ptq * self.ratio)
        if self.refused:
            ptq = math.nan
        return Profile(
            ptq,
            qat,
            self.other_seconds,
            self.num_examples,
            self.skew,
            self.drop,
            self.steps,
            self.bits,
            self.fits,
        )

    def trained(self, event: Trained) -> Known:
        """With one measurement more: the other program's time moves along, until it is measured itself."""
        finding = _finding(event)
        if finding:
            return replace(self, refused=finding)
        old = self.step_ms.get(event.choice)
        other = Choice.PTQ if event.choice is Choice.QAT else Choice.QAT
        new = event.step_ms if old is None else HALF * event.step_ms + HALF * old
        ratio, measured = self.ratio, self.measured
        if self.last == other:  # both within two rounds: this is what the ratio is
            sample = event.step_ms / self.step_ms[other]
            sample = sample if event.choice is Choice.QAT else 1 / sample
            # Far outside `RATIO_LIMITS` it is refused all the same; here it only must not run away.
            sample = min(max(sample, 1 / _NO_RATIO), _NO_RATIO)
            ratio = HALF * sample + HALF * ratio if measured else sample
            measured = True
            new = event.step_ms
        times = {str(event.choice): new, str(other): new / ratio if event.choice is Choice.QAT else new * ratio}
        seconds = max(0.0, event.seconds - event.steps * event.step_ms / 1000)
        first = not self.step_ms
        return replace(
            self,
            step_ms=times,
            last=str(event.choice),
            ratio=ratio,
            measured=measured,
            other_seconds=seconds if first else HALF * seconds + HALF * self.other_seconds,
            num_examples=event.num_examples,
            steps=event.steps,
            slow=self.slow + 1 if self.expected and event.seconds > SLOW * self.expected else 0,
            refused="",
        )


@dataclass(frozen=True)
class Flips:
    """Changes that are on trial: what the devices did before, the losses before, and how often the losses since were worse."""

    former: Mapping[str, Choice]
    before: tuple[float, ...]
    strikes: int = 0


@dataclass(frozen=True)
class State:
    """Everything that `decide` remembers. `coarse` and `flipped` map devices to choices; a flip overrules.

    `told`: what was decided for `round`. `due`: the coarse step must run at the next round. `resting`: device -> the round until which it stays as it is. `losses`
    are those since the last look, `earlier` those before it.
    """

    settings: PrecisionSettings
    devices: Mapping[str, Known] = field(default_factory=dict)
    coarse: Mapping[str, Choice] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)  # of the coarse step and of flips
    flipped: Mapping[str, Choice] = field(default_factory=dict)
    trial: Flips | None = None
    resting: Mapping[str, int] = field(default_factory=dict)
    scale: Scale | None = None
    statistics: Statistics = Statistics()
    phi: tuple[float, ...] = ()  # of the last assignment
    told: Mapping[str, Choice] = field(default_factory=dict)
    round: int = 0
    looked: int = 0  # the round of the last look
    due: bool = True
    losses: tuple[float, ...] = ()
    last_loss: float | None = None

    @property
    def profiles(self) -> dict[str, Profile]:
        """Of the devices that take part."""
        return {device: known.profile for device, known in sorted(self.devices.items()) if known.present}


Assignment = Mapping[str, Choice]
Reasons = Mapping[str, str]


def decide(state: State, events: Iterable[Event]) -> tuple[State, Assignment, Reasons]:
    """Take in what became known; with `Opened`, say what each present device does in that round, and why.

    Without `Opened` among the events nothing is assigned.
    """
    assignment: Assignment = {}
    reasons: Reasons = {}
    waiting: list[Trained] = []
    for event in events:
        if isinstance(event, Trained):
            waiting.append(event)
            continue
        state, waiting = (_trained(state, waiting) if waiting else state), []
        match event:
            case Opened():
                state, assignment, reasons = _open(state, event)
            case Joined():
                state = _joined(state, event)
            case Left(device):
                if device in state.devices and state.devices[device].present:
                    state = replace(_with(state, device, replace(state.devices[device], present=False)), due=True)
            case Profiled():
                state = _profiled(state, event)
            case Validated(loss):
                state = _validated(state, loss)
    return (_trained(state, waiting) if waiting else state), assignment, reasons


def _with(state: State, device: str, known: Known) -> State:
    return replace(state, devices={**state.devices, device: known})


def _joined(state: State, event: Joined) -> State:
    held = state.devices.get(event.device)
    if held is not None:
        if held.present:
            return state
        return replace(_with(state, event.device, replace(held, present=True)), due=True)
    known = Known(event.bits, event.ratio, event.ratio, event.drop, event.fits, event.measured)
    return replace(_with(state, event.device, known), due=True)


def _trained(state: State, events: Iterable[Trained]) -> State:
    """All updates of a round at once: with a thousand devices, a copy of the state for each would be felt."""
    devices, flipped, due = dict(state.devices), dict(state.flipped), state.due
    for event in events:
        held = devices.get(event.device)
        if held is None:
            continue
        known = held.trained(event)
        if known.slow >= SLOW_ROUNDS:  # what was measured, not what it was smoothed to
            times = {name: ms * event.step_ms / known.step_ms[event.choice] for name, ms in known.step_ms.items()}
            known = replace(known, step_ms=times, slow=0)
            flipped.pop(event.device, None)
            due = True
        due = due or known.measured is not held.measured
        due = due or bool(held.profile.refusal) is not bool(known.profile.refusal)
        devices[event.device] = known
    return replace(state, devices=devices, flipped=flipped, due=due)


def _finding(event: Trained) -> str:
    for name, value, least, most in (
        ("step_ms", event.step_ms, *STEP_MS_LIMITS),
        ("seconds", event.seconds, 0.0, _LONGEST),
        ("num_examples", event.num_examples, 0.0, _LONGEST),
        ("steps", float(event.steps), 0.0, _LONGEST),
    ):
        if not (least <= value <= most and value > 0):
            return (
                f"{name} is {value:g}, expected {least:g} to {most:g}"
                if least
                else f"{name} is {value:g}, expected above 0"
            )
    return ""


def _profiled(state: State, event: Profiled) -> State:
    held = state.devices.get(event.device)
    if held is None:
        return state
    known = held
    if event.skew is not None:
        known = replace(known, skew=event.skew)
    if event.drop is not None:
        known = replace(known, drop=event.drop)
    return replace(_with(state, event.device, known), due=state.due or known != held)


def _validated(state: State, loss: float) -> State:
    if not math.isfinite(loss):
        return state
    statistics = state.statistics
    if state.last_loss is not None and state.phi:
        statistics = statistics.add(np.array(state.phi), state.round, loss - state.last_loss)
    return replace(state, statistics=statistics, last_loss=loss, losses=(*state.losses, loss))


def _open(state: State, event: Opened) -> tuple[State, Assignment, Reasons]:
    if event.round == state.round and state.told:
        return _late(state, event)
    state = replace(state, round=event.round)
    every = state.settings.fine.every or _EPOCH
    look = event.round - state.looked >= every
    again = state.due or look
    if again:
        state = _coarse(_measured_anew(state) if look else state)
    if look:
        state = _fine(state) if state.settings.fine.every and state.scale is not None else state
        state = replace(state, looked=event.round, losses=())
    assignment, reasons = _assigned(state, event)
    profiles = _usable(state)
    phi = () if state.scale is None else tuple(phi_of(profiles, assignment, state.scale).tolist())
    devices = dict(state.devices)
    for device, choice in assignment.items():
        profile = devices[device].profile
        if device in profiles and (again or not devices[device].expected or choice != devices[device].last):
            devices[device] = replace(devices[device], expected=profile.seconds(choice))
    return replace(state, phi=phi, devices=devices, told=assignment, due=False), assignment, reasons


def _late(state: State, event: Opened) -> tuple[State, Assignment, Reasons]:
    """Devices come to a round that is open: what the others were told holds, and so does what is learned from it."""
    found, reasons = _assigned(state, event)
    assignment = {**found, **state.told}
    phi = state.phi
    if state.scale is not None:
        phi = tuple(phi_of(_usable(state), assignment, state.scale).tolist())
    return replace(state, phi=phi, told=assignment), {device: assignment[device] for device in found}, reasons


def _measured_anew(state: State) -> State:
    """Forget a ratio that cannot be, once in a while: a device whose one measurement failed would do PTQ for ever."""
    rest = state.round + REST * (state.settings.fine.every or _EPOCH)
    for device, known in state.devices.items():
        profile = known.profile
        with_any_ratio = replace(profile, qat_ms=profile.ptq_ms)
        odd = known.measured and bool(profile.refusal) and not with_any_ratio.refusal
        if odd and state.resting.get(device, 0) < state.round:
            times = {str(Choice.PTQ): known.step_ms[Choice.PTQ]}
            forgotten = replace(known, ratio=known.guess, measured=False, step_ms=times)
            state = replace(_with(state, device, forgotten), resting={**state.resting, device: rest})
    return state


def _usable(state: State) -> dict[str, Profile]:
    return {device: profile for device, profile in state.profiles.items() if not profile.refusal}


def _coarse(state: State) -> State:
    found = allocate(state.profiles, state.settings)
    usable = _usable(state)
    scale = Scale.of(usable) if state.scale is None and usable else state.scale
    # A flip stands only for a device that is still there, and within the budget that there is now.
    kept = {d: c for d, c in state.flipped.items() if d in usable and found.choices[d] is not c}
    while kept and _seconds(usable, found, kept) > max(found.budget_seconds, found.seconds):
        slowest = max(kept, key=lambda device: (usable[device].seconds(kept[device]), device))
        del kept[slowest]
    reasons = {d: str(v) for d, v in found.verdicts.items()}
    reasons |= {device: state.reasons[device] for device in kept if device in state.reasons}
    for device, known in state.devices.items():
        if known.refused and device in reasons:
            reasons[device] = f"{Reason.UNPROFILED}: {known.refused}"
        elif not known.step_ms and device in reasons:
            reasons[device] = f"{Reason.UNPROFILED}: no step of it was measured yet"
    return replace(state, coarse=found.choices, reasons=reasons, flipped=kept, scale=scale)


def _seconds(profiles: Mapping[str, Profile], found: Allocation, flipped: Assignment) -> float:
    return round_seconds(profiles, {**found.choices, **flipped})


def _assigned(state: State, event: Opened) -> tuple[dict[str, Choice], dict[str, str]]:
    settings, assignment, reasons = state.settings, {}, {}
    last = event.rounds - round(settings.final_qat * event.rounds)
    for device, known in sorted(state.devices.items()):
        if not known.present:
            continue
        assignment[device] = state.flipped.get(device, state.coarse.get(device, Choice.PTQ))
        reasons[device] = state.reasons.get(device, str(Reason.UNPROFILED))
        usable = not known.profile.refusal
        if event.round > last and known.fits:
            assignment[device] = Choice.QAT
            reasons[device] = f"{Reason.FINAL}: the last {event.rounds - last} of {event.rounds} rounds"
        elif usable and not known.measured and known.fits and known.drop > settings.min_drop:
            assignment[device] = Choice.QAT
            reasons[device] = str(Verdict(Choice.QAT, Reason.MEASURING, "nobody knows yet what its QAT step costs"))
    return assignment, reasons


def _fine(state: State) -> State:
    trial = state.trial
    if trial is not None and is_worse(trial.before, state.losses):
        trial = replace(trial, strikes=trial.strikes + 1)
        if trial.strikes < STRIKES:
            return replace(state, trial=trial)
        rest = state.round + REST * state.settings.fine.every
        resting = {**state.resting, **dict.fromkeys(trial.former, rest)}
        return replace(_undone(state, trial.former), trial=None, resting=resting)
    # Without a loss there is nothing to learn from.
    return _flip(replace(state, trial=None)) if state.losses else replace(state, trial=None)


def _undone(state: State, former: Assignment) -> State:
    """These devices do again what they did before."""
    flipped = {device: choice for device, choice in state.flipped.items() if device not in former}
    flipped |= {d: choice for d, choice in former.items() if d in state.coarse and choice is not state.coarse[d]}
    undone = dict.fromkeys(former, f"{Reason.LEARNED}: changed back in round {state.round}, the loss had risen")
    return replace(state, flipped=flipped, reasons={**state.reasons, **undone})


def _flip(state: State) -> State:
    """Change the few devices that promise most, or now and then any one."""
    settings, fine = state.settings, state.settings.fine
    assert state.scale is not None
    profiles = _usable(state)
    candidates = [d for d, p in profiles.items() if p.fits and state.resting.get(d, 0) <= state.round]
    if not candidates:
        return state
    draw = np.random.default_rng([fine.seed, state.round])
    now = {device: state.flipped.get(device, state.coarse[device]) for device in profiles}
    former = dict(now)
    theta, shares = state.statistics.theta(state.scale), shares_of(profiles)
    limits = allocate(profiles, settings)
    most = max(1, math.ceil(len(profiles) * fine.max_flips))
    reason, wanted = Reason.LEARNED, []
    if draw.random() < fine.explore:
        reason, wanted = Reason.EXPLORED, [candidates[int(draw.integers(len(candidates)))]]
    else:
        utilities = {}
        for device in candidates:
            sign = -1.0 if now[device] is Choice.QAT else 1.0
            gain = -shares[device] * sign * float(theta @ state.scale.features(profiles[device], shares[device]))
            after = round_seconds(profiles, {**now, device: _other(now[device])})
            slower = (after - round_seconds(profiles, now)) / limits.least_seconds
            utilities[device] = gain - fine.time_price * slower
        wanted = sorted((d for d, u in utilities.items() if u > 0), key=lambda d: (-utilities[d], d))
    flipped, reasons = dict(state.flipped), dict(state.reasons)
    taken: list[str] = []
    for device in wanted:
        choice = _other(now[device])
        if len(taken) == most or not _affordable(profiles, {**now, device: choice}, limits):
            continue
        now[device] = choice
        taken.append(device)
        if choice is state.coarse[device]:
            flipped.pop(device, None)
        else:
            flipped[device] = choice
        reasons[device] = f"{reason}: changed in round {state.round}"
    trial = Flips({device: former[device] for device in taken}, state.losses) if taken else None
    return replace(state, flipped=flipped, reasons=reasons, trial=trial)


def _other(choice: Choice) -> Choice:
    return Choice.PTQ if choice is Choice.QAT else Choice.QAT


def _affordable(profiles: Mapping[str, Profile], choices: Assignment, limits: Allocation) -> bool:
    return round_seconds(profiles, choices) <= max(limits.budget_seconds, limits.least_seconds)


def state_to_json(state: State) -> dict[str, Any]:
    """What the journal stores; the settings are the job file's."""
    return {
        "devices": {device: asdict(known) for device, known in state.devices.items()},
        "coarse": dict(state.coarse),
        "reasons": dict(state.reasons),
        "flipped": dict(state.flipped),
        "trial": None if state.trial is None else asdict(state.trial),
        "resting": dict(state.resting),
        "scale": to_json(state.scale),
        "statistics": to_json(state.statistics),
        "phi": list(state.phi),
        "told": dict(state.told),
        "round": state.round,
        "looked": state.looked,
        "due": state.due,
        "losses": list(state.losses),
        "last_loss": state.last_loss,
    }


def state_from_json(settings: PrecisionSettings, saved: Mapping[str, Any]) -> State:
    """The inverse of `state_to_json`, under the settings of the job file as it is now."""
    trial = saved["trial"]
    scale = saved["scale"]
    return State(
        settings,
        devices={device: Known(**known) for device, known in saved["devices"].items()},
        coarse={device: Choice(choice) for device, choice in saved["coarse"].items()},
        reasons=saved["reasons"],
        flipped={device: Choice(choice) for device, choice in saved["flipped"].items()},
        trial=None
        if trial is None
        else Flips({d: Choice(c) for d, c in trial["former"].items()}, tuple(trial["before"]), trial["strikes"]),
        resting=saved["resting"],
        scale=None if scale is None else Scale(*(tuple(part) for part in scale)),
        statistics=Statistics(*(tuple(part) for part in saved["statistics"])),
        phi=tuple(saved["phi"]),
        told={device: Choice(choice) for device, choice in saved["told"].items()},
        round=saved["round"],
        looked=saved["looked"],
        due=saved["due"],
        losses=tuple(saved["losses"]),
        last_loss=saved["last_loss"],
    )
