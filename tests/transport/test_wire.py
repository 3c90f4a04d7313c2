"""Messages and topics: what is written is read, and nothing else is."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk import wire
from edge_sdk.keys import SigningKey
from edge_sdk.wire import Address, WireError, decode, encode

HERE = Address("acme/line-4", "bremen", "watch")
COMMON: dict[str, Any] = {"id": "0" * 16, "boot": "1" * 16, "at": 1_700_000_000_000}
HEX = "a" * 64
UPLOAD = wire.upload_name("0badcafe00000000", 7, HEX)

EXAMPLES: list[wire.Message] = [
    wire.JobManifest(
        **COMMON, job="watch", bundle=HEX, base=HEX, table=HEX, programs=("a/b",), limits=wire.Limits(), key=HEX
    ),
    wire.RoundManifest(
        **COMMON,
        round=3,
        base=HEX,
        model=None,
        model_bytes=9,
        opened=1,
        deadline=2,
        now=1,
        quorum=2,
        staleness=0,
        constants=(wire.Constant(name="c.x", digest=HEX, bytes=5),),
    ),
    wire.Task(
        **COMMON,
        task="2" * 16,
        round=3,
        program="watch/lora/r4/int8",
        start=HEX,
        start_bytes=9,
        base=HEX,
        deadline=2,
        now=1,
        steps=30,
        epochs=0,
        batch_size=32,
        learning_rate=0.01,
        hyper={"weight_decay": 0.1},
        seed=(1 << 53) - 1,
        encoding={"kind": "int8_row"},
    ),
    wire.Status(
        **COMMON,
        state=wire.State.ONLINE,
        connection=1,
        outbox_id="3" * 16,
        bundle=HEX,
        paused=wire.Paused.HEAT,
        declined=wire.DeclinedTask(task="2" * 16, reason="no samples"),
    ),
    wire.Offer(
        **COMMON,
        upload=UPLOAD,
        outbox_id="0badcafe00000000",
        task="2" * 16,
        seq=7,
        round=3,
        size=70_000,
        num_examples=12,
        base=HEX,
        digest=HEX,
        chunk=65_536,
        chunks=2,
        metrics={"loss": 0.25},
    ),
    wire.Fetch(**COMMON, digest=HEX, ranges=((0, 3), (6, 6))),
    wire.Ack(**COMMON, upload=UPLOAD, status=wire.Verdict.NEED, need=(0, 1, 5), now=4),
    wire.Ack(**COMMON, upload=UPLOAD, status=wire.Verdict.REJECTED, reason=wire.Reason.WRONG_BASE, now=4),
    wire.Command(**COMMON, command=wire.Order.SYNC, args={"boot": "1" * 16, "connection": 2}, counter=4, now=5),
    wire.Reply(**COMMON, to="0" * 16, ok=True),
    wire.Metrics(**COMMON, values={"loss": 1.5}),
]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    return SigningKey.generate(tmp_path_factory.mktemp("keys") / "any.key")


def text_of(message: wire.Message, key: SigningKey, **changes: Any) -> bytes:
    """The message with some of its JSON changed, and no signature."""
    content = json.loads(encode(message, key, HERE, "dev-1").partition(b"\n")[0])
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.KIND)
def test_each_kind_comes_back_as_it_was(message: wire.Message, key: SigningKey) -> None:
    data = encode(message, key, HERE, "dev-1")
    assert decode(type(message), data, address=HERE, device="dev-1", key=key.verify_key) == message
    assert set(wire.KINDS) == {example.KIND for example in EXAMPLES}


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.KIND)
def test_a_signed_kind_is_believed_only_with_the_right_key_and_address(
    message: wire.Message, key: SigningKey, tmp_path: Path
) -> None:
    data = encode(message, key, HERE, "dev-1")
    signed = b"\n" in data
    assert signed is (message.SIGNED or (isinstance(message, wire.Ack) and message.final))
    if not signed:
        return
    other = SigningKey.generate(tmp_path / "other.key").verify_key
    remapped = Address("", "bremen", "watch")  # a bridge may change the prefix
    decode(type(message), data, address=remapped, device="dev-1", key=key.verify_key)
    for address, device, verify in (
        (HERE, "dev-2", key.verify_key),
        (Address("", "bremen", "other"), "dev-1", key.verify_key),
        (HERE, "dev-1", other),
    ):
        with pytest.raises(WireError) as caught:
            decode(type(message), data, address=address, device=device, key=verify)
        assert caught.value.reason == "bad_signature"


def test_a_changed_byte_breaks_the_signature(key: SigningKey) -> None:
    data = encode(EXAMPLES[4], key, HERE, "dev-1")
    changed = data.replace(b'"seq":7', b'"seq":8')
    with pytest.raises(WireError, match="bad_signature"):
        decode(wire.Offer, changed, address=HERE, device="dev-1", key=key.verify_key)


def test_an_unsigned_verdict_is_not_believed(key: SigningKey) -> None:
    verdict = text_of(EXAMPLES[7], key)
    with pytest.raises(WireError, match="bad_signature"):
        decode(wire.Ack, verdict, address=HERE, device="dev-1", key=key.verify_key)


REFUSED: list[tuple[wire.Message, dict[str, Any], str]] = [
    (EXAMPLES[2], {"steps": True}, "steps"),
    (EXAMPLES[2], {"steps": 30, "epochs": 1}, "steps, epochs"),
    (EXAMPLES[2], {"seed": 1 << 53}, "seed"),
    (EXAMPLES[2], {"task": "2" * 15}, "task"),
    (EXAMPLES[2], {"program": "x" * 65}, "program"),
    (EXAMPLES[2], {"hyper": {f"h{i}": 1.0 for i in range(17)}}, "hyper"),
    (EXAMPLES[2], {"learning_rate": "0.1"}, "learning_rate"),
    (EXAMPLES[3], {"state": "asleep"}, "state"),
    (EXAMPLES[3], {"declined": {"task": "2" * 16}}, "declined.reason"),
    (EXAMPLES[4], {"upload": "../../etc"}, "upload"),
    (EXAMPLES[5], {"ranges": [[0, 8]]}, "ranges"),
    (EXAMPLES[5], {"ranges": [[3, 1]]}, "ranges"),
    (EXAMPLES[6], {"need": [1, 1]}, "need"),
    (EXAMPLES[6], {"need": list(range(33))}, "need"),
    (EXAMPLES[6], {"status": "rejected"}, "reason"),
    (EXAMPLES[8], {"command": "format"}, "command"),
    (EXAMPLES[9], {"ok": 1}, "ok"),
]


@pytest.mark.parametrize(
    ("message", "changes", "name"), REFUSED, ids=[f"{m.KIND}-{n}-{i}" for i, (m, _, n) in enumerate(REFUSED)]
)
def test_a_wrong_field_is_refused_by_name(
    message: wire.Message, changes: dict[str, Any], name: str, key: SigningKey
) -> None:
    with pytest.raises(WireError) as caught:
        decode(type(message), text_of(message, key, **changes), address=HERE)
    assert caught.value.field == name


def test_unknown_fields_are_ignored_and_missing_ones_are_not(key: SigningKey) -> None:
    assert decode(wire.Reply, text_of(EXAMPLES[9], key, colour="red"), address=HERE) == EXAMPLES[9]
    content = json.loads(text_of(EXAMPLES[9], key))
    del content["ok"]
    with pytest.raises(WireError, match="missing_field"):
        decode(wire.Reply, json.dumps(content).encode(), address=HERE)


def test_another_major_version_is_named(key: SigningKey) -> None:
    with pytest.raises(WireError) as caught:
        decode(wire.Reply, text_of(EXAMPLES[9], key, v=2), address=HERE)
    assert caught.value.reason == "unsupported_version"


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 2000,
        b'{"a":' * 500 + b"1" + b"}" * 500,
        b'{"v":1,"v":1}',
        b'{"v":NaN}',
        b'{"v":-Infinity}',
        b'{"v":' + b"9" * 5000 + b"}",
        b'{"v":1e400}',
        b"\xff\xfe",
        b"",
        b"null",
        b"[" + b"1," * 4000 + b"1]",
        b"x" * 100_000,
    ],
)
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        decode(wire.Metrics, data, address=HERE)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_noise_raises_nothing_but_wire_errors(noise: bytes) -> None:
    for kind in wire.KINDS.values():
        with pytest.raises(WireError):
            decode(kind, noise, address=HERE)


LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=9))
VALUE = st.one_of(LEAF, st.lists(LEAF, max_size=3), st.dictionaries(st.text(max_size=3), LEAF, max_size=3))
NAMES = st.sampled_from(["id", "boot", "at", "values", "to", "ok", "state", "connection"])


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(NAMES, VALUE))
def test_any_json_object_gives_a_message_or_a_wire_error(content: dict[str, Any]) -> None:
    for kind in (wire.Metrics, wire.Reply, wire.Status):
        with contextlib.suppress(WireError):
            assert isinstance(
                decode(kind, json.dumps({**content, "v": 1, "kind": kind.KIND}).encode(), address=HERE), kind
            )


def test_a_message_above_its_limit_is_not_written(key: SigningKey) -> None:
    with pytest.raises(WireError, match="too_long"):
        encode(replace(EXAMPLES[10], values={f"name-{i:025d}": 1.0 / 3 for i in range(300)}), key, HERE)


TOPICS = [
    (HERE.job_topic, wire.Parsed("job")),
    (HERE.round_topic, wire.Parsed("round")),
    (HERE.status("dev-1"), wire.Parsed("status", "dev-1")),
    (HERE.offer("dev-1"), wire.Parsed("offer", "dev-1")),
    (HERE.fetch("dev-1"), wire.Parsed("fetch", "dev-1")),
    (HERE.metrics("dev-1"), wire.Parsed("metrics", "dev-1")),
    (HERE.reply("dev-1"), wire.Parsed("reply", "dev-1")),
    (HERE.ack("dev-1"), wire.Parsed("ack", "dev-1")),
    (HERE.assign("dev-1"), wire.Parsed("task", "dev-1")),
    (HERE.command("dev-1"), wire.Parsed("command", "dev-1")),
    (HERE.chunk("dev-1", "aggregator", UPLOAD, 3), wire.Parsed("chunk", "dev-1", UPLOAD, None, 3, "aggregator")),
    (HERE.blob("dev-1", HEX, 0), wire.Parsed("blob", "dev-1", digest=HEX, index=0)),
]


@pytest.mark.parametrize(("topic", "parsed"), TOPICS, ids=[parsed.kind for _, parsed in TOPICS])
def test_topics_are_taken_apart_as_they_were_built(topic: str, parsed: wire.Parsed) -> None:
    assert HERE.parse(topic) == parsed
    assert topic.startswith("acme/line-4/edgewise/v1/bremen/watch/")


@pytest.mark.parametrize(
    "rest",
    [
        "dev/Dev-1/up/offer",
        "dev/dev-1/up/offer/x",
        "dev/+/up/offer",
        f"dev/dev-1/up/chunk/aggregator/{UPLOAD}/03",
        f"dev/dev-1/up/chunk/aggregator/{UPLOAD}/-1",
        "dev/dev-1/up/chunk/aggregator/../1",
        f"dev/dev-1/down/blob/{HEX[:-1]}/0",
        "cfg/other",
        "",
    ],
)
def test_other_topics_are_nothing(rest: str) -> None:
    assert HERE.parse(f"{HERE.root}/{rest}") is None


@pytest.mark.parametrize(
    ("prefix", "site", "job"), [("a/+", "s", "j"), ("", "S", "j"), ("", "s", "j/k"), ("a/b/c/d/e/f/g", "s", "j")]
)
def test_an_address_of_no_segments_is_refused(prefix: str, site: str, job: str) -> None:
    with pytest.raises(WireError):
        Address(prefix, site, job)


def test_chunks_cover_the_body() -> None:
    assert [wire.chunk_count(size) for size in (1, 65_536, 65_537)] == [1, 1, 2]


def test_the_signature_is_base64_of_64_bytes(key: SigningKey) -> None:
    assert len(base64.b64decode(encode(EXAMPLES[4], key, HERE, "dev-1").partition(b"\n")[2])) == 64
