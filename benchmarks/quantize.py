"""What quantization costs and saves: bytes, CPU time, memory and kernels of each network, and accuracy where data exists.

`size` rows: the networks of MLPerf Tiny and their neighbours with random weights, so no accuracy. `accuracy` rows: four
networks that have learned the digits (scikit-learn), drawn at 32 x 32 with shifts and noise, for each seed: float, float
after the same extra steps, PTQ at 8 and 4 bits, QAT at 4 bits, and a network whose channels differ by 10^U(-1.5, 1.5)
without changing its function, at 8 bits. CPU time is the least of 200 runs of one sample, interleaved, one thread.
`--check` ends with an error where a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from benchmarks import report
from benchmarks.step_models import STEP_MODELS
from devices.bench import processor
from edge_sdk.tensors import Array
from export.graph import array_of, clone
from export.quantize.equalize import layer_pairs, rescale, set_constants
from export.quantize.fold import fold_normalizations
from export.quantize.pipeline import Data, Recipe, quantize_model
from export.quantize.settings import QatSettings
from export.torch_import import forward_graph

SIZES: Final = (
    "tiny_ds_cnn",
    "tiny_mobilenet",
    "tiny_resnet8",
    "tiny_autoencoder",
    "cnn_all",
    "depthwise_all",
    "conv1d_all",
)
TFLITE_KB: Final = {"tiny_ds_cnn": 53, "tiny_mobilenet": 325, "tiny_resnet8": 96, "tiny_autoencoder": 270}
LEARNING: Final = {
    "mlp": (1.0, 3e-3),
    "cnn_all": (0.5, 3e-3),
    "depthwise_all": (1.0, 1e-2),
    "tiny_resnet8": (0.5, 3e-3),
}
QAT: Final = QatSettings(steps=150, batch=64, learning_rate=1e-3)
SPREAD: Final = 1.5
ANY: Final = ("fusion", "accuracy", "latency", "budget")


def digits(seed: int, *, flat: bool) -> Data:
    """1,200 to train on, 597 to test on: float32 [n, 64], or [n, 3, 32, 32] with shifts up to 4 and noise."""
    from sklearn.datasets import load_digits

    held, draw = load_digits(), np.random.default_rng(seed)
    order = draw.permutation(len(held.target))
    images, y = (held.images[order] / 16).astype(np.float32), held.target[order].astype(np.int64)
    if flat:
        x = images.reshape(len(images), 64)
    else:
        large = images.repeat(4, 1).repeat(4, 2)
        moved = np.stack([np.roll(image, draw.integers(-4, 5, 2), (0, 1)) for image in large])
        x = np.repeat((moved + draw.normal(0, 0.2, moved.shape))[:, None], 3, 1).astype(np.float32)
    return Data(x[:1200], y[:1200], x[1200:], y[1200:])


def learn(module: torch.nn.Module, data: Data, steps: int, rate: float, seed: int) -> None:
    """Adam with a rate that falls along a cosine."""
    draw = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(module.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    module.train()
    for _ in range(steps):
        rows = draw.integers(0, len(data.x), 64)
        loss = functional.cross_entropy(module(torch.as_tensor(data.x[rows])), torch.as_tensor(data.y[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    module.eval()


def imbalanced(model: ir.Model, seed: int) -> ir.Model:
    """The same function, with channels between layers divided and multiplied by 10^U(-SPREAD, SPREAD)."""
    made, draw = clone(model), np.random.default_rng(seed)
    fold_normalizations(made)
    weights: dict[str, Array] = {
        n: a.astype(np.float64) for n, v in made.graph.initializers.items() if (a := array_of(v)) is not None
    }
    pairs = layer_pairs(made.graph)
    for pair in pairs:
        rescale(weights, pair, 10 ** draw.uniform(-SPREAD, SPREAD, weights[pair.first].shape[pair.row]))
    names = {name for pair in pairs for name in (pair.first, pair.second, pair.bias) if name is not None}
    set_constants(made, {name: weights[name].astype(np.float32) for name in names})
    return made


def size_row(name: str) -> dict[str, Any]:
    """One network with random weights."""
    entry = STEP_MODELS[name]
    x, y = entry.example(64)
    y = y if entry.loss == "mse" else y.astype(np.int64)
    model = forward_graph(entry.make(), x[:2])
    eight, four = (
        quantize_model(model, Data(x, y, x, y), Recipe(bits=bits, qat=None, allow=ANY), name=name) for bits in (8, 4)
    )
    found = eight.report
    return {
        "kind": "size",
        "net": name,
        "float_kb": found.float_bytes / 1024,
        "int8_raw_kb": found.raw_bytes / 1024,
        "int8_kb": found.integer_bytes / 1024,
        "int4_kb": four.report.integer_bytes / 1024,
        "tflite_kb": TFLITE_KB.get(name),
        "cpu_ratio": found.cpu_ratio,
        "float_us": found.float_cpu_us,
        "int8_us": found.integer_cpu_us,
        "float_mb": (found.float_vmhwm_kb or 0) / 1024,
        "int8_mb": (found.integer_vmhwm_kb or 0) / 1024,
        "integer_kernels": found.integer_kernels,
        "float_kernels": len(found.float_kernels) + len(four.report.float_kernels),
        "advice": "int8" if found.cpu_ratio >= 1 else "int8 is slower: float where the flash permits",
    }


def accuracy_row(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One network of one seed: it learns, and is quantized in every way."""
    width, rate = LEARNING[name]
    data = digits(seed, flat=name == "mlp")
    torch.manual_seed(seed)
    module = STEP_MODELS[name].build(width)
    learn(module, data, steps, rate, seed)
    model = forward_graph(module, data.x[:2])
    hostile = imbalanced(model, seed)
    free = Recipe(qat=None, allow=ANY, memory=False)
    ptq8 = quantize_model(model, data, free).report
    ptq4 = quantize_model(model, data, replace(free, bits=4)).report
    qat4 = quantize_model(model, data, replace(free, bits=4, tolerance=-1.0, qat=QAT)).report
    plain = quantize_model(hostile, data, replace(free, equalize=False)).report
    whole = quantize_model(hostile, data, free).report
    learn(module, data, QAT.steps, QAT.learning_rate, seed + 1000)
    with torch.no_grad():
        control = float((module(torch.as_tensor(data.held_x)).argmax(1).numpy() == data.held_y).mean())
    return {
        "kind": "accuracy",
        "net": name,
        "seed": seed,
        "float": ptq8.float_score,
        "float_more": control,
        "ptq8": ptq8.integer_score,
        "agreement8": ptq8.agreement,
        "ptq4": ptq4.integer_score,
        "qat4": qat4.integer_score,
        "hostile_plain": plain.integer_score,
        "hostile": whole.integer_score,
    }


