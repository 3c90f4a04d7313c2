"""`edgewise export check`: what stands in the way of training, and what it would cost, before anything is built."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.check import check_model
from export.errors import UnknownTensor


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """x [n, 2, 8] -> Conv 'stem' -> Sinh -> Conv 'body' -> Relu -> Flatten -> Gemm 'head'."""
    draw = np.random.default_rng(0)
    weights = {"stem.weight": (4, 2, 3), "body.weight": (4, 4, 3), "head.weight": (16, 3), "head.bias": (3,)}
    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["a"], "stem"),
        helper.make_node("Sinh", ["a"], ["s"], "sinh"),
        helper.make_node("Conv", ["s", "body.weight"], ["b"], "body"),
        helper.make_node("Relu", ["b"], ["r"], "relu"),
        helper.make_node("Flatten", ["r"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(draw.normal(size=s).astype(np.float32), n) for n, s in weights.items()],
    )
    path = tmp_path / "net.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), str(path))
    return path


def test_it_counts_path_frontier_and_cost(model: Path) -> None:
    found = check_model(model, ["head.*"])
    assert found.problem == ""
    assert found.trained == {"head.weight": 48, "head.bias": 3}
    assert found.path["Gemm"] == 1
    assert "Conv" not in found.path
    assert found.frontier == ("f",)
    assert found.feature_bytes == 4 * 16
    convolutions = 2 * (6 * 4 * 2 * 3 + 4 * 4 * 4 * 3)
    assert found.frozen_flops == convolutions
    assert found.forward_flops == convolutions + 2 * 16 * 3
    assert found.backward_flops == 2 * 16 * 3


def test_what_has_no_rule_is_in_the_answer(model: Path) -> None:
    found = check_model(model, ["stem.weight"])
    assert found.missing == ("Sinh",)
    assert found.backward_flops == 0
    assert "node 'sinh'" in found.problem
    assert "body.weight,head.weight,head.bias" in found.problem


def test_a_pattern_that_matches_nothing_is_an_error(model: Path) -> None:
    with pytest.raises(UnknownTensor, match=r"did you mean head\.weight"):
        check_model(model, ["head.wieght"])


@pytest.mark.parametrize(("train", "code"), [("body.*,head.*", 0), ("*", 3)])
def test_the_command_answers_by_text_json_and_exit_code(model: Path, train: str, code: int) -> None:
    call = [sys.executable, "-m", "edge_sdk.cli", "export", "check", str(model), "--train", train]
    text = subprocess.run(call, capture_output=True, text=True)
    answer = subprocess.run([*call, "--json"], capture_output=True, text=True)
    assert (text.returncode, answer.returncode) == (code, code)
    assert "the frozen part ends at" in text.stdout
    assert bool(json.loads(answer.stdout)["problem"]) == bool(code)
    assert ("Sinh x1 (no rule)" in text.stdout) == bool(code)
