"""From a model, a loss and an example batch to a bundle: the exporter's Python interface.

The steps, one pass each: read the model, choose what trains (`scopes`), quantize the rest, differentiate, append the
optimizer, prove the gradients, write, and run what was written once with the runtime that devices have.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edge_sdk.bundle import Bundle, HeldOut
from edge_sdk.fields import INPUT, TARGET, FieldSpec
from edge_sdk.keys import SigningKey
from edge_sdk.runtime import Predictor, Stepper
from edge_sdk.tensors import Array, digest, pack
from edge_sdk.update import max_update_bytes
from export.cost import flops_per_sample, peak_bytes
from export.cut import Features
from export.deploy import Deployed, deployed, late_row
from export.errors import ContractError, SpecError, UnsupportedModel
from export.forward import static_tail, trainable_constants
from export.graph import array_of, clone, dims
from export.losses import Loss, check_output, loss_named
from export.optimizers import optimizer_named
from export.precision import Precision
from export.proof import CentralDifferences, Oracle, Proof, prove
from export.quantize.fold import fold_normalizations
from export.quantize.pipeline import Data, Recipe, quantize_model
from export.quantize.weights import quantize_weights
from export.scopes import Scope, Trainable, scope_named
from export.serialize import WeightFile, write_graphs
from export.step_graph import (
    Graphs,
    build_graphs,
    gradients_graph,
    loss_graph,
    operators,
    proof_constants,
    with_constants,
)
from export.writer import write_archive

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

LAST_FIFTH = HeldOut(0.2, 1)
_ID_LIMIT = 64  # of a program id in a task


@dataclass(frozen=True)
class ProgramSpec:
    """One program to build: scope and its options, precision of the frozen part, optimizer, default batch size.

    `accumulate`: also write what a device needs to train on larger batches in parts; `largest`: the most samples that
    go through a step at once there (default: `batch`).
    """

    scope: str
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = "int8"
    optimizer: str = "adamw"
    batch: int = 32
    accumulate: bool = False
    largest: int | None = None


@dataclass(frozen=True)
class Deploy:
    """Quantize the network for serving: how, and on which held-out samples it is judged (as the example)."""

    recipe: Recipe
    held_x: Array
    held_y: Array


@dataclass(frozen=True)
class ProgramReport:
    """What was built: id, trained tensors and their parameters, nodes of the step graph, bytes, proof, CPU seconds.

    `features`: what the frozen prefix hands to the step, 0 bytes of a sample where there is none.
    """

    id: str
    parameters: int
    trained: tuple[str, ...]
    nodes: int
    step_bytes: int
    features: Features
    proof: Proof
    seconds: float


@dataclass(frozen=True)
class Report:
    """The bundle that was written."""

    path: Path
    digest: str
    bytes: int
    programs: tuple[ProgramReport, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary, for `--json`."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class _Source:
    """A model that was read: its forward graph, the tensors that may train, and where the oracle comes from.

    `folded`: values of the module's tensors with which it is the function of the graph, where they differ from its own.
    """

    forward: ir.Model
    parameters: tuple[str, ...]
    module: Any  # torch.nn.Module or None
    folded: Mapping[str, Array]


@dataclass
class _Built:
    spec: ProgramSpec
    scope: Scope
    id: str
    evaluate_id: str
    trainables: tuple[Trainable, ...]
    constants: tuple[Trainable, ...]
    graphs: Graphs
    frozen: Mapping[str, Array]
    proof: Proof
    seconds: float


def build_bundle(
    model: nn.Module | Path | str,
    example: tuple[Array, Array],
    path: Path | str,
    *,
    name: str,
    loss: str,
    programs: Sequence[ProgramSpec],
    classes: Sequence[str] | None = None,
    held_out: HeldOut = LAST_FIFTH,
    seed: int = 0,
    release_key: SigningKey | None = None,
    deploy: Deploy | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Write a bundle to `path`.

    `model`: a torch module, or the path of an ONNX file. `example`: x float32 or int64 (tokens) `[n, *shape]`, y int64 `[n]` (cross_entropy)
    or float32 in the shape of the output (mse), n of 2 or more. `held_out`: the share of every recording that never
    trains. `classes` names the labels. `deploy`: also quantize the network as it is, to serve it in integers. Raises `ExportError`; nothing is written then.
    """
    path = Path(path)
    if not path.absolute().parent.is_dir():
        raise SpecError(f"{path}: its folder does not exist")
    loss_rule = loss_named(loss)
    x, y = _checked_example(example, loss_rule)
    if not programs:
        raise SpecError("there is no program to build: name at least one scope")
    on_progress("reading the model")
    # All programs of a bundle share their tensors, so a fold that one of them needs is made for all.
    source = _read(model, x, fold=any(Precision.named(spec.precision).serves for spec in programs))
    output = source.forward.graph.outputs[0]
    if static_tail(source.forward.graph.inputs[0]) != x.shape[1:]:
        raise SpecError(
            f"the example has samples of {list(x.shape[1:])}, the model takes {dims(source.forward.graph.inputs[0])[1:]}"
        )
    check_output(loss_rule, output, y)
    built = []
    for spec in programs:
        built.append(_build_program(source, spec, name, loss, (x, y), seed))
        on_progress(
            f"{built[-1].id}: proved to {built[-1].proof.max_relative_error:.1e} against {built[-1].proof.oracle}"
        )
    ids = [entry.id for entry in built]
    if len(set(ids)) != len(ids):
        raise SpecError(f"two programs would have the id {max(ids, key=ids.count)!r}: let their options differ")
    extra = None
    if deploy is not None:
        data = Data(x, y, deploy.held_x, deploy.held_y)
        found = quantize_model(source.forward, data, deploy.recipe, name=name, on_progress=on_progress)
        on_progress(f"{found.report.ships} ships: {found.report.reason}")
        extra = deployed(found, loss_rule, name, programs[0].batch)
    named = _class_names(classes, output, loss_rule)
    manifest, files = _assemble(name, loss_rule, built, x, y, named, held_out, extra)
    on_progress("writing and running it once")
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.bundle"
        bundle_digest = write_archive(manifest, files, trial, release_key)
        _run_once(trial, built, x, y)
        if extra is not None:
            _run_deployed(trial, x, y)
    write_archive(manifest, files, path, release_key)
    reports = tuple(
        ProgramReport(
            id=entry.id,
            parameters=sum(t.value.size for t in entry.trainables),
            trained=tuple(t.name for t in entry.trainables),
            nodes=entry.graphs.step.graph.num_nodes(),
            step_bytes=len(files[_file(entry.id, "step")]),
            features=entry.graphs.features,
            proof=entry.proof,
            seconds=round(entry.seconds, 3),
        )
        for entry in built
    )
    return Report(path, bundle_digest, path.stat().st_size, reports)


