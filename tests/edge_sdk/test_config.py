from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.config import ConfigError, DeviceConfig

GOOD = """
id = "press-04"
site = "bremen"
job = "watch"
broker = "mqtt://127.0.0.1:18830"
bundle = "watch.bundle"
store = "store"
device_key = "press-04.key"
control_key = "control.pub"
[limits]
seconds = 5
sample_bytes = 1000
"""


def load(tmp_path: Path, text: str) -> DeviceConfig:
    path = tmp_path / "device.toml"
    path.write_text(text)
    return DeviceConfig.load(path)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    config = load(tmp_path, GOOD)
    assert config.bundle == tmp_path / "watch.bundle"
    assert config.store == tmp_path / "store"
    assert config.limits.seconds == 5
    assert config.limits.threads == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("site =", "sites ="), r"device.toml: unknown key 'sites'; did you mean 'site'\?"),
        (('id = "press-04"', 'id = "Press/04"'), "id = 'Press/04' must be 1 to 32 lower-case letters"),
        (("seconds = 5", 'seconds = "5"'), "limits.seconds = '5' must be int or float"),
        (("seconds = 5", "seconds = 0"), "limits.seconds = 0 must be above 0"),
        (("seconds = 5", "second = 5"), r"unknown key 'limits.second'; did you mean 'seconds'\?"),
        (('job = "watch"', ""), "the key 'job' is missing"),
        (('job = "watch"', "job = "), "not a TOML file"),
    ],
)
def test_a_wrong_key_is_named(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, GOOD.replace(*change))


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edgewise devices add"):
        DeviceConfig.load(tmp_path / "none.toml")
