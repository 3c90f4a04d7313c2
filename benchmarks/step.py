"""Training steps on the device's runtime beside torch, ONNX Runtime Training and onnxsim: time, memory, size, exactness.

Every net of `step_models` is built once; then each peer runs in a process of its own (`step_peers`), with one thread, on the
same batch, tensors, loss and AdamW. Where the cut is late (scope `layer`) a second process of ours keeps what the frozen part made
of its samples: `kept ms` is a step of every epoch but the first, and `cached_epoch_ratio` the worst ratio of the two. The
processes take turns, a few steps each, and CPU time per step is the median of the
turns; peak memory (VmHWM) is that of a further fresh process. The first loss of every peer must be the same.

Environments: torch runs here; Edgewise in `.venv-device` (`make .venv-device/ready`); the other two, which this benchmark
makes, in `.venv-orttraining` (onnxruntime-training 1.19.2, the last release, with torch, which its import needs) and
`.venv-onnxsim`. `--peers` names those to run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from benchmarks.report import CheckFailed, Report, main, parser, ratio, table
from benchmarks.step_models import STEP_MODELS, StepModel
from edge_sdk.errors import EdgewiseError, MissingDependency
from export import torch_import
from export.build import ProgramSpec, build_bundle
from export.graph import clone
from export.scopes import scope_named

CHECKOUT = Path(__file__).resolve().parent.parent
PEERS = CHECKOUT / "benchmarks" / "step_peers"
BATCH = 16
RATE = 1e-3
SAME_LOSS = 1e-3  # relative
TURN_SECONDS = 0.15  # of CPU time in one turn of one process
MEMORY_STEPS = 12
ANCHORS = {  # environment -> what is installed, in this order
    ".venv-orttraining": [[os.environ.get("TORCH", "torch==2.13.0")], ["onnxruntime-training==1.19.2", "onnx==1.17.0"]],
    ".venv-onnxsim": [["onnxsim==0.8.1", "onnxruntime", "onnx"]],
}
COLUMNS = {
    "net": "net",
    "parameters": "trained",
    "nodes": "nodes",
    "float_ms": "ours ms",
    "int8_ms": "int8 ms",
    "kept_ms": "kept ms",
    "torch_ms": "torch ms",
    "orttraining_ms": "ORT-T ms",
    "onnxsim_ms": "onnxsim",
    "onnxsim_int8_ms": "its int8",
    "time_ratio_torch": "ours/torch",
    "time_ratio_orttraining": "ours/ORT-T",
    "float_mb": "ours MB",
    "torch_mb": "torch MB",
    "memory_ratio_torch": "ours/torch",
    "gradient_error": "error",
    "build_seconds": "build s",
}


@dataclass(frozen=True)
class _Peer:
    """A column of the table: how its process is started, or why it cannot be."""

    name: str
    command: tuple[str, ...]


class _Process:
    """A peer's process that answers commands (`step_peers.protocol`)."""

    def __init__(self, peer: _Peer) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        self._complaints: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self._child = subprocess.Popen(
            list(peer.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=environment,
        )
        self._name = peer.name
        self.read()

    def ask(self, command: str) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises `PeerFailed`."""
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(command + "\n")
            self._child.stdin.flush()
        except BrokenPipeError as error:
            raise PeerFailed(self._last_words()) from error
        return self.read()

    def read(self) -> dict[str, Any]:
        """The next answer; what else the peer prints is passed over."""
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise PeerFailed(self._last_words())

    def close(self) -> None:
        """End the process."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with suppress(BrokenPipeError):
            self._child.stdin.close()
        self._child.stdout.close()
        self._child.wait(60)
        self._complaints.close()

    def _last_words(self) -> str:
        self._child.wait(60)
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:160] if lines else f"ended with {self._child.returncode}"


class PeerFailed(EdgewiseError):
    """A peer cannot run this net."""


