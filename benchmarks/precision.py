"""PTQ or QAT for each device: what QAT brings at 8, 4 and 3 bits, what it costs, and whom the allocation picks.

Five tables. `study`: scikit-learn's digits, an MLP 64-64-64-10 trained from nothing by ten clients (Dirichlet 0.3), weights of
so many bits per output channel and activations of 8; clients send integers with scales, the server dequantizes and averages
them and is tested quantized; paired seeds. Clients train real step graphs with the device's runtime. Their speeds, 1 to 4 times, and the cost of a QAT step, 2.5 PTQ steps, are SIMULATED:
`time` is the sum over rounds of what the slowest client takes, in PTQ steps of the fastest. `ratio`: what a QAT step costs
through onnxruntime here, measured, by net, and whether the allocation finds the optimum that brute force finds. `speed-blind`:
halves of the devices drawn at random, against the fastest half. `drift`: a simulated device throttles to a third. `overhead`:
CPU time of the decisions against that of a round.

Shares of the gap are ratios of sums over seeds, with 95 % bootstrap intervals over seeds; never per seed. With `--resume FILE`
every finished run is kept there, and an interrupted study goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.assign.precision import Event, Joined, Opened, State, Trained, Validated, decide
from aggregator.assign.precision_coarse import Choice, Profile, allocate, round_seconds, values
from aggregator.assign.settings import FineSettings, PrecisionSettings
from aggregator.merge.mean import MEAN
from aggregator.merge.quantized import dequantize, quantize
from benchmarks import report
from benchmarks.digits import CLIENTS, Task, federate, split
from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Stepper
from edge_sdk.tensors import Tensors

ROUNDS = 25
STEPS = 10
RATE = 0.1
SIMULATED_RATIO = 2.5
FINAL = 0.16
DRAWS = 200
RESAMPLES = 10_000
SPEEDS = 4.0 ** (np.arange(CLIENTS) / (CLIENTS - 1))  # ms of a PTQ step, 1 to 4, log-spaced
USUAL = PrecisionSettings(final_qat=0.0)
Allocate = Callable[[int], set[int]]  # round -> the clients that do QAT


def clients_of(speeds: Sequence[float], ratio: float = SIMULATED_RATIO, drop: float = 0.05) -> dict[str, Profile]:
    """Simulated devices: equal data, no transfer."""
    return {f"{k}": Profile(float(ms), float(ms) * ratio, 0.0, 100, drop=drop) for k, ms in enumerate(speeds)}


def fastest(speeds: Sequence[float]) -> set[int]:
    """Whom the coarse step upgrades within its usual budget, 1.2 times the time of PTQ alone: the fastest half here."""
    found = allocate(clients_of(speeds), USUAL)
    return {int(device) for device, choice in found.choices.items() if choice is Choice.QAT}


def arms(speeds: Sequence[float], seed: int) -> dict[str, Allocate]:
    """Who does QAT in a round, by the name of the arm."""
    everybody: set[int] = set(range(CLIENTS))
    quick = fastest(speeds)
    blind = set(np.random.default_rng([seed, 5]).permutation(CLIENTS)[: len(quick)].tolist())
    last = ROUNDS - round(FINAL * ROUNDS)
    return {
        "all PTQ": lambda number: set(),
        "all QAT": lambda number: everybody,
        "fastest half": lambda number: quick,
        "slowest half": lambda number: everybody - quick,
        "speed-blind half": lambda number: blind,
        "PTQ, final QAT": lambda number: everybody if number > last else set(),
        "fastest half, final QAT": lambda number: everybody if number > last else quick,
    }


def simulated_time(speeds: Sequence[float], chosen: Allocate) -> float:
    """Sum over rounds of the slowest client's time, in PTQ steps of the fastest client."""
    plant = clients_of(speeds)

    def of(number: int) -> float:
        return 1000 * round_seconds(plant, {f"{k}": Choice.QAT for k in chosen(number)})

    return float(sum(of(number) for number in range(1, ROUNDS + 1)))


