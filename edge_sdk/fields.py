"""What one sample consists of, and the check that a value fits: used before it is stored, predicted on or trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edge_sdk.errors import SampleError
from edge_sdk.tensors import Array

INPUT = "d.x"
TARGET = "d.y"
WEIGHT = "d.w"


@dataclass(frozen=True)
class FieldSpec:
    """One data field (`d.x`, `d.y`, ...): NumPy dtype name and shape without the batch axis.

    `classes`: for an integer field the number of classes, so that a label outside `0 .. classes - 1` is noticed.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    classes: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one sample's value."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    def check(self, values: Array) -> None:
        """Raise `SampleError` unless `values` is a batch `[n, *shape]` of this field, finite and within the classes."""
        if values.dtype.name != self.dtype:
            raise SampleError(
                f"{self.name} has dtype {values.dtype}, expected {self.dtype}: "
                f"convert it, for instance with .astype(numpy.{self.dtype})"
            )
        if values.shape[1:] != self.shape or values.ndim != len(self.shape) + 1:
            raise SampleError(
                f"{self.name} has shape {list(values.shape)}, expected a batch of samples "
                f"[n{''.join(f', {size}' for size in self.shape)}]"
            )
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            bad = int(np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))[0])
            raise SampleError(
                f"{self.name} of sample {bad} holds NaN or infinity: look at the sensor, or leave the sample out"
            )
        if self.classes is not None and values.size and not (values.min() >= 0 and values.max() < self.classes):
            raise SampleError(
                f"{self.name} holds the label {int(values.max() if values.max() >= self.classes else values.min())}, "
                f"expected 0 to {self.classes - 1}"
            )

    def batch_of_one(self, value: object) -> Array:
        """One sample's value as a batch `[1, *shape]`; a Python number is taken for an integer field."""
        array = np.asarray(value)
        if np.dtype(self.dtype).kind == "i" and array.dtype.kind in "iu" and array.ndim == 0:
            array = array.astype(self.dtype)
        return array[None]


def check_batch(fields: Mapping[str, FieldSpec], batch: Mapping[str, Array]) -> int:
    """Check every named field of a batch and that all have the same number of samples; return that number."""
    counts = {}
    for name, values in batch.items():
        fields[name].check(values)
        counts[name] = len(values)
    if len(set(counts.values())) != 1:
        raise SampleError(f"the fields of a batch must hold equally many samples, found {counts}")
    return next(iter(counts.values()))
