"""The gateway's own held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.validation import evaluate_file
from edge_sdk.bundle import Bundle
from edge_sdk.errors import SampleError
from edge_sdk.runtime import Predictor
from tests.tiny_bundle import HEAD, tiny_bundle, tiny_data

X, Y = tiny_data(50)


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as opened:
        yield opened


def evaluate(bundle: Bundle, path: Path) -> tuple[float, float]:
    program = bundle.program(HEAD)
    return evaluate_file(bundle, bundle.program(program.evaluate or ""), bundle.initial(program), path)


def test_a_file_is_scored_as_the_model_predicts(bundle: Bundle, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", x=X, y=Y)
    program = bundle.program(HEAD)
    right = (np.asarray(Predictor(bundle, program, bundle.initial(program)).predict(X)).argmax(axis=1) == Y).sum()
    assert evaluate(bundle, tmp_path / "v.npz") == (right, 50)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "has no array 'd.y'"),
        ({"x": X.astype(np.float64), "y": Y}, "'d.x' is float64"),
        ({"x": X[:, :2], "y": Y}, r"shape \[50, 2\]"),
        ({"x": X * np.float32("nan"), "y": Y}, "not finite"),
        ({"x": X[:9], "y": Y}, "same number of samples"),
        ({"x": X[:0], "y": Y[:0]}, "at least 1"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(
    bundle: Bundle, tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(SampleError, match=message):
        evaluate(bundle, tmp_path / "v.npz")


def test_a_file_of_another_kind_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "v.npz").write_bytes(b"no archive")
    with pytest.raises(SampleError, match="cannot be read as an .npz file"):
        evaluate(bundle, tmp_path / "v.npz")