def measure(args: argparse.Namespace) -> report.Report:
    """All rows. Raises `CheckFailed` with `--check` where a goal is missed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = [size_row(name) for name in SIZES]
    rows += [accuracy_row(name, seed, args.steps) for name in LEARNING for seed in range(args.seeds)]
    torch.set_num_threads(threads)
    summary = summed_up(rows)
    missed = [goal for goal, reached in goals(summary).items() if not reached]
    if args.check and missed:
        raise report.CheckFailed(f"missed: {'; '.join(missed)}")
    return report.Report(rows, summary)


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is quoted; shares of a gap are ratios of sums over seeds, never means of ratios."""
    learned = [row for row in rows if row["kind"] == "accuracy"]
    sizes = [row for row in rows if row["kind"] == "size"]
    recovered = {}
    for name in LEARNING:
        mine = [row for row in learned if row["net"] == name]
        gap = sum(row["float"] - row["ptq4"] for row in mine)
        recovered[name] = sum(row["qat4"] - row["ptq4"] for row in mine) / gap if gap > 0.02 * len(mine) else None
    return {
        "int8_worst_drop": max(
            float(np.mean([row["float"] - row["ptq8"] for row in learned if row["net"] == name])) for name in LEARNING
        ),
        "int8_worst_single_drop": max(row["float"] - row["ptq8"] for row in learned),
        "qat4_gap_share": recovered,
        "hostile_worst_drop": max(row["float"] - row["hostile"] for row in learned),
        "hostile_plain_accuracy": min(row["hostile_plain"] for row in learned),
        "float_kernels": sum(row["float_kernels"] for row in sizes),
        "int8_share_of_bytes": {row["net"]: row["int8_kb"] / row["float_kb"] for row in sizes},
        "cpu_ratio": {row["net"]: row["cpu_ratio"] for row in sizes},
        "machine": processor(),
    }


def goals(summary: Mapping[str, Any]) -> dict[str, bool]:
    """Each goal, and whether it is reached."""
    shares = summary["qat4_gap_share"]
    return {
        "int8 within 1 point of float (mean over seeds)": summary["int8_worst_drop"] <= 0.01,
        "4-bit QAT recovers 80 % of the gap": all(s >= 0.8 for s in shares.values() if s is not None)
        and any(s is not None for s in shares.values()),
        "the imbalanced net within 1 point": summary["hostile_worst_drop"] <= 0.0101,
        "no product in float": summary["float_kernels"] == 0,
    }


SIZE_COLUMNS = {
    "net": "network",
    "float_kb": "float KB",
    "int8_raw_kb": "int8 raw",
    "int8_kb": "int8 KB",
    "int4_kb": "int4 KB",
    "tflite_kb": "TFLite KB",
    "cpu_ratio": "times as fast",
    "int8_us": "int8 us",
    "int8_mb": "peak MB",
    "float_mb": "float's",
    "integer_kernels": "integer",
    "float_kernels": "float kernels",
    "advice": "advice",
}
ACCURACY_COLUMNS = {
    "net": "network",
    "seed": "seed",
    "float": "float",
    "float_more": "more steps",
    "ptq8": "ptq8",
    "ptq4": "ptq4",
    "qat4": "qat4",
    "hostile_plain": "imbalanced",
    "hostile": "equalized",
}


def show(found: report.Report) -> str:
    """Both tables, and the goals."""
    sizes = [row for row in found.rows if row["kind"] == "size"]
    learned = [row for row in found.rows if row["kind"] == "accuracy"]
    reached = (f"{'reached' if ok else 'MISSED'}: {goal}" for goal, ok in goals(found.summary).items())
    parts = [f"{found.summary['machine']}, one thread", report.table(sizes, SIZE_COLUMNS), ""]
    return "\n".join([*parts, report.table(learned, ACCURACY_COLUMNS), "", *reached])


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = report.parser("quantize", __doc__)
    parser.add_argument("--seeds", type=report.positive, default=3)
    parser.add_argument("--steps", type=report.positive, default=300, help="with which the networks learn")
    parser.add_argument("--check", action="store_true", help="end with an error where a goal is missed")
    return parser


if __name__ == "__main__":
    sys.exit(report.main(measure, show, arguments()))
