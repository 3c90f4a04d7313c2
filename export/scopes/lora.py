"""LoRA: beside a frozen weight W [m, n] a product of two small factors trains (Hu et al., arXiv 2106.09685, section 4.1).

    y = W x + s B A x        A [r, n] = lora_a,  B [m, r] = lora_b,  s = alpha / r

A convolution's weight [m, c, k...] counts as [m, c k...]: A is a convolution with r channels, B one of kernel size 1. With
groups the product is added to the weight itself. Of torch's attention, whose three projections are one weight, `q_proj`,
`k_proj` and `v_proj` are layers of their own. A ~ U(-sqrt(3 / n), sqrt(3 / n)), B = 0, so that a new adapter changes
nothing. Adapters are float32 and outside every quantizer; the scale stands in the tensor table and nowhere else.
"""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import onnx_ir as ir

from edge_sdk.tensors import Array
from export.errors import SpecError, UnknownTensor, UnsupportedModel
from export.graph import Builder, attribute, dims, static
from export.scopes import Applied, Trainable
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
    def is_part(self) -> bool:
        """Whether the layer is some rows of its weight."""
        return not self.transposed and self.shape[0] != static(self.weight)[0]


@dataclass(frozen=True)
class LoraScope:
    """Options: `rank` (4), `alpha` (twice the rank), `targets` (patterns of layer names; all by default)."""

    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = ("*",)
    factors: ClassVar[str] = "ab"

    @classmethod
    def create(cls, options: Mapping[str, Any]) -> Self:
        """Check the options. Raises `SpecError`."""
        unknown = sorted(set(options) - {"rank", "alpha", "targets"})
        if unknown:
            raise SpecError(f"scope lora has no option {unknown[0]!r}; it has rank, alpha, targets")
        rank = options.get("rank", 4)
        if type(rank) is not int or rank < 1:
            raise SpecError(f"rank = {rank!r} of scope lora must be a whole number of 1 or more")
        alpha = options.get("alpha", 2.0 * rank)
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf"):
            raise SpecError(f"alpha = {alpha!r} of scope lora must be a number above 0")
        targets = options.get("targets", ("*",))
        if isinstance(targets, str) or not targets:
            raise SpecError(f"targets = {targets!r} of scope lora must be a list of layer names or patterns")
        return cls(rank, float(alpha), tuple(targets))

    @property
    def label(self) -> str:
        """The rank."""
        return f"r{self.rank}"

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    def apply(self, model: ir.Model, parameters: Sequence[str], seed: int) -> Applied:
        """Add an adapter to every target layer. Raises `UnknownTensor` for a pattern that matches none."""
        layers = _layers(model.graph, parameters)
        chosen = [layer for layer in layers if any(fnmatch.fnmatchcase(layer.name, t) for t in self.targets)]
        for pattern in self.targets:
            if not any(fnmatch.fnmatchcase(layer.name, pattern) for layer in layers):
                raise UnknownTensor("target", pattern, [layer.name for layer in layers])
        builder = Builder(model.graph)
        trainables: list[Trainable] = []
        for layer in chosen:
            m, n = layer.shape
            if self.rank * (m + n) >= m * n:
                log.warning(
                    "%s: an adapter of rank %d has no fewer numbers than the weight [%d, %d]",
                    layer.name,
                    self.rank,
                    m,
                    n,
                )
            trainables += self._factors(layer, seed)
            self._insert(builder, layer)
        model.graph.sort()
        infer_shapes(model)
        return Applied(tuple(trainables), self._effective(chosen))

    def _factors(self, layer: _Layer, seed: int) -> list[Trainable]:
        m, n = layer.shape
        key = hashlib.sha256(f"{seed}/{layer.name}".encode()).digest()
        draw = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
        bound = (3.0 / n) ** 0.5
        a = draw.uniform(-bound, bound, (self.rank, n)).astype(np.float32)
        pairs: tuple[tuple[str, Array], ...] = (("lora_a", a), ("lora_b", np.zeros((m, self.rank), np.float32)))
        return [
            Trainable(f"{layer.name}.{part}", value, part, layer.name, self.scale, self.rank, (m, n))
            for part, value in pairs
        ]

    def _insert(self, b: Builder, layer: _Layer) -> None:
        m, n = layer.shape
        node, rank = layer.node, self.rank
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        b.scope = f"lora/{layer.name}"
        lora_a = b.input(f"p.{layer.name}.lora_a", "float32", (rank, n))
        lora_b = b.input(f"p.{layer.name}.lora_b", "float32", (m, rank))
        if layer.is_part:
            rest = static(layer.weight)[0] - m - layer.first
            lora_b = b.op("Pad", lora_b, b.ints(layer.first, 0, rest, 0))
        if node.op_type == "Conv" and attribute(node, "group", 1) != 1:
            product = b.op("Mul", b.op("MatMul", lora_b, lora_a), self.scale)
            weight = b.op("Add", layer.weight, b.op("Reshape", product, b.ints(*static(layer.weight))))
            node.replace_input_with(1, weight)
            return
        if node.op_type == "Conv":
            kernel = static(layer.weight)[1:]
            geometry = {k: v.value for k, v in node.attributes.items() if k in _GEOMETRY}
            down = b.op("Conv", x, b.op("Reshape", lora_a, b.ints(rank, *kernel)), **geometry)
            point = b.op("Reshape", lora_b, b.ints(m, rank, *[1] * (len(kernel) - 1)))
            added = b.op("Conv", b.op("Mul", down, self.scale), point)
        elif len(dims(x)) == 2 and not attribute(node, "transA", 0):
            down = b.op("Mul", b.op("Gemm", x, lora_a, transB=1), self.scale)
            added = b.op("Gemm", down, lora_b, transB=1)
        elif node.op_type == "MatMul":
            down = b.op("MatMul", x, b.op("Transpose", lora_a, perm=[1, 0]))
            added = b.op("MatMul", b.op("Mul", down, self.scale), b.op("Transpose", lora_b, perm=[1, 0]))
        else:
            raise UnsupportedModel(f"node {node.name!r} (Gemm with transA = 1) takes no adapter")
        users = list(y.uses())
        adapted = b.op("Add", y, added)
        for user, index in users:
            user.replace_input_with(index, adapted)
        graph = b.graph
        for index, output in enumerate(graph.outputs):
            if output is y:
                adapted.name, y.name = y.name, f"{y.name}.base"
                adapted.shape, adapted.type = y.shape, y.type
                graph.outputs[index] = adapted

    def _effective(self, layers: Sequence[_Layer]) -> Any:
        facts = [(layer, str(layer.weight.name), static(layer.weight)) for layer in layers]

        def effective(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
            values: dict[str, Any] = {}
            for layer, weight, shape in facts:
                product = (trained[f"{layer.name}.lora_b"] @ trained[f"{layer.name}.lora_a"]) * self.scale
                base = values.get(weight, frozen[weight])
                if layer.is_part:
                    values[weight] = base * 1
                    values[weight][layer.first : layer.first + layer.shape[0]] += product
                else:
                    values[weight] = base + (product.T if layer.transposed else product.reshape(shape))
            return values

        return effective


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
