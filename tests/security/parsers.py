"""Every parser that reads what a stranger may have written, as a function of bytes, with valid examples to start from.

A parser may take its input or raise one of our errors; anything else is a bug. `test_wire_fuzz.py` and `make fuzz` use these.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from aggregator.job import load_job
from devices.registry import Registry
from edge_sdk import wire
from edge_sdk.bundle import Bundle
from edge_sdk.config import DeviceConfig
from edge_sdk.errors import EdgewiseError
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import pack, unpack
from edge_sdk.update import decode_update
from tests.tiny_bundle import HEAD, tiny_bundle
from tests.transport.test_wire import EXAMPLES, HERE, text_of

JOB = b"""site = "bremen"
job = "watch"
bundle = "watch.bundle"
program = "watch/head/float"
rounds = 3
[keys]
control = "control.key"
[devices]
registry = "devices.json"
[round]
quorum = 2
deadline_seconds = 60.5
[task]
steps = 10
learning_rate = 0.1
hyper = { weight_decay = 0.01 }
[security]
folder = "gateway"
"""
DEVICE = b"""id = "press-04"
site = "bremen"
job = "watch"
broker = "mqtts://gateway:8883"
bundle = "watch.bundle"
store = "store"
device_key = "press-04.key"
control_key = "control.pub"
[limits]
seconds = 5
[tls]
ca = "ca.pem"
certificate = "press-04.pem"
key = "press-04-tls.key"
"""
REGISTRY = b'{"devices": [{"id": "a", "key": "%s", "owner": "anna", "revoked": false}]}' % (b"A" * 43 + b"=")


@cache
def _scratch() -> Path:
    return Path(tempfile.mkdtemp(prefix="edgewise-fuzz-"))


@cache
def _key() -> SigningKey:
    path = _scratch() / "any.key"
    return SigningKey.load(path) if path.exists() else SigningKey.generate(path)


@cache
def _bundle() -> Bundle:
    return Bundle.open(tiny_bundle(_scratch() / "tiny.bundle"), unpack_to=_scratch() / "unpacked")


def _file(name: str, data: bytes) -> Path:
    path = _scratch() / name
    path.write_bytes(data)
    return path


def _wire(data: bytes) -> None:
    for kind in wire.KINDS.values():
        for key in (None, _key().verify_key):
            with suppress(wire.WireError):
                assert isinstance(wire.decode(kind, data, address=HERE, device="dev-1", key=key), kind)


def _topic(data: bytes) -> None:
    parsed = HERE.parse(data.decode(errors="replace"))
    assert parsed is None or parsed.device not in wire.RESERVED


def _update(data: bytes) -> None:
    program = _bundle().program(HEAD)
    start = _bundle().initial(program)
    for name, value in decode_update(data, program, _bundle().tensors, start).items():
        assert value.shape == start[name].shape
        assert np.isfinite(value).all()


def _open_bundle(data: bytes) -> None:
    Bundle.open(_file("fuzzed.bundle", data)).close()


def _update_example() -> bytes:
    start = {name: np.zeros_like(value) for name, value in _bundle().initial(_bundle().program(HEAD)).items()}
    return pack(start, {"edgewise": "update/1", "program": HEAD, "start": "0" * 64, "encoding": "float32"})


@dataclass(frozen=True)
class Parser:
    """`read` may raise an `EdgewiseError`; `examples` are inputs that it takes."""

    read: Callable[[bytes], object]
    examples: Callable[[], list[bytes]]

    def survives(self, data: bytes) -> None:
        """Read; raises what is not one of our errors."""
        with suppress(EdgewiseError):
            self.read(data)


PARSERS = {
    "wire": Parser(_wire, lambda: [text_of(message, _key()) for message in EXAMPLES]),
    "topic": Parser(_topic, lambda: [HERE.offer("dev-1").encode(), HERE.blob("dev-1", "0" * 64, 12).encode()]),
    "tensors": Parser(unpack, lambda: [_update_example()]),
    "update": Parser(_update, lambda: [_update_example()]),
    "bundle": Parser(_open_bundle, lambda: [_bundle().path.read_bytes()]),
    "job": Parser(lambda data: load_job(_file("job.toml", data)), lambda: [JOB]),
    "registry": Parser(lambda data: Registry.load(_file("devices.json", data)), lambda: [REGISTRY]),
    "config": Parser(lambda data: DeviceConfig.load(_file("device.toml", data)), lambda: [DEVICE]),
}