def digits(seed: int) -> Task:
    """Upright digits: 1,200 images over ten clients, 597 for the test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(images))
    x, y = (images[order] / 16.0).astype(np.float32), labels[order].astype(np.int64)
    train = (x[:1200], y[:1200])
    return Task(train, train, (x[1200:], y[1200:]), split(train[1], 0.3, draw))


def program(bits: int, choice: Choice) -> str:
    """The id of a program of the study's bundles."""
    return f"digits/full/{choice}{bits}"


def build(path: Path, data: Task, seed: int, bits: Sequence[int]) -> None:
    """An MLP 64-64-64-10 of random weights, with both programs at each of these bits."""
    import torch
    from torch import nn

    from export import ProgramSpec, build_bundle

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    example = (data.train[0][:64], data.train[1][:64])
    specs = [ProgramSpec("full", {}, f"{choice}{count}", "sgd") for count in bits for choice in Choice]
    build_bundle(module, example, path, name="digits", loss="cross_entropy", programs=specs, seed=seed)


class Kept:
    """Finished rows, one JSON object a line, by what they are of."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            self.rows = {row["key"]: row for row in map(json.loads, path.read_text().splitlines())}

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keep one more."""
        self.rows[key] = {"key": key, **row}
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(self.rows[key]) + "\n")


def study(args: argparse.Namespace, kept: Kept) -> list[dict[str, Any]]:
    """Accuracy and simulated time of every arm, by bits and seed."""
    rows = []
    wanted = [(bits, seed) for bits in args.bits for seed in range(args.seeds)]
    with tempfile.TemporaryDirectory() as folder:
        for done, (bits, seed) in enumerate(wanted):
            speeds = np.random.default_rng([seed, 1]).permutation(SPEEDS).tolist()
            named = arms(speeds, seed)
            keys = {name: f"study/{bits}/{seed}/{name}" for name in named}
            if not all(key in kept.rows for key in keys.values()):
                data = digits(seed)
                path = Path(folder) / f"{seed}-{bits}.bundle"
                build(path, data, seed, [bits])
                with Bundle.open(path) as bundle:
                    for name, chosen in named.items():
                        if keys[name] not in kept.rows:
                            kept.add(keys[name], _run(bundle, data, bits, seed, name, chosen, speeds))
                path.unlink()
            rows += [kept.rows[key] for key in keys.values()]
            print(f"study: {done + 1} of {len(wanted)} (seed {seed}, {bits} bits)", file=sys.stderr, flush=True)
    return rows


def _run(
    bundle: Bundle, data: Task, bits: int, seed: int, name: str, chosen: Allocate, speeds: Sequence[float]
) -> dict[str, Any]:
    def trains(client: int, number: int) -> str:
        return program(bits, Choice.QAT if client in chosen(number) else Choice.PTQ)

    def sends(client: int, start: Tensors, trained: Tensors, draw: np.random.Generator) -> Tensors:  # noqa: ARG001
        return {n: dequantize(quantize(v, bits)).astype(np.float32) if v.ndim > 1 else v for n, v in trained.items()}

    began = time.process_time()
    run = federate(
        bundle,
        data,
        MEAN,
        trains,
        model=program(bits, Choice.PTQ),
        rounds=ROUNDS,
        learning_rate=RATE,
        seed=seed,
        steps=STEPS,
        attack=sends,
    )
    return {
        "table": "study",
        "bits": bits,
        "seed": seed,
        "arm": name,
        "accuracy": run.accuracy[-1],
        "last_three": run.final,
        "curve": [round(value, 4) for value in run.accuracy],
        "time": simulated_time(speeds, chosen),
        "cpu_seconds": time.process_time() - began,
    }


