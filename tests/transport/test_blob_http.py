"""Big models over HTTPS, with MQTT to fall back on (transport.md, section 5 and S18)."""

from __future__ import annotations

import http.client
import ssl
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from aggregator.blob_server import CONNECTIONS_PER_DEVICE, BlobServer, Find, Served
from aggregator.job import JobError, load_job
from edge_sdk import EdgeDevice
from edge_sdk import conversation as talk
from edge_sdk.downloads import Downloads
from edge_sdk.tls import client_context
from edge_sdk.wire import CHUNK
from tests.faults.plant import chunked_site
from tests.security.rig import Rig, refused_by_tls
from tests.system.site import Site, free_port, until

CHUNKS = 12
OWN, OTHERS = "1" * 64, "2" * 64
BODY = bytes(range(256)) * 700  # two chunks and a half


class Shop:
    """A blob server of a secured site: `dev-001` may have OWN, nobody OTHERS, though it is there."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.folder = rig, rig.root / "blobs"
        self.folder.mkdir()
        for name in (OWN, OTHERS):
            (self.folder / name).write_bytes(BODY)
        self.asked: list[tuple[str, str]] = []
        self.counted: Counter[str] = Counter()
        self.server = BlobServer("127.0.0.1", 0, rig.folder.gateway, find=self.find, served=self.count)

    def find(self, device: str, digest: str) -> Path | None:
        self.asked.append((device, digest))
        return self.folder / digest if (device, digest) == ("dev-001", OWN) else None

    def count(self, device: str, size: int) -> None:
        self.counted[device] += size

    def connect(self, device: str, context: ssl.SSLContext | None = None) -> http.client.HTTPSConnection:
        made = http.client.HTTPSConnection(
            "127.0.0.1",
            self.server.port,
            timeout=5,
            context=context or client_context(self.rig.identity(device)),
        )
        made.connect()
        return made

    def get(self, device: str, path: str, **headers: str) -> tuple[http.client.HTTPResponse, bytes]:
        connection = self.connect(device)
        connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        return answer, body


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    made = Shop(Rig(tmp_path_factory.mktemp("site")))
    made.server.start()
    yield made
    made.server.stop()


def test_a_range_is_what_it_says_and_names_the_digest(shop: Shop) -> None:
    answer, body = shop.get("dev-001", f"/v1/blobs/{OWN}", Range=f"bytes={CHUNK}-{2 * CHUNK - 1}", If_Range=f'"{OWN}"')
    assert (answer.status, body) == (206, BODY[CHUNK : 2 * CHUNK])
    assert answer.getheader("ETag") == f'"{OWN}"'
    assert answer.getheader("Content-Range") == f"bytes {CHUNK}-{2 * CHUNK - 1}/{len(BODY)}"
    answer, body = shop.get("dev-001", f"/v1/blobs/{OWN}", Range=f"bytes={2 * CHUNK}-")
    assert (answer.status, body) == (206, BODY[2 * CHUNK :])
    answer, body = shop.get("dev-001", f"/v1/blobs/{OWN}", Range="bytes=0-9", If_Range='"another"')
    assert (answer.status, body) == (200, BODY)
    assert shop.counted["dev-001"] >= len(BODY)


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/blobs/{OTHERS}",
        f"/v1/blobs/{'3' * 64}",
        f"/v1/blobs/../blobs/{OWN}",
        "/v1/blobs/../../security/authority/ca.key",
        f"/v1/blobs/{OWN}/",
        f"/v1/blobs/{OWN}%00",
        f"/v1/blobs/{OWN.replace('1', 'A')}",
        "/",
    ],
)
def test_blob_store_serves_only_own_digests(shop: Shop, path: str) -> None:
    answer, body = shop.get("dev-001", path)
    assert (answer.status, body) == (404, b"")
    answer, _ = shop.get("dev-002", f"/v1/blobs/{OWN}")
    assert answer.status == 404


@pytest.mark.parametrize(
    "asked", [f"bytes={len(BODY)}-", "bytes=9-3", "bytes=-5", "bytes=0-1,3-4", "chunks=0-1", f"bytes={'9' * 400}-"]
)
def test_a_range_beyond_the_end_is_416_and_nothing_is_read(shop: Shop, asked: str) -> None:
    before = shop.counted.total()
    answer, body = shop.get("dev-001", f"/v1/blobs/{OWN}", Range=asked)
    assert (answer.status, body, answer.getheader("Content-Range")) == (416, b"", f"bytes */{len(BODY)}")
    assert shop.counted.total() == before


def test_other_methods_change_nothing(shop: Shop) -> None:
    connection = shop.connect("dev-001")
    connection.request("DELETE", f"/v1/blobs/{OWN}")
    assert connection.getresponse().status == 501
    assert (shop.folder / OWN).read_bytes() == BODY


def test_a_stranger_is_refused_by_tls_and_so_is_a_device_from_the_moment_it_is_revoked(shop: Shop) -> None:
    rig = shop.rig
    bare = ssl.create_default_context(cafile=rig.identity("dev-001").ca)

    def ask(device: str, context: ssl.SSLContext | None = None) -> None:
        connection = shop.connect(device, context)
        connection.request("GET", f"/v1/blobs/{OWN}")
        assert connection.getresponse().status in (200, 404)

    before = len(shop.asked)
    assert refused_by_tls(lambda: ask("dev-001", bare))
    assert len(shop.asked) == before
    spare = rig.forge("dev-001", rig.authority)
    ask("dev-001", client_context(spare))
    serial = x509.load_pem_x509_certificate(spare.certificate.read_bytes()).serial_number
    rig.authority.revoke([serial])
    assert refused_by_tls(lambda: ask("dev-001", client_context(spare)))
    ask("dev-001")


def test_a_device_holds_no_more_than_its_connections(shop: Shop) -> None:
    held = [shop.connect("dev-001") for _ in range(CONNECTIONS_PER_DEVICE)]
    for connection in held:
        connection.request("GET", f"/v1/blobs/{OWN}", headers={"Range": "bytes=0-0"})
        assert connection.getresponse().read() == BODY[:1]
    with pytest.raises((OSError, http.client.HTTPException)):
        shop.get("dev-001", f"/v1/blobs/{OWN}")
    assert shop.get("dev-002", f"/v1/blobs/{OWN}")[0].status == 404
    for connection in held:
        connection.close()


def test_without_certificates_there_is_no_fast_path(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"], samples=5, job={"blobs.port": 8443})
    with pytest.raises(JobError, match=r"blobs\.port: .* needs security\.folder"):
        load_job(site.job)


@pytest.fixture
def low_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of these sites is big enough for HTTPS."""
    monkeypatch.setattr(talk, "HTTP_ABOVE", 4 * CHUNK)


