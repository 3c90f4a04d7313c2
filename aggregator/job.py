"""The job file (TOML): everything that the gateway is told. `KEYS` is the one table of its keys.

Unknown keys are refused with the nearest name, wrong types and values with the key's path; nothing is guessed. The
reference in `docs/job-file.md` is `render_reference()`. Paths are relative to the file.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.merge import MergeError, merger_for
from edge_sdk.bundle import Bundle
from edge_sdk.errors import EdgewiseError
from edge_sdk.update import KINDS


class JobError(EdgewiseError):
    """A job file that cannot be used as it is."""


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, type, default (None: no default), what it means, and what its value must satisfy."""

    path: str
    kind: type[Any]
    default: Any
    meaning: str
    expected: str = ""
    holds: Callable[[Any], bool] = lambda value: True
    required: bool = False


_SEGMENT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
_NAME: Mapping[str, Any] = {
    "expected": "1 to 32 lower-case letters, digits and hyphens",
    "holds": lambda v: bool(_SEGMENT.fullmatch(v)),
}
_POSITIVE: Mapping[str, Any] = {"expected": "above 0", "holds": lambda v: v > 0}
_NOT_NEGATIVE: Mapping[str, Any] = {"expected": "0 or more", "holds": lambda v: v >= 0}
_SHARE: Mapping[str, Any] = {"expected": "from 0 to 1", "holds": lambda v: 0 <= v <= 1}


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _one_of(*names: str) -> dict[str, Any]:
    return {"expected": "one of " + ", ".join(names), "holds": lambda v: v in names}


KEYS: tuple[Key, ...] = (
    Key("site", str, None, "The plant, as in every topic.", **_NAME, required=True),
    Key("job", str, None, "The name of this job, as in every topic.", **_NAME, required=True),
    Key("prefix", str, "", "Topic levels above Edgewise's own, for a unified namespace."),
    Key("bundle", Path, None, "The bundle that the devices have.", required=True),
    Key("program", str, None, "The program that devices train.", required=True),
    Key("rounds", int, None, "How many rounds to run.", **_POSITIVE, required=True),
    Key("seed", int, 0, "Every random choice of the job derives from it.", **_NOT_NEGATIVE),
    Key("state", Path, Path("state"), "Folder of journal, models and broker; made when it is missing."),
    Key("keys.control", Path, None, "Private key that signs rounds, tasks and verdicts.", required=True),
    Key("keys.release", Path, None, "Public key that must have signed the bundle."),
    Key("devices.registry", Path, None, "Which devices there are, with their keys.", required=True),
    Key("broker.url", str, None, "A broker that runs already; without it the gateway runs its own."),
    Key(
        "broker.port",
        int,
        0,
        "Port of the gateway's own broker; 0: a free one, kept in the state folder.",
        **_NOT_NEGATIVE,
    ),
    Key(
        "broker.address",
        str,
        "127.0.0.1",
        "IP address that the gateway's own broker listens at; beyond loopback only with `security.folder`.",
        expected="an IP address",
        holds=_is_ip,
    ),
    Key(
        "security.folder",
        Path,
        None,
        "The gateway's certificates, as `edgewise devices init-ca` made them; with it every connection is mutual TLS.",
    ),
    Key("round.quorum", int, None, "Updates that close a phase at once; without it: one of every device.", **_POSITIVE),
    Key("round.minimum", int, 1, "Fewer updates than this at the deadline are not merged.", **_POSITIVE),
    Key("round.deadline_seconds", float, 600.0, "The longest that a round may take.", **_POSITIVE),
    Key("round.devices_wait", int, 1, "Devices that must be online before a round opens.", **_POSITIVE),
    Key("round.evaluate_share", float, 0.3, "Last part of the round kept for the devices' evaluation.", **_SHARE),
    Key("task.steps", int, 0, "Steps of one task; give this or `task.epochs`.", **_NOT_NEGATIVE),
    Key("task.epochs", int, 0, "Passes over a device's samples in one task.", **_NOT_NEGATIVE),
    Key("task.batch_size", int, 32, "Samples of one step.", **_POSITIVE),
    Key("task.learning_rate", float, None, "Learning rate of the first round.", **_POSITIVE, required=True),
    Key("task.schedule", str, "constant", "How it changes over the rounds.", **_one_of("constant", "linear")),
    Key("task.final_fraction", float, 0.1, "`linear`: what is left of it in the last round.", **_SHARE),
    Key("task.hyper", dict, {}, "Further hyper-parameters of the program, by name."),
    Key("task.encoding", str, "int8_row", "How updates travel.", **_one_of(*KINDS)),
    Key("merge.rule", str, "mean", "Which rule merges: an entry point of the group `edgewise.mergers`."),
    Key("gate.enabled", bool, True, "Whether a merged model must prove itself on held-out samples."),
    Key("gate.tolerance", float, 0.02, "How much worse than its predecessor a model may score.", **_NOT_NEGATIVE),
    Key("gate.min_examples", int, 1, "Fewer held-out samples than this are no evidence.", **_POSITIVE),
    Key("gate.validation", Path, None, "Samples on the gateway (.npz), a second source of evidence."),
    Key("limits.update_bytes", int, 64 << 20, "The largest update that is taken in.", **_POSITIVE),
    Key(
        "limits.norm",
        float,
        0.0,
        "The largest norm of a change; 0: ten times the last round's median, or the model's own norm if that is more.",
        **_NOT_NEGATIVE,
    ),
    Key("limits.open_uploads", int, 32, "Uploads at the same time.", **_POSITIVE),
    Key("limits.part_bytes", int, 512 << 20, "Bytes of unfinished uploads.", **_POSITIVE),
    Key("limits.offers_per_minute", int, 12, "Offers of one device beyond the first for a task.", **_POSITIVE),
    Key("journal.keep_updates", bool, False, "Keep the bodies of merged updates."),
)


