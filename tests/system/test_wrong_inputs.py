"""Whatever is wrong is refused with its reason, and the round goes on without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import DeviceEvent, EdgeDevice, wire
from edge_sdk.errors import BundleError, SampleError
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import pack
from edge_sdk.wire import CHUNK
from tests.system.hostile import HostileDevice
from tests.system.site import Site, end, free_port, spawn, until
from tests.tiny_bundle import HEAD, tiny_bundle, tiny_data

GIB = 1 << 30


def edgewise(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command, as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


# Updates: a device with a registered key and bad intentions, against a gateway process.


def body(device: HostileDevice, values: Any, **tensors: Any) -> bytes:
    """A body as the program asks for it, filled with `values`; `tensors` replaces some."""
    task = device.wait_for_task()
    shapes = {"weight": (3, 4), "bias": (3,)}
    deltas = {name: np.full(shape, values, np.float32) for name, shape in shapes.items()}
    metadata = {"edgewise": "update/1", "program": HEAD, "start": task.start, "encoding": "float32"}
    return pack({**deltas, **tensors}, metadata)


def header(text: bytes, claims: int | None = None) -> bytes:
    return (len(text) if claims is None else claims).to_bytes(8, "little") + text


Attack = Callable[[HostileDevice], wire.Ack]


def sends(make: Callable[[HostileDevice], bytes], **lies: Any) -> Attack:
    def attack(device: HostileDevice) -> wire.Ack:
        data = make(device)
        return device.deliver(data, device.offer(data, **lies))

    return attack


def wrong_chunks(device: HostileDevice) -> wire.Ack:
    """Chunks of wrong lengths and indexes for an honest offer."""
    data = body(device, 0.0)
    offer = device.offer(data)
    device.send(device.address.offer(device.device), offer)
    device.hear(lambda _: device.acks)
    for index in range(20):
        device.chunk(offer.upload, index * 7, os.urandom(CHUNK))
    return device.hear(lambda _: next((ack for ack in device.acks if ack.final), None))


def bytes_of_another_digest(device: HostileDevice) -> wire.Ack:
    data = body(device, 0.0)
    return device.deliver(data, device.offer(data, digest="d" * 64))


def signed_by_another_key(device: HostileDevice) -> wire.Ack:
    device.key = SigningKey(Ed25519PrivateKey.generate())
    data = body(device, 0.0)
    return device.deliver(data, device.offer(data))


_1_GIB_TENSOR = b'{"weight":{"dtype":"F32","shape":[268435456],"data_offsets":[0,1073741824]}}'
ATTACKS: Mapping[str, tuple[Attack, str, str]] = {
    "nan": (sends(lambda d: body(d, np.nan)), "bad_content", "not_finite: tensor 'weight' holds NaN"),
    "inf": (sends(lambda d: body(d, np.inf)), "bad_content", "not_finite: tensor 'weight' holds NaN"),
    "huge": (sends(lambda d: body(d, 1e6)), "bad_content", "norm: the change has norm 3.87e+06, at most"),
    "shape": (
        sends(lambda d: body(d, 0.0, weight=np.zeros((4, 3), np.float32))),
        "bad_content",
        "wrong_shape: tensor 'weight' is float32 [4, 3], expected float32 [3, 4]",
    ),
    "dtype": (
        sends(lambda d: body(d, 0.0, weight=np.zeros((3, 4), np.float16))),
        "bad_content",
        "wrong_shape: tensor 'weight' is float16 [3, 4], expected float32 [3, 4]",
    ),
    "extra": (
        sends(lambda d: body(d, 0.0, more=np.zeros(1, np.float32))),
        "bad_content",
        "wrong_tensors: tensor 'more' is not expected",
    ),
    "noise": (sends(lambda _: os.urandom(300)), "bad_content", "malformed: the header claims"),
    "claim": (sends(lambda _: header(b"{}", claims=GIB)), "bad_content", "the header claims 1073741824 bytes"),
    "tensor": (sends(lambda _: header(_1_GIB_TENSOR)), "bad_content", "claims bytes 0 to 1073741824"),
    "base": (sends(lambda d: body(d, 0.0), base="b" * 64), "wrong_base", "base bbbbbbbbbbbb, expected"),
    "size": (sends(lambda _: b"", size=GIB), "too_large", "1073741824 bytes, at most 65620"),
    "chunks": (sends(lambda d: body(d, 0.0), chunks=7), "bad_geometry", "bytes in 7 chunks of 65536"),
    "wrong-chunks": (wrong_chunks, "bad_geometry", "16 chunks of a wrong index or length within a minute"),
    "digest": (bytes_of_another_digest, "bad_content", "the bytes do not have the digest of the offer"),
    "key": (signed_by_another_key, "bad_signature", "the offer is not signed by this device's key"),
    "task": (sends(lambda d: body(d, 0.0), task="7" * 16), "foreign_task", "was not issued here to this device"),
    "nobody": (sends(lambda d: body(d, 0.0), num_examples=0), "bad_content", "num_examples is 0, at least 1"),
}


@dataclass(frozen=True)
class Siege:
    """What came of it: the verdicts, what the commands print, and the gateway's memory in bytes before and after."""

    verdicts: Mapping[str, wire.Ack]
    status: Any
    rounds: Any
    text: str
    before: int
    peak: int


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Siege:
    """Every attack in one round, each by its own device, beside one honest device that closes the round."""
    hostile = list(ATTACKS)
    job = {
        "task.encodings_allowed": ["float32"],
        "rounds": 1,
        "gate.enabled": False,
        "round.devices_wait": len(hostile),
        "round.quorum": 1,
    }
    site = Site(tmp_path_factory.mktemp("siege"), [*hostile, "honest"], job=job)
    gateway = site.gateway_process()
    try:
        until(lambda: site.status().broker and "connected" in (site.folder / "gateway.log").read_text())
        devices = [HostileDevice(site, name) for name in hostile]
        for device in devices:
            device.connect()
        for device in devices:
            device.wait_for_task()
        before = memory(gateway.pid, "VmRSS")
        verdicts = {}
        for device in devices:
            verdicts[device.device] = ATTACKS[device.device][0](device)
            # Nor does what is no message at all harm anybody.
            device.link.publish(device.address.offer(device.device), os.urandom(100_000))
            device.link.publish(device.address.status(device.device), b"[" * 8_000)
        peak = memory(gateway.pid, "VmHWM")
        with EdgeDevice.open(site.config("honest")) as honest:
            honest.start()
            assert gateway.wait(60) == 0, (site.folder / "gateway.log").read_text()[-4000:]
        for device in devices:
            device.link.close()
    finally:
        end(gateway)
    return Siege(
        verdicts,
        json.loads(edgewise("job", "status", site.job, "--json").stdout),
        json.loads(edgewise("job", "rounds", site.job, "--json").stdout),
        edgewise("job", "status", site.job).stdout,
        before,
        peak,
    )


