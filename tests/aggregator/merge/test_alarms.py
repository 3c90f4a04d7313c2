"""Alarms of LoRA jobs come after three merges that deserve them, and from no other ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from aggregator.merge.alarms import alarms
from aggregator.merge.lora import PRODUCT_SVD
from tests.aggregator.merge.adapters import Site

SHAPE = {"layer": (9, 13)}
Reports = Sequence[Mapping[str, Any]]


def idle_rounds(ranks: Sequence[int], mode: str, rounds: int) -> Reports:
    """Reports of rounds whose clients, one of each rank, return what they were given."""
    site = Site(SHAPE, ranks)
    model = site.tensors()
    reports = []
    for number in range(1, rounds + 1):
        merger = PRODUCT_SVD.create(site.plan(lora={"mode": mode}, number=number))
        state = merger.empty()
        for k, rank in enumerate(ranks):
            state.add(site.update(k, rank, merger.cut(model, site.programs[rank]), {}))
        found = merger.finish(state, model)
        model = {**model, **found.tensors}
        reports.append(found.report)
    return reports


def kinds(reports: Reports) -> list[str]:
    return [alarm.kind for alarm in alarms(reports)]


def test_ranks_collapse_in_mode_mean_and_not_in_mode_change() -> None:
    assert kinds(idle_rounds([1, 1, 1, 4], "mean", 8)) == ["rank_collapse"]
    assert kinds(idle_rounds([1, 1, 1, 4], "change", 8)) == []


def test_equal_ranks_cannot_collapse() -> None:
    site_of_one_direction = idle_rounds([1, 1], "mean", 4)
    assert site_of_one_direction[-1]["layers"]["layer"]["effective_rank"] == pytest.approx(1)
    assert kinds(site_of_one_direction) == []


def cut_rounds(kept: Sequence[int]) -> Reports:
    """Reports of rounds in which three clients train rank 4 at random and so much of the rank is kept."""
    site = Site(SHAPE, [4])
    start = site.tensors()
    rows = [site.update(k, 4, site.tensors(), start) for k in range(3)]
    return [site.merged(PRODUCT_SVD, rows, start, lora={"rank": rank}).report for rank in kept]


def test_a_truncation_that_lasts_is_an_alarm_that_names_layer_and_share() -> None:
    reports = cut_rounds([1, 1, 1])
    error = reports[-1]["layers"]["layer"]["truncation_error"]
    assert error > 0.2
    (found,) = alarms(reports)
    assert found.kind == "truncation_high"
    assert f"{error:.0%} of layer 'layer'" in found.detail


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_merges_alarm_about_nothing(count: int) -> None:
    assert kinds(cut_rounds([1] * count)) == []


def test_one_good_merge_among_the_last_three_ends_an_alarm() -> None:
    site = Site(SHAPE, [4])
    start = site.tensors()
    same = [site.update(k, 4, start, start) for k in range(3)]
    good = site.merged(PRODUCT_SVD, same, start).report
    assert np.isclose(good["layers"]["layer"]["truncation_error"], 0, atol=1e-6)
    bad = cut_rounds([1, 1, 1])
    assert kinds([*bad, good]) == []
    assert kinds([good, *bad]) == ["truncation_high"]


def test_rounds_without_a_merge_or_without_layers_alarm_about_nothing() -> None:
    bad = cut_rounds([1, 1, 1])
    assert kinds([*bad[:2], {}]) == []
    assert kinds([{"rule": "mean"}] * 3) == []
