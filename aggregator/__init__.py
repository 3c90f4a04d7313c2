"""The gateway box: opens rounds, takes updates in, merges them, decides what each device gets next.

`Service` runs a job; `read_status` tells where one stands, also while it runs. Both are imported on first
use, so that asking for a status does not load the inference runtime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aggregator.job import Job, load_job
    from aggregator.journal import RoundRecord, Status, read_status
    from aggregator.service import Service

__all__ = ["Job", "RoundRecord", "Service", "Status", "load_job", "read_status"]

_HOMES = {
    "Job": "aggregator.job",
    "RoundRecord": "aggregator.journal",
    "Service": "aggregator.service",
    "Status": "aggregator.journal",
    "load_job": "aggregator.job",
    "read_status": "aggregator.journal",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