def memory(pid: int, what: str) -> int:
    found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wrong_update_is_refused_and_the_reason_stands_in_the_journal(siege: Siege, attack: str) -> None:
    _, reason, detail = ATTACKS[attack]
    assert siege.verdicts[attack].reason == reason
    told = [refusal for refusal in siege.status["refusals"] if refusal["device"] == attack]
    assert [refusal["reason"] for refusal in told] == [reason]
    assert detail in told[0]["detail"]
    assert f"{attack}: {reason}: " in siege.text


def test_the_round_goes_on_without_them(siege: Siege) -> None:
    (record,) = siege.rounds
    assert record["outcome"] == "accepted"
    assert record["merged"] == siege.status["accepted"] == siege.status["merged"] == 1
    assert sum(record["refused"].values()) == len(ATTACKS)
    assert record["merge"]["updates"] == 1


def test_the_memory_of_the_gateway_stays_bounded(siege: Siege) -> None:
    assert siege.peak - siege.before < 16 << 20


def test_a_round_does_not_wait_for_a_device_whose_update_was_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, ["bad", "good"], job={"rounds": 1, "gate.enabled": False, "round.deadline_seconds": 600})
    with site.service() as running, EdgeDevice.open(site.config("good")) as good:
        until(lambda: site.status().broker)
        with HostileDevice(site, "bad") as bad:
            good.start()
            data = body(bad, np.nan)
            assert bad.deliver(data, bad.offer(data)).reason == "bad_content"
            status = running.wait()
    (record,) = status.history
    assert (record.outcome, record.merged) == ("accepted", 1)
    assert record.declined == {"bad": "update refused: bad_content"}


# Bundles, samples, jobs.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def newer(path: Path) -> None:
    tiny_bundle(path, format=2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "cut short"),
        (change_a_byte, "(damaged|SHA-256)"),
        (newer, "has bundle format 2, this Edgewise reads format 1: upgrade"),
    ],
)
def test_a_wrong_bundle_stops_gateway_and_device_with_one_line_and_no_sample_is_lost(
    tmp_path: Path, spoil: Callable[[Path], None], message: str
) -> None:
    site = Site(tmp_path, ["a"])
    good = site.bundle.read_bytes()
    spoil(site.bundle)
    told = edgewise("aggregator", "run", site.job)
    assert told.returncode == 3
    assert re.fullmatch(rf"edgewise: \S+tiny\.bundle: .*{message}.*\n", told.stderr)
    shutil.rmtree(tmp_path / "a" / "store" / "bundle")  # else the device goes on with what it unpacked and checked
    with pytest.raises(BundleError, match=rf"tiny\.bundle: .*{message}"):
        EdgeDevice.open(site.config("a"))
    site.bundle.write_bytes(good)
    with EdgeDevice.open(site.config("a")) as device:
        assert device.status().samples == 60


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((2, 5), np.float32), [0, 1], r"d\.x has shape \[2, 5\], expected a batch of samples \[n, 4\]"),
        (np.zeros((2, 4), np.float64), [0, 1], r"d\.x .*dtype float64, expected float32"),
        (np.array([[0, 0, 0, 0], [0, np.nan, 0, 0]], np.float32), [0, 1], r"d\.x of sample 1 holds NaN"),
        (np.array([[0, 0, 0, 0], [0, np.inf, 0, 0]], np.float32), [0, 1], r"d\.x of sample 1 holds NaN or infinity"),
        (np.zeros((2, 4), np.float32), [0, 3], r"label 3, expected 0 to 2"),
    ],
)
def test_a_wrong_sample_is_refused_by_field_and_the_others_stay(
    tmp_path: Path, x: np.ndarray, y: list[int], message: str
) -> None:
    site = Site(tmp_path, ["a"])
    with EdgeDevice.open(site.config("a")) as device:
        with pytest.raises(SampleError, match=message):
            device.record_many(x, np.asarray(y))
        assert device.status().samples == 60
        if "label" not in message:
            with pytest.raises(SampleError, match=message.replace("of sample 1 ", "(of sample 1 )?")):
                device.predict(x)
        assert np.isfinite(device.predict(np.zeros((2, 4), np.float32))).all()


