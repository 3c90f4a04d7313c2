"""Valid inputs, spoilt in every way that hypothesis thinks of: a parser takes them or raises one of our errors, and soon."""

from __future__ import annotations

import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk import wire
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgewiseError
from edge_sdk.wire import WireError, decode
from tests.security.parsers import PARSERS
from tests.transport.test_wire import HERE

# Pieces that parsers of JSON, TOML and binary headers stumble over.
PIECES = [b"[" * 5000, b'{"a":' * 3000, b"9" * 5000, b"1e400", b"NaN", b"-Infinity", b"true", b"null", b'"\\ud800"']
PIECES += [b"\xff\xfe", b"\x00", b"\n", b"\r\n", b"../", b"[[x]]\n", b"x." * 2000 + b"y=1\n", b"\xff" * 8, b"\x7f" * 8]


@st.composite
def spoilt(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(1, 4))):
        at, upto = (draw(st.integers(0, len(data))) for _ in range(2))
        match draw(st.integers(0, 5)):
            case 0 if data:
                data[at % len(data)] = draw(st.integers(0, 255))
            case 1:
                data[at:at] = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=20)))
            case 2:
                del data[min(at, upto) : max(at, upto)]
            case 3:
                data[at:at] = data[min(at, upto) : max(at, upto)][:10_000]
            case 4:
                del data[at:]
            case _:
                data[at : at + 8] = draw(st.sampled_from(PIECES))[:8]
    return bytes(data)


@pytest.mark.parametrize("name", PARSERS)
def test_examples_are_taken(name: str) -> None:
    for example in PARSERS[name].examples():
        PARSERS[name].read(example)


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=250, deadline=2000, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_a_parser_takes_it_or_says_why_not(name: str, data: Any) -> None:
    PARSERS[name].survives(data.draw(spoilt(PARSERS[name].examples())))


@pytest.mark.parametrize(
    "piece", [*PIECES, b"[" * 10_000, b'{"v":1,"v":1}', b'{"v":true}', b'{"v":' + b"9" * 5000 + b"}"]
)
def test_hostile_json_costs_less_than_ten_milliseconds(piece: bytes) -> None:
    spent = []
    for _ in range(5):
        began = time.perf_counter()
        for kind in wire.KINDS.values():
            with pytest.raises(WireError):
                decode(kind, piece, address=HERE)
        spent.append((time.perf_counter() - began) / len(wire.KINDS))
    assert min(spent) < 0.01


@pytest.mark.parametrize("name", ["job", "registry", "config"])
@pytest.mark.parametrize("nested", [b"[" * 5_000, b"a = " + b"[" * 5_000, b"a = " + b"{a=" * 5_000, b"a." * 5_000])
def test_a_file_that_nests_too_deep_is_refused(name: str, nested: bytes) -> None:
    with pytest.raises(EdgewiseError, match="not a (TOML|JSON) file|unknown key"):
        PARSERS[name].read(nested)


def test_a_header_or_manifest_that_nests_too_deep_is_refused(tmp_path: Path) -> None:
    deep = b'{"a":' * 10_000
    with pytest.raises(EdgewiseError, match="header"):
        PARSERS["tensors"].read(len(deep).to_bytes(8, "little") + deep)
    with zipfile.ZipFile(tmp_path / "deep.bundle", "w") as archive:
        archive.writestr("manifest.json", deep)
    with pytest.raises(EdgewiseError, match=r"deep\.bundle|manifest"):
        Bundle.open(tmp_path / "deep.bundle")


def test_the_fuzzer_would_notice() -> None:
    with pytest.raises(ZeroDivisionError):
        type(PARSERS["wire"])(lambda data: len(data) / 0, list).survives(b"x")
    with pytest.raises(EdgewiseError):
        PARSERS["job"].read(b"site = 5")
