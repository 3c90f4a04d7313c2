"""The broker that the gateway runs: mosquitto and the embedded one, both for real."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aggregator.broker import Broker, BrokerError, _start_time, answers, render_config
from aggregator.job import BrokerSettings
from edge_sdk.errors import LinkError, MissingDependency
from edge_sdk.link import LinkDown, LinkUp, Message, Sent, TooLarge, Will
from edge_sdk.wire import CHUNK

BOTH = pytest.mark.parametrize("broker", ["mosquitto", "iotcore"], indirect=True)
FREE = BrokerSettings(url=None, port=0)


@BOTH
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_a_chunk_of_64_kib_passes_each_broker_in_each_protocol(broker: Broker, peers, version: str) -> None:
    sender, receiver = (peers(broker.urls[version], name, version=version) for name in ("sender", "receiver"))
    receiver.up()
    receiver.listen("edgewise/#")
    sender.up()
    body = os.urandom(CHUNK)
    topic = "edgewise/v1/site/job/dev/d/up/chunk/aggregator/00000000-00000001-000000000000/0"
    mid = sender.link.publish(topic, body, expiry=30)
    assert receiver.message(topic).payload == body
    assert sender.wait(Sent).mid == mid
    assert sender.link.pending == 0


@BOTH
def test_the_protocol_is_found_without_being_told(broker: Broker, peers) -> None:
    for number, url in enumerate(broker.urls.values()):
        assert isinstance(peers(url, f"any-{number}").up(), LinkUp)


@BOTH
def test_retained_messages_and_the_will_are_there_for_a_late_listener(broker: Broker, peers) -> None:
    peer = peers(broker.url, "brief")
    peer.up(will=Will("edgewise/gone", b"offline", delay_seconds=0))
    peer.link.publish("edgewise/kept", b"here", retain=True)
    peer.wait(Sent)
    peer.link._client.socket().shutdown(socket.SHUT_RDWR)  # a link that is cut: the will is sent
    peer.wait(LinkDown)
    time.sleep(0.5)
    late = peers(broker.url, "late")
    late.up()
    late.link.subscribe(["edgewise/#"])
    arrived = [late.wait(Message), late.wait(Message)]  # in whatever order the broker holds them
    assert {(event.topic, event.payload) for event in arrived} == {
        ("edgewise/kept", b"here"),
        ("edgewise/gone", b"offline"),
    }
    assert next(event.retain for event in arrived if event.topic == "edgewise/kept")


@BOTH
def test_nothing_listens_beyond_loopback(broker: Broker) -> None:
    listening = [
        line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    beyond = [
        line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:] if line.split()[3] == "0A"
    ]
    for url in broker.urls.values():
        port = f"{int(url.rpartition(':')[2]):04X}"
        assert [address for address in listening if address.endswith(f":{port}")] == [f"0100007F:{port}"]
        assert not [address for address in beyond if address.endswith(f":{port}")]


@BOTH
def test_a_killed_broker_comes_back_at_the_same_address(broker: Broker) -> None:
    assert broker.pid is not None
    before = broker.pid
    os.kill(before, signal.SIGKILL)
    until = time.monotonic() + 15
    while (broker.pid == before or not answers(broker.url)) and time.monotonic() < until:
        time.sleep(0.1)
    assert broker.pid != before
    assert answers(broker.url)
    assert broker.failure is None


def test_mosquitto_never_runs_as_root_and_keeps_what_it_held_over_a_restart(tmp_path: Path, peers) -> None:
    folder = tmp_path / "state" / "broker"
    for name in ("first", "second"):
        broker = Broker(folder, FREE, kind="mosquitto")
        url = broker.start()
        uid = int(Path(f"/proc/{broker.pid}/status").read_text().split("Uid:")[1].split()[0])
        if os.geteuid() == 0:
            assert uid == pwd.getpwnam("mosquitto").pw_uid
            assert folder.stat().st_uid == uid
        else:
            assert uid == os.geteuid()
        peer = peers(url, name)
        peer.up()
        if name == "first":
            peer.link.publish("edgewise/kept", b"over a restart", retain=True)
            peer.wait(Sent)
            first_url = url
        else:
            peer.link.subscribe(["edgewise/kept"])
            assert peer.message("edgewise/kept").payload == b"over a restart"
            assert url == first_url
        peer.link.close()
        broker.stop()
    assert (folder / "mosquitto.db").is_file()


def test_five_deaths_in_a_minute_are_given_up_with_the_last_lines(tmp_path: Path) -> None:
    broker = Broker(tmp_path, FREE, kind="mosquitto")
    broker.start()
    try:
        (tmp_path / "mosquitto.conf").write_text("no_such_option 1\n")
        assert broker.pid is not None
        os.kill(broker.pid, signal.SIGKILL)
        until = time.monotonic() + 60
        while broker.failure is None and time.monotonic() < until:
            time.sleep(0.1)
        assert "died 5 times" in str(broker.failure)
        assert "no_such_option" in str(broker.failure)
    finally:
        broker.stop()


def test_what_a_killed_service_left_running_is_ended_at_the_next_start(tmp_path: Path) -> None:
    # A child outlives its parent only where the parent's death cannot be signalled to it; here it is made to.
    program = [
        "import sys, aggregator.broker as module",
        "from pathlib import Path",
        "from aggregator.job import BrokerSettings",
        "module._die_with_parent = lambda: None",
        "broker = module.Broker(Path(sys.argv[1]), BrokerSettings(None, 0), kind='mosquitto')",
        "broker.start(); print(broker.pid, flush=True); sys.stdin.read()",
    ]
    service = subprocess.Popen(
        [sys.executable, "-c", "\n".join(program), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert service.stdout is not None
    orphan = int(service.stdout.readline())
    service.kill()
    service.wait()
    assert _start_time(orphan) is not None
    broker = Broker(tmp_path, FREE, kind="mosquitto")
    broker.start()
    broker.stop()
    assert _start_time(orphan) is None


def test_a_pid_file_that_names_somebody_else_harms_nobody(tmp_path: Path) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        (tmp_path / "broker.pid").write_text(json.dumps({"pid": sleeper.pid, "started": 1, "config": str(tmp_path)}))
        broker = Broker(tmp_path, FREE, kind="mosquitto")
        broker.start()
        broker.stop()
        assert sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_the_child_dies_with_the_service(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from aggregator.broker import Broker; "
        "from aggregator.job import BrokerSettings; b = Broker(Path(sys.argv[1]), BrokerSettings(None, 0), kind='mosquitto'); "
        "b.start(); print(b.pid, flush=True); sys.stdin.read()"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert service.stdout is not None
    child = int(service.stdout.readline())
    service.kill()
    service.wait()
    until = time.monotonic() + 5
    while _start_time(child) is not None and time.monotonic() < until:
        time.sleep(0.05)
    assert _start_time(child) is None


def test_a_port_in_use_is_one_line_that_names_port_and_setting(tmp_path: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"port {port} .* broker\.port"):
            Broker(tmp_path, BrokerSettings(url=None, port=port), kind="mosquitto").start()


def test_without_mosquitto_the_error_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("aggregator.broker._PLACES", str(tmp_path))
    with pytest.raises(MissingDependency, match="apt install mosquitto"):
        Broker(tmp_path, FREE).start()
    broker = Broker(tmp_path / "demo", FREE, demo=True)
    broker.start()
    assert broker.kind == "iotcore"
    assert "nothing survives a restart" in broker.description
    broker.stop()


def test_the_configuration_binds_loopback_and_bounds_everything() -> None:
    lines = render_config(18830).splitlines()
    assert "listener 18830 127.0.0.1" in lines
    assert not [line for line in lines if line.startswith(("acl_file", "password_file", "user "))]
    assert {"max_packet_size 131072", "max_queued_messages 2000", "persistence true"} <= set(lines)


# The link itself.


def test_nobody_there_is_said_and_not_raised(peers) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        peer = peers(f"mqtt://127.0.0.1:{held.getsockname()[1]}", "lonely")
        peer.link.connect()
        assert "refused" in peer.wait(LinkDown).reason.lower()
    with pytest.raises(LinkError, match="not connected"):
        peer.link.publish("edgewise/x", b"")


def test_a_message_above_the_brokers_limit_is_refused_and_the_connection_lives(broker: Broker, peers) -> None:
    peer = peers(broker.url, "loud")
    up = peer.up()
    assert up.max_packet == 131_072
    listener = peers(broker.url, "listener")
    listener.up()
    listener.listen("edgewise/#")
    for number in range(50):  # no poison loop: what is around it arrives, over one connection
        if number % 10 == 5:
            with pytest.raises(TooLarge, match="131072"):
                peer.link.publish("edgewise/x", bytes(131_072))
        peer.link.publish(f"edgewise/{number}", b"small")
        assert listener.message(f"edgewise/{number}").payload == b"small"
        peer.wait(Sent)
    assert peer.events.empty()


def test_a_second_connection_under_one_name_takes_over_and_the_first_is_told(broker: Broker, peers) -> None:
    first, second = peers(broker.url, "twin"), peers(broker.url, "twin")
    first.up()
    second.up()
    first.wait(LinkDown)
    with pytest.raises(LinkError):
        first.link.publish("edgewise/x", b"")
    second.link.publish("edgewise/x", b"")
    second.wait(Sent)


def test_what_came_without_a_receipt_comes_again(broker: Broker, peers) -> None:
    taker, giver = peers(broker.url, "taker", manual_ack=True), peers(broker.url, "giver")
    taker.up()
    taker.listen("edgewise/x")
    giver.up()
    giver.link.publish("edgewise/x", b"1")
    taker.message("edgewise/x")
    taker.link.disconnect()
    assert taker.up().session_present
    again = taker.message("edgewise/x")
    taker.link.ack(again)
    time.sleep(0.2)
    taker.link.disconnect()
    taker.up()
    with pytest.raises(AssertionError):
        taker.wait(type(again), seconds=0.5)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:1883", "http://127.0.0.1:1", "mqtt://127.0.0.1", "mqtt://:1", "mqtt://h:99999"]
)
def test_an_address_that_is_none_is_refused(url: str, peers) -> None:
    with pytest.raises(LinkError, match="mqtt://HOST:PORT"):
        peers(url, "x")


def test_a_listener_that_raises_does_not_end_the_connection(broker: Broker, peers) -> None:
    peer = peers(broker.url, "odd")
    peer.up()
    taken = peer.link._on_event
    peer.link._on_event = lambda event: 1 / 0
    peer.link.publish("edgewise/x", b"1")
    time.sleep(0.3)
    peer.link._on_event = taken
    peer.link.publish("edgewise/x", b"2")
    peer.wait(Sent)
