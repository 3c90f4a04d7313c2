"""What must not change a step: padding, order, a learning rate of zero, an adapter of zero, parts (SG7); and replays (SG12)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from edge_sdk.samples import SampleStore
from edge_sdk.training import TaskSpec, run_task
from export import ProgramSpec, build_bundle
from tests.cut_bundle import EVALUATE, PROGRAM, cut_bundle, cut_data, cut_model

ADAPTER = "cut/lora/r2/int8"
X, Y = cut_data(48)
PROFILE = RuntimeProfile(cache_dtype="float32")


@pytest.fixture(scope="module", params=["sgd", "adamw"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    path = tmp_path_factory.mktemp("cut") / "cut.bundle"
    with Bundle.open(cut_bundle(path, optimizer=request.param)) as opened:
        yield opened


def stepper(bundle: Bundle, program: str = PROGRAM, **options: Any) -> Stepper:
    chosen = bundle.program(program)
    return Stepper(bundle, chosen, bundle.initial(chosen), PROFILE, **options)


def rows(index: Any) -> dict[str, np.ndarray]:
    return {"d.x": X[index], "d.y": Y[index]}


def assert_close(left: Stepper, right: Stepper, tolerance: float) -> None:
    for name, value in left.tensors().items():
        np.testing.assert_allclose(right.tensors()[name], value, rtol=0, atol=tolerance, err_msg=name)


# Of 5 samples, padded to 7; and of 20, in parts of at most 8, padded so that a whole part is padding.
@pytest.mark.parametrize(("count", "padding"), [(1, 3), (5, 2), (20, 12), (13, 1)])
def test_padding_of_weight_zero_equals_the_short_batch(bundle: Bundle, count: int, padding: int) -> None:
    short, padded = stepper(bundle), stepper(bundle)
    repeated = np.r_[np.arange(count), np.zeros(padding, int)]
    weights = np.r_[np.ones(count, np.float32), np.zeros(padding, np.float32)]
    for _ in range(3):
        left = short.step(rows(slice(0, count)), {"lr": 1e-3})
        right = padded.step({**rows(repeated), "d.w": weights}, {"lr": 1e-3})
        assert left.loss == pytest.approx(right.loss, abs=1e-6)
    assert_close(short, padded, 1e-6)


def test_padding_is_counted_by_no_evaluation(bundle: Bundle) -> None:
    counter = stepper(bundle, EVALUATE)
    counter.step({**rows([0, 1, 2, 0, 0]), "d.w": np.array([1, 1, 1, 0, 0], np.float32)})
    assert counter.tensors()["evaluate.total"].sum() == 3


def test_the_order_of_a_batch_does_not_matter(bundle: Bundle) -> None:
    one, other = stepper(bundle), stepper(bundle)
    order = np.random.default_rng(0).permutation(20)
    assert one.step(rows(slice(0, 20))).loss == pytest.approx(other.step(rows(order)).loss, abs=1e-6)


@pytest.mark.parametrize("count", [5, 20])
def test_a_learning_rate_of_zero_returns_the_tensors_bit_for_bit(bundle: Bundle, count: int) -> None:
    steps = stepper(bundle)
    for _ in range(2):
        steps.step(rows(slice(0, count)), {"lr": 0.0, "weight_decay": 0.0})
    start = bundle.initial(bundle.program(PROGRAM))
    for name, value in steps.tensors().items():
        np.testing.assert_array_equal(value, start[name])


def test_one_batch_in_parts_equals_itself_at_once(bundle: Bundle) -> None:
    """20 samples are too many here; of the same samples 8 at a time, no average of gradients is the same by chance."""
    parts, once = stepper(bundle), stepper(bundle)
    once._largest = None
    weights = np.random.default_rng(1).uniform(0, 2, 20).astype(np.float32)
    for _ in range(5):
        losses = [steps.step({**rows(slice(0, 20)), "d.w": weights}, {"lr": 1e-3}).loss for steps in (parts, once)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert parts.prefix_runs == 15
    assert once.prefix_runs == 5
    assert_close(once, parts, 1e-6)


def test_an_adapter_of_zero_predicts_as_its_base_bit_for_bit(tmp_path: Path) -> None:
    model = cut_model(tmp_path / "net.onnx")
    programs = [ProgramSpec("lora", {"rank": 2}, "int8", "sgd")]
    build_bundle(model, cut_data(16), tmp_path / "l.bundle", name="cut", loss="cross_entropy", programs=programs)
    with Bundle.open(tmp_path / "l.bundle") as bundle:
        program = bundle.program(ADAPTER)
        start = bundle.initial(program)
        zero = {name: value * (0 if name.endswith("lora_b") else 7) for name, value in start.items()}
        served = Predictor(bundle, program, start)
        before = np.asarray(served.predict(X))
        served.set_tensors(zero)
        np.testing.assert_array_equal(served.predict(X), before)
        moved = {name: value + np.float32(0.1) for name, value in start.items()}
        served.set_tensors(moved)
        assert np.abs(np.asarray(served.predict(X)) - before).max() > 0.01


# Replays.


def task(bundle: Bundle, folder: Path, seed: int) -> bytes:
    store = SampleStore(folder / f"{seed}.sqlite", bundle.fields, max_bytes=1 << 20)
    if not len(store):
        store.add_many(X, Y, recording="all")
    spec = TaskSpec(PROGRAM, "0" * 64, 0, 3, 16, 0.01, seed=seed)
    program = bundle.program(PROGRAM)
    try:
        return run_task(bundle, spec, bundle.initial(program), store, profile=RuntimeProfile(), feedback={}).body
    finally:
        store.close()


def test_the_same_task_gives_the_same_bytes_and_another_seed_gives_others(bundle: Bundle, tmp_path: Path) -> None:
    first = task(bundle, tmp_path, 1)
    assert first == task(bundle, tmp_path, 1)
    assert first != task(bundle, tmp_path, 2)
