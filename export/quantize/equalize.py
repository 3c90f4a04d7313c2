"""Cross-layer equalization: channels of very different size are brought to one size before a scale is shared.

For layers 1 -> 2 with a positively homogeneous activation between, and channel j (Nagel et al., arXiv 1906.04721, 4.1):

    r1_j = max|W1[j]|    r2_j = max|W2[:, j]|    f_j = r1_j / sqrt(r1_j r2_j)
    W1[j], b1[j] divided by f_j;  W2[:, j] multiplied by f_j

Exact in float for ReLU, identity and poolings. Other activations (ReLU6) are tried as well and undone where the output
moves by more than 1e-4: it may be that none of their bounds is ever met.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
import onnxruntime

from edge_sdk.fields import INPUT
from edge_sdk.tensors import Array
from export.graph import array_of, attribute, clone, constant
from export.quantize.kernels import quiet
from export.quantize.weights import output_axis

SWEEPS: Final = 20
EXACT: Final = 1e-4  # of the largest output
_BETWEEN: Final = frozenset(
    ("Relu", "LeakyRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Identity")
)  # fmt: skip


@dataclass(frozen=True)
class LayerPair:
    """Names of the two weights and of the first bias; the axes of rows and columns; places of one channel in the columns."""

    first: str
    bias: str | None
    second: str
    row: int
    column: int
    repeat: int


def equalize(model: ir.Model, x: Array) -> int:
    """Equalize in place what can be without changing the outputs for x `[n, *shape]`; return how many pairs were."""
    weights = {
        name: array for name, value in model.graph.initializers.items() if (array := array_of(value)) is not None
    }
    before = _output(model, {}, x)
    pairs = layer_pairs(model.graph)
    kept = pairs
    changed = _swept(weights, pairs)
    if not _same(before, _output(model, changed, x)):
        kept, changed = [], {}
        for pair in pairs:
            tried = _swept(weights, [*kept, pair])
            if _same(before, _output(model, tried, x)):
                kept, changed = [*kept, pair], tried
    set_constants(model, changed)
    return len(kept)


def layer_pairs(graph: ir.Graph) -> list[LayerPair]:
    """Consecutive layers with constant weights, and nothing but one activation and poolings between."""
    found = []
    for node in graph:
        if node.op_type not in ("Conv", "Gemm") or not _own(node):
            continue
        value = node.outputs[0]
        while len(value.uses()) == 1 and not value.is_graph_output():
            user, index = next(iter(value.uses()))
            if user.op_type in ("Conv", "Gemm") and index == 0 and _own(user):
                pair = _pair(node, user)
                found += [pair] if pair is not None else []
                break
            if user.op_type not in _BETWEEN or index != 0:
                break
            value = user.outputs[0]
    return found


def _own(node: ir.Node) -> bool:
    """Whether weight and bias are constants that no other node reads."""
    return all(v is None or (array_of(v) is not None and len(v.uses()) == 1) for v in node.inputs[1:])


def _pair(first: ir.Node, second: ir.Node) -> LayerPair | None:
    one, two = array_of(first.inputs[1]), array_of(second.inputs[1])
    assert one is not None
    assert two is not None
    row = output_axis(first, transposed=False)
    channels = one.shape[row]
    if second.op_type == "Conv":
        group = attribute(second, "group", 1)
        if group not in (1, channels) or (group > 1 and two.shape[0] != channels):
            return None
        column = 0 if group > 1 else 1
    else:
        column = 1 - output_axis(second, transposed=False)
    repeat, rest = divmod(two.shape[column], channels)
    if rest:
        return None
    bias = first.inputs[2] if len(first.inputs) > 2 else None
    names = (str(first.inputs[1].name), str(second.inputs[1].name))  # type: ignore[union-attr]
    return LayerPair(names[0], None if bias is None else str(bias.name), names[1], row, column, repeat)


def _swept(weights: Mapping[str, Array], pairs: Sequence[LayerPair]) -> dict[str, Array]:
    """The tensors that change, after all sweeps, in float64 until the end."""
    held = {n: weights[n].astype(np.float64) for p in pairs for n in (p.first, p.second, p.bias) if n is not None}
    for _ in range(SWEEPS):
        for pair in pairs:
            first, second = held[pair.first], held[pair.second]
            rows = _largest(first, pair.row)
            columns = _largest(second, pair.column).reshape(-1, pair.repeat).max(axis=1)
            both = (rows > 0) & (columns > 0)
            factor = np.where(both, np.sqrt(np.where(both, rows, 1) / np.where(both, columns, 1)), 1.0)
            rescale(held, pair, factor)
    return {name: value.astype(np.float32) for name, value in held.items()}


def rescale(weights: dict[str, Array], pair: LayerPair, factor: Array) -> None:
    """Divide channel j of the first layer by `factor[j]` and multiply it in the second: the function stays."""
    first, second = weights[pair.first], weights[pair.second]
    weights[pair.first] = first / _along(factor, pair.row, first.ndim)
    weights[pair.second] = second * _along(np.repeat(factor, pair.repeat), pair.column, second.ndim)
    if pair.bias is not None:
        weights[pair.bias] = weights[pair.bias] / factor


def _largest(value: Array, axis: int) -> Array:
    return np.asarray(np.abs(value).max(axis=tuple(i for i in range(value.ndim) if i != axis)))


def _along(factor: Array, axis: int, rank: int) -> Array:
    return factor.reshape([-1 if i == axis else 1 for i in range(rank)])


def set_constants(model: ir.Model, changed: Mapping[str, Array]) -> None:
    """Give initializers of the graph these values."""
    for name, value in changed.items():
        model.graph.initializers[name].const_value = constant(name, value).const_value


def _output(model: ir.Model, changed: Mapping[str, Array], x: Array) -> Array:
    tried = clone(model)
    set_constants(tried, changed)
    proto = ir.to_proto(tried).SerializeToString()
    session = onnxruntime.InferenceSession(proto, quiet(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {INPUT: x})[0])


def _same(before: Array, after: Array) -> bool:
    return bool(np.abs(before - after).max() <= EXACT * np.abs(before).max())
