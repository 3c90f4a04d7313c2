"""The cut: a forward graph in two, the frozen `prefix` up to the first trained tensor and the rest (step-graphs.md, 4.1).

    D   values that depend on an input other than d.x and r.*           (they move, from step to step or round to round)
    X   values that depend on d.x or r.* and are not in D               (they do not)
    frontier: the values of X that a node of D reads, except through Shape

The frontier becomes the outputs `f.0`, `f.1`, ... of the prefix and the inputs of the rest. What is a reshape, or one
product, away from the other features is computed again in the step rather than handed over: so the base product beside an
adapter costs no feature. The graph is cut before it is differentiated; the backward pass reads the inputs of active nodes
only, and these are in D or on the frontier.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
import onnxruntime

from edge_sdk.fields import INPUT
from edge_sdk.sessions import FLOAT_PRODUCTS
from edge_sdk.tensors import Array
from export.cost import bytes_per_sample
from export.graph import Builder, attribute, clone, dims, tidy, values
from export.shapes import BATCH, infer_shapes

_PRODUCTS: Final = frozenset(
    ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "QLinearConv", "QLinearMatMul")
)
_LIGHT: Final = frozenset(
    (
        "Reshape",
        "Flatten",
        "Squeeze",
        "Unsqueeze",
        "Transpose",
        "Expand",
        "Relu",
        "DequantizeLinear",
        "Identity",
        "Cast",
    )
)
# Where a feature may be handed over before one of these, if that takes fewer bytes.
_MOVABLE: Final = frozenset(("Reshape", "Relu", "Transpose", "Expand", "DequantizeLinear"))
_ROW_TOLERANCE: Final = 1e-4  # of the largest value: kernels add up in another order for another batch


@dataclass(frozen=True)
class Features:
    """What stands in the manifest about the frontier: may features be kept for a sample, if not why, bytes, dtype.

    `bytes`: of one sample, 0 without a prefix. `values`: what was cut, by the names of the uncut graph.
    """

    cacheable: bool
    reason: str
    bytes: int = 0
    dtype: str = "float32"
    values: tuple[str, ...] = ()


NOTHING_FROZEN: Final = Features(False, "no frozen prefix")


@dataclass(frozen=True)
class Cut:
    """`prefix`: `d.x` in, `f.*` out, None where nothing worth a graph is frozen. `rest`: the forward graph behind it."""

    prefix: ir.Model | None
    rest: ir.Model
    features: Features

    @property
    def skips(self) -> bool:
        """Whether a connection passes the cut beside the main way: a chain has one feature."""
        return len(self.features.values) > 1


def cut(forward: ir.Model, example: Array) -> Cut:
    """Cut a forward graph (`d.x`, `p.*` in; one output) at its frozen frontier.

    Shapes must be inferred. On the `example` of `d.x` `[n, *shape]`, n of 2 or more, the rows of the prefix are tried for
    independence: only then are its features cacheable.
    """
    found = frontier(forward.graph)
    if not found:
        return Cut(None, forward, NOTHING_FROZEN)
    names = [str(value.name) for value in found]
    prefix, rest = _prefix(forward, names), _rest(forward, names)
    kinds = sorted({value.dtype.numpy().name for value in found if value.dtype is not None})
    reason = _why_not_cacheable(prefix, example)
    return Cut(
        prefix,
        rest,
        Features(not reason, reason, bytes_per_sample(found), kinds[0] if len(kinds) == 1 else "mixed", tuple(names)),
    )


def frontier(graph: ir.Graph) -> list[ir.Value]:
    """The values that a prefix of this forward graph would hand on, in its order; none where no prefix is worth it."""
    moving = _depending(graph, [v for v in graph.inputs if v.name != INPUT and _kind(v) != "r"])
    fixed = _depending(graph, [v for v in graph.inputs if v.name == INPUT or _kind(v) == "r"]) - moving
    found = _frontier(graph, moving, fixed)
    return found if _worth_it(graph, found, fixed) else []


def _kind(value: ir.Value) -> str:
    return str(value.name).split(".", 1)[0]


def _depending(graph: ir.Graph, sources: Iterable[ir.Value]) -> set[ir.Value]:
    """What follows from these values other than through the size of a batch."""
    found = set(sources)
    for node in graph:
        if not _reads_size(node) and any(value in found for value in node.inputs):
            found.update(node.outputs)
    return found


def _reads_size(node: ir.Node) -> bool:
    """Whether a node asks for the shape of a value `[batch, ...]`, which can be had without the value."""
    source = node.inputs[0] if node.op_type == "Shape" else None
    return source is not None and source.shape is not None and _is_batch(source)


def _is_batch(value: ir.Value) -> bool:
    sizes = dims(value)
    return len(sizes) > 0 and sizes[0] == BATCH and all(isinstance(size, int) for size in sizes[1:])


def _frontier(graph: ir.Graph, moving: set[ir.Value], fixed: set[ir.Value]) -> list[ir.Value]:
    """The features, in the order of the graph."""
    found = {
        value
        for node in graph
        if any(output in moving for output in node.outputs)
        for value in node.inputs
        if value in fixed
    }
    found = _handed_over(found, fixed)
    for value in list(found):
        if _follows(value, found - {value}, fixed):
            found.discard(value)
    # Reshapes and the like may be on either side: on the side where fewer bytes cross.
    found = {_smallest(value, fixed) for value in found}
    return [value for value in values(graph) if value in found]


def _handed_over(found: set[ir.Value], fixed: set[ir.Value]) -> set[ir.Value]:
    """What cannot be a feature is replaced by what it is made from: `[batch, ...]` of float32 or uint8 can."""
    waiting, kept = list(found), set()
    while waiting:
        value = waiting.pop()
        producer = value.producer()
        if producer is None or _can_cross(value):
            kept.add(value)
        else:
            waiting += [source for source in producer.inputs if source in fixed and source is not None]
    return kept


def _can_cross(value: ir.Value) -> bool:
    return value.shape is not None and value.dtype in (ir.DataType.FLOAT, ir.DataType.UINT8) and _is_batch(value)


def _follows(value: ir.Value, others: set[ir.Value], fixed: set[ir.Value]) -> bool:
    """Whether a value is a reshape or the like of other features, or one linear layer without activation away."""
    kinds: list[str] = []
    waiting, reached = [value], False
    while waiting:
        current = waiting.pop()
        if current in others:
            reached = True
            continue
        producer = current.producer()
        if producer is None:
            return False
        kinds.append(producer.op_type)
        bias = producer.op_type == "Add" and sum(source in fixed for source in producer.inputs) == 1
        if not (producer.op_type in _PRODUCTS or producer.op_type in _LIGHT or bias):
            return False
        waiting += [source for source in producer.inputs if source in fixed and source is not None]
    products = sum(kind in _PRODUCTS for kind in kinds)
    return reached and (products == 0 or (products == 1 and "Relu" not in kinds))


def _smallest(value: ir.Value, fixed: set[ir.Value]) -> ir.Value:
    best, current = value, value
    while (producer := current.producer()) is not None and producer.op_type in _MOVABLE:
        source = producer.inputs[0]
        if source is None or source not in fixed:
            break
        current = source
        if _can_cross(current) and bytes_per_sample([current]) < bytes_per_sample([best]):
            best = current
    return best


def _worth_it(graph: ir.Graph, frontier: Sequence[ir.Value], fixed: set[ir.Value]) -> bool:
    """A prefix without a product saves nothing; nor does one whose input is a feature itself."""
    if not frontier or any(value.is_graph_input() for value in frontier):
        return False
    below: set[ir.Value] = set(frontier)
    for node in reversed(list(graph)):
        if any(output in below for output in node.outputs):
            below.update(value for value in node.inputs if value in fixed and value is not None)
            if node.op_type in _PRODUCTS:
                return True
    return False


def _prefix(forward: ir.Model, names: Sequence[str]) -> ir.Model:
    model = clone(forward)
    graph = model.graph
    by_name = {str(value.name): value for value in values(graph)}
    graph.outputs[:] = [by_name[name] for name in names]
    for index, value in enumerate(graph.outputs):
        value.name = f"f.{index}"
    tidy(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    return model


def _rest(forward: ir.Model, names: Sequence[str]) -> ir.Model:
    model = clone(forward)
    graph = model.graph
    by_name = {str(value.name): value for value in values(graph)}
    features = []
    for index, name in enumerate(names):
        value = by_name[name]
        assert value.dtype is not None
        made = ir.Value(name=f"f.{index}", shape=ir.Shape(dims(value)), type=ir.TensorType(value.dtype))
        ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
        features.append(made)
    graph.inputs.extend(features)
    _rewire_shapes(graph, features)
    tidy(model)
    graph.inputs[:] = [value for value in graph.inputs if value.uses()]
    infer_shapes(model)
    return model


def _rewire_shapes(graph: ir.Graph, features: Sequence[ir.Value]) -> None:
    """Read the size of a batch off the first feature, where it was read off a value of the prefix."""
    frozen = _depending(graph, [value for value in graph.inputs if value.name == INPUT or _kind(value) == "r"])
    b = Builder(graph)
    b.scope = "cut"
    for node in list(graph):
        source = node.inputs[0] if _reads_size(node) else None
        if source is None or source not in frozen or not node.outputs[0].uses():
            continue
        sizes = dims(source)
        whole = b.op("Shape", features[0], start=0, end=1)
        if len(sizes) > 1:
            whole = b.op("Concat", whole, b.ints(*(int(size) for size in sizes[1:])), axis=0)
        first, last = attribute(node, "start", 0), attribute(node, "end")
        if first or last is not None:
            whole = b.op("Slice", whole, b.ints(first), b.ints(len(sizes) if last is None else last))
        ir.convenience.replace_all_uses_with(node.outputs[0], whole)


def _why_not_cacheable(prefix: ir.Model, example: Array) -> str:
    """Why the features of a sample may not be kept; empty if they depend on that sample and on nothing else."""
    if any(_kind(value) == "r" for value in prefix.graph.inputs):
        return "random views"
    for node in prefix.graph:
        if node.op_type == "DynamicQuantizeLinear":
            return f"node {node.name!r} (DynamicQuantizeLinear) takes its scale from the whole batch"
    return (
        ""
        if _rows_are_independent(prefix, example[:8])
        else "the features of a sample depend on the others in its batch"
    )


def _rows_are_independent(prefix: ir.Model, x: Array) -> bool:
    """Permute, repeat and scale the other rows of a batch: a row's features must stay."""
    model = clone(prefix)
    model.ir_version = 10
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    whole = session.run(None, {INPUT: x})
    last = len(x) - 1
    others = 10 * x[1:] + 1 if x.dtype.kind == "f" else np.roll(x[1:], 1)  # tokens are taken from where there are some
    tried = (
        (x[::-1], last),
        (x[:1], 0),
        (np.concatenate([x[:1], x[:1], x[1:]]), 1),
        (np.concatenate([x[:1], others]), 0),
    )
    for batch, row in tried:
        for expected, found in zip(whole, session.run(None, {INPUT: np.ascontiguousarray(batch)}), strict=True):
            wide = expected[0].astype(np.float64)
            if np.abs(found[row] - wide).max() > _ROW_TOLERANCE * max(np.abs(wide).max(), 1e-30):
                return False
    return True
