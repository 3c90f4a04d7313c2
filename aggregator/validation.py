"""The gateway's own held-out samples: an `.npz` file scored with the program's evaluation.

The file holds one array per input field of the bundle, under the field's name (`d.x`, `d.y`) or that name
without `d.`: all with the same number of samples along the first axis, dtype and shape as the bundle
declares.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.bundle import Bundle, FieldSpec, Program
from edge_sdk.errors import SampleError
from edge_sdk.runtime import RuntimeProfile, Stepper

Array = np.ndarray[Any, np.dtype[Any]]


def load_samples(path: Path, fields: tuple[FieldSpec, ...]) -> dict[str, Array]:
    """Read a validation file. Raises `SampleError` naming the field, what was found and what was expected."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise SampleError(f"{path}: cannot be read as an .npz file of plain arrays: {error}") from error
    samples: dict[str, Array] = {}
    for field in fields:
        value = stored.get(field.name, stored.get(field.name.removeprefix("d.")))
        if value is None:
            raise SampleError(f"{path}: has no array {field.name!r}; it has {', '.join(sorted(stored)) or 'none'}")
        if value.dtype.name != field.dtype or value.shape[1:] != field.shape:
            raise SampleError(
                f"{path}: {field.name!r} is {value.dtype} of shape {list(value.shape)}, "
                f"the bundle expects {field.dtype} of shape [n, {', '.join(map(str, field.shape))}]"
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise SampleError(f"{path}: {field.name!r} holds numbers that are not finite; remove those samples")
        samples[field.name] = value
    counts = {name: len(value) for name, value in samples.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise SampleError(f"{path}: the arrays must hold the same number of samples, at least 1; found {counts}")
    return samples


def evaluate_file(bundle: Bundle, program: Program, tensors: Mapping[str, Array], path: Path) -> tuple[float, float]:
    """Score `tensors` on a validation file with an accumulating `program`: (sum, count) as its `score` names
    them."""
    if program.score is None:
        raise SampleError(f"{path}: program {program.id!r} has no score, so a validation file cannot be judged with it")
    samples = load_samples(path, bundle.fields)
    stepper = Stepper(bundle, program, tensors, RuntimeProfile(), seed=0)
    try:
        for batch in _batches(samples, program):
            stepper.step(batch, {})
        totals = stepper.tensors()
    finally:
        stepper.close()
    return float(np.sum(totals[program.score.sum])), float(np.sum(totals[program.score.count]))


def _batches(samples: Mapping[str, Array], program: Program) -> Iterator[dict[str, Array]]:
    count = len(next(iter(samples.values())))
    for first in range(0, count, program.batch_default):
        yield {name: value[first : first + program.batch_default] for name, value in samples.items()}
