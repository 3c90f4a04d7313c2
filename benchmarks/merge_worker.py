"""Our side of `benchmarks.merge`: a process that merges on request. One JSON request a line, one JSON answer a line.

`load`: map the file of updates. `run`: merge once, in seconds of wall time, updates lying in memory. `limit`: read every
update once and add it into an accumulator that stays in cache. `peak`: merge updates that are read from the file one
after another, as a gateway reads them from its journal, and tell how far resident memory rose.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.merge import Contribution, Merger, Plan, merge
from aggregator.merge.lora import PRODUCT_SVD
from aggregator.merge.mean import MEAN
from aggregator.merge.robust import KRUM, MEDIAN, TRIMMED_MEAN
from aggregator.merge.settings import MergeSettings, RobustSettings
from aggregator.merge.sums import BLOCK
from aggregator.merge.updates import Updates
from edge_sdk.bundle import Program, TensorEntry

RULES = {"mean": MEAN, "median": MEDIAN, "trimmed_mean": TRIMMED_MEAN, "krum": KRUM, "product_svd": PRODUCT_SVD}
TENSORS = 4
ATTACKERS = 0.2


def plan(parameters: int, rule: str) -> Plan:
    """A program of four tensors; for `product_svd` of LoRA pairs of rank 8 over square layers, as many as fit."""
    table: dict[str, TensorEntry] = {}
    if rule == "product_svd":
        side = 768
        for layer in range(parameters // (2 * 8 * side)):
            name = f"layer{layer:04d}"
            for part, shape in (("lora_a", (8, side)), ("lora_b", (side, 8))):
                table[f"{name}.{part}"] = TensorEntry(
                    f"{name}.{part}", "p", "float32", shape, part, name, 2.0, 8, (side, side)
                )
    else:
        for index in range(TENSORS):
            table[f"w{index}"] = TensorEntry(f"w{index}", "p", "float32", (parameters // TENSORS,), "mean")
    program = Program(
        "bench",
        "full",
        "float",
        0,
        1.0,
        8,
        "ab",
        tuple(table),
        (),
        None,
        (),
        (),
        "mask",
        1,
        1,
        {},
        "train",
        None,
        None,
        0,
    )
    return Plan.of(program, table, settings=MergeSettings(robust=RobustSettings(attackers=ATTACKERS)))


class Bench:
    """The file of updates `[updates, parameters]` float32, mapped or read."""

    def __init__(self, path: Path, updates: int, parameters: int) -> None:
        self.path, self.updates, self.parameters = path, updates, parameters
        self.mapped = np.asarray(
            np.memmap(path, np.float32, "r", shape=(updates, parameters))
        )  # plain: slices cost less

    def contributions(self, made: Plan, *, read: bool) -> Iterator[Contribution]:
        """The updates in order: mapped, or read one after another."""
        for k in range(self.updates):
            if read:
                row = np.fromfile(self.path, np.float32, self.parameters, offset=4 * k * self.parameters)
            else:
                row = self.mapped[k]
            yield Contribution(f"dev-{k:04d}", 1, 10 + k, {}, split(row, made), made.program.id)

    def run(self, rule: str) -> float:
        """Seconds of one merge, updates in memory."""
        made = plan(self.parameters, rule)
        merger = RULES[rule].create(made)
        start = split(np.zeros(self.parameters, np.float32), made)
        rows = list(self.contributions(made, read=False))
        began = time.perf_counter()
        if merger.needs is Updates:
            _merge_held(merger, rows, start)
        else:
            merge(merger, rows, start)
        return time.perf_counter() - began

    def limit(self) -> float:
        """Seconds of one read of every update."""
        accumulator = np.zeros(BLOCK, np.float32)
        began = time.perf_counter()
        for row in self.mapped:
            for first in range(0, self.parameters - BLOCK + 1, BLOCK):
                np.add(accumulator, row[first : first + BLOCK], out=accumulator)
        return time.perf_counter() - began

    def peak(self, rule: str) -> int:
        """Bytes by which resident memory rises while updates stream from the file."""
        made = plan(self.parameters, rule)
        start = split(np.zeros(self.parameters, np.float32), made)
        before = reset_peak()
        merge(RULES[rule].create(made), self.contributions(made, read=True), start)
        return resident("VmHWM") - before


def _merge_held(merger: Merger, rows: list[Contribution], start: Any) -> None:
    """As `merge`, with all updates in memory: the peer has them there too."""
    state = Updates(merger.empty().names, memory=1 << 62)
    for row in rows:
        state.add(row)
    merger.finish(state, start)


def split(flat: Any, made: Plan) -> dict[str, Any]:
    """A flat vector as the plan's tensors; what is left over at the end is dropped."""
    tensors, first = {}, 0
    for name in made.program.tensors:
        shape = made.table[name].shape
        size = int(np.prod(shape))
        tensors[name] = flat[first : first + size].reshape(shape)
        first += size
    return tensors


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS is what is resident, VmHWM the most that was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def reset_peak() -> int:
    """Let the kernel forget the peak; returns what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def product_svd_768(repeats: int) -> dict[str, float]:
    """CPU seconds of one 768 x 768 layer, ten clients of rank 8: our rule with its report, and a dense float32 SVD."""
    draw = np.random.default_rng(0)
    made = plan(2 * 8 * 768, "product_svd")
    start = split(draw.normal(0, 1, 2 * 8 * 768).astype(np.float32), made)
    rows = [
        Contribution(
            f"dev-{k}", 1, 10 + k, start, split(draw.normal(0, 1, 2 * 8 * 768).astype(np.float32), made), "bench"
        )
        for k in range(10)
    ]
    ours = dense = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        merge(PRODUCT_SVD.create(made), rows, start)
        ours = min(ours, time.process_time() - began)
        began = time.process_time()
        total = sum(row.num_examples for row in rows)
        target = sum(
            row.num_examples / total * 2.0 * row.tensors["layer0000.lora_b"] @ row.tensors["layer0000.lora_a"]
            for row in rows
        )
        np.linalg.svd(np.asarray(target, np.float32), full_matrices=False)
        dense = min(dense, time.process_time() - began)
    return {"ours": ours, "dense": dense}


def kernel() -> str:
    """Which BLAS kernel and how many threads run, if threadpoolctl is here."""
    try:
        from threadpoolctl import threadpool_info
    except ModuleNotFoundError:
        return "unknown: threadpoolctl is not installed"
    found = [
        f"{pool.get('architecture')} x{pool['num_threads']}" for pool in threadpool_info() if pool["user_api"] == "blas"
    ]
    return ", ".join(found)


def main() -> None:
    """Answer requests until the input ends."""
    bench: Bench | None = None
    for line in sys.stdin:
        request = json.loads(line)
        match request:
            case {"do": "load", "path": path, "updates": updates, "parameters": parameters}:
                bench = Bench(Path(path), updates, parameters)
                answer: Any = kernel()
            case {"do": "run", "rule": rule} if bench is not None:
                answer = bench.run(rule)
            case {"do": "limit"} if bench is not None:
                answer = bench.limit()
            case {"do": "peak", "rule": rule} if bench is not None:
                answer = bench.peak(rule)
            case {"do": "svd", "repeats": repeats}:
                answer = product_svd_768(repeats)
            case _:
                raise SystemExit(f"not understood: {line.strip()}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
