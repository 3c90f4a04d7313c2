"""Fashion-MNIST comes from a Debian package, or is asked for by the package's name."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.errors import MissingDependency, SampleError
from examples import datasets

INSTALLED = datasets._FASHION_FOLDER.is_dir()


def test_an_absent_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_FASHION_FOLDER", tmp_path)
    with pytest.raises(MissingDependency, match="not installed: apt-get install dataset-fashion-mnist"):
        datasets.fashion_mnist("test")


def test_another_file_of_that_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_FASHION_FOLDER", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(16)))
    with pytest.raises(SampleError, match="t10k-images-idx3-ubyte.gz has SHA-256"):
        datasets.fashion_mnist("test")


def test_an_idx_file_is_read_by_its_own_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "some-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + np.array(values.shape, ">u4").tobytes() + values.tobytes()))
    monkeypatch.setitem(datasets._FASHION_SHA256, path.name, datasets.hashlib.sha256(path.read_bytes()).hexdigest())
    np.testing.assert_array_equal(datasets._idx(path), values)


@pytest.mark.skipif(not INSTALLED, reason="apt-get install dataset-fashion-mnist")
def test_the_package_holds_ten_garments_a_thousand_times_each() -> None:
    images, labels = datasets.fashion_mnist("test")
    assert (images.shape, images.dtype, labels.dtype) == ((10_000, 28, 28), np.float32, np.int64)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert np.bincount(labels).tolist() == [1000] * 10
