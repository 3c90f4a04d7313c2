"""The state of rules that need all updates: the same on disk as in memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from aggregator.merge import Contribution, MergeError
from aggregator.merge.updates import Updates


def rows(count: int, size: int = 1000) -> list[Contribution]:
    draw = np.random.default_rng(1)
    return [
        Contribution(f"dev-{k}", 1, 5, {}, {"w": draw.random((size, 2), np.float32), "b": draw.random(3, np.float32)})
        for k in range(count)
    ]


def held(found: list[Contribution], memory: int) -> Updates:
    state = Updates(["w", "b"], memory=memory)
    for row in found:
        state.add(row)
    return state


@pytest.mark.parametrize("memory", [0, 20_000, 1 << 30], ids=["on disk", "half of each", "in memory"])
def test_blocks_and_tensors_are_what_was_added(memory: int) -> None:
    given = rows(5)
    state = held(given, memory)
    for index, row in enumerate(given):
        for name in ("w", "b"):
            np.testing.assert_array_equal(state.tensor(index, name), row.tensors[name])
    for name in ("w", "b"):
        whole = np.concatenate([values.copy() for _, values in state.blocks(name, 300)], axis=1)
        np.testing.assert_array_equal(whole, [row.tensors[name].reshape(-1) for row in given])
    state.close()


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    tracemalloc.start()
    state = Updates(["w"], memory=4 << 20)
    draw = np.random.default_rng(0)
    for k in range(40):
        state.add(Contribution(f"dev-{k:02d}", 1, 1, {}, {"w": draw.random(200_000, np.float32)}))
    for _ in state.blocks("w", 4096):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    state.close()
    assert peak < 8 << 20  # all updates are 32 MB


def test_a_union_is_sorted_and_holds_each_update_once() -> None:
    given = rows(6)
    both = held(given[1::2], 0).combine(held(given[::2], 1 << 30))
    assert [row.device for row in both.contributions] == [row.device for row in given]
    np.testing.assert_array_equal(both.tensor(3, "w"), given[3].tensors["w"])
    with pytest.raises(MergeError, match="would be counted twice"):
        held(given[:2], 0).combine(held(given[1:3], 0))


def test_an_update_that_lacks_a_tensor_is_named() -> None:
    state = Updates(["w"])
    state.add(rows(1)[0])
    state.add(Contribution("dev-9", 1, 5, {}, {}))
    with pytest.raises(MergeError, match="update of 'dev-9' holds no tensor 'w'"):
        next(state.blocks("w", 10))
