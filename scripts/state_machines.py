"""Writes docs/state-machines.md: the diagrams of the two sides of an upload, from the transition tables of the code.

    python scripts/state_machines.py            write the file
    python scripts/state_machines.py --check    end with 1 if it is not what would be written

The tables stand in the docstrings of `edge_sdk/conversation.py` and `aggregator/intake.py`. That the machines do nothing that
is not in them is tested (tests/transport/test_state_machines.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "state-machines.md"
sys.path.insert(0, str(ROOT))

from aggregator import intake  # noqa: E402 - the checkout's own
from edge_sdk import conversation  # noqa: E402


@dataclass(frozen=True)
class Row:
    """One row of a table: states before, what happens, what is done, states after (`same`: those before)."""

    before: str
    event: str
    effects: str
    after: str


@dataclass(frozen=True)
class Edge:
    """One arrow of a diagram."""

    before: str
    event: str
    after: str


@dataclass(frozen=True)
class Region:
    """States of which a machine is in one at a time."""

    title: str
    initial: str
    states: tuple[str, ...]
    ends: tuple[str, ...] = ()  # in which nothing happens any more: not meant by `any`


DEVICE = (
    Region("The device's link", "OFFLINE", tuple(state.name for state in conversation.LinkState), ("STOPPING",)),
    Region("The device's upload", "IDLE", tuple(state.name for state in conversation.Stage)),
    Region("The device's task", "NONE", tuple(state.name for state in conversation.Work)),
)
ENDED = ("ACCEPTED", "REJECTED")
GATEWAY = (
    Region("An upload at the gateway", "UNKNOWN", ("UNKNOWN", *(state.name for state in intake.Stage), *ENDED), ENDED),
)


def rows_of(docstring: str | None) -> list[Row]:
    """The rows of the table whose head begins with `state`."""
    lines = [line for line in (docstring or "").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [Row(*row) for row in cells if len(row) == 4 and row[0] != "state" and not set(row[0]) <= {"-"}]


def edges_of(rows: Sequence[Row], region: Region) -> list[Edge]:
    """The arrows of a region: rows that begin in it or in any state, and end in it."""
    found: dict[Edge, None] = {}
    for row in rows:
        after = [state for state in _names(row.after) if state in region.states]
        named = [state for state in _names(row.before) if state in region.states]
        living = [state for state in region.states if state not in region.ends]
        for before in named or (living if row.before.startswith("any") else ()):
            same = [before] if named and row.after == "same" else []
            for state in after or same:
                found[Edge(before, row.event, state)] = None
    return list(found)


def _names(text: str) -> list[str]:
    return re.findall(r"[A-Z]{2,}", text)


def diagram(rows: Sequence[Row], region: Region) -> Iterator[str]:
    """One Mermaid diagram; arrows between the same two states are one, with all their events."""
    yield "```mermaid"
    yield "stateDiagram-v2"
    yield f"    [*] --> {region.initial}"
    merged: dict[tuple[str, str], dict[str, None]] = {}
    for edge in edges_of(rows, region):
        merged.setdefault((edge.before, edge.after), {})[edge.event] = None
    for (before, after), events in merged.items():
        yield f"    {before} --> {after}: {' / '.join(event.replace(':', ',').replace('`', '') for event in events)}"
    yield "```"


def render() -> str:
    """The text of the file."""
    lines = [
        "# The two state machines of an upload",
        "",
        "Made from the tables in `edge_sdk/conversation.py` and `aggregator/intake.py` by `make docs`; the round's own machine is in",
        "`aggregator/rounds.py`. The tables also say what is done at each arrow.",
    ]
    for module, regions in ((conversation, DEVICE), (intake, GATEWAY)):
        rows = rows_of(module.__doc__)
        for region in regions:
            lines += ["", f"## {region.title}", "", *diagram(rows, region)]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write, or with `--check` compare."""
    text = render()
    if "--check" in sys.argv[1:]:
        return int(TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
