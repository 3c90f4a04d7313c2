"""A bundle with a frozen prefix, made by the exporter from a small ONNX file in a second: no torch.

tanh(x A + a) is frozen; relu(. B + b) and . C + c train, in parts where a batch has more than 8 samples.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export import ProgramSpec, build_bundle
from export.writer import write_archive

PROGRAM = "cut/layer/b+c/float"
EVALUATE = "cut/evaluate/layer/b+c/float"
FEATURES, HIDDEN, CLASSES = 5, 12, 3
FILES = {
    kind: f"cut_layer_b-c_float_{kind}.onnx" for kind in ("infer", "prefix", "step", "evaluate", "gradients", "apply")
}


def cut_model(path: Path) -> Path:
    """The forward graph, with its weights inside."""
    draw = np.random.default_rng(0)
    sizes = {"a": (FEATURES, HIDDEN), "b": (HIDDEN, HIDDEN), "c": (HIDDEN, CLASSES)}
    constants = {f"{name}.weight": draw.normal(0, 0.25, size).astype(np.float32) for name, size in sizes.items()}
    constants |= {f"{name}.bias": draw.normal(0, 0.1, size[1]).astype(np.float32) for name, size in sizes.items()}
    nodes, x = [], "x"
    for name, kind in (("a", "Tanh"), ("b", "Relu"), ("c", None)):
        nodes.append(helper.make_node("Gemm", [x, f"{name}.weight", f"{name}.bias"], [x := f"{name}.out"]))
        if kind is not None:
            nodes.append(helper.make_node(kind, [x], [x := f"{name}.active"]))
    graph = helper.make_graph(
        nodes,
        "cut",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", FEATURES])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["n", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def cut_data(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x float32 `[count, FEATURES]`, and labels that follow from it."""
    x = np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)
    truth = np.random.default_rng(1).normal(size=(FEATURES, CLASSES))
    return x, (x @ truth).argmax(axis=1)


def cut_bundle(path: Path, *, optimizer: str = "sgd") -> Path:
    """Write the bundle."""
    spec = ProgramSpec("layer", {"modules": ["b", "c"]}, "float", optimizer, accumulate=True, largest=8)
    model = cut_model(path.with_suffix(".onnx"))
    build_bundle(model, cut_data(16), path, name="cut", loss="cross_entropy", programs=[spec])
    return path


def changed(
    path: Path,
    target: Path,
    *,
    graphs: dict[str, Callable[[onnx.ModelProto], None]] | None = None,
    manifest: Callable[[dict[str, Any]], None] = lambda content: None,
    more: dict[str, bytes] | None = None,
) -> Path:
    """The bundle with graphs and manifest changed, digests right."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    content = json.loads(files.pop("manifest.json"))
    for name, change in (graphs or {}).items():
        model = onnx.load_from_string(files[name])
        change(model)
        files[name] = model.SerializeToString()
    manifest(content)
    write_archive(content, {**files, **(more or {})}, target)
    return target
