"""What the federation is compared with: every device on its own, and everything in one place."""

from __future__ import annotations

import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edge_sdk.bundle import Bundle
from edge_sdk.runtime import Predictor, RuntimeProfile, Stepper
from edge_sdk.samples import SampleStore
from examples import datasets

if TYPE_CHECKING:
    from examples.demo import Options
    from examples.federation import Site

CENTRAL_STEPS = 1500


def learning_rate(round_index: int, rounds: int, first: float, final_fraction: float = 0.1) -> float:
    """The demo's schedule: from `first` in round 0 linearly to `final_fraction` of it in the last round."""
    return first if rounds == 1 else first * (1 - (1 - final_fraction) * round_index / (rounds - 1))


def alone_accuracies(site: Site, options: Options, x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Each device trains as often as in the federation, from the same start, with its own data only.

    Returns the accuracy of each on `x` float32 `[n, 6, 100]`, `y` int64 `[n]`. Two at a time, as processes of their own.
    """
    jobs = [(site.bundle, site.program, site.data_of(device), options, x, y) for device in site.device_ids]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return dict(zip(site.device_ids, pool.map(_train_alone, jobs), strict=True))


def _train_alone(job: tuple[Path, str, Path, Options, np.ndarray, np.ndarray]) -> float:
    bundle_path, program_id, data_path, options, x, y = job
    with tempfile.TemporaryDirectory() as folder, Bundle.open(bundle_path) as bundle:
        program = bundle.program(program_id)
        store = SampleStore(Path(folder) / "samples.sqlite", bundle.fields, max_bytes=1 << 28)
        for path in sorted(data_path.glob("*.npy")):
            name, _, label = path.stem.rpartition("_")
            x_own = np.load(path)
            store.add_many(x_own, np.full(len(x_own), int(label), np.int64), recording=name)
        ids = store.train_ids(bundle.held_out)  # the same share of its data as in the federation
        draw = np.random.default_rng(options.seed)
        tensors = bundle.initial(program)
        for round_index in range(options.rounds):
            stepper = Stepper(bundle, program, tensors, RuntimeProfile(), seed=options.seed)
            rate = learning_rate(round_index, options.rounds, options.learning_rate)
            for _ in range(options.steps):
                stepper.step(store.read(np.sort(draw.choice(ids, options.batch))), {"lr": rate})
            tensors = stepper.tensors()
            stepper.close()
        store.close()
        return score(bundle, program_id, tensors, x, y)


def score(bundle: Bundle, program_id: str, tensors: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray) -> float:
    """Accuracy of these tensors through the bundle's own `infer` graph."""
    predictor = Predictor(bundle, bundle.program(program_id), tensors, RuntimeProfile())
    logits = np.concatenate([np.asarray(predictor.predict(part)) for part in np.array_split(x, max(1, len(x) // 256))])
    return float((logits.argmax(axis=1) == y).mean())


def central_accuracy(recordings: list[datasets.Recording], options: Options, x: np.ndarray, y: np.ndarray) -> float:
    """One network, from scratch, on all data of base people and devices: what no site would be allowed to do."""
    from examples.watch_model import accuracy, train_centrally

    everything, labels = datasets.of_people(recordings, options.base + options.devices)
    base, _ = datasets.of_people(recordings, options.base)
    net = train_centrally(everything, labels, normalise_by=base, steps=CENTRAL_STEPS, seed=options.seed)
    return accuracy(net, x, y)
