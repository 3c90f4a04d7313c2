"""Graphs that break their contract are refused, with the number of the rule and the name of the value (SG6)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from edge_sdk.bundle import Bundle
from edge_sdk.errors import BundleError
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from tests.cut_bundle import FILES, PROGRAM, changed, cut_bundle, cut_data


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_bundle(tmp_path_factory.mktemp("contract") / "good.bundle")


def used(path: Path) -> None:
    """Open the bundle and do all that a device does with the program."""
    with Bundle.open(path) as bundle:
        program = bundle.program(PROGRAM)
        start = bundle.initial(program)
        x, y = cut_data(20)
        Predictor(bundle, program, start).predict(x)
        stepper = Stepper(bundle, program, start, RuntimeProfile(cache_bytes=0))
        for count in (4, 20):  # at once, and in parts
            stepper.step({"d.x": x[:count], "d.y": y[:count]})


def test_the_bundle_as_the_exporter_writes_it_keeps_the_contract(good: Path) -> None:
    used(good)


def without_a_successor(model: onnx.ModelProto) -> None:
    model.graph.output.remove(next(v for v in model.graph.output if v.name == "s0.b.weight.next"))


def with_a_misshapen_successor(model: onnx.ModelProto) -> None:
    rename(model, "p.c.bias.next", "flat")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3]), "row"))
    model.graph.node.append(helper.make_node("Reshape", ["flat", "row"], ["p.c.bias.next"]))
    output = next(v for v in model.graph.output if v.name == "flat")
    output.CopyFrom(helper.make_tensor_value_info("p.c.bias.next", onnx.TensorProto.FLOAT, [1, 3]))


def with_an_unknown_tensor(model: onnx.ModelProto) -> None:
    rename(model, "p.c.bias", "p.other")
    rename(model, "p.c.bias.next", "p.other.next")


def with_an_unknown_class(model: onnx.ModelProto) -> None:
    rename(model, "h.lr", "q.lr")


def without_a_loss(model: onnx.ModelProto) -> None:
    rename(model, "loss", "lost")


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    for value in [*model.graph.input, *model.graph.output]:
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


def of_another_size(model: onnx.ModelProto) -> None:
    """The features, padded by one."""
    rename(model, "f.0", "narrow")
    pads = onnx.numpy_helper.from_array(np.array([0, 0, 0, 1]), "pads")
    model.graph.initializer.append(pads)
    model.graph.node.append(helper.make_node("Pad", ["narrow", "pads"], ["f.0"]))
    (output,) = model.graph.output
    output.name = "f.0"
    output.type.tensor_type.shape.dim[1].dim_value += 1


def reading_the_labels(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("p.c.bias", onnx.TensorProto.FLOAT, [3]))


GRAPHS: list[tuple[str, Callable[[onnx.ModelProto], None], str]] = [
    ("step", without_a_successor, "I1: .*s0.b.weight.next"),
    ("step", with_a_misshapen_successor, "I1: p.c.bias and p.c.bias.next differ"),
    ("step", with_an_unknown_tensor, "I4: the graph reads p.other"),
    ("step", with_an_unknown_class, "cannot fill the graph's input q.lr"),
    ("step", without_a_loss, "no output `loss`"),
    ("prefix", of_another_size, "I12: the features of a sample take 52 bytes, the manifest says 48"),
    ("prefix", reading_the_labels, "I8: it reads p.c.bias"),
    ("apply", without_a_successor, "I1: .*apply.onnx does not write the state"),
    ("infer", with_an_unknown_tensor, "I4: p.other of .*infer.onnx"),
]


@pytest.mark.parametrize(("kind", "change", "message"), GRAPHS, ids=[f"{k}-{c.__name__}" for k, c, _ in GRAPHS])
def test_a_graph_that_breaks_the_contract_is_refused(
    good: Path, tmp_path: Path, kind: str, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    with pytest.raises(BundleError, match=message):
        used(changed(good, tmp_path / "bad.bundle", graphs={FILES[kind]: change}))


def test_features_of_another_size_than_the_step_reads_are_refused(good: Path, tmp_path: Path) -> None:
    def manifest(content: dict[str, Any]) -> None:
        for row in content["programs"]:
            row["features"]["bytes"] = 52

    with pytest.raises(BundleError, match=r"I7: the step reads f\.0 as tensor\(float\) \[12\].* makes .*\[13\]"):
        used(changed(good, tmp_path / "bad.bundle", graphs={FILES["prefix"]: of_another_size}, manifest=manifest))


def wrong_state(row: dict[str, Any], _: dict[str, Any]) -> None:
    row["state_bytes"] += 4


def wrong_features(row: dict[str, Any], _: dict[str, Any]) -> None:
    row["features"]["bytes"] = 44


def wrong_shape(_: dict[str, Any], content: dict[str, Any]) -> None:
    next(t for t in content["tensors"] if t["name"] == "b.weight")["shape"] = [12, 13]


def another_step(row: dict[str, Any], content: dict[str, Any]) -> None:
    row["step"].append({"file": content["programs"][1]["step"][0]["file"], "weight": 1.0})


def another_prefix(row: dict[str, Any], _: dict[str, Any]) -> None:
    row["prefix"].append({"file": row["infer"], "weight": 1.0})


MANIFESTS: list[tuple[Callable[[dict[str, Any], dict[str, Any]], None], str]] = [
    (wrong_state, r"I12: the state takes \d+ bytes, the manifest says \d+"),
    (wrong_features, "I12: the features of a sample take 48 bytes, the manifest says 44"),
    (wrong_shape, "b.weight"),
    (another_step, r"I3: .*evaluate.onnx has another signature"),
    (another_prefix, r"I3: .*infer.onnx has another signature"),
]


@pytest.mark.parametrize(("change", "message"), MANIFESTS, ids=[change.__name__ for change, _ in MANIFESTS])
def test_a_manifest_that_does_not_fit_its_graphs_is_refused(
    good: Path, tmp_path: Path, change: Callable[[dict[str, Any], dict[str, Any]], None], message: str
) -> None:
    bad = changed(good, tmp_path / "bad.bundle", manifest=lambda content: change(content["programs"][0], content))
    with pytest.raises(BundleError, match=message):
        used(bad)


def test_a_graph_file_that_the_bundle_does_not_hold_is_refused(good: Path, tmp_path: Path) -> None:
    def manifest(content: dict[str, Any]) -> None:
        content["programs"][0]["gradients"] = "absent.onnx"

    with pytest.raises(BundleError, match=r"absent\.onnx"):
        Bundle.open(changed(good, tmp_path / "bad.bundle", manifest=manifest))
