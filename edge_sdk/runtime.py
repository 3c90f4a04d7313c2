"""Runs the graphs of a program on plain `onnxruntime`: `Predictor` serves, `Stepper` trains or accumulates.

The contract of the graphs is `step-graphs.md`, section 2: a value's name says what it is, and the classes are read off
the session's own inputs and outputs. Nothing here knows a method or a scope.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle, Program
from edge_sdk.draws import Draws
from edge_sdk.errors import BundleError, EdgewiseError, SampleError, TaskError
from edge_sdk.features import Prefix
from edge_sdk.fields import INPUT, WEIGHT, FieldSpec, check_batch
from edge_sdk.samples import Ids
from edge_sdk.sessions import RuntimeProfile, Signature, give_back, inputs_of, open_session, outputs_of, shared
from edge_sdk.tensors import Array, Tensors

__all__ = ["NonFiniteLoss", "Predictor", "RuntimeProfile", "StepInterrupted", "StepResult", "Stepper", "open_session"]

_STATE = re.compile(r"(p|s\d+|e|n|a)\.(.+)")
_GIVEN = ("p.", "n.", "c.")  # classes of inputs that come with the start
_NEXT = ".next"
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(double)": np.dtype(np.float64),
    "tensor(int64)": np.dtype(np.int64),
}


class NonFiniteLoss(TaskError):
    """A step gave a loss or a tensor that is not finite; the state is that of the last good step."""


class StepInterrupted(TaskError):
    """A step was ended before it was done; the state is that of the last whole step."""


@dataclass(frozen=True)
class StepResult:
    """One step: the data loss before the step, the graph's metrics, wall seconds, samples in the batch."""

    loss: float
    metrics: Mapping[str, float]
    seconds: float
    num_examples: int


@dataclass(frozen=True)
class _Served:
    """What one prediction needs, exchanged as a whole: a call that has begun keeps the memory of its session's constants."""

    session: onnxruntime.InferenceSession
    late: Mapping[str, Array]
    tensors: Mapping[str, Array]


class Predictor:
    """Serves a program's `infer` graph; safe to call from several threads, also while tensors are exchanged."""

    def __init__(
        self, bundle: Bundle, program: Program, tensors: Tensors, profile: RuntimeProfile | None = None
    ) -> None:
        if program.infer is None:
            raise TaskError(f"program {program.id!r} only accumulates; it cannot predict")
        self._file, self._profile = bundle.file(program.infer), profile or RuntimeProfile()
        late = late_constants(bundle, program, tensors)
        session = open_session(self._file, self._profile, late)
        self._fields = {field.name: field for field in bundle.fields}
        self._inputs = [value.name for value in session.get_inputs()]
        self._data = [name for name in self._inputs if name.startswith("d.")]
        self._outputs = [value.name for value in session.get_outputs()]
        self._program, self._bundle = program, bundle
        for name, _, shape in inputs_of(session):
            entry = next((e for t in program.reads if (e := bundle.tensors[t]).graph_name == name), None)
            if name not in self._fields and (entry is None or entry.shape != shape):
                raise BundleError(
                    f"{bundle.path}: the graphs of program {program.id!r} do not fit their contract: I4: "
                    f"{name} of {program.infer} is {list(shape)}, the table has "
                    f"{'no such tensor' if entry is None else list(entry.shape)}"
                )
        self._served = _Served(session, late, _by_graph_name(bundle, program, tensors, self._inputs))

    def set_tensors(self, tensors: Tensors) -> None:
        """Serve with these tensors (table names) from the next call on. Raises `TaskError` if one is missing or misshapen."""
        session, late = self._served.session, self._served.late
        inputs = _by_graph_name(self._bundle, self._program, tensors, self._inputs)
        wanted = late_constants(self._bundle, self._program, tensors)
        if any((value != late[name]).any() for name, value in wanted.items()):
            session, late = open_session(self._file, self._profile, wanted), wanted
        self._served = _Served(session, late, inputs)

    def predict(self, x: Array | Mapping[str, Array]) -> Array | dict[str, Array]:
        """Run the model on a batch `[n, *shape]` or on one sample `[*shape]` of the bundle's input field.

        `x` maps field names to arrays where the model has several inputs. Returns the output, without the batch axis
        for one sample; a dict by output name where there are several. Raises `SampleError`.
        """
        given = dict(x) if isinstance(x, Mapping) else {INPUT: np.asarray(x)}
        if sorted(given) != sorted(self._data):
            raise SampleError(
                f"this model predicts from {', '.join(self._data)}; found {', '.join(given) or 'nothing'}"
            )
        single = all(value.shape == self._fields[name].shape for name, value in given.items())
        batch = {name: value[None] if single else value for name, value in given.items()}
        if check_batch(self._fields, batch) == 0:
            raise SampleError("the batch is empty; expected at least one sample")
        served = self._served
        values = served.session.run(self._outputs, {**served.tensors, **batch})
        if single:
            values = [value[0] for value in values]
        return values[0] if len(values) == 1 else dict(zip(self._outputs, values, strict=True))


