"""The registry of devices, and the commands that fill it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devices.registry import Entry, Registry, RegistryError
from edge_sdk.cli import main
from edge_sdk.config import DeviceConfig
from edge_sdk.keys import SigningKey, VerifyKey


def add(tmp_path: Path, device: str = "press-04") -> int:
    return main(
        [
            "devices",
            "add",
            device,
            "--registry",
            str(tmp_path / "devices.json"),
            "--out",
            str(tmp_path / device),
            "--site",
            "bremen",
            "--job",
            "watch",
            "--broker",
            "mqtt://127.0.0.1:18830",
            "--bundle",
            "watch.bundle",
            "--control-key",
            str(tmp_path / "keys" / "control.pub"),
        ]
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    assert main(["devices", "keygen", str(tmp_path / "keys")]) == 0
    return tmp_path


def test_an_added_device_has_a_key_that_the_registry_knows(site: Path) -> None:
    assert add(site) == 0
    config = DeviceConfig.load(site / "press-04" / "device.toml")
    key = Registry.load(site / "devices.json").key("press-04")
    assert key is not None
    assert key.verify(SigningKey.load(config.device_key).sign(b"offer"), b"offer")
    assert VerifyKey.load(config.control_key).text == VerifyKey.load(site / "keys" / "control.pub").text
    assert (site / "press-04" / "press-04.key").stat().st_mode & 0o777 == 0o600


def test_an_id_is_given_once(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert add(site) == 0
    assert add(site) == 3
    assert "'press-04' is taken" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["Press", "a/b", "", "-a", "a" * 33, "aggregator", "#"])
def test_hostile_names_are_refused(device: str) -> None:
    with pytest.raises(RegistryError, match="must be 1 to 32"):
        Registry().add(Entry(device, ""))


def test_a_revoked_device_has_no_key(site: Path) -> None:
    add(site)
    path = site / "devices.json"
    content = json.loads(path.read_text())
    content["devices"][0]["revoked"] = True
    path.write_text(json.dumps(content))
    assert Registry.load(path).key("press-04") is None
    assert Registry.load(path).key("unknown") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "has no list `devices`"),
        ('{"devices": [{"id": "a"}]}', "must have id, key"),
        ('{"devices": [{"id": "a", "key": "zz"}]}', "device 'a'"),
        ('{"devices": [{"id": "a", "key": 5}]}', "key of device 'a' is 5, expected str"),
    ],
)
def test_a_damaged_registry_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "devices.json").write_text(text)
    with pytest.raises(RegistryError, match=r"devices\.json: ") as caught:
        Registry.load(tmp_path / "devices.json")
    assert message in str(caught.value)


def test_the_list_names_every_device(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(site)
    add(site, "press-05")
    capsys.readouterr()
    assert main(["devices", "list", "--registry", str(site / "devices.json"), "--json"]) == 0
    assert [entry["id"] for entry in json.loads(capsys.readouterr().out)] == ["press-04", "press-05"]
