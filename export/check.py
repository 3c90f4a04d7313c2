"""What `edgewise export check` answers: can this model train here, at what cost, and if not, what stands in the way.

Nothing is built and nothing is written.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from export import onnx_import
from export.cost import bytes_per_sample, flops_of
from export.cut import frontier
from export.decompose import decompose
from export.errors import ExportError, SpecError, UnknownTensor
from export.forward import trainable_constants
from export.gradients import differentiate, path_between, rules
from export.graph import Builder, static
from export.losses import LOSSES
from export.scopes.modules import train_tensors
from export.shapes import BATCH, infer_shapes


@dataclass(frozen=True)
class Check:
    """The answer.

    `trained`: tensors and their sizes. `path`: how often each operator lies between them and the loss, compound ones
    taken apart. `missing`: those without a rule. `problem`: the error that a build would end with, or empty. `frontier`:
    what the frozen part hands to the trained one, as names, with its bytes per sample. The rest counts floating-point
    operations per sample of products and convolutions: forward, and of the backward pass alone (0 with a problem).
    """

    trained: dict[str, int]
    path: dict[str, int]
    missing: tuple[str, ...]
    problem: str
    frontier: tuple[str, ...]
    feature_bytes: int
    frozen_flops: int
    forward_flops: int
    backward_flops: int

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return asdict(self)


def check_model(path: Path, patterns: Sequence[str], loss: str | None = None) -> Check:
    """Look at an ONNX file and the tensors that match `patterns`.

    The loss is cross-entropy for an output `[batch, classes]` unless another is named. Raises `UnknownTensor` for a
    pattern that matches none, `UnsupportedModel` for a file that cannot be read; what stands in the way of training is
    in the answer.
    """
    model = onnx_import.forward_graph(path)
    graph = model.graph
    names = _matching(trainable_constants(graph), patterns)
    forward = list(graph)
    train_tensors(model, names)
    trained = [value for value in graph.inputs if str(value.name).startswith("p.")]
    infer_shapes(model)
    features = [(str(held.name), held) for held in frontier(graph)]
    b, value = _with_loss(graph, loss)
    infer_shapes(model)
    frozen = sum(flops_of(node) for node in _frozen(graph, trained))
    total = sum(flops_of(node) for node in forward)
    decompose(b, value, trained)
    path_nodes = path_between(graph, trained, value).nodes
    before = sum(flops_of(node) for node in graph)
    problem, after = "", before
    try:
        differentiate(b, value, trained)
    except ExportError as error:
        problem = str(error)
    else:
        infer_shapes(model)
        after = sum(flops_of(node) for node in graph)
    counts = Counter(node.op_type for node in path_nodes)
    return Check(
        trained={str(p.name).removeprefix("p."): int(np.prod(static(p))) for p in trained},
        path=dict(sorted(counts.items())),
        missing=tuple(sorted(set(counts) - rules())),
        problem=problem,
        frontier=tuple(name for name, _ in features),
        feature_bytes=bytes_per_sample([held for _, held in features]),
        frozen_flops=frozen,
        forward_flops=total,
        backward_flops=after - before,
    )


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise UnknownTensor("tensor", pattern, list(names))
        chosen.update(found)
    return [name for name in names if name in chosen]


def _with_loss(graph: ir.Graph, named: str | None) -> tuple[Builder, ir.Value]:
    b = Builder(graph)
    b.scope = "loss"
    output = graph.outputs[0]
    sizes = static(output, 1)
    name = named or ("cross_entropy" if len(sizes) == 1 else "mse")
    if name not in LOSSES:
        raise SpecError(f"loss {name!r} is unknown; there are {', '.join(sorted(LOSSES))}")
    dtype, shape = LOSSES[name].target(sizes)
    value = LOSSES[name].build(b, output, b.input("d.y", dtype, (BATCH, *shape)), b.input("d.w", "float32", (BATCH,)))
    value.shape, value.type = ir.Shape(()), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs[:] = [value]
    return b, value


def _frozen(graph: ir.Graph, trained: Sequence[ir.Value]) -> list[ir.Node]:
    """The nodes that depend on the sample alone: what a prefix would hold."""
    moving = {*trained, *(value for value in graph.inputs if value.name in ("d.y", "d.w"))}
    frozen, sample = [], {value for value in graph.inputs if value.name == "d.x"}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if any(value in moving for value in inputs):
            moving.update(node.outputs)
        elif any(value in sample for value in inputs):
            sample.update(node.outputs)
            frozen.append(node)
    return frozen