def _checked_example(example: tuple[Array, Array], loss: Loss) -> tuple[Array, Array]:
    x, y = (np.asarray(part) for part in example)
    if x.dtype not in (np.float32, np.int64) or x.ndim < 2 or len(x) < 2 or not np.isfinite(x).all():
        raise SpecError(
            f"the example's x is {x.dtype} {list(x.shape)}, expected finite float32, or int64, [n, ...] with n of 2 or more"
        )
    if len(y) != len(x):
        raise SpecError(f"the example has {len(x)} samples and {len(y)} targets")
    if loss.classifies and (y.dtype != np.int64 or y.ndim != 1):
        raise SpecError(f"the example's y is {y.dtype} {list(y.shape)}, cross_entropy needs int64 [n]")
    if not loss.classifies and y.dtype != np.float32:
        raise SpecError(f"the example's y is {y.dtype}, mse needs float32")
    return x, y


def forward_of(model: nn.Module | Path | str, x: Array) -> ir.Model:
    """The forward graph of a torch module or an ONNX file. Raises `UnsupportedModel`."""
    return _read(model, x, fold=False).forward


def _read(model: nn.Module | Path | str, x: Array, *, fold: bool) -> _Source:
    if isinstance(model, str | Path):
        from export import onnx_import

        forward = onnx_import.forward_graph(Path(model))
        folded = fold_normalizations(forward) if fold else {}
        return _Source(forward, tuple(trainable_constants(forward.graph)), None, folded)
    from export import torch_import

    forward = torch_import.forward_graph(model, x[:2])
    folded = fold_normalizations(forward) if fold else {}
    named = [name for name, _ in model.named_parameters()]
    return _Source(forward, tuple(name for name in named if name in forward.graph.initializers), model, folded)


