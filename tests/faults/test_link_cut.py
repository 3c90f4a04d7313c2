"""Links are cut where it hurts; nothing is lost, and little is sent twice."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from aggregator.broker import Broker
from aggregator.job import BrokerSettings
from edge_sdk import EdgeDevice
from edge_sdk.wire import CHUNK, WINDOW
from tests.faults.audit import audit
from tests.faults.plant import chunked_site
from tests.faults.proxy import Proxy
from tests.system.site import Site, free_port, until


def behind(site: Site, device: str, proxy: Proxy) -> Path:
    """The device's settings, with the proxy in place of the broker."""
    config = site.config(device)
    config.write_text(config.read_text().replace(site.broker, proxy.url))
    return config


@pytest.mark.faults
def test_a_cut_in_mid_chunk_costs_at_most_a_window(tmp_path: Path) -> None:
    chunks, cuts = 12, 2
    site = chunked_site(tmp_path, ["a"], chunks=chunks, rounds=1, **{"gate.enabled": False})
    with ExitStack() as stack:
        proxy = stack.enter_context(Proxy(site.port, rate=600_000.0))
        running = stack.enter_context(site.service())
        device = stack.enter_context(EdgeDevice.open(behind(site, "a", proxy)))
        device.start()
        until(lambda: device.status().outbox_entries == 1)
        for _ in range(cuts):
            before = proxy.passed
            until(lambda before=before: proxy.passed > before + 4 * CHUNK + CHUNK // 2)  # in mid chunk
            proxy.cut()
        assert running.wait().state == "done"
        until(lambda: device.status().outbox_entries == 0)
        sent_up = device.status().bytes_up
    assert audit(site, allowed=frozenset()).merged == 1
    assert sent_up < (chunks + cuts * WINDOW + 1) * CHUNK


@pytest.mark.faults
def test_a_cut_of_the_gateways_link_while_it_greets_a_device_does_not_leave_that_device_idle(tmp_path: Path) -> None:
    """The `sync` that a device needs before it trains is lost with the link; only the gateway can know that."""
    port = free_port()
    broker = Broker(tmp_path / "broker", BrokerSettings(url=None, port=port), kind="mosquitto")
    with ExitStack() as stack:
        stack.callback(broker.stop)
        broker.start()
        proxy = stack.enter_context(Proxy(port))
        site = chunked_site(tmp_path, ["a"], chunks=1, rounds=1, broker=proxy.url)
        running = stack.enter_context(site.service())
        until(lambda: running.service._subscribed)
        device_config = site.config("a")
        device_config.write_text(device_config.read_text().replace(proxy.url, f"mqtt://127.0.0.1:{port}"))
        proxy.mute = True  # what the gateway says from now on does not reach the broker ...
        device = stack.enter_context(EdgeDevice.open(device_config))
        device.start()
        until(lambda: site.status().devices)  # ... but it hears, and answers
        until(lambda: not running.service._outbox)
        proxy.cut()
        proxy.mute = False
        assert running.wait(30).state == "done"
    assert audit(site, allowed=frozenset()).merged == 3
