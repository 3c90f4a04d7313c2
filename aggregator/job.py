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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.assign import Assigner, AssignError
from aggregator.assign import rule_named as assigner_named
from aggregator.assign.settings import BUDGETS, AssignSettings, FineSettings, PrecisionSettings, RankSettings
from aggregator.merge import MergeError, Plan, rule_named
from aggregator.merge.server import OPTIMIZERS
from aggregator.merge.settings import LoraSettings, MergeSettings, RobustSettings, ServerSettings
from edge_sdk.bundle import Bundle, Program
from edge_sdk.codecs import DENSITY_LIMIT
from edge_sdk.errors import EdgewiseError
from edge_sdk.update import COMPRESSIONS, KINDS, compresses_with_zstd


class JobError(EdgewiseError):
    """A job file that cannot be used as it is."""


@dataclass(frozen=True)
class Key:
    """One key: its dotted path, type, default (None: no default), what it means, and what its value must satisfy.

    `of` is the type of the items of a table or list.
    """

    path: str
    kind: type[Any]
    default: Any
    meaning: str
    expected: str = ""
    holds: Callable[[Any], bool] = lambda value: True
    required: bool = False
    of: type[Any] = float
    infinite: bool = False  # whether `inf` means something


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
        expected="from 0 to 65535",
        holds=lambda v: 0 <= v <= 65535,
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
    Key(
        "blobs.port",
        int,
        0,
        "Port at which devices get models above 16 MiB over HTTPS instead of MQTT; 0: none. Needs `security.folder`.",
        expected="from 0 to 65535",
        holds=lambda v: 0 <= v <= 65535,
    ),
    Key("round.quorum", int, None, "Updates that close a phase at once; without it: one of every device.", **_POSITIVE),
    Key("round.minimum", int, 1, "Fewer updates than this at the deadline are not merged.", **_POSITIVE),
    Key("round.deadline_seconds", float, 600.0, "The longest that a round may take.", **_POSITIVE),
    Key("round.devices_wait", int, 1, "Devices that must be online before a round opens.", **_POSITIVE),
    Key("round.evaluate_share", float, 0.3, "Last part of the round kept for the devices' evaluation.", **_SHARE),
    Key(
        "round.buffer",
        int,
        0,
        "Above 0: buffered rounds, merged after so many updates; slow devices go on training.",
        **_NOT_NEGATIVE,
    ),
    Key("round.max_staleness", int, 0, "Buffered rounds: how many rounds late an update may be.", **_NOT_NEGATIVE),
    Key("task.steps", int, 0, "Steps of one task; give this or `task.epochs`.", **_NOT_NEGATIVE),
    Key("task.epochs", int, 0, "Passes over a device's samples in one task.", **_NOT_NEGATIVE),
    Key("task.batch_size", int, 32, "Samples of one step.", **_POSITIVE),
    Key("task.learning_rate", float, None, "Learning rate of the first round.", **_POSITIVE, required=True),
    Key("task.schedule", str, "constant", "How it changes over the rounds.", **_one_of("constant", "linear")),
    Key("task.final_fraction", float, 0.1, "`linear`: what is left of it in the last round.", **_SHARE),
    Key("task.hyper", dict, {}, "Further hyper-parameters of the program, by name."),
    Key("task.encoding", str, "int8_row", "How updates travel.", **_one_of(*KINDS)),
    Key("assign.rule", str, "fixed", "Who picks the programs: an entry point of the group `edgewise.assigners`."),
    Key(
        "assign.programs", dict, {}, "Programs of devices that do not train `program`, by device: other ranks.", of=str
    ),
    Key("assign.cycle", list, [], "Programs that all devices train in turn, one a round: `alternate`.", of=str),
    Key(
        "assign.rank.profiles",
        dict,
        {},
        "`rank`: the profile of each device, a name or a file; others train `program`.",
        of=str,
    ),
    Key("assign.precision.programs", dict, {}, "`precision`: the programs `ptq` and `qat`.", of=str),
    Key(
        "assign.precision.time_factor",
        float,
        1.2,
        "How long a round may take, in rounds in which all devices do PTQ; `inf`: no limit.",
        expected="1 or more",
        holds=lambda v: v >= 1,
        infinite=True,
    ),
    Key("assign.precision.round_seconds", float, 0.0, "Instead: how long it may take in seconds.", **_NOT_NEGATIVE),
    Key("assign.precision.min_gain", float, 0.0, "Instead: the accuracy, 0 to 1, that QAT is to gain.", **_SHARE),
    Key("assign.precision.min_drop", float, 0.005, "A device that loses no more by PTQ stays with it.", **_SHARE),
    Key("assign.precision.drop", float, 0.0, "What PTQ costs, 0 to 1, where the bundle does not say it.", **_SHARE),
    Key("assign.precision.final_qat", float, 0.16, "Last part of the rounds in which all devices do QAT.", **_SHARE),
    Key(
        "assign.precision.fine.every",
        int,
        5,
        "Rounds between two looks at what QAT brought; 0: off.",
        expected="0, or 2 or more: one loss tells nothing",
        holds=lambda v: v == 0 or v >= 2,
    ),
    Key("assign.precision.fine.max_flips", float, 0.05, "The share of devices that change at a look.", **_SHARE),
    Key("assign.precision.fine.explore", float, 0.05, "How often one changes at random instead.", **_SHARE),
    Key("assign.precision.fine.time_price", float, 0.01, "Loss that a round twice as long is worth.", **_NOT_NEGATIVE),
    Key("assign.precision.fine.seed", int, 7, "Of the random changes.", **_NOT_NEGATIVE),
    Key("task.encodings_allowed", list, [], "Kinds that a device may take instead, by its own `encoding`.", of=str),
    Key(
        "task.density",
        float,
        0.1,
        "`top_k`: the share of numbers that travels.",
        expected="above 0 to 0.5",
        holds=lambda v: 0 < v <= DENSITY_LIMIT,
    ),
    Key("task.compression", str, "zlib", "What packs an update where it pays.", **_one_of(*COMPRESSIONS)),
    Key(
        "merge.rule",
        str,
        None,
        "Which rule merges: an entry point of the group `edgewise.mergers`; "
        "without it `product_svd` for LoRA programs, `mean` for others.",
    ),
    Key("merge.weights", str, "examples", "What an update counts.", **_one_of("examples", "uniform")),
    Key("merge.lora.rank", int, 0, "Directions that are kept; 0: the rank of the program.", **_NOT_NEGATIVE),
    Key("merge.lora.energy", float, 0.0, "Above 0: the smallest rank with this share of the squares.", **_SHARE),
    Key("merge.lora.balance", str, "even", "How factors share singular values.", **_one_of("even", "unit_a")),
    Key(
        "merge.lora.mode",
        str,
        "auto",
        "Whether products or their changes are averaged.",
        **_one_of("auto", "mean", "change"),
    ),
    Key("merge.lora.residual", str, "drop", "Where the tail of the cut goes.", **_one_of("drop", "base")),
    Key("merge.lora.fair_lambda", float, 0.01, "`fair`: the damping of its system.", **_POSITIVE),
    Key(
        "merge.robust.attackers",
        float,
        0.2,
        "Share of updates that may be hostile.",
        expected="from 0 to below 0.5",
        holds=lambda v: 0 <= v < 0.5,
    ),
    Key(
        "merge.robust.keep", int, 0, "`multi_krum`: updates that are averaged; 0: all but the hostile.", **_NOT_NEGATIVE
    ),
    Key("merge.robust.clip", float, 0.0, "`norm_clip`: the largest norm of a change; 0: the median.", **_NOT_NEGATIVE),
    Key("merge.server.optimizer", str, "none", "What takes the merged change for a gradient.", **_one_of(*OPTIMIZERS)),
    Key("merge.server.learning_rate", float, 1.0, "Its learning rate.", **_POSITIVE),
    Key("merge.server.beta1", float, 0.9, "Its momentum.", **_SHARE),
    Key("merge.server.beta2", float, 0.99, "`adam`, `yogi`: the decay of the second moment.", **_SHARE),
    Key("merge.server.tau", float, 1e-3, "`adam`, `yogi`: what keeps their steps small.", **_POSITIVE),
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
class BlobSettings:
    """`[blobs]`."""

    port: int = 0


