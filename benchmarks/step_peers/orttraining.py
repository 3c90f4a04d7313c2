"""ONNX Runtime Training 1.19.2: `orttraining.py forward.onnx names.json batch.npz FOLDER`, by its own environment."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.training import artifacts
from onnxruntime.training.api import CheckpointState, Module, Optimizer

sys.path.append(str(Path(__file__).resolve().parent))

from protocol import serve


def main() -> None:
    """Make the training artifacts, once, and serve."""
    forward, names, folder = onnx.load(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()), sys.argv[4]
    losses = {"cross_entropy": artifacts.LossType.CrossEntropyLoss, "mse": artifacts.LossType.MSELoss}
    if not (Path(folder) / "training_model.onnx").exists():
        artifacts.generate_artifacts(
            forward,
            requires_grad=names["trained"],
            frozen_params=names["frozen"],
            loss=losses[names["loss"]],
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=folder,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    state = CheckpointState.load_checkpoint(f"{folder}/checkpoint")
    module = Module(f"{folder}/training_model.onnx", state, f"{folder}/eval_model.onnx", "cpu", options)
    optimizer = Optimizer(f"{folder}/optimizer_model.onnx", module)
    with np.load(sys.argv[3]) as file:
        x, y = file["x"], file["y"]
        optimizer.set_learning_rate(float(file["learning_rate"]))
    module.train()

    def step() -> float:
        loss = module(x, y)
        optimizer.step()
        module.lazy_reset_grad()
        return float(loss)

    serve(step)


main()