def _build_program(
    source: _Source, spec: ProgramSpec, name: str, loss: str, example: tuple[Array, Array], seed: int
) -> _Built:
    began = time.process_time()
    precision = Precision.named(spec.precision)
    if type(spec.batch) is not int or spec.batch < 1:
        raise SpecError(f"batch = {spec.batch!r} must be a whole number of 1 or more")
    if spec.largest is not None and (type(spec.largest) is not int or spec.largest < 1 or not spec.accumulate):
        raise SpecError(
            f"largest = {spec.largest!r} must be a whole number of 1 or more, of a program with accumulate = true"
        )
    scope = scope_named(spec.scope, spec.options)
    optimizer = optimizer_named(spec.optimizer)
    ids = [
        "/".join(part for part in (name, *kind, spec.scope, scope.label, spec.precision) if part)
        for kind in ((), ("evaluate",))
    ]
    if len(ids[1]) > _ID_LIMIT:
        raise SpecError(
            f"the program id {ids[1]!r} has {len(ids[1])} characters, at most {_ID_LIMIT} fit in a task: shorten the name"
        )
    forward = clone(source.forward)
    applied = scope.apply(forward, source.parameters, seed)
    dequantized = {} if precision.bits is None else quantize_weights(forward, precision.bits)
    loss_rule = loss_named(loss)
    graphs = build_graphs(
        forward, applied.trainables, loss_rule, optimizer, ids[0], example[0], applied.constants, precision
    )
    given = proof_constants(applied.constants, seed)
    proved = with_constants(forward, given)
    gradients = gradients_graph(proved, applied.trainables, loss_rule, ids[0])
    seconds = time.process_time() - began
    oracle: Oracle
    if source.module is None:
        oracle = CentralDifferences(loss_graph(proved, loss_rule), gradients, seed)
    else:
        from export.torch_import import TorchOracle, tensors_of

        tensors = {n: v.cpu().numpy() for n, v in tensors_of(source.module).items()}
        fixed = {name.split(".", 1)[1]: value for name, value in given.items()}
        oracle = TorchOracle(source.module, {**tensors, **source.folded, **dequantized, **fixed}, loss)
    proof = prove(ids[0], gradients, applied.trainables, applied.effective, oracle, *example, seed)
    frozen = {n: a for n, v in forward.graph.initializers.items() if (a := array_of(v)) is not None}
    return _Built(spec, scope, ids[0], ids[1], applied.trainables, applied.constants, graphs, frozen, proof, seconds)


def _class_names(classes: Sequence[str] | None, output: ir.Value, loss: Loss) -> list[str] | None:
    if classes is None:
        return None
    count = dims(output)[-1]
    if not loss.classifies or len(classes) != count:
        raise SpecError(
            f"{len(classes)} class names were given; the model has {count if loss.classifies else 'no'} classes"
        )
    return [str(label) for label in classes]


def _file(program_id: str, kind: str) -> str:
    return f"{program_id.replace('/', '_').replace('+', '-')}_{kind}.onnx"