def measure(args: argparse.Namespace) -> Report:
    """One row per net."""
    peers = args.peers.split(",")
    pythons = _environments(peers)
    unknown = [net for net in args.nets or [] if net not in STEP_MODELS]
    if unknown:
        raise CheckFailed(f"no net is called {unknown[0]!r}; there are {', '.join(STEP_MODELS)}")
    rows = []
    for net in args.nets or STEP_MODELS:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(_row(net, STEP_MODELS[net], Path(folder), pythons, args.turns))
        print(table(rows[-1:], COLUMNS).splitlines()[1], file=sys.stderr, flush=True)
        for peer, reason in rows[-1]["failed"].items():
            print(f"    {peer}: {reason}", file=sys.stderr, flush=True)
    return Report(rows, _summary(rows))


def _row(net: str, model: StepModel, folder: Path, pythons: Mapping[str, Path], turns: int) -> dict[str, Any]:
    x, y = model.example(BATCH)
    np.savez(folder / "batch.npz", x=x, y=y, learning_rate=RATE)
    row: dict[str, Any] = {"net": net, "scope": model.scope, "failed": {}}
    peers = _prepare(net, model, (x, y), folder, pythons, row)
    with ExitStack() as stack:
        running: dict[str, _Process] = {}
        first: dict[str, float] = {}
        for peer in peers:
            with _noted(row, peer):
                process = _Process(peer)
                stack.callback(process.close)
                first[peer.name] = process.ask("steps 1")["first"]
                running[peer.name] = process
        for name, reason in _same_loss(net, first).items():
            del running[name]
            row["failed"][name] = reason
        for name, milliseconds in _timed(running, turns).items():
            row[f"{name}_ms"] = milliseconds
    for peer in peers:
        if peer.name in running:
            process = _Process(peer)
            process.ask(f"steps {MEMORY_STEPS}")
            found = process.ask("memory")
            process.close()
            row[f"{peer.name}_mb"] = found["peak_bytes"] / 1e6
            row[f"{peer.name}_anonymous_mb"] = found["anonymous_bytes"] / 1e6
    row["time_ratio_torch"] = ratio(row.get("float_ms"), row.get("torch_ms"))
    row["time_ratio_orttraining"] = ratio(row.get("float_ms"), row.get("orttraining_ms"))
    row["int8_over_float"] = ratio(row.get("int8_ms"), row.get("float_ms"))
    row["cached_epoch_ratio"] = ratio(row.get("kept_ms"), row.get("float_ms"))
    row["memory_ratio_torch"] = ratio(row.get("float_mb"), row.get("torch_mb"))
    return row


def _prepare(
    net: str,
    model: StepModel,
    example: tuple[np.ndarray, np.ndarray],
    folder: Path,
    pythons: Mapping[str, Path],
    row: dict[str, Any],
) -> list[_Peer]:
    """Write what the peers need and say how to start them."""
    module = model.make()
    batch = str(folder / "batch.npz")
    peers = []
    precisions = ["float"] if model.scope == "full" else ["float", "int8"]  # where everything trains nothing is frozen
    for precision in precisions:
        path = folder / f"{precision}.bundle"
        spec = ProgramSpec(model.scope, model.options, precision=precision)
        report = build_bundle(module, example, path, name=net.replace("_", "-"), loss=model.loss, programs=[spec])
        program = report.programs[0]
        row[f"{precision}_bundle_bytes"] = report.bytes
        if precision == "float":
            row |= {
                "parameters": program.parameters,
                "nodes": program.nodes,
                "graph_bytes": program.step_bytes,
                "gradient_error": program.proof.max_relative_error,
                "build_seconds": program.seconds,
            }
        if "edgewise" in pythons:
            script = str(PEERS / "edgewise.py")
            command = (str(pythons["edgewise"]), script, str(path), batch)
            peers.append(_Peer(precision, command))
            if precision == "float" and model.scope == "layer":
                peers.append(_Peer("kept", (*command, "kept")))
    if "torch" in pythons:
        script = str(PEERS / "torch_eager.py")
        peers.append(_Peer("torch", (str(pythons["torch"]), script, net, json.dumps(model.options), batch)))
    trained = _with_tensors(model, module, example[0])
    (folder / "names.json").write_text(json.dumps({**trained[1], "loss": model.loss}))
    names = str(folder / "names.json")
    if "orttraining" in pythons:
        onnx.save(trained[0], folder / "forward.onnx")
        (folder / "orttraining").mkdir()
        script = str(PEERS / "orttraining.py")
        arguments = (str(folder / "forward.onnx"), names, batch, str(folder / "orttraining"))
        peers.append(_Peer("orttraining", (str(pythons["orttraining"]), script, *arguments)))
    if "onnxsim" in pythons:
        onnx.save(_with_loss(trained[0], model, example), folder / "loss.onnx")
        script = str(PEERS / "onnxsim.py")
        for name, precision in (("onnxsim", "float"), ("onnxsim_int8", "int8"))[: len(precisions)]:
            arguments = (str(folder / "loss.onnx"), names, batch, precision)
            peers.append(_Peer(name, (str(pythons["onnxsim"]), script, *arguments)))
    return peers


