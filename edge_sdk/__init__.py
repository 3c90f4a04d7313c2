"""The ground floor, which runs on the device: predict, record, train one task, publish a small update.

The names are imported on first use, so that a command that needs no inference runtime does not load it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.bundle import Bundle
    from edge_sdk.device import DeviceEvent, DeviceStatus, EdgeDevice
    from edge_sdk.errors import EdgewiseError

__version__ = "0.1.0"
__all__ = ["Bundle", "DeviceEvent", "DeviceStatus", "EdgeDevice", "EdgewiseError", "__version__"]

_HOMES = {
    "Bundle": "edge_sdk.bundle",
    "DeviceEvent": "edge_sdk.device",
    "DeviceStatus": "edge_sdk.device",
    "EdgeDevice": "edge_sdk.device",
    "EdgewiseError": "edge_sdk.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
