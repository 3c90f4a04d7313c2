"""What a device has to carry: install size, import time and memory of Edgewise beside those of Flower with torch.

Rows: the base install of Edgewise, built from this checkout (`.venv-device`); flwr with torch (CPU) in an environment that
is made once (`.venv-flower`); a process that only imports the five packages of the base install; a bare interpreter.

Both train the same net from the same weights on the same batches with one thread, without a network: Edgewise by
`run_task` on a step graph, Flower by a torch loop in `NumPyClient.fit`. Their losses are compared step by step; if they
differ, the work was not the same and nothing is reported. Sizes are bytes of site-packages without pip and setuptools.
Times are of `import` statements in fresh processes, page cache warm, rows interleaved, median; memory is the peak of the
resident set (VmHWM). Linux only.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.report import CheckFailed, Report, main, parser, positive, ratio, table
from edge_sdk.bundle import HeldOut
from edge_sdk.draws import Draws
from edge_sdk.errors import MissingDependency

CHECKOUT = Path(__file__).resolve().parent.parent
TASKS = CHECKOUT / "benchmarks" / "footprint_tasks"
DEVICE, FLOWER = CHECKOUT / ".venv-device", CHECKOUT / ".venv-flower"
SAMPLES, EPOCHS, BATCH, SEED = 320, 3, 32, 0  # whole batches: what is left over is another matter
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.01
SAME_LOSS = 1e-3  # relative; the two are float32 sums in another order
NOT_COUNTED = ("pip", "setuptools")  # of the environment, not of what was installed into it

COLUMNS = {
    "name": "",
    "install_mb": "install MB",
    "distributions": "packages",
    "import_cpu_s": "import CPU s",
    "import_wall_s": "import wall s",
    "import_memory_mb": "import peak MB",
    "task_memory_mb": "task peak MB",
    "task_cpu_s": "task CPU s",
}

_MEASURE = """
import json, time
began = time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
with open("/proc/self/status") as file:
    status = dict(line.split(":", 1) for line in file)