def ratios(args: argparse.Namespace, kept: Kept) -> list[dict[str, Any]]:
    """What a QAT step costs by net, measured, and the allocation at that cost over devices of the study's speeds."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in NETS:
            key = f"ratio/{name}/{args.repeats}"
            if key not in kept.rows:
                kept.add(key, {"table": "ratio", "net": name, **_measured(Path(folder), name, args.repeats)})
            row = kept.rows[key]
            plant = clients_of(SPEEDS * row["ptq_ms"], row["ratio"])
            found = allocate(plant, USUAL)
            every = dict.fromkeys(plant, Choice.QAT)
            rows.append(
                {
                    **row,
                    "bound": 1 / row["ratio"],
                    "time_of_qat": found.seconds / round_seconds(plant, every),
                    "upgraded": sum(choice is Choice.QAT for choice in found.choices.values()),
                    "brute_force_seconds": brute_force(plant, USUAL),
                    "allocated_seconds": found.seconds,
                }
            )
            print(f"ratio: {name} {row['ratio']:.3f}", file=sys.stderr, flush=True)
    return rows


def brute_force(plant: Mapping[str, Profile], settings: PrecisionSettings) -> float:
    """The seconds of the best of all 2^K allocations: the largest value within the budget, and of those the fastest."""
    worth, names = values(plant), sorted(plant)
    limit = settings.time_factor * round_seconds(plant, {})
    best = (-1.0, 0.0)
    for picked in product((Choice.PTQ, Choice.QAT), repeat=len(names)):
        choices = dict(zip(names, picked, strict=True))
        seconds = round_seconds(plant, choices)
        if seconds <= limit:
            gain = sum(worth[device] for device, choice in choices.items() if choice is Choice.QAT)
            best = max(best, (round(gain, 12), -seconds))
    return -best[1]


def _mlp() -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), (64,)


def _convolutions() -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(128, 10)]
    return nn.Sequential(*layers), (1, 32, 32)


def _depthwise() -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    layers: list[Any] = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(128, 10)), (1, 32, 32)


def _one_dimension() -> tuple[Any, tuple[int, ...]]:
    from torch import nn

    layers = [nn.Conv1d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv1d(32, 32, 5, stride=2, padding=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AvgPool1d(16), nn.Flatten(), nn.Linear(128, 10)), (3, 128)


NETS: Mapping[str, Callable[[], tuple[Any, tuple[int, ...]]]] = {
    "mlp": _mlp,
    "cnn": _convolutions,
    "ds": _depthwise,
    "cnn1d": _one_dimension,
}


def _measured(folder: Path, name: str, repeats: int) -> dict[str, Any]:
    """Median CPU milliseconds of a step of both programs at 4 bits, batch 32, interleaved after five of warm-up."""
    import torch

    from export import ProgramSpec, build_bundle

    torch.manual_seed(0)
    torch.set_num_threads(1)
    module, shape = NETS[name]()
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(32, *shape)).astype(np.float32), draw.integers(0, 10, 32)
    path = folder / f"{name}.bundle"
    specs = [ProgramSpec("full", {}, f"{choice}4", "sgd") for choice in Choice]
    build_bundle(module, (x[:4], y[:4]), path, name=name, loss="cross_entropy", programs=specs)
    taken: dict[Choice, list[float]] = {choice: [] for choice in Choice}
    with Bundle.open(path) as bundle:
        steppers = {}
        for choice in Choice:
            found = bundle.program(f"{name}/full/{choice}4")
            steppers[choice] = Stepper(bundle, found, bundle.initial(found))
        for index in range(5 + repeats):
            for choice, stepper in steppers.items():
                began = time.process_time()
                stepper.step({"d.x": x, "d.y": y}, {"lr": 0.01, "weight_decay": 0.0})
                if index >= 5:
                    taken[choice].append(1000 * (time.process_time() - began))
        for stepper in steppers.values():
            stepper.close()
    ptq, qat = (float(np.median(taken[choice])) for choice in (Choice.PTQ, Choice.QAT))
    return {"ptq_ms": ptq, "qat_ms": qat, "ratio": qat / ptq}


def speed_blind() -> dict[str, Any]:
    """Halves drawn at random: their time against that of the fastest half, simulated."""
    plant = clients_of(SPEEDS.tolist())
    quick = fastest(SPEEDS.tolist())
    best = round_seconds(plant, {f"{k}": Choice.QAT for k in quick})
    draw = np.random.default_rng(0)
    drawn = [draw.permutation(CLIENTS)[: len(quick)] for _ in range(DRAWS)]
    found = [round_seconds(plant, {f"{k}": Choice.QAT for k in half}) / best for half in drawn]
    return {"table": "speed-blind", "draws": DRAWS, "mean": float(np.mean(found)), "worst": float(max(found))}


def drift() -> dict[str, Any]:
    """A device that does QAT throttles to a third at round 10; times of a round against the new optimum, simulated."""
    settings = replace(USUAL, fine=FineSettings())
    speeds = {f"{k}": float(ms) for k, ms in enumerate(SPEEDS)}
    state, _, _ = decide(State(settings), [Joined(d, 3, SIMULATED_RATIO, 0.05, measured=True) for d in speeds])
    news: list[Event] = [Trained(d, Choice.PTQ, ms, STEPS, STEPS * ms / 1000, 100) for d, ms in speeds.items()]
    throttled, frozen, changed, after = "3", {}, 0, {}
    for number in range(1, 11 + settings.fine.every):
        state, choices, _ = decide(state, [*news, Opened(number, 100)])
        if number == 9:
            frozen = dict(choices)
        if number == 10:
            speeds[throttled] *= 3
        if number >= 10 and not changed and choices != frozen:
            changed = number
        news = []
        for device, choice in choices.items():
            ms = speeds[device] * (SIMULATED_RATIO if choice is Choice.QAT else 1)
            news.append(Trained(device, choice, ms, STEPS, STEPS * ms / 1000, 100))
        news.append(Validated(1 / number))
        after = dict(choices)
    plant = clients_of([speeds[f"{k}"] for k in range(CLIENTS)])
    best = allocate(plant, USUAL).seconds
    return {
        "table": "drift",
        "rounds_until_changed": changed - 10,
        "ratio": round_seconds(plant, after) / best,
        "frozen_ratio": round_seconds(plant, frozen) / best,
    }


def overhead(round_cpu_seconds: float) -> dict[str, Any]:
    """CPU time of a decision over ten devices, the fine step in every fifth, against that of a round of the study."""
    settings = replace(USUAL, fine=FineSettings())
    joined = [Joined(f"{k}", 3, SIMULATED_RATIO, 0.05, measured=True) for k in range(CLIENTS)]
    state, choices, _ = decide(State(settings), [*joined, Opened(1, 1000)])
    began, rounds = time.process_time(), 200
    for number in range(2, 2 + rounds):
        news: list[Event] = [
            Trained(d, c, float(SPEEDS[int(d)]) * (SIMULATED_RATIO if c is Choice.QAT else 1), STEPS, 0.1, 100)
            for d, c in choices.items()
        ]
        state, choices, _ = decide(state, [*news, Validated(1 / number), Opened(number, 1000)])
    decision = (time.process_time() - began) / rounds
    return {
        "table": "overhead",
        "decision_ms": 1000 * decision,
        "round_ms": 1000 * round_cpu_seconds,
        "share": decision / round_cpu_seconds,
    }


def measure(args: argparse.Namespace) -> report.Report:
    """All tables."""
    kept = Kept(args.resume)
    simulated = [speed_blind(), drift()]
    measured = ratios(args, kept)
    rows = study(args, kept)
    of_round = float(np.median([row["cpu_seconds"] for row in rows])) / ROUNDS
    cost = overhead(of_round)
    blind, drifted = simulated
    summary: dict[str, Any] = {
        "simulated_rho": SIMULATED_RATIO,
        "measured_rho": {row["net"]: row["ratio"] for row in measured},
        "optimum_found": all(abs(row["allocated_seconds"] - row["brute_force_seconds"]) < 1e-9 for row in measured),
        "speed_blind_time_ratio": blind["mean"],
        "allocator_overhead": cost["share"],
        "drift_recovery_ratio": drifted["ratio"],
        "drift_frozen_ratio": drifted["frozen_ratio"],
        "seeds": args.seeds,
    }
    for bits in args.bits:
        summary |= _summary([row for row in rows if row["bits"] == bits], f"{bits}bit")
    return report.Report([*rows, *measured, *simulated, cost], summary)


def _summary(rows: Sequence[Mapping[str, Any]], label: str) -> dict[str, Any]:
    """The gap in points, and shares of it and of the time, pooled over seeds, with bootstrap intervals."""
    seeds = sorted({row["seed"] for row in rows})
    accuracy = {
        name: np.array([next(r["accuracy"] for r in rows if r["arm"] == name and r["seed"] == s) for s in seeds])
        for name in dict.fromkeys(row["arm"] for row in rows)
    }
    spent = {name: float(np.mean([r["time"] for r in rows if r["arm"] == name])) for name in accuracy}
    gap = accuracy["all QAT"] - accuracy["all PTQ"]
    draws = np.random.default_rng(0).integers(0, len(seeds), (RESAMPLES, len(seeds)))

    def interval(numerator: Any, denominator: Any) -> list[float]:
        found = numerator[draws].sum(axis=1) / denominator[draws].sum(axis=1)
        return [float(value) for value in np.percentile(found, [2.5, 97.5])]

    points = interval(100 * gap, np.ones(len(seeds)))
    summary: dict[str, Any] = {f"qat_gap_{label}": 100 * float(gap.mean()), f"qat_gap_{label}_interval": points}
    for key, name in (("hybrid", "fastest half"), ("slowest", "slowest half"), ("staged", "fastest half, final QAT")):
        gained = accuracy[name] - accuracy["all PTQ"]
        summary[f"{key}_time_share_{label}"] = spent[name] / spent["all QAT"]
        if points[0] > 0:  # there is a gap to have a share of
            summary[f"{key}_gain_share_{label}"] = float(gained.sum() / gap.sum())
            summary[f"{key}_gain_share_{label}_interval"] = interval(gained, gap)
    summary[f"hybrid_below_slowest_{label}"] = 100 * float(np.mean(accuracy["slowest half"] - accuracy["fastest half"]))
    summary[f"slowest_time_ratio_{label}"] = spent["slowest half"] / spent["fastest half"]
    return summary


def show(found: report.Report) -> str:
    """The tables as text."""
    study_rows = [row for row in found.rows if row["table"] == "study"]
    lines = []
    for bits in dict.fromkeys(row["bits"] for row in study_rows):
        for name in dict.fromkeys(row["arm"] for row in study_rows):
            same = [row for row in study_rows if (row["bits"], row["arm"]) == (bits, name)]
            accuracy = [row["accuracy"] for row in same]
            lines.append(
                {
                    "bits": f"W{bits}A8",
                    "arm": name,
                    "seeds": len(same),
                    "accuracy": float(np.mean(accuracy)),
                    "deviation": float(np.std(accuracy, ddof=1)) if len(same) > 1 else None,
                    "time": float(np.mean([row["time"] for row in same])) / ROUNDS,
                }
            )
    columns = {"bits": "bits", "arm": "who does QAT", "seeds": "seeds", "accuracy": "accuracy", "deviation": "sd"}
    parts = [report.table(lines, {**columns, "time": "SIMULATED time a round"})]
    by_net = [row for row in found.rows if row["table"] == "ratio"]
    heads = {"net": "net", "ptq_ms": "PTQ ms", "qat_ms": "QAT ms", "ratio": "rho", "bound": "1/rho"}
    heads |= {"upgraded": "QAT, of 10", "time_of_qat": "T / T(all QAT)"}
    parts.append(report.table(by_net, {**heads, "brute_force_seconds": "optimum s", "allocated_seconds": "found s"}))
    width = max(len(key) for key in found.summary)
    parts.append("\n".join(f"{key.ljust(width)}  {_told(value)}" for key, value in found.summary.items()))
    return "\n\n".join(parts)


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_told(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " to ".join(_told(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("precision", __doc__)
    parser.add_argument("--seeds", type=report.positive, default=12)
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--repeats", type=report.positive, default=100, help="measured steps of each program")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="keep finished runs here, and go on from them")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
