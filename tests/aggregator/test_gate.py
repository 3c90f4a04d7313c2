"""Admission and the gate: what may be merged, and what may replace a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.admission import Refused, admit, norm_bound
from aggregator.gate import Verdict, judge
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import pack
from tests.tiny_bundle import HEAD, tiny_bundle

BEFORE = {"a": (80.0, 100.0), "b": (60.0, 100.0)}


def judged(before: Any = BEFORE, after: Any = None, **options: Any) -> Verdict:
    settings = {"better": "higher", "tolerance": 0.02, "min_examples": 1, **options}
    return judge(before, after or before, **settings)


def test_a_better_model_is_accepted() -> None:
    verdict = judged(after={"a": (90.0, 100.0), "b": (70.0, 100.0)})
    assert verdict.accepted
    assert (verdict.before, verdict.after) == (0.7, 0.8)


@pytest.mark.parametrize(("hits", "accepted"), [(78.1, True), (77.9, True), (75.9, False)])
def test_the_tolerance_is_on_the_pooled_score(hits: float, accepted: bool) -> None:
    verdict = judged(after={"a": (hits, 100.0), "b": (60.0, 100.0)})
    assert verdict.accepted is accepted
    if not accepted:
        assert "worse by 0.0205, tolerated 0.02" in verdict.reason


def test_only_devices_that_measured_both_are_compared() -> None:
    verdict = judged(after={"a": (80.0, 100.0), "newcomer": (0.0, 1000.0)})
    assert verdict.accepted
    assert verdict.before == verdict.after == 0.8


def test_a_loss_is_better_when_it_is_lower() -> None:
    assert judged(after={"a": (70.0, 100.0)}, better="lower").accepted
    assert not judged(after={"a": (95.0, 100.0)}, better="lower").accepted


def test_the_validation_file_alone_can_refuse() -> None:
    verdict = judged(validation_before=(9.0, 10.0), validation_after=(5.0, 10.0))
    assert not verdict.accepted
    assert verdict.reason.startswith("the validation file: 0.9000 before, 0.5000 after")


def test_no_evidence_accepts_and_says_so() -> None:
    verdict = judged(before={}, after={"a": (1.0, 2.0)})
    assert verdict.accepted
    assert "without evidence" in verdict.reason


def test_too_few_examples_are_no_evidence() -> None:
    assert judged(after={"a": (0.0, 3.0)}, min_examples=10).accepted


@pytest.fixture
def bundle(tmp_path: Path) -> Iterator[Bundle]:
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as opened:
        yield opened


def body(bundle: Bundle, change: float, **metadata: str) -> bytes:
    start = bundle.initial(bundle.program(HEAD))
    deltas = {name: np.full_like(value, change) for name, value in start.items()}
    meta = {"edgewise": "update/1", "program": HEAD, "start": "0" * 64, "encoding": "float32", **metadata}
    return pack(deltas, meta)


def admitted(bundle: Bundle, data: bytes, **options: Any) -> Any:
    program = bundle.program(HEAD)
    start = bundle.initial(program)
    bound = norm_bound([], start)
    return admit(data, program, bundle.tensors, start, **{"norm_bound": bound, **options})


def test_an_ordinary_update_is_admitted(bundle: Bundle) -> None:
    start = bundle.initial(bundle.program(HEAD))
    np.testing.assert_allclose(admitted(bundle, body(bundle, 0.5))["bias"], start["bias"] + 0.5)


@pytest.mark.parametrize(
    ("change", "reason"), [(float("nan"), "not_finite"), (float("inf"), "not_finite"), (1e6, "norm"), (1e38, "norm")]
)
def test_an_absurd_update_is_refused(bundle: Bundle, change: float, reason: str) -> None:
    with pytest.raises(Refused) as caught:
        admitted(bundle, body(bundle, change))
    assert caught.value.reason == reason


def test_an_update_from_another_start_is_refused(bundle: Bundle) -> None:
    with pytest.raises(Refused, match="wrong_start"):
        admitted(bundle, body(bundle, 0.1), start_digest="1" * 64)


def test_later_rounds_are_bounded_by_the_median_of_the_last() -> None:
    assert norm_bound([1.0, 2.0, 300.0], {}) == 20.0


def test_devices_that_have_converged_do_not_shut_out_one_that_still_learns() -> None:
    model = {"weight": np.full((3, 12), 0.5, np.float32)}
    assert norm_bound([1e-4, 2e-4, 3e-4], model) == 3.0