print(json.dumps({{"wall": wall, "cpu": cpu, "peak_bytes": int(status["VmHWM"].split()[0]) * 1024}}))
"""


@dataclass
class Row:
    """One environment and what is imported in it; `task` is a script of `footprint_tasks` with its first argument."""

    name: str
    environment: Path
    statement: str
    installed: bool = False
    task: tuple[str, str] | None = None
    imports: list[Mapping[str, float]] = field(default_factory=list)
    tasks: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.environment / "bin" / "python"

    def to_json(self) -> dict[str, Any]:
        """Medians over the repetitions; MB are 10^6 bytes."""
        size, count, versions = installed(self.environment) if self.installed else (None, None, {})
        return {
            "name": self.name,
            "install_mb": None if size is None else size / 1e6,
            "distributions": count,
            "import_cpu_s": median(found["cpu"] for found in self.imports),
            "import_wall_s": median(found["wall"] for found in self.imports),
            "import_memory_mb": median(found["peak_bytes"] for found in self.imports) / 1e6,
            "task_memory_mb": median(found["peak_bytes"] for found in self.tasks) / 1e6 if self.tasks else None,
            "task_cpu_s": median(found["cpu_seconds"] for found in self.tasks) if self.tasks else None,
            "versions": versions,
        }


def measure(args: argparse.Namespace) -> Report:
    """Make what is missing, then measure every row in turn, several times."""
    make_device_environment()
    make_flower_environment(FLOWER, args.torch)
    with tempfile.TemporaryDirectory() as folder:
        bundle, weights, data = prepare(Path(folder))
        rows = [
            Row(
                "Edgewise, base install",
                DEVICE,
                "from edge_sdk import EdgeDevice",
                installed=True,
                task=("edgewise.py", str(bundle)),
            ),
            Row(
                "Flower with torch (CPU)",
                FLOWER,
                "import torch; from flwr.client import NumPyClient",
                installed=True,
                task=("flower.py", str(weights)),
            ),
            Row(
                "the five packages alone",
                DEVICE,
                "import numpy, onnxruntime, paho.mqtt.client, safetensors, cryptography",
            ),
            Row("bare interpreter", DEVICE, "pass"),
        ]
        for repetition in range(args.repeat + 1):
            for row in rows:
                found = _ask(row.python, ["-c", _MEASURE.format(statement=row.statement)])
                if repetition:  # the first one warms the page cache
                    row.imports.append(found)
        for _ in range(args.repeat_task):
            for row in rows:
                if row.task is not None:
                    script, argument = row.task
                    row.tasks.append(_ask(row.python, [str(TASKS / script), argument, str(data)]))
    check_same_work(rows[0].tasks[0]["losses"], rows[1].tasks[0]["losses"])
    found_rows = [row.to_json() for row in rows]
    return Report(found_rows, summary(found_rows) | {"torch": args.torch, "repetitions": args.repeat})


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures to quote. Ratios are ours / Flower with torch; `rows` are in the order of `measure`."""
    ours, peer, packages, _bare = rows
    figures: dict[str, Any] = {
        "install_ratio": ratio(ours["install_mb"], peer["install_mb"]),
        "import_time_ratio": ratio(ours["import_cpu_s"], peer["import_cpu_s"]),
        "import_wall_ratio": ratio(ours["import_wall_s"], peer["import_wall_s"]),
        "import_memory_ratio": ratio(ours["import_memory_mb"], peer["import_memory_mb"]),
        "task_memory_ratio": ratio(ours["task_memory_mb"], peer["task_memory_mb"]),
        "task_cpu_ratio": ratio(ours["task_cpu_s"], peer["task_cpu_s"]),
        "five_packages_memory_mb": packages["import_memory_mb"],
        "import_over_five_packages_mb": ours["import_memory_mb"] - packages["import_memory_mb"],
        "task_over_five_packages_mb": ours["task_memory_mb"] - packages["import_memory_mb"],
    }
    for prefix, row in (("edgewise", ours), ("flower", peer)):
        figures |= {f"{prefix}_{key}": row[key] for key in COLUMNS if key != "name"}
    return figures


def show(report: Report) -> str:
    """The table, and the ratios below it."""
    found = report.summary
    ratios = ", ".join(
        f"{name} {found[key]:.2f}"
        for name, key in (
            ("install", "install_ratio"),
            ("import time", "import_time_ratio"),
            ("import memory", "import_memory_ratio"),
            ("task memory", "task_memory_ratio"),
        )
    )
    versions = "; ".join(
        ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        for row in report.rows
        if row["versions"]
    )
    return (
        f"{table(report.rows, COLUMNS)}\n\n"
        f"Edgewise / Flower with torch: {ratios}\n"
        f"A device's task peaks {found['task_over_five_packages_mb']:.1f} MB above the five packages alone.\n"
        f"One thread, page cache warm, medians. {versions}"
    )


def prepare(folder: Path) -> tuple[Path, Path, Path]:
    """The same net as a bundle and as torch weights, and the data: random, since only cost is measured."""
    import torch

    from benchmarks.footprint_tasks.flower import CLASSES, SHAPE, Net
    from export import ProgramSpec, build_bundle

    torch.manual_seed(0)
    net = Net().eval()
    draw = np.random.default_rng(0)
    x = draw.normal(size=(SAMPLES, *SHAPE)).astype(np.float32)
    y = draw.integers(0, CLASSES, SAMPLES)
    bundle, weights, data = folder / "net.bundle", folder / "net.pt", folder / "data.npz"
    torch.save(net.state_dict(), weights)
    order = Draws(SEED, "order")  # as a device draws it, for the peer, which has no Edgewise
    orders = np.stack([order.permutation(np.arange(SAMPLES)) for _ in range(EPOCHS)])
    settings = {
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "seed": SEED,
    }
    np.savez(data, x=x, y=y, order=orders, settings=json.dumps(settings))
    build_bundle(
        net,
        (x[:16], y[:16]),
        bundle,
        name="net",
        loss="cross_entropy",
        programs=[ProgramSpec("full", precision="float", optimizer="adamw", batch=BATCH)],
        held_out=HeldOut(),
    )
    return bundle, weights, data


