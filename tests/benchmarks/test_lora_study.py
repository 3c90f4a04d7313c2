"""The orderings that the LoRA design asks for, over paired seeds (methods/lora.md, criteria 5 and 6): minutes each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import lora_study
from benchmarks.runs import Runs


def summary(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    args = lora_study.arguments().parse_args([*arguments, "--runs", str(tmp_path / "runs.jsonl")])
    return dict(lora_study.measure(args).summary)


@pytest.mark.soak
def test_under_skew_product_svd_is_ahead_of_the_factor_mean(tmp_path: Path) -> None:
    """Criterion 6."""
    found = summary(tmp_path, "--table", "rules", "--rules", "factor_mean", "product_svd even")
    assert found["gain_round_10_skew_0_3"] >= 0.05
    assert found["gain_round_10_skew_0_1"] >= 0.08
    assert found["pairs_ahead_skew_0_3"] >= 0.8
    assert found["pairs_ahead_skew_0_1"] >= 0.8
    assert found["rounds_to_goal_ratio_skew_0_3"] <= 0.8
    assert found["rounds_to_goal_ratio_skew_0_1"] <= 0.8
    assert found["naive_error_grows_with_skew"]


@pytest.mark.soak
def test_with_mixed_ranks_changes_beat_padding_and_stacking_beats_changes(tmp_path: Path) -> None:
    """Criterion 5: each rule at a rate chosen on a seed of its own."""
    found = summary(tmp_path, "--table", "ranks", "--seeds", "10")
    assert found["change_over_padding"] >= 0.02
    assert found["change_over_mean"] >= -0.005
    assert found["stack_over_change"] >= 0


@pytest.mark.soak
def test_a_run_is_the_same_whatever_ran_before_it(tmp_path: Path) -> None:
    """Paired seeds and a resumed study mean nothing otherwise."""
    entrant = next(entrant for entrant in lora_study.EQUAL if entrant.name == "product_svd even")
    found = []
    for name, before in (("one", 0), ("two", 1)):
        (tmp_path / name).mkdir()
        bench = lora_study.Bench(tmp_path / name, "digits", Runs(None))
        for rounds in range(1, 1 + before):
            bench.row("rules", entrant, "iid", 0, rounds, 5e-3)
        found.append(bench.row("rules", entrant, "dirichlet 0.3", 0, 2, 5e-3)["accuracy"])
        bench.close()
    assert found[0] == found[1]
    assert len(set(found[0])) == 3
