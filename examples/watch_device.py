"""The watch of one person as an Edgewise device: records its windows, then trains and serves until it is told to stop.

Runs with the base install only: `python watch_device.py device.toml --data recordings/ --report report.json`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import signal
import threading
from pathlib import Path

import numpy as np

from edge_sdk import EdgeDevice


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="device.toml")
    parser.add_argument("--data", type=Path, required=True, help="folder of recordings, <name>_<label>.npy")
    parser.add_argument("--report", type=Path, required=True, help="where this process writes what it used")
    args = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    with EdgeDevice.open(args.config) as device:
        record_everything(device, args.data)
        device.start()
        while not stop.wait(1.0):
            write_report(args.report, device)
        device.stop()
        write_report(args.report, device)
    return 0


def record_everything(device: EdgeDevice, folder: Path) -> None:
    """Feed the person's recordings, once: after a restart they are in the device's own store already."""
    for path in sorted(folder.glob("*.npy")):
        name, _, label = path.stem.rpartition("_")
        if not device.has_recording(name):
            x = np.load(path)
            device.record_many(x, np.full(len(x), int(label), np.int64), recording=name)


def write_report(path: Path, device: EdgeDevice) -> None:
    status = device.status()
    report = {
        "id": status.device,
        "bytes_up": status.bytes_up,
        "bytes_down": status.bytes_down,
        "updates_made": status.updates_made,
        "updates_accepted": status.updates_accepted,
        "updates_rejected": status.updates_rejected,
        "outbox_entries": status.outbox_entries,
        "peak_rss_mb": peak_resident_bytes() / 1e6,
        "torch_importable": importable("torch"),
    }
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report))
    temporary.replace(path)


def peak_resident_bytes() -> int:
    """The high-water mark of resident memory of this process, in bytes (VmHWM counts KiB)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def importable(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
