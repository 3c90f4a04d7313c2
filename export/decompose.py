"""Takes operators without a gradient rule apart into operators that have one (step-graphs.md, 3.4).

Only what lies between the trained tensors and the loss is rewritten: elsewhere the runtime's own kernel is the faster one.
A decomposition is a function of the builder and the node that returns one value per output; what it does not cover it
leaves, by raising `UnsupportedAttribute`, for the error that names all such nodes. Recurrent layers are unrolled in
`recurrent`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.gradients import Path, UnsupportedAttribute, path_between, rules
from export.graph import IR_VERSION, Builder, array_of, attribute, dims, given, reshaped, static
from export.rules.normalization import inverse_deviation
from export.rules.windows import Window, window_of
from export.shapes import infer_shapes

Decomposition = Callable[[Builder, ir.Node], Sequence[ir.Value | None]]
DECOMPOSITIONS: Final[dict[str, Decomposition]] = {}


def decomposition(*op_types: str) -> Callable[[Decomposition], Decomposition]:
    """Register how operators are taken apart."""

    def register(function: Decomposition) -> Decomposition:
        DECOMPOSITIONS.update(dict.fromkeys(op_types, function))
        return function

    return register


def decompose(builder: Builder, loss: ir.Value, wrt: Iterable[ir.Value]) -> None:
    """Rewrite the builder's graph until every operator between `wrt` and `loss` has a rule, or cannot be taken apart."""
    from export import recurrent  # noqa: F401 - registers LSTM and GRU

    trained, model = list(wrt), ir.Model(builder.graph, ir_version=IR_VERSION)
    refused: set[ir.Node] = set()
    infer_shapes(model)
    if _fold_norms(builder, path_between(builder.graph, trained, loss)):
        builder.graph.sort()
        infer_shapes(model)
    while True:
        path = path_between(builder.graph, trained, loss)
        waiting = [
            node
            for node in path.nodes
            if _is_compound(node, path) and node.op_type in DECOMPOSITIONS and node not in refused
        ]
        if not waiting:
            return
        for node in waiting:
            builder.scope = str(node.name)
            try:
                _replace(builder, node, DECOMPOSITIONS[node.op_type](builder, node))
            except UnsupportedAttribute:
                refused.add(node)
        builder.graph.sort()
        infer_shapes(model)


def _is_compound(node: ir.Node, path: Path) -> bool:
    """No rule of its own; or one for another form of it; or a slower one."""
    return (
        node.op_type not in rules()
        or (node.op_type == "BatchNormalization" and bool(attribute(node, "training_mode", 0)))
        or (node.op_type in ("Max", "Min") and len(node.inputs) != 2)
        or (node.op_type == "Conv" and node.inputs[1] in path.relevant)
    )


def _fold_norms(b: Builder, path: Path) -> bool:
    """Let a convolution do what the inference-form norm behind it does: three passes over the map less in each direction.

        norm(conv(x, w) + bias) = conv(x, w a) + (bias - mean) a + beta,    a = gamma / sqrt(variance + epsilon)

    a stays part of the graph, so that w, gamma and beta may each be trained. A weight that is computed (as those of an
    integer base are) keeps its norm, as does one that rests while gamma trains: its gradient would be that of a whole
    convolution. Says whether there was such a pair.
    """
    folded = False
    for norm in path.nodes:
        conv = (
            norm.inputs[0].producer() if norm.op_type == "BatchNormalization" and norm.inputs[0] is not None else None
        )
        if conv is None or not _takes_norm(b, conv, norm, path):
            continue
        gamma, beta, mean = (given(norm, index) for index in range(1, 4))
        weight = given(conv, 1)
        b.scope = str(norm.name)
        a = b.op("Mul", gamma, inverse_deviation(b, norm))
        scaled = b.op("Mul", weight, b.op("Reshape", a, b.ints(-1, *[1] * (len(dims(weight)) - 1))))
        bias = conv.inputs[2] if len(conv.inputs) > 2 else None
        centred = b.op("Neg", mean) if bias is None else b.op("Sub", bias, mean)
        moved = b.op("Add", b.op("Mul", centred, a), beta)
        kept = {str(held.name): held.value for held in conv.attributes.values()}
        y = b.op("Conv", given(conv, 0), scaled, moved, **kept)
        _replace(b, norm, [y])
        b.graph.remove(conv, safe=True)
        folded = True
    return folded