@dataclass(frozen=True)
class Keys:
    """`[keys]`."""

    control: Path
    release: Path | None


@dataclass(frozen=True)
class Devices:
    """`[devices]`."""

    registry: Path


@dataclass(frozen=True)
class BrokerSettings:
    """`[broker]`."""

    url: str | None
    port: int
    address: str = "127.0.0.1"


@dataclass(frozen=True)
class SecuritySettings:
    """`[security]`."""

    folder: Path | None


@dataclass(frozen=True)
class RoundSettings:
    """`[round]`."""

    quorum: int | None
    minimum: int
    deadline_seconds: float
    devices_wait: int
    evaluate_share: float


@dataclass(frozen=True)
class TaskSettings:
    """`[task]`."""

    steps: int
    epochs: int
    batch_size: int
    learning_rate: float
    schedule: str
    final_fraction: float
    encoding: str
    hyper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class MergeSettings:
    """`[merge]`."""

    rule: str


@dataclass(frozen=True)
class GateSettings:
    """`[gate]`."""

    enabled: bool
    tolerance: float
    min_examples: int
    validation: Path | None


@dataclass(frozen=True)
class LimitSettings:
    """`[limits]`."""

    update_bytes: int
    norm: float
    open_uploads: int
    part_bytes: int
    offers_per_minute: int


@dataclass(frozen=True)
class JournalSettings:
    """`[journal]`."""

    keep_updates: bool


@dataclass(frozen=True)
class Job:
    """One job file; `KEYS` explains every key."""

    site: str
    job: str
    prefix: str
    bundle: Path
    program: str
    rounds: int
    seed: int
    state: Path
    keys: Keys
    devices: Devices
    broker: BrokerSettings
    security: SecuritySettings
    round: RoundSettings
    task: TaskSettings
    merge: MergeSettings
    gate: GateSettings
    limits: LimitSettings
    journal: JournalSettings


_TABLES: Mapping[str, type[Any]] = {
    "keys": Keys,
    "devices": Devices,
    "broker": BrokerSettings,
    "security": SecuritySettings,
    "round": RoundSettings,
    "task": TaskSettings,
    "merge": MergeSettings,
    "gate": GateSettings,
    "limits": LimitSettings,
    "journal": JournalSettings,
}


