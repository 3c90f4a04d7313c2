"""Update bodies: exact, small, and refused when they are not what they should be."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import Bundle
from edge_sdk.errors import TaskError, UpdateError
from edge_sdk.tensors import pack
from edge_sdk.update import KINDS, Encoding, decode_update, encode_update, max_update_bytes
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


@pytest.mark.parametrize("kind", KINDS)
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
    with pytest.raises(TaskError, match="kind 'int3'; this version knows float32, float16, int8_row, int4_row, top_k"):
        Encoding.from_map({"kind": "int3"})


LOSSY = [kind for kind in KINDS if kind != "float32"]


@pytest.mark.parametrize("kind", LOSSY)
def test_error_feedback_of_every_lossy_kind_brings_the_sum_home(bundle: Bundle, kind: str) -> None:
    start, end = trained(bundle)
    total = {name: np.zeros_like(value) for name, value in start.items()}
    feedback: dict[str, Any] = {}
    for seed in range(40):
        body, feedback = encode(bundle, Encoding(kind, density=0.2), feedback, seed)
        for name, value in decode(bundle, body).items():
            total[name] += value - start[name]
    for name, value in total.items():
        np.testing.assert_allclose(value + feedback[name], 40 * (end[name] - start[name]), rtol=1e-3, atol=1e-3)
        largest = np.abs(end[name] - start[name]).max()
        assert np.abs(feedback[name]).max() < 10 * largest  # what is owed does not grow


@pytest.mark.parametrize(("kind", "levels"), [("int8_row", 127), ("int4_row", 7)])
def test_integers_are_off_by_at_most_one_level_of_their_row(bundle: Bundle, kind: str, levels: int) -> None:
    start, end = trained(bundle)
    for name, value in decode(bundle, encode(bundle, Encoding(kind))[0]).items():
        level = np.abs(end[name] - start[name]).max(axis=1, keepdims=True) / levels
        assert (np.abs(value - end[name]) <= level * 1.001).all()


def test_top_k_sends_the_largest_and_nothing_else(bundle: Bundle) -> None:
    start, end = trained(bundle)
    for name, value in decode(bundle, encode(bundle, Encoding("top_k", density=0.25))[0]).items():
        delta = end[name] - start[name]
        sent = value - start[name]
        count = int(np.ceil(0.25 * delta.size))
        assert np.count_nonzero(sent) == count
        assert np.abs(delta[sent != 0]).min() >= np.abs(delta[sent == 0]).max()


def test_kinds_are_as_small_as_they_promise(tmp_path: Path) -> None:
    with Bundle.open(tiny_bundle(tmp_path / "large.bundle", features=20_000)) as bundle:
        plain = len(encode(bundle, Encoding("float32", compression="none"))[0])
        share = {
            kind: len(encode(bundle, Encoding(kind, density=0.05, compression="none"))[0]) / plain for kind in LOSSY
        }
    expected = {"float16": 0.5, "int8_row": 0.25, "int4_row": 0.125, "top_k": 0.1}
    assert share == pytest.approx(expected, rel=0.05)


def test_a_body_is_compressed_where_that_makes_it_smaller(tmp_path: Path) -> None:
    with Bundle.open(tiny_bundle(tmp_path / "large.bundle", features=5000)) as bundle:
        program = bundle.program(LORA)
        start = bundle.initial(program)
        few = {name: value.copy() for name, value in start.items()}
        few["layer.lora_a"][0, :50] += 1
        bodies = {}
        for how in ("none", "zlib"):
            encoding = Encoding("float32", compression=how)
            bodies[how], _ = encode_update(program, bundle.tensors, start, START, few, encoding, {}, 1)
        assert len(bodies["zlib"]) < len(bodies["none"]) / 20
        for name, value in decode_update(bodies["zlib"], program, bundle.tensors, start, START).items():
            np.testing.assert_array_equal(value, few[name])
        noise = {
            name: value + np.random.default_rng(1).normal(size=value.shape).astype("f4")
            for name, value in start.items()
        }
        body, _ = encode_update(program, bundle.tensors, start, START, noise, Encoding("int8_row"), {}, 1)
        packed = encode_update(
            program, bundle.tensors, start, START, noise, Encoding("int8_row", compression="none"), {}, 1
        )[0]
        assert len(body) <= len(packed)


def test_a_body_that_would_unpack_to_gigabytes_is_refused_before_it_does(bundle: Bundle) -> None:
    bomb = zlib.compress(bytes(1 << 24), 9)
    for claimed in (1 << 40, 4096):
        with pytest.raises(UpdateError) as caught:
            decode(bundle, b"EWZLIB1\0" + claimed.to_bytes(8, "little") + bomb)
        assert caught.value.reason == "malformed"
    with pytest.raises(UpdateError, match="cannot be unpacked"):
        decode(bundle, b"EWZLIB1\0" + (100).to_bytes(8, "little") + b"no zlib stream")


def test_zstd_is_as_exact_where_it_is_installed(bundle: Bundle) -> None:
    pytest.importorskip("zstandard")
    _, end = trained(bundle)
    for name, value in decode(bundle, encode(bundle, Encoding("float32", compression="zstd"))[0]).items():
        np.testing.assert_allclose(value, end[name], atol=1e-7)


def test_a_device_chooses_among_what_the_task_allows_and_the_gateway_holds_it_to_that(bundle: Bundle) -> None:
    encoding = Encoding("int8_row", allowed=("int4_row", "float16"))
    assert Encoding.from_map(encoding.to_map()) == encoding
    assert encoding.preferring("int4_row").kind == "int4_row"
    assert encoding.preferring("top_k").kind == encoding.preferring(None).kind == "int8_row"
    later = {**encoding.to_map(), "allowed": "int4_row int2_row"}
    assert Encoding.from_map(later).allowed == ("int4_row",)
    program = bundle.program(LORA)
    body = encode(bundle, Encoding("top_k"))[0]
    with pytest.raises(UpdateError) as caught:
        decode_update(body, program, bundle.tensors, bundle.initial(program), START, allowed=["int8_row", "int4_row"])
    assert caught.value.reason == "wrong_encoding"


def top_k_body(index: Any, values: Any) -> bytes:
    other = {"layer.lora_b": np.zeros(1, np.float32), "layer.lora_b/index": np.zeros(1, np.int32)}
    return pack({"layer.lora_a": values, "layer.lora_a/index": index, **other}, {**GOOD, "encoding": "top_k"})


@pytest.mark.parametrize(
    "index",
    [[3, 3], [5, 2], [-1, 2], [0, 8], [1 << 30, 1 << 31]],
    ids=["twice", "falling", "below", "above", "far above"],
)
def test_indexes_that_do_not_rise_within_the_tensor_are_refused(bundle: Bundle, index: list[int]) -> None:
    with pytest.raises(UpdateError) as caught:
        decode(bundle, top_k_body(np.array(index).astype(np.int32), np.ones(2, np.float32)))
    assert caught.value.reason == "wrong_shape"


def test_more_numbers_than_the_tensor_has_are_refused(bundle: Bundle) -> None:
    with pytest.raises(UpdateError) as caught:
        decode(bundle, top_k_body(np.arange(9, dtype=np.int32), np.ones(9, np.float32)))
    assert caught.value.reason == "wrong_shape"
