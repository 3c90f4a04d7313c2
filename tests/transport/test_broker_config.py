"""The text of mosquitto's configuration, for 2.0 and 2.1, and the roles it starts with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aggregator.broker import Broker, BrokerError, Security, find_mosquitto, find_plugin, render_config
from aggregator.job import BrokerSettings
from devices.roles import initial_config
from edge_sdk.errors import MissingDependency

PLUGIN, STORE = Path("/lib/mosquitto_dynamic_security.so"), Path("/lib/mosquitto_persist_sqlite.so")
SECURE = {
    "allow_anonymous false",
    "require_certificate true",
    "use_identity_as_username true",
    "use_username_as_clientid true",
    "tls_version tlsv1.2",
    "crlfile crl.pem",
    f"plugin {PLUGIN}",
    "plugin_opt_config_file dynamic-security.json",
}


@pytest.mark.parametrize("store", [None, STORE], ids=["2.0", "2.1"])
def test_with_certificates_everybody_must_show_one_and_nobody_is_anonymous(store: Path | None) -> None:
    lines = render_config(8883, address="0.0.0.0", roles_plugin=PLUGIN, persistence_plugin=store).splitlines()
    assert "listener 8883 0.0.0.0" in lines
    assert set(lines) >= SECURE
    assert "allow_anonymous true" not in lines


@pytest.mark.parametrize("roles", [None, PLUGIN])
def test_what_2_1_deprecates_is_never_used_and_everything_is_bounded(roles: Path | None) -> None:
    for store in (None, STORE):
        lines = render_config(18830, roles_plugin=roles, persistence_plugin=store).splitlines()
        names = [line.split()[0] for line in lines]
        assert not {"acl_file", "password_file", "per_listener_settings", "user"} & set(names)
        assert set(lines) >= {"max_packet_size 131072", "max_queued_messages 2000", "max_queued_bytes 67108864"}
        assert ("persistence true" in lines) is (store is None)
        if store is not None:  # an option belongs to the plugin named last before it
            assert lines.index("plugin_opt_sync normal") == lines.index(f"plugin {store}") + 1
        if roles is not None:
            assert lines.index("plugin_opt_config_file dynamic-security.json") == lines.index(f"plugin {roles}") + 1


@pytest.mark.parametrize("address", ["0.0.0.0", "192.168.1.5", "::"])
def test_without_certificates_no_listener_leaves_the_machine(address: str, tmp_path: Path) -> None:
    with pytest.raises(BrokerError, match="on loopback only"):
        render_config(8883, address=address)
    with pytest.raises(BrokerError, match="on loopback only"):
        Broker(tmp_path, BrokerSettings(None, 0, address), kind="mosquitto").start()
    assert "listener 8883 ::1" in render_config(8883, address="::1")


def test_the_plugin_of_the_installed_broker_is_found() -> None:
    assert find_mosquitto() is not None
    found = find_plugin("mosquitto_dynamic_security")
    assert found is not None
    assert found.is_file()
    assert find_plugin("mosquitto_no_such_thing") is None


def test_a_secured_site_takes_no_other_broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("aggregator.broker._PLACES", str(tmp_path))
    security = Security(tmp_path, lambda: "{}")
    for options in ({}, {"demo": True}, {"kind": "iotcore"}):
        with pytest.raises(MissingDependency, match="no other broker checks certificates"):
            Broker(tmp_path / "state", BrokerSettings(None, 0), security=security, **options).start()


def test_certificates_that_are_not_there_are_named(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "state", BrokerSettings(None, 0), security=Security(tmp_path, lambda: "{}"))
    with pytest.raises(BrokerError, match=r"ca\.pem: cannot be given to the broker .* `edgewise devices init-ca`"):
        broker.start()


def test_roles_are_literal_and_deny_by_default() -> None:
    content = json.loads(initial_config("acme/plant-2", "bremen", ["dev-002", "dev-001"]))
    assert content["defaultACLAccess"] == {
        "publishClientSend": False,
        "publishClientReceive": False,
        "subscribe": False,
        "unsubscribe": True,
    }
    roles = {role["rolename"]: role["acls"] for role in content["roles"]}
    assert list(roles) == ["aggregator", "enroller", "device-dev-001", "device-dev-002"]
    assert all(acl["allow"] and "%" not in acl["topic"] for acls in roles.values() for acl in acls)
    assert not [acl for name in roles if name != "enroller" for acl in roles[name] if acl["topic"].startswith("$")]
    assert {(acl["acltype"], acl["topic"]) for acl in roles["device-dev-001"]} == {
        ("publishClientSend", "acme/plant-2/edgewise/v1/bremen/+/dev/dev-001/up/#"),
        ("publishClientReceive", "acme/plant-2/edgewise/v1/bremen/+/dev/dev-001/down/#"),
        ("subscribePattern", "acme/plant-2/edgewise/v1/bremen/+/dev/dev-001/down/#"),
        ("publishClientReceive", "acme/plant-2/edgewise/v1/bremen/+/cfg/#"),
        ("subscribePattern", "acme/plant-2/edgewise/v1/bremen/+/cfg/#"),
    }
    assert {client["username"]: client["roles"] for client in content["clients"]}["dev-002"] == [
        {"rolename": "device-dev-002"}
    ]
