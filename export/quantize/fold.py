"""Folds a batch normalization into the layer before it: a quantizer must see the weight that is multiplied with.

    gamma (W x + b - mean) / sqrt(var + eps) + beta = (f W) x + f (b - mean) + beta,    f = gamma / sqrt(var + eps)

Jacob et al., arXiv 1712.05877, section 3.2. The function stays; what trains afterwards is the folded weight.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from edge_sdk.tensors import Array
from export.graph import array_of, attribute, constant
from export.quantize.weights import output_axis


def fold_normalizations(model: ir.Model) -> dict[str, Array]:
    """Fold, in place, every batch normalization in inference form behind a Conv or Gemm that nothing else reads.

    A layer without bias gets one under the name of the normalization's. Returns values for the tensors of the original
    model, by name, with which it is the same function: the folded weights, and normalizations that do nothing.
    """
    graph = model.graph
    values: dict[str, Array] = {}
    for norm in list(graph):
        layer = norm.inputs[0].producer() if norm.op_type == "BatchNormalization" and norm.inputs[0] else None
        if layer is None or not _foldable(layer, norm):
            continue
        weight, bias = layer.inputs[1], layer.inputs[2] if len(layer.inputs) > 2 else None
        scale, shift, mean, variance = (array_of(value) for value in norm.inputs[1:5])
        held = array_of(weight)
        assert weight is not None
        assert held is not None
        assert scale is not None
        assert shift is not None
        assert mean is not None
        assert variance is not None
        epsilon = attribute(norm, "epsilon", 1e-5)
        factor = scale.astype(np.float64) / np.sqrt(variance.astype(np.float64) + epsilon)
        before = array_of(bias) if bias is not None else np.zeros_like(mean)
        assert before is not None
        column = [-1 if axis == output_axis(layer, transposed=False) else 1 for axis in range(held.ndim)]
        named = norm.inputs[2] if bias is None else bias
        assert named is not None
        folded = {
            str(weight.name): (held * factor.reshape(column)).astype(np.float32),
            str(named.name): ((before - mean) * factor + shift).astype(np.float32),
        }
        still = zip(norm.inputs[1:5], (1.0, 0.0, 0.0, 1.0 - epsilon), strict=True)
        values |= {str(value.name): np.full_like(mean, number) for value, number in still if value is not None}
        values |= folded
        _replace(graph, layer, norm, weight, named, folded)
    passes.RemoveUnusedNodesPass()(model)
    return values


def _foldable(layer: ir.Node, norm: ir.Node) -> bool:
    if layer.op_type not in ("Conv", "Gemm") or attribute(norm, "training_mode", 0) or len(norm.outputs) != 1:
        return False
    if attribute(layer, "alpha", 1.0) != 1.0 or attribute(layer, "beta", 1.0) != 1.0:
        return False
    tensors = [*layer.inputs[1:], *norm.inputs[1:]]
    own = all(value is None or (array_of(value) is not None and len(value.uses()) == 1) for value in tensors)
    output = layer.outputs[0]
    return own and len(output.uses()) == 1 and not output.is_graph_output()


def _replace(
    graph: ir.Graph, layer: ir.Node, norm: ir.Node, weight: ir.Value, named: ir.Value, folded: dict[str, Array]
) -> None:
    made = []
    for value in (weight, named):
        name = str(value.name)
        del graph.initializers[name]
        value.name = f"{name}/unfolded"
        made.append(constant(name, folded[name]))
        graph.register_initializer(made[-1])
    layer.replace_input_with(1, made[0])
    if len(layer.inputs) < 3:
        layer.resize_inputs(3)
    layer.replace_input_with(2, made[1])
    output = norm.outputs[0]
    named_output, source = output.name, layer.outputs[0]
    ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
    graph.remove(norm, safe=True)
    source.name = named_output


def fold_transposes(model: ir.Model) -> None:
    """Write weights down as their product reads them, in place: a quantizer looks for constants, not for a Transpose."""
    graph = model.graph
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        value = array_of(source)
        if source is None or value is None or node.outputs[0].is_graph_output():
            continue
        turned = constant(f"{source.name}.T", np.ascontiguousarray(value.transpose(attribute(node, "perm"))))
        graph.register_initializer(turned)
        ir.convenience.replace_all_uses_with(node.outputs[0], turned)
    passes.RemoveUnusedNodesPass()(model)