def check_same_work(ours: Sequence[float], peer: Sequence[float]) -> None:
    """Raise `CheckFailed` unless both tasks had the same loss at every step."""
    if len(ours) != len(peer):
        raise CheckFailed(f"Edgewise trained {len(ours)} steps and Flower {len(peer)}: not the same work")
    for step, (left, right) in enumerate(zip(ours, peer, strict=True), start=1):
        if not abs(left - right) <= SAME_LOSS * abs(right):
            raise CheckFailed(f"at step {step} Edgewise has loss {left:.5f} and Flower {right:.5f}: not the same work")


def installed(environment: Path) -> tuple[int, int, dict[str, str]]:
    """Bytes of site-packages, the number of distributions in it, and the versions of those that the rows are named after.

    `NOT_COUNTED` is left out of all three.
    """
    (site,) = environment.glob("lib/python*/site-packages")
    size = sum(file.stat().st_size for file in site.rglob("*") if file.is_file() and not file.is_symlink())
    count, versions = 0, {}
    for held in importlib.metadata.distributions(path=[str(site)]):
        name = held.metadata["Name"].lower()
        if name in NOT_COUNTED:
            files = {Path(str(held.locate_file(file))) for file in held.files or ()}
            size -= sum(file.stat().st_size for file in files if file.is_file() and site in file.parents)
            continue
        count += 1
        if name in ("edgewise", "onnxruntime", "flwr", "torch"):
            versions[name] = held.version
    return size, count, versions


def make_device_environment() -> None:
    """The base install of this checkout, by the Makefile, which knows whether it is up to date."""
    _run(["make", "-C", str(CHECKOUT), f"{DEVICE.name}/ready"], "the base install cannot be made")


def make_flower_environment(folder: Path, torch: str) -> None:
    """The peer: flwr and torch and nothing else, made once and again when another torch is asked for."""
    ready = folder / "ready"
    if ready.is_file() and ready.read_text() == torch:
        return
    ready.unlink(missing_ok=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], f"{folder.name} cannot be made")
    # torch first and by version: a range may bring another build of several gigabytes.
    for package in (torch, "flwr"):
        command = [str(folder / "bin" / "pip"), "install", "--quiet", package]
        _run(command, f"{package} cannot be installed into {folder.name}")
    ready.write_text(torch)


def default_torch(makefile: Path = CHECKOUT / "Makefile") -> str:
    """Which torch the peer gets: the environment's TORCH, as `make` passes it on, or the Makefile's."""
    found = re.search(r"^TORCH \?= (\S+)$", makefile.read_text(), re.MULTILINE)
    return os.environ.get("TORCH") or (found[1] if found else "torch")


def _run(command: Sequence[str], failure: str) -> None:
    """Run a command that makes something. Raises `MissingDependency` with the first error that it printed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise MissingDependency(f"{failure}: {command[0]}: {error.strerror}") from error
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        told = next((line for line in lines if line.upper().startswith("ERROR")), lines[-1] if lines else "")
        raise MissingDependency(f"{failure}: {told[:300] or f'exit code {done.returncode}'}")


def _ask(python: Path, arguments: Sequence[str]) -> Any:
    """Run a fresh process, isolated from this one's paths and from the checkout, and read the JSON that it prints."""
    done = subprocess.run([str(python), "-I", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise CheckFailed(f"{python.parent.parent.name}: {arguments[0]} failed: {last[:300]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.ArgumentParser:
    """The options."""
    result = parser("footprint", __doc__)
    result.add_argument(
        "--torch", default=default_torch(), help="what pip installs for the peer (default: %(default)s)"
    )
    result.add_argument("--repeat", type=positive, default=7, metavar="N", help="how often each import is measured")
    result.add_argument("--repeat-task", type=positive, default=3, metavar="N", help="how often each task is measured")
    return result


if __name__ == "__main__":
    sys.exit(main(measure, show, arguments()))
