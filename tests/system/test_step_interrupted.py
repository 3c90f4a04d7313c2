"""A step that is ended, or a process that is killed, leaves no half-made step behind (SG19)."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import RuntimeProfile, StepInterrupted, Stepper, StepResult
from edge_sdk.samples import SampleStore
from edge_sdk.training import TaskSpec, run_task
from export import ProgramSpec, build_bundle
from tests.cut_bundle import PROGRAM, cut_bundle, cut_data
from tests.environments import CHECKOUT

SIDE = 256
SLOW = "slow/layer/last/float"


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A frozen chain of products that takes long for a large batch, and a trained one behind it."""
    folder = tmp_path_factory.mktemp("slow")
    draw = np.random.default_rng(0)
    names = [f"m{index}.weight" for index in range(12)]
    constants = {name: draw.normal(0, SIDE**-0.5, (SIDE, SIDE)).astype(np.float32) for name in names}
    constants["last.weight"] = draw.normal(0, 0.05, (SIDE, 3)).astype(np.float32)
    values = ["x", *(f"{name}.out" for name in constants)]
    nodes = [
        helper.make_node("MatMul", [x, name], [y]) for x, name, y in zip(values, constants, values[1:], strict=False)
    ]
    graph = helper.make_graph(
        nodes,
        "slow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", SIDE])],
        [helper.make_tensor_value_info(values[-1], TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "slow.onnx"
    )
    example = draw.normal(size=(4, SIDE)).astype(np.float32), np.arange(4) % 3
    spec = ProgramSpec("layer", {"modules": ["last"]}, "float", "sgd")
    build_bundle(folder / "slow.onnx", example, folder / "b", name="slow", loss="cross_entropy", programs=[spec])
    with Bundle.open(folder / "b") as bundle:
        yield bundle


def batch_of(count: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {"d.x": draw.random((count, SIDE), np.float32), "d.y": draw.integers(0, 3, count)}


def stepper(bundle: Bundle) -> Stepper:
    program = bundle.program(SLOW)
    return Stepper(bundle, program, bundle.initial(program), RuntimeProfile(cache_bytes=0))


def test_a_step_past_its_time_is_ended_and_the_state_is_that_of_the_last_whole_step(slow: Bundle) -> None:
    steps, undisturbed = stepper(slow), stepper(slow)
    small, large = batch_of(4), batch_of(8192)
    began = time.perf_counter()
    steps.step(large, {"lr": 0.0})
    whole = time.perf_counter() - began
    undisturbed.step(large, {"lr": 0.0})
    with pytest.raises(StepInterrupted, match=f"step 2 of '{SLOW}' was ended after"):
        steps.step(large, {"lr": 0.1}, seconds=whole / 10)
    for each in (steps, undisturbed):
        each.step(small, {"lr": 0.1})
    for name, value in undisturbed.tensors().items():
        np.testing.assert_array_equal(steps.tensors()[name], value)


def test_another_thread_may_end_a_step(slow: Bundle) -> None:
    steps = stepper(slow)
    before = steps.tensors()
    began = time.perf_counter()
    steps.step(batch_of(8192), {"lr": 0.0})
    threading.Timer((time.perf_counter() - began) / 10, steps.terminate).start()
    with pytest.raises(StepInterrupted):
        steps.step(batch_of(8192), {"lr": 0.1})
    for name, value in before.items():
        np.testing.assert_array_equal(steps.tensors()[name], value)


def test_a_task_that_runs_out_of_time_within_a_step_sends_its_whole_steps(slow: Bundle, tmp_path: Path) -> None:
    store = SampleStore(tmp_path / "samples.sqlite", slow.fields, max_bytes=64 << 20)
    data = batch_of(4096)
    store.add_many(data["d.x"], data["d.y"], recording="all")
    program = slow.program(SLOW)
    done: list[StepResult] = []

    def run(steps: int, seconds: float | None) -> bytes:
        done.clear()
        spec = TaskSpec(SLOW, "0" * 64, steps, 0, 2048, 0.01, seed=1)
        profile = RuntimeProfile(cache_bytes=0)
        outcome = run_task(
            slow,
            spec,
            slow.initial(program),
            store,
            profile=profile,
            feedback={},
            seconds=seconds,
            on_step=lambda result, *_: done.append(result),
        )
        assert outcome.steps == len(done)
        return outcome.body

    run(3, None)
    typical = sorted(result.seconds for result in done)[1]
    body = run(1000, 6.5 * typical)
    assert 1 <= len(done) < 1000
    assert body == run(len(done), None)
    with pytest.raises(StepInterrupted):
        run(1000, typical / 20)
    store.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.system.test_step_interrupted import body
def on_step(result, done, of):
    if done == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
print(body(Path(sys.argv[1]), Path(sys.argv[2]), on_step))
"""


def body(path: Path, samples: Path, on_step) -> str:
    """Run a task and return the digest of its body."""
    with Bundle.open(path) as bundle:
        store = SampleStore(samples, bundle.fields, max_bytes=1 << 20)
        program = bundle.program(PROGRAM)
        spec = TaskSpec(PROGRAM, "0" * 64, 12, 0, 8, 0.05, seed=4)
        outcome = run_task(
            bundle, spec, bundle.initial(program), store, profile=RuntimeProfile(), feedback={}, on_step=on_step
        )
        store.close()
        return hashlib.sha256(outcome.body).hexdigest()


def test_a_task_killed_between_two_steps_ends_with_the_same_bytes_when_it_is_done_again(tmp_path: Path) -> None:
    path, samples = cut_bundle(tmp_path / "cut.bundle"), tmp_path / "samples.sqlite"
    with Bundle.open(path) as bundle:
        store = SampleStore(samples, bundle.fields, max_bytes=1 << 20)
        store.add_many(*cut_data(40), recording="all")
        store.close()
    undisturbed = body(path, samples, lambda *_: None)
    printed = []
    for step in (5, 0):  # 0: never
        command = [sys.executable, "-c", KILLED, str(path), str(samples), str(step)]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=120, env=dict(os.environ))
        printed.append((done.returncode, done.stdout.strip()))
    assert printed == [(-signal.SIGKILL, ""), (0, undisturbed)]
