"""How fast a gateway merges, and in how much memory, against Flower and against the memory of this machine.

100 updates of 1 M and of 10 M float32 parameters. Both sides see the same numbers; each is a process of its own with one
BLAS thread, and their runs alternate. Seconds are those of the fastest run with the updates in memory: ours as arrays,
Flower's as the replies its strategies take. The limit is one read of every update and an add into an accumulator that
stays in cache, in the same process. Peak memory is what a process rises by when it starts from the file: ours streams it,
Flower's strategies need all replies at once.

`mean_over_bandwidth` and the FedAvg figures are of the largest size, the speed-ups of median and Krum of the largest at which
Flower ran them. Flower lives in `.venv-flower-merge`, which is made once; no torch is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from benchmarks import report
from edge_sdk.errors import MissingDependency

CHECKOUT = Path(__file__).resolve().parent.parent
FLOWER = CHECKOUT / ".venv-flower-merge" / "bin" / "python"
ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
FORCED = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_L2_SIZE",
)  # a kernel that the environment forces would be measured, not NumPy's
RULES = ("mean", "median", "trimmed_mean", "krum", "product_svd")
WITH_FLOWER = ("mean", "median", "trimmed_mean", "krum")
FLOWER_NAMES = {"mean": "FedAvg", "median": "FedMedian", "trimmed_mean": "FedTrimmedAvg", "krum": "Krum"}


class Worker:
    """A child that answers JSON lines."""

    def __init__(self, command: list[str]) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in FORCED} | ONE_THREAD
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT, env=environment
        )

    def ask(self, do: str, **more: Any) -> Any:
        """The answer to a request."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise MissingDependency(
                f"a worker of this benchmark ended with {self._process.wait()}; its last words are above"
            )
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def ours() -> Worker:
    """Our worker."""
    return Worker([sys.executable, "-m", "benchmarks.merge_worker"])


