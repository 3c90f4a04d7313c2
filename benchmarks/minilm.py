"""LoRA over an int8 transformer on the device's runtime, beside LoRA over the float one in torch: MiniLM on texts.

Task: name the lexicographer file of a WordNet noun gloss, ten classes, 6,000 glosses, a fifth of them held out. First the
classifier is fitted to what the frozen encoder gives: the frozen-head control, which also goes on for as many steps as the
others. Then adapters of rank 8 on the query and value projections of the last two layers and on the classifier train for the
same steps on the same batches from the same start: over the int8 base by Edgewise's step graph, over the float base by
Edgewise, and over the float base in torch. The measure is accuracy on the held-out glosses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.minilm_net import SIZE, MiniLm, minilm, tokens_of
from benchmarks.report import Report, main, parser, positive, table
from benchmarks.step_peers.adapted import Adapted
from edge_sdk.bundle import Bundle, Program
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from edge_sdk.tensors import digest, pack
from edge_sdk.update import Encoding, encode_update
from examples.datasets import glosses
from export.build import ProgramSpec, build_bundle

CLASSES, EACH, BATCH = 10, 600, 16
RATE = 1e-3
TARGETS = [f"layers.{layer}.{part}" for layer in (4, 5) for part in ("q", "v")] + ["head"]
LORA = {"rank": 8, "alpha": 16.0, "targets": TARGETS}
COLUMNS = {
    "what": "what trains",
    "base": "base",
    "runtime": "runtime",
    "accuracy": "held-out accuracy",
    "step_ms": "CPU ms a step",
    "parameters": "parameters",
}


def measure(args: argparse.Namespace) -> Report:
    """One row per way to train."""
    torch.set_num_threads(1)
    texts, labels, _ = glosses(CLASSES, EACH, args.seed)
    tokens, kept = tokens_of(texts), len(texts) * 4 // 5
    data = tokens[:kept], labels[:kept], tokens[kept:], labels[kept:]
    model = minilm(CLASSES, args.seed)
    _say("the frozen encoder reads all texts")
    features = _embedded(model, tokens)
    _fit(model.head, features[:kept], labels[:kept], args.seed)
    accuracy = float((_logits(model.head, features[kept:]).argmax(1) == labels[kept:]).mean())
    rows: list[dict[str, Any]] = [
        {"what": "head", "base": "float", "runtime": "torch", "accuracy": accuracy, "parameters": (SIZE + 1) * CLASSES}
    ]
    with tempfile.TemporaryDirectory() as folder:
        specs = [
            ProgramSpec("lora", LORA, "int8", "adamw"),
            ProgramSpec("lora", LORA, "float", "adamw"),
            ProgramSpec("head", {}, "int8", "adamw"),
        ]
        for spec in specs:
            path = Path(folder) / f"{spec.scope}-{spec.precision}.bundle"
            example = tokens[:64], labels[:64]
            build_bundle(model, example, path, name="minilm", loss="cross_entropy", programs=[spec])
            with Bundle.open(path) as bundle:
                program = next(program for program in bundle.programs.values() if not program.accumulates)
                row, trained = _edgewise(bundle, program, data, args, spec)
                rows.append(row)
                if spec.scope == "lora" and spec.precision == "float":
                    start = bundle.initial(program)
                elif spec.scope == "lora":
                    sizes = _update_bytes(bundle, program, trained)
    rows.append(_torch(model, start, data, args))
    by = {(row["what"], row["base"], row["runtime"]): row["accuracy"] for row in rows}
    whole = sum(parameter.numel() for parameter in model.parameters()) * 4
    summary = {
        "steps": args.steps,
        "accuracy_int8_lora": by["LoRA", "int8", "edgewise"],
        "accuracy_float_lora_torch": by["LoRA", "float", "torch"],
        "accuracy_frozen_head": by["head", "float", "torch"],
        "points_behind_torch": 100 * (by["LoRA", "float", "torch"] - by["LoRA", "int8", "edgewise"]),
        "model_bytes_float32": whole,
        **{f"update_bytes_{kind}": size for kind, size in sizes.items()},
        **{f"update_share_{kind}": size / whole for kind, size in sizes.items()},
    }
    return Report(rows, summary)


def _edgewise(
    bundle: Bundle, program: Program, data: tuple[np.ndarray, ...], args: argparse.Namespace, spec: ProgramSpec
) -> tuple[dict[str, Any], Mapping[str, np.ndarray]]:
    x, y, new_x, new_y = data
    start = bundle.initial(program)
    stepper = Stepper(bundle, program, start, RuntimeProfile(threads=1))
    spent = 0.0
    for number, rows in enumerate(_batches(len(x), args.steps, args.seed)):
        began = time.process_time()
        result = stepper.step({"d.x": x[rows], "d.y": y[rows]}, {"lr": RATE, "weight_decay": 0.0}, ids=rows.tolist())
        spent += time.process_time() - began
        if number % 50 == 49:
            _say(
                f"{spec.scope} over {spec.precision}, edgewise: step {number + 1} of {args.steps}, loss {result.loss:.3f}"
            )
    trained = {**start, **stepper.tensors()}
    stepper.close()
    predictor = Predictor(bundle, program, trained, RuntimeProfile(threads=1))
    scores = [np.asarray(predictor.predict(new_x[at : at + 64])) for at in range(0, len(new_x), 64)]
    return {
        "what": "LoRA" if spec.scope == "lora" else "head",
        "base": spec.precision,
        "runtime": "edgewise",
        "accuracy": float((np.concatenate(scores).argmax(1) == new_y).mean()),
        "step_ms": 1000 * spent / args.steps,
        "parameters": sum(trained[name].size for name in program.tensors),
    }, trained


def _torch(
    model: MiniLm, start: Mapping[str, np.ndarray], data: tuple[np.ndarray, ...], args: argparse.Namespace
) -> dict[str, Any]:
    x, y, new_x, new_y = (torch.as_tensor(part) for part in data)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = []
    for name in TARGETS:
        parent, _, leaf = name.rpartition(".")
        layer = Adapted(model.get_submodule(name), int(LORA["rank"]), 2.0)
        with torch.no_grad():
            layer.a.copy_(torch.as_tensor(start[f"{name}.lora_a"]))
        setattr(model.get_submodule(parent), leaf, layer)
        trained += [layer.a, layer.b]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    spent = 0.0
    for number, rows in enumerate(_batches(len(x), args.steps, args.seed)):
        began = time.process_time()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        spent += time.process_time() - began
        if number % 50 == 49:
            _say(f"lora over float, torch: step {number + 1} of {args.steps}, loss {loss.item():.3f}")
    with torch.no_grad():
        scores = torch.cat([model(new_x[at : at + 64]) for at in range(0, len(new_x), 64)])
    return {
        "what": "LoRA",
        "base": "float",
        "runtime": "torch",
        "accuracy": float((scores.argmax(1) == new_y).float().mean()),
        "step_ms": 1000 * spent / args.steps,
        "parameters": sum(parameter.numel() for parameter in trained),
    }


def _batches(count: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The rows of each step: epoch after epoch in a drawn order."""
    draw = np.random.default_rng(seed)
    order = draw.permutation(count)
    for _ in range(steps):
        if len(order) < BATCH:
            order = draw.permutation(count)
        rows, order = order[:BATCH], order[BATCH:]
        yield rows


