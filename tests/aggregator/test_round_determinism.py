"""The same updates give the same bytes: in any order of arrival, and with the gateway killed in between (criterion 7)."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.blobs import BlobStore
from aggregator.fold import BodyRefusedError, Fold
from aggregator.intake import OpenUpload
from aggregator.job import load_job
from aggregator.journal import Identity, Journal
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import digest, pack, unpack
from edge_sdk.update import Encoding, encode_update
from tests.system.site import Site
from tests.tiny_bundle import HEAD, LORA


@dataclass(frozen=True)
class Sent:
    """A body, and what its offer says."""

    device: str
    body: bytes
    examples: int


class Gateway:
    """Journal, blobs and fold of a job, without its network."""

    def __init__(self, site: Site) -> None:
        self.job = load_job(site.job)
        self.bundle = Bundle.open(self.job.bundle)
        identity = Identity(site=self.job.site, job=self.job.job, bundle=self.bundle.digest, program=self.job.program)
        self.journal = Journal(self.job.state, identity)
        self.blobs = BlobStore(self.job.state / "blobs")
        self.fold = Fold(self.job, self.bundle, self.journal, self.blobs)
        self.program = self.bundle.program(self.job.program)
        self.start = self.blobs.put(self.bundle.start_blob(self.program))

    def close(self) -> None:
        self.journal.close()
        self.bundle.close()

    def take(self, sent: Sent, **changes: Any) -> OpenUpload:
        """Store a body in chunks, check it and accept it. Raises `BodyRefusedError`."""
        size = 1000
        fields: dict[str, Any] = {
            "device": sent.device,
            "upload": f"0badcafe-00000001-{digest(sent.body)[:12]}",
            "outbox_id": "0badcafe00000000",
            "seq": 1,
            "task": digest(sent.device.encode())[:16],
            "round": 1,
            "phase": "train",
            "start": self.start,
            "digest": digest(sent.body),
            "size": len(sent.body),
            "chunk": size,
            "chunks": -(-len(sent.body) // size),
            "num_examples": sent.examples,
            "metrics": {},
        }
        upload = OpenUpload(**{**fields, **changes})
        with self.journal.transaction():
            self.journal.store_offer(upload)
            for index in range(upload.chunks):
                self.journal.store_chunk(upload.device, upload.upload, index, sent.body[size * index :][:size])
        checked = self.fold.check(upload, 1)
        with self.journal.transaction():
            self.journal.accept(upload, norm=checked.norm, now=1)
        return upload

    def merge(self) -> tuple[str, Any]:
        """The candidate's digest and its tensors."""
        folded = self.fold.merge(1, self.start)
        return folded.candidate, unpack(self.blobs.read(folded.candidate))[0]


def bodies(site: Site, count: int = 6, kind: str = "int8_row") -> list[Sent]:
    with Bundle.open(site.bundle) as bundle:
        program = bundle.program(load_job(site.job).program)
        start = bundle.initial(program)
        name = digest(bundle.start_blob(program))
        sent = []
        for k in range(count):
            draw = np.random.default_rng(k)
            trained = {n: v + draw.normal(0, 0.1, v.shape).astype(np.float32) for n, v in start.items()}
            body, _ = encode_update(program, bundle.tensors, start, name, trained, Encoding(kind), {}, k)
            sent.append(Sent(f"dev-{k}", body, 10 + 3 * k))
    return sent


def gateway(tmp_path: Path, program: str, rule: str, number: int = 0) -> tuple[Site, Gateway]:
    folder = tmp_path / str(number)
    folder.mkdir()
    job = {"program": program, "merge.rule": rule, "round.devices_wait": 1}
    site = Site(folder, [], job=job, features=12)
    return site, Gateway(site)


RULES = [(HEAD, "mean"), (LORA, "product_svd")]


