"""Everything that is written is standard ONNX, and the bundle says which operators a device needs (step-graphs.md, SG5)."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from benchmarks.step_models import STEP_MODELS
from edge_sdk.bundle import Bundle
from export import ProgramSpec, build_bundle

NETS = {
    "gru": [ProgramSpec("full", optimizer="sgd"), ProgramSpec("head")],
    "vit_lora": [ProgramSpec("lora", {"rank": 2, "targets": ["*.attention.[qv]"]})],
    "autoencoder": [ProgramSpec("full", precision="float")],
    "tiny_ds_cnn": [ProgramSpec("full", precision="float", optimizer="sgd"), ProgramSpec("lora", {"rank": 2})],
}


@pytest.mark.parametrize("name", NETS)
def test_graphs_are_standard_onnx_and_their_operators_are_listed(tmp_path: Path, name: str) -> None:
    model = STEP_MODELS[name]
    report = build_bundle(
        model.make(0.125),
        model.example(6),
        tmp_path / "net.bundle",
        name=name.replace("_", "-"),
        loss=model.loss,
        programs=NETS[name],
    )
    with Bundle.open(report.path) as bundle:
        manifest = json.loads((bundle.directory / "manifest.json").read_text())
        found = set()
        files = sorted(bundle.directory.glob("*.onnx"))
        assert {file.name for file in files} == {graph for p in bundle.programs.values() for graph in p.graphs}
        for file in files:
            proto = onnx.load(str(file), load_external_data=False)
            onnx.checker.check_model(str(file), full_check=True)
            assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 21)]
            assert proto.ir_version == 10
            assert not proto.functions
            for node in proto.graph.node:
                assert node.domain == ""
                assert not any(held.HasField("g") or held.graphs for held in node.attribute), node.name
                assert not node.op_type.startswith(("Random", "Dropout", "Bernoulli", "Multinomial"))
                found.add(node.op_type)
    assert manifest["report"]["operators"] == sorted(found)
