"""Named crash points for the kill tests (transport.md, section 6.3); inactive unless `EDGEWISE_FAULTS` is set.

`EDGEWISE_FAULTS="D4"` kills the process with SIGKILL when it passes point D4, `"D4:3"` at the third passing; several are
separated by commas.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "EDGEWISE_FAULTS"


def _read(text: str) -> dict[str, int]:
    pairs = (part.strip().partition(":") for part in text.split(",") if part.strip())
    return {name: int(count or 1) for name, _, count in pairs}


_left = _read(os.environ.get(VARIABLE, ""))


def point(name: str) -> None:
    """Pass a crash point: nothing happens, or the process dies here and now."""
    if name in _left:
        _left[name] -= 1
        if _left[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
