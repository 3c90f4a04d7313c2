"""Which devices there are: their ids and public keys, in one JSON file beside the job file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.errors import EdgewiseError, KeyFileError
from edge_sdk.keys import VerifyKey
from edge_sdk.wire import RESERVED

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")


class RegistryError(EdgewiseError):
    """A registry that cannot be read, or a device that cannot be entered."""


def check_id(device: str) -> None:
    """Raise `RegistryError` unless a device may have this id: it stands in topics and is a certificate's common name."""
    if not _ID.fullmatch(device) or device in RESERVED:
        raise RegistryError(
            f"device id {device!r} must be 1 to 32 lower-case letters, digits and hyphens, "
            f"and none of {', '.join(RESERVED)}"
        )


@dataclass(frozen=True)
class Entry:
    """One device. `key` is its public key (`VerifyKey.text`); `owner` defaults to the id.

    `discard_round`: what a revoked device gave to the round that was open then is not to count.
    """

    id: str
    key: str
    profile: str = ""
    owner: str = ""
    revoked: bool = False
    discard_round: bool = False


@dataclass
class Registry:
    """The entries by id."""

    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Registry:
        """Read a registry. Raises `RegistryError` naming file and entry."""
        try:
            content = json.loads(path.read_bytes())
        except OSError as error:
            raise RegistryError(
                f"{path}: cannot be read ({error.strerror}); `edgewise devices add` makes one"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RegistryError(f"{path}: not a JSON file: {error}") from error
        registry = cls()
        rows = content.get("devices") if isinstance(content, Mapping) else None
        if not isinstance(rows, list):
            raise RegistryError(f"{path}: has no list `devices`")
        for row in rows:
            registry.add(_entry(row, path))
        return registry

    def add(self, entry: Entry) -> None:
        """Enter a device. Raises `RegistryError` for an id that is no id, is reserved, or is taken."""
        check_id(entry.id)
        if entry.id in self.entries:
            raise RegistryError(f"device id {entry.id!r} is taken: two devices with one id would answer for each other")
        self.entries[entry.id] = entry

    def key(self, device: str) -> VerifyKey | None:
        """The key of a device, None for one that is unknown or revoked."""
        entry = self.entries.get(device)
        return None if entry is None or entry.revoked else VerifyKey.from_text(entry.key)

    @property
    def active(self) -> list[str]:
        """The ids that are not revoked, sorted."""
        return [name for name in self.ids if not self.entries[name].revoked]

    @property
    def ids(self) -> list[str]:
        """All ids, sorted."""
        return sorted(self.entries)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        text = json.dumps({"devices": [asdict(self.entries[name]) for name in self.ids]}, indent=1) + "\n"
        aside = path.with_name(path.name + ".part")
        with aside.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


def _entry(row: Any, path: Path) -> Entry:
    known = {"id": str, "key": str, "profile": str, "owner": str, "revoked": bool, "discard_round": bool}
    if not isinstance(row, Mapping) or not {"id", "key"} <= row.keys() <= known.keys():
        raise RegistryError(
            f"{path}: the entry {str(row)[:80]} must have id, key and no other keys than {', '.join(known)}"
        )
    for name, value in row.items():
        if type(value) is not known[name]:
            raise RegistryError(f"{path}: {name} of device {row['id']!r} is {value!r}, expected {known[name].__name__}")
    try:
        VerifyKey.from_text(row["key"])
    except KeyFileError as error:
        raise RegistryError(f"{path}: device {row['id']!r}: {error}") from error
    return Entry(**row)
