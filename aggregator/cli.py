"""`edgewise aggregator run JOB` and `edgewise job status|rounds|keys JOB`.

Exit codes: 0 the job is done (or the question answered); 2 wrong arguments; 3 the job file, bundle or registry is wrong; 4 a
broker, disk space or the journal's lock is missing; 130 stopped by a signal before the end (run again to go
on).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from aggregator.journal import RoundRecord, Status


def register_aggregator(parser: argparse.ArgumentParser) -> None:
    """Add `run`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    run = commands.add_parser("run", help="run a job's rounds until they are done")
    run.add_argument("job", type=Path, metavar="JOB", help="the job file (TOML)")
    run.add_argument("--json", action="store_true", help="print the job's status as JSON at the end")
    run.add_argument(
        "--demo",
        action="store_true",
        help="take the embedded broker where mosquitto is missing (it forgets everything)",
    )
    run.add_argument(
        "--broker",
        choices=("auto", "mosquitto", "iotcore"),
        default="auto",
        help="which broker to run where the job names none (default: mosquitto; iotcore needs --demo)",
    )
    run.set_defaults(run=_run)


def register_job(parser: argparse.ArgumentParser) -> None:
    """Add `status`, `rounds` and `keys`."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, function, text in (
        ("status", _status, "where the job stands: round, devices, alarms, model"),
        ("rounds", _rounds, "what happened in each round"),
        ("keys", _keys, "check a job file and show every key with its value"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("job", type=Path, metavar="JOB", help="the job file (TOML)")
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=function)


def _run(args: argparse.Namespace) -> int:
    # Before numpy is imported: a merge must give the same bytes whatever the number of cores
    # (methods/lora.md 11).
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")
    from aggregator.job import load_job
    from aggregator.service import Service

    if args.broker == "iotcore" and not args.demo:
        print("edgewise: --broker iotcore needs --demo: the embedded broker forgets everything", file=sys.stderr)
        return 2
    display = Display(sys.stderr)
    service = Service(load_job(args.job), demo=args.demo, on_progress=display.show, broker_kind=args.broker)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: service.stop())
    status = service.run()
    display.close()
    if args.json:
        print(json.dumps(status.to_json()))
    else:
        print(_headline(status))
    return 0 if status.state == "done" else 130


def _status(args: argparse.Namespace) -> int:
    status = _read(args.job)
    if args.json:
        print(json.dumps(status.to_json()))
        return 0
    print(_headline(status))
    print(f"model {status.model or '-'}")
    print(f"broker: {status.broker or '-'}")
    fates = _counts(
        {"trained": status.trained, "measured": status.measured, "pending": status.pending, **status.set_aside}
    )
    print(f"updates: {status.accepted} accepted ({fates}); refused: {_counts(status.refused)}")
    rows = [
        [
            device.device,
            "online" if device.online else "offline",
            device.paused,
            str(device.waiting),
            str(device.accepted),
            str(device.merged),
            str(device.refused),
            _bytes(device.bytes_up),
            _bytes(device.bytes_down),
            _ago(device.seen),
        ]
        for device in status.devices
    ]
    heads = ["device", "state", "paused", "outbox", "accepted", "merged", "refused", "up", "down", "seen"]
    _table(heads, rows)
    for device in status.devices:
        if device.reason:
            print(f"{device.device} trains {device.program}: {device.reason}")
    if status.history:
        last = status.history[-1]
        for name, reason in sorted(last.declined.items()):
            print(f"declined in round {last.round}, {name}: {reason}")
    for refusal in status.refusals:
        print(f"refused in round {refusal.round}, {refusal.device}: {refusal.reason}: {refusal.detail}")
    for alarm in status.alarms:
        print(f"ALARM {alarm.kind} {alarm.device or '-'}: {alarm.detail} ({alarm.count} times, {_ago(alarm.last)})")
    return 0


def _rounds(args: argparse.Namespace) -> int:
    status = _read(args.job)
    if args.json:
        print(json.dumps([record.to_json() for record in status.history]))
        return 0
    _table(
        [
            "round",
            "outcome",
            "before",
            "after",
            "merged",
            "aside",
            "refused",
            "error",
            "up",
            "down",
            "s",
            "model",
        ],
        [_row(record) for record in status.history],
    )
    for record in status.history:
        if record.reason:
            print(f"round {record.round}: {record.reason}")
    merged = [record for record in status.history if record.merge.get("layers")]
    if merged:
        _layers(merged[-1])
    return 0


def _layers(record: RoundRecord) -> None:
    """What the rule reports of each layer of a round: norms, relative errors, and how far devices agree."""
    print(f"\nlayers of round {record.round} ({record.merge.get('rule')}):")
    heads = ["layer", "norm", "error", "factor mean's", "rank", "effective", "least cosine", "side error"]
    rows = []
    for layer, found in record.merge["layers"].items():
        cosine = (found.get("drift_cosine") or {}).get("min")
        values = [found["norm"], found["truncation_error"], found["naive_error"], found.get("rank")]
        values += [found.get("effective_rank"), cosine, found.get("side_error")]
        due = " (rebase due)" if found.get("rebase_due") else ""
        rows.append([layer, *("-" if value is None else f"{value:.3g}" for value in values)])
        rows[-1][-1] += due
    _table(heads, rows)


def _keys(args: argparse.Namespace) -> int:
    from aggregator.job import load_job

    values = _plain(load_job(args.job))
    del values["file"]  # no key of the file, but its name
    if args.json:
        print(json.dumps(values))
        return 0
    for name, value in _flat(values):
        print(f"{name} = {json.dumps(value)}")
    return 0


def _read(path: Path) -> Status:
    from aggregator.job import load_job
    from aggregator.journal import read_status

    return read_status(load_job(path))


def _row(record: RoundRecord) -> list[str]:
    up = sum(pair[0] for pair in record.traffic.values())
    down = sum(pair[1] for pair in record.traffic.values())
    error = record.merge.get("truncation_error")
    return [
        str(record.round),
        record.outcome or record.phase,
        _share(record.score_before),
        _share(record.score_after),
        f"{record.merged}/{len(record.assigned)}",
        _counts(record.set_aside),
        _counts(record.refused),
        "-" if error is None else f"{error:.3f}",
        _bytes(up),
        _bytes(down),
        "-" if record.seconds is None else f"{record.seconds:.1f}",
        (record.model or record.start)[:12],
    ]


class Display:
    """Progress while a job runs: one line that is redrawn on a terminal, one line per change elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._last = ""
        self._told = -1

    def show(self, status: Status) -> None:
        """Show where the job stands, and each round once it is over."""
        for record in status.history:
            if record.outcome is not None and record.round > self._told:
                self._told = record.round
                merged = f"{record.merged} of {len(record.assigned)} merged"
                score = f"score {_share(record.score_before)} -> {_share(record.score_after)}"
                why = f" ({record.reason})" if record.outcome != "accepted" and record.reason else ""
                self._line(f"round {record.round}: {record.outcome}, {merged}, {score}{why}")
        text = _headline(status)
        if self._live:
            self._stream.write(f"\r\x1b[2K{text}")
        elif text != self._last:
            self._stream.write(text + "\n")
        self._last = text
        self._stream.flush()

    def close(self) -> None:
        """End the line that is being redrawn."""
        if self._live and self._last:
            self._stream.write("\n")
            self._stream.flush()

    def _line(self, text: str) -> None:
        self._stream.write(f"\r\x1b[2K{text}\n" if self._live else text + "\n")


def _headline(status: Status) -> str:
    online = sum(device.online for device in status.devices)
    text = f"{status.site}/{status.job}: {status.state}, round {status.round} of {status.rounds + status.uncounted}"
    if status.uncounted:
        text += f" ({status.uncounted} were declined and do not count)"
    text += f", {status.phase}"
    if status.phase_deadline is not None:
        text += f" {status.answered}/{status.assigned} answered"
        if status.declined:
            text += f", {status.declined} declined"
    text += f", {online} of {len(status.devices)} devices online"
    if status.alarms:
        text += f", {len(status.alarms)} alarms"
    return text


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count) or "-"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 1000 else f"{count / 1000:.1f} kB" if count < 10**6 else f"{count / 10**6:.1f} MB"


def _ago(at: int) -> str:
    return f"{max(0, round(time.time() - at / 1000))} s ago"


def _plain(value: Any) -> Any:
    """A settings dataclass as plain JSON values."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            pairs += _flat(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs
