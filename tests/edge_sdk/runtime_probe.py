"""Opens a graph with the onnxruntime of the interpreter that runs this, for `test_onnxruntime_known_issues`.

`python -I runtime_probe.py graph.onnx optimized.onnx [KEY=VALUE ...]` prints the runtime's refusal, or nothing.
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def refusal(path: str, optimized: str, *entries: str) -> str:
    """What the runtime says against the graph with these session options; else write what it made of it, and run it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = optimized
    for entry in entries:
        options.add_session_config_entry(*entry.split("="))
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        batch = {"batch": 2}
        feeds = {v.name: np.ones([batch.get(n, n) for n in v.shape], np.float32) for v in session.get_inputs()}
        session.run(None, feeds)
    except Exception as error:  # noqa: BLE001 - the runtime's errors have no base class
        return str(error)
    return ""


if __name__ == "__main__":
    print(refusal(*sys.argv[1:]))
