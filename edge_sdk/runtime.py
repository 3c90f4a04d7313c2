"""Runs the graphs of a program on plain `onnxruntime`: `Predictor` serves, `Stepper` trains or accumulates.

The contract of the graphs is `step-graphs.md`, section 2: a value's name says what it is, and the classes are read off
the session's own inputs and outputs. Nothing here knows a method or a scope.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle, Program
from edge_sdk.draws import Draws
from edge_sdk.errors import BundleError, SampleError, TaskError
from edge_sdk.fields import INPUT, WEIGHT, FieldSpec, check_batch
from edge_sdk.tensors import Array, Tensors

_STATE = re.compile(r"(p|s\d+|e|n|a)\.(.+)")
_GIVEN = ("p.", "n.", "c.")  # classes of inputs that come with the start
_NEXT = ".next"


class NonFiniteLoss(TaskError):
    """A step gave a loss or a tensor that is not finite; the state is that of the last good step."""


@dataclass(frozen=True)
class RuntimeProfile:
    """How much of the machine a session may take; the device profile decides.

    `prepacking` off keeps weights as mapped pages at the price of slower matrix products (step-graphs.md, 2.5).
    """

    threads: int = 1
    arena: bool = True
    memory_pattern: bool = False
    prepacking: bool = True


@dataclass(frozen=True)
class StepResult:
    """One step: the data loss before the step, the graph's metrics, wall seconds, samples in the batch."""

    loss: float
    metrics: Mapping[str, float]
    seconds: float
    num_examples: int


def open_session(path: Path, profile: RuntimeProfile) -> onnxruntime.InferenceSession:
    """An inference session on the CPU. Raises `BundleError` when the runtime refuses the graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = profile.arena
    options.enable_mem_pattern = profile.memory_pattern
    options.log_severity_level = 3
    # The app beside us needs the core more than a waiting thread does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # A weight that is stored in int8 is multiplied in float32: by itself the runtime would round the activations to int8,
    # and the gradients of adapters are then off by percents.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not profile.prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} refuses this graph ({str(error)[:300]}): "
            "export the bundle again, or upgrade onnxruntime"
        ) from error


class Predictor:
    """Serves a program's `infer` graph; safe to call from several threads, also while tensors are exchanged."""

    def __init__(
        self, bundle: Bundle, program: Program, tensors: Tensors, profile: RuntimeProfile | None = None
    ) -> None:
        if program.infer is None:
            raise TaskError(f"program {program.id!r} only accumulates; it cannot predict")
        self._session = open_session(bundle.file(program.infer), profile or RuntimeProfile())
        self._fields = {field.name: field for field in bundle.fields}
        self._inputs = [value.name for value in self._session.get_inputs()]
        self._data = [name for name in self._inputs if name.startswith("d.")]
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._program, self._bundle = program, bundle
        self._tensors: dict[str, Array] = {}
        self.set_tensors(tensors)

    def set_tensors(self, tensors: Tensors) -> None:
        """Serve with these tensors (table names) from the next call on. Raises `TaskError` if one is missing or misshapen."""
        self._tensors = _by_graph_name(self._bundle, self._program, tensors, self._inputs)

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
        values = self._session.run(self._outputs, {**self._tensors, **batch})
        if single:
            values = [value[0] for value in values]
        return values[0] if len(values) == 1 else dict(zip(self._outputs, values, strict=True))


