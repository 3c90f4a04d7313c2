"""How a timed process talks with the benchmark: a command a line on standard input, JSON on standard output.

`steps N` runs N training steps on the batch and answers {"cpu": seconds, "loss": last loss}; `memory` answers the process's
peak {"peak_bytes", "anonymous_bytes"}; end of input ends it. This file imports the standard library only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def serve(step: Callable[[], float]) -> None:
    """Answer commands; `step` runs one training step and returns its loss (before the step)."""
    _answer({"ready": True})
    for line in sys.stdin:
        command, _, count = line.strip().partition(" ")
        if command == "steps":
            began = time.process_time()
            losses = [step() for _ in range(int(count))]
            _answer({"cpu": time.process_time() - began, "first": losses[0], "last": losses[-1]})
        elif command == "memory":
            status = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines() if ":" in row)
            peak, anonymous = (int(status[key].split()[0]) * 1024 for key in ("VmHWM", "RssAnon"))
            _answer({"peak_bytes": peak, "anonymous_bytes": anonymous})


def _answer(value: dict[str, object]) -> None:
    print(json.dumps(value), flush=True)
