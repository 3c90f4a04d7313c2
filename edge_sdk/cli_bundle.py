"""`edgewise bundle show|verify|predict BUNDLE`: look into a bundle, check it, run the model in it.

Exit codes: 0 done, and for `verify` whole and unchanged; 3 the bundle, the model file or the input is wrong; 4 the output
cannot be written; 5 the signature is not that of the release key.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import BundleError, SampleError, StorageError, TaskError, TensorsError
from edge_sdk.fields import INPUT, TARGET
from edge_sdk.keys import VerifyKey
from edge_sdk.tensors import Array, Tensors, TensorSpec, unpack


def register(parser: argparse.ArgumentParser) -> None:
    """Add `show`, `verify` and `predict`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    show = commands.add_parser("show", help="what a bundle holds: fields, classes, programs and their cost")
    show.set_defaults(run=_show)
    verify = commands.add_parser("verify", help="check every digest, and the signature if the release key is given")
    verify.add_argument("--release-key", type=Path, metavar="PUB", help="the public key that must have signed it")
    verify.set_defaults(run=_verify)
    predict = commands.add_parser("predict", help="run a model on samples")
    predict.add_argument("--input", type=Path, required=True, metavar="X.npy", help="a batch of samples, or one sample")
    predict.add_argument(
        "--model",
        type=Path,
        metavar="MODEL.safetensors",
        help="a merged model, which lies as model.safetensors in the gateway's state folder (default: the bundle's own)",
    )
    predict.add_argument("--program", metavar="ID", help="default: the one whose tensors the model file holds")
    predict.add_argument("--output", type=Path, metavar="Y.npy", help="write the model's output")
    predict.set_defaults(run=_predict)
    for command in (show, verify, predict):
        command.add_argument("bundle", type=Path, metavar="BUNDLE", help="the archive, or a folder with its files")
        command.add_argument("--json", action="store_true", help="print JSON")


def _show(args: argparse.Namespace) -> int:
    with Bundle.open(args.bundle) as bundle:
        content = _described(bundle)
    if args.json:
        print(json.dumps(content))
        return 0
    print(f"{content['name']}  {content['bytes']} bytes, {'signed' if content['signed'] else 'not signed'}")
    print(f"digest  {content['digest']}")
    print(f"base    {content['base']}")
    for field in content["fields"]:
        classes = f", {field['classes']} classes" if field["classes"] else ""
        print(f"field   {field['name']} {field['dtype']} {field['shape']}{classes}")
    if content["classes"] is not None:
        print(f"classes {', '.join(content['classes'])}")
    print()
    rows = [["program", "scope", "precision", "rank", "parameters", "bytes up", "bytes down", "proof"]]
    for row in content["programs"]:
        numbers = [str(value or "-") for value in (row["rank"], row["parameters"])]
        traffic = ["-" if value is None else str(value) for value in (row["bytes_up"], row["bytes_down"])]
        rows.append([row["id"], row["scope"], row["precision"], *numbers, *traffic, _proof(row["proof"])])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


def _verify(args: argparse.Namespace) -> int:
    key = None if args.release_key is None else VerifyKey.load(args.release_key)
    with Bundle.open(args.bundle, release_key=key) as bundle:
        content = {
            "name": bundle.name,
            "digest": bundle.digest,
            "files": len(bundle.files),
            "signed": bundle.signed,
            "signature_checked": key is not None,
        }
    if args.json:
        print(json.dumps(content))
        return 0
    signature = "signed by the release key" if key else "the signature was not checked: give --release-key"
    if not content["signed"]:
        signature = "not signed"
    print(f"{args.bundle}: good: {content['files']} files as the manifest says, {signature}")
    print(f"digest {content['digest']}")
    return 0


def _predict(args: argparse.Namespace) -> int:
    from edge_sdk.runtime import Predictor

    with Bundle.open(args.bundle) as bundle:
        program, tensors = _chosen(bundle, args.program, args.model)
        x = _samples(bundle, args.input)
        try:
            found = Predictor(bundle, program, tensors).predict(x)
        except SampleError as error:
            raise SampleError(f"{args.input}: {error}") from error
        outputs = found if isinstance(found, dict) else {"y.0": found}
        labels, names = _labels(bundle, outputs), bundle.classes
    if args.output is not None:
        _write(args.output, outputs)
    if args.json:
        content: dict[str, Any] = {
            "program": program.id,
            "samples": len(x),
            "outputs": {name: {"dtype": y.dtype.name, "shape": list(y.shape)} for name, y in outputs.items()},
        }
        if labels is not None:
            content["labels"] = labels
            content["classes"] = [names[label] for label in labels] if names else None
        print(json.dumps(content))
        return 0
    print(f"program {program.id}, {len(x)} samples")
    if labels is None:
        for name, y in outputs.items():
            print(f"{name}: {y.dtype} {list(y.shape)}, {y.min():g} to {y.max():g}, mean {y.mean(dtype=np.float64):g}")
    else:
        for index, label in enumerate(labels):
            print(f"{index}: {label}{f' {names[label]}' if names else ''}")
    return 0


