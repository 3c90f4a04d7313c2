"""Optimizers as ONNX subgraphs, appended per trainable tensor (step-graphs.md, section 3.6). Slots start at zero with each task.

    sgd      v' = mu v + (g + lambda p)      p' = p - eta v'           (mu 0.9, torch's convention without dampening)
    adamw    m' = b1 m + (1 - b1) g          v' = b2 v + (1 - b2) g^2
             p' = p (1 - eta lambda) - eta (m' / (1 - b1^t)) / (sqrt(v' / (1 - b2^t)) + eps)     (0.9, 0.999, 1e-8; t = h.step)

AdamW: Loshchilov and Hutter, arXiv 1711.05101. Its slots hold m / (1 - b1) and v / (1 - b2): the same update in 11 passes over
the tensor instead of 15.

`sgd+prox` and `adamw+prox` add mu (p - p0) to the gradient first, mu = h.proximal (0: off) and p0 the start of the task:
FedProx, Li et al., arXiv 1812.06127, equation 2. One graph serves every mu.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import onnx_ir as ir

from edge_sdk.bundle import HyperRange
from export.errors import SpecError
from export.graph import Builder, dims, reshaped

_MOMENTUM = 0.9
_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Optimizer:
    """How many slots per tensor, which hyper-parameters, and the rule.

    `numbers(builder, hyper)` works out the scalars of a step, once for all tensors, the values of `hyper` being graph inputs
    by name without `h.`; `update(builder, p, g, slots, numbers)` returns the new tensor and the new slots. `anchored`: the
    start of the task is an input too, and pulls.
    """

    slots: int
    hyper: Mapping[str, HyperRange]
    counts_steps: bool
    numbers: Callable[[Builder, Mapping[str, ir.Value]], Mapping[str, ir.Value]]
    update: Callable[
        [Builder, ir.Value, ir.Value, Sequence[ir.Value], Mapping[str, ir.Value]],
        tuple[ir.Value, tuple[ir.Value, ...]],
    ]
    anchored: bool = False


def _sgd(
    b: Builder, p: ir.Value, g: ir.Value, slots: Sequence[ir.Value], numbers: Mapping[str, ir.Value]
) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    decayed = b.op("Add", g, b.op("Mul", p, numbers["weight_decay"]))
    velocity = b.op("Add", b.op("Mul", slots[0], _MOMENTUM), decayed)
    return b.op("Sub", p, b.op("Mul", velocity, numbers["lr"])), (velocity,)


def _as_given(_b: Builder, hyper: Mapping[str, ir.Value]) -> Mapping[str, ir.Value]:
    return hyper


def _adamw_numbers(b: Builder, hyper: Mapping[str, ir.Value]) -> Mapping[str, ir.Value]:
    step = b.op("Cast", hyper["step"], to=ir.DataType.FLOAT.value)
    bias1 = b.op("Sub", 1.0, b.op("Pow", _BETA1, step))
    bias2 = b.op("Sqrt", b.op("Div", b.op("Sub", 1.0, b.op("Pow", _BETA2, step)), 1 - _BETA2))
    return {
        "rate": b.op("Mul", hyper["lr"], b.op("Div", b.op("Mul", bias2, 1 - _BETA1), bias1)),
        "floor": b.op("Mul", bias2, _EPSILON),
        "kept": b.op("Sub", 1.0, b.op("Mul", hyper["lr"], hyper["weight_decay"])),
    }


def _adamw(
    b: Builder, p: ir.Value, g: ir.Value, slots: Sequence[ir.Value], numbers: Mapping[str, ir.Value]
) -> tuple[ir.Value, tuple[ir.Value, ...]]:
    first = b.op("Add", b.op("Mul", slots[0], _BETA1), g)
    second = b.op("Add", b.op("Mul", slots[1], _BETA2), b.op("Mul", g, g))
    spread = b.op("Add", b.op("Sqrt", second), numbers["floor"])
    move = b.op("Div", b.op("Mul", first, numbers["rate"]), spread)
    return b.op("Sub", b.op("Mul", p, numbers["kept"]), move), (first, second)


_PLAIN: Final[Mapping[str, Optimizer]] = {
    "sgd": Optimizer(
        1, {"lr": HyperRange(1e-2, 0.0, 10.0), "weight_decay": HyperRange(0.0, 0.0, 1.0)}, False, _as_given, _sgd
    ),
    "adamw": Optimizer(
        2, {"lr": HyperRange(1e-3, 0.0, 1.0), "weight_decay": HyperRange(1e-2, 0.0, 1.0)}, True, _adamw_numbers, _adamw
    ),
}


def _proximal(inner: Optimizer) -> Optimizer:
    """The same rule on the gradient of loss + mu / 2 |p - p0|^2."""
    return replace(inner, hyper={**inner.hyper, "proximal": HyperRange(0.0, 0.0, 1e3)}, anchored=True)


OPTIMIZERS: Final[Mapping[str, Optimizer]] = {
    **_PLAIN,
    **{f"{name}+prox": _proximal(optimizer) for name, optimizer in _PLAIN.items()},
}


def optimizer_named(name: str) -> Optimizer:
    """The optimizer of that name. Raises `SpecError` listing the names."""
    if name not in OPTIMIZERS:
        raise SpecError(f"optimizer {name!r} is unknown; there are {', '.join(sorted(OPTIMIZERS))}")
    return OPTIMIZERS[name]


def append_optimizer(
    b: Builder, optimizer: Optimizer, gradients: Mapping[ir.Value, ir.Value]
) -> tuple[list[ir.Value], list[ir.Value]]:
    """Append the update of every tensor `p.<t>`; return the new inputs (slots, hyper-parameters) and the `.next` outputs.

    Outputs are in the order of the state inputs: all tensors, then slot 0 of all, then slot 1.
    """
    first = len(b.graph.inputs)
    tensors = list(gradients)
    slots = [[b.input(f"s{k}.{_name(p)}", "float32", dims(p)) for p in tensors] for k in range(optimizer.slots)]
    hyper = {name: b.input(f"h.{name}", "float32", ()) for name in optimizer.hyper}
    if optimizer.counts_steps:
        hyper["step"] = b.input("h.step", "int64", ())
    b.scope = "optimizer"
    numbers = optimizer.numbers(b, hyper)
    states: list[list[ir.Value]] = [[] for _ in range(1 + optimizer.slots)]
    for index, p in enumerate(tensors):
        b.scope = f"optimizer/{_name(p)}"
        before = (p, *(slot[index] for slot in slots))
        gradient = gradients[p]
        if optimizer.anchored:
            anchor = b.input(f"p0.{_name(p)}", "float32", dims(p))
            gradient = b.op("Add", gradient, b.op("Mul", hyper["proximal"], b.op("Sub", p, anchor)))
        new, new_slots = optimizer.update(
            b, _flat(b, p), _flat(b, gradient, p), [_flat(b, s) for s in before[1:]], numbers
        )
        for held, made, old in zip(states, (new, *new_slots), before, strict=True):
            value = reshaped(b, made, old) if _ends_in_one(old) else made
            value.name, value.shape, value.type = f"{old.name}.next", old.shape, old.type
            held.append(value)
    return list(b.graph.inputs)[first:], [value for held in states for value in held]


def _flat(b: Builder, value: ir.Value, like: ir.Value | None = None) -> ir.Value:
    """The value along one axis if it ends in an axis of size 1: the runtime then broadcasts a scalar element by element."""
    return b.op("Reshape", value, b.ints(-1)) if _ends_in_one(like or value) else value


def _ends_in_one(value: ir.Value) -> bool:
    sizes = dims(value)
    return len(sizes) > 1 and sizes[-1] == 1


def _name(p: ir.Value) -> str:
    return str(p.name).removeprefix("p.")
