"""The task of the merging studies: a small network learns images anew after they were turned by 90 degrees.

`task`: scikit-learn's digits, 1,797 images of 8 x 8. An MLP 64-96-96-10 with tanh is trained centrally on 600 upright images;
the federated task is 900 others turned by 90 degrees, over ten clients, with 297 for the test. `fashion`: the same with
Fashion-MNIST's garments of 28 x 28 and an MLP 784-96-96-10: 2,000 upright, 3,000 turned, and 2,000 turned ones of its own
test part. Clients train real step graphs with the device's runtime, bodies are encoded and decoded as on the wire where a study asks for it, and the gateway's merge rules
merge; broker and journal are left out, so that a run of 30 rounds takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.merge import Contribution, Plan, Rule, merge
from aggregator.merge.settings import MergeSettings
from edge_sdk.bundle import Bundle, Program
from edge_sdk.runtime import Predictor, Stepper
from edge_sdk.tensors import Array, Tensors
from edge_sdk.update import Encoding, decode_update, encode_update

CLIENTS = 10
STEPS = 20
BATCH = 32
LEAST = 12  # images of a client


@dataclass(frozen=True)
class Task:
    """One seed's data: images float32 `[n, 64]`, labels int64 `[n]`; `clients` are index arrays into the training part."""

    base: tuple[Array, Array]
    train: tuple[Array, Array]
    test: tuple[Array, Array]
    clients: tuple[Array, ...]