def load_job(path: Path) -> Job:
    """Read and check a job file. Raises `JobError` naming file and key."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise JobError(f"{path}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not a TOML file: {error}") from error
    given = _flatten(content, path)
    values: dict[str, Any] = {}
    for key in KEYS:
        if key.path in given:
            values[key.path] = _checked(key, given[key.path], path)
        elif key.required:
            raise JobError(f"{path}: the key {key.path!r} is missing: {key.meaning}")
        else:
            values[key.path] = path.parent / key.default if isinstance(key.default, Path) else key.default
    if (values["task.steps"] == 0) == (values["task.epochs"] == 0):
        raise JobError(f"{path}: give either task.steps or task.epochs, above 0")
    quorum = values["round.quorum"]
    if quorum is not None and quorum < values["round.minimum"]:
        raise JobError(f"{path}: round.quorum = {quorum} is below round.minimum = {values['round.minimum']}")
    secure, url = values["security.folder"] is not None, values["broker.url"]
    if not secure and not ipaddress.ip_address(values["broker.address"]).is_loopback:
        raise JobError(
            f"{path}: broker.address = {values['broker.address']!r} is beyond this machine: that needs security.folder"
        )
    if url is not None and url.startswith("mqtts://") is not secure:
        raise JobError(f"{path}: broker.url = {url!r}: mqtts:// and security.folder belong together")
    top = {name: value for name, value in values.items() if "." not in name}
    tables = {
        name: kind(**{p.removeprefix(f"{name}."): v for p, v in values.items() if p.startswith(f"{name}.")})
        for name, kind in _TABLES.items()
    }
    return Job(**top, **tables)


def check_against(job: Job, bundle: Bundle) -> None:
    """Check a job against its bundle. Raises `BundleError` for a program that it lacks, `JobError` for the rest."""
    program = bundle.program(job.program)
    if program.accumulates:
        raise JobError(f"program {program.id!r} only accumulates; a job trains one of the others")
    for name, value in {"lr": job.task.learning_rate, **job.task.hyper}.items():
        limits = program.hyper.get(name)
        where = "task.learning_rate" if name == "lr" else f"task.hyper.{name}"
        if limits is None:
            raise JobError(f"{where}: program {program.id!r} has only {', '.join(program.hyper) or 'none'}")
        if not limits.minimum <= value <= limits.maximum:
            raise JobError(f"{where} = {value:g} is outside {limits.minimum:g} to {limits.maximum:g} of {program.id!r}")
    try:
        merger_for(job.merge.rule, program, bundle.tensors, job.merge, job.seed, 1)
    except MergeError as error:
        raise JobError(f"merge.rule: {error}") from error


def render_reference() -> str:
    """The text of `docs/job-file.md`."""
    lines = [
        "# The job file",
        "",
        "TOML; unknown keys are refused. Paths are relative to the file. Made from `aggregator/job.py`.",
        "",
    ]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in KEYS:
        default = "required" if key.required else "none" if key.default is None else f"`{_shown(key.default)}`"
        expected = f" ({key.expected})" if key.expected else ""
        kind = {"Path": "path", "str": "text", "dict": "table"}.get(key.kind.__name__, key.kind.__name__)
        lines.append(f"| `{key.path}` | {kind} | {default} | {key.meaning}{expected} |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else '""' if value == "" else str(value)


def _flatten(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    known = {key.path for key in KEYS}
    given: dict[str, Any] = {}
    for name, value in content.items():
        if name in _TABLES and isinstance(value, dict):
            given.update({f"{name}.{inner}": entry for inner, entry in value.items()})
        else:
            given[name] = value
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/job-file.md lists the keys"
            raise JobError(f"{path}: unknown key {name!r}; {hint}")
    return given


def _checked(key: Key, value: Any, path: Path) -> Any:
    def wrong(expected: str) -> JobError:
        return JobError(f"{path}: {key.path} = {value!r} must be {expected}")

    if key.kind is Path:
        if not isinstance(value, str):
            raise wrong("a path as text")
        return path.parent / value
    if key.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not key.kind or (key.kind is float and not math.isfinite(value)):
        raise wrong(
            {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}.get(
                key.kind.__name__, "a table"
            )
        )
    if key.kind is dict and any(type(item) not in (int, float) for item in value.values()):
        raise wrong("a table of numbers")
    if not key.holds(value):
        raise wrong(key.expected)
    return value
