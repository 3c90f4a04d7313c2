"""A valid bundle that is built in a few milliseconds: a linear classifier with gradients written by hand.

Programs: `tiny/head/float` (weight and bias, SGD with momentum) and `tiny/lora/r2/float` (a rank-2 adapter over
the frozen weight), each with its `evaluate` program.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.keys import SigningKey
from edge_sdk.tensors import digest, pack
from export.writer import write_archive

HEAD = "tiny/head/float"
LORA = "tiny/lora/r2/float"
CLASSES = 3
SCALE = 2.0
RANK = 2


class _Graph:
    """Collects nodes; every method returns the name of a value."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, to: str | None = None, **attributes: Any) -> str:
        name = to or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"k{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def model(self, inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> bytes:
        def kind(name: str) -> int:
            return TensorProto.INT64 if name == "d.y" else TensorProto.FLOAT

        graph = helper.make_graph(
            self.nodes,
            "tiny",
            [helper.make_tensor_value_info(name, kind(name), shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
            self.constants,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def _forward(g: _Graph, lora: bool, frozen: np.ndarray, to: str | None = None) -> str:
    if not lora:
        return g.op("Gemm", "d.x", "p.weight", "p.bias", transB=1, to=to)
    base = g.op("MatMul", "d.x", g.const(frozen.T))
    inner = g.op("MatMul", "d.x", g.op("Transpose", "p.layer.lora_a", perm=[1, 0]))
    outer = g.op("MatMul", inner, g.op("Transpose", "p.layer.lora_b", perm=[1, 0]))
    return g.op("Add", base, g.op("Mul", outer, g.const(SCALE)), to=to)


def _step(lora: bool, frozen: np.ndarray, shapes: dict[str, list[int]]) -> bytes:
    g = _Graph()
    logits = _forward(g, lora, frozen)
    onehot = g.op("OneHot", "d.y", g.const([CLASSES], np.int64), g.const([0, 1]), axis=-1)
    total = g.op("Max", g.op("ReduceSum", "d.w", keepdims=0), g.const(1e-12))
    log_p = g.op("LogSoftmax", logits, axis=-1)
    picked = g.op("ReduceSum", g.op("Mul", onehot, log_p), g.const([1], np.int64), keepdims=0)
    g.op("Neg", g.op("Div", g.op("ReduceSum", g.op("Mul", picked, "d.w"), keepdims=0), total), to="loss")
    weight = g.op("Unsqueeze", g.op("Div", "d.w", total), g.const([1], np.int64))
    d_logits = g.op("Mul", g.op("Sub", g.op("Exp", log_p), onehot), weight)
    d_logits_t = g.op("Transpose", d_logits, perm=[1, 0])
    if lora:
        d_scaled = g.op("Mul", d_logits, g.const(SCALE))
        inner = g.op("MatMul", "d.x", g.op("Transpose", "p.layer.lora_a", perm=[1, 0]))
        gradients = {
            "layer.lora_a": g.op(
                "MatMul", g.op("Transpose", g.op("MatMul", d_scaled, "p.layer.lora_b"), perm=[1, 0]), "d.x"
            ),
            "layer.lora_b": g.op("MatMul", g.op("Transpose", d_scaled, perm=[1, 0]), inner),
        }
    else:
        gradients = {
            "weight": g.op("MatMul", d_logits_t, "d.x"),
            "bias": g.op("ReduceSum", d_logits, g.const([0], np.int64), keepdims=0),
        }
    for name, gradient in gradients.items():
        decayed = g.op("Add", gradient, g.op("Mul", f"p.{name}", "h.weight_decay"))
        slot = g.op("Add", g.op("Mul", f"s0.{name}", g.const(0.9)), decayed, to=f"s0.{name}.next")
        g.op("Sub", f"p.{name}", g.op("Mul", slot, "h.lr"), to=f"p.{name}.next")
    features = frozen.shape[1]
    state = {f"{kind}.{name}": shape for kind in ("p", "s0") for name, shape in shapes.items()}
    return g.model(
        {
            "d.x": ["batch", features],
            "d.y": ["batch"],
            "d.w": ["batch"],
            **state,
            "h.lr": [],
            "h.weight_decay": [],
        },
        {"loss": [], **{f"{name}.next": shape for name, shape in state.items()}},
    )


def _infer(lora: bool, frozen: np.ndarray, shapes: dict[str, list[int]]) -> bytes:
    g = _Graph()
    _forward(g, lora, frozen, to="y.0")
    inputs = {"d.x": ["batch", frozen.shape[1]], **{f"p.{name}": shape for name, shape in shapes.items()}}
    return g.model(inputs, {"y.0": ["batch", CLASSES]})


def _evaluate(lora: bool, frozen: np.ndarray, shapes: dict[str, list[int]]) -> bytes:
    g = _Graph()
    logits = _forward(g, lora, frozen)
    onehot = g.op("OneHot", "d.y", g.const([CLASSES], np.int64), g.const([0, 1]), axis=-1)
    weighted = g.op("Mul", onehot, g.op("Unsqueeze", "d.w", g.const([1], np.int64)))
    hit = g.op("Cast", g.op("Equal", g.op("ArgMax", logits, axis=1, keepdims=0), "d.y"), to=None)
    g.nodes[-1].attribute.append(helper.make_attribute("to", TensorProto.FLOAT))
    hits = g.op("Mul", weighted, g.op("Unsqueeze", hit, g.const([1], np.int64)))
    for name, value in (("correct", hits), ("total", weighted)):
        summed = g.op("ReduceSum", value, g.const([0], np.int64), keepdims=0)
        g.op("Add", f"a.evaluate.{name}", summed, to=f"a.evaluate.{name}.next")
    g.op("Identity", g.const(0.0), to="loss")
    counts = {f"a.evaluate.{name}": [CLASSES] for name in ("correct", "total")}
    params = {f"p.{name}": shape for name, shape in shapes.items()}
    return g.model(
        {"d.x": ["batch", frozen.shape[1]], "d.y": ["batch"], "d.w": ["batch"], **params, **counts},
        {"loss": [], **{f"{name}.next": shape for name, shape in counts.items()}},
    )


def tiny_bundle(
    path: Path, *, features: int = 4, seed: int = 0, release_key: SigningKey | None = None, **changes: Any
) -> Path:
    """Write the bundle to `path`. `changes` replaces keys of the manifest. More `features`: larger tensors."""
    draw = np.random.default_rng(seed)
    frozen = draw.normal(0, 0.1, (CLASSES, features)).astype(np.float32)
    values = {
        HEAD: {"weight": frozen, "bias": np.zeros(CLASSES, np.float32)},
        LORA: {
            "layer.lora_a": draw.uniform(-1, 1, (RANK, features)).astype(np.float32),
            "layer.lora_b": np.zeros((CLASSES, RANK), np.float32),
        },
    }
    table: list[dict[str, Any]] = []
    programs: list[dict[str, Any]] = []
    files: dict[str, bytes] = {}
    counts = ["evaluate.correct", "evaluate.total"]
    for program_id, tensors in values.items():
        lora = program_id == LORA
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        short = "lora" if lora else "head"
        files[f"{short}_infer.onnx"] = _infer(lora, frozen, shapes)
        files[f"{short}_step.onnx"] = _step(lora, frozen, shapes)
        files[f"{short}_evaluate.onnx"] = _evaluate(lora, frozen, shapes)
        pair = {"layer": "layer", "scale": SCALE, "rank": RANK, "layer_shape": [CLASSES, features]} if lora else {}
        table += [
            {
                "name": name,
                "kind": "p",
                "dtype": "float32",
                "shape": shapes[name],
                "merge": name.rsplit(".", 1)[1] if lora else "mean",
                "initial": name,
                **pair,
            }
            for name in tensors
        ]
        evaluate = program_id.replace("tiny/", "tiny/evaluate/")
        common = {"precision": "float", "rank": RANK if lora else 0, "batch": {"default": 8, "minimum": 1}}
        size = sum(value.nbytes for value in tensors.values())
        programs += [
            {
                **common,
                "id": program_id,
                "scope": short,
                "factors": "ab" if lora else "",
                "tensors": list(tensors),
                "infer": f"{short}_infer.onnx",
                "step": [{"file": f"{short}_step.onnx", "weight": 1.0}],
                "hyper": {
                    "lr": {"default": 0.1, "minimum": 0.0, "maximum": 10.0},
                    "weight_decay": {"default": 0.0, "minimum": 0.0, "maximum": 1.0},
                },
                "evaluate": evaluate,
                "state_bytes": 2 * size,
            },
            {
                **common,
                "id": evaluate,
                "scope": "evaluate",
                "tensors": [*tensors, *counts],
                "infer": None,
                "step": [{"file": f"{short}_evaluate.onnx", "weight": 1.0}],
                "samples": "held_out",
                "score": {"sum": counts[0], "count": counts[1], "better": "higher"},
                "state_bytes": 2 * CLASSES * 4,
            },
        ]
    table += [{"name": n, "kind": "a", "dtype": "float32", "shape": [CLASSES], "merge": "sum"} for n in counts]
    files["weights.safetensors"] = pack({name: value for tensors in values.values() for name, value in tensors.items()})
    manifest = {
        "format": 1,
        "name": "tiny",
        "base": digest(frozen.tobytes()),
        "table": hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest(),
        "held_out": {"share": 0.2, "gap": 1},
        "fields": [
            {"name": "d.x", "dtype": "float32", "shape": [features]},
            {"name": "d.y", "dtype": "int64", "shape": [], "classes": CLASSES},
        ],
        "classes": ["left", "middle", "right"],
        "tensors": table,
        "programs": programs,
    }
    write_archive({**manifest, **changes}, files, path, release_key)
    return path


def tiny_data(count: int, *, features: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Samples that a linear classifier can learn: x float32 `[count, features]`, y int64 `[count]`."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(count, features)).astype(np.float32)
    truth = np.random.default_rng(1).normal(size=(features, CLASSES))
    return x, (x @ truth).argmax(axis=1).astype(np.int64)
