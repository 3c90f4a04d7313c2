"""The export specification (TOML): what `edgewise export build` is told. Unknown keys are refused with the nearest name.

    name = "watch"                             of the bundle; the first part of every program id
    model = "watch_model:untrained"            a function `package.module:name` that returns a torch module, or "net.onnx"
    weights = "watch.safetensors"              optional: the module's tensors by name
    example = "example.npz"                    arrays x and y: a few real samples, for shapes and for the proof
    loss = "cross_entropy"                     or "mse"
    classes = ["left", "right"]                optional: names of the labels
    seed = 0                                   of the adapters' initial values
    held_out = { share = 0.2, gap = 1 }        what of each recording never trains, and how many windows before it are left out

    [[program]]                                one per thing that devices may train
    scope = "lora"                             "lora" | "head" | "layer" | "full"
    precision = "int8"                         "int8" (the frozen part) | "float" | "ptq2".."ptq8" | "qat2".."qat8" (export/precision.py)
    optimizer = "adamw"                        "adamw" | "sgd", each also with "+prox" (FedProx)
    batch = 32                                 default batch size
    accumulate = true                          optional: devices may train on larger batches, in parts of at most
    largest = 32                               this many samples (default: batch); needs two more graphs
    rank = 4                                   further keys are options of the scope (lora: docs/lora.md; layer: modules)

    [deploy]                                   optional: quantize the network as it is, and serve it in integers
    bits = 8                                   of weights, 2 to 8; activations have 8
    tolerance = 0.01                           how far accuracy may fall, as a share
    qat_steps = 150                            training where it falls further; 0 never trains
    equalize = true
    reduce_range = false                       true for processors whose 8-bit products saturate
    profile = "x86_gateway"                    or flash_kb = 512: what the target holds
    held_out = "held_out.npz"                  x and y to judge by (default: the last fifth of the example)
    allow = ["latency"]                        gates that may fail: fusion, accuracy, latency, budget

Paths are relative to the file; modules are looked for in its folder first.
"""

from __future__ import annotations

import difflib
import importlib
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from devices.profile import load_profile
from edge_sdk.bundle import HeldOut
from edge_sdk.keys import SigningKey
from edge_sdk.tensors import Array
from export.build import Deploy, ProgramSpec, Report, build_bundle, forward_of
from export.errors import SpecError
from export.quantize.pipeline import Data, Recipe, quantize_model
from export.quantize.report import GATES, QuantReport
from export.quantize.settings import QatSettings

_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "name": str,
    "model": str,
    "weights": str,
    "example": str,
    "loss": str,
    "classes": list,
    "seed": int,
    "held_out": dict,
    "program": list,
    "deploy": dict,
}
_DEPLOY_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "bits": int,
    "tolerance": (int, float),
    "qat_steps": int,
    "equalize": bool,
    "reduce_range": bool,
    "profile": str,
    "flash_kb": int,
    "held_out": str,
    "allow": list,
}
_REQUIRED = ("name", "model", "example", "loss", "program")
_PROGRAM_KEYS = ("scope", "precision", "optimizer", "batch", "accumulate", "largest")


@dataclass(frozen=True)
class Spec:
    """One export specification; the module's docstring explains each key."""

    path: Path
    name: str
    model: str
    example: Path
    loss: str
    programs: tuple[ProgramSpec, ...]
    weights: Path | None = None
    classes: tuple[str, ...] | None = None
    seed: int = 0
    held_out: HeldOut = HeldOut(0.2, 1)
    deploy: Mapping[str, Any] | None = None


