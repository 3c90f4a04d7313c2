"""Bad numbers are refused or end the step, with its number and the reason; the state is that of the last good step (SG8).

What `test_runtime` shows for a step of one graph holds behind a prefix and in parts as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgewiseError, SampleError, TaskError
from edge_sdk.runtime import NonFiniteLoss, RuntimeProfile, Stepper
from tests.cut_bundle import PROGRAM, cut_bundle, cut_data

X, Y = cut_data(40)
IDS = np.arange(40)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    with Bundle.open(cut_bundle(tmp_path_factory.mktemp("cut") / "cut.bundle")) as opened:
        yield opened


def stepper(bundle: Bundle) -> Stepper:
    program = bundle.program(PROGRAM)
    return Stepper(bundle, program, bundle.initial(program), RuntimeProfile(cache_dtype="float32"))


def spoiled(value: float, row: int) -> np.ndarray:
    x = X.copy()
    x[row, 2] = value
    return x


BAD: list[tuple[str, dict[str, Any], dict[str, float], type[EdgewiseError], str]] = [
    ("NaN", {"d.x": spoiled(np.nan, 3)}, {}, SampleError, "d.x of sample 3 holds NaN"),
    ("NaN in a later part", {"d.x": spoiled(np.nan, 39)}, {}, SampleError, "d.x of sample 39 holds NaN"),
    ("infinity", {"d.x": spoiled(np.inf, 1)}, {}, SampleError, "d.x of sample 1 holds NaN or infinity"),
    ("a label out of range", {"d.y": np.full(40, 3)}, {}, SampleError, "label 3, expected 0 to 2"),
    ("a negative label", {"d.y": np.full(40, -1)}, {}, SampleError, "label -1, expected 0 to 2"),
    ("an empty batch", {"d.x": X[:0], "d.y": Y[:0]}, {}, SampleError, "holds 0 samples"),
    ("no weight at all", {"d.w": np.zeros(40, np.float32)}, {}, SampleError, "at least one of them above 0"),
    ("a negative weight", {"d.w": np.full(40, -1, np.float32)}, {}, SampleError, "of 0 or more"),
    ("an infinite learning rate", {}, {"lr": np.inf}, TaskError, "lr = inf .* outside"),
    ("a NaN decay", {}, {"weight_decay": np.nan}, TaskError, "weight_decay = nan .* outside"),
]


CASES = [(*bad[1:], count) for bad in BAD for count in (6, 40) if count == 40 or "later" not in bad[0]]
NAMES = [f"{bad[0]}, {count}" for bad in BAD for count in (6, 40) if count == 40 or "later" not in bad[0]]


@pytest.mark.parametrize(("change", "hyper", "error", "message", "count"), CASES, ids=NAMES)
def test_it_is_refused_and_the_state_stays(
    bundle: Bundle,
    change: dict[str, Any],
    hyper: dict[str, float],
    error: type[EdgewiseError],
    message: str,
    count: int,
) -> None:
    batch = {"d.x": X, "d.y": Y, **change}
    bad = {name: value[:count] for name, value in batch.items()}
    good = {"d.x": X[:count], "d.y": Y[:count]}
    steps, undisturbed = stepper(bundle), stepper(bundle)
    for each in (steps, undisturbed):
        each.step(good, ids=IDS[:count])
    with pytest.raises(error, match=message):
        steps.step(bad, hyper, ids=IDS[: len(bad["d.x"])])
    for each in (steps, undisturbed):
        each.step(good, ids=IDS[:count])
    for name, value in undisturbed.tensors().items():
        np.testing.assert_array_equal(steps.tensors()[name], value)


@pytest.mark.parametrize("count", [6, 40], ids=["at once", "in parts"])
def test_a_step_that_diverges_says_which_and_leaves_the_last_good_state(bundle: Bundle, count: int) -> None:
    steps = stepper(bundle)
    batch = {"d.x": X[:count], "d.y": Y[:count]}
    done = 0
    with pytest.raises(NonFiniteLoss) as caught:
        for _ in range(200):
            good = steps.tensors()
            steps.step(batch, {"lr": 10.0, "weight_decay": 1.0}, ids=IDS[:count])
            done += 1
    assert f"step {done + 1} of '{PROGRAM}'" in str(caught.value)
    for name, value in steps.tensors().items():
        np.testing.assert_array_equal(value, good[name])
        assert np.isfinite(value).all()


def test_ids_of_another_number_are_refused(bundle: Bundle) -> None:
    with pytest.raises(SampleError, match="the batch holds 6 samples and 5 ids"):
        stepper(bundle).step({"d.x": X[:6], "d.y": Y[:6]}, ids=IDS[:5])
