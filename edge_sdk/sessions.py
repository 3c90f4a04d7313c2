"""Sessions of `onnxruntime` on the CPU: how much of the machine they may take, and how a graph file becomes one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import onnxruntime

from edge_sdk.bundle import WEIGHTS
from edge_sdk.errors import BundleError
from edge_sdk.onnx_wire import check_graph
from edge_sdk.tensors import Array

Signature = list[tuple[str, str, tuple[int | str, ...]]]


@dataclass(frozen=True)
class RuntimeProfile:
    """How much of the machine a session may take; the device profile decides.

    `prepacking` off keeps weights as mapped pages at the price of slower matrix products (step-graphs.md, 2.5).
    `cache_bytes`: for features of the frozen part, kept in memory during a task; `cache_dtype` is float16, which rounds
    them by 2**-11, or float32. `memory_bytes`: for the intermediate values of one step, as the exporter estimates them;
    a larger batch goes in parts, where the program can.
    """

    threads: int = 1
    arena: bool = True
    memory_pattern: bool = False
    prepacking: bool = True
    cache_bytes: int = 8 << 20
    cache_dtype: str = "float16"
    memory_bytes: int | None = None


def open_session(path: Path, profile: RuntimeProfile) -> onnxruntime.InferenceSession:
    """An inference session on the CPU. Raises `BundleError` when the graph breaks a rule of ours, or the runtime refuses it."""
    check_graph(path, WEIGHTS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = profile.arena
    options.enable_mem_pattern = profile.memory_pattern
    options.log_severity_level = 3
    # The app beside us needs the core more than a waiting thread does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not profile.prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(
            f"{path.name}: onnxruntime {onnxruntime.__version__} refuses this graph ({str(error)[:300]}): "
            "export the bundle again, or upgrade onnxruntime"
        ) from error


def inputs_of(session: onnxruntime.InferenceSession) -> Signature:
    """Name, type and shape of every input; the symbolic axis is a string."""
    return [(value.name, value.type, tuple(value.shape)) for value in session.get_inputs()]


def outputs_of(session: onnxruntime.InferenceSession) -> Signature:
    """Name, type and shape of every output."""
    return [(value.name, value.type, tuple(value.shape)) for value in session.get_outputs()]


def shared(value: Array) -> onnxruntime.OrtValue:
    """An OrtValue on the array's own memory, which it does not keep alive."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(value)


def give_back() -> None:
    """Return freed memory to the system: glibc keeps what a closed session used, in pieces, for the next one."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none and need none
    if trim is not None:
        trim(0)