def load_spec(path: Path) -> Spec:
    """Read and check a specification. Raises `SpecError` naming file and key."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not a TOML file: {error}") from error
    for key, value in content.items():
        if key not in _KEYS:
            near = difflib.get_close_matches(key, _KEYS, n=1)
            raise SpecError(
                f"{path}: unknown key {key!r}; {f'did you mean {near[0]!r}?' if near else 'known: ' + ', '.join(_KEYS)}"
            )
        if not isinstance(value, _KEYS[key]) or isinstance(value, bool):
            raise SpecError(f"{path}: {key} = {value!r} has the wrong type")
    for key in _REQUIRED:
        if key not in content:
            raise SpecError(f"{path}: the key {key!r} is missing")
    held_out = content.get("held_out", {})
    if set(held_out) - {"share", "gap"}:
        raise SpecError(f"{path}: held_out has share and gap, found {', '.join(held_out)}")
    return Spec(
        path=path,
        name=content["name"],
        model=content["model"],
        example=path.parent / content["example"],
        loss=content["loss"],
        programs=tuple(_program(row, path) for row in content["program"]),
        weights=path.parent / content["weights"] if "weights" in content else None,
        classes=tuple(content["classes"]) if "classes" in content else None,
        seed=content.get("seed", 0),
        held_out=HeldOut(float(held_out.get("share", 0.2)), int(held_out.get("gap", 1))),
        deploy=_deploy(content["deploy"], path) if "deploy" in content else None,
    )


def with_deploy(spec: Spec, changes: Mapping[str, Any]) -> Mapping[str, Any]:
    """The [deploy] table with these keys changed. Raises `SpecError`."""
    return _deploy({**(spec.deploy or {}), **changes}, spec.path)


def _deploy(table: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    for key, value in table.items():
        kind = _DEPLOY_KEYS.get(key)
        if kind is None:
            raise SpecError(f"{path}: unknown key {key!r} of [deploy]; known: {', '.join(_DEPLOY_KEYS)}")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SpecError(f"{path}: {key} = {value!r} of [deploy] has the wrong type")
    unknown = set(table.get("allow", ())) - set(GATES)
    if unknown:
        raise SpecError(f"{path}: allow = {table['allow']} of [deploy]: the gates are {', '.join(GATES)}")
    if "profile" in table and "flash_kb" in table:
        raise SpecError(f"{path}: [deploy] has profile and flash_kb: the profile says what the flash holds")
    return table


def _program(row: Any, path: Path) -> ProgramSpec:
    if not isinstance(row, dict) or not isinstance(row.get("scope"), str):
        raise SpecError(f"{path}: every [[program]] names its scope")
    given = {key: row[key] for key in _PROGRAM_KEYS if key in row}
    if not isinstance(given.get("accumulate", False), bool):
        raise SpecError(f"{path}: accumulate = {given['accumulate']!r} must be true or false")
    return ProgramSpec(options={key: value for key, value in row.items() if key not in _PROGRAM_KEYS}, **given)


def build_spec(
    spec: Spec,
    output: Path,
    *,
    module: Any = None,
    release_key: SigningKey | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Build what a specification says; `module`: with other weights than its own. Raises `ExportError`."""
    x, y = example_of(spec)
    deploy = None
    if spec.deploy is not None:
        deploy, (x, y) = deploy_of(spec, x, y)
    return build_bundle(
        module_of(spec) if module is None else module,
        (x, y),
        output,
        name=spec.name,
        loss=spec.loss,
        programs=spec.programs,
        classes=spec.classes,
        held_out=spec.held_out,
        seed=spec.seed,
        release_key=release_key,
        deploy=deploy,
        on_progress=on_progress,
    )


def deploy_of(spec: Spec, x: Array, y: Array) -> tuple[Deploy, tuple[Array, Array]]:
    """The recipe with the samples to judge by, and the rest of the example. Raises `ExportError`, `ProfileError`."""
    table = spec.deploy or {}
    profile = load_profile(table["profile"]) if "profile" in table else None
    bits = table.get("bits", 8)
    if profile is not None and bits not in profile.bits:
        raise SpecError(
            f"{spec.path}: deploy.bits = {bits}, but profile {table['profile']!r} runs {', '.join(map(str, profile.bits))}"
        )
    steps = table.get("qat_steps", QatSettings.steps)
    recipe = Recipe(
        bits=bits,
        tolerance=float(table.get("tolerance", 0.01)),
        equalize=table.get("equalize", True),
        qat=QatSettings(steps=steps, seed=spec.seed) if steps > 0 else None,
        flash_kb=table.get("flash_kb") if profile is None else profile.flash_kb,
        reduce_range=table.get("reduce_range", profile is not None and profile.reduce_range),
        allow=tuple(table.get("allow", ())),
    )
    if "held_out" in table:
        return Deploy(recipe, *_example(spec.path.parent / table["held_out"])), (x, y)
    first = max(1, len(x) - max(1, len(x) // 5))
    return Deploy(recipe, x[first:], y[first:]), (x[:first], y[:first])


def quantize_spec(spec: Spec, output: Path, *, on_progress: Callable[[str], None] = lambda text: None) -> QuantReport:
    """Quantize the model of a specification into an ONNX file of its own. Raises `ExportError`; nothing is written then."""
    x, y = example_of(spec)
    deploy, (x, y) = deploy_of(spec, x, y)
    forward = forward_of(module_of(spec), x)
    data = Data(x, y, deploy.held_x, deploy.held_y)
    found = quantize_model(forward, data, deploy.recipe, name=spec.name, on_progress=on_progress)
    output.write_bytes(found.model)
    return found.report


def example_of(spec: Spec) -> tuple[Array, Array]:
    """The samples of a specification. Raises `SpecError`."""
    return _example(spec.example)


def _example(path: Path) -> tuple[Array, Array]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return file["x"], file["y"]
    except KeyError as error:
        raise SpecError(f"{path}: has no array {error.args[0]!r}; expected x and y") from error
    except (OSError, ValueError, EOFError) as error:
        raise SpecError(f"{path}: cannot be read as an .npz file of plain arrays: {error}") from error


def module_of(spec: Spec) -> Any:
    """The torch module of a specification with its weights, or the path of its ONNX file. Raises `SpecError`."""
    module_name, colon, function = spec.model.partition(":")
    if not colon:
        if spec.weights is not None:
            raise SpecError(f"{spec.path}: weights belong to a torch module; an ONNX file holds its own")
        return spec.path.parent / spec.model
    folder = str(spec.path.parent.resolve())
    sys.path.insert(0, folder)
    try:
        make = getattr(importlib.import_module(module_name), function)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise SpecError(f"{spec.path}: model = {spec.model!r} cannot be imported: {told}") from error
    finally:
        sys.path.remove(folder)
    try:
        module = make()
    except Exception as error:
        raise SpecError(f"{spec.path}: {spec.model}() failed: {type(error).__name__}: {error}") from error
    if spec.weights is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            module.load_state_dict(load_file(spec.weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise SpecError(f"{spec.weights}: does not fit {spec.model}: {str(error)[:300]}") from error
    return module
