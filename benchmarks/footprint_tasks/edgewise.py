"""The training task of `benchmarks.footprint` as a device does it, without a network.

Run by the Python of the base install: `python -I edgewise.py net.bundle data.npz`. Prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk import EdgeDevice  # noqa: F401 - what an app imports, and so part of what a task takes
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import RuntimeProfile
from edge_sdk.samples import SampleStore
from edge_sdk.tensors import digest
from edge_sdk.training import TaskSpec, run_task


def main(path: str, data: str) -> None:
    """Store the samples, run the task on them, encode the update, and print what it took."""
    with np.load(data) as file:
        x, y = file["x"], file["y"]
        settings: dict[str, Any] = json.loads(str(file["settings"]))
    losses: list[float] = []
    with Bundle.open(path) as bundle, tempfile.TemporaryDirectory() as folder:
        program = next(program for program in bundle.programs.values() if not program.accumulates)
        samples = SampleStore(Path(folder) / "samples.sqlite", bundle.fields, max_bytes=64 << 20)
        samples.add_many(x, y, recording="all")
        spec = TaskSpec(
            program=program.id,
            start_digest=digest(bundle.start_blob(program)),
            steps=0,
            epochs=settings["epochs"],
            batch_size=settings["batch_size"],
            learning_rate=settings["learning_rate"],
            seed=settings["seed"],
            hyper={"weight_decay": settings["weight_decay"]},
        )
        began = time.perf_counter(), time.process_time()
        run_task(
            bundle,
            spec,
            bundle.initial(program),
            samples,
            profile=RuntimeProfile(threads=1),
            feedback={},
            on_step=lambda result, done, of: losses.append(result.loss),
        )
        seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        samples.close()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found = {
        "peak_bytes": int(status["VmHWM"].split()[0]) * 1024,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "losses": losses,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
