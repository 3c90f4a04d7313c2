"""`edgewise demo`: ten people wear a watch; a model learns from six of them without their data leaving their device.

A small network is trained on the workstation with two people (`--base`). Six devices, each a process of its own with the
base install only, then train a LoRA adapter of it with the data of one further person each, over a real MQTT broker.
The model is judged on two people whom nobody trains on (`--test`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.errors import EdgewiseError
from examples import datasets
from examples.controls import alone_accuracies, central_accuracy
from examples.federation import BASE_INSTALL, SIGNATURES, Federation, Site

CHECKOUT = Path(__file__).resolve().parent.parent
BASE_STEPS = 300


class DemoError(EdgewiseError):
    """The demo was asked for something that it cannot do."""

    exit_code = 2


@dataclass(frozen=True)
class Options:
    """What a run of the demo may vary; people are numbered 1 to 10."""

    base: tuple[int, ...] = (2, 3)
    test: tuple[int, ...] = (6, 8)
    seed: int = 0
    rounds: int = 15
    steps: int = 30
    batch: int = 32
    learning_rate: float = 1e-2
    scope: str = "lora"  # "full": everything trains, the control of benchmarks/watch_bytes.py
    rank: int = 4
    alpha: float = 4.0  # scale 1: with the default 2 a rate of 1e-2 takes too long steps on some splits
    merge: str = "product_svd"
    encoding: str = "int8_row"
    broker: str = "auto"
    controls: bool = True
    folder: Path = CHECKOUT / ".demo"
    device_python: Path = CHECKOUT / ".venv-device" / "bin" / "python"

    @property
    def devices(self) -> tuple[int, ...]:
        """The people whose data trains: all others."""
        return tuple(person for person in datasets.WATCH_PEOPLE if person not in self.base + self.test)


@dataclass
class Result:
    """What a run found; the keys of `--json`."""

    accuracy_before: float
    accuracy_after: float
    rounds: int
    broker: str
    seconds: float
    updates_sent: int
    updates_merged: int
    updates_trained: int
    updates_measured: int
    lost: int
    duplicated: int
    torch_importable_on_device: bool
    devices: list[dict[str, Any]] = field(default_factory=list)
    accuracy_alone_mean: float | None = None
    accuracy_central: float | None = None
    import_only_rss_mb: float | None = None
    import_used_rss_mb: float | None = None
    model: str = ""


def run(options: Options, *, show: bool = True) -> Result:
    """Train the base, export it, run the federation to its end, judge the model. Raises `EdgewiseError`."""
    from examples.watch_model import accuracy, train_centrally

    _check(options)
    say = _printer(show)
    began = time.monotonic()
    recordings = datasets.watch()
    x_base, y_base = datasets.of_people(recordings, options.base)
    x_test, y_test = datasets.of_people(recordings, options.test)

    say(
        f"1. Train the base model on people {_people(options.base)} ({len(x_base)} windows, {BASE_STEPS} steps, torch)."
    )
    net = train_centrally(x_base, y_base, normalise_by=x_base, steps=BASE_STEPS, seed=options.seed)
    base_accuracy = accuracy(net, x_test, y_test)
    folder = options.folder / f"seed-{options.seed}"
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)

    say("2. Export it: infer, step and evaluate graphs in plain ONNX, the frozen part in int8.")
    site = Site.prepare(folder, options, net, recordings)
    say(f"   {site.bundle.name}: {site.bundle.stat().st_size / 1024:.0f} KiB; {site.proof}")

    with Federation(site, options) as federation:
        say(
            f"3. Start the gateway ({federation.broker_description}) and {len(options.devices)} devices; they cannot import torch."
        )
        federation.run(show=show)
        facts = federation.facts()

    say(f"4. Judge the merged model on people {_people(options.test)}, whom nobody trained on.")
    before = site.accuracy_of(None, x_test, y_test)
    after = site.accuracy_of(facts.model, x_test, y_test)
    result = Result(
        accuracy_before=before,
        accuracy_after=after,
        rounds=facts.rounds,
        broker=facts.broker,
        seconds=0.0,
        updates_sent=facts.updates_sent,
        updates_merged=facts.updates_merged,
        updates_trained=facts.trained,
        updates_measured=facts.measured,
        lost=facts.lost,
        duplicated=facts.duplicated,
        torch_importable_on_device=any(device["torch_importable"] for device in facts.devices),
        devices=facts.devices,
        import_only_rss_mb=site.import_only_rss_mb(*BASE_INSTALL),
        import_used_rss_mb=site.import_only_rss_mb(*BASE_INSTALL, SIGNATURES),
        model=str(facts.model),
    )
    if options.controls:
        say("5. Controls: each device alone, and everything in one place.")
        alone = alone_accuracies(site, options, x_test, y_test)
        for device in result.devices:
            device["accuracy_alone"] = alone[device["id"]]
        result.accuracy_alone_mean = float(np.mean(list(alone.values())))
        result.accuracy_central = central_accuracy(recordings, options, x_test, y_test)
    result.seconds = time.monotonic() - began
    if show:
        print_table(result, options, base_accuracy)
    return result


def print_table(result: Result, options: Options, float_base_accuracy: float) -> None:
    """The end of the demo, for a person."""
    print()
    print(f"Accuracy on people {_people(options.test)}, whom nobody trained on")
    rows = [
        ("base model alone", result.accuracy_before),
        (f"after {result.rounds} federated rounds", result.accuracy_after),
    ]
    if result.accuracy_alone_mean is not None:
        rows.insert(1, ("devices training alone, mean", result.accuracy_alone_mean))
    if result.accuracy_central is not None:
        rows.append(("all eight people in one place (torch)", result.accuracy_central))
    rows.append(("base model before quantization (torch)", float_base_accuracy))
    for name, value in rows:
        print(f"  {name:<40} {value:.3f}")
    print()
    print("  device     own held-out data    alone on      KiB per round    peak      updates")
    print("             before    after      new people    up      down     memory    sent/merged")
    for device in result.devices:
        alone = device.get("accuracy_alone")
        print(
            f"  {device['id']:<10} {_share(device['held_out_before'])}     {_share(device['held_out_after'])}"
            f"      {_share(alone)}         {device['bytes_up'] / 1024 / result.rounds:5.1f}   "
            f"{device['bytes_down'] / 1024 / result.rounds:5.1f}    {device['peak_rss_mb']:4.0f} MB"
            f"   {device['updates_sent']:3d}/{device['updates_merged']}"
        )
    print()
    print(
        f"  updates: {result.updates_sent} sent: {result.updates_trained} trained and merged, {result.updates_measured} measured a model; "
        f"{result.lost} lost, {result.duplicated} twice"
    )
    print(
        f"  a process that only imports the five packages: {result.import_only_rss_mb:.0f} MB, "
        f"with signatures {result.import_used_rss_mb:.0f} MB; "
        f"torch on a device: {'importable' if result.torch_importable_on_device else 'not importable'}"
    )
    print(f"  broker: {result.broker}; {result.seconds:.0f} s in all")
    model = Path(result.model)
    print(f"  merged model: {_shown(model)}")
    print(
        f"  run it: edgewise bundle predict {_shown(model.parent.parent / 'watch.bundle')} --model {_shown(model)} --input x.npy"
    )


def _shown(path: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _share(value: float | None) -> str:
    return "  -  " if value is None else f"{value:.3f}"


def _people(people: Sequence[int]) -> str:
    return " and ".join(
        [", ".join(str(person) for person in people[:-1]), str(people[-1])] if len(people) > 1 else [str(people[0])]
    )


def _check(options: Options) -> None:
    for name, people in (("--base", options.base), ("--test", options.test)):
        unknown = sorted(set(people) - set(datasets.WATCH_PEOPLE))
        if unknown or not people:
            raise DemoError(f"{name}: people are numbered 1 to 10, found {unknown or 'none'}")
    both = sorted(set(options.base) & set(options.test))
    if both:
        raise DemoError(f"--base and --test share person {both[0]}: whoever is trained on cannot be the test")
    if not options.devices:
        raise DemoError("--base and --test leave nobody to be a device: name fewer people")
    if options.rounds < 1 or options.steps < 1:
        raise DemoError(f"--rounds and --steps must be at least 1, found {options.rounds} and {options.steps}")
    if not options.device_python.is_file():
        raise DemoError(
            f"the devices' environment {options.device_python} is missing: run `make demo` once, or `make .venv-device/ready`"
        )


def _printer(show: bool) -> Any:
    def say(text: str) -> None:
        if show:
            print(text, flush=True)

    return say


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected numbers with commas between them, such as 2,3; found {text!r}"
        ) from None


@contextlib.contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """A polite kill ends the demo like Ctrl-C, so that nothing is left running."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code (`edge_sdk.errors`)."""
    defaults = Options()
    parser = argparse.ArgumentParser(
        prog="edgewise demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--base", type=_numbers, default=defaults.base, help="people the base model is trained on (default 2,3)"
    )
    parser.add_argument("--test", type=_numbers, default=defaults.test, help="people nobody trains on (default 6,8)")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--rounds", type=int, default=defaults.rounds)
    parser.add_argument("--steps", type=int, default=defaults.steps, help="training steps per device and round")
    parser.add_argument("--merge", choices=("product_svd", "mean"), default=defaults.merge)
    parser.add_argument("--encoding", choices=("int8_row", "float32"), default=defaults.encoding)
    parser.add_argument(
        "--broker",
        choices=("auto", "mosquitto", "iotcore"),
        default="auto",
        help="auto: mosquitto where it is installed",
    )
    parser.add_argument(
        "--no-controls", dest="controls", action="store_false", help="leave out the devices alone and central training"
    )
    parser.add_argument("--folder", type=Path, default=defaults.folder, help="where the run keeps its files")
    parser.add_argument(
        "--device-python",
        type=Path,
        default=defaults.device_python,
        help="Python of an environment with the base install only",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "json"}
    settings["folder"] = settings["folder"].resolve()
    try:
        with _terminate_as_interrupt():
            result = run(Options(**settings))
    except EdgewiseError as error:
        print("edgewise demo: " + " ".join(str(error).split()), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("\nedgewise demo: interrupted; gateway, broker and devices are stopped", file=sys.stderr)
        return 130
    if args.json:
        args.json.write_text(json.dumps(asdict(result), indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
