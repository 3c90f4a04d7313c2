"""A new bundle whose base holds what a federation trained: adapters and side terms go into the float weights, the frozen part is
quantized again with fresh scales, and the adapters start anew (methods/lora.md, section 7).

Due when a round reports `rebase_due`: the side term of a layer no longer holds what `stack`, `residual` or
`residual = "base"` put into it. The new bundle serves the function of the old one with its trained model; that is
checked before anything is written, on the samples of the specification.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from edge_sdk.bundle import Bundle, Program
from edge_sdk.errors import StorageError
from edge_sdk.keys import SigningKey
from edge_sdk.runtime import Predictor
from edge_sdk.tensors import Array, Tensors
from export.adapters import merged, program_of, write_tensors
from export.build import Report
from export.errors import SpecError
from export.spec import Spec, build_spec, example_of, module_of

TOLERANCE: Final = (
    0.1  # root mean square of what the outputs moved by, over that of the outputs; int8 moves them by 0.01
)


@dataclass(frozen=True)
class Rebased:
    """The new bundle, and by how much what it serves differs from what the old one served with its model."""

    report: Report
    difference: float


def rebase(
    spec: Spec,
    bundle: Path,
    model: Tensors,
    output: Path,
    weights: Path,
    *,
    release_key: SigningKey | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Rebased:
    """Write the new bundle to `output` and the float weights that it was made from to `weights`.

    `spec` is the specification that `bundle` was built from, with its weights; `model` is what the gateway's merges left.
    Raises `ExportError`; nothing is written then.
    """
    import torch

    module = module_of(spec)
    if isinstance(module, Path):
        raise SpecError(f"{spec.path}: model = {spec.model!r}: only a torch module's weights can be rebased")
    master = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    x, _ = example_of(spec)
    with Bundle.open(bundle) as old:
        program = program_of(old, model)
        found = merged(old, program, model, master)
        served = _served(old, program, model, x)
    module.load_state_dict({name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in found.items()})
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / output.name
        report = build_spec(spec, built, module=module, release_key=release_key, on_progress=on_progress)
        with Bundle.open(built) as new:
            if program.id not in new.programs:
                raise SpecError(
                    f"{spec.path}: builds no program {program.id!r}, which {bundle} trained: give its specification"
                )
            fresh = new.program(program.id)
            difference = _relative(_served(new, fresh, new.initial(fresh), x), served)
        if difference > TOLERANCE:
            raise SpecError(
                f"{spec.path}: with what {bundle} trained, its weights serve other outputs ({difference:.0%} apart, at most "
                f"{TOLERANCE:.0%}): give the specification and the weights that the bundle was built from"
            )
        try:
            shutil.copyfile(built, output)
        except OSError as error:
            raise StorageError(f"{output}: cannot be written ({error.strerror})") from error
    write_tensors(found, weights)
    return Rebased(report, difference)


def _served(bundle: Bundle, program: Program, tensors: Tensors, x: Array) -> Array:
    predictor = Predictor(bundle, program, tensors)
    return np.asarray(predictor.predict(x), np.float64)


def _relative(found: Array, expected: Array) -> float:
    scale = float(np.sqrt(np.mean(np.square(expected)))) or 1.0
    return float(np.sqrt(np.mean(np.square(found - expected)))) / scale
