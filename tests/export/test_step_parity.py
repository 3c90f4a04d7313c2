"""Step graphs of whole networks against torch: gradients at every batch size through one file, and twenty steps.

The networks are those of `benchmarks/step_models.py`, at an eighth to a quarter of their width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch.nn import functional

from benchmarks.step_models import STEP_MODELS, StepModel
from export.graph import clone
from export.losses import loss_named
from export.optimizers import optimizer_named
from export.proof import relative_error
from export.scopes import Applied, scope_named
from export.step_graph import build_graphs, gradients_graph
from export.torch_import import forward_graph, tensors_of

WIDTH = 0.125
OPTIMIZERS = ("sgd", "adamw")
STEPS, DECAY = 20, 0.02
RATES = {"sgd": 2e-3, "adamw": 2e-4}
SENSITIVE = {"tiny_mobilenet": 20}  # 27 layers of four channels: at a larger rate two runs of torch part, too


@dataclass(frozen=True)
class Built:
    """One network: the gradients graph, the step graph of each optimizer, and torch's side of it."""

    name: str
    model: StepModel
    applied: Applied
    module: torch.nn.Module
    gradients: onnxruntime.InferenceSession
    steps: Mapping[str, onnxruntime.InferenceSession]


@cache
def source(build: Callable[[float], torch.nn.Module]) -> tuple[torch.nn.Module, ir.Model]:
    """Module and forward graph; entries that differ in what trains share them."""
    model = next(entry for entry in STEP_MODELS.values() if entry.build is build)
    module = model.make(WIDTH)
    return module, forward_graph(module, model.example(2)[0])


@cache
def built(name: str) -> Built:
    model = STEP_MODELS[name]
    module, exported = source(model.build)
    forward = clone(exported)
    parameters = [n for n, _ in module.named_parameters() if n in forward.graph.initializers]
    applied = scope_named(model.scope, model.options).apply(forward, parameters, 0)
    graphs = {
        kind: build_graphs(clone(forward), applied.trainables, loss_named(model.loss), optimizer_named(kind), name)
        for kind in OPTIMIZERS
    }
    return Built(
        name,
        model,
        applied,
        module,
        session(gradients_graph(forward, applied.trainables, loss_named(model.loss), name)),
        {kind: session(made.step) for kind, made in graphs.items()},
    )


