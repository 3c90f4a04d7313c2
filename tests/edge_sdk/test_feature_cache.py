"""What the frozen part made of a sample is kept for a task, within a budget, and changes what is learned by nothing."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.bundle import Bundle, Program
from edge_sdk.features import FeatureCache
from edge_sdk.runtime import RuntimeProfile, Stepper
from edge_sdk.samples import SampleStore
from edge_sdk.training import TaskSpec, run_task
from export import ProgramSpec, build_bundle
from export.writer import write_archive
from tests.export.models import example, net

COUNT, SIZE = 60, 16


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    path = tmp_path_factory.mktemp("cache") / "net.bundle"
    programs = [ProgramSpec("layer", {"modules": ["conv2", "head"]}, "int8", "sgd")]
    build_bundle(net("conv1d"), example("conv1d"), path, name="net", loss="cross_entropy", programs=programs)
    with Bundle.open(path) as opened:
        yield opened


def program_of(bundle: Bundle) -> Program:
    return next(program for program in bundle.programs.values() if not program.accumulates)


X, Y = example("conv1d", COUNT, seed=7)
IDS = np.arange(100, 100 + COUNT)


def epochs(bundle: Bundle, count: int, **profile) -> tuple[Stepper, list[int], dict[str, np.ndarray]]:
    """Train, and say how often the prefix ran in each epoch."""
    program = program_of(bundle)
    stepper = Stepper(bundle, program, bundle.initial(program), RuntimeProfile(**profile))
    runs = []
    for epoch in range(count):
        before = stepper.prefix_runs
        order = np.random.default_rng(epoch).permutation(COUNT)
        for first in range(0, COUNT, SIZE):
            rows = order[first : first + SIZE]
            stepper.step({"d.x": X[rows], "d.y": Y[rows]}, {"lr": 0.02}, ids=IDS[rows])
        runs.append(stepper.prefix_runs - before)
    return stepper, runs, stepper.tensors()


def test_the_second_epoch_skips_the_prefix(bundle: Bundle) -> None:
    stepper, runs, _ = epochs(bundle, 3)
    assert runs == [4, 0, 0]
    assert stepper.kept_samples == COUNT


def test_cached_epochs_give_the_tensors_of_uncached_ones(bundle: Bundle) -> None:
    _, runs, plain = epochs(bundle, 3, cache_bytes=0)
    assert runs == [4, 4, 4]
    _, _, exact = epochs(bundle, 3, cache_dtype="float32")
    _, _, rounded = epochs(bundle, 3)
    for name, value in plain.items():
        np.testing.assert_array_equal(exact[name], value)
        assert np.abs(rounded[name] - value).max() <= 1e-3 * max(1.0, np.abs(value).max())
    assert any((rounded[name] != value).any() for name, value in plain.items()), "float16 rounds: was it used?"


def test_a_small_budget_is_filled_and_kept_and_the_rest_is_computed_again(bundle: Bundle) -> None:
    sample = program_of(bundle).features.nbytes
    stepper, runs, found = epochs(bundle, 3, cache_bytes=20 * sample + 3, cache_dtype="float32")
    assert stepper.kept_samples == 20
    assert runs == [4, 4, 4]
    _, _, plain = epochs(bundle, 3, cache_bytes=0)
    for name, value in plain.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


def test_features_are_kept_by_sample_and_not_by_place(bundle: Bundle) -> None:
    program = program_of(bundle)
    kept, plain = (
        Stepper(bundle, program, bundle.initial(program), RuntimeProfile(cache_bytes=size, cache_dtype="float32"))
        for size in (8 << 20, 0)
    )
    mixed = np.array([9, 3, 8, 0, 5])  # some of them seen before, in another order
    for stepper in (kept, plain):
        for rows in (np.arange(8), mixed):
            stepper.step({"d.x": X[rows], "d.y": Y[rows]}, {"lr": 0.1}, ids=IDS[rows])
    assert kept.kept_samples == 10
    for name, value in plain.tensors().items():
        np.testing.assert_allclose(kept.tensors()[name], value, atol=1e-6)


def test_a_task_passes_the_ids_of_its_samples(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[tuple[int, int]] = []
    close = Stepper.close
    monkeypatch.setattr(Stepper, "close", lambda s: (kept.append((s.kept_samples, s.prefix_runs)), close(s))[-1])
    program = program_of(bundle)
    store = SampleStore(tmp_path / "samples.sqlite", bundle.fields, max_bytes=1 << 20)
    store.add_many(X, Y, recording="all")
    spec = TaskSpec(program.id, "0" * 64, 0, 3, SIZE, 0.1, seed=1)
    bodies = [
        run_task(
            bundle,
            spec,
            bundle.initial(program),
            store,
            profile=RuntimeProfile(cache_dtype="float32", cache_bytes=size),
            feedback={},
        ).body
        for size in (8 << 20, 0)
    ]
    count = len(store.train_ids(bundle.held_out))
    batches = -(-count // SIZE)
    assert kept == [(count, batches), (0, 3 * batches)]
    assert bodies[0] == bodies[1]
    store.close()


def test_another_prefix_begins_with_an_empty_cache(bundle: Bundle) -> None:
    stepper, _, _ = epochs(bundle, 1)
    stepper.close()
    assert stepper.kept_samples == 0
    assert epochs(bundle, 1)[1] == [4]


def test_nothing_is_kept_where_the_manifest_forbids_it(bundle: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(bundle.path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    for row in manifest["programs"]:
        row["features"] |= {"cacheable": False, "reason": "random views"}
    write_archive(manifest, files, tmp_path / "other.bundle")
    with Bundle.open(tmp_path / "other.bundle") as other:
        stepper, runs, _ = epochs(other, 2)
    assert runs == [4, 4]
    assert stepper.kept_samples == 0


# The cache alone.


def cache_of(shapes: dict[str, tuple[str, tuple[int, ...]]], budget: int, dtype: str = "float16") -> FeatureCache:
    return FeatureCache({name: (np.dtype(kind), shape) for name, (kind, shape) in shapes.items()}, budget, dtype)


def test_codes_are_kept_exactly_and_floats_to_eleven_bits() -> None:
    draw = np.random.default_rng(0)
    batch = {"f.0": draw.normal(size=(5, 3)).astype(np.float32), "f.1": draw.integers(0, 256, (5, 4)).astype(np.uint8)}
    cache = cache_of({"f.0": ("float32", (3,)), "f.1": ("uint8", (4,))}, 1000)
    for row in range(5):
        cache.add(row, batch, row)
    read = {name: np.zeros_like(value) for name, value in batch.items()}
    for row in range(5):
        cache.read(row, read, row)
    np.testing.assert_array_equal(read["f.1"], batch["f.1"])
    np.testing.assert_allclose(read["f.0"], batch["f.0"], rtol=2**-11)
    assert (read["f.0"] != batch["f.0"]).any()


def test_a_value_that_float16_cannot_hold_makes_the_cache_float32() -> None:
    batch = {"f.0": np.array([[1.0, 2.0], [1e6, 3.0]], np.float32)}
    cache = cache_of({"f.0": ("float32", (2,))}, 16)
    for row in range(2):
        cache.add(row, batch, row)
    assert 0 not in cache
    assert 1 in cache
    read = {"f.0": np.zeros((1, 2), np.float32)}
    cache.read(1, read, 0)
    np.testing.assert_array_equal(read["f.0"][0], batch["f.0"][1])


@pytest.mark.parametrize("budget", [0, 11, 12, 30])
def test_the_budget_is_kept(budget: int) -> None:
    batch = {"f.0": np.ones((9, 6), np.float32)}
    cache = cache_of({"f.0": ("float32", (6,))}, budget)
    for row in range(9):
        cache.add(row, batch, row)
    assert len(cache) == budget // 12