class Stepper:
    """One task's graphs and state: runs one step after another. Not thread-safe.

    State lives in two sets of buffers: each step reads one and writes the other, so a step that fails leaves the state of
    the last good one, and nothing is copied or allocated per step.
    """

    def __init__(
        self,
        bundle: Bundle,
        program: Program,
        start: Tensors,
        profile: RuntimeProfile | None = None,
        seed: int = 0,
    ) -> None:
        if program.prefix:
            raise TaskError(
                f"program {program.id!r} has a frozen prefix, which this version cannot run: upgrade edgewise"
            )
        self._bundle, self._program = bundle, program
        self._fields = {field.name: field for field in bundle.fields}
        self._draws = Draws(seed, "variant")
        self._odds = [variant.weight for variant in program.step]
        sessions = [open_session(bundle.file(variant.file), profile or RuntimeProfile()) for variant in program.step]
        inputs = {value.name: value for value in sessions[0].get_inputs()}
        self._check_signatures(sessions)
        self._data = [name for name in inputs if name.startswith("d.") and name != WEIGHT]
        self._weighted = WEIGHT in inputs
        self._rests = {bundle.tensors[name].graph_name for name in program.constants}
        self._state = [name for name in inputs if self._is_state(name)]
        self._hyper = {
            name.removeprefix("h."): np.zeros((), np.int64 if name == "h.step" else np.float32)
            for name in inputs
            if name.startswith("h.")
        }
        self._check_state(inputs, sessions[0])
        self._steps = 0
        self._side = 0
        self._buffers = self._fill(inputs, start)
        constants = self._constants(inputs, start)
        self._results = {
            value.name: np.zeros([int(size) for size in value.shape], np.float32)
            for value in sessions[0].get_outputs()
            if not value.name.endswith(_NEXT)
        }
        self._bindings = [[self._bind(session, side, constants) for side in (0, 1)] for session in sessions]
        self._sessions = sessions
        # OrtValues share the memory of these arrays and do not keep it alive.
        self._held = constants

    @property
    def state_bytes(self) -> int:
        """Bytes of one set of state buffers."""
        return sum(value.nbytes for value in self._buffers[0].values())

    def step(self, batch: Mapping[str, Array], hyper: Mapping[str, float] | None = None) -> StepResult:
        """Run one step on `batch` (`d.x`, `d.y`, ...; `d.w` float32 `[n]` is filled with ones if absent).

        `hyper` maps names without `h.` to values; absent ones take the program's default. Raises `SampleError` for data
        and `TaskError` for hyper-parameters that do not fit, `NonFiniteLoss` when the step diverges: in each case the
        state is that of the last good step.
        """
        began = time.perf_counter()
        data = self._checked(batch)
        count = len(next(iter(data.values())))
        self._set_hyper(hyper or {})
        variant = 0 if len(self._odds) == 1 else self._draws.choice(self._odds)
        binding = self._bindings[variant][self._side]
        for name, values in data.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(values))
        try:
            self._sessions[variant].run_with_iobinding(binding)
        except Exception as error:
            raise TaskError(f"step {self._steps + 1} of {self._program.id!r} failed: {str(error)[:300]}") from error
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

    def close(self) -> None:
        """Let the sessions and their memory go."""
        self._bindings.clear()
        self._sessions.clear()
        _give_back()

    def _is_state(self, name: str) -> bool:
        match = _STATE.fullmatch(name)
        # Where a program only accumulates, its other tensors are constants of the task.
        return match is not None and (match[1] == "a" if self._program.accumulates else name not in self._rests)

    def _check_signatures(self, sessions: list[onnxruntime.InferenceSession]) -> None:
        """I3: all variants have the same signature."""

        def signature(session: onnxruntime.InferenceSession) -> list[tuple[str, str, str]]:
            values = [*session.get_inputs(), *session.get_outputs()]
            return sorted((value.name, value.type, str(value.shape)) for value in values)

        for session, variant in zip(sessions[1:], self._program.step[1:], strict=True):
            if signature(session) != signature(sessions[0]):
                raise self._broken(f"{variant.file} has another signature than {self._program.step[0].file}")

    def _check_state(self, inputs: Mapping[str, Any], session: onnxruntime.InferenceSession) -> None:
        """I1, I4 and the classes of inputs that this runtime can fill."""
        outputs = {value.name: value for value in session.get_outputs()}
        if "loss" not in outputs:
            raise self._broken("the step has no output `loss`")
        expected = {name + _NEXT for name in self._state}
        found = {name for name in outputs if name.endswith(_NEXT)}
        if expected != found:
            raise self._broken(f"state and its successors differ: {', '.join(sorted(expected ^ found))}")
        for name in self._state:
            if inputs[name].shape != outputs[name + _NEXT].shape or inputs[name].type != outputs[name + _NEXT].type:
                raise self._broken(f"{name} and {name}{_NEXT} differ in shape or dtype")
        table = {self._bundle.tensors[name].graph_name: self._bundle.tensors[name] for name in self._program.reads}
        for name, entry in table.items():
            if name in inputs and list(entry.shape) != list(inputs[name].shape):
                raise self._broken(f"{name} is {inputs[name].shape} in the graph and {list(entry.shape)} in the table")
        for name in inputs:
            if name.startswith("d.") and name != WEIGHT and name not in self._fields:
                raise self._broken(f"the graph reads {name}, which is no field of the bundle")
            if not name.startswith(("d.", "h.", "p0.", "c.")) and not _STATE.fullmatch(name):
                raise self._broken(f"this version cannot fill the graph's input {name}: upgrade edgewise")
        missing = [name for name in table if name not in inputs]
        if missing:
            raise self._broken(f"the step does not read {missing[0]}")

    def _fill(self, inputs: Mapping[str, Any], start: Tensors) -> tuple[dict[str, Array], dict[str, Array]]:
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
                dtype = np.float64 if inputs[name].type == "tensor(double)" else np.float32
                first[name] = np.zeros([int(size) for size in inputs[name].shape], dtype)
        return first, {name: np.empty_like(value) for name, value in first.items()}

    def _constants(self, inputs: Mapping[str, Any], start: Tensors) -> dict[str, Array]:
        names = [name for name in inputs if name.startswith((*_GIVEN, "p0.")) and name not in self._state]
        return {name: np.array(start[name.split(".", 1)[1]], order="C") for name in names}

    def _bind(
        self, session: onnxruntime.InferenceSession, side: int, constants: Mapping[str, Array]
    ) -> onnxruntime.IOBinding:
        binding = session.io_binding()
        old, new = self._buffers[side], self._buffers[1 - side]
        hyper = {f"h.{name}": value for name, value in self._hyper.items()}
        for name, value in {**old, **constants, **hyper}.items():
            binding.bind_ortvalue_input(name, _shared(value))
        for name, value in self._results.items():
            binding.bind_ortvalue_output(name, _shared(value))
        for name, value in new.items():
            binding.bind_ortvalue_output(name + _NEXT, _shared(value))
        return binding

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


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps what a closed session used, in pieces, for the next one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none and need none
    if trim is not None:
        trim(0)


def _shared(value: Array) -> onnxruntime.OrtValue:
    """An OrtValue on the array's own memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def _by_graph_name(bundle: Bundle, program: Program, tensors: Tensors, wanted: list[str]) -> dict[str, Array]:
    """Tensors by table name -> by graph name, each checked against the table; only those that are wanted."""
    found = {}
    for name in program.reads:
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
