"""A torch module becomes a forward graph in ONNX whose tensors keep their names; and torch as the oracle of gradients.

Parameters and buffers are inputs of the traced function and become initializers of their own names afterwards. So no
exporter can merge two parameters of equal value, fold a transposed weight into an anonymous one, or rename any.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from edge_sdk.tensors import Array
from export.errors import UnsupportedModel
from export.forward import adopt
from export.graph import IR_VERSION, OPSET
from export.proof import Reference

log = logging.getLogger(__name__)


class _Functional(nn.Module):
    """The module as a function of its input and its tensors."""

    def __init__(self, module: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.__dict__["module"] = module  # not a submodule: its tensors shall come from outside only
        self.names = names

    def forward(self, x: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        values = dict(zip(self.names, tensors, strict=True))
        output: torch.Tensor = torch.func.functional_call(self.__dict__["module"], values, (x,))
        return output


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name."""
    return {name: value.detach() for name, value in [*module.named_parameters(), *module.named_buffers()]}


def forward_graph(module: nn.Module, example: Array) -> ir.Model:
    """The module in evaluation mode as an ONNX graph: `d.x` in, one output, tensors as initializers of their names.

    `example` is a batch `[n, *shape]`, float32 or int64, with n of 2 or more. Raises `UnsupportedModel`.
    """
    was_training = module.training
    module.eval()
    named = tensors_of(module)
    wrapped = _Functional(module, list(named))
    origin = type(module).__name__
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                wrapped,
                (torch.as_tensor(example), list(named.values())),
                dynamo=True,
                opset_version=OPSET,
                input_names=["d.x", *(f"t.{name}" for name in named)],
                dynamic_shapes=({0: torch.export.Dim("batch")}, [None] * len(named)),
                verbose=False,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise UnsupportedModel(
            f"{origin}: torch cannot export it: {str(cause).splitlines()[0][:300]}; "
            "the forward must accept any batch size"
        ) from error
    finally:
        module.train(was_training)
        log.setLevel(level)
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    _to_initializers(model.graph, named)
    return adopt(model, origin)


def _to_initializers(graph: ir.Graph, named: Mapping[str, torch.Tensor]) -> None:
    for value in list(graph.inputs)[1:]:
        graph.inputs.remove(value)
        name = str(value.name).removeprefix("t.")  # so far kept apart from the names of results
        value.name = name
        if value.uses():
            array = named[name].cpu().numpy()
            value.const_value = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
            graph.register_initializer(value)


class TorchOracle:
    """Loss and gradients of a module by torch, at given values of its tensors."""

    name = "torch"

    def __init__(self, module: nn.Module, frozen: Mapping[str, Array], loss: str) -> None:
        self._module = module
        self._names = set(tensors_of(module))
        self._frozen = {name: torch.as_tensor(np.array(value)) for name, value in frozen.items()}
        self._loss = loss

    def __call__(self, trained: Mapping[str, Array], effective: Any, x: Array, y: Array, w: Array) -> Reference:
        """Loss and the gradient of each trained tensor.

        `effective(trained, frozen)` gives the module's own tensors that the trained ones stand for.
        """
        loss, rounded = self._run(torch.float32, trained, effective, x, y, w)
        try:
            loss, exact = self._run(torch.float64, trained, effective, x, y, w)
        except RuntimeError as error:  # a module that makes float32 tensors of its own does not run in float64
            log.info("torch is asked in float32 alone: %s", error)
            exact = rounded
        off = {name: float(np.abs(rounded[name] - exact[name]).max(initial=0.0)) for name in exact}
        return Reference(loss, exact, off)

    def _run(
        self, dtype: torch.dtype, trained: Mapping[str, Array], effective: Any, x: Array, y: Array, w: Array
    ) -> tuple[float, dict[str, Array]]:
        def cast(value: Array | torch.Tensor) -> torch.Tensor:
            tensor = torch.as_tensor(value)
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        leaves = {name: cast(np.array(value)).requires_grad_() for name, value in trained.items()}
        frozen = {name: cast(value) for name, value in self._frozen.items()}
        # What is given with the start (a side term) is no tensor of the module: its layer may be none of the module's either.
        tensors = {n: v for n, v in {**frozen, **effective(leaves, frozen)}.items() if n in self._names}
        was_training = self._module.training
        self._module.eval()
        output = torch.func.functional_call(self._module, tensors, (cast(x),))
        self._module.train(was_training)
        loss = _TORCH_LOSSES[self._loss](output, cast(y), cast(w))
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return loss.item(), {
            name: np.zeros(trained[name].shape) if value is None else value.double().numpy()
            for name, value in zip(leaves, gradients, strict=True)
        }


def _weighted(losses: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return (losses * w).sum() / w.sum().clamp(min=1e-12)


_TORCH_LOSSES = {
    "cross_entropy": lambda z, y, w: _weighted(nn.functional.cross_entropy(z, y, reduction="none"), w),
    "mse": lambda z, y, w: _weighted(((z - y) ** 2).flatten(1).mean(1), w),
}