def _with_tensors(model: StepModel, module: Any, x: np.ndarray) -> tuple[onnx.ModelProto, dict[str, list[str]]]:
    """The forward graph, adapters included, with every tensor in it; and which of them train."""
    forward = torch_import.forward_graph(module, x[:2])
    parameters = [name for name, _ in module.named_parameters() if name in forward.graph.initializers]
    applied = scope_named(model.scope, model.options).apply(forward, parameters, 0)
    graph = clone(forward).graph
    inputs = {value.name: value for value in graph.inputs}
    for tensor in applied.trainables:
        value = inputs[f"p.{tensor.name}"]
        graph.inputs.remove(value)
        value.const_value = ir.tensor(tensor.value, name=value.name)
        graph.register_initializer(value)
    trained = [f"p.{tensor.name}" for tensor in applied.trainables]
    frozen = [
        name
        for name, value in graph.initializers.items()
        if name not in trained and value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT
    ]
    proto = ir.to_proto(ir.Model(graph, ir_version=10))
    return proto, {"trained": trained, "frozen": frozen}


def _with_loss(forward: onnx.ModelProto, model: StepModel, example: tuple[np.ndarray, np.ndarray]) -> onnx.ModelProto:
    """The forward graph at a fixed batch with the loss behind it, in the operators that onnxsim may know."""
    proto = onnx.ModelProto()
    proto.CopyFrom(forward)
    graph = proto.graph
    del graph.value_info[:]
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = BATCH
    output = graph.output[0].name
    y = example[1]
    kind = TensorProto.FLOAT if model.loss == "mse" else TensorProto.INT64
    graph.input.append(helper.make_tensor_value_info("d.y", kind, list(y.shape)))
    if model.loss == "mse":
        graph.node.append(helper.make_node("Sub", [output, "d.y"], ["off"]))
        graph.node.append(helper.make_node("Mul", ["off", "off"], ["squared"]))
        graph.node.append(helper.make_node("ReduceMean", ["squared"], ["loss"], keepdims=0))
    else:
        graph.node.append(helper.make_node("SoftmaxCrossEntropyLoss", [output, "d.y"], ["loss"], reduction="mean"))
    del graph.output[:]
    graph.output.append(helper.make_tensor_value_info("loss", TensorProto.FLOAT, []))
    return proto


@contextmanager
def _noted(row: dict[str, Any], peer: _Peer) -> Iterator[None]:
    try:
        yield
    except PeerFailed as failed:
        if peer.name in ("float", "int8", "kept", "torch"):
            raise CheckFailed(f"{row['net']}: {peer.name} failed: {failed}") from failed
        row["failed"][peer.name] = str(failed)


def _same_loss(net: str, losses: Mapping[str, float]) -> dict[str, str]:
    """Who computed something else than torch. An int8 base is another net, if only slightly. Raises `CheckFailed` for us."""
    expected, strangers = losses.get("torch"), {}
    for name, loss in losses.items():
        if expected is not None and "int8" not in name and abs(loss - expected) > SAME_LOSS * abs(expected):
            strangers[name] = f"its first loss is {loss:.6g}, torch's is {expected:.6g}: it does other work"
    if "float" in strangers:
        raise CheckFailed(f"{net}: {strangers['float']}")
    return strangers


