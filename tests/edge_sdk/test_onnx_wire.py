"""A graph file is looked into before the runtime parses it, and nothing in it can make the look go wrong."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_sdk.bundle import WEIGHTS, Bundle
from edge_sdk.errors import BundleError
from edge_sdk.onnx_wire import ExternalData, check_graph, graph_facts
from edge_sdk.runtime import RuntimeProfile, open_session
from export.writer import write_archive
from tests.tiny_bundle import tiny_bundle


def model(location: str | None = WEIGHTS, **entries: str) -> onnx.ModelProto:
    """A product with a constant of 64 bytes that lies at `location`; None keeps it inside."""
    constant = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    if location is not None:
        constant.ClearField("raw_data")
        constant.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "64", **entries}.items():
            constant.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["d.x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("d.x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
        [constant],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(folder: Path, proto: onnx.ModelProto) -> Path:
    (folder / WEIGHTS).write_bytes(np.ones(20, np.float32).tobytes())
    path = folder / "graph.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def test_what_a_graph_is_made_of_is_read_as_onnx_reads_it(tmp_path: Path) -> None:
    with Bundle.open(tiny_bundle(tmp_path / "tiny.bundle")) as bundle:
        for file in bundle.directory.glob("*.onnx"):
            proto = onnx.load(file)
            facts = graph_facts(file.read_bytes())
            assert (facts.nodes, facts.inputs) == (len(proto.graph.node), len(proto.graph.input))
            assert facts.external == ()
    facts = check_graph(saved(tmp_path, model(offset="16")), WEIGHTS)
    assert facts.external == (ExternalData(WEIGHTS.encode(), 16, 64),)


@pytest.mark.parametrize(
    "location",
    ["/etc/hostname", "../weights.safetensors", "./weights.safetensors", "other.bin", "", f"{WEIGHTS}\0/etc/hostname",
     f"sub/{WEIGHTS}", "*/_ORT_MEM_ADDR_/*"],
)  # fmt: skip
def test_a_graph_that_would_read_another_file_is_refused_before_the_runtime_sees_it(
    tmp_path: Path, location: str
) -> None:
    path = saved(tmp_path, model(location))
    with pytest.raises(BundleError, match=r"graph\.onnx: is refused before it is loaded: it would read"):
        open_session(path, RuntimeProfile())


def test_weights_in_the_weight_file_are_read(tmp_path: Path) -> None:
    session = open_session(saved(tmp_path, model()), RuntimeProfile())
    np.testing.assert_array_equal(session.run(None, {"d.x": np.ones((2, 4), np.float32)})[0], np.full((2, 4), 4.0))


def in_a_constant_node(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer.pop()
    tensor.external_data[0].value = "/etc/hostname"
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=tensor))


def in_a_branch(proto: onnx.ModelProto) -> None:
    branch = helper.make_graph([], "branch", [], [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))


def in_a_function(proto: onnx.ModelProto) -> None:
    proto.functions.append(helper.make_function("own", "f", [], [], [], [helper.make_opsetid("", 21)]))


def in_training_information(proto: onnx.ModelProto) -> None:
    proto.training_info.add().algorithm.initializer.append(proto.graph.initializer[0])


def in_a_sparse_tensor(proto: onnx.ModelProto) -> None:
    proto.graph.sparse_initializer.add().values.CopyFrom(proto.graph.initializer[0])


def of_a_foreign_domain(proto: onnx.ModelProto) -> None:
    proto.graph.node.append(helper.make_node("EPContext", [], ["z"], domain="com.microsoft"))


def behind_the_file(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].external_data[1].value = "20"


def with_a_negative_offset(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].external_data[1].value = "-4"


def with_packed_weights(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].external_data.add(key="prepacked_0", value="x|0;64;0")


def with_two_locations(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].external_data.add(key="location", value="/etc/hostname")


def with_too_many_nodes(proto: onnx.ModelProto) -> None:
    proto.graph.node.extend([helper.make_node("Relu", ["y"], [f"y{i}"]) for i in range(20_000)])


def with_too_many_inputs(proto: onnx.ModelProto) -> None:
    proto.graph.input.extend([helper.make_tensor_value_info(f"p.{i}", TensorProto.FLOAT, []) for i in range(4_096)])


HOSTILE: list[tuple[Callable[[onnx.ModelProto], None], str]] = [
    (in_a_constant_node, "would read '/etc/hostname'"),
    (in_a_branch, "holds a subgraph"),
    (in_a_function, "holds a function"),
    (in_training_information, "holds training information"),
    (in_a_sparse_tensor, "holds a sparse tensor"),
    (of_a_foreign_domain, "domain 'com.microsoft'"),
    (behind_the_file, "bytes 20 to 84 of weights.safetensors, which has 80"),
    (with_a_negative_offset, "the number '-4'"),
    (with_packed_weights, "the entry 'prepacked_0'"),
    (with_two_locations, "the entry 'location' twice"),
    (with_too_many_nodes, "I13: it has more than 20000 nodes"),
    (with_too_many_inputs, "I13: it has more than 4096 inputs"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=[change.__name__ for change, _ in HOSTILE])
def test_whatever_could_hide_something_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], message: str
) -> None:
    proto = model()
    change(proto)
    with pytest.raises(BundleError, match=message):
        open_session(saved(tmp_path, proto), RuntimeProfile())


def test_a_graph_of_more_than_16_megabytes_is_not_even_read(tmp_path: Path) -> None:
    with (tmp_path / "graph.onnx").open("wb") as file:
        file.truncate((16 << 20) + 1)
    with pytest.raises(BundleError, match="I13: has 16777217 bytes"):
        check_graph(tmp_path / "graph.onnx", WEIGHTS)


@pytest.mark.parametrize("folder", [False, True])
def test_a_bundle_with_such_a_graph_is_not_opened_and_leaves_nothing_behind(tmp_path: Path, folder: bool) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    write_archive(manifest, {**files, "head_step.onnx": model("/etc/hostname").SerializeToString()}, path)
    opened = path
    if folder:
        opened = tmp_path / "unpacked"
        with zipfile.ZipFile(path) as archive:
            archive.extractall(opened)
    with pytest.raises(BundleError, match=r"head_step\.onnx: is refused .*'/etc/hostname'"):
        Bundle.open(opened)
    with pytest.raises(BundleError, match="is refused"):
        Bundle.open(opened, unpack_to=tmp_path / "store")


def test_a_graph_under_another_suffix_is_refused(tmp_path: Path) -> None:
    path = tiny_bundle(tmp_path / "tiny.bundle")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(files.pop("manifest.json"))
    files["head_step.ort"] = files.pop("head_step.onnx")
    manifest["programs"][0]["step"] = [{"file": "head_step.ort", "weight": 1.0}]
    write_archive(manifest, files, path)
    with pytest.raises(BundleError, match=r"head_step\.ort.*ends in \.onnx"):
        Bundle.open(path)


# Whatever the bytes are.

WHOLE = model().SerializeToString()


def looked_into(data: bytes) -> None:
    """Facts or `BundleError`; what is accepted, protocol buffers read the same way."""
    try:
        facts = graph_facts(data)
    except BundleError:
        return
    try:
        proto = onnx.ModelProto.FromString(data)
    except Exception:  # noqa: BLE001 - theirs may be stricter, for instance about text
        return
    assert facts.nodes == len(proto.graph.node)
    assert facts.inputs == len(proto.graph.input)
    tensors = [*proto.graph.initializer, *(a.t for n in proto.graph.node for a in n.attribute)]
    # Text that is not UTF-8 comes as bytes.
    theirs = [
        e.value if isinstance(e.value, bytes) else e.value.encode()
        for t in tensors
        for e in t.external_data
        if e.key == "location"
    ]
    ours = [entry.location for entry in facts.external]
    assert [place for place in theirs if place] == [place for place in ours if place]


@given(st.binary(max_size=200))
def test_any_bytes_give_facts_or_a_bundle_error(data: bytes) -> None:
    looked_into(data)


@settings(max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, 40))
def test_a_damaged_graph_gives_facts_or_a_bundle_error(changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(WHOLE)
    for place, value in changes:
        data[place] = value
    looked_into(bytes(data[: len(data) - cut]))


NUMBERS = st.sampled_from([1, 2, 5, 6, 7, 10, 11, 13, 15, 20, 22, 25])
MESSAGES = st.recursive(
    st.binary(max_size=12),
    lambda inner: st.lists(st.tuples(NUMBERS, inner), max_size=4).map(
        lambda fields: b"".join(_tag(number) + _length(content) + content for number, content in fields)
    ),
    max_leaves=12,
)


def _length(content: bytes) -> bytes:
    return _number(len(content))


def _tag(number: int) -> bytes:
    return _number(number << 3 | 2)


def _number(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


@settings(max_examples=400)
@given(MESSAGES)
def test_nested_messages_give_facts_or_a_bundle_error(data: bytes) -> None:
    looked_into(data)
    looked_into(_tag(7) + _length(data) + data)


@pytest.mark.parametrize("depth", [1_000, 100_000])
def test_a_deeply_nested_file_does_not_exhaust_the_stack(depth: int) -> None:
    data = b""
    for _ in range(depth):
        data = _tag(7) + _length(data) + data
        if len(data) > 1 << 16:
            break
    looked_into(data)