def make_flower_environment(python: Path) -> None:
    """Flower without torch, once, where `--flower` points by default. Raises `MissingDependency` with pip's words."""
    if python.is_file() or python != FLOWER:
        return
    for command in (
        [sys.executable, "-m", "venv", str(python.parents[1])],
        [str(python), "-m", "pip", "install", "-q", "flwr"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingDependency(f"{python.parents[1].name} cannot be made: {done.stderr.strip()[-300:]}")


def flower(python: Path) -> Worker:
    """Flower's worker. Raises `MissingDependency` without its environment."""
    if not python.is_file():
        raise MissingDependency(
            f"{python}: no such file: make an environment for Flower there (pip install flwr), or give --flower"
        )
    return Worker([str(python), str(CHECKOUT / "benchmarks" / "merge_flower.py")])


def measure(args: argparse.Namespace) -> report.Report:
    """Run everything."""
    make_flower_environment(args.flower)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for parameters in args.parameters:
            path = Path(folder) / f"{parameters}.f32"
            draw = np.random.default_rng(0)
            with path.open("wb") as file:
                for _ in range(args.updates):
                    draw.standard_normal(parameters, np.float32).tofile(file)
            rows += _compare(args, path, parameters)
            path.unlink()
    with ours() as worker:
        svd = worker.ask("svd", repeats=max(3, args.repeats))
    rows.append(
        {
            "rule": "product_svd 768x768, 10 x rank 8",
            "parameters": 2 * 8 * 768,
            "seconds": svd["ours"],
            "peer": "dense float32 SVD",
            "peer_seconds": svd["dense"],
            "speedup": svd["dense"] / svd["ours"],
        }
    )
    return report.Report(rows, _summary(rows))


def _compare(args: argparse.Namespace, path: Path, parameters: int) -> list[dict[str, Any]]:
    where = {"path": str(path), "updates": args.updates, "parameters": parameters}
    seconds: dict[tuple[str, str], list[float]] = {}
    peaks: dict[tuple[str, str], int] = {}
    small = parameters <= args.flower_limit
    rules = [rule for rule in RULES if small or rule != "product_svd"]  # its cost is that of one layer after another
    with ours() as mine, flower(args.flower) as peer:
        kernel = mine.ask("load", **where)
        peer.ask("load", **where)
        for repeat in range(args.repeats):
            seconds.setdefault(("limit", "ours"), []).append(mine.ask("limit"))
            for rule in rules:
                if rule == "product_svd" and repeat:
                    continue  # an SVD a layer: most of a minute, and nothing to alternate with
                seconds.setdefault((rule, "ours"), []).append(mine.ask("run", rule=rule))
                if rule in WITH_FLOWER and (small or rule == "mean"):
                    seconds.setdefault((rule, "flower"), []).append(peer.ask("run", rule=rule))
    for rule in rules:  # a fresh process each: what one rule leaves behind is not counted for the next
        with ours() as mine:
            mine.ask("load", **where)
            peaks[rule, "ours"] = mine.ask("peak", rule=rule)
        if (rule, "flower") in seconds:
            with flower(args.flower) as peer:
                peer.ask("load", **where)
                peaks[rule, "flower"] = peer.ask("peak", rule=rule)
    limit = min(seconds["limit", "ours"])
    rows = []
    for rule in rules:
        best, theirs = min(seconds[rule, "ours"]), seconds.get((rule, "flower"))
        row: dict[str, Any] = {
            "rule": rule,
            "parameters": parameters,
            "updates": args.updates,
            "seconds": best,
            "gigabytes_per_second": 4e-9 * args.updates * parameters / best,
            "limit_seconds": limit,
            "over_bandwidth": limit / best,
            "peak_bytes": peaks[rule, "ours"],
            "kernel": kernel,
            "runs": seconds[rule, "ours"],
        }
        if theirs is not None:
            row |= {
                "peer": f"Flower {FLOWER_NAMES[rule]}",
                "peer_seconds": min(theirs),
                "peer_peak_bytes": peaks[rule, "flower"],
                "speedup": min(theirs) / best,
                "memory_ratio": peaks[rule, "flower"] / peaks[rule, "ours"],
                "peer_runs": theirs,
            }
        rows.append(row)
    return rows


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def largest(rule: str, key: str) -> float:
        return float(
            max((row for row in rows if row["rule"] == rule and key in row), key=lambda row: row["parameters"])[key]
        )

    return {
        "mean_over_bandwidth": largest("mean", "over_bandwidth"),
        "speedup_flower_fedavg": largest("mean", "speedup"),
        "memory_ratio_flower_fedavg": largest("mean", "memory_ratio"),
        "speedup_flower_median": largest("median", "speedup"),
        "speedup_flower_trimmed_mean": largest("trimmed_mean", "speedup"),
        "speedup_flower_krum": largest("krum", "speedup"),
        "speedup_dense_svd_768": rows[-1]["speedup"],
    }


COLUMNS = {
    "rule": "rule",
    "parameters": "parameters",
    "seconds": "s",
    "over_bandwidth": "of the limit",
    "peak": "peak MB",
    "peer": "peer",
    "peer_seconds": "s",
    "peer_peak": "peak MB",
    "speedup": "times faster",
    "memory_ratio": "times smaller",
}


def show(found: report.Report) -> str:
    """The table and the figures."""
    rows = [
        {
            **row,
            "peak": round(row["peak_bytes"] / 1e6) if "peak_bytes" in row else None,
            "peer_peak": round(row["peer_peak_bytes"] / 1e6) if "peer_peak_bytes" in row else None,
        }
        for row in found.rows
    ]
    figures = "\n".join(f"{name} {value:.3g}" for name, value in found.summary.items())
    return f"{report.table(rows, COLUMNS)}\n\n{figures}"


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("merge", __doc__)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--parameters", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the fastest counts")
    parser.add_argument("--flower", type=Path, default=FLOWER, help="a Python with flwr")
    parser.add_argument("--folder", type=Path, help="where the file of updates goes (4 GB for 10 M parameters)")
    parser.add_argument(
        "--flower-limit",
        type=int,
        default=10_000_000,
        help="above this size Flower runs FedAvg only: its others hold up to 14 GB at 10 M parameters",
    )
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