def _timed(running: Mapping[str, _Process], turns: int) -> dict[str, float]:
    """CPU milliseconds per step: the median over the turns."""
    counts = {}
    for name, process in running.items():
        process.ask("steps 3")
        took = process.ask("steps 3")["cpu"] / 3
        counts[name] = max(1, min(200, round(TURN_SECONDS / max(took, 1e-5))))
    found: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(turns):
        order = list(running) if turn % 2 == 0 else list(reversed(running))
        for name in order:
            cpu = running[name].ask(f"steps {counts[name]}")["cpu"]
            found[name].append(1000 * cpu / counts[name])
    return {name: statistics.median(values) for name, values in found.items()}


def _environments(peers: Sequence[str]) -> dict[str, Path]:
    """The Python of each peer; makes the environments that are missing."""
    places = {
        "edgewise": CHECKOUT / ".venv-device",
        "torch": Path(sys.prefix),
        "orttraining": CHECKOUT / ".venv-orttraining",
        "onnxsim": CHECKOUT / ".venv-onnxsim",
    }
    unknown = [peer for peer in peers if peer not in places]
    if unknown:
        raise CheckFailed(f"no peer is called {unknown[0]!r}; there are {', '.join(places)}")
    for peer in peers:
        place = places[peer]
        if place.name in ANCHORS and not (place / "ready").exists():
            _install(place, ANCHORS[place.name])
        if not (place / "bin" / "python").exists():
            raise MissingDependency(f"{place.name} is missing: make {place.name}/ready")
    return {peer: places[peer] / "bin" / "python" for peer in peers}


def _install(place: Path, steps: Sequence[Sequence[str]]) -> None:
    print(f"making {place.name} (once)", file=sys.stderr, flush=True)
    began = time.monotonic()
    for command in (
        [sys.executable, "-m", "venv", str(place)],
        *([str(place / "bin" / "pip"), "install", "-q", *s] for s in steps),
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise MissingDependency(f"{place.name} cannot be made: {last}; leave its peer out with --peers")
    (place / "ready").touch()
    print(f"{place.name} took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = [row["time_ratio_torch"] for row in rows if row["time_ratio_torch"]]
    return {
        "time_ratio_torch_geomean": _geomean(times),
        "time_ratio_torch_max": max(times, default=None),
        "time_ratio_orttraining_geomean": _geomean(
            [r["time_ratio_orttraining"] for r in rows if r["time_ratio_orttraining"]]
        ),
        "memory_ratio_torch_geomean": _geomean(
            [row["memory_ratio_torch"] for row in rows if row["memory_ratio_torch"]]
        ),
        "int8_over_float_time_geomean": _geomean([row["int8_over_float"] for row in rows if row["int8_over_float"]]),
        "cached_epoch_ratio": max((r["cached_epoch_ratio"] for r in rows if r["cached_epoch_ratio"]), default=None),
        "max_gradient_error": max(row["gradient_error"] for row in rows),
        "build_seconds_max": max(row["build_seconds"] for row in rows),
    }


def _geomean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def _shown(report: Report) -> str:
    figures = "\n".join(f"  {key:<34} {value:.3g}" for key, value in report.summary.items() if value is not None)
    return f"{table(report.rows, COLUMNS)}\n\nbatch {BATCH}, one thread, CPU time; AdamW\n{figures}"


def _arguments() -> argparse.ArgumentParser:
    arguments = parser("step", __doc__)
    arguments.add_argument("nets", nargs="*", metavar="NET", help=f"some of: {', '.join(STEP_MODELS)} (default: all)")
    arguments.add_argument("--peers", default="edgewise,torch,orttraining,onnxsim", help="which columns to measure")
    arguments.add_argument("--turns", type=int, default=9, help="turns of every process; the median counts")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main(measure, _shown, _arguments()))