def _described(bundle: Bundle) -> dict[str, Any]:
    """What `show` prints, as plain JSON values."""
    return {
        "name": bundle.name,
        "digest": bundle.digest,
        "base": bundle.base,
        "bytes": sum(file.stat().st_size for file in bundle.directory.iterdir())
        if bundle.path.is_dir()
        else bundle.path.stat().st_size,
        "signed": bundle.signed,
        "fields": [
            {"name": field.name, "dtype": field.dtype, "shape": list(field.shape), "classes": field.classes}
            for field in bundle.fields
        ],
        "classes": None if bundle.classes is None else list(bundle.classes),
        "programs": [
            {
                "id": program.id,
                "scope": program.scope,
                "precision": program.precision,
                "rank": program.rank,
                "parameters": _parameters(bundle, program),
                "bytes_up": program.cost.get("bytes_up"),
                "bytes_down": program.cost.get("bytes_down"),
                "proof": None if program.proof is None else dict(program.proof),
            }
            for program in bundle.programs.values()
        ],
    }


def _parameters(bundle: Bundle, program: Program) -> int:
    """How many numbers the program trains."""
    if program.accumulates:
        return 0
    return sum(math.prod(entry.shape) for entry in bundle.starting(program) if entry.kind == "p")


def _proof(proof: Mapping[str, Any] | None) -> str:
    if proof is None:
        return "-"
    error = proof.get("max_relative_error")
    return f"{proof.get('oracle')}{f', {error:.1e}' if isinstance(error, float) else ''}"


def _chosen(bundle: Bundle, wanted: str | None, model: Path | None) -> tuple[Program, Tensors]:
    """The program to run and the tensors to run it with, as a device would choose them."""
    servable = [bundle.program(wanted)] if wanted else [p for p in bundle.programs.values() if p.infer is not None]
    if not servable or servable[0].infer is None:
        raise BundleError(f"{bundle.path}: {f'program {wanted!r} cannot' if wanted else 'no program can'} predict")
    if model is None:
        return servable[0], bundle.initial(servable[0])
    tensors = _model(model, max(bundle.start_limit(program) for program in servable))
    fitting = [program for program in bundle.predicting_with(tensors) if program in servable]
    if not fitting:
        expected = "; or ".join(f"those of {p.id}: {_listed(e.spec for e in bundle.starting(p))}" for p in servable)
        found = _listed(TensorSpec(name, value.dtype.name, value.shape) for name, value in tensors.items())
        raise TaskError(
            f"{model}: holds {found or 'no tensors'}, expected {expected}: "
            f"give the bundle that this model was trained with, {bundle.path} is another"
        )
    return fitting[0], tensors


def _listed(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)


def _model(path: Path, limit: int) -> dict[str, Array]:
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= limit else b""
    except OSError as error:
        raise TensorsError(f"{path}: cannot be read ({error.strerror})") from error
    if size > limit:
        raise TensorsError(f"{path}: has {size} bytes, a model of this bundle has at most {limit}")
    try:
        return unpack(data)[0]
    except TensorsError as error:
        raise TensorsError(f"{path}: not a file of tensors: {error}") from error


def _samples(bundle: Bundle, path: Path) -> Array:
    """A batch `[n, *shape]` of the input field; a single sample becomes a batch of one."""
    try:
        # Mapped: the array's own header may claim any size, and the file is as large as it is.
        x = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise SampleError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise SampleError(f"{path}: not a .npy file of plain numbers: {str(error)[:120]}") from error
    if not isinstance(x, np.ndarray):
        x.close()
        raise SampleError(f"{path}: an archive of arrays, expected a .npy file with one array")
    field = next((field for field in bundle.fields if field.name == INPUT), None)
    if field is None:
        raise BundleError(f"{bundle.path}: has no input {INPUT}")
    batch = x[None] if x.shape == field.shape else x
    return np.asarray(batch, batch.dtype.newbyteorder("="))  # the runtime reads bytes as this machine orders them


def _labels(bundle: Bundle, outputs: Tensors) -> list[int] | None:
    """The most likely class of each sample, None where the model does not classify."""
    count = next((field.classes for field in bundle.fields if field.name == TARGET), None)
    y = next(iter(outputs.values()))
    if count is None or len(outputs) != 1 or y.ndim != 2 or y.shape[1] != count:
        return None
    return [int(label) for label in y.argmax(axis=1)]


def _write(path: Path, outputs: Tensors) -> None:
    """One output as `.npy`, several as `.npz` by name, under exactly the name that was given."""
    try:
        with path.open("wb") as file:
            if len(outputs) == 1:
                np.save(file, next(iter(outputs.values())))
            else:
                np.savez(file, allow_pickle=False, **outputs)
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error.strerror})") from error
