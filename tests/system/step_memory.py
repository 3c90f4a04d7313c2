"""What `test_step_memory` measures in a fresh process: needs what a device has and nothing else.

As a script: `python step_memory.py net.bundle MODE [STEPS]` prints JSON: `peak` (VmHWM), `anonymous` (RssAnon after the
steps) and `before` (RssAnon after the first tenth of them), `after` (RssAnon once all is closed), in bytes. MODE: `floor` opens the bundle and makes the
batch; `prefix` and `step` run one of the two alone; `both` runs whole steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle
from edge_sdk.features import Prefix
from edge_sdk.runtime import RuntimeProfile, Stepper
from edge_sdk.tensors import Array

BATCH = 32


def status(key: str) -> int:
    """A line of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measured(path: Path, mode: str, steps: int = 6) -> dict[str, int]:
    """Run and look."""
    profile = RuntimeProfile(cache_bytes=0)
    before = 0
    with Bundle.open(path) as bundle:
        program = next(p for p in bundle.programs.values() if not p.accumulates)
        field = next(field for field in bundle.fields if field.name == "d.x")
        draw = np.random.default_rng(0)
        x = draw.random((BATCH, *field.shape), np.float32)
        batch = {"d.x": x, "d.y": draw.integers(0, 4, BATCH)}
        if mode in ("both", "step"):
            stepper = Stepper(bundle, program, bundle.initial(program), profile)
            if mode == "step":
                assert stepper._prefix is not None
                stepper._prefix = _Given(stepper._prefix)  # type: ignore[assignment]
            for number in range(steps):
                stepper.step(batch, {"lr": 0.001})
                if number == steps // 10:
                    before = status("RssAnon")
        elif mode == "prefix":
            prefix = Prefix(bundle, program, profile, 0)
            for _ in range(steps):
                prefix.features({"d.x": x}, {}, None, onnxruntime.RunOptions())
            prefix.close()
        found = {"peak": status("VmHWM"), "anonymous": status("RssAnon"), "before": before}
        if mode in ("both", "step"):
            stepper.close()
        return {**found, "after": status("RssAnon")}


class _Given:
    """Features from nowhere, so that a step can be measured without its prefix."""

    def __init__(self, prefix: Prefix) -> None:
        shapes = prefix._shapes
        prefix.close()
        self._made = {
            name: np.random.default_rng(1).random((BATCH, *shape), np.float32) for name, (_, shape) in shapes.items()
        }

    def close(self) -> None:
        self._made.clear()

    def features(self, *_: object) -> dict[str, Array]:
        return self._made


if __name__ == "__main__":
    print(json.dumps(measured(Path(sys.argv[1]), sys.argv[2], *(int(text) for text in sys.argv[3:4]))))
