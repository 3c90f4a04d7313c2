"""Sessions of `onnxruntime` on the CPU: how much of the machine they may take, and how a graph file becomes one.

All sessions of a process share one arena, the allocator's store of memory for intermediate values. With an arena each,
which never shrinks, prefix and step would hold the sum of their peaks; shrinking the one before the other runs, or going
without an arena, costs more than it saves (measured by `tests/system/test_step_memory.py`). What is left of the shared
one goes back to the system at the end of a task, `give_back`.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime

from edge_sdk.bundle import WEIGHTS
from edge_sdk.errors import BundleError
from edge_sdk.onnx_wire import check_graph
from edge_sdk.tensors import Array

log = logging.getLogger(__name__)

# The runtime fuses a product with a dequantized weight into MatMulNBits, and by default rounds the activations to 8 bits
# there, in the forward pass only: the gradient would be that of another function (0.3 % off). Level 1 computes in float32.
FLOAT_PRODUCTS: Final = ("session.qdq_matmulnbits_accuracy_level", "1")

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


def open_session(
    path: Path, profile: RuntimeProfile, late: Mapping[str, Array] | None = None
) -> onnxruntime.InferenceSession:
    """An inference session on the CPU. Raises `BundleError` when the graph breaks a rule of ours, or the runtime refuses it.

    `late`: values for constants of the graph instead of those in the weight file, by name. They are constants to the
    runtime, which chooses its kernels by them; their memory must outlive the session.
    """
    check_graph(path, WEIGHTS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = profile.threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = profile.arena
    options.enable_mem_pattern = profile.memory_pattern
    options.log_severity_level = 3
    # The app beside us needs the core more than a waiting thread does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry(*FLOAT_PRODUCTS)
    if profile.arena and _shared_arena():
        options.add_session_config_entry("session.use_env_allocators", "1")
    if not profile.prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if late:
        options.add_external_initializers(list(late), [shared(value) for value in late.values()])
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
    """Return freed memory to the system: the arena's, and what glibc keeps in pieces of what a closed session used."""
    if _shared_arena.cache_info().currsize:
        _empty_arena()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none and need none
    if trim is not None:
        trim(0)


@functools.cache
def _shared_arena() -> bool:
    """Register the arena that all our sessions share; whether there is one."""
    where = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        # Strategy 1 takes as much as is asked for, not the next power of two: and gives the first piece back as well.
        onnxruntime.create_and_register_allocator(where, onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1}))
    except Exception:  # the runtime's errors have no base class; the app may have registered one of its own
        log.info("no arena could be registered for all sessions: one may be there already", exc_info=True)
    return True


def _empty_arena() -> None:
    """The runtime empties an arena at the end of a run that asks for it: of the smallest graph that there is."""
    options, asks = onnxruntime.SessionOptions(), onnxruntime.RunOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.use_env_allocators", "1")
    asks.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    session = onnxruntime.InferenceSession(_IDENTITY, options, providers=["CPUExecutionProvider"])
    binding, held = session.io_binding(), {name: np.zeros(1, np.float32) for name in "xy"}
    binding.bind_ortvalue_input("x", shared(held["x"]))
    binding.bind_ortvalue_output("y", shared(held["y"]))  # an output in the arena would keep a piece of it
    session.run_with_iobinding(binding, asks)


# y = Identity(x), float32 [1]: IR version 10, opset 21.
_IDENTITY: Final = (
    b'\x08\n:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x15"
)
