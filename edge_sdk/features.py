"""The frozen part of a program: its features, and the memory of those of samples seen before (step-graphs.md, 4.2).

Rules of the cache: it lives as long as a task; it is filled and then kept, since epochs are sequential scans in which the
least recently used sample is the next one wanted; what finds no room is computed again. Features are as personal as the
samples they come from: they stay in memory and never reach the disk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle, Program
from edge_sdk.draws import Draws
from edge_sdk.errors import BundleError
from edge_sdk.samples import Ids
from edge_sdk.sessions import RuntimeProfile, inputs_of, open_session, outputs_of, shared
from edge_sdk.tensors import Array

_DTYPES: Mapping[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}
_HALF_LIMIT = 65504.0  # the largest float16


class FeatureCache:
    """Features of samples by sample id, up to a number of bytes. Not thread-safe.

    `shapes` maps the names of features to dtype and shape of one sample's. float32 features are held as `dtype`
    (float16 or float32); integer codes as they are. Holds nothing if a single sample takes more than `budget` bytes.
    """

    def __init__(self, shapes: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]], budget: int, dtype: str) -> None:
        self._shapes, self._budget = dict(shapes), budget
        self._rows: dict[int, int] = {}
        self._store: dict[str, Array] = {}
        self._capacity = 0
        self._half = dtype == "float16"
        self._make()

    def _make(self) -> None:
        half = np.dtype(np.float16)
        held = {n: (half if self._half and d.kind == "f" else d, shape) for n, (d, shape) in self._shapes.items()}
        sample = sum(dtype.itemsize * math.prod(shape) for dtype, shape in held.values())
        self._capacity = self._budget // sample if sample else 0
        self._rows.clear()
        # Pages of these arrays are taken from the system when they are first written.
        self._store = {name: np.empty((self._capacity, *shape), dtype) for name, (dtype, shape) in held.items()}

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sample_id: int, features: Mapping[str, Array], row: int) -> None:
        """Keep row `row` of a batch of features, unless there is no room or it is kept already."""
        if sample_id in self._rows or len(self._rows) >= self._capacity:
            return
        if self._half and any(
            v.dtype.kind == "f" and np.abs(v[row]).max(initial=0) > _HALF_LIMIT for v in features.values()
        ):
            self._half = False
            self._make()
            if not self._capacity:
                return
        place = len(self._rows)
        for name, values in features.items():
            self._store[name][place] = values[row]
        self._rows[sample_id] = place

    def read(self, sample_id: int, into: Mapping[str, Array], row: int) -> None:
        """Copy a sample's features to row `row` of a batch."""
        place = self._rows[sample_id]
        for name, values in into.items():
            values[row] = self._store[name][place]


class Prefix:
    """Runs the prefix graphs of a program and keeps what it may. Not thread-safe.

    The features of a batch lie in buffers of our own, which the step reads where they are.
    """

    def __init__(self, bundle: Bundle, program: Program, profile: RuntimeProfile, seed: int) -> None:
        self._program = program
        self._odds = [variant.weight for variant in program.prefix]
        self._draws = Draws(seed, "variant/prefix")
        # What runs once per sample is not worth a packed copy of its weights.
        kept = dataclasses.replace(profile, prepacking=profile.prepacking and not program.features.cacheable)
        self._sessions = [open_session(bundle.file(variant.file), kept) for variant in program.prefix]
        self.inputs, self.outputs = inputs_of(self._sessions[0]), outputs_of(self._sessions[0])
        self._shapes = self._checked(bundle)
        self._bindings = [session.io_binding() for session in self._sessions]
        self._buffers: dict[str, Array] = {}
        drawn = any(name.startswith("r.") for name, _, _ in self.inputs)
        budget = profile.cache_bytes if program.features.cacheable and len(self._sessions) == 1 and not drawn else 0
        self.cache = FeatureCache(self._shapes, budget, profile.cache_dtype)
        self.runs = 0

    def _checked(self, bundle: Bundle) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
        def broken(finding: str) -> BundleError:
            return BundleError(
                f"{bundle.path}: the prefix of program {self._program.id!r} does not fit its contract: {finding}"
            )

        for session, variant in zip(self._sessions[1:], self._program.prefix[1:], strict=True):
            if sorted(inputs_of(session)) != sorted(self.inputs) or sorted(outputs_of(session)) != sorted(self.outputs):
                raise broken(f"I3: {variant.file} has another signature than {self._program.prefix[0].file}")
        for name, _, _ in self.inputs:
            if not name.startswith(("d.", "r.")):
                raise broken(f"I8: it reads {name}")
        shapes = {}
        for name, kind, shape in self.outputs:
            sizes = [size for size in shape[1:] if isinstance(size, int)]
            if not name.startswith("f.") or kind not in _DTYPES or len(sizes) != len(shape) - 1:
                raise broken(f"I7: its output {name} is {kind} {list(shape)}")
            shapes[name] = (_DTYPES[kind], tuple(sizes))
        total = sum(dtype.itemsize * math.prod(sizes) for dtype, sizes in shapes.values())
        if total != self._program.features.nbytes:
            raise broken(
                f"I12: the features of a sample take {total} bytes, the manifest says {self._program.features.nbytes}"
            )
        return shapes

    def features(
        self,
        data: Mapping[str, Array],
        draws: Mapping[str, Array],
        ids: Ids | None,
        options: onnxruntime.RunOptions,
    ) -> dict[str, Array]:
        """`f.*` of a batch of data `[n, ...]`; valid until the next call. `ids`: of the samples, to keep them by.

        `draws`: the values of `r.*`.
        """
        count = len(next(iter(data.values())))
        self._reserve(count)
        batch = {name: values[:count] for name, values in self._buffers.items()}
        keys = None if ids is None else [int(sample_id) for sample_id in ids]
        absent = [row for row in range(count) if keys is None or keys[row] not in self.cache]
        if absent:
            whole = len(absent) == count
            given = data if whole else {name: values[absent] for name, values in data.items()}
            self._run({**given, **draws}, len(absent), options)
        if keys is None:
            return batch
        # The missing rows came out one after another; from the last on, each moves down to its place.
        for source, row in reversed(list(enumerate(absent))):
            for values in batch.values() if source != row else ():
                values[row] = values[source]
        fresh = set(absent)
        for row in range(count):
            if row not in fresh:
                self.cache.read(keys[row], batch, row)
        for row in absent:
            self.cache.add(keys[row], batch, row)
        return batch

    def close(self) -> None:
        """Let sessions, buffers and features go."""
        self._bindings.clear()
        self._sessions.clear()
        self._buffers.clear()
        self.cache = FeatureCache({}, 0, "float32")

    def _reserve(self, count: int) -> None:
        if not self._buffers or count > len(next(iter(self._buffers.values()))):
            self._buffers = {name: np.empty((count, *shape), dtype) for name, (dtype, shape) in self._shapes.items()}

    def _run(self, given: Mapping[str, Array], count: int, options: onnxruntime.RunOptions) -> None:
        variant = 0 if len(self._odds) == 1 else self._draws.choice(self._odds)
        binding = self._bindings[variant]
        for name, _, _ in self.inputs:
            binding.bind_cpu_input(name, np.ascontiguousarray(given[name]))
        for name, values in self._buffers.items():
            binding.bind_ortvalue_output(name, shared(values[:count]))
        self._sessions[variant].run_with_iobinding(binding, options)
        self.runs += 1