@pytest.mark.parametrize(("program", "rule"), RULES, ids=[rule for _, rule in RULES])
def test_twenty_orders_of_arrival_give_one_candidate(tmp_path: Path, program: str, rule: str) -> None:
    found = set()
    sent: Sequence[Sent] = []
    for number in range(20):
        site, box = gateway(tmp_path, program, rule, number)
        sent = sent or bodies(site)
        order = list(sent)
        random.Random(number).shuffle(order)
        for each in order:
            box.take(each)
        found.add(box.merge()[0])
        box.close()
    assert len(found) == 1


_ARRIVAL = """
import json, os, signal, sys
from pathlib import Path
from tests.aggregator.test_round_determinism import Gateway, Sent

class Here:
    job = Path(sys.argv[1])

box = Gateway(Here)
for device, body, examples in json.load(sys.stdin):
    box.take(Sent(device, bytes.fromhex(body), examples))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.faults
@pytest.mark.parametrize(("program", "rule"), RULES, ids=[rule for _, rule in RULES])
def test_a_gateway_that_is_killed_between_arrivals_gives_the_same_candidate(
    tmp_path: Path, program: str, rule: str
) -> None:
    site, box = gateway(tmp_path, program, rule)
    sent = bodies(site)
    for each in sent:
        box.take(each)
    expected = box.merge()[0]
    box.close()
    other, again = gateway(tmp_path, program, rule, 1)
    again.close()
    for part in (sent[4:], sent[1:4], sent[:1]):
        text = json.dumps([[each.device, each.body.hex(), each.examples] for each in part])
        killed = subprocess.run(
            [sys.executable, "-c", _ARRIVAL, other.job], input=text, text=True, capture_output=True, env={**os.environ}
        )
        assert killed.returncode == -9, killed.stderr
    again = Gateway(other)
    assert again.merge()[0] == expected
    again.close()


@pytest.fixture
def box(tmp_path: Path) -> Iterator[tuple[Gateway, list[Sent]]]:
    site, opened = gateway(tmp_path, LORA, "product_svd")
    yield opened, bodies(site, 4, "float32")
    opened.close()


def rewritten(sent: Sent, change: Any, **metadata: str) -> Sent:
    from edge_sdk.update import _decompressed

    tensors, held = unpack(_decompressed(sent.body, 1 << 20))
    copies = {name: np.array(value) for name, value in tensors.items()}
    change(copies)
    return Sent("dev-9", pack(copies, {**held, **metadata}), 10)


BAD: list[tuple[str, Any, dict[str, str], str]] = [
    ("another start", lambda t: None, {"start": "0" * 64}, "wrong_start"),
    ("another program", lambda t: None, {"program": HEAD}, "wrong_tensors"),
    ("a layer missing", lambda t: t.pop("layer.lora_a"), {}, "wrong_tensors"),
    ("a layer too many", lambda t: t.update(more=np.zeros(2, np.float32)), {}, "wrong_tensors"),
    ("another dtype", lambda t: t.update({"layer.lora_a": t["layer.lora_a"].astype(np.float64)}), {}, "wrong_shape"),
    ("another rank", lambda t: t.update({"layer.lora_a": t["layer.lora_a"][:1]}), {}, "wrong_shape"),
    ("NaN", lambda t: t["layer.lora_b"].fill(np.nan), {}, "not_finite"),
    ("infinity", lambda t: t["layer.lora_b"].fill(np.inf), {}, "not_finite"),
    ("an absurd norm", lambda t: t["layer.lora_b"].fill(1e6), {}, "norm"),
    ("an encoding that the task does not allow", lambda t: None, {"encoding": "top_k"}, "wrong_encoding"),
]


@pytest.mark.parametrize(("change", "metadata", "reason"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_bad_update_is_refused_by_reason_and_the_merge_is_as_if_it_had_not_come(
    box: tuple[Gateway, list[Sent]], change: Any, metadata: dict[str, str], reason: str
) -> None:
    opened, sent = box
    for each in sent:
        opened.take(each)
    expected = opened.merge()[0]
    with pytest.raises(BodyRefusedError, match=f"^{reason}: "):
        opened.take(rewritten(sent[0], change, **metadata))
    assert opened.merge()[0] == expected
