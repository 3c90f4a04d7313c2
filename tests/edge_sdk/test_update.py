"""Update bodies: exact, small, and refused when they are not what they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import TaskError, UpdateError
from edge_sdk.tensors import pack
from edge_sdk.update import Encoding, decode_update, encode_update, max_update_bytes
from tests.tiny_bundle import LORA, tiny_bundle

START = "0" * 64


def trained(bundle: Bundle, seed: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    start = bundle.initial(bundle.program(LORA))
    draw = np.random.default_rng(seed)
    return start, {name: v + draw.normal(0, 0.1, v.shape).astype(np.float32) for name, v in start.items()}


def encode(bundle: Bundle, encoding: Encoding, feedback: Any = None, seed: int = 5) -> tuple[bytes, dict[str, Any]]:
    start, end = trained(bundle)
    program = bundle.program(LORA)
    return encode_update(program, bundle.tensors, start, START, end, encoding, feedback or {}, seed)


def decode(bundle: Bundle, body: bytes) -> dict[str, Any]:
    program = bundle.program(LORA)
    return decode_update(body, program, bundle.tensors, bundle.initial(program), START)


def test_float32_comes_back_to_rounding(bundle: Bundle) -> None:
    _, end = trained(bundle)
    for name, value in decode(bundle, encode(bundle, Encoding("float32"))[0]).items():
        np.testing.assert_allclose(value, end[name], atol=1e-7)


def test_int8_is_off_by_at_most_one_level_of_its_row(bundle: Bundle) -> None:
    start, end = trained(bundle)
    for name, value in decode(bundle, encode(bundle, Encoding("int8_row"))[0]).items():
        level = np.abs(end[name] - start[name]).max(axis=1, keepdims=True) / 127
        assert (np.abs(value - end[name]) <= level * 1.001).all()


def test_int8_is_a_quarter_of_float32_for_large_tensors(tmp_path: Path) -> None:
    with Bundle.open(tiny_bundle(tmp_path / "large.bundle", features=5000)) as bundle:
        small, large = (len(encode(bundle, Encoding(kind))[0]) for kind in ("int8_row", "float32"))
    assert small < 0.27 * large


def test_stochastic_rounding_has_no_bias(bundle: Bundle) -> None:
    start, end = trained(bundle)
    mean = np.mean(
        [decode(bundle, encode(bundle, Encoding("int8_row"), seed=s)[0])["layer.lora_a"] for s in range(400)],
        axis=0,
    )
    level = np.abs(end["layer.lora_a"] - start["layer.lora_a"]).max(axis=1, keepdims=True) / 127
    assert (np.abs(mean - end["layer.lora_a"]) < 0.15 * level).all()


def test_error_feedback_carries_what_rounding_took(bundle: Bundle) -> None:
    start, end = trained(bundle)
    total = {name: np.zeros_like(value) for name, value in start.items()}
    feedback: dict[str, Any] = {}
    for seed in range(50):
        body, feedback = encode(bundle, Encoding("int8_row"), feedback, seed)
        for name, value in decode(bundle, body).items():
            total[name] += value - start[name]
    for name, value in total.items():
        np.testing.assert_allclose(value + feedback[name], 50 * (end[name] - start[name]), rtol=1e-4, atol=1e-4)


def test_feedback_that_is_to_be_cleared_is_neither_used_nor_kept(bundle: Bundle) -> None:
    encoding = Encoding("int8_row", "clear")
    stale = {name: np.full(value.shape, 9, np.float32) for name, value in trained(bundle)[0].items()}
    body, kept = encode(bundle, encoding, stale)
    assert kept == {}
    assert body == encode(bundle, encoding)[0]


@pytest.mark.parametrize("kind", ["float32", "int8_row"])
def test_no_body_is_larger_than_its_bound(bundle: Bundle, kind: str) -> None:
    assert len(encode(bundle, Encoding(kind))[0]) <= max_update_bytes(bundle.program(LORA), bundle.tensors)


GOOD = {"edgewise": "update/1", "program": LORA, "start": START, "encoding": "float32"}
A, B = np.zeros((2, 4), np.float32), np.zeros((3, 2), np.float32)
BAD: list[tuple[str, bytes, str]] = [
    ("not a tensor file", b"\x00" * 100, "malformed"),
    ("cut short", pack({"layer.lora_a": A, "layer.lora_b": B}, GOOD)[:-3], "malformed"),
    ("a header of one gibibyte", (1 << 30).to_bytes(8, "little") + b"{}", "malformed"),
    ("of no version", pack({"layer.lora_a": A, "layer.lora_b": B}), "malformed"),
    (
        "of another program",
        pack({"layer.lora_a": A, "layer.lora_b": B}, {**GOOD, "program": "x"}),
        "wrong_tensors",
    ),
    (
        "from another start",
        pack({"layer.lora_a": A, "layer.lora_b": B}, {**GOOD, "start": "1" * 64}),
        "wrong_start",
    ),
    (
        "of an unknown encoding",
        pack({"layer.lora_a": A, "layer.lora_b": B}, {**GOOD, "encoding": "z"}),
        "wrong_encoding",
    ),
    ("with a tensor missing", pack({"layer.lora_a": A}, GOOD), "wrong_tensors"),
    ("with a tensor too many", pack({"layer.lora_a": A, "layer.lora_b": B, "x": B}, GOOD), "wrong_tensors"),
    ("of another shape", pack({"layer.lora_a": A.T.copy(), "layer.lora_b": B}, GOOD), "wrong_shape"),
    (
        "of another dtype",
        pack({"layer.lora_a": A.astype(np.float64), "layer.lora_b": B}, GOOD),
        "wrong_shape",
    ),
    ("with NaN", pack({"layer.lora_a": A * np.float32("nan"), "layer.lora_b": B}, GOOD), "not_finite"),
    ("with infinity", pack({"layer.lora_a": A + np.float32("inf"), "layer.lora_b": B}, GOOD), "not_finite"),
    (
        "with an infinite scale",
        pack(
            {
                "layer.lora_a": np.ones((2, 4), np.int8),
                "layer.lora_a/scale": np.full(2, np.inf, np.float32),
                "layer.lora_b": B.astype(np.int8),
                "layer.lora_b/scale": np.ones(3, np.float32),
            },
            {**GOOD, "encoding": "int8_row"},
        ),
        "not_finite",
    ),
]


@pytest.mark.parametrize(("body", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_body_is_refused_with_its_reason(bundle: Bundle, body: bytes, reason: str) -> None:
    with pytest.raises(UpdateError) as caught:
        decode(bundle, body)
    assert caught.value.reason == reason


def test_an_unknown_encoding_is_refused_by_the_device() -> None:
    with pytest.raises(TaskError, match="kind 'int3'; this version knows float32, int8_row"):
        Encoding.from_map({"kind": "int3"})
