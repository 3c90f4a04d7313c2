"""Three ONNX files that never saw torch train, in a process where torch cannot be imported (step-graphs.md, SG4)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

DRAW = np.random.default_rng(0)


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(DRAW.normal(0, 0.4, shape).astype(np.float32), name)


def ints(name: str, *values: int) -> onnx.TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def graph(nodes: list[onnx.NodeProto], shape: list, weights: list[onnx.TensorProto]) -> onnx.GraphProto:
    return helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3])],
        weights,
    )


def at_opset_13() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Automatic padding, a reshape computed from the shape, ReduceMean with its axes as an attribute, GlobalMaxPool."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        helper.make_node("LeakyRelu", ["c"], ["r"], alpha=0.1),
        helper.make_node("GlobalMaxPool", ["r"], ["p"]),
        helper.make_node("Shape", ["p"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["batch"]),
        helper.make_node("Unsqueeze", ["batch", "axis"], ["row"]),
        helper.make_node("Concat", ["row", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["p", "target"], ["f"]),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["f", "m"], ["both"]),
        helper.make_node("Gemm", ["both", "w", "b"], ["scores"], transB=1),
    ]
    weights = [weight("k", 6, 2, 3, 3), weight("w", 3, 6), weight("b", 3), ints("rest", 6), ints("axis", 0)]
    zero = numpy_helper.from_array(np.array(0, np.int64), "zero")
    made = helper.make_model(
        graph(nodes, [2, 7, 7], [*weights, zero]), opset_imports=[helper.make_opsetid("", 13)], ir_version=7
    )
    return made, (2, 7, 7)


def with_functions() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """A layer as a function of its own domain, used twice, and a GRU."""
    body = [
        helper.make_node("MatMul", ["a", "weight"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["moved"]),
        helper.make_node("Elu", ["moved"], ["y"]),
    ]
    layer = helper.make_function(
        "plant.net", "Layer", ["a", "weight", "bias"], ["y"], body, [helper.make_opsetid("", 18)]
    )
    nodes = [
        helper.make_node("Transpose", ["x"], ["steps"], perm=[1, 0, 2]),
        helper.make_node("GRU", ["steps", "gru_w", "gru_r"], ["", "last"], hidden_size=5),
        helper.make_node("Squeeze", ["last", "axis"], ["state"]),
        helper.make_node("Layer", ["state", "w1", "b1"], ["h"], domain="plant.net"),
        helper.make_node("Layer", ["h", "w2", "b2"], ["scores"], domain="plant.net"),
    ]
    weights = [weight("gru_w", 1, 15, 4), weight("gru_r", 1, 15, 5), ints("axis", 0)]
    weights += [weight("w1", 5, 6), weight("b1", 6), weight("w2", 6, 3), weight("b2", 3)]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("plant.net", 1)]
    made = helper.make_model(graph(nodes, [8, 4], weights), opset_imports=opsets, functions=[layer], ir_version=8)
    return made, (8, 4)


def anonymous() -> tuple[onnx.ModelProto, tuple[int, ...]]:
    """Attention by Einsum; weights are called as exporters call folded ones, and one lies in a Constant node."""
    nodes = [
        helper.make_node("MatMul", ["x", "onnx::MatMul_41"], ["q"]),
        helper.make_node("MatMul", ["x", "onnx::MatMul_42"], ["k"]),
        helper.make_node("Einsum", ["q", "k"], ["e"], equation="bqd,bkd->bqk"),
        helper.make_node("Softmax", ["e"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "x"], ["mixed"]),
        helper.make_node("LayerNormalization", ["mixed", "onnx::Mul_43", "onnx::Add_44"], ["normal"]),
        helper.make_node("Flatten", ["normal"], ["f"]),
        helper.make_node("Constant", [], ["onnx::Gemm_45"], value=weight("", 20, 3)),
        helper.make_node("Gemm", ["f", "onnx::Gemm_45"], ["scores"]),
    ]
    ones = numpy_helper.from_array(np.ones(4, np.float32), "onnx::Mul_43")
    weights = [weight("onnx::MatMul_41", 4, 4), weight("onnx::MatMul_42", 4, 4), ones, weight("onnx::Add_44", 4)]
    made = helper.make_model(graph(nodes, [5, 4], weights), opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return made, (5, 4)


TRAIN = textwrap.dedent("""
    import sys
    sys.modules["torch"] = None  # an import fails
    from pathlib import Path
    import numpy as np
    from edge_sdk.bundle import Bundle
    from edge_sdk.runtime import Stepper
    from export import ProgramSpec, build_bundle

    folder, shape = Path(sys.argv[1]), tuple(map(int, sys.argv[2].split(",")))
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(16, *shape)).astype(np.float32), draw.integers(0, 3, 16)
    report = build_bundle(folder / "net.onnx", (x, y), folder / "net.bundle", name="net", loss="cross_entropy",
                          programs=[ProgramSpec("full", precision="float", optimizer="adamw")])
    (entry,) = report.programs
    with Bundle.open(report.path) as bundle:
        program = bundle.program(entry.id)
        stepper = Stepper(bundle, program, bundle.initial(program))
        losses = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.02}).loss for _ in range(40)]
        stepper.close()
    print(entry.proof.oracle, len(entry.trained), losses[0], losses[-1], sep="|")
""")


@pytest.mark.parametrize(
    ("make", "tensors"),
    [(at_opset_13, 3), (with_functions, 6), (anonymous, 5)],
    ids=["opset13", "functions", "anonymous"],
)
def test_it_trains_without_torch(
    tmp_path: Path, make: Callable[[], tuple[onnx.ModelProto, tuple[int, ...]]], tensors: int
) -> None:
    model, shape = make()
    onnx.checker.check_model(model)
    onnx.save(model, str(tmp_path / "net.onnx"))
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), ",".join(map(str, shape))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    oracle, trained, first, last = done.stdout.strip().split("|")
    assert oracle == "central differences"
    assert int(trained) == tensors
    assert float(last) < 0.8 * float(first)
