"""From a float model to the integer graph that is flashed, with its report: the passes of this package in their order.

    fold -> equalize -> calibrate -> integers (ptq) -> measure -> gates
                                          `-> where accuracy falls by more than the tolerance: qat, measured again

Transformers at 4 bits go another way: their products take weights in blocks (`blocks`), and nothing is calibrated.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from devices.bench import fresh_process, interleaved_us, processor
from edge_sdk.fields import INPUT
from edge_sdk.ranges import RangeStats
from edge_sdk.tensors import Array
from export.errors import SpecError
from export.graph import array_of, clone
from export.quantize.blocks import to_blocks
from export.quantize.calibration import calibrate, parsed
from export.quantize.equalize import equalize
from export.quantize.fold import fold_normalizations, fold_transposes
from export.quantize.kernels import Kernels, kernels_of, quiet
from export.quantize.ptq import IntegerModel, stripped, to_integers
from export.quantize.report import QuantReport, Violation, check_gates
from export.quantize.settings import QatSettings

_EQUALIZE_ON = 32  # samples that prove an equalization exact


@dataclass(frozen=True)
class Recipe:
    """How to quantize: bits of weights (2 to 8), and how far accuracy may fall, as a share.

    `qat`: settings of the training that closes a gap; None never trains. `flash_kb`: what the target holds; None does not
    care. `reduce_range`: 7-bit products, for processors that saturate. `allow`: gates that may fail. `memory`: also measure
    the peak of a fresh process of each form, which takes a second.
    """

    bits: int = 8
    tolerance: float = 0.01
    equalize: bool = True
    qat: QatSettings | None = field(default_factory=QatSettings)
    flash_kb: int | None = None
    reduce_range: bool = False
    signed: bool = False
    allow: Collection[str] = ()
    memory: bool = True


@dataclass(frozen=True)
class Data:
    """Samples x float32 `[n, *shape]` and y (labels int64 `[n]`, or targets float32): for training, and held out."""

    x: Array
    y: Array
    held_x: Array
    held_y: Array

    @property
    def classifies(self) -> bool:
        """Whether the targets are labels."""
        return self.y.dtype == np.int64


@dataclass(frozen=True)
class Quantized:
    """The file to flash and its report; `integer` is the integer form, whether or not it ships.

    `prepared`: the float graph that the integers were made from; `graph`: what was made of it, before it was stripped.
    """

    model: bytes
    integer: bytes
    report: QuantReport
    ranges: RangeStats
    prepared: ir.Model
    graph: onnx.ModelProto


def quantize_model(
    model: ir.Model,
    data: Data,
    recipe: Recipe | None = None,
    ranges: RangeStats | None = None,
    *,
    name: str = "the model",
    on_progress: Callable[[str], None] = lambda text: None,
) -> Quantized:
    """Quantize a forward graph (`d.x` in, one output). `ranges`: a calibration made elsewhere, of this very graph.

    Raises `GateFailed` when a gate fails that `recipe.allow` does not name, `ExportError`.
    """
    recipe = recipe or Recipe()
    if not 2 <= recipe.bits <= 8:
        raise SpecError(f"bits = {recipe.bits} of a quantized model must be 2 to 8")
    prepared = clone(model)
    before = stripped(parsed(prepared))
    fold_normalizations(prepared)
    fold_transposes(prepared)
    method = ["fold"]
    if recipe.bits == 4 and _is_transformer(prepared):
        made = to_blocks(prepared)
        method.append("blocks")
        found = _measured(before, made, prepared, data, recipe, method, blocks=True)
        check_gates(found.report.violations, recipe.allow, name)
        return found
    if recipe.equalize and equalize(prepared, data.x[:_EQUALIZE_ON]):
        method.append("equalize")
    on_progress("calibrating")
    seen = calibrate(prepared, data.x) if ranges is None else ranges
    # A sum of two products of unsigned and signed bytes overflows 16 bits, unless the signed ones have 7.
    bits = min(recipe.bits, 7) if recipe.reduce_range else recipe.bits
    made = to_integers(prepared, seen.finish(), bits=bits, signed=recipe.signed)
    method.append(f"ptq{bits}")
    found = _measured(before, made, prepared, data, recipe, method, ranges=seen)
    if recipe.qat is not None and _drop(found.report) > recipe.tolerance:
        on_progress(f"accuracy falls by {_drop(found.report):.4f}: training {recipe.qat.steps} steps")
        floats = {n: a for n, value in prepared.graph.initializers.items() if (a := array_of(value)) is not None}
        from export.quantize.qat import train  # the one part that needs torch

        train(made, floats, data.x, data.y, bits=bits, classifies=data.classifies, settings=recipe.qat)
        method.append(f"qat{bits} ({recipe.qat.steps} steps)")
        trained = _measured(before, made, prepared, data, recipe, method, ranges=seen)
        if trained.report.integer_score >= found.report.integer_score:
            found = trained
    check_gates(found.report.violations, recipe.allow, name)
    return found


def _is_transformer(model: ir.Model) -> bool:
    kinds = {node.op_type for node in model.graph}
    return "MatMul" in kinds and "LayerNormalization" in kinds and "Softmax" in kinds


def _drop(report: QuantReport) -> float:
    return report.float_score - report.integer_score


def _measured(
    before: bytes,
    made: onnx.ModelProto,
    prepared: ir.Model,
    data: Data,
    recipe: Recipe,
    method: list[str],
    *,
    ranges: RangeStats | None = None,
    blocks: bool = False,
) -> Quantized:
    integer = stripped(made)
    sessions = {
        kind: onnxruntime.InferenceSession(content, quiet(), providers=["CPUExecutionProvider"])
        for kind, content in (("float", before), ("integer", integer))
    }
    outputs = {kind: outputs_of(session, data.held_x) for kind, session in sessions.items()}
    one = np.ascontiguousarray(data.held_x[:1])
    times = interleaved_us({kind: _caller(session, one) for kind, session in sessions.items()})
    kernels = kernels_of(integer)
    scores = {kind: score(values, data.held_y) for kind, values in outputs.items()}
    agreement = float((outputs["float"].argmax(1) == outputs["integer"].argmax(1)).mean()) if data.classifies else None
    floats = tuple(f for f in kernels.floats if not (blocks and f.startswith(_KEPT_FLOAT)))
    violations = _violations(kernels, floats, scores, times, len(integer), recipe)
    slower = any(v.gate == "latency" for v in violations)
    fits = recipe.flash_kb is None or len(before) <= 1024 * recipe.flash_kb
    ships = "float" if slower and fits and "latency" not in recipe.allow else "integer"
    memory = {
        kind: _memory(content) if recipe.memory else None for kind, content in (("float", before), ("integer", integer))
    }
    report = QuantReport(
        bits=recipe.bits,
        method=tuple(method),
        ships=ships,
        reason=_reason(ships, slower=slower, times=times),
        float_score=scores["float"],
        integer_score=scores["integer"],
        agreement=agreement,
        snr_db=_snr_db(outputs["float"], outputs["integer"]),
        weight_snr_db={} if blocks else _weight_snr(made, prepared),
        integer_kernels=kernels.integer,
        float_kernels=floats,
        float_bytes=len(before),
        raw_bytes=made.ByteSize(),
        integer_bytes=len(integer),
        float_cpu_us=times["float"],
        integer_cpu_us=times["integer"],
        float_vmhwm_kb=memory["float"],
        integer_vmhwm_kb=memory["integer"],
        violations=tuple(violations),
        allowed=tuple(sorted({v.gate for v in violations} & set(recipe.allow))),
        machine=processor(),
        runtime=f"onnxruntime {onnxruntime.__version__}",
    )
    kept = onnx.ModelProto()
    kept.CopyFrom(made)  # training goes on in the other
    return Quantized(before if ships == "float" else integer, integer, report, ranges or RangeStats(), prepared, kept)


_KEPT_FLOAT = ("Conv", "FusedConv", "Gemm", "FusedGemm", "Add", "FusedMatMul", "MatMul")


def _violations(
    kernels: Kernels,
    floats: tuple[str, ...],
    scores: dict[str, float],
    times: dict[str, float],
    size: int,
    recipe: Recipe,
) -> list[Violation]:
    found = []
    if floats or not kernels.integer:
        listed = ", ".join(floats) or "nothing runs in integers"
        found.append(
            Violation(
                "fusion",
                f"{len(floats)} operators run in float although they are quantized: {listed}",
                "take unsigned activations, or another runtime",
            )
        )
    drop = scores["float"] - scores["integer"]
    if not drop <= recipe.tolerance:
        found.append(
            Violation(
                "accuracy",
                f"the score falls from {scores['float']:.4f} to {scores['integer']:.4f}, "
                f"by more than {recipe.tolerance:g}",
                "train more steps (qat), take more bits, or raise the tolerance",
            )
        )
    if times["integer"] > times["float"]:
        found.append(
            Violation(
                "latency",
                f"integers take {times['integer']:.0f} us of CPU time, float {times['float']:.0f} us",
                "ship float where the flash permits",
            )
        )
    if recipe.flash_kb is not None and size > 1024 * recipe.flash_kb:
        found.append(
            Violation("budget", f"{size} bytes, the profile has {recipe.flash_kb} KB of flash", "take fewer bits")
        )
    return found


def _reason(ships: str, *, slower: bool, times: dict[str, float]) -> str:
    ratio = times["float"] / times["integer"]
    if ships == "float":
        return f"int8 is slower here ({ratio:.2f} times as fast as float), and the flash holds the float model"
    if slower:
        return f"int8 is slower here ({ratio:.2f} times as fast as float); it ships for its size"
    return f"integers are {ratio:.2f} times as fast as float here"


def outputs_of(session: onnxruntime.InferenceSession, x: Array) -> Array:
    """The output for x, 64 samples at a time."""
    parts = [session.run(None, {INPUT: np.ascontiguousarray(x[i : i + 64])})[0] for i in range(0, len(x), 64)]
    return np.concatenate(parts)


def score(output: Array, target: Array) -> float:
    """The share of right answers for labels, of the variance explained for targets."""
    if target.dtype == np.int64:
        return float((output.argmax(1) == target).mean())
    return float(1 - ((output - target) ** 2).mean() / max(float(target.var()), 1e-12))


def _caller(session: onnxruntime.InferenceSession, x: Array) -> Callable[[], object]:
    return lambda: session.run(None, {INPUT: x})


def _snr_db(signal: Array, other: Array) -> float:
    error = float(((signal - other).astype(np.float64) ** 2).mean())
    return float(10 * np.log10(float((signal.astype(np.float64) ** 2).mean()) / max(error, 1e-30)))


def _weight_snr(made: onnx.ModelProto, prepared: ir.Model) -> dict[str, float]:
    held = IntegerModel.read(made)
    tensors = held.tensors()
    found = {}
    for q in held.weights:
        weight = array_of(prepared.graph.initializers.get(q.name))
        if weight is not None:
            column = [-1 if i == q.axis else 1 for i in range(weight.ndim)]
            found[q.name] = round(_snr_db(weight, tensors[q.codes] * tensors[q.scale].reshape(column)), 1)
    return found


def _memory(content: bytes) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        return fresh_process(path)["vmhwm_kb"]