def _embedded(model: MiniLm, tokens: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        parts = [model.embed(torch.as_tensor(tokens[at : at + 64])) for at in range(0, len(tokens), 64)]
    return torch.cat(parts)


def _fit(head: nn.Linear, features: torch.Tensor, labels: np.ndarray, seed: int) -> None:
    """The classifier alone, to its end: AdamW over 30 epochs."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.as_tensor(labels)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(30):
        for rows in torch.randperm(len(features), generator=generator).split(64):
            loss = nn.functional.cross_entropy(head(features[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def _logits(head: nn.Linear, features: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = head(features).numpy()
    return found


def _update_bytes(bundle: Bundle, program: Program, trained: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The body of an update as it travels, by encoding."""
    start = bundle.initial(program)
    found = {}
    for kind in ("float32", "int8_row"):
        encoding = Encoding(kind)
        body, _ = encode_update(program, bundle.tensors, start, digest(pack(start)), trained, encoding, {}, 0)
        found[kind] = min(len(body), len(zlib.compress(body)))
    return found


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)


def _shown(report: Report) -> str:
    figures = "\n".join(
        f"  {key:<28} {value:.4g}" if isinstance(value, float) else f"  {key:<28} {value}"
        for key, value in report.summary.items()
    )
    return f"{table(report.rows, COLUMNS)}\n\n{figures}"


def _arguments() -> argparse.ArgumentParser:
    arguments = parser("minilm", __doc__)
    arguments.add_argument("--steps", type=positive, default=400, help="of each training (default %(default)s)")
    arguments.add_argument("--seed", type=int, default=0, help="of texts, batches and adapters (default %(default)s)")
    return arguments


if __name__ == "__main__":
    raise SystemExit(main(measure, _shown, _arguments()))
