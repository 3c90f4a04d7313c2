"""Brings a forward graph into our form, whoever wrote it: one input `d.x`, one output, one `batch` axis, plain operators.

Functions are inlined, constants become initializers, Dropout and unmarked Identity go, what is computed from static shapes
becomes a constant, and automatic padding becomes explicit. Operators stay as they are, so that `infer` keeps the
runtime's fast kernels; what has no gradient rule is taken apart later, on the way of the gradient only (`decompose`).
"""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from export.errors import UnsupportedModel
from export.gradients import STOP_GRADIENT, STRAIGHT_THROUGH
from export.graph import array_of, attribute, dims, static, values
from export.shapes import BATCH, fold_shapes, infer_shapes


def adopt(model: ir.Model, origin: str) -> ir.Model:
    """Bring a forward graph into our form. Raises `UnsupportedModel` for what cannot be brought into it, naming `origin`."""
    graph = model.graph
    ir.passes.Sequential(
        passes.InlinePass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.RemoveInitializersFromInputsPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.TopologicalSortPass(),
    )(model)
    _drop_what_passes_on(graph)
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UnsupportedModel(
            f"{origin}: has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs, expected one of each"
        )
    _check_operators(graph, origin)
    graph.inputs[0].name = "d.x"
    _name_tensors(graph)
    _name_apart(graph)
    _name_batch(model, origin)
    infer_shapes(model)
    fold_shapes(model)
    infer_shapes(model)
    for node in graph:
        if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            _pad_explicitly(node)
    return model


def _check_operators(graph: ir.Graph, origin: str) -> None:
    for node in graph:
        if node.domain not in ("", "ai.onnx"):
            raise UnsupportedModel(
                f"{origin}: node {node.name!r} is {node.domain}::{node.op_type}, no standard operator"
            )
        if any(held.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for held in node.attributes.values()):
            raise UnsupportedModel(f"{origin}: node {node.name!r} ({node.op_type}) holds a subgraph: control flow")
    for value in values(graph):
        if value.dtype == ir.DataType.STRING:
            raise UnsupportedModel(f"{origin}: {value.name!r} holds strings")
        if value.const_value is not None and value.dtype == ir.DataType.DOUBLE and value.const_value.size > 1:
            raise UnsupportedModel(f"{origin}: {value.name!r} is float64: convert the model's weights to float32")


def _drop_what_passes_on(graph: ir.Graph) -> None:
    """Dropout outside training, and Identity: but not one that carries a mark for the gradient."""
    for node in list(graph):
        marked = STOP_GRADIENT in node.metadata_props or STRAIGHT_THROUGH in node.metadata_props
        if node.op_type == "Dropout" or (node.op_type == "Identity" and not marked):
            source = node.inputs[0]
            assert source is not None
            if source.is_graph_input() and node.outputs[0] in graph.outputs:
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
            graph.remove(node, safe=True)


def _pad_explicitly(node: ir.Node) -> None:
    """SAME_UPPER and SAME_LOWER (ONNX, Conv): as many output places as strides fit, the odd pad at the end or the start."""
    x, operator = node.inputs[0], node.op_type
    assert x is not None
    if operator not in ("Conv", "MaxPool", "AveragePool"):
        return
    weight = node.inputs[1] if operator == "Conv" else None
    kernel = static(weight)[2:] if weight is not None else tuple(attribute(node, "kernel_shape"))
    strides = attribute(node, "strides", [1] * len(kernel))
    dilations = attribute(node, "dilations", [1] * len(kernel))
    begins, ends = [], []
    for size, k, s, d in zip(static(x, 2), kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        first = total // 2 if attribute(node, "auto_pad") == "SAME_UPPER" else total - total // 2
        begins.append(first)
        ends.append(total - first)
    del node.attributes["auto_pad"]
    node.attributes["pads"] = ir.AttrInt64s("pads", [*begins, *ends])


def _name_tensors(graph: ir.Graph) -> None:
    """Names that the tensor table can hold: letters, digits, underscores and dots."""
    for name, value in list(graph.initializers.items()):
        plain = re.sub(r"[^A-Za-z0-9_.]", "_", name)
        if plain.endswith(".next"):
            plain += "_"
        while plain != name and plain in graph.initializers:
            plain += "_"
        if plain != name:
            del graph.initializers[name]
            value.name = plain
            graph.register_initializer(value)


def _name_apart(graph: ir.Graph) -> None:
    """Give each result and each node a name of its own: a tensor of the model may be called like one of them."""
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    for number, node in enumerate(graph):
        node.name = node.name or f"{node.op_type}_{number}"
        for output in node.outputs:
            name, count = str(output.name), 0
            while name in taken:
                count += 1
                name = f"{output.name}~{count}"
            output.name = name
            taken.add(name)


def _name_batch(model: ir.Model, origin: str) -> None:
    graph = model.graph
    first = graph.inputs[0].shape
    if first is None or not len(first) or isinstance(first[0], int):
        raise UnsupportedModel(
            f"{origin}: the input has the shape {first}, expected a symbolic first axis for the batch: "
            "export the model with a dynamic batch axis"
        )
    symbol = str(first[0].value)
    for value in values(graph):
        if value.shape is not None:
            sizes: list[int | str | None] = [s if isinstance(s, int) else s.value for s in value.shape]
            value.shape = ir.Shape([BATCH if s == symbol else s for s in sizes])
    if static_tail(graph.inputs[0]) is None:
        raise UnsupportedModel(
            f"{origin}: the input has the shape {list(dims(graph.inputs[0]))}; only the batch may vary"
        )


def static_tail(value: ir.Value) -> tuple[int, ...] | None:
    """The sizes behind the batch axis, None if one is not static."""
    sizes = dims(value)[1:]
    return None if any(isinstance(size, str) for size in sizes) else tuple(int(size) for size in sizes)


def trainable_constants(graph: ir.Graph) -> list[str]:
    """The constants that layers are made of, in order of use: weights, biases, scales, embedding tables.

    Used where the model does not say itself which of its tensors are parameters, as an ONNX file does not.
    """
    slots = {
        "Conv": (1, 2),
        "ConvTranspose": (1, 2),
        "Gemm": (1, 2),
        "MatMul": (0, 1),
        "Add": (0, 1),
        "Gather": (0,),
        "PRelu": (1,),
        **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
        **dict.fromkeys(("BatchNormalization", "LayerNormalization", "GroupNormalization"), (1, 2)),
        "InstanceNormalization": (1, 2),
    }
    names: list[str] = []
    for node in graph:
        inputs = list(node.inputs)
        if node.op_type == "Add" and not any(
            value is not None and (maker := value.producer()) is not None and maker.op_type == "MatMul"
            for value in inputs
        ):
            continue  # only the bias behind a product
        for slot in slots.get(node.op_type, ()):
            value = inputs[slot] if slot < len(inputs) else None
            maker = None if value is None else value.producer()
            if maker is not None and maker.op_type == "Transpose":
                value = maker.inputs[0]
            array = array_of(value)
            if value is not None and array is not None and array.dtype == np.float32 and value.name not in names:
                names.append(str(value.name))
    return names
