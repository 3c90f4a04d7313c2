"""Randomness enters a graph by `r.*` and by the choice of variants, both from the seed: a replay draws the same (SG12)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.bundle import Bundle
from edge_sdk.draws import Draws
from edge_sdk.runtime import RuntimeProfile, Stepper
from tests.cut_bundle import FEATURES, FILES, HIDDEN, PROGRAM, changed, cut_bundle, cut_data

X, Y = cut_data(24)


def with_noise(model: onnx.ModelProto) -> None:
    """The prefix adds r.noise `[batch, FEATURES]` to its input."""
    for node in model.graph.node:
        node.input[:] = ["noisy" if name == "d.x" else name for name in node.input]
    model.graph.input.append(helper.make_tensor_value_info("r.noise", TensorProto.FLOAT, ["batch", FEATURES]))
    model.graph.node.insert(0, helper.make_node("Add", ["d.x", "r.noise"], ["noisy"]))


def halved(model: onnx.ModelProto) -> None:
    """Another variant: half of every feature."""
    for node in model.graph.node:
        node.output[:] = ["whole" if name == "f.0" else name for name in node.output]
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "half"))
    model.graph.node.append(helper.make_node("Mul", ["whole", "half"], ["f.0"]))


def bundle_with(folder: Path, change: Any) -> Path:
    """The bundle whose program has the prefix and, with equal odds, a changed copy of it."""
    good = cut_bundle(folder / "good.bundle")
    with Bundle.open(good) as opened:
        copy = onnx.load(opened.file(FILES["prefix"]))
    change(copy)

    def manifest(content: dict[str, Any]) -> None:
        row = content["programs"][0]
        if change is halved:
            row["prefix"] = [{"file": FILES["prefix"], "weight": 0.5}, {"file": "other.onnx", "weight": 0.5}]
        else:
            row["prefix"] = [{"file": "other.onnx", "weight": 1.0}]
        row["features"] |= {"cacheable": False, "reason": "random"}

    return changed(good, folder / "other.bundle", manifest=manifest, more={"other.onnx": copy.SerializeToString()})


@pytest.fixture(scope="module", params=[with_noise, halved])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with Bundle.open(bundle_with(tmp_path_factory.mktemp("replay"), request.param)) as opened:
        yield opened


def losses(bundle: Bundle, seed: int, count: int = 8) -> list[float]:
    program = bundle.program(PROGRAM)
    stepper = Stepper(bundle, program, bundle.initial(program), RuntimeProfile(), seed=seed)
    found = [stepper.step({"d.x": X, "d.y": Y}, {"lr": 0.05}, ids=np.arange(24)).loss for _ in range(count)]
    assert stepper.kept_samples == 0
    return found


def test_the_same_seed_gives_the_same_steps_and_another_gives_others(bundle: Bundle) -> None:
    assert losses(bundle, 1) == losses(bundle, 1)
    assert losses(bundle, 1) != losses(bundle, 2)


def test_noise_is_drawn_from_seed_step_and_name(tmp_path: Path) -> None:
    with Bundle.open(bundle_with(tmp_path, with_noise)) as noisy, Bundle.open(tmp_path / "good.bundle") as plain:
        program, other = noisy.program(PROGRAM), plain.program(PROGRAM)
        left = Stepper(noisy, program, noisy.initial(program), RuntimeProfile(), seed=5)
        right = Stepper(plain, other, plain.initial(other), RuntimeProfile(cache_bytes=0), seed=9)
        for number in range(1, 4):
            for count in (6, 20):  # at once, and in parts, which share one draw
                noise = Draws(5, f"r.noise/{2 * number - (count == 6)}").uniform((count, FEATURES))
                batch = {"d.x": X[:count], "d.y": Y[:count]}
                expected = right.step({**batch, "d.x": X[:count] + noise}, {"lr": 0.05}).loss
                assert left.step(batch, {"lr": 0.05}).loss == pytest.approx(expected, abs=1e-6)


def test_variants_are_drawn_with_their_odds(tmp_path: Path) -> None:
    with Bundle.open(bundle_with(tmp_path, halved)) as bundle:
        program = bundle.program(PROGRAM)
        stepper = Stepper(bundle, program, bundle.initial(program), RuntimeProfile(), seed=3)
        found = {
            round(stepper.step({"d.x": X[:4], "d.y": Y[:4]}, {"lr": 0.0, "weight_decay": 0.0}).loss, 5)
            for _ in range(16)
        }
    assert len(found) == 2
    assert program.features.nbytes == HIDDEN * 4