@dataclass(frozen=True)
class RoundSettings:
    """`[round]`."""

    quorum: int | None
    minimum: int
    deadline_seconds: float
    devices_wait: int
    evaluate_share: float
    buffer: int = 0
    max_staleness: int = 0


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
    encodings_allowed: Sequence[str] = ()
    density: float = 0.1
    compression: str = "zlib"
    hyper: Mapping[str, float] = field(default_factory=dict)


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

    file: Path
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
    blobs: BlobSettings
    round: RoundSettings
    task: TaskSettings
    assign: AssignSettings
    merge: MergeSettings
    gate: GateSettings
    limits: LimitSettings
    journal: JournalSettings


_TABLES: Mapping[str, type[Any]] = {
    "keys": Keys,
    "devices": Devices,
    "broker": BrokerSettings,
    "security": SecuritySettings,
    "blobs": BlobSettings,
    "round": RoundSettings,
    "task": TaskSettings,
    "assign": AssignSettings,
    "assign.precision": PrecisionSettings,
    "assign.rank": RankSettings,
    "assign.precision.fine": FineSettings,
    "merge": MergeSettings,
    "merge.lora": LoraSettings,
    "merge.robust": RobustSettings,
    "merge.server": ServerSettings,
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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
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
    budgets = [f"assign.precision.{name}" for name in BUDGETS if f"assign.precision.{name}" in given]
    if len(budgets) > 1:
        raise JobError(f"{path}: {' and '.join(budgets)} exclude each other: give one of them")
    odd = [kind for kind in values["task.encodings_allowed"] if kind not in KINDS]
    if odd:
        raise JobError(f"{path}: task.encodings_allowed names {odd[0]!r}; there are {', '.join(KINDS)}")
    if values["task.compression"] == "zstd" and not compresses_with_zstd():
        raise JobError(f"{path}: task.compression = 'zstd' needs the package zstandard: pip install 'edgewise[zstd]'")
    if values["round.max_staleness"] and not values["round.buffer"]:
        raise JobError(f"{path}: round.max_staleness means something in buffered rounds only: give round.buffer too")
    if values["round.buffer"] and values["round.buffer"] < values["round.minimum"]:
        raise JobError(
            f"{path}: round.buffer = {values['round.buffer']} is below round.minimum = {values['round.minimum']}"
        )
    quorum = values["round.quorum"]
    if quorum is not None and quorum < values["round.minimum"]:
        raise JobError(f"{path}: round.quorum = {quorum} is below round.minimum = {values['round.minimum']}")
    secure, url = values["security.folder"] is not None, values["broker.url"]
    if not secure and not ipaddress.ip_address(values["broker.address"]).is_loopback:
        raise JobError(
            f"{path}: broker.address = {values['broker.address']!r} is beyond this machine: that needs security.folder"
        )
    if values["blobs.port"] and not secure:
        raise JobError(f"{path}: blobs.port: who asks is known by a certificate alone: that needs security.folder")
    if url is not None and url.startswith("mqtts://") is not secure:
        raise JobError(f"{path}: broker.url = {url!r}: mqtts:// and security.folder belong together")
    for name in sorted(
        _TABLES, key=lambda table: -table.count(".")
    ):  # inner tables first: they are values of the outer ones
        held = {p.removeprefix(f"{name}."): v for p, v in values.items() if p.startswith(f"{name}.")}
        values = {p: v for p, v in values.items() if not p.startswith(f"{name}.")}
        values[name] = _TABLES[name](**held)
    return Job(file=path, **values)


def check_against(job: Job, bundle: Bundle) -> None:
    """Check a job against its bundle. Raises `BundleError` for a program that it lacks, `JobError` for the rest."""
    try:
        _check_rules(job, bundle)
    except JobError as error:
        raise JobError(f"{job.file}: {error}") from error


def _check_rules(job: Job, bundle: Bundle) -> None:
    try:
        assigns = assigner_named(job.assign.rule)
        assigner = assigns.create(job, bundle)
    except AssignError as error:
        raise JobError(str(error)) from error
    for program_id in assigner.programs:
        _check_program(job, bundle.program(program_id))
    program = bundle.program(job.program)
    try:
        rule = rule_named(job.merge.rule, program, bundle.tensors)
        mergers = [rule.create(plan_of(job, bundle, assigner, number)) for number in range(1, 1 + assigner.period)]
    except MergeError as error:
        raise JobError(f"merge.rule: {error}") from error
    if job.round.max_staleness > rule.max_staleness:
        raise JobError(
            f"round.max_staleness = {job.round.max_staleness}: the rule of this job takes updates that are at most "
            f"{rule.max_staleness} rounds late"
        )
    if job.merge.server.optimizer != "none" and any(merger.refactorises for merger in mergers):
        raise JobError(
            f"merge.server.optimizer = {job.merge.server.optimizer!r}: this rule changes the basis of the tensors every "
            'round, so moments mean nothing: leave it "none"'
        )
    for key in KEYS:
        means_nothing = key.path.startswith("merge.") and key.path.removeprefix("merge.") not in rule.uses
        if means_nothing and not key.path.startswith(_FOR_ALL_RULES) and _value_at(job, key.path) != key.default:
            raise JobError(f"{key.path}: the rule of this job does not use it: leave it out")
        means_nothing = key.path.startswith("assign.") and not key.path.removeprefix("assign.").startswith(assigns.uses)
        if means_nothing and key.path != "assign.rule" and _value_at(job, key.path) != key.default:
            raise JobError(f"{key.path}: assign.rule = {job.assign.rule!r} does not use it: leave it out")


_FOR_ALL_RULES = ("merge.rule", "merge.server.")


def plan_of(job: Job, bundle: Bundle, assigner: Assigner, number: int) -> Plan:
    """What the merge rule of a round is made for. Raises `BundleError` for a program that the bundle lacks."""
    trained = {program_id: bundle.program(program_id) for program_id in assigner.trained_in(number)}
    return Plan(bundle.program(job.program), trained, bundle.tensors, job.merge, job.seed, number)


def _value_at(job: Job, path: str) -> Any:
    value: Any = job
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _check_program(job: Job, program: Program) -> None:
    if program.accumulates:
        raise JobError(f"program {program.id!r} only accumulates; a job trains one of the others")
    for name, value in {"lr": job.task.learning_rate, **job.task.hyper}.items():
        limits = program.hyper.get(name)
        where = "task.learning_rate" if name == "lr" else f"task.hyper.{name}"
        if limits is None:
            raise JobError(f"{where}: program {program.id!r} has only {', '.join(program.hyper) or 'none'}")
        if not limits.minimum <= value <= limits.maximum:
            raise JobError(f"{where} = {value:g} is outside {limits.minimum:g} to {limits.maximum:g} of {program.id!r}")


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
    waiting = dict(content)
    while waiting:
        name, value = waiting.popitem()
        if name in _TABLES and isinstance(value, dict):
            waiting.update({f"{name}.{inner}": entry for inner, entry in value.items()})
        else:
            given[name] = value
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "docs/job-file.md lists the keys"
            raise JobError(f"{path}: unknown key {name!r}; {hint}")
    return given


_KINDS: Mapping[type[Any], str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
    list: "a list",
}


def _checked(key: Key, value: Any, path: Path) -> Any:
    def wrong(expected: str) -> JobError:
        return JobError(f"{path}: {key.path} = {value!r} must be {expected}")

    if key.kind is Path:
        if not isinstance(value, str):
            raise wrong("a path as text")
        return path.parent / value
    if key.kind is float and type(value) is int:
        value = float(value)
    if type(value) is not key.kind or (
        key.kind is float and not math.isfinite(value) and not (key.infinite and math.isinf(value))
    ):
        raise wrong(_KINDS.get(key.kind, "a table"))
    if key.kind in (dict, list):
        items, accepted = (
            (value.values() if key.kind is dict else value),
            (int, float) if key.of is float else (key.of,),
        )
        if any(type(item) not in accepted for item in items):
            raise wrong(f"{_KINDS[key.kind]} of {'numbers' if key.of is float else 'texts'}")
    if not key.holds(value):
        raise wrong(key.expected)
    return value