def session(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def moved(applied: Applied) -> dict[str, np.ndarray]:
    """The trained tensors away from their start: at B = 0 half of an adapter's gradients would be zero."""
    draw = np.random.default_rng(1)
    return {
        t.name: (t.value + 0.1 * max(float(t.value.std()), 0.1) * draw.normal(size=t.value.shape)).astype(np.float32)
        for t in applied.trainables
    }


def run(graph: onnxruntime.InferenceSession, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = [output.name for output in graph.get_outputs()]
    wanted = {entry.name for entry in graph.get_inputs()}
    return dict(zip(names, graph.run(names, {n: v for n, v in feeds.items() if n in wanted}), strict=True))


@pytest.mark.parametrize("name", STEP_MODELS)
def test_gradients_follow_torch_at_every_batch_size(name: str) -> None:
    """To 1e-5 of torch in float64, or as near to it as torch in float32 comes: a ReLU near zero may fall on either side."""
    net = built(name)
    trained = moved(net.applied)
    x, y = net.model.example(16, seed=2)
    for size in (1, 5, 16):
        w = np.random.default_rng(size).uniform(0.5, 1.5, size).astype(np.float32)
        batch = (x[:size], y[:size], w)
        feeds = dict(zip(("d.x", "d.y", "d.w"), batch, strict=True))
        found = run(net.gradients, {**feeds, **{f"p.{n}": v for n, v in trained.items()}})
        loss, expected = by_torch(net, trained, *batch, torch.float64)
        _, single = by_torch(net, trained, *batch, torch.float32)
        assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
        largest = max(float(np.abs(value).max()) for value in expected.values())
        for n, value in expected.items():
            bound = max(1e-5, 4 * relative_error(single[n], value, largest))
            assert relative_error(found[f"grad.{n}"], value, largest) <= bound, (size, n)


def by_torch(
    net: Built, trained: Mapping[str, np.ndarray], x: np.ndarray, y: np.ndarray, w: np.ndarray, dtype: torch.dtype
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients in this precision."""
    leaves = {n: torch.tensor(v, dtype=dtype, requires_grad=True) for n, v in trained.items()}
    z = output_of(net, leaves, x, dtype)
    loss = weighted_loss(net.model.loss, z, of_dtype(y, dtype), torch.as_tensor(w).to(dtype))
    found = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), {n: value.numpy() for n, value in zip(leaves, found, strict=True)}


def output_of(net: Built, leaves: Mapping[str, torch.Tensor], x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    frozen = {n: v.to(dtype) if v.is_floating_point() else v for n, v in tensors_of(net.module).items()}
    tensors = {**frozen, **net.applied.effective(leaves, frozen)}
    return torch.func.functional_call(net.module, tensors, (of_dtype(x, dtype),))


def of_dtype(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Labels and tokens stay integers."""
    return torch.as_tensor(values) if values.dtype == np.int64 else torch.as_tensor(values).to(dtype)


def weighted_loss(kind: str, z: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    each = (
        functional.cross_entropy(z, y, reduction="none")
        if kind == "cross_entropy"
        else ((z - y) ** 2).flatten(1).mean(1)
    )
    return (each * w).sum() / w.sum()


@pytest.mark.parametrize("name", STEP_MODELS)
def test_a_short_batch_may_be_padded_with_samples_of_weight_zero(name: str) -> None:
    net = built(name)
    trained = {f"p.{n}": v for n, v in moved(net.applied).items()}
    x, y = net.model.example(16, seed=3)
    rows = np.array([0, 1, 2, 3, 4, 0, 0, 0])
    weights = np.array([1] * 5 + [0] * 3, np.float32)
    short = run(net.gradients, {"d.x": x[:5], "d.y": y[:5], "d.w": np.ones(5, np.float32), **trained})
    padded = run(net.gradients, {"d.x": x[rows], "d.y": y[rows], "d.w": weights, **trained})
    largest = max(float(np.abs(value).max()) for value in short.values())
    for output, value in short.items():
        assert np.abs(padded[output] - value).max() <= 1e-6 * max(1.0, largest), output


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", STEP_MODELS)
def test_twenty_steps_follow_torch(name: str, optimizer: str) -> None:
    """To 1e-4 of torch in float64, or as near to it as torch in float32 stays: a ReLU that tips parts two right runs."""
    net = built(name)
    x, y = net.model.example(8, seed=6)
    state = {f"p.{t.name}": t.value for t in net.applied.trainables}
    for entry in net.steps[optimizer].get_inputs():
        if entry.name.startswith("s"):
            state[entry.name] = np.zeros(entry.shape, np.float32)
    data = {"d.x": x, "d.y": y, "d.w": np.ones(len(x), np.float32)}
    hyper = {"h.lr": np.array(rate_of(name, optimizer), np.float32), "h.weight_decay": np.array(DECAY, np.float32)}
    losses = []
    for step in range(1, STEPS + 1):
        result = run(net.steps[optimizer], {**data, **state, **hyper, "h.step": np.array(step, np.int64)})
        state = {n.removesuffix(".next"): v for n, v in result.items() if n.endswith(".next")}
        losses.append(float(result["loss"]))
    expected, tensors = torch_steps(net, optimizer, x, y, torch.float64)
    off = {n: float(np.abs(state[f"p.{n}"] - value).max()) for n, value in tensors.items()}
    off["the loss"] = float(np.abs(np.subtract(losses, expected)).max())
    assert min(losses) < losses[0]
    if max(off.values()) > 1e-4:
        spread = rounding_spread(net, optimizer, x, y, expected, tensors)
        assert all(value <= max(1e-4, 4 * spread[n]) for n, value in off.items()), (off, spread)


def rounding_spread(
    net: Built, optimizer: str, x: np.ndarray, y: np.ndarray, expected: list[float], tensors: dict[str, np.ndarray]
) -> dict[str, float]:
    """How far torch in float32 ends from float64 when its start is moved by a rounding, at most over a few such starts."""
    spread: dict[str, float] = dict.fromkeys([*tensors, "the loss"], 0.0)
    for seed in range(6):
        losses, ended = torch_steps(net, optimizer, x, y, torch.float32, seed)
        found = {n: float(np.abs(ended[n] - value).max()) for n, value in tensors.items()}
        found["the loss"] = float(np.abs(np.subtract(losses, expected)).max())
        spread = {n: max(value, found[n]) for n, value in spread.items()}
    return spread


def rate_of(name: str, optimizer: str) -> float:
    return RATES[optimizer] / SENSITIVE.get(name, 1)


def torch_steps(
    net: Built, optimizer: str, x: np.ndarray, y: np.ndarray, dtype: torch.dtype, seed: int | None = None
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of each step, and the tensors after the last; with a seed the start is moved by a rounding."""
    leaves = {}
    for t in net.applied.trainables:
        noise = 0 if seed is None else np.random.default_rng(seed).uniform(-1e-7, 1e-7, t.value.shape)
        leaves[t.name] = torch.nn.Parameter(torch.tensor(t.value * (1 + noise), dtype=dtype))
    rate = rate_of(net.name, optimizer)
    reference = {
        "sgd": lambda: torch.optim.SGD(leaves.values(), lr=rate, momentum=0.9, weight_decay=DECAY),
        "adamw": lambda: torch.optim.AdamW(leaves.values(), lr=rate, weight_decay=DECAY),
    }[optimizer]()
    weights = torch.ones(len(x), dtype=dtype)
    losses = []
    for _ in range(STEPS):
        loss = weighted_loss(net.model.loss, output_of(net, leaves, x, dtype), of_dtype(y, dtype), weights)
        losses.append(loss.item())
        reference.zero_grad()
        loss.backward()
        reference.step()
    return losses, {n: leaf.detach().numpy() for n, leaf in leaves.items()}
