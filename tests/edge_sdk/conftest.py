from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_sdk.bundle import Bundle
from tests.tiny_bundle import tiny_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as opened:
        yield opened