def _takes_norm(b: Builder, conv: ir.Node, norm: ir.Node, path: Path) -> bool:
    """A convolution with a given weight whose only reader is a norm in inference form."""
    y = conv.outputs[0]
    return (
        conv.op_type == "Conv"
        and given(conv, 1).producer() is None
        and len(list(y.uses())) == 1
        and y not in b.graph.outputs
        and not attribute(norm, "training_mode", 0)
        and (given(conv, 1) in path.relevant or given(norm, 1) not in path.relevant)
        and not any(given(norm, index) in path.relevant for index in (3, 4))
    )


def _replace(builder: Builder, node: ir.Node, results: Sequence[ir.Value | None]) -> None:
    for old, new in zip(node.outputs, results, strict=False):
        if new is None:
            continue
        new.shape, new.type = new.shape or old.shape, new.type or old.type
        for user, index in list(old.uses()):
            user.replace_input_with(index, new)
        for index, output in enumerate(builder.graph.outputs):
            if output is old:
                name, old.name = old.name, f"{old.name}~"
                new.name = name
                builder.graph.outputs[index] = new
    builder.graph.remove(node, safe=True)


# Activations.


@decomposition("Elu", "Selu", "Celu")
def _elu(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """gamma * (max(x, 0) + alpha * (exp(min(x, 0) / width) - 1)); the exponential never sees a positive number."""
    x = given(node, 0)
    default = {"Elu": 1.0, "Selu": 1.67326319217681884765625, "Celu": 1.0}[node.op_type]
    alpha = float(attribute(node, "alpha", default))
    below = b.op("Neg", b.op("Relu", b.op("Neg", x)))
    if node.op_type == "Celu":
        below = b.op("Div", below, alpha)
    y = b.op("Add", b.op("Relu", x), b.op("Mul", b.op("Sub", b.op("Exp", below), 1.0), alpha))
    if node.op_type == "Selu":
        y = b.op("Mul", y, float(attribute(node, "gamma", 1.05070102214813232421875)))
    return (y,)


@decomposition("Mish")
def _mish(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """x * tanh(softplus(x))."""
    x = given(node, 0)
    return (b.op("Mul", x, b.op("Tanh", b.op("Softplus", x))),)


@decomposition("Softsign")
def _softsign(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """x / (1 + |x|)."""
    x = given(node, 0)
    return (b.op("Div", x, b.op("Add", b.op("Abs", x), 1.0)),)


@decomposition("PRelu")
def _prelu(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """max(x, 0) - slope * max(-x, 0), the slope trained or not."""
    x = given(node, 0)
    return (b.op("Sub", b.op("Relu", x), b.op("Mul", given(node, 1), b.op("Relu", b.op("Neg", x)))),)


@decomposition("ThresholdedRelu")
def _thresholded_relu(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """x where x > alpha, else 0."""
    x = given(node, 0)
    return (b.op("Where", b.op("Greater", x, float(attribute(node, "alpha", 1.0))), x, 0.0),)


# Sums and reductions.


@decomposition("Sum", "Mean", "Max", "Min")
def _variadic(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """Two operands at a time."""
    operator = {"Sum": "Add", "Mean": "Add"}.get(node.op_type, node.op_type)
    total = given(node, 0)
    for index in range(1, len(node.inputs)):
        total = b.op(operator, total, given(node, index))
    if node.op_type == "Mean":
        total = b.op("Div", total, float(len(node.inputs)))
    return (total if total is not given(node, 0) else b.op("Identity", total),)


@decomposition("ReduceL1", "ReduceSumSquare", "ReduceLogSum", "ReduceMin")
def _reduction(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """sum |x|; sum x^2; log sum x; -max(-x)."""
    x = given(node, 0)
    kept = {name: held.value for name, held in node.attributes.items()}
    axes = list(node.inputs)[1:]
    if node.op_type == "ReduceL1":
        return (b.op("ReduceSum", b.op("Abs", x), *axes, **kept),)
    if node.op_type == "ReduceSumSquare":
        return (b.op("ReduceSum", b.op("Mul", x, x), *axes, **kept),)
    if node.op_type == "ReduceLogSum":
        return (b.op("Log", b.op("ReduceSum", x, *axes, **kept)),)
    return (b.op("Neg", b.op("ReduceMax", b.op("Neg", x), *axes, **kept)),)


@decomposition("GlobalMaxPool")
def _global_max_pool(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """The maximum over the spatial axes."""
    x = given(node, 0)
    return (b.op("ReduceMax", x, b.ints(*range(2, len(dims(x)))), keepdims=1),)


# Normalizations.


@decomposition("GroupNormalization", "InstanceNormalization")
def _group_normalization(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """(x - mean) / sqrt(variance + epsilon) over each group of channels and all places; scale and bias per channel."""
    x = given(node, 0)
    channels, *places = static(x, 1)
    groups = attribute(node, "num_groups", channels)
    apart = b.op("Reshape", x, b.ints(0, groups, channels // groups * math.prod(places)))
    normal = reshaped(b, _normalized(b, apart, b.ints(2), float(attribute(node, "epsilon", 1e-5))), x)
    column = b.ints(-1, *[1] * len(places))
    scale, bias = (b.op("Reshape", given(node, index), column) for index in (1, 2))
    return (b.op("Add", b.op("Mul", normal, scale), bias),)


@decomposition("MeanVarianceNormalization")
def _mean_variance_normalization(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """(x - mean) / (deviation + 1e-9), as the operator is defined."""
    x = given(node, 0)
    axes = b.ints(*attribute(node, "axes", [0, 2, 3]))
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes, keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=1)
    return (b.op("Div", centred, b.op("Add", b.op("Sqrt", variance), 1e-9)),)


def _normalized(b: Builder, x: ir.Value, axes: ir.Value, epsilon: float) -> ir.Value:
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes, keepdims=1))
    variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=1)
    return b.op("Div", centred, b.op("Sqrt", b.op("Add", variance, epsilon)))


@decomposition("BatchNormalization")
def _batch_normalization(b: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """Training form: statistics of this batch, and the running ones moved towards them (Ioffe and Szegedy, arXiv 1502.03167).

    running' = momentum * running + (1 - momentum) * batch, the variance without Bessel's correction.
    """
    x, scale, bias, mean, variance = (given(node, index) for index in range(5))
    rank = len(dims(x))
    column, axes = b.ints(-1, *[1] * (rank - 2)), b.ints(0, *range(2, rank))
    momentum = float(attribute(node, "momentum", 0.9))
    batch_mean = b.op("ReduceMean", x, axes, keepdims=1)
    centred = b.op("Sub", x, batch_mean)
    batch_variance = b.op("ReduceMean", b.op("Mul", centred, centred), axes, keepdims=1)
    normal = b.op("Div", centred, b.op("Sqrt", b.op("Add", batch_variance, float(attribute(node, "epsilon", 1e-5)))))
    y = b.op("Add", b.op("Mul", normal, b.op("Reshape", scale, column)), b.op("Reshape", bias, column))
    results: list[ir.Value | None] = [y]
    for running, current in ((mean, batch_mean), (variance, batch_variance)):
        moved = b.op("Mul", b.op("Reshape", current, b.ints(-1)), 1 - momentum)
        results.append(b.op("Add", b.op("Mul", running, momentum), moved))
    return results[: len(node.outputs)]


# Losses.


@decomposition("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
def _cross_entropy(b: Builder, node: ir.Node) -> Sequence[ir.Value | None]:
    """-weight_y * log p_y, its sum, or its sum over that of the weights; p by softmax along axis 1, or given."""
    scores, labels = given(node, 0), given(node, 1)
    classes = static(scores, 1)[0]
    softmax = node.op_type == "SoftmaxCrossEntropyLoss"
    log_p = b.op("LogSoftmax", scores, axis=1) if softmax else scores
    mark = b.op("OneHot", labels, b.const(np.array(classes)), b.const(np.array([0, 1], np.float32)), axis=1)
    ignored = attribute(node, "ignore_index")
    if ignored is not None:
        seen = b.op("Cast", b.op("Not", b.op("Equal", labels, b.const(np.array(ignored)))), to=ir.DataType.FLOAT.value)
        mark = b.op("Mul", mark, b.op("Unsqueeze", seen, b.ints(1)))
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        column = b.ints(-1, *[1] * (len(dims(scores)) - 2))
        mark = b.op("Mul", mark, b.op("Reshape", node.inputs[2], column))
    each = b.op("Neg", b.op("ReduceSum", b.op("Mul", log_p, mark), b.ints(1), keepdims=0))
    reduction = attribute(node, "reduction", "mean")
    result = each if reduction == "none" else b.op("ReduceSum", each, keepdims=0)
    if reduction == "mean":
        result = b.op("Div", result, b.op("ReduceSum", mark, keepdims=0))
    return (result, log_p) if softmax and len(node.outputs) > 1 else (result,)


# Products and places.


@decomposition("Einsum")
def _einsum(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """A sum of products of two operands is a MatMul between transpositions; of one operand, a sum and a transposition."""
    equation = str(attribute(node, "equation")).replace(" ", "")
    terms, arrow, result = equation.partition("->")
    operands = terms.split(",")
    letters = "".join(operands)
    if not arrow:
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    if "." in equation or len(operands) > 2 or any(len(set(term)) < len(term) for term in (*operands, result)):
        raise UnsupportedAttribute(f"equation = {equation}")
    values = [given(node, index) for index in range(len(operands))]
    sizes = {
        letter: size
        for term, value in zip(operands, values, strict=True)
        for letter, size in zip(term, dims(value), strict=True)
    }
    for index, term in enumerate(operands):
        alone = [letter for letter in term if letters.count(letter) == 1 and letter not in result]
        if alone:
            values[index] = b.op("ReduceSum", values[index], b.ints(*(term.index(a) for a in alone)), keepdims=0)
            operands[index] = "".join(letter for letter in term if letter not in alone)
    if len(operands) == 1:
        return (_ordered(b, values[0], operands[0], result),)
    first, second = operands
    shared = "".join(letter for letter in first if letter in second and letter in result)
    inner = "".join(letter for letter in first if letter in second and letter not in result)
    rows, columns = ("".join(letter for letter in term if letter not in shared + inner) for term in (first, second))
    left = _merged(b, _ordered(b, values[0], first, shared + rows + inner), (shared, rows, inner), sizes)
    right = _merged(b, _ordered(b, values[1], second, shared + inner + columns), (shared, inner, columns), sizes)
    product = b.op("MatMul", left, right)
    whole = _shaped(b, product, shared + rows + columns, len(shared), sizes)
    return (_ordered(b, whole, shared + rows + columns, result),)


def _ordered(b: Builder, value: ir.Value, found: str, wanted: str) -> ir.Value:
    return value if found == wanted else b.op("Transpose", value, perm=[found.index(letter) for letter in wanted])


def _merged(b: Builder, value: ir.Value, groups: tuple[str, str, str], sizes: dict[str, int | str]) -> ir.Value:
    """Leading axes kept, the two groups behind them one axis each."""
    if all(len(group) == 1 for group in groups[1:]):
        return value
    kept = [0] * len(groups[0])
    return b.op("Reshape", value, b.ints(*kept, *(_product(group, sizes) for group in groups[1:])))


def _shaped(b: Builder, value: ir.Value, letters: str, kept: int, sizes: dict[str, int | str]) -> ir.Value:
    return b.op("Reshape", value, b.ints(*[0] * kept, *(_product(letter, sizes) for letter in letters[kept:])))


def _product(letters: str, sizes: dict[str, int | str]) -> int:
    """The elements of a group of axes; -1 where the batch is among them."""
    known = [sizes[letter] for letter in letters]
    return -1 if any(isinstance(size, str) for size in known) else math.prod(int(size) for size in known)


@decomposition("Conv")
def _depthwise(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """A trained depth-wise convolution: of a small map as products, of a narrow one along its longer axis.

    The runtime has its fast kernel for constant weights only, and another for these that copies row by row.
    """
    x, w = given(node, 0), given(node, 1)
    channels, *sizes = static(x, 1)
    out, inner, *kernel = static(w)
    if not out == channels == attribute(node, "group", 1) or inner != 1:
        raise UnsupportedAttribute("channels that are mixed")
    outs = static(node.outputs[0], 2)
    if math.prod(sizes) * math.prod(outs) <= _SMALL_MAP:
        return (_as_products(b, node, window_of(node, kernel), sizes, outs),)
    if len(sizes) == 2 and 2 * sizes[1] <= sizes[0]:
        return (_turned(b, node, window_of(node, kernel)),)
    raise UnsupportedAttribute("a map that is neither small nor narrow")


def _as_products(b: Builder, node: ir.Node, window: Window, sizes: Sequence[int], outs: Sequence[int]) -> ir.Value:
    """Per channel one product with a matrix `[places, places out]`: the kernel, laid out by a constant."""
    x, w = given(node, 0), given(node, 1)
    channels, places = static(x, 1)[0], math.prod(sizes)
    flat = b.op("Reshape", w, b.ints(channels, math.prod(window.kernel)))
    laid_out = b.op("MatMul", flat, b.const(_laid_out(window, sizes, outs)))
    matrix = b.op("Reshape", laid_out, b.ints(channels, places, math.prod(outs)))
    rows = b.op("Transpose", b.op("Reshape", x, b.ints(-1, channels, places)), perm=[1, 0, 2])
    y = b.op("Transpose", b.op("MatMul", rows, matrix), perm=[1, 0, 2])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        y = b.op("Add", y, b.op("Reshape", node.inputs[2], b.ints(channels, 1)))
    return b.op("Reshape", y, b.ints(-1, channels, *outs))


def _turned(b: Builder, node: ir.Node, window: Window) -> ir.Value:
    """Height and width exchanged before, and again behind."""
    turn = [0, 1, 3, 2]
    x, w = (b.op("Transpose", given(node, index), perm=turn) for index in (0, 1))
    turned = window.turned
    y = b.op(
        "Conv",
        x,
        w,
        *list(node.inputs)[2:],
        group=attribute(node, "group"),
        strides=list(turned.strides),
        pads=list(turned.pads),
        dilations=list(turned.dilations),
    )
    return b.op("Transpose", y, perm=turn)


_SMALL_MAP = 6000  # places of the input times places of the output


def _laid_out(window: Window, sizes: Sequence[int], outs: Sequence[int]) -> Array:
    """float32 `[taps, places of the input * places of the output]`: 1 where a tap takes an input place to an output place."""
    result = np.zeros((*window.kernel, *sizes, *outs), np.float32)
    for tap in np.ndindex(*window.kernel):
        for place in np.ndindex(*outs):
            seen = [
                n * s + t * d - begin
                for n, s, t, d, begin in zip(place, window.strides, tap, window.dilations, window.begins, strict=True)
            ]
            if all(0 <= at < size for at, size in zip(seen, sizes, strict=True)):
                result[(*tap, *seen, *place)] = 1
    return result.reshape(math.prod(window.kernel), -1)


@decomposition("DepthToSpace", "SpaceToDepth")
def _blocks(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """Blocks of k x k places become channels, or channels such blocks."""
    x, k = given(node, 0), attribute(node, "blocksize")
    channels, height, width = static(x, 1)
    if node.op_type == "SpaceToDepth":
        apart = b.op("Reshape", x, b.ints(-1, channels, height // k, k, width // k, k))
        turned = b.op("Transpose", apart, perm=[0, 3, 5, 1, 2, 4])
        return (b.op("Reshape", turned, b.ints(-1, channels * k * k, height // k, width // k)),)
    inner = channels // (k * k)
    if attribute(node, "mode", "DCR") == "DCR":
        apart = b.op("Reshape", x, b.ints(-1, k, k, inner, height, width))
        turned = b.op("Transpose", apart, perm=[0, 3, 4, 1, 5, 2])
    else:
        apart = b.op("Reshape", x, b.ints(-1, inner, k, k, height, width))
        turned = b.op("Transpose", apart, perm=[0, 1, 4, 2, 5, 3])
    return (b.op("Reshape", turned, b.ints(-1, inner, height * k, width * k)),)


@decomposition("Tile")
def _tile(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """Each axis preceded by one of size 1, which is repeated, and joined with it."""
    x = given(node, 0)
    repeats = array_of(given(node, 1))
    sizes = dims(x)
    if repeats is None or any(isinstance(size, str) and count != 1 for size, count in zip(sizes, repeats, strict=True)):
        raise UnsupportedAttribute("repeats that are computed or of the batch")
    pairs = [(int(count), -1 if isinstance(size, str) else size) for count, size in zip(repeats, sizes, strict=True)]
    apart = b.op("Reshape", x, b.ints(*(part for _, size in pairs for part in (1, size))))
    wide = b.op("Expand", apart, b.ints(*(part for count, _ in pairs for part in (count, 1))))
    return (b.op("Reshape", wide, b.ints(*(-1 if size == -1 else count * size for count, size in pairs))),)


@decomposition("CastLike")
def _cast_like(b: Builder, node: ir.Node) -> Sequence[ir.Value]:
    """A Cast to the type of the second operand."""
    kind = given(node, 1).dtype
    assert kind is not None
    return (b.op("Cast", given(node, 0), to=kind.value),)
