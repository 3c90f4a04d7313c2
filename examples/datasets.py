"""Real data that comes inside installable packages: nothing is downloaded at run time.

Each loader checks size and SHA-256 of what it reads and names the package to install when it is missing.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.errors import MissingDependency, SampleError

WATCH_BYTES = 18_118_091
WATCH_SHA256 = "eb122f23cdf06ef6bd6c6c5312958ec5cf9d038e2e6d457b8081662c75a42537"
WATCH_CLASSES = ("PEN", "ABD", "FEL", "IR", "ER", "TRAP", "ROW")
WATCH_PEOPLE = tuple(range(1, 11))


@dataclass(frozen=True)
class Recording:
    """One recording of one person: consecutive windows in the order of time.

    `x` is float32 `[windows, 6, width]` (acceleration in g along three axes, then rotation rate in rad/s), `label` an index
    into `WATCH_CLASSES`.
    """

    name: str
    person: int
    label: int
    x: np.ndarray


def watch(width: int = 100, stride: int = 50) -> list[Recording]:
    """Shoulder exercises recorded by a wrist watch at 50 Hz: ten people, seven exercises, both arms (arXiv 1802.01489).

    Windows of `width` samples every `stride` samples; the incomplete rest of a recording is left out.
    Raises `MissingDependency` where the package is not installed, `SampleError` where the file is not the known one.
    """
    data = _load_pickled_array(_watch_file())
    recordings = []
    for index, (signal, label, person) in enumerate(zip(data["X"], data["y"], data["subject"], strict=True)):
        starts = range(0, len(signal) - width + 1, stride)
        windows = np.stack([np.asarray(signal[start : start + width], np.float32).T for start in starts])
        recordings.append(Recording(f"recording-{index:03d}", int(person), int(label), np.ascontiguousarray(windows)))
    return recordings


def of_people(recordings: list[Recording], people: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """All windows of these people: x float32 `[n, 6, width]`, y int64 `[n]`."""
    chosen = [recording for recording in recordings if recording.person in people]
    x = np.concatenate([recording.x for recording in chosen])
    y = np.concatenate([np.full(len(recording.x), recording.label, np.int64) for recording in chosen])
    return x, y


def _watch_file() -> Path:
    spec = importlib.util.find_spec("seglearn")  # found, never imported: its imports need pandas
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "the watch data lies in the package seglearn, which is not installed: pip install --no-deps seglearn==1.2.5"
        )
    path = Path(spec.origin).parent / "data" / "watch_dataset.npy"
    if not path.is_file():
        raise SampleError(f"{path.name} is missing from the installed seglearn: pip install --no-deps seglearn==1.2.5")
    found = path.stat().st_size
    if found != WATCH_BYTES:
        raise SampleError(f"{path.name} has {found} bytes, expected {WATCH_BYTES}: install seglearn==1.2.5")
    return path


def _load_pickled_array(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WATCH_SHA256:
        raise SampleError(f"{path.name} has SHA-256 {found}, expected {WATCH_SHA256}: install seglearn==1.2.5")
    # The only pickle of the project. The digest above names the one file that is ever unpickled here.
    return np.load(path, allow_pickle=True).item()
