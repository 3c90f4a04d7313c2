"""onnxsim's training loop: `onnxsim.py loss.onnx names.json batch.npz float|int8`, by its own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

here = str(Path(__file__).resolve().parent)
sys.path[:] = [entry for entry in sys.path if entry != here]  # this file bears the name of what it imports

import numpy as np  # noqa: E402
import onnx  # noqa: E402
from onnxsim.compile_training import compile_training_loop  # noqa: E402

sys.path.append(here)

from protocol import serve  # noqa: E402


def main() -> None:
    """Compile the loop and serve."""
    model, names = onnx.load(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with np.load(sys.argv[3]) as file:
        feeds, rate = {"d.x": file["x"], "d.y": file["y"]}, float(file["learning_rate"])
    quantized = sys.argv[4] == "int8"
    loop = compile_training_loop(
        model,
        "loss",
        names["trained"],
        quantize_forward=quantized,
        calibration_data=[feeds] if quantized else None,
    )
    serve(lambda: float(loop(feeds, lr=rate)))


main()
