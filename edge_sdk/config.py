"""`device.toml`: what one device needs to know about itself. Parsed strictly: unknown keys are refused by name.

    id = "press-04"                     this device: lower-case letters, digits, hyphens, at most 32
    site = "bremen"                     as in the job file
    job = "watch"
    prefix = "acme/plant-2"             optional: topic levels above Edgewise's own
    broker = "mqtt://127.0.0.1:18830"   where the gateway's broker listens
    bundle = "watch.bundle"             the model and its programs
    program = "watch/lora/r4/int8"      whose `infer` graph predicts (default: the one of the gateway's model)
    encoding = "int4_row"               optional: how its updates travel, where the task leaves it the choice
    store = "store"                     folder of samples, outbox and downloads; made when it is missing
    device_key = "press-04.key"         signs this device's offers; stays on this device
    control_key = "control.pub"         whose rounds, tasks and verdicts are believed
    release_key = "release.pub"         optional: then only a bundle signed by it is opened

    [limits]
    threads = 1                         threads of one training step
    seconds = 600                       of training per task; it then ends after the current step
    temperature_celsius = 75            training waits while the hottest zone is above (where Linux tells)
    cache_bytes = 8388608               features of the model's frozen part, kept in memory during a task; 0 for none
    memory_bytes = 67108864             optional: of one training step; larger batches go in parts where the program can
    sample_bytes = 67108864             the device's own examples; the oldest go first
    outbox_bytes = 268435456            updates waiting for the gateway
    outbox_entries = 256

    [tls]                               for a broker at mqtts://; `edgewise devices enroll` writes it
    ca = "ca.pem"                       who signed the certificate of the broker
    certificate = "press-04.pem"        this device's; its common name is the device's id
    key = "press-04-tls.key"            its private key; stays on this device

Paths are relative to the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import EdgewiseError
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import SEGMENT


class ConfigError(EdgewiseError):
    """A `device.toml` that cannot be used as it is."""


@dataclass(frozen=True)
class DeviceLimits:
    """What training and storage may take of the device: threads, seconds per task, degrees Celsius, bytes, entries."""

    threads: int = 1
    seconds: float | None = None
    temperature_celsius: float | None = None
    cache_bytes: int = 8 << 20
    memory_bytes: int | None = None
    sample_bytes: int = 64 << 20
    outbox_bytes: int = 256 << 20
    outbox_entries: int = 256


@dataclass(frozen=True)
class DeviceConfig:
    """One `device.toml`; the module's docstring explains each field."""

    id: str
    site: str
    job: str
    broker: str
    bundle: Path
    store: Path
    device_key: Path
    control_key: Path
    release_key: Path | None = None
    prefix: str = ""
    program: str | None = None
    encoding: str | None = None
    limits: DeviceLimits = DeviceLimits()
    tls: TlsFiles | None = None

    @classmethod
    def load(cls, path: Path) -> DeviceConfig:
        """Read and check a `device.toml`. Raises `ConfigError` naming file and key."""
        try:
            with path.open("rb") as file:
                content = tomllib.load(file)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}); `edgewise devices add` makes one") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path}: not a TOML file: {error}") from error
        return cls._from(content, path)

    @classmethod
    def _from(cls, content: Mapping[str, Any], path: Path) -> DeviceConfig:
        values = _typed(content, _FIELDS, path, "")
        missing = [name for name in _REQUIRED if name not in values]
        if missing:
            raise ConfigError(f"{path}: the key {missing[0]!r} is missing")
        for name in ("id", "site", "job"):
            if not SEGMENT.fullmatch(values[name]):
                raise ConfigError(
                    f"{path}: {name} = {values[name]!r} must be 1 to 32 lower-case letters, digits and hyphens "
                    "and must not begin with a hyphen"
                )
        for name in _PATHS & values.keys():
            values[name] = (path.parent / values[name]).resolve()
        limits = _typed(values.pop("limits", {}), _LIMITS, path, "limits.")
        for name, value in limits.items():
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ConfigError(f"{path}: limits.{name} = {value} must be above 0")
        tls = _tls(values.pop("tls", None), path)
        if (tls is not None) is not values["broker"].startswith("mqtts://"):
            raise ConfigError(f"{path}: broker = {values['broker']!r}: mqtts:// and the table [tls] belong together")
        return cls(limits=DeviceLimits(**limits), tls=tls, **values)


def _tls(content: Mapping[str, Any] | None, path: Path) -> TlsFiles | None:
    if content is None:
        return None
    files = _typed(content, dict.fromkeys(_TLS, (str,)), path, "tls.")
    missing = [name for name in _TLS if name not in files]
    if missing:
        raise ConfigError(f"{path}: the key 'tls.{missing[0]}' is missing")
    return TlsFiles(**{name: (path.parent / files[name]).resolve() for name in _TLS})


_REQUIRED = ("id", "site", "job", "broker", "bundle", "store", "device_key", "control_key")
_MAY_BE_ZERO = ("cache_bytes",)
_PATHS = {"bundle", "store", "device_key", "control_key", "release_key"}
_FIELDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys([*_REQUIRED, "release_key", "prefix", "program", "encoding"], (str,)),
    "limits": (dict,),
    "tls": (dict,),
}
_TLS = ("ca", "certificate", "key")
_LIMITS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        ["threads", "cache_bytes", "memory_bytes", "sample_bytes", "outbox_bytes", "outbox_entries"], (int,)
    ),
    **dict.fromkeys(["seconds", "temperature_celsius"], (int, float)),
}


def _typed(content: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], path: Path, where: str) -> dict[str, Any]:
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(sorted(known))}"
            raise ConfigError(f"{path}: unknown key {where + name!r}{hint}")
        if not isinstance(value, known[name]) or isinstance(value, bool):
            expected = " or ".join(kind.__name__ for kind in known[name])
            raise ConfigError(f"{path}: {where}{name} = {value!r} must be {expected}")
    return dict(content)