def test_a_job_naming_a_program_that_the_bundle_lacks_is_refused_with_those_it_has(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"program": "tiny/full"})
    told = edgewise("aggregator", "run", site.job)
    assert told.returncode == 3
    assert re.fullmatch(rf"edgewise: \S+tiny\.bundle: .*no program 'tiny/full'; it has .*{HEAD}.*\n", told.stderr)


def without_head(path: Path) -> None:
    """A bundle of the same base whose programs do not include the one that the job trains."""
    with zipfile.ZipFile(path) as archive:
        manifest = json.loads(archive.read("manifest.json"))
    tiny_bundle(path, programs=[program for program in manifest["programs"] if "head" not in program["id"]])


def of_another_base(path: Path) -> None:
    tiny_bundle(path, seed=7)


@pytest.mark.parametrize(
    ("make", "reason"), [(without_head, f"unknown_program: {HEAD}"), (of_another_base, "wrong_base: this bundle has")]
)
def test_a_device_with_a_bundle_that_cannot_do_the_task_declines_and_the_round_goes_on(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    site = Site(tmp_path, ["a", "b"], job={"rounds": 1, "gate.enabled": False})
    other = tmp_path / "other.bundle"
    other.write_bytes(site.bundle.read_bytes())
    make(other)
    site.config("b").write_text(site.config("b").read_text().replace("tiny.bundle", "other.bundle"))
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for name in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(name))).start()
        status = running.wait()
    assert reason in status.history[-1].declined["b"]
    assert status.merged == 1


# No broker.


def test_without_a_broker_a_device_predicts_records_and_keeps_trying(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], job={"rounds": 1})
    events: list[DeviceEvent] = []
    with EdgeDevice.open(site.config("a"), on_event=events.append) as device:
        device.start()
        until(lambda: sum(event.kind == "offline" for event in events) >= 2)
        assert f"mqtt://127.0.0.1:{site.port}: " in events[0].detail
        assert device.status().link in ("offline", "connecting")
        x, y = tiny_data(4, seed=3)
        assert device.predict(x).shape == (4, 3)
        device.record_many(x, y)
        assert device.status().samples == 64
        with site.service() as running:
            assert running.wait().state == "done"
        assert device.status().updates_accepted == 3


def test_a_gateway_whose_own_broker_is_elsewhere_says_once_that_nobody_answers_and_keeps_trying(
    tmp_path: Path,
) -> None:
    port = free_port()
    site = Site(tmp_path, ["a"], job={"rounds": 1}, broker=f"mqtt://127.0.0.1:{port}")
    gateway = spawn(["-m", "edge_sdk.cli", "aggregator", "run", str(site.job)], tmp_path / "gateway.log", {})
    log = tmp_path / "gateway.log"
    try:
        until(lambda: f"mqtt://127.0.0.1:{port}" in log.read_text())
        time.sleep(2.0)
        assert log.read_text().count("no connection to the broker") == 1
        broker = Broker(tmp_path / "elsewhere", BrokerSettings(url=None, port=port), kind="mosquitto")
        broker.start()
        try:
            with EdgeDevice.open(site.config("a")) as device:
                device.start()
                assert gateway.wait(60) == 0, log.read_text()
        finally:
            broker.stop()
    finally:
        end(gateway)
    assert site.status().merged == 3


_WITHOUT_BROKERS = (
    "import sys; import aggregator.broker as broker; from edge_sdk.cli import main\n"
    "broker._PLACES = ''; sys.modules['iotcore'] = None; sys.exit(main(sys.argv[1:]))"
)


@pytest.mark.parametrize("option", [[], ["--demo"]])
def test_where_no_broker_is_installed_the_command_ends_with_4_and_names_the_package(
    tmp_path: Path, option: list[str]
) -> None:
    site = Site(tmp_path, ["a"])
    told = subprocess.run(
        [sys.executable, "-c", _WITHOUT_BROKERS, "aggregator", "run", *option, str(site.job)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert told.returncode == 4
    assert re.fullmatch(r"edgewise: no broker: .*apt install mosquitto.*\n", told.stderr)
