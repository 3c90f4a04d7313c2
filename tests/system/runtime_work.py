"""What `test_runtime_versions` has done by two versions of onnxruntime: needs the base install and nothing else.

As a script: `python -I runtime_work.py net.bundle out.npz PROGRAM...` writes the results.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from edge_sdk.samples import SampleStore
from edge_sdk.training import TaskSpec, run_task
from edge_sdk.update import decode_update

STEPS = 8


def results(path: Path, program_ids: list[str]) -> dict[str, Any]:
    """Prediction, every step, evaluation and a whole task of each program, by name; `runtime` is the version."""
    found: dict[str, Any] = {"runtime": onnxruntime.__version__}
    with Bundle.open(path) as bundle:
        x, y = _samples(bundle, 60)
        for program_id in program_ids:
            program = bundle.program(program_id)
            start = bundle.initial(program)

            stepper = Stepper(bundle, program, start)
            for number in range(STEPS):
                rows = slice(number, number + 9)
                result = stepper.step({"d.x": x[rows], "d.y": y[rows]}, {"lr": 0.01})
                found[f"{program_id}: loss of step {number + 1}"] = result.loss
            trained = {**start, **stepper.tensors()}  # with the constants of the task
            stepper.close()
            found |= {f"{program_id}: {name} after {STEPS} steps": value for name, value in trained.items()}
            for state, tensors in (("start", start), ("trained", trained)):
                found[f"{program_id}: prediction, {state}"] = Predictor(bundle, program, tensors).predict(x)

            counter = Stepper(bundle, bundle.program(str(program.evaluate)), trained)
            counter.step({"d.x": x, "d.y": y})
            found |= {f"{program_id}: {name}": value for name, value in counter.tensors().items()}
            counter.close()

            spec = TaskSpec(program_id, "0" * 64, steps=0, epochs=2, batch_size=16, learning_rate=0.01, seed=3)
            with tempfile.TemporaryDirectory() as folder:
                samples = SampleStore(Path(folder) / "samples.sqlite", bundle.fields, max_bytes=1 << 24)
                samples.add_many(x, y, recording="all")
                outcome = run_task(bundle, spec, start, samples, profile=RuntimeProfile(), feedback={})
                samples.close()
            update = decode_update(outcome.body, program, bundle.tensors, start)
            found |= {f"{program_id}: update of {name}": value for name, value in update.items()}
            found[f"{program_id}: examples of the task"] = outcome.num_examples
            found |= {
                f"{program_id}: {name} of the task": value
                for name, value in outcome.metrics.items()
                if name != "step_ms"
            }
    return found


def _samples(bundle: Bundle, count: int) -> tuple[np.ndarray, np.ndarray]:
    fields = {field.name: field for field in bundle.fields}
    draw = np.random.default_rng(11)
    x = draw.normal(size=(count, *fields["d.x"].shape)).astype(np.float32)
    return x, draw.integers(0, fields["d.y"].classes or 0, count)


if __name__ == "__main__":
    np.savez(sys.argv[2], **results(Path(sys.argv[1]), sys.argv[3:]))
