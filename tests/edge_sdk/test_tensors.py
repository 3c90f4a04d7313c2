from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as load_safetensors

from edge_sdk.errors import TensorsError
from edge_sdk.tensors import pack, unpack

EXAMPLE = {
    "b": np.arange(6, dtype=np.float32).reshape(2, 3),
    "a": np.array([1, -2, 3], np.int8),
    "scalar": np.array(7, np.int64),
    "none": np.zeros((0, 4), np.float32),
}


def test_what_is_packed_comes_back() -> None:
    tensors, metadata = unpack(pack(EXAMPLE, {"program": "x", "a": "b"}))
    assert metadata == {"program": "x", "a": "b"}
    assert tensors.keys() == EXAMPLE.keys()
    for name, value in EXAMPLE.items():
        np.testing.assert_array_equal(tensors[name], value)
        assert tensors[name].dtype == value.dtype


def test_the_order_of_names_does_not_change_the_bytes() -> None:
    assert pack(EXAMPLE) == pack(dict(reversed(EXAMPLE.items())))


def test_the_reference_library_reads_what_we_write() -> None:
    for name, value in load_safetensors(pack(EXAMPLE)).items():
        np.testing.assert_array_equal(value, EXAMPLE[name])


def framed(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"1234", "at least 8 bytes"),
        ((1 << 30).to_bytes(8, "little") + b"{}", "header claims 1073741824 bytes"),
        (framed(b"[1]"), "must be a JSON object"),
        (framed(b"{" * 60_000), "not JSON"),
        (framed(b'{"a": 1, "a": 2}'), "occurs twice"),
        (framed({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "begins at byte 4"),
        (framed({"a": entry(0, 8, [2])}, bytes(12)), "4 bytes lie behind"),
        (framed({"a": entry(0, 8, [1 << 40])}, bytes(8)), "claims bytes 0 to 8"),
        (framed({"a": entry(0, 8, [-2])}, bytes(8)), "malformed"),
        (framed({"a": entry(0, 8, [2], "F99")}, bytes(8)), "malformed"),
        (framed({"a": {"dtype": "F32"}}), "malformed"),
        (framed({"a": entry(0, 8, [True, 2])}, bytes(8)), "malformed"),
    ],
)
def test_a_malformed_file_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TensorsError, match=message):
        unpack(data)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_nothing_but_our_error_comes_out_of_bytes(noise: bytes, position: int) -> None:
    good = pack(EXAMPLE)
    for data in (noise, good[:position] + noise + good[position + len(noise) :]):
        with contextlib.suppress(TensorsError):
            unpack(data)
