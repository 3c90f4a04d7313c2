"""What one device gets: its keys, its `device.toml`, and what it must know of the gateway, in one folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from devices.registry import RegistryError
from edge_sdk.keys import SigningKey, VerifyKey
from edge_sdk.tls import TlsFiles
from edge_sdk.wire import SEGMENT


@dataclass(frozen=True)
class Settings:
    """What `device.toml` says beyond the id (`edge_sdk.config`).

    `control_key` is copied into the folder, and so is `bundle` where it is a file here; otherwise it is the path under which
    the device will find it.
    """

    site: str
    job: str
    broker: str
    bundle: str
    control_key: Path
    prefix: str = ""
    tls: bool = False

    def check(self) -> None:
        """Raises `RegistryError` and `KeyFileError`, before anything is made."""
        for name, value in (("site", self.site), ("job", self.job)):
            if not SEGMENT.fullmatch(value):
                raise RegistryError(f"{name} {value!r} must be 1 to 32 lower-case letters, digits and hyphens")
        if urlsplit(self.broker).scheme not in ("mqtt", "mqtts") or not urlsplit(self.broker).hostname:
            raise RegistryError(f"broker {self.broker!r} must be an address such as mqtt://127.0.0.1:18830")
        VerifyKey.load(self.control_key)


@dataclass(frozen=True)
class DeviceFolder:
    """The files of device `id`."""

    path: Path
    id: str

    @property
    def device_key(self) -> Path:
        """Signs its offers."""
        return self.path / f"{self.id}.key"

    @property
    def public_key(self) -> Path:
        """The public half, for the registry."""
        return self.path / f"{self.id}.pub"

    @property
    def tls_key(self) -> Path:
        """The key of its certificate."""
        return self.path / f"{self.id}-tls.key"

    @property
    def certificate(self) -> Path:
        """Its certificate."""
        return self.path / f"{self.id}.pem"

    @property
    def request(self) -> Path:
        """Its certificate request."""
        return self.path / f"{self.id}.csr"

    @property
    def tls(self) -> TlsFiles:
        """What it connects with."""
        return TlsFiles(self.path / "ca.pem", self.certificate, self.tls_key)

    def make(self) -> None:
        """Make the folder. Raises `RegistryError`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RegistryError(f"{self.path}: the folder cannot be made ({error.strerror})") from error

    def signing_key(self) -> VerifyKey:
        """The public half of the device's key, which is made if it is not there."""
        if not self.device_key.exists():
            return SigningKey.generate(self.device_key).verify_key
        return SigningKey.load(self.device_key).verify_key

    def write(self, settings: Settings, *, ca: bytes = b"") -> dict[str, object]:
        """Write `device.toml` and what it names of the gateway's; returns the settings. Raises `RegistryError`."""
        values: dict[str, object] = {
            "id": self.id,
            "site": settings.site,
            "job": settings.job,
            **({"prefix": settings.prefix} if settings.prefix else {}),
            "broker": settings.broker,
            "bundle": Path(settings.bundle).name if Path(settings.bundle).is_file() else settings.bundle,
            "store": "store",
            "device_key": self.device_key.name,
            "control_key": "control.pub",
        }
        # A JSON string is a TOML basic string.
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
        if settings.tls:
            files = {"ca": "ca.pem", "certificate": self.certificate.name, "key": self.tls_key.name}
            lines += ["", "[tls]", *(f"{name} = {json.dumps(value)}" for name, value in files.items())]
            values["tls"] = files
        try:
            if settings.tls:
                (self.path / "ca.pem").write_bytes(ca)
            VerifyKey.load(settings.control_key).save(self.path / "control.pub")  # the public half and nothing else
            if Path(settings.bundle).is_file():
                shutil.copyfile(settings.bundle, self.path / Path(settings.bundle).name)
            (self.path / "device.toml").write_text("\n".join(lines) + "\n")
        except OSError as error:
            raise RegistryError(f"{error.filename}: {error.strerror}") from error
        return values
