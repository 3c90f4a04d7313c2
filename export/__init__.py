"""The workstation: a model becomes ONNX, its frozen part quantized, together with training-step graphs in plain ONNX."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.build import ProgramSpec, Report, build_bundle

__all__ = ["ProgramSpec", "Report", "build_bundle"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562): the bundle writer alone needs no exporter packages."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("export.build"), name)