def stored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The indexes of the chunks that the device writes, in order."""
    written: list[int] = []
    store = Downloads.store

    def watched(self: Downloads, digest: str, size: int, index: int, data: bytes) -> bool:
        written.append(index)
        return store(self, digest, size, index, data)

    monkeypatch.setattr(Downloads, "store", watched)
    return written


@pytest.mark.parametrize("fails", ["always in mid blob", "once in mid blob"])
def test_a_fetch_over_https_that_breaks_off_is_finished_over_mqtt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_limit: None, fails: str
) -> None:
    written = stored(monkeypatch)
    site = secured(tmp_path, port=free_port())
    breaks = {"once in mid blob": 1, "always in mid blob": 99}[fails]
    served = {"sent": 0, "breaks": 0}

    def count(device: str, size: int) -> None:
        served["sent"] += size
        if served["breaks"] < breaks and served["sent"] >= 5 * CHUNK * (served["breaks"] + 1):
            served["breaks"] += 1
            raise ConnectionError("cut")

    class Breaking(BlobServer):
        def __init__(self, *arguments: Any, find: Find, served: Served) -> None:
            super().__init__(*arguments, find=find, served=count)

    monkeypatch.setattr("aggregator.service.BlobServer", Breaking)
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        device = stack.enter_context(EdgeDevice.open(site.config("a")))
        device.start()
        status = running.wait(40)
        until(lambda: device.status().model == status.model)
    assert status.merged == 3
    assert sorted(set(written)) == list(range(chunks_of(site)))
    assert max(Counter(written).values()) <= 2
    whole = served["sent"] >= (chunks_of(site) - 1) * CHUNK
    assert whole is (fails != "always in mid blob")


def test_a_fetch_over_mqtt_that_was_interrupted_is_finished_over_https(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, low_limit: None
) -> None:
    """The gateway gets its port between two starts of a device that has half of a model."""
    written = stored(monkeypatch)
    site = secured(tmp_path, port=0)

    class Enough(Exception):
        pass

    def half(self: EdgeDevice, parsed: object, data: bytes) -> None:
        if len(written) >= 6:
            raise Enough
        chunk(self, parsed, data)

    chunk = EdgeDevice._chunk
    with site.service() as running, monkeypatch.context() as patched:
        patched.setattr(EdgeDevice, "_chunk", half)
        with EdgeDevice.open(site.config("a")) as device:
            device.start()
            until(lambda: len(written) == 6)
        running.service.stop()
        running.wait()
    site.change_job(**{"blobs.port": free_port()})
    with site.service() as running, EdgeDevice.open(site.config("a")) as device:
        device.start()
        status = running.wait(40)
        until(lambda: device.status().model == status.model)
        over_https = device._http_received
    assert over_https >= 4 * CHUNK
    assert max(Counter(written).values()) <= 2


def secured(tmp_path: Path, *, port: int) -> Site:
    """A site with TLS whose model has as many chunks as its updates."""
    return chunked_site(tmp_path, ["a"], chunks=CHUNKS, rounds=1, tls=True, **{"blobs.port": port})


def chunks_of(site: Site) -> int:
    path = site.folder / "state" / "model.safetensors"
    return -(-path.stat().st_size // CHUNK)
