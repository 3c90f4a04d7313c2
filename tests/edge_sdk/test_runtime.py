"""Steps and predictions on the real runtime; bad input leaves the state of the last good step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgewiseError, SampleError, TaskError
from edge_sdk.runtime import NonFiniteLoss, Predictor, Stepper
from tests.tiny_bundle import HEAD, LORA, tiny_data

X, Y = tiny_data(64)
BATCH = {"d.x": X, "d.y": Y}


def stepper(bundle: Bundle, program_id: str = HEAD) -> Stepper:
    program = bundle.program(program_id)
    return Stepper(bundle, program, bundle.initial(program))


def assert_equal(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name])


@pytest.mark.parametrize("program_id", [HEAD, LORA])
def test_training_lowers_the_loss(bundle: Bundle, program_id: str) -> None:
    steps = stepper(bundle, program_id)
    losses = [steps.step(BATCH, {"lr": 0.3}).loss for _ in range(100)]
    assert losses[-1] < 0.2 * losses[0]


def test_a_step_is_sgd_with_momentum_as_numpy_computes_it(bundle: Bundle) -> None:
    steps, start = stepper(bundle), bundle.initial(bundle.program(HEAD))
    weight, bias = start["weight"].astype(np.float64), start["bias"].astype(np.float64)
    slots = [np.zeros_like(weight), np.zeros_like(bias)]
    for _ in range(5):
        steps.step(BATCH, {"lr": 0.2, "weight_decay": 0.01})
        logits = X @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        d = (p - np.eye(3)[Y]) / len(Y)
        slots = [0.9 * slots[0] + d.T @ X + 0.01 * weight, 0.9 * slots[1] + d.sum(0) + 0.01 * bias]
        weight, bias = weight - 0.2 * slots[0], bias - 0.2 * slots[1]
    np.testing.assert_allclose(steps.tensors()["weight"], weight, atol=1e-6)
    np.testing.assert_allclose(steps.tensors()["bias"], bias, atol=1e-6)


@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_sample_of_weight_zero_changes_nothing(bundle: Bundle, size: int) -> None:
    short, padded = stepper(bundle, LORA), stepper(bundle, LORA)
    weights = np.r_[np.ones(size, np.float32), np.zeros(3, np.float32)]
    repeated = np.r_[np.arange(size), [0, 0, 0]]
    short.step({"d.x": X[:size], "d.y": Y[:size]})
    padded.step({"d.x": X[repeated], "d.y": Y[repeated], "d.w": weights})
    for name, value in short.tensors().items():
        np.testing.assert_allclose(padded.tensors()[name], value, atol=1e-6)


def test_a_learning_rate_of_zero_returns_the_tensors_bit_for_bit(bundle: Bundle) -> None:
    steps = stepper(bundle)
    steps.step(BATCH, {"lr": 0.0, "weight_decay": 0.0})
    assert_equal(steps.tensors(), bundle.initial(bundle.program(HEAD)))


def test_an_adapter_with_b_zero_predicts_as_the_base_does(bundle: Bundle) -> None:
    program = bundle.program(LORA)
    start = bundle.initial(program)
    other = {**start, "layer.lora_a": start["layer.lora_a"] * 3}
    served = Predictor(bundle, program, start)
    before = np.asarray(served.predict(X))
    served.set_tensors(other)
    np.testing.assert_array_equal(served.predict(X), before)


def test_evaluation_counts_what_the_predictor_predicts(bundle: Bundle) -> None:
    program = bundle.program(HEAD)
    evaluate = bundle.program(program.evaluate or "")
    counter = Stepper(bundle, evaluate, bundle.initial(program))
    for part in np.array_split(np.arange(len(X)), 5):
        counter.step({"d.x": X[part], "d.y": Y[part]})
    predicted = np.asarray(Predictor(bundle, program, bundle.initial(program)).predict(X)).argmax(axis=1)
    counts = counter.tensors()
    assert counts["evaluate.total"].sum() == len(X)
    assert counts["evaluate.correct"].sum() == (predicted == Y).sum()


def test_one_sample_is_predicted_without_a_batch_axis(bundle: Bundle) -> None:
    program = bundle.program(HEAD)
    served = Predictor(bundle, program, bundle.initial(program))
    np.testing.assert_allclose(served.predict(X[0]), np.asarray(served.predict(X))[0], atol=1e-6)


BAD: list[tuple[str, dict[str, Any], dict[str, float], type[EdgewiseError], str]] = [
    ("NaN", {"d.x": X * np.float32("nan"), "d.y": Y}, {}, SampleError, "d.x of sample 0 holds NaN"),
    (
        "another dtype",
        {"d.x": X.astype(np.float64), "d.y": Y},
        {},
        SampleError,
        "has dtype float64, expected float32",
    ),
    ("another shape", {"d.x": X[:, :3], "d.y": Y}, {}, SampleError, r"shape \[64, 3\], expected .*\[n, 4\]"),
    ("a label out of range", {"d.x": X, "d.y": Y + 5}, {}, SampleError, "label .*, expected 0 to 2"),
    ("fewer labels", {"d.x": X, "d.y": Y[:9]}, {}, SampleError, "equally many samples"),
    ("no samples", {"d.x": X[:0], "d.y": Y[:0]}, {}, SampleError, "holds 0 samples"),
    ("no labels", {"d.x": X}, {}, SampleError, "the batch has no d.y"),
    ("weights that are all zero", {**BATCH, "d.w": np.zeros(64, np.float32)}, {}, SampleError, "above 0"),
    ("an infinite learning rate", BATCH, {"lr": float("inf")}, TaskError, "lr = inf .* outside 0 to 10"),
    ("a NaN learning rate", BATCH, {"lr": float("nan")}, TaskError, "outside"),
    ("an unknown hyper-parameter", BATCH, {"momentum": 1.0}, TaskError, "has no hyper-parameter 'momentum'"),
]


@pytest.mark.parametrize(("batch", "hyper", "error", "message"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_is_refused_and_the_state_stays(
    bundle: Bundle, batch: dict[str, Any], hyper: dict[str, float], error: type[EdgewiseError], message: str
) -> None:
    steps, undisturbed = stepper(bundle), stepper(bundle)
    steps.step(BATCH)
    undisturbed.step(BATCH)
    with pytest.raises(error, match=message):
        steps.step(batch, hyper)
    assert_equal(steps.tensors(), undisturbed.tensors())
    steps.step(BATCH)
    undisturbed.step(BATCH)
    assert_equal(steps.tensors(), undisturbed.tensors())


def test_a_step_that_diverges_leaves_the_last_good_state(bundle: Bundle) -> None:
    steps = stepper(bundle)
    huge = {"d.x": X * np.float32(1e37), "d.y": Y}
    good = steps.tensors()
    with pytest.raises(NonFiniteLoss, match="step"):
        for _ in range(10):
            good = steps.tensors()
            steps.step(huge, {"lr": 10.0})
    assert_equal(steps.tensors(), good)
    assert all(np.isfinite(value).all() for value in good.values())


def test_start_tensors_of_another_shape_are_refused(bundle: Bundle) -> None:
    program = bundle.program(HEAD)
    start = {**bundle.initial(program), "bias": np.zeros(7, np.float32)}
    with pytest.raises(TaskError, match=r"'bias' .* should be float32 \[3\], found float32 \[7\]"):
        Stepper(bundle, program, start)
