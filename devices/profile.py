"""Device profiles: what a kind of device is, from a TOML file, each number with where it comes from.

    name = "raspberry_pi_4"
    arch = "aarch64"
    isa = ["neon"]
    cores = { value = 4, from = "datasheet" }
    ram_mb = { value = 2048, from = "datasheet" }
    flash_kb = { value = 1000000, from = "assumed" }
    latency_ms = { value = 50, from = "assumed" }
    bits = [8]
    activation = "u8"
    [runtime]                                  settings of the runtime (edge_sdk/sessions.py)
    threads = 1
    [[program]]
    id = "press/full/qat8"
    step_ms = { value = 12.5, from = "measured" }
    measured_on = "board 3"
    date = "2026-11-25"

A number is `measured`, from a `datasheet`, or `assumed`; only measured ones steer a job without a warning. Unknown keys,
numbers without provenance, memory below what the runtime itself takes and an empty list of bits are refused.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from edge_sdk.errors import EdgewiseError
from edge_sdk.sessions import RuntimeProfile

PROVENANCES: Final = ("measured", "datasheet", "assumed")
FOLDER: Final = Path(__file__).parent / "profiles"
_NUMBERS: Final = (
    "cores", "ram_mb", "flash_kb", "runtime_overhead_mb", "latency_ms", "uplink_kbps", "downlink_kbps", "watts",
)  # fmt: skip
_REQUIRED: Final = ("name", "arch", "cores", "ram_mb", "flash_kb", "runtime_overhead_mb")
_TEXTS: Final = ("name", "arch", "activation", "onnxruntime")
_OTHERS: Final = ("isa", "bits", "reduce_range", "max_opset", "runtime", "program")
_PROGRAM: Final = ("id", "step_ms", "measured_on", "date")


class ProfileError(EdgewiseError):
    """A profile that cannot be used as it is: file, key, and what was expected."""


@dataclass(frozen=True)
class Number:
    """A figure and its provenance, one of `PROVENANCES`."""

    value: float
    provenance: str


@dataclass(frozen=True)
class StepTime:
    """The measured time of a program's step, where and when."""

    program: str
    step_ms: Number
    measured_on: str
    date: str


@dataclass(frozen=True)
class DeviceProfile:
    """One kind of device; `numbers` by key, with their provenance."""

    name: str
    arch: str
    numbers: Mapping[str, Number]
    isa: tuple[str, ...] = ()
    bits: tuple[int, ...] = (8,)
    activation: str = "u8"
    reduce_range: bool = False
    max_opset: int = 21
    onnxruntime: str = ">=1.23"
    runtime: RuntimeProfile = RuntimeProfile()
    programs: tuple[StepTime, ...] = ()

    @property
    def flash_kb(self) -> int:
        """What the flash holds."""
        return int(self.numbers["flash_kb"].value)

    def warnings(self) -> list[str]:
        """The keys that were not measured, in words."""
        found = [
            f"{key} is {n.provenance}, not measured" for key, n in self.numbers.items() if n.provenance != "measured"
        ]
        return found + [
            f"step_ms of {entry.program} is {entry.step_ms.provenance}, not measured"
            for entry in self.programs
            if entry.step_ms.provenance != "measured"
        ]


def profile_names() -> list[str]:
    """The profiles that come with Edgewise."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_profile(name: str | Path) -> DeviceProfile:
    """A profile by name, or from a file that ends in .toml. Raises `ProfileError`."""
    path = Path(name) if str(name).endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        content = tomllib.loads(path.read_text())
    except OSError as error:
        raise ProfileError(f"profile {str(name)!r}: there is none; known: {', '.join(profile_names())}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path}: not a TOML file: {error}") from error
    return _Checked(path, content).profile()


@dataclass(frozen=True)
class _Checked:
    path: Path
    content: Mapping[str, Any]

    def profile(self) -> DeviceProfile:
        held = self.content
        for key in held:
            if key not in (*_NUMBERS, *_TEXTS, *_OTHERS):
                raise self._error(key, held[key], f"one of {', '.join((*_TEXTS, *_NUMBERS, *_OTHERS))}")
        for key in _REQUIRED:
            if key not in held:
                raise self._error(key, "nothing", "a value")
        numbers = {key: self._number(key, held[key]) for key in _NUMBERS if key in held}
        if numbers["ram_mb"].value < numbers["runtime_overhead_mb"].value:
            raise self._error(
                "ram_mb",
                numbers["ram_mb"].value,
                f"at least runtime_overhead_mb = {numbers['runtime_overhead_mb'].value:g}",
            )
        bits = held.get("bits", [8])
        if not isinstance(bits, list) or not bits or not all(type(b) is int and 2 <= b <= 8 for b in bits):
            raise self._error("bits", bits, "a list of whole numbers from 2 to 8, not empty")
        if held.get("activation", "u8") not in ("u8", "s8"):
            raise self._error("activation", held["activation"], '"u8" or "s8"')
        return DeviceProfile(
            name=str(held["name"]),
            arch=str(held["arch"]),
            numbers=numbers,
            isa=tuple(str(part) for part in held.get("isa", ())),
            bits=tuple(bits),
            activation=held.get("activation", "u8"),
            reduce_range=bool(held.get("reduce_range", False)),
            max_opset=int(held.get("max_opset", 21)),
            onnxruntime=str(held.get("onnxruntime", ">=1.23")),
            runtime=self._runtime(held.get("runtime", {})),
            programs=tuple(self._program(row) for row in held.get("program", ())),
        )

    def _number(self, key: str, found: Any) -> Number:
        if not isinstance(found, dict) or set(found) != {"value", "from"}:
            raise self._error(key, found, "{ value = NUMBER, from = PROVENANCE }: a number says where it comes from")
        value, provenance = found["value"], found["from"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise self._error(key, value, "a number of 0 or more")
        if provenance not in PROVENANCES:
            raise self._error(f"{key}.from", provenance, f"one of {', '.join(PROVENANCES)}")
        return Number(float(value), provenance)

    def _runtime(self, found: Any) -> RuntimeProfile:
        known = {entry.name for entry in fields(RuntimeProfile)}
        for key in found:
            if key not in known:
                raise self._error(f"runtime.{key}", found[key], f"one of {', '.join(sorted(known))}")
        return RuntimeProfile(**found)

    def _program(self, row: Any) -> StepTime:
        if not isinstance(row, dict) or set(row) != set(_PROGRAM):
            raise self._error("program", row, f"the keys {', '.join(_PROGRAM)}")
        step = self._number("program.step_ms", row["step_ms"])
        return StepTime(str(row["id"]), step, str(row["measured_on"]), str(row["date"]))

    def _error(self, key: str, found: object, expected: str) -> ProfileError:
        return ProfileError(f"{self.path}: {key} is {str(found)[:80]!r}, expected {expected}")