def _assemble(
    name: str,
    loss: Loss,
    built: Sequence[_Built],
    x: Array,
    y: Array,
    classes: list[str] | None,
    held_out: HeldOut,
    extra: Deployed | None = None,
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest (without its list of files) and the files."""
    weights = WeightFile()
    table: dict[str, dict[str, Any]] = {}
    for entry in built:
        for row in _table_rows(entry, weights):
            if table.setdefault(row["name"], row) != row:
                raise SpecError(
                    f"tensor {row['name']!r} would differ between two programs of one bundle ({entry.id} and another): "
                    "build them into bundles of their own"
                )
    models = {
        _file(entry.id, kind): model
        for entry in built
        for kind, model in entry.graphs.files(accumulate=entry.spec.accumulate).items()
    }
    rows = list(table.values())
    if extra is not None:
        models |= extra.graphs
        rows += [dict(row) for row in extra.tensors if row["name"] not in table]
        rows += [late_row(name, value, weights.add(f"c.{name}", value)) for name, value in extra.late.items()]
    graphs, content = write_graphs(list(models.values()), weights)
    files = dict(zip(models, graphs, strict=True))
    files["weights.safetensors"] = content
    output = built[0].graphs.infer.graph.outputs[0]
    target: dict[str, Any] = {"name": TARGET, "dtype": y.dtype.name, "shape": list(y.shape[1:])}
    if loss.classifies:
        target["classes"] = dims(output)[-1]
    manifest = {
        "format": 1,
        "name": name,
        "base": _base_digest(built),
        "table": hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest(),
        "held_out": asdict(held_out),
        "fields": [{"name": INPUT, "dtype": x.dtype.name, "shape": list(x.shape[1:])}, target],
        "classes": classes,
        "tensors": rows,
        "programs": [
            *(row for entry in built for row in _program_rows(entry, loss)),
            *(() if extra is None else extra.programs),
        ],
        "report": {
            "operators": sorted({op for model in models.values() for op in operators(model)}),
            **({} if extra is None else extra.report),
        },
    }
    return manifest, files


def _table_rows(entry: _Built, weights: WeightFile) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for t in (*entry.trainables, *entry.constants):
        row: dict[str, Any] = {
            "name": t.name,
            "kind": t.kind,
            "dtype": "float32",
            "shape": list(t.value.shape),
            "merge": t.merge,
            "initial": weights.add(t.name, t.value),
        }
        if t.layer is not None and t.layer_shape is not None:
            row |= {"layer": t.layer, "layer_shape": list(t.layer_shape)}
            row |= {} if t.rank is None else {"scale": t.scale, "rank": t.rank}
        rows.append(row)
    rows += [
        {"name": held.name, "kind": "a", "dtype": "float32", "shape": list(held.shape), "merge": "sum"}
        for held in entry.graphs.accumulators
    ]
    return rows


def _base_digest(built: Sequence[_Built]) -> str:
    """One digest over every frozen tensor of every program."""
    lines = sorted(
        f"{entry.id}\0{name}\0{value.dtype}\0{list(value.shape)}\0{hashlib.sha256(value.tobytes()).hexdigest()}"
        for entry in built
        for name, value in entry.frozen.items()
    )
    return digest("\n".join(lines).encode())


def _program_rows(entry: _Built, loss: Loss) -> list[dict[str, Any]]:
    names = [t.name for t in entry.trainables]
    size = sum(t.value.nbytes for t in entry.trainables)
    optimizer = optimizer_named(entry.spec.optimizer)
    state = size * (1 + optimizer.slots)
    counted = [4 * int(np.prod(held.shape)) for held in entry.graphs.accumulators]
    up = len(pack({t.name: t.value for t in entry.trainables}))
    down = len(pack({t.name: t.value for t in (*entry.trainables, *entry.constants)}))
    features = entry.graphs.features
    prefix = entry.graphs.prefix
    frozen_flops = 0.0 if prefix is None else flops_per_sample(prefix)
    common: dict[str, Any] = {
        "precision": entry.spec.precision,
        "stage": 0,
        "width": 1.0,
        "rank": entry.scope.rank,
        "batch": {"default": entry.spec.batch, "minimum": 1},
        "partial_batch": "mask",
        "constants": [t.name for t in entry.constants],
        "prefix": [] if prefix is None else [{"file": _file(entry.id, "prefix"), "weight": 1.0}],
        "features": {
            "cacheable": features.cacheable,
            "reason": features.reason,
            "bytes": features.bytes,
            "dtype": features.dtype,
        },
    }
    parts: dict[str, Any] = {}
    if entry.spec.accumulate:
        parts = {
            "gradients": _file(entry.id, "gradients"),
            "apply": _file(entry.id, "apply"),
            "batch": {**common["batch"], "largest": entry.spec.largest or entry.spec.batch},
        }
    return [
        {
            **common,
            **parts,
            "id": entry.id,
            "scope": entry.spec.scope,
            "factors": entry.scope.factors,
            "tensors": names,
            "infer": _file(entry.id, "infer"),
            "step": [{"file": _file(entry.id, "step"), "weight": 1.0}],
            "hyper": {name: asdict(limits) for name, limits in optimizer.hyper.items()},
            "samples": "train",
            "evaluate": entry.evaluate_id,
            "state_bytes": state,
            "cost": {
                "bytes_up": up,
                "bytes_down": down,
                "step_flops": (frozen_flops + flops_per_sample(entry.graphs.step)) * entry.spec.batch,
                "prefix_flops": frozen_flops * entry.spec.batch,
                "feature_bytes": features.bytes,
                "step_bytes_per_sample": (peak_bytes(entry.graphs.step, 2000) - peak_bytes(entry.graphs.step, 1000))
                // 1000,
                "infer_flops": flops_per_sample(entry.graphs.infer),
                "state_bytes": 2 * state,
            },
            "proof": asdict(entry.proof),
        },
        {
            **common,
            "id": entry.evaluate_id,
            "scope": "evaluate",
            "factors": "",
            "tensors": [*names, *(held.name for held in entry.graphs.accumulators)],
            "infer": None,
            "step": [{"file": _file(entry.id, "evaluate"), "weight": 1.0}],
            "hyper": {},
            "samples": "held_out",
            "score": asdict(loss.score),
            "state_bytes": sum(counted),
            "cost": {"bytes_up": sum(counted), "bytes_down": 0, "state_bytes": 2 * sum(counted)},
        },
    ]


def _run_deployed(path: Path, x: Array, y: Array) -> None:
    """Run the programs of the quantized network with the device's runtime."""
    with Bundle.open(path) as bundle:
        for program in bundle.programs.values():
            if program.scope == "observe" or (program.accumulates and program.infer is not None):
                stepper = Stepper(bundle, program, bundle.initial(program))
                stepper.step({INPUT: x[:3], TARGET: y[:3]})
                stepper.close()
            if program.accumulates and program.infer is not None:
                Predictor(bundle, program, bundle.initial(program)).predict(x[:3])


def _run_once(path: Path, built: Sequence[_Built], x: Array, y: Array) -> None:
    """Open what was written and run every graph with the device's runtime. Raises what a device would raise."""
    with Bundle.open(path) as bundle:
        fields: Mapping[str, FieldSpec] = {held.name: held for held in bundle.fields}
        for entry in built:
            program, evaluate = bundle.program(entry.id), bundle.program(entry.evaluate_id)
            start = bundle.initial(program)
            rows = slice(0, min(3, len(x)))
            batch = {INPUT: x[rows], TARGET: y[rows]}
            fields[TARGET].check(y[rows])
            Predictor(bundle, program, start).predict(x[rows])
            for chosen in (program, evaluate):
                stepper = Stepper(bundle, chosen, start)
                stepper.step(batch, dict.fromkeys(chosen.hyper, 0.0))
                kept = stepper.tensors()
                if chosen is program and any((value != start[n]).any() for n, value in kept.items()):
                    raise ContractError(f"{entry.id}: I6: a step with learning rate 0 changes its tensors")
                if chosen is program and stepper.state_bytes != program.state_bytes:
                    raise ContractError(f"{entry.id}: I12: the state takes {stepper.state_bytes} bytes")
                stepper.close()
            if max_update_bytes(program, bundle.tensors) <= 0:
                raise UnsupportedModel(f"{entry.id}: trains nothing")
