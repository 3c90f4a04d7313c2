"""The registry of devices, and the commands that fill it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from devices.cli import make_keys
from devices.registry import Entry, Registry, RegistryError
from edge_sdk import EdgeDevice
from edge_sdk.cli import main
from edge_sdk.config import DeviceConfig
from edge_sdk.keys import SigningKey, VerifyKey
from tests.tiny_bundle import tiny_bundle


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


def test_a_device_never_gets_the_private_control_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _arguments(tmp_path, control=tmp_path / "keys" / "control.key")
    assert main(arguments) == 3
    assert "control.key: not an unencrypted Ed25519 public key" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"--control-key": "missing.pub"}, "missing.pub: cannot be read"),
        ({"--site": "BREMEN!"}, "site 'BREMEN!' must be 1 to 32"),
        ({"--broker": "foo"}, "broker 'foo' must be an address"),
        ({"--registry": "nowhere/devices.json"}, "nowhere/devices.json: its folder does not exist"),
    ],
)
def test_what_cannot_work_is_refused_before_a_key_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, str], complaint: str
) -> None:
    arguments = _arguments(tmp_path, control=tmp_path / "keys" / "control.pub")
    for option, value in change.items():
        arguments[arguments.index(option) + 1] = value
    assert main(arguments) == 3
    complaints = capsys.readouterr().err
    assert complaint in complaints
    assert len(complaints.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_bundle_that_is_here_is_copied_so_that_the_folder_is_all_a_device_needs(tmp_path: Path) -> None:
    arguments = _arguments(tmp_path, control=tmp_path / "keys" / "control.pub")
    arguments[arguments.index("--bundle") + 1] = str(tiny_bundle(tmp_path / "tiny.bundle"))
    assert main(arguments) == 0
    with EdgeDevice.open(tmp_path / "out" / "device.toml") as device:
        assert device.status().device == "press-09"


def _arguments(folder: Path, *, control: Path) -> list[str]:
    make_keys(folder / "keys")
    options = {
        "--registry": str(folder / "devices.json"),
        "--out": str(folder / "out"),
        "--site": "bremen",
        "--job": "tiny",
        "--broker": "mqtt://127.0.0.1:18830",
        "--bundle": "model.bundle",
        "--control-key": str(control),
    }
    return ["devices", "add", "press-09", *(part for pair in options.items() for part in pair)]
