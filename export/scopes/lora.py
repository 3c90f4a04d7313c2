"""LoRA: beside a frozen weight W [m, n] a product of two small factors trains (Hu et al., arXiv 2106.09685, section 4.1).

    y = W x + s B A x        A [r, n] = lora_a,  B [m, r] = lora_b,  s = alpha / r,  or alpha / sqrt(r) (rank-stabilised:
                                                                     Kalajdzievski, arXiv 2312.03732, section 3)

A convolution's weight [m, c, k...] counts as [m, c k...]: A is a convolution with r channels, B one of kernel size 1. With
groups the product is added to the weight itself. Of torch's attention, whose three projections are one weight, `q_proj`,
`k_proj` and `v_proj` are layers of their own. A ~ U(-sqrt(3 / n), sqrt(3 / n)), B = 0, so that a new adapter changes
nothing. Adapters are float32 and outside every quantizer; the scale stands in the tensor table and nowhere else.

One factor may rest: it is then a constant that comes with the start of a task. So is the side term `L Q`, which the gateway
adds to a frozen weight whose file it cannot rewrite (docs/adr/side-terms.md).

Tensors of the model may train beside the adapters (`also_train`): new classes need the head. They merge by their mean.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.errors import SpecError, UnknownTensor, UnsupportedModel
from export.graph import Builder, attribute, dims, static
from export.scopes import Applied, Trainable
from export.scopes.modules import HeadScope, train_tensors
from export.shapes import infer_shapes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Layer:
    """A node with a frozen weight: `shape` (m, n); `weight` is the constant, `transposed` when it is stored as [n, m].

    The projections of torch's own attention are one weight [3 m, n]; each is a layer, `first` its first row.
    """

    name: str
    node: ir.Node
    weight: ir.Value
    shape: tuple[int, int]
    transposed: bool
    first: int = 0

    @property
    def rows(self) -> int:
        """Of the weight, which may hold more than this layer."""
        return self.shape[0] if self.transposed else static(self.weight)[0]


@dataclass(frozen=True)
class LoraScope:
    """Options: `rank` (4), `alpha` (twice the rank), `targets` (patterns of layer names).

    Without `targets`, the query and value projections of a transformer get adapters; of another network, every layer.
    `factors`: which train, "ab", "a" or "b". `side_rank`: capacity of a side term, 0 for none. `named_by_rank`: the tensors
    bear the rank in their names, so that programs of several ranks fit into one bundle. `scaling`: "standard" or
    "rank_stabilised". `also_train`: any of "head" (which then gets no adapter), "norm" and "bias".
    """

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] | None = None
    factors: str = "ab"
    side_rank: int = 0
    named_by_rank: bool = False
    scaling: str = "standard"
    also_train: tuple[str, ...] = ()

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """Check the options. Raises `SpecError`."""
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise SpecError(f"scope lora has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}")
        rank = options.get("rank", 4)
        if type(rank) is not int or rank < 1:
            raise SpecError(f"rank = {rank!r} of scope lora must be a whole number of 1 or more")
        alpha = options.get("alpha", 2.0 * rank)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise SpecError(f"alpha = {alpha!r} of scope lora must be a number above 0")
        targets = options.get("targets")
        if targets is not None and (isinstance(targets, str) or not targets):
            raise SpecError(f"targets = {targets!r} of scope lora must be a list of layer names or patterns")
        factors, side_rank = options.get("factors", "ab"), options.get("side_rank", 0)
        if factors not in ("ab", "a", "b"):
            raise SpecError(f'factors = {factors!r} of scope lora must be "ab", "a" or "b"')
        if type(side_rank) is not int or side_rank < 0:
            raise SpecError(f"side_rank = {side_rank!r} of scope lora must be a whole number of 0 or more")
        named_by_rank = options.get("named_by_rank", False)
        if type(named_by_rank) is not bool:
            raise SpecError(f"named_by_rank = {named_by_rank!r} of scope lora must be true or false")
        scaling = options.get("scaling", "standard")
        if scaling not in _SCALINGS:
            raise SpecError(f"scaling = {scaling!r} of scope lora must be one of {', '.join(_SCALINGS)}")
        also = options.get("also_train", ())
        if isinstance(also, str) or any(part not in _BESIDE for part in also):
            raise SpecError(f"also_train = {also!r} of scope lora must be a list of {', '.join(_BESIDE)}")
        patterns = None if targets is None else tuple(targets)
        beside = tuple(part for part in _BESIDE if part in also)
        return cls(rank, float(alpha), patterns, factors, side_rank, named_by_rank, scaling, beside)

    @property
    def label(self) -> str:
        """The rank, which factor trains if one rests, and what trains beside the adapters."""
        parts = [f"r{self.rank}", *([] if self.factors == "ab" else [self.factors])]
        return "/".join([*parts, *(["+".join(self.also_train)] if self.also_train else [])])

    @property
    def scale(self) -> float:
        """alpha / r, or alpha / sqrt(r)."""
        return self.alpha / (self.rank if self.scaling == "standard" else self.rank**0.5)

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:
        """Add an adapter to every target layer. Raises `UnknownTensor` for a pattern that matches none."""
        beside = self._beside(model, parameters)
        layers = _layers(model.graph, parameters)
        chosen = [layer for layer in self._targeted(layers) if layer.weight.name not in beside]
        if not chosen:
            raise SpecError("scope lora is left without a layer: what also_train trains takes no adapter")
        builder = Builder(model.graph)
        trainables: list[Trainable] = []
        constants: list[Trainable] = []
        for layer in chosen:
            m, n = layer.shape
            if self.rank * (m + n) >= m * n:
                log.warning(
                    "%s: an adapter of rank %d saves nothing over the weight [%d, %d]", layer.name, self.rank, m, n
                )
            a, b = self._factors(layer, seed)
            for part, held in (("a", a), ("b", b)):
                (trainables if part in self.factors else constants).append(held)
            side = self._side(layer)
            constants += side
            self._insert(builder, layer, (a, b), side)
        adapted = self._effective(chosen)
        own = train_tensors(model, beside).trainables
        model.graph.sort()
        infer_shapes(model)

        def effective(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
            return {**adapted(trained, frozen), **{name: trained[name] for name in beside}}

        return Applied((*trainables, *own), effective, tuple(constants))

    def _targeted(self, layers: Sequence[_Layer]) -> list[_Layer]:
        if self.targets is None:
            return [layer for layer in layers if layer.name.rpartition(".")[2] in _QUERY_AND_VALUE] or list(layers)
        for pattern in self.targets:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                raise UnknownTensor("target", pattern, [layer.name for layer in layers])
        return [layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, t) for t in self.targets)]

    def _beside(self, model: ir.Model, parameters: Sequence[str]) -> list[str]:
        """The model's own tensors that train, in the order of `parameters`. Raises `SpecError` for a kind it has none of."""
        found = {
            "head": lambda: HeadScope.tensors(model.graph, parameters),
            "norm": lambda: _normalizations(model.graph, parameters),
            "bias": lambda: _biases(model.graph, parameters),
        }
        chosen: set[str] = set()
        for part in self.also_train:
            names = found[part]()
            if not names:
                raise SpecError(f"also_train of scope lora names {part!r}, and the model has no such tensor")
            chosen.update(names)
        return [name for name in parameters if name in chosen]

    def _factors(self, layer: _Layer, seed: int) -> list[Trainable]:
        m, n = layer.shape
        key = hashlib.sha256(f"{seed}/{layer.name}".encode()).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        bound = (3.0 / n) ** 0.5
        a = draw.uniform(-bound, bound, (self.rank, n)).astype(np.float32)
        pairs: tuple[tuple[str, Array], ...] = (("lora_a", a), ("lora_b", np.zeros((m, self.rank), np.float32)))
        return [
            Trainable(self._named(layer, part), value, part, layer.name, self.scale, self.rank, (m, n))
            for part, value in pairs
        ]

    def _named(self, layer: _Layer, part: str) -> str:
        return f"{layer.name}.r{self.rank}.{part}" if self.named_by_rank else f"{layer.name}.{part}"

    def _side(self, layer: _Layer) -> list[Trainable]:
        """The side term, zero in a new job: L [m, q], Q [q, n]."""
        if self.side_rank == 0:
            return []
        m, n = layer.shape
        shapes = {"side_l": (m, self.side_rank), "side_q": (self.side_rank, n)}
        return [
            Trainable(f"{layer.name}.{part}", np.zeros(shape, np.float32), part, layer.name, None, None, (m, n), "c")
            for part, shape in shapes.items()
        ]

    def _insert(
        self, b: Builder, layer: _Layer, factors: tuple[Trainable, Trainable], side: Sequence[Trainable]
    ) -> None:
        """Add `s B A x`, and `L Q x` where there is a side term, to what the layer gives."""
        node = layer.node
        y = node.outputs[0]
        b.scope = f"lora/{layer.name}"
        a_side, b_side = factors
        terms = [(self._input(b, b_side), self._input(b, a_side), self.scale)]
        if side:
            terms.append((self._input(b, side[0]), self._input(b, side[1]), 1.0))
        if layer.rows > layer.shape[0]:
            after = layer.rows - layer.first - layer.shape[0]
            pads = b.ints(layer.first, 0, after, 0)
            terms = [(b.op("Pad", left, pads), right, scale) for left, right, scale in terms]
        if node.op_type == "Conv" and attribute(node, "group", 1) != 1:
            weight = layer.weight
            for left, right, scale in terms:
                product = b.op("MatMul", left, right)
                product = product if scale == 1.0 else b.op("Mul", product, scale)
                weight = b.op("Add", weight, b.op("Reshape", product, b.ints(*static(layer.weight))))
            node.replace_input_with(1, weight)
            return
        added = [_thin(b, layer, left, right, scale) for left, right, scale in terms]
        users = list(y.uses())
        adapted = y
        for term in added:
            adapted = b.op("Add", adapted, term)
        for user, index in users:
            user.replace_input_with(index, adapted)
        graph = b.graph
        for index, output in enumerate(graph.outputs):
            if output is y:
                adapted.name, y.name = y.name, f"{y.name}.base"
                adapted.shape, adapted.type = y.shape, y.type
                graph.outputs[index] = adapted

    def _input(self, b: Builder, held: Trainable) -> ir.Value:
        return b.input(held.graph_name, "float32", held.value.shape)

    def _effective(self, layers: Sequence[_Layer]) -> Any:
        # The graph may rename the weight later, or take its shape away.
        facts = [(layer, str(layer.weight.name), layer.rows) for layer in layers]

        def effective(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
            held = {**frozen, **trained}
            values: dict[str, Any] = {}
            for layer, weight, rows in facts:
                product = (held[self._named(layer, "lora_b")] @ held[self._named(layer, "lora_a")]) * self.scale
                if self.side_rank:
                    product = product + held[f"{layer.name}.side_l"] @ held[f"{layer.name}.side_q"]
                original = values.get(weight, held[weight])
                if rows > layer.shape[0]:
                    values[weight] = original * 1
                    values[weight][layer.first : layer.first + layer.shape[0]] += product
                else:
                    values[weight] = original + (product.T if layer.transposed else product.reshape(original.shape))
            return values

        return effective


_OPTIONS = ("rank", "alpha", "targets", "factors", "side_rank", "named_by_rank", "scaling", "also_train")
_SCALINGS = ("standard", "rank_stabilised")
_BESIDE = ("head", "norm", "bias")
_QUERY_AND_VALUE = ("q", "v", "q_proj", "v_proj", "query", "value", "q_lin", "v_lin", "wq", "wv")
_NORMALIZATIONS = ("LayerNormalization", "BatchNormalization", "GroupNormalization", "InstanceNormalization")


def _thin(b: Builder, layer: _Layer, left: ir.Value, right: ir.Value, scale: float) -> ir.Value:
    """`scale left right x` by two thin products, left [m, r], right [r, n]: the product of the factors is never formed."""
    node = layer.node
    x = node.inputs[0]
    assert x is not None

    def scaled(value: ir.Value) -> ir.Value:
        return value if scale == 1.0 else b.op("Mul", value, scale)

    if node.op_type == "Conv":
        kernel = static(layer.weight)[1:]
        (rank, _), (m, _) = static(right), static(left)
        geometry = {k: v.value for k, v in node.attributes.items() if k in _GEOMETRY}
        down = b.op("Conv", x, b.op("Reshape", right, b.ints(rank, *kernel)), **geometry)
        return b.op("Conv", scaled(down), b.op("Reshape", left, b.ints(m, rank, *[1] * (len(kernel) - 1))))
    if len(dims(x)) == 2 and not attribute(node, "transA", 0):
        return b.op("Gemm", scaled(b.op("Gemm", x, right, transB=1)), left, transB=1)
    if node.op_type == "MatMul":
        down = b.op("MatMul", x, b.op("Transpose", right, perm=[1, 0]))
        return b.op("MatMul", scaled(down), b.op("Transpose", left, perm=[1, 0]))
    raise UnsupportedModel(f"node {node.name!r} (Gemm with transA = 1) takes no adapter")


_PACKED = "in_proj_weight"  # of torch.nn.MultiheadAttention: q, k and v below one another
_GEOMETRY = ("strides", "pads", "dilations", "kernel_shape", "auto_pad")


def _layers(graph: ir.Graph, parameters: Sequence[str]) -> list[_Layer]:
    layers: list[_Layer] = []
    for node in graph:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        weight = node.inputs[1]
        assert weight is not None
        producer = weight.producer()
        through = producer is not None and producer.op_type == "Transpose"
        source = producer.inputs[0] if producer is not None and through else weight
        if source is None or source.name not in parameters:
            continue
        sizes = static(source)
        if node.op_type == "Conv":
            shape, transposed = (sizes[0], int(np.prod(sizes[1:]))), False
        elif len(sizes) != 2:
            continue
        else:
            transposed = not (through or (node.op_type == "Gemm" and bool(attribute(node, "transB", 0))))
            shape = (sizes[1], sizes[0]) if transposed else (sizes[0], sizes[1])
        name = re.sub(r"[^A-Za-z0-9_.]", "_", str(source.name).removesuffix(".weight"))
        if any(layer.weight is source for layer in layers):
            raise UnsupportedModel(f"weight {source.name!r} is used by two nodes: a shared weight takes no adapter")
        if name.endswith(_PACKED) and not transposed and shape[0] % 3 == 0:
            m = shape[0] // 3
            stem = name.removesuffix(_PACKED)
            parts = enumerate(("q_proj", "k_proj", "v_proj"))
            layers += [_Layer(f"{stem}{part}", node, source, (m, shape[1]), False, i * m) for i, part in parts]
            continue
        layers.append(_Layer(name, node, source, shape, transposed))
    return layers


def _normalizations(graph: ir.Graph, parameters: Sequence[str]) -> list[str]:
    """Scales and shifts of normalizations; running statistics stay."""
    read = [value for node in graph if node.op_type in _NORMALIZATIONS for value in list(node.inputs)[1:3]]
    return [str(value.name) for value in read if value is not None and value.name in parameters]


def _biases(graph: ir.Graph, parameters: Sequence[str]) -> list[str]:
    """Biases of convolutions and linear layers: the third input, or what is added to a product."""
    found = []
    for node in graph:
        inputs = list(node.inputs)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            found += inputs[2:3]
        elif node.op_type == "Add":
            makers = [None if value is None else value.producer() for value in inputs]
            if any(maker is not None and maker.op_type == "MatMul" for maker in makers):
                found += [value for value in inputs if value is not None and len(dims(value)) == 1]
    return [str(value.name) for value in found if value is not None and value.name in parameters]
