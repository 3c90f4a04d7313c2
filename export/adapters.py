"""What a federation trained leaves it: merged into the float weights, or as an adapter that PEFT reads.

    merged   W = W0 + s B A (+ L Q), for each pair of the tensor table; what merges by its mean replaces the tensor it is
    PEFT     adapter_config.json and adapter_model.safetensors with `base_model.model.<layer>.lora_A.weight` [r, n] and
             `.lora_B.weight` [m, r] (huggingface/peft, save format of LoRA); the other tensors under their own names

The master are the float weights that the bundle was exported from, by the names of the torch module, never an int8 base:
adding to rounded weights with their old scales would round twice (methods/precision.md, section 8). Sums in float64.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_sdk.bundle import Bundle, Program, TensorEntry
from edge_sdk.errors import StorageError
from edge_sdk.tensors import Array, Tensors
from export.errors import SpecError
from export.precision import Precision

ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_MODEL: Final = "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PACKED: Final = ("q_proj", "k_proj", "v_proj")  # the rows of torch's `in_proj_weight`, in this order
_FACTORS: Final = ("lora_a", "lora_b", "side_l", "side_q")


@dataclass(frozen=True)
class Pair:
    """The adapter of one layer: `a` [r, n], `b` [m, r] and `scale`; `side` is `L Q` [m, n] where there is a side term."""

    layer: str
    a: Array
    b: Array
    scale: float
    side: Array | None

    @property
    def product(self) -> Array:
        """`s B A + L Q`, float64 [m, n]."""
        product: Array = self.scale * (self.b.astype(np.float64) @ self.a.astype(np.float64))
        return product if self.side is None else product + self.side


def pairs_of(bundle: Bundle, program: Program, tensors: Tensors) -> list[Pair]:
    """The adapters of a program, in the order of the tensor table. Raises `SpecError` where it has none."""
    halves: dict[str, dict[str, TensorEntry]] = {}
    for entry in bundle.starting(program):
        if entry.merge in _FACTORS:
            halves.setdefault(str(entry.layer), {})[entry.merge] = entry
    if not halves:
        raise SpecError(f"program {program.id!r} has no adapters: its scope is {program.scope!r}, expected 'lora'")
    found = []
    for layer, parts in halves.items():
        value = {kind: tensors[entry.name] for kind, entry in parts.items()}
        scale = parts["lora_a"].scale
        assert scale is not None
        side = value["side_l"].astype(np.float64) @ value["side_q"] if "side_l" in value else None
        found.append(Pair(layer, value["lora_a"], value["lora_b"], scale, side))
    return found


def merged(bundle: Bundle, program: Program, tensors: Tensors, master: Tensors) -> dict[str, Array]:
    """The master with what was trained in it; dtypes and shapes are the master's. Raises `SpecError` naming the tensor.

    `tensors`: those that `program` starts from or ended with; `master`: a torch module's tensors by name.
    """
    _check_folds(bundle, master)
    result = dict(master)
    for pair in pairs_of(bundle, program, tensors):
        name, rows = _weight(pair, master)
        changed = result[name].astype(np.float64)
        part = changed[rows]
        part += pair.product.reshape(part.shape)
        result[name] = changed.astype(master[name].dtype)
    for name, value in _whole(bundle, program, tensors).items():
        if name not in master or master[name].shape != value.shape:
            raise SpecError(f"the master holds {_found(master, name)}, expected {list(value.shape)}: {_REMEDY}")
        result[name] = value.astype(master[name].dtype)
    return result


def write_peft(
    bundle: Bundle, program: Program, tensors: Tensors, master: Tensors, folder: Path, base_model: str
) -> None:
    """Write an adapter that PEFT loads over `base_model`. Raises `SpecError` for a layer that PEFT has no such adapter of."""

    _check_folds(bundle, master)
    pairs = pairs_of(bundle, program, tensors)
    content: dict[str, Array] = {}
    for pair in pairs:
        name, rows = _weight(pair, master)
        if rows != slice(None):
            raise SpecError(
                f"layer {pair.layer!r} is a third of {name!r}: PEFT adapts a packed projection as a whole; merge instead"
            )
        if pair.side is not None and pair.side.any():
            raise SpecError(f"layer {pair.layer!r} has a side term, which PEFT does not know: merge instead")
        kernel = master[name].shape[2:]
        if kernel and master[name].shape[1] * int(np.prod(kernel)) != pair.a.shape[1]:
            raise SpecError(f"layer {pair.layer!r} is a grouped convolution: its adapter has another form in PEFT")
        stem = f"{_PREFIX}{pair.layer}"
        content[f"{stem}.lora_A.weight"] = pair.a.reshape(len(pair.a), -1, *kernel)
        content[f"{stem}.lora_B.weight"] = pair.b.reshape(*pair.b.shape, *[1] * len(kernel))
    whole = _whole(bundle, program, tensors)
    content |= {f"{_PREFIX}{name}": value for name, value in whole.items()}
    config = _config(pairs, sorted({name.rpartition(".")[0] for name in whole}), base_model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from error
    write_tensors(content, folder / ADAPTER_MODEL)


def _config(pairs: list[Pair], whole: list[str], base_model: str) -> dict[str, Any]:
    """One rank and alpha for all; `rank_pattern` and `alpha_pattern` where a layer differs. s = alpha / r, so no rsLoRA."""
    ranks = {pair.layer: len(pair.a) for pair in pairs}
    alphas = {pair.layer: pair.scale * len(pair.a) for pair in pairs}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {layer: value for layer, value in ranks.items() if value != rank},
        "alpha_pattern": {layer: value for layer, value in alphas.items() if value != alpha},
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": list(ranks),
        "modules_to_save": whole or None,
    }


def _whole(bundle: Bundle, program: Program, tensors: Tensors) -> dict[str, Array]:
    """What trained as it is: heads, norms, biases."""
    trained = [bundle.tensors[name] for name in program.tensors]
    return {entry.name: tensors[entry.name] for entry in trained if entry.merge not in _FACTORS and entry.kind == "p"}


def _weight(pair: Pair, master: Tensors) -> tuple[str, slice]:
    """The tensor of the master that a pair belongs to, and which of its rows."""
    m, n = len(pair.b), pair.a.shape[1]
    names = {_table_name(name): name for name in master}
    stem, _, part = pair.layer.rpartition(".")
    packed = names.get(".".join(filter(None, [stem, "in_proj_weight"])))
    if part in _PACKED and packed is not None and master[packed].shape == (3 * m, n):
        first = m * _PACKED.index(part)
        return packed, slice(first, first + m)
    name = names.get(f"{pair.layer}.weight", f"{pair.layer}.weight")
    value = master.get(name)
    if value is None or value.ndim < 2 or (len(value), int(np.prod(value.shape[1:]))) != (m, n):
        raise SpecError(f"the master holds {_found(master, name)}, expected {m} x {n} numbers: {_REMEDY}")
    return name, slice(None)


def _check_folds(bundle: Bundle, master: Tensors) -> None:
    """Serving in integers folds batch norms into weights, and what then trains belongs to the folded ones."""
    trained = [program for program in bundle.programs.values() if not program.accumulates]
    served = [program.id for program in trained if Precision.named(program.precision).serves]
    if served and any(name.endswith("running_mean") for name in master):
        raise SpecError(
            f"{bundle.path}: program {served[0]!r} folded batch norms into weights, and the master holds them apart: "
            "export the adapters in a bundle without it"
        )


_REMEDY: Final = "give the float weights that the bundle was exported from"


def _table_name(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "_.") else "_" for c in name)


def _found(master: Mapping[str, Array], name: str) -> str:
    return f"{name!r} {list(master[name].shape)}" if name in master else f"no tensor {name!r}"


def read_tensors(path: Path) -> dict[str, Array]:
    """A safetensors file of dtypes that NumPy has. Raises `SpecError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (SafetensorError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"{path}: not a safetensors file of float32, float16 or float64: {error}") from error


def write_tensors(tensors: Tensors, path: Path) -> None:
    """A safetensors file that torch and PEFT read. Raises `StorageError`."""
    from safetensors.numpy import save

    content = save({name: np.ascontiguousarray(value) for name, value in tensors.items()}, {"format": "pt"})
    try:
        path.write_bytes(content)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error


def program_of(bundle: Bundle, tensors: Tensors) -> Program:
    """The program whose tensors these are. Raises `SpecError`."""
    fitting = bundle.predicting_with(tensors)
    if not fitting:
        raise SpecError(
            f"{bundle.path}: no program has the tensors of this model ({', '.join(sorted(tensors)) or 'none'}): "
            "give the bundle that it was trained with"
        )
    return fitting[0]
