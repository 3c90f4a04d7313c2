"""Writes the bundle: the archive that `edge_sdk.bundle` opens. Equal content gives equal bytes."""

from __future__ import annotations

import base64
import io
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_sdk.bundle import MANIFEST, SIGNATURE, SIGNED_PREFIX
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import digest

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest that ZIP knows: the time of writing is not content


def write_archive(
    manifest: Mapping[str, Any], files: Mapping[str, bytes], path: Path, release_key: SigningKey | None = None
) -> str:
    """Write `manifest` and `files` to `path`, whole or not at all, and return the bundle's digest.

    The manifest's `files` (size and SHA-256 of each) is filled in here. With a release key the bundle is signed.
    """
    listing = {name: {"bytes": len(data), "sha256": digest(data)} for name, data in sorted(files.items())}
    text = json.dumps({**manifest, "files": listing}, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    members = {MANIFEST: text}
    if release_key is not None:
        members[SIGNATURE] = base64.b64encode(release_key.sign(SIGNED_PREFIX + text))
    members.update(sorted(files.items()))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    return digest(text)
