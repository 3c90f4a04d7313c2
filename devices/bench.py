"""Measures on the device it runs on: time of a step and of a prediction, and memory of a process that does nothing else.

Times are CPU time, not wall time: the device has other work. Medians are over at least 20 runs after 5 that warm up.
Memory is VmHWM of a fresh process that imported what a device imports (`python -m devices.bench FILE`); the peak of a
process that has done more before, or of a child that inherited its parent's, would say nothing.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import EdgewiseError
from edge_sdk.fields import INPUT, TARGET
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from edge_sdk.tensors import Array

WARM_UP: Final = 5
RUNS: Final = 20
_SECONDS: Final = 120


class ProbeError(EdgewiseError):
    """A measurement that could not be made."""


@dataclass(frozen=True)
class ProgramTimes:
    """Of one program: CPU milliseconds of a step with its default batch, and of a prediction of one sample (None: it
    predicts nothing)."""

    program: str
    precision: str
    batch: int
    step_ms: float
    predict_ms: float | None


@dataclass(frozen=True)
class Probe:
    """What a device measured of itself. `runtime_overhead_mb`: of a process that has imported the runtime and no more."""

    arch: str
    cores: int
    ram_mb: int
    onnxruntime: str
    machine: str
    runtime_overhead_mb: float
    programs: tuple[ProgramTimes, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return asdict(self)


def probe(bundle: Bundle, profile: RuntimeProfile | None = None, runs: int = RUNS) -> Probe:
    """Run every program of a bundle on random samples. Raises `ProbeError`."""
    return Probe(
        arch=platform.machine(),
        cores=os.cpu_count() or 1,
        ram_mb=_ram_mb(),
        onnxruntime=onnxruntime.__version__,
        machine=processor(),
        runtime_overhead_mb=round(fresh_process(None)["vmhwm_kb"] / 1024, 1),
        programs=tuple(
            _times(bundle, program, profile or RuntimeProfile(), runs) for program in bundle.programs.values()
        ),
    )


def _times(bundle: Bundle, program: Program, profile: RuntimeProfile, runs: int) -> ProgramTimes:
    draw = np.random.default_rng(0)
    fields = {held.name: held for held in bundle.fields}
    count = program.batch_default
    shape, dtype = (count, *fields[INPUT].shape), np.dtype(fields[INPUT].dtype)
    # Token 1 is in every vocabulary, and 0 often the filling behind a text; of others only the model knows.
    x: Array = draw.normal(size=shape).astype(dtype) if dtype.kind == "f" else np.ones(shape, dtype)
    target = fields[TARGET]
    y: Array = (
        draw.integers(0, target.classes or 2, count)
        if target.dtype == "int64"
        else draw.normal(size=(count, *target.shape)).astype(np.float32)
    )
    start = bundle.initial(program)
    stepper = Stepper(bundle, program, start, profile)
    hyper = dict.fromkeys(program.hyper, 0.0)
    step = median_ms(lambda: stepper.step({INPUT: x, TARGET: y}, hyper), runs)
    stepper.close()
    predict = None
    if program.infer is not None:
        predictor = Predictor(bundle, program, start, profile)
        predict = round(median_ms(lambda: predictor.predict(x[:1]), runs), 4)
    return ProgramTimes(program.id, program.precision, count, round(step, 4), predict)


def median_ms(work: Callable[[], object], runs: int = RUNS) -> float:
    """The median CPU time of `runs` calls after the warm-up, in milliseconds."""
    times = []
    for number in range(WARM_UP + runs):
        began = time.process_time_ns()
        work()
        if number >= WARM_UP:
            times.append((time.process_time_ns() - began) / 1e6)
    return statistics.median(times)


def interleaved_us(calls: Mapping[str, Callable[[], object]], runs: int = 200) -> dict[str, float]:
    """The least CPU time of each call in microseconds; they take turns, so that a busy moment hits all of them."""
    best = dict.fromkeys(calls, float("inf"))
    for number in range(WARM_UP + runs):
        for name, call in calls.items():
            began = time.process_time_ns()
            call()
            if number >= WARM_UP:
                best[name] = min(best[name], (time.process_time_ns() - began) / 1e3)
    return best


def fresh_process(model: Path | None) -> dict[str, int]:
    """`vmhwm_kb`, `rss_anon_kb` and `rss_file_kb` of a process that imports the runtime and runs a model 50 times.

    Raises `ProbeError` when it fails.
    """
    command = [sys.executable, "-m", "devices.bench", *([str(model)] if model else [])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, env=environment, check=False)
    if done.returncode:
        raise ProbeError(f"{model}: cannot be measured in a process of its own: {done.stderr.strip()[-300:]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def as_profile(found: Probe, name: str) -> str:
    """What was measured as a profile in TOML (`devices/profile.py`); the flash is the size of the root file system."""
    today = dt.datetime.now(dt.UTC).date().isoformat()
    lines = [
        f"name = {json.dumps(name)}",
        f"arch = {json.dumps(found.arch)}",
        *(
            f'{key} = {{ value = {value}, from = "measured" }}'
            for key, value in (
                ("cores", found.cores),
                ("ram_mb", found.ram_mb),
                ("runtime_overhead_mb", found.runtime_overhead_mb),
            )
        ),
        f'flash_kb = {{ value = {shutil.disk_usage("/").total // 1024}, from = "measured" }}',
    ]
    for times in found.programs:
        lines += [
            "",
            "[[program]]",
            f"id = {json.dumps(times.program)}",
            f'step_ms = {{ value = {times.step_ms}, from = "measured" }}',
            f"measured_on = {json.dumps(found.machine)}",
            f"date = {json.dumps(today)}",
        ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The name of the processor, as the kernel tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))), "")
    return named or platform.processor() or "unknown processor"


def _ram_mb() -> int:
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**20)


def _run_alone(model: Path | None) -> dict[str, int]:
    if model is not None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        feeds = {
            value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], _DTYPES[value.type])
            for value in session.get_inputs()
        }
        for _ in range(50):
            session.run(None, feeds)
    lines = Path("/proc/self/status").read_text().splitlines()
    status = {line.partition(":")[0]: line.partition(":")[2].split()[0] for line in lines if line.endswith("kB")}
    return {f"{name.lower()}_kb": int(status[key]) for name, key in _STATUS.items()}


_DTYPES: Final = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
_STATUS: Final = {"vmhwm": "VmHWM", "rss_anon": "RssAnon", "rss_file": "RssFile"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_run_alone(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
