"""The state of rules that need all updates at once: they are kept, on disk when they are large, and read in blocks.

Memory: what `memory` allows, and one block of every update while a rule reads. Updates beyond it go to an unnamed
temporary file, row after row, tensor after tensor.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import IO, Final

import numpy as np

from aggregator.merge import Contribution, MergeError, check_next
from edge_sdk.tensors import Array

MEMORY: Final = 64 << 20  # bytes of updates held in memory


@dataclass(frozen=True)
class _OnDisk:
    """Where a tensor lies in the file of the state that holds it."""

    file: IO[bytes]
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    def read(self, first: int, out: Array) -> None:
        """Fill `out` with the elements from `first` on."""
        view = out.data.cast("B")
        begin = self.offset + first * self.dtype.itemsize
        done = 0
        while done < len(view):
            got = os.preadv(self.file.fileno(), [view[done:]], begin + done)
            if got <= 0:
                raise MergeError(f"the temporary file of updates ends at byte {begin + done}: free some disk space")
            done += got


@dataclass(frozen=True)
class _Row:
    contribution: Contribution  # without its tensors
    tensors: Mapping[str, Array | _OnDisk]


class Updates:
    """All contributions, in sorted order. `names`: the tensors that are kept. Large ones live in a temporary file."""

    def __init__(self, names: Sequence[str], *, memory: int = MEMORY) -> None:
        self.names = tuple(names)
        self._memory = memory
        self._held = 0
        self._rows: list[_Row] = []
        self._file: IO[bytes] | None = None
        self._files: list[IO[bytes]] = []
        self._last: tuple[str, int] | None = None

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, contribution: Contribution) -> None:
        """Keep one more."""
        check_next(self._last, contribution)
        self._last = contribution.key
        kept = {name: contribution.tensors[name] for name in self.names if name in contribution.tensors}
        size = sum(value.nbytes for value in kept.values())
        self._held += size
        row = _Row(replace(contribution, tensors={}), kept)
        self._rows.append(row if self._held <= self._memory else self._spilled(row))

    def combine(self, other: Updates) -> Updates:
        """The union. Raises `MergeError` where both hold the same update."""
        both = Updates(self.names, memory=self._memory)
        both._rows = sorted([*self._rows, *other._rows], key=lambda row: row.contribution.key)
        for earlier, later in zip(both._rows, both._rows[1:], strict=False):
            check_next(earlier.contribution.key, later.contribution)
        both._held = self._held + other._held
        both._files = [*self._files, *other._files]
        both._last = both._rows[-1].contribution.key if both._rows else None
        return both

    @property
    def contributions(self) -> list[Contribution]:
        """Who contributed, without the tensors. Raises `MergeError` if nobody did."""
        if not self._rows:
            raise MergeError("there is nothing to merge")
        return [row.contribution for row in self._rows]

    def tensor(self, index: int, name: str) -> Array | None:
        """One tensor of one update, None if that update does not hold it."""
        held = self._rows[index].tensors.get(name)
        if isinstance(held, _OnDisk):
            out = np.empty(held.size, held.dtype)
            held.read(0, out)
            return out.reshape(held.shape)
        return held

    def blocks(self, name: str, elements: int) -> Iterator[tuple[int, Array]]:
        """(first, values `[updates, n]`) over the flat tensor, n of `elements` or less; `values` is reused between blocks.

        Raises `MergeError` if an update does not hold the tensor.
        """
        held = []
        for row in self._rows:
            if name not in row.tensors:
                raise MergeError(
                    f"the update of {row.contribution.device!r} holds no tensor {name!r}: this rule needs it"
                )
            value = row.tensors[name]
            held.append(value if isinstance(value, _OnDisk) else value.reshape(-1))
        size, dtype = held[0].size, held[0].dtype
        buffer = np.empty(len(held) * min(elements, size), dtype)
        for first in range(0, size, elements):
            count = min(elements, size - first)
            block = buffer[: len(held) * count].reshape(len(held), count)
            for target, value in zip(block, held, strict=True):
                if isinstance(value, _OnDisk):
                    value.read(first, target)
                else:
                    target[...] = value[first : first + count]
            yield first, block

    def close(self) -> None:
        """Remove the temporary file."""
        for file in self._files:
            file.close()
        self._rows.clear()

    def _spilled(self, row: _Row) -> _Row:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="edgewise-merge-")  # noqa: SIM115 - closed by `close`
            self._files.append(self._file)
        file = self._file
        tensors: dict[str, Array | _OnDisk] = {}
        for name, value in row.tensors.items():
            assert not isinstance(value, _OnDisk)
            tensors[name] = _OnDisk(file, file.seek(0, os.SEEK_END), value.shape, value.dtype)
            try:
                file.write(np.ascontiguousarray(value).data)
            except OSError as error:
                raise MergeError(
                    f"updates cannot be kept in {tempfile.gettempdir()}: {error}; free some disk space"
                ) from error
        file.flush()
        return _Row(row.contribution, tensors)
