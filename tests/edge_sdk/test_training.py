"""A task runs to its update, the same each time, and can be interrupted between steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import TaskError
from edge_sdk.runtime import RuntimeProfile
from edge_sdk.samples import SampleStore
from edge_sdk.training import Outcome, TaskCancelled, TaskSpec, hottest_zone, run_task
from edge_sdk.update import Encoding, decode_update
from tests.tiny_bundle import HEAD, LORA, tiny_data

SPEC = TaskSpec(LORA, "0" * 64, steps=40, epochs=0, batch_size=16, learning_rate=0.03, seed=7)


@pytest.fixture
def store(bundle: Bundle, tmp_path: Path) -> Iterator[SampleStore]:
    samples = SampleStore(tmp_path / "samples.db", bundle.fields, max_bytes=1 << 20)
    samples.add_many(*tiny_data(200), recording="one")
    yield samples
    samples.close()


def run(bundle: Bundle, store: SampleStore, spec: TaskSpec = SPEC, **options: Any) -> Outcome:
    start = options.pop("start", bundle.initial(bundle.program(spec.program.replace("evaluate/", ""))))
    return run_task(bundle, spec, start, store, profile=RuntimeProfile(), feedback={}, **options)


def test_a_task_learns_and_counts_its_samples_once(bundle: Bundle, store: SampleStore) -> None:
    outcome = run(bundle, store)
    assert outcome.steps == 40
    assert outcome.num_examples == len(store.train_ids(bundle.held_out)) == 159
    assert outcome.metrics["loss_last"] < 0.5 * outcome.metrics["loss_first"]


def test_the_same_task_gives_the_same_bytes(bundle: Bundle, store: SampleStore) -> None:
    spec = replace(SPEC, encoding=Encoding("int8_row"))
    assert run(bundle, store, spec).body == run(bundle, store, spec).body
    assert run(bundle, store, spec).body != run(bundle, store, replace(spec, seed=8)).body


@pytest.mark.parametrize(("size", "steps"), [(16, 20), (159, 2), (1000, 2)])
def test_epochs_visit_every_sample(bundle: Bundle, store: SampleStore, size: int, steps: int) -> None:
    seen: list[int] = []
    spec = replace(SPEC, steps=0, epochs=2, batch_size=size)
    run(bundle, store, spec, on_step=lambda result, done, of: seen.append(result.num_examples))
    assert len(seen) == steps
    assert sum(seen) == 2 * 159


def test_evaluation_uses_the_held_out_samples_only(bundle: Bundle, store: SampleStore) -> None:
    program = bundle.program("tiny/evaluate/head/float")
    outcome = run(bundle, store, replace(SPEC, program=program.id, steps=0, epochs=1))
    counts = decode_update(outcome.body, program, bundle.tensors, {})
    assert counts["evaluate.total"].sum() == outcome.num_examples == 40
    assert outcome.metrics["score"] == pytest.approx(counts["evaluate.correct"].sum() / 40)


def test_training_never_touches_the_held_out_samples(bundle: Bundle, store: SampleStore, tmp_path: Path) -> None:
    other = SampleStore(tmp_path / "other.db", bundle.fields, max_bytes=1 << 20)
    x, y = tiny_data(200)
    x[159:] = 1000.0  # the gap and the held-out end
    other.add_many(x, y, recording="one")
    assert run(bundle, other).body == run(bundle, store).body


def test_a_task_can_be_cancelled_between_steps(bundle: Bundle, store: SampleStore) -> None:
    taken: list[int] = []

    def before_step() -> None:
        if len(taken) == 3:
            raise TaskCancelled("withdrawn")

    with pytest.raises(TaskCancelled, match="withdrawn"):
        run(bundle, store, before_step=before_step, on_step=lambda result, done, of: taken.append(done))
    assert taken == [1, 2, 3]


def test_a_task_that_used_up_its_time_ends_with_what_it_has(bundle: Bundle, store: SampleStore) -> None:
    outcome = run(bundle, store, replace(SPEC, steps=100_000), seconds=0.05)
    assert 0 < outcome.steps < 100_000
    assert decode_update(outcome.body, bundle.program(LORA), bundle.tensors, bundle.initial(bundle.program(LORA)))


def test_a_device_without_samples_cannot_do_the_task(bundle: Bundle, tmp_path: Path) -> None:
    empty = SampleStore(tmp_path / "empty.db", bundle.fields, max_bytes=1 << 20)
    with pytest.raises(
        TaskError, match=r"0 training samples, at least 1 needed: record more \(program 'tiny/head/float'\)"
    ):
        run(bundle, empty, replace(SPEC, program=HEAD))


def test_the_hottest_zone_is_read_and_broken_ones_are_left_out(tmp_path: Path) -> None:
    for zone, text in (("thermal_zone0", "41500\n"), ("thermal_zone1", "67250\n"), ("thermal_zone2", "n/a")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "temp").write_text(text)
    assert hottest_zone(tmp_path) == pytest.approx(67.25)
    assert hottest_zone(tmp_path / "nowhere") is None


def test_steps_draw_whole_batches_across_passes(bundle: Bundle, store: SampleStore) -> None:
    sizes: list[int] = []
    run(bundle, store, on_step=lambda result, done, of: sizes.append(result.num_examples))
    assert sizes == [16] * 40
    assert np.sum(sizes) > 2 * 159


def full_store(bundle: Bundle, folder: Path, count: int) -> SampleStore:
    size = sum(field.nbytes for field in bundle.fields)
    store = SampleStore(folder / "full.db", bundle.fields, max_bytes=count * size)
    store.add_many(*tiny_data(count), recording="one")
    return store


@pytest.mark.parametrize("length", [{"steps": 60, "epochs": 0}, {"steps": 0, "epochs": 6}])
def test_a_task_goes_on_while_a_full_store_lets_samples_go(
    bundle: Bundle, tmp_path: Path, length: dict[str, int]
) -> None:
    store = full_store(bundle, tmp_path, 200)
    eligible = store.train_ids(bundle.held_out)
    x, y = tiny_data(100, seed=4)
    recorded = iter(range(100))
    sizes: list[int] = []

    def record_two() -> None:
        for index in (next(recorded), next(recorded)) if len(sizes) < 50 else ():
            store.add(x[index], y[index], recording="one")

    spec = replace(SPEC, **length)
    outcome = run(
        bundle, store, spec, before_step=record_two, on_step=lambda result, done, of: sizes.append(result.num_examples)
    )
    assert store.oldest() > 80
    assert outcome.metrics["loss_last"] < outcome.metrics["loss_first"]
    assert len(eligible) - 100 <= outcome.num_examples < len(eligible)
    if spec.steps:
        assert sizes == [16] * 60  # another sample takes the place of one that is gone


def test_an_evaluation_counts_what_is_still_there(bundle: Bundle, tmp_path: Path) -> None:
    store = full_store(bundle, tmp_path, 200)
    x, y = tiny_data(170, seed=4)
    program = bundle.program("tiny/evaluate/head/float")

    def record_once() -> None:
        if not store.has("two"):
            store.add_many(x, y, recording="two")

    spec = replace(SPEC, program=program.id, steps=0, epochs=1)
    outcome = run(bundle, store, spec, before_step=record_once)
    counts = decode_update(outcome.body, program, bundle.tensors, {})
    assert counts["evaluate.total"].sum() == outcome.num_examples == 30


def test_a_task_ends_when_too_few_of_its_samples_are_left(bundle: Bundle, tmp_path: Path) -> None:
    store = full_store(bundle, tmp_path, 20)
    x, y = tiny_data(20, seed=4)
    with pytest.raises(TaskError, match="0 training samples are still stored, at least 1 needed"):
        run(bundle, store, before_step=lambda: store.add_many(x, y, recording="two"))