def task(seed: int, concentration: float | None) -> Task:
    """The data of a seed. `concentration`: of the Dirichlet distribution of labels over clients; None: all alike."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(images))
    x = (images[order] / 16.0).astype(np.float32)
    y = labels[order].astype(np.int64)
    turned = _turned(x.reshape(-1, 8, 8))
    train = (turned[600:1500], y[600:1500])
    return Task((x[:600], y[:600]), train, (turned[1500:], y[1500:]), split(train[1], concentration, draw))


def fashion(seed: int, concentration: float | None) -> Task:
    """The same of Fashion-MNIST. Raises `MissingDependency` where the data is not installed."""
    from examples.datasets import fashion_mnist

    images, labels = fashion_mnist("train")
    test, test_labels = fashion_mnist("test")
    draw = np.random.default_rng(seed)
    order, test_order = draw.permutation(len(images))[:5000], draw.permutation(len(test))[:2000]
    x, y = images[order], labels[order]
    train = (_turned(x[2000:]), y[2000:])
    base = (x[:2000].reshape(2000, -1), y[:2000])
    return Task(base, train, (_turned(test[test_order]), test_labels[test_order]), split(train[1], concentration, draw))


def _turned(images: Array) -> Array:
    """Images `[n, h, w]` turned by 90 degrees, flat."""
    return np.rot90(images, axes=(1, 2)).reshape(len(images), -1).copy()


def split(labels: Array, concentration: float | None, draw: np.random.Generator) -> tuple[Array, ...]:
    """Index arrays of `CLIENTS` clients into `labels`, of `LEAST` or more images each."""
    if concentration is None:
        return tuple(np.array_split(draw.permutation(len(labels)), CLIENTS))
    for _ in range(1000):
        parts: list[list[Array]] = [[] for _ in range(CLIENTS)]
        for label in range(10):
            members = draw.permutation(np.flatnonzero(labels == label))
            cuts = np.cumsum(draw.dirichlet([concentration] * CLIENTS))[:-1] * len(members)
            for part, piece in zip(parts, np.split(members, cuts.astype(int)), strict=True):
                part.append(piece)
        found = tuple(np.concatenate(part) for part in parts)
        if min(len(part) for part in found) >= LEAST:
            return found
    raise ValueError(f"no split with {LEAST} images for each client at concentration {concentration}")


def build(path: Path, data: Task, seed: int, programs: Sequence[Any]) -> None:
    """Train the base network centrally and export it with these programs."""
    import torch
    from torch import nn

    from export import build_bundle

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = nn.Sequential()
    pixels = data.base[0].shape[1]
    for name, layer in (
        ("fc1", nn.Linear(pixels, 96)),
        ("a1", nn.Tanh()),
        ("fc2", nn.Linear(96, 96)),
        ("a2", nn.Tanh()),
    ):
        module.add_module(name, layer)
    module.add_module("fc3", nn.Linear(96, 10))
    x, y = (torch.as_tensor(part) for part in data.base)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    # The exporter proves gradients on the example, its first sample also alone. Where the network is sure of a sample, the
    # gradient is what float32 left of 1 - p, and cannot be compared: the turned images that it is wrong about come first.
    turned, wanted = (torch.as_tensor(part) for part in data.train)
    with torch.no_grad():
        hardest = nn.functional.cross_entropy(module(turned), wanted, reduction="none").argsort(descending=True)[:64]
    example = (data.train[0][hardest], data.train[1][hardest])
    build_bundle(module, example, path, name="turned", loss="cross_entropy", programs=list(programs), seed=seed)


@dataclass
class Run:
    """One federated run: test accuracy after each round (0 is before the first), reports, and bytes of the bodies."""

    accuracy: list[float] = field(default_factory=list)
    reports: list[Mapping[str, Any]] = field(default_factory=list)
    bytes_up: int = 0

    @property
    def final(self) -> float:
        """The mean of the last three rounds."""
        return float(np.mean(self.accuracy[-3:]))


Attack = Callable[[int, Tensors, Tensors, np.random.Generator], Tensors]  # (client, start, trained) -> what it sends


def federate(
    bundle: Bundle,
    data: Task,
    rule: Rule,
    program_of: Callable[[int, int], str],
    *,
    model: str,
    rounds: int,
    learning_rate: float,
    seed: int,
    settings: MergeSettings | None = None,
    hyper: Mapping[str, float] | None = None,
    labels: Callable[[int, Array], Array] = lambda client, y: y,
    attack: Attack = lambda client, start, trained, draw: trained,
    encoding: Encoding | None = None,
    steps: int = STEPS,
) -> Run:
    """Run `rounds` rounds. `program_of(client, round)` is what a client trains, `model` the program that owns the model."""
    owner = bundle.program(model)
    tensors: dict[str, Array] = bundle.initial(owner)
    predictor = Predictor(bundle, owner, tensors)
    draw = np.random.default_rng(seed)
    run = Run([_accuracy(predictor, data)])
    owed: list[Tensors] = [{} for _ in range(CLIENTS)]
    for number in range(1, rounds + 1):
        trains = {program_of(client, number) for client in range(CLIENTS)}
        plan = Plan(
            owner,
            {name: bundle.program(name) for name in sorted(trains)},
            bundle.tensors,
            settings or MergeSettings(),
            seed,
            number,
        )
        merger = rule.create(plan)
        rows = []
        for client, members in enumerate(data.clients):
            program = bundle.program(program_of(client, number))
            start = merger.cut(tensors, program)
            chosen = (data.train[0][members], labels(client, data.train[1][members]))
            trained = attack(
                client, start, _trained(bundle, program, start, chosen, learning_rate, hyper or {}, draw, steps), draw
            )
            if encoding is not None:
                wanted = Encoding(
                    encoding.kind, "clear" if merger.refactorises else encoding.feedback, encoding.density
                )
                body, owed[client] = encode_update(
                    program, bundle.tensors, start, "", trained, wanted, owed[client], 1000 * number + client
                )
                run.bytes_up += len(body)
                trained = decode_update(body, program, bundle.tensors, start)
            rows.append(Contribution(f"client-{client}", number, len(members), start, trained, program.id, program.id))
        result = merge(merger, rows, tensors)
        tensors = {**tensors, **result.tensors}
        predictor.set_tensors(tensors)
        run.reports.append(result.report)
        run.accuracy.append(_accuracy(predictor, data))
    return run


def _trained(
    bundle: Bundle,
    program: Program,
    start: Tensors,
    data: tuple[Array, Array],
    learning_rate: float,
    hyper: Mapping[str, float],
    draw: np.random.Generator,
    steps: int,
) -> dict[str, Array]:
    stepper = Stepper(bundle, program, start)
    x, y = data
    size = min(BATCH, len(x))
    for _ in range(steps):
        batch = draw.choice(len(x), size, replace=False)
        stepper.step({"d.x": x[batch], "d.y": y[batch]}, {"weight_decay": 0.0, **hyper, "lr": learning_rate})
    trained = stepper.tensors()
    stepper.close()
    return trained


def accuracy_of(bundle: Bundle, program: Program, tensors: Tensors, data: Task) -> float:
    """The share of the test images that a model names rightly."""
    return _accuracy(Predictor(bundle, program, tensors), data)


def _accuracy(predictor: Predictor, data: Task) -> float:
    output = predictor.predict(data.test[0])
    return float((np.asarray(output).argmax(axis=1) == data.test[1]).mean())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval (Student's t)."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    factor = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}.get(count, 2.0)
    return float(np.mean(values)), float(factor * np.std(values, ddof=1) / np.sqrt(count))
