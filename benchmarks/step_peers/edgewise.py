"""Edgewise's own steps: `edgewise.py net.bundle batch.npz [kept]`, by the Python of the base install.

`kept`: the samples have names, so that from the second step on what the frozen part made of them is at hand, as in all
epochs of a task but its first.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).resolve().parent))

from protocol import serve

from edge_sdk import EdgeDevice  # noqa: F401 - what an app imports is part of what training takes
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import RuntimeProfile, Stepper

with np.load(sys.argv[2]) as file:
    batch, rate = {"d.x": file["x"], "d.y": file["y"]}, float(file["learning_rate"])
with tempfile.TemporaryDirectory() as folder, Bundle.open(Path(sys.argv[1]), unpack_to=Path(folder)) as bundle:
    program = next(program for program in bundle.programs.values() if not program.accumulates)
    stepper = Stepper(bundle, program, bundle.initial(program), RuntimeProfile(threads=1))
    ids = list(range(len(batch["d.x"]))) if sys.argv[3:] == ["kept"] else None
    serve(lambda: stepper.step(batch, {"lr": rate, "weight_decay": 0.0}, ids=ids).loss)
