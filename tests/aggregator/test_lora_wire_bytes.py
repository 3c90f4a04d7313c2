"""What LoRA rules send and fetch is what their formulas say (methods/lora.md, section 8; criterion 8)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from aggregator.merge import Plan, Rule
from aggregator.merge.lora import (
    ALTERNATE,
    FACTOR_MEAN,
    FAIR,
    FEDSVD,
    FREEZE_A,
    PRODUCT_SVD,
    RANK_PARTITION,
    RESIDUAL,
    STACK,
)
from edge_sdk import EdgeDevice
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import pack
from edge_sdk.update import Encoding, encode_update
from export import ProgramSpec, build_bundle
from tests.system.site import Site
from tests.tiny_bundle import CLASSES, tiny_data

M, N, R, Q = 96, 400, 4, 12
FRAMING = 1500  # header of a tensor file: names, offsets, digests


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(N, M), nn.Tanh(), nn.Linear(M, CLASSES))
    data = tiny_data(40, features=N)
    options: list[dict[str, Any]] = [
        {"rank": R, "targets": ["0"], "factors": factors, "side_rank": side, "named_by_rank": bool(side)}
        for factors, side in (("ab", 0), ("a", 0), ("b", 0), ("ab", Q))
    ]
    options[-1]["rank"] = R + 1  # another name in the same bundle
    programs = [ProgramSpec("lora", held, "float", "sgd") for held in options]
    target = tmp_path_factory.mktemp("wire") / "net.bundle"
    build_bundle(module, data, target, name="net", loss="cross_entropy", programs=programs)
    return target


@pytest.fixture(scope="module")
def bundle(path: Path) -> Iterator[Bundle]:
    with Bundle.open(path) as opened:
        yield opened


AB, A, B, SIDE = (f"net/lora/r{r}{f}/float" for r, f in ((R, ""), (R, "/a"), (R, "/b"), (R + 1, "")))
PAIR, SIDE_PAIR = R * (M + N), (R + 1) * (M + N)

CASES: list[tuple[Rule, str, int, int]] = [  # rule, program, numbers up, numbers down
    (FACTOR_MEAN, AB, PAIR, PAIR),
    (PRODUCT_SVD, AB, PAIR, PAIR),
    (FAIR, AB, PAIR, PAIR),
    (RANK_PARTITION, AB, PAIR, PAIR),
    (FREEZE_A, B, R * M, PAIR),
    (FEDSVD, B, R * M, PAIR),
    (ALTERNATE, B, R * M, PAIR),
    (ALTERNATE, A, R * N, PAIR),
    (STACK, SIDE, SIDE_PAIR, SIDE_PAIR + Q * (M + N)),
    (RESIDUAL, SIDE, SIDE_PAIR, SIDE_PAIR + Q * (M + N)),
]


@pytest.mark.parametrize(("rule", "name", "up", "down"), CASES, ids=[f"{c[0].name} {c[1][-9:]}" for c in CASES])  # type: ignore[attr-defined]
def test_bodies_and_starts_have_the_bytes_of_the_formula(
    bundle: Bundle, rule: Rule, name: str, up: int, down: int
) -> None:
    program = bundle.program(name)
    start = bundle.initial(program)
    draw = np.random.default_rng(0)
    trained = {n: start[n] + draw.normal(0, 1, start[n].shape).astype(np.float32) for n in program.tensors}
    plain = Encoding("float32", compression="none")
    body, _ = encode_update(program, bundle.tensors, start, "", trained, plain, {}, 1)
    assert 0 <= len(body) - 4 * up <= 0.02 * 4 * up + FRAMING
    sent = pack(rule.create(Plan.of(program, bundle.tensors)).cut(start, program))
    assert 0 <= len(sent) - 4 * down <= 0.02 * 4 * down + FRAMING


def test_the_bytes_counted_at_the_broker_are_those_of_bodies_and_starts(tmp_path: Path, path: Path) -> None:
    job = {
        "program": AB,
        "merge.rule": "product_svd",
        "rounds": 3,
        "gate.enabled": False,
        "task.encoding": "float32",
        "task.compression": "none",
        "task.learning_rate": 0.05,
    }
    site = Site(tmp_path, ["a", "b"], features=N)
    site.bundle.write_bytes(path.read_bytes())
    site.write_job(job)
    with ExitStack() as stack:
        running = stack.enter_context(site.service())
        for device in site.ids:
            stack.enter_context(EdgeDevice.open(site.config(device))).start()
        status = running.wait(60)
    messages = 16_000  # statuses, offers, fetches; tasks, manifests, acks
    for record in status.history[1:]:  # the first start is in the bundle and is not fetched
        for up, down in record.traffic.values():
            assert 4 * PAIR <= up <= 4 * PAIR * 1.02 + messages
            assert 4 * PAIR <= down <= 2 * 4 * PAIR * 1.02 + messages  # the start, and the model of a round that ends