class Stepper:
    """One task's graphs and state: runs one step after another. Not thread-safe, but for `terminate`.

    State lives in two sets of buffers: each step reads one and writes the other, so a step that fails leaves the state of
    the last good one, and nothing is copied or allocated per step. Where a program has a frozen prefix, it runs first, and
    its features of samples seen before are kept as far as the profile's `cache_bytes` go.
    """

    def __init__(
        self,
        bundle: Bundle,
        program: Program,
        start: Tensors,
        profile: RuntimeProfile | None = None,
        seed: int = 0,
    ) -> None:
        self._bundle, self._program, self._profile = bundle, program, profile or RuntimeProfile()
        self._fields = {field.name: field for field in bundle.fields}
        self._draws, self._seed = Draws(seed, "variant"), seed
        self._odds = [variant.weight for variant in program.step]
        self._prefix = Prefix(bundle, program, self._profile, seed) if program.prefix else None
        self._late = late_constants(bundle, program, start)
        sessions = [open_session(bundle.file(variant.file), self._profile, self._late) for variant in program.step]
        self._check_signatures(sessions)
        inputs = {name: (kind, shape) for name, kind, shape in inputs_of(sessions[0])}
        read = [*inputs, *(name for name, _, _ in self._prefix.inputs)] if self._prefix else list(inputs)
        self._data = sorted({name for name in read if name.startswith("d.") and name != WEIGHT})
        self._random = {
            name: shape
            for name, _, shape in [*inputs_of(sessions[0]), *(self._prefix.inputs if self._prefix else [])]
            if name.startswith("r.")
        }
        self._weighted = WEIGHT in inputs
        self._rests = {bundle.tensors[name].graph_name for name in program.constants}
        self._state = [name for name in inputs if self._is_state(name)]
        self._hyper = {
            name.removeprefix("h."): np.zeros((), _DTYPES[kind])
            for name, (kind, _) in inputs.items()
            if name.startswith("h.")
        }
        self._check_state(inputs, outputs_of(sessions[0]))
        self._steps = 0
        self._side = 0
        self._buffers = self._fill(inputs, start)
        if self.state_bytes != program.state_bytes:
            raise self._broken(
                f"I12: the state takes {self.state_bytes} bytes, the manifest says {program.state_bytes}"
            )
        # OrtValues share the memory of these arrays and do not keep it alive.
        self._constants = self._constant_tensors(inputs, start)
        self._results = {
            name: np.zeros([int(size) for size in shape], np.float32)
            for name, _, shape in outputs_of(sessions[0])
            if not name.endswith(_NEXT)
        }
        self._bindings = [[self._bind(session, side) for side in (0, 1)] for session in sessions]
        self._sessions = sessions
        self._halves: _Halves | None = None
        self._largest = self._largest_batch()
        self._run_options = onnxruntime.RunOptions()

    @property
    def state_bytes(self) -> int:
        """Bytes of one set of state buffers."""
        return sum(value.nbytes for value in self._buffers[0].values())

    @property
    def kept_samples(self) -> int:
        """How many samples' features are kept."""
        return 0 if self._prefix is None else len(self._prefix.cache)

    @property
    def prefix_runs(self) -> int:
        """How often the frozen part has run."""
        return 0 if self._prefix is None else self._prefix.runs

    def step(
        self,
        batch: Mapping[str, Array],
        hyper: Mapping[str, float] | None = None,
        *,
        ids: Ids | None = None,
        seconds: float | None = None,
    ) -> StepResult:
        """Run one step on `batch` (`d.x`, `d.y`, ...; `d.w` float32 `[n]` is filled with ones if absent).

        `hyper` maps names without `h.` to values; absent ones take the program's default. `ids`, one per sample, lets
        features of the frozen part be kept for the next time. A step of more than `seconds` is ended. Raises
        `SampleError` for data and `TaskError` for hyper-parameters that do not fit, `NonFiniteLoss` when the step
        diverges, `StepInterrupted`: in each case the state is that of the last good step.
        """
        began = time.perf_counter()
        data = self._checked(batch)
        count = len(next(iter(data.values())))
        if ids is not None and len(ids) != count:
            raise SampleError(f"the batch holds {count} samples and {len(ids)} ids")
        self._set_hyper(hyper or {})
        with self._watched(seconds):
            if self._largest is not None and count > self._largest:
                self._run_in_parts(data, ids, count)
            else:
                self._run(data, ids)
        loss = float(self._results["loss"].ravel()[0])
        new = self._buffers[1 - self._side]
        bad = next((name for name in self._state if not np.isfinite(new[name].sum(dtype=np.float64))), None)
        if not np.isfinite(loss) or bad is not None:
            raise NonFiniteLoss(
                f"step {self._steps + 1} of {self._program.id!r}: "
                + (f"the loss is {loss}" if bad is None else f"{bad} is no longer finite")
                + ": lower the learning rate, or look at the samples"
            )
        self._side = 1 - self._side
        self._steps += 1
        metrics = {
            name.removeprefix("metric."): float(value.ravel()[0])
            for name, value in self._results.items()
            if name != "loss"
        }
        return StepResult(loss, metrics, time.perf_counter() - began, count)

    def tensors(self) -> dict[str, Array]:
        """What an update may hold, by table name, as copies: trained tensors and statistics, or the accumulators."""
        present = self._buffers[self._side]
        named = {self._bundle.tensors[name].graph_name: name for name in self._program.tensors}
        return {named[name]: present[name].copy() for name in self._state if name in named}

    def terminate(self) -> None:
        """End the step that runs now, if one does; from any thread."""
        self._run_options.terminate = True

    def close(self) -> None:
        """Let the sessions and their memory go."""
        self._bindings.clear()
        self._sessions.clear()
        self._halves = None
        if self._prefix is not None:
            self._prefix.close()
        give_back()

    # One step.

    @contextmanager
    def _watched(self, seconds: float | None) -> Iterator[None]:
        """End what runs inside after `seconds`, and say which step failed and why."""
        self._run_options.terminate = False
        watch = None if seconds is None else threading.Timer(max(0.0, seconds), self.terminate)
        try:
            if watch is not None:
                watch.daemon = True
                watch.start()
            yield
        except EdgewiseError:
            raise
        except Exception as error:
            if self._run_options.terminate:
                limit = "" if seconds is None else f" after {seconds:.3g} s"
                raise StepInterrupted(f"step {self._steps + 1} of {self._program.id!r} was ended{limit}") from error
            raise TaskError(f"step {self._steps + 1} of {self._program.id!r} failed: {str(error)[:300]}") from error
        finally:
            if watch is not None:
                watch.cancel()

    def _run(self, data: Mapping[str, Array], ids: Ids | None) -> None:
        variant = 0 if len(self._odds) == 1 else self._draws.choice(self._odds)
        binding = self._bindings[variant][self._side]
        self._bind_data(binding, self._sessions[variant], data, ids, self._drawn(0, len(next(iter(data.values())))))
        self._sessions[variant].run_with_iobinding(binding, self._run_options)

    def _run_in_parts(self, data: Mapping[str, Array], ids: Ids | None, count: int) -> None:
        """The same step from sums over parts of the batch: gradients weighted by their share of `d.w`, then the optimizer."""
        assert self._largest is not None
        if self._halves is None:
            self._halves = self._opened_halves()
        halves = self._halves
        weights = data[WEIGHT] if self._weighted else np.ones(count, np.float32)
        whole = float(weights.sum(dtype=np.float64))
        for total in (*halves.totals.values(), *self._results.values()):
            total[...] = 0
        for rows in np.array_split(np.arange(count), math.ceil(count / self._largest)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            share = np.float32(float(weights[part].sum(dtype=np.float64)) / whole)
            if share == 0:
                continue
            chosen = {name: values[part] for name, values in data.items()}
            drawn = self._drawn(part.start, len(rows))
            binding = halves.gradients[self._side]
            self._bind_data(binding, halves.gradients_session, chosen, None if ids is None else ids[part], drawn)
            halves.gradients_session.run_with_iobinding(binding, self._run_options)
            for name, total in [*halves.totals.items(), *self._results.items()]:
                np.add(total, share * halves.parts[name].reshape(total.shape), out=total)
        halves.apply_session.run_with_iobinding(halves.apply[self._side], self._run_options)

    def _bind_data(
        self,
        binding: onnxruntime.IOBinding,
        session: onnxruntime.InferenceSession,
        data: Mapping[str, Array],
        ids: Ids | None,
        drawn: Mapping[str, Array],
    ) -> None:
        given = {**data, **drawn}
        read = {value.name for value in session.get_inputs()}
        for name in read & given.keys():
            binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
        if self._prefix is not None:
            for name, values in self._prefix.features(data, drawn, ids, self._run_options).items():
                if name in read:
                    binding.bind_ortvalue_input(name, shared(values))

    def _drawn(self, first: int, count: int) -> dict[str, Array]:
        """`r.*` of this step: by seed, step and name, so that a replay draws the same; of the batch's rows from `first` on."""
        return {
            name: Draws(self._seed, f"{name}/{self._steps + 1}").uniform((first + count, *(int(s) for s in shape[1:])))[
                first:
            ]
            for name, shape in self._random.items()
        }

    # Before the first step.

    def _is_state(self, name: str) -> bool:
        match = _STATE.fullmatch(name)
        # Where a program only accumulates, its other tensors are constants of the task.
        return match is not None and (match[1] == "a" if self._program.accumulates else name not in self._rests)

    def _check_signatures(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        """I3: all variants have the same signature; I7: what the prefix makes is what the step reads."""

        def signature(session: onnxruntime.InferenceSession) -> list[tuple[str, str, str]]:
            return sorted((n, kind, str(shape)) for n, kind, shape in [*inputs_of(session), *outputs_of(session)])

        for session, variant in zip(sessions[1:], self._program.step[1:], strict=True):
            if signature(session) != signature(sessions[0]):
                raise self._broken(f"I3: {variant.file} has another signature than {self._program.step[0].file}")
        made = {} if self._prefix is None else {name: (kind, shape[1:]) for name, kind, shape in self._prefix.outputs}
        for name, kind, shape in inputs_of(sessions[0]):
            if name.startswith("f.") and made.get(name) != (kind, shape[1:]):
                found = f"{made[name][0]} {list(made[name][1])}" if name in made else "nothing"
                raise self._broken(
                    f"I7: the step reads {name} as {kind} {list(shape[1:])} per sample, the prefix makes {found}"
                )

    def _check_state(self, inputs: Mapping[str, tuple[str, tuple[int | str, ...]]], outputs: Signature) -> None:
        """I1, I4 and the classes of inputs that this runtime can fill."""
        made = {name: (kind, shape) for name, kind, shape in outputs}
        if "loss" not in made:
            raise self._broken("the step has no output `loss`")
        expected = {name + _NEXT for name in self._state}
        found = {name for name in made if name.endswith(_NEXT)}
        if expected != found:
            raise self._broken(f"I1: state and its successors differ: {', '.join(sorted(expected ^ found))}")
        for name in self._state:
            if inputs[name] != made[name + _NEXT]:
                raise self._broken(f"I1: {name} and {name}{_NEXT} differ in shape or dtype")
        table = {self._bundle.tensors[name].graph_name: self._bundle.tensors[name] for name in self._program.reads}
        for name, entry in table.items():
            if name in inputs and entry.shape != inputs[name][1]:
                raise self._broken(
                    f"I4: {name} is {list(inputs[name][1])} in the graph and {list(entry.shape)} in the table"
                )
        for name in inputs:
            if name.startswith("d.") and name != WEIGHT and name not in self._fields:
                raise self._broken(f"the graph reads {name}, which is no field of the bundle")
            if name.startswith((*_GIVEN, "a.")) and name not in table:
                raise self._broken(f"I4: the graph reads {name}, which is no tensor of the program")
            if not name.startswith(("d.", "f.", "r.", "h.", "p0.", "c.")) and not _STATE.fullmatch(name):
                raise self._broken(f"this version cannot fill the graph's input {name}: upgrade edgewise")
        missing = [name for name in table if name not in inputs]
        if missing:
            raise self._broken(f"I4: the step does not read {missing[0]}")

    def _fill(
        self, inputs: Mapping[str, tuple[str, tuple[int | str, ...]]], start: Tensors
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Two sets of state buffers; the first holds the start values of step-graphs.md, section 2.2."""
        given = _by_graph_name(self._bundle, self._program, start, [n for n in inputs if n.startswith(_GIVEN)])
        first: dict[str, Array] = {}
        for name in self._state:
            kind, tensor = name.split(".", 1)
            if name in given:
                first[name] = np.array(given[name], order="C")
            elif kind == "e":
                first[name] = np.array(given[f"p.{tensor}"], order="C")
            else:
                dtype, shape = inputs[name]
                first[name] = np.zeros([int(size) for size in shape], _DTYPES[dtype])
        return first, {name: np.empty_like(value) for name, value in first.items()}

    def _constant_tensors(
        self, inputs: Mapping[str, tuple[str, tuple[int | str, ...]]], start: Tensors
    ) -> dict[str, Array]:
        names = [name for name in inputs if name.startswith((*_GIVEN, "p0.")) and name not in self._state]
        return {name: np.array(start[name.split(".", 1)[1]], order="C") for name in names}

    def _bind(
        self, session: onnxruntime.InferenceSession, side: int, more: Mapping[str, Array] | None = None
    ) -> onnxruntime.IOBinding:
        """All that a graph reads and writes but the data: state of this side in, of the other side out; `more` first."""
        binding = session.io_binding()
        hyper = {f"h.{name}": value for name, value in self._hyper.items()}
        given = {**self._buffers[side], **self._constants, **hyper, **(more or {})}
        new = {name + _NEXT: value for name, value in self._buffers[1 - side].items()}
        made = {**self._results, **new, **(more or {})}
        for name, _, _ in inputs_of(session):
            if name in given:
                binding.bind_ortvalue_input(name, shared(given[name]))
        for name, _, _ in outputs_of(session):
            binding.bind_ortvalue_output(name, shared(made[name]))
        return binding

    # Batches in parts.

    def _largest_batch(self) -> int | None:
        """The most samples that go through a step at once, None where the program knows no other way."""
        if self._program.gradients is None or self._program.apply is None:
            return None
        limits = [self._program.batch_largest] if self._program.batch_largest is not None else []
        each = float(self._program.cost.get("step_bytes_per_sample", 0))
        if self._profile.memory_bytes is not None and each > 0:
            limits.append(max(1, self._program.batch_minimum, int(self._profile.memory_bytes / each)))
        return min(limits, default=None)

    def _opened_halves(self) -> _Halves:
        assert self._program.gradients is not None
        assert self._program.apply is not None
        first, second = (
            open_session(self._bundle.file(name), self._profile)
            for name in (self._program.gradients, self._program.apply)
        )
        state = {name: self._buffers[0][name].shape for name in self._state}
        made = {name: shape for name, _, shape in outputs_of(first)}
        wanted = {name for name, _, _ in inputs_of(second) if name.startswith("grad.")}
        if wanted != {name for name in made if name.startswith("grad.")} or not self._results.keys() <= made.keys():
            raise self._broken(f"I1: {self._program.gradients} and {self._program.apply} do not fit each other")
        for name in wanted:
            if made[name] != state.get(f"p.{name.removeprefix('grad.')}"):
                raise self._broken(f"I1: {name} has not the shape of its tensor")
        if {name for name, _, _ in outputs_of(second)} != {name + _NEXT for name in self._state}:
            raise self._broken(f"I1: {self._program.apply} does not write the state")
        shapes = {name: [int(size) for size in shape] for name, shape in made.items()}
        parts = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        totals = {name: np.zeros(shapes[name], np.float32) for name in sorted(wanted)}
        return _Halves(
            first,
            second,
            parts,
            totals,
            [self._bind(first, side, parts) for side in (0, 1)],
            [self._bind(second, side, totals) for side in (0, 1)],
        )

    def _checked(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        absent = [name for name in self._data if name not in batch]
        if absent:
            raise SampleError(f"the batch has no {absent[0]}; it has {', '.join(batch) or 'nothing'}")
        data = {name: np.asarray(batch[name]) for name in self._data}
        count = check_batch(self._fields, data)
        if count < self._program.batch_minimum:
            raise SampleError(
                f"the batch holds {count} samples, program {self._program.id!r} needs {self._program.batch_minimum}"
            )
        if self._weighted:
            weights = np.asarray(batch[WEIGHT]) if WEIGHT in batch else np.ones(count, np.float32)
            FieldSpec(WEIGHT, "float32", ()).check(weights)
            if len(weights) != count or (weights < 0).any() or not weights.sum() > 0:
                raise SampleError(f"{WEIGHT} must hold {count} weights of 0 or more, at least one of them above 0")
            data[WEIGHT] = weights
        return data

    def _set_hyper(self, hyper: Mapping[str, float]) -> None:
        unknown = set(hyper) - set(self._program.hyper)
        if unknown:
            known = ", ".join(self._program.hyper) or "none"
            raise TaskError(f"program {self._program.id!r} has no hyper-parameter {min(unknown)!r}; it has {known}")
        for name, value in self._hyper.items():
            if name == "step":
                value[...] = self._steps + 1
                continue
            limits = self._program.hyper.get(name)
            if limits is None:
                raise self._broken(f"the graph reads h.{name}, which the manifest does not declare")
            wanted = hyper.get(name, limits.default)
            if not limits.minimum <= wanted <= limits.maximum:
                raise TaskError(
                    f"hyper-parameter {name} = {wanted:g} of {self._program.id!r} is outside "
                    f"{limits.minimum:g} to {limits.maximum:g}"
                )
            value[...] = wanted

    def _broken(self, finding: str) -> BundleError:
        return BundleError(
            f"{self._bundle.path}: the graphs of program {self._program.id!r} do not fit their contract: {finding}"
        )


@dataclass
class _Halves:
    """The step in two: sessions, the gradients of one part, their weighted sums, bindings for each side of the state."""

    gradients_session: onnxruntime.InferenceSession
    apply_session: onnxruntime.InferenceSession
    parts: dict[str, Array]
    totals: dict[str, Array]
    gradients: list[onnxruntime.IOBinding]
    apply: list[onnxruntime.IOBinding]


def late_constants(bundle: Bundle, program: Program, tensors: Tensors) -> dict[str, Array]:
    """What a program's graphs are opened with, by graph name, as copies. Raises `TaskError`."""
    wanted = {name: bundle.tensors[name].graph_name for name in program.late}
    checked = _checked_tensors(bundle, program, tensors, program.late, list(wanted.values()))
    return {name: np.array(value, order="C") for name, value in checked.items()}


def _by_graph_name(bundle: Bundle, program: Program, tensors: Tensors, wanted: list[str]) -> dict[str, Array]:
    """Tensors by table name -> by graph name, each checked against the table; only those that are wanted."""
    return _checked_tensors(bundle, program, tensors, program.reads, wanted)


def _checked_tensors(
    bundle: Bundle, program: Program, tensors: Tensors, names: Sequence[str], wanted: list[str]
) -> dict[str, Array]:
    found = {}
    for name in names:
        entry = bundle.tensors[name]
        if entry.kind == "a" or entry.graph_name not in wanted:
            continue
        value = tensors.get(name)
        if value is None or value.shape != entry.shape or value.dtype.name != entry.dtype:
            seen = "nothing" if value is None else f"{value.dtype} {list(value.shape)}"
            raise TaskError(
                f"tensor {name!r} of {program.id!r} should be {entry.dtype} {list(entry.shape)}, found {seen}"
            )
        found[entry.graph_name] = value
    return found
