"""Mixed ranks from end to end: the table `ranks` of `benchmarks.lora_study` through broker, gateway and ten devices.

The same data, splits, networks and rules, twelve rounds over MQTT with float32 updates; each rule at the learning rate that
`lora_study` chose on a seed of its own. A device keeps a fifth of its images from training, as devices do, so accuracies
are below those of that study. The control, zero-padding, is no rule of Edgewise: it comes as the entry point of a
package made for the run, as anybody's rule would.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.merge import GROUP
from aggregator.service import MODEL_FILE
from benchmarks import report
from benchmarks.digits import CLIENTS, STEPS, accuracy_of, build, interval, task
from benchmarks.lora_study import MIXED, MIXED_ROUNDS, SIDE, mixed
from benchmarks.runs import Runs
from benchmarks.site import Site
from edge_sdk import EdgeDevice
from edge_sdk.bundle import Bundle
from edge_sdk.tensors import unpack

RULES: dict[str, tuple[dict[str, Any], float]] = {  # what the job file says, and the learning rate
    "zero padding": ({"merge.rule": "zero_padding"}, 2e-2),
    "rank_partition": ({"merge.rule": "rank_partition"}, 1e-2),
    "product_svd mean": ({"merge.rule": "product_svd", "merge.lora": {"mode": "mean"}}, 2e-2),
    "product_svd": ({"merge.rule": "product_svd"}, 2e-2),
    "stack": ({"merge.rule": "stack"}, 2e-2),
}
SECONDS = 600


def measure(args: argparse.Namespace) -> report.Report:
    """Every rule with every seed."""
    runs = Runs(args.runs)
    with tempfile.TemporaryDirectory() as folder:
        install_padding(Path(folder))
        rows = [
            runs.row({"rule": name, "seed": seed}, partial(_run, name, seed))
            for seed in range(args.seeds)
            for name in RULES
        ]
    return report.Report(rows, _summary(rows))


def install_padding(folder: Path) -> None:
    """Put a package with the entry point `zero_padding` on this process's path."""
    package = folder / "zero_padding-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: zero-padding\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[{GROUP}]\nzero_padding = aggregator.merge.lora:ZERO_PADDING\n")
    sys.path.append(str(folder))


def _run(name: str, seed: int) -> dict[str, Any]:
    from export import ProgramSpec

    data = task(seed, 0.3)
    options = [{"rank": rank, "named_by_rank": True, "side_rank": SIDE} for rank in (2, 4, 8)]
    programs = [ProgramSpec("lora", held, "float", "adamw") for held in options]
    ids = [f"device-{k}" for k in range(CLIENTS)]
    changes, rate = RULES[name]
    job = {
        "program": MIXED[2],
        "assign.programs": {device: mixed(k, 1) for k, device in enumerate(ids) if mixed(k, 1) != MIXED[2]},
        "rounds": MIXED_ROUNDS,
        "seed": seed,
        "round.deadline_seconds": 120,
        "task.steps": STEPS,
        "task.batch_size": 32,
        "task.learning_rate": rate,
        "task.hyper": {"weight_decay": 0.0},
        "task.encoding": "float32",
        "gate.enabled": False,
        **changes,
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        site = Site(Path(folder), ids, job=job, samples=0, make_bundle=lambda path: build(path, data, seed, programs))
        running = stack.enter_context(site.service())
        for device, members in zip(ids, data.clients, strict=True):
            opened = stack.enter_context(EdgeDevice.open(site.config(device)))
            opened.record_many(data.train[0][members], data.train[1][members], recording="all")
            opened.start()
        status = running.wait(SECONDS)
        model = unpack((Path(folder) / "state" / MODEL_FILE).read_bytes())[0]
        with Bundle.open(site.bundle) as bundle:
            final = accuracy_of(bundle, bundle.program(MIXED[2]), model, data)
    merged = [record.merged for record in status.history if record.round > 0]
    return {"final": final, "rounds": len(merged), "updates": sum(merged), "refused": sum(status.refused.values())}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    final = {name: [row["final"] for row in rows if row["rule"] == name] for name in RULES}
    summary: dict[str, Any] = {}
    for name, better, worse in (
        ("change_over_padding", "product_svd", "zero padding"),
        ("change_over_mean", "product_svd", "product_svd mean"),
        ("stack_over_change", "stack", "product_svd"),
    ):
        gains = [a - b for a, b in zip(final[better], final[worse], strict=True)]
        mean, half = interval(gains)
        summary |= {name: mean, f"{name}_interval": None if np.isnan(half) else half}
    return summary


def show(found: report.Report) -> str:
    """Means over seeds and the summary."""
    lines = []
    for name, (_, rate) in RULES.items():
        rows = [row for row in found.rows if row["rule"] == name]
        mean, half = interval([row["final"] for row in rows])
        lines.append(
            {
                "rule": name,
                "rate": rate,
                "seeds": len(rows),
                "final": mean,
                "interval": half,
                "updates": sum(row["updates"] for row in rows),
            }
        )
    columns = {"rule": "rule", "rate": "lr", "seeds": "seeds", "final": "final", "interval": "+-", "updates": "updates"}
    return report.table(lines, columns) + "\n\n" + "\n".join(f"{name} {value}" for name, value in found.summary.items())


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("ranks-site", __doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, metavar="FILE", help="keep every run there, and repeat none that it holds")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
