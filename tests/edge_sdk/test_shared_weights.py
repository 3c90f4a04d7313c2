"""Every graph of a bundle reads one weight file; it holds each tensor once, and nothing is lost by it (SG18)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from edge_sdk.bundle import WEIGHTS, Bundle
from edge_sdk.runtime import RuntimeProfile, open_session
from export import ProgramSpec, build_bundle

WIDE = 48  # a weight of 9 KiB: smaller constants than 1 KiB stay inside the graph


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(7, WIDE), nn.Tanh(), nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 4))
    x = np.random.default_rng(0).normal(size=(16, 7)).astype(np.float32)
    path = tmp_path_factory.mktemp("weights") / "net.bundle"
    programs = [
        ProgramSpec("head", {}, "float", "sgd"),
        ProgramSpec("lora", {"rank": 2, "targets": ["2", "4"]}, "float", "sgd"),
    ]
    build_bundle(module, (x, np.arange(16) % 4), path, name="net", loss="cross_entropy", programs=programs)
    with Bundle.open(path) as opened:
        yield opened


def places(bundle: Bundle) -> dict[tuple[str, str], tuple[int, int]]:
    """(graph, tensor) -> where its bytes lie."""
    found = {}
    for file in bundle.directory.glob("*.onnx"):
        for tensor in onnx.load(file, load_external_data=False).graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["location"] == WEIGHTS
                found[file.stem, tensor.name] = int(entries["offset"]), int(entries["length"])
    return found


def test_infer_prefix_and_step_point_at_the_same_bytes(bundle: Bundle) -> None:
    found = places(bundle)
    readers = {graph for (graph, _), place in found.items() if place == found["net_head_float_infer", "2.weight"]}
    assert {
        "net_head_float_infer",
        "net_head_float_prefix",
        "net_lora_r2_float_infer",
        "net_lora_r2_float_step",
    } <= readers


def test_each_tensor_is_stored_once(bundle: Bundle) -> None:
    data = bundle.file(WEIGHTS).read_bytes()
    length = int.from_bytes(data[:8], "little")
    rows = json.loads(data[8 : 8 + length])
    contents = [
        (
            row["dtype"],
            tuple(row["shape"]),
            data[8 + length + row["data_offsets"][0] : 8 + length + row["data_offsets"][1]],
        )
        for row in rows.values()
    ]
    assert len(set(contents)) == len(contents)
    assert set(places(bundle).values()) <= {
        (8 + length + row["data_offsets"][0], row["data_offsets"][1] - row["data_offsets"][0]) for row in rows.values()
    }


def test_graphs_with_their_weights_inside_compute_the_same_bits(bundle: Bundle, tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    for file in sorted(bundle.directory.glob("*.onnx")):
        inline = tmp_path / file.name
        onnx.save(onnx.load(file), inline)
        sessions = [open_session(path, RuntimeProfile()) for path in (file, inline)]
        feeds = {}
        for value in sessions[0].get_inputs():
            shape = [5 if isinstance(size, str) else size for size in value.shape]
            whole = value.type == "tensor(int64)"
            feeds[value.name] = draw.integers(0, 4, shape) if whole else draw.random(shape, np.float32)
        for left, right in zip(*(session.run(None, feeds) for session in sessions), strict=True):
            np.testing.assert_array_equal(left, right, err_msg=file.name)


def test_a_weight_that_comes_later_gives_what_the_flashed_one_gives(bundle: Bundle, tmp_path: Path) -> None:
    """A frozen stage published after flashing: its file is not there when the session is made (step-graphs.md, 2.5)."""
    source = bundle.file("net_head_float_prefix.onnx")
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == "2.weight":
            late = numpy_helper.to_array(tensor)
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "late.safetensors"), ("offset", "0"), ("length", str(late.nbytes))):
                tensor.external_data.add(key=key, value=value)
    path = tmp_path / "late.onnx"
    path.write_bytes(model.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_external_initializers(["2.weight"], [onnxruntime.OrtValue.ortvalue_from_numpy(late)])
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(2).normal(size=(6, 7)).astype(np.float32)
    flashed = open_session(source, RuntimeProfile()).run(None, {"d.x": x})
    np.testing.assert_array_equal(session.run(None, {"d.x": x})[0], flashed[0])
