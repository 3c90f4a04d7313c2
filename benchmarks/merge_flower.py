"""Flower's side of `benchmarks.merge`: its own strategies on the same file. Runs in an environment of its own.

Requests and answers as in `benchmarks.merge_worker`. A reply is what Flower's server has when it starts to aggregate: a
`Message` whose `ArrayRecord` holds the serialised arrays. Making the replies is not timed; `peak` counts them, since
`aggregate_train` needs all of them at once.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TENSORS = 4
ATTACKERS = 0.2


def strategy(rule: str, updates: int) -> Any:
    """The strategy of that rule."""
    match rule:
        case "mean":
            return FedAvg()
        case "median":
            return FedMedian()
        case "trimmed_mean":
            return FedTrimmedAvg(beta=ATTACKERS)
        case "krum":
            return Krum(num_malicious_nodes=int(ATTACKERS * updates))
    raise SystemExit(f"Flower has no {rule}")


def replies(path: Path, updates: int, parameters: int) -> list[Message]:
    """What the server received."""
    size = parameters // TENSORS
    # What Flower's runtime sets before a server app runs; messages cannot be made without it.
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    made = []
    for k in range(updates):
        row = np.fromfile(path, np.float32, parameters, offset=4 * k * parameters)
        arrays = {f"w{i}": Array(row[i * size : (i + 1) * size]) for i in range(TENSORS)}
        content = RecordDict(
            {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 10 + k, "loss": 0.5})}
        )
        made.append(Message(content, reply_to=request))
    return made


def resident(field: str) -> int:
    """A field of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {field}")


def main() -> None:
    """Answer requests until the input ends."""
    path, updates, parameters = Path(), 0, 0
    kept: list[Message] = []
    for line in sys.stdin:
        request = json.loads(line)
        answer: Any
        match request:
            case {"do": "load"}:
                path, updates, parameters = Path(request["path"]), request["updates"], request["parameters"]
                kept, answer = [], f"numpy {np.__version__}"
            case {"do": "run", "rule": rule}:
                kept = kept or replies(path, updates, parameters)
                made = strategy(rule, updates)
                began = time.perf_counter()
                arrays, _ = made.aggregate_train(1, kept)
                answer = time.perf_counter() - began
                if arrays is None:
                    raise SystemExit(f"Flower's {rule} gave nothing")
                if rule == "median" or not kept[0].content.array_records["arrays"]:
                    kept = []  # FedMedian takes the arrays out of the replies
            case {"do": "peak", "rule": rule}:
                kept = []
                Path("/proc/self/clear_refs").write_text("5")
                before = resident("VmRSS")
                strategy(rule, updates).aggregate_train(1, replies(path, updates, parameters))
                answer = resident("VmHWM") - before
            case _:
                raise SystemExit(f"not understood: {line.strip()}")
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
