"""The tables of the two state machines, and the diagrams made from them, are what the code does."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from aggregator import intake
from edge_sdk import conversation as talk
from tests.environments import CHECKOUT
from tests.transport.test_conversation_properties import World, happen

SCRIPT = CHECKOUT / "scripts" / "state_machines.py"
MADE = runpy.run_path(str(SCRIPT))
# How the tables call an event, where they do not give its class.
WORDS = {
    "AckReceived": ("Ack",),
    "TimerFired": ("timer",),
    "CommandReceived": ("drop_task", "flush", "sync"),
    "TaskCleared": ("cleared",),
    "TaskOffered": ("newer task",),
    "BlobReady": ("last blob",),
}
Step = tuple[str, str, str]  # (before, class of the event, after)


def test_the_diagrams_are_up_to_date() -> None:
    done = subprocess.run([sys.executable, SCRIPT, "--check"], cwd=CHECKOUT)
    assert done.returncode == 0, "docs/state-machines.md is out of date: make docs"


@pytest.mark.parametrize("module", [talk, intake])
def test_every_event_of_an_upload_or_task_stands_in_the_table(module: Any) -> None:
    elsewhere = {  # of other matters: time, presence, what may be fetched
        *("RoundSeen", "BlobChunk", "BlobFailed", "HttpOffered"),
        *("Restarted", "FetchAsked", "StatusSeen", "PhaseOpened", "TasksIssued", "LinkRestored", "StorageChanged"),
    }
    told = " ".join(row.event for row in MADE["rows_of"](module.__doc__))
    for kind in module.HANDLERS:
        assert kind.__name__ in elsewhere or _names(told, kind.__name__), kind


@pytest.fixture(scope="module")
def walked() -> dict[str, set[Step]]:
    """What the machines did in some thousand steps of a disturbed network; by region."""
    seen: dict[str, set[Step]] = {region.title: set() for region in (*MADE["DEVICE"], *MADE["GATEWAY"])}
    patch = pytest.MonkeyPatch()
    device, gateway = talk.step, intake.step

    def device_step(state: talk.Conversation, event: talk.Event) -> Any:
        after, effects = device(state, event)
        for region, place in zip(MADE["DEVICE"], PLACES, strict=True):
            seen[region.title].add((place(state), type(event).__name__, place(after)))
        return after, effects

    def gateway_step(state: intake.Intake, event: intake.Event) -> Any:
        after, effects = gateway(state, event)
        for key in {*state.uploads, *after.uploads}:
            ends = (found.uploads[key].stage.name if key in found.uploads else "UNKNOWN" for found in (state, after))
            before, later = ends
            seen[MADE["GATEWAY"][0].title].add((before, type(event).__name__, later))
        return after, effects

    patch.setattr(talk, "step", device_step)
    patch.setattr(intake, "step", gateway_step)
    for seed in range(20):
        world, draw = World(2), random.Random(seed)
        for _ in range(250):
            happen(world, draw)
        world.settle()
    patch.undo()
    return seen


PLACES: tuple[Callable[[talk.Conversation], str], ...] = (
    lambda state: state.link.name,
    lambda state: "IDLE" if state.upload is None else state.upload.stage.name,
    lambda state: state.work.name,
)


@pytest.mark.parametrize("title", [region.title for region in (*MADE["DEVICE"], *MADE["GATEWAY"])])
def test_the_machines_do_nothing_that_is_not_in_the_tables(walked: dict[str, set[Step]], title: str) -> None:
    module, regions = (intake, MADE["GATEWAY"]) if title == MADE["GATEWAY"][0].title else (talk, MADE["DEVICE"])
    region = next(region for region in regions if region.title == title)
    edges = MADE["edges_of"](MADE["rows_of"](module.__doc__), region)
    moves = {step for step in walked[title] if step[0] != step[2]}
    assert len(moves) >= 3
    for before, event, after in sorted(moves):
        first = {_state(edge.after) for edge in edges if _state(edge.before) == before and _names(edge.event, event)}
        # One event may lead through a state to the next: a good task to READY, and on to TRAINING.
        beyond = {_state(edge.after) for edge in edges if edge.before in first}
        assert after in first | beyond, f"{before} --{event}--> {after} is not in the table"


def _names(text: str, event: str) -> bool:
    return any(word in text for word in (event, *WORDS.get(event, ())))


def _state(name: str) -> str:
    """An upload that has ended is in memory no longer."""
    return "UNKNOWN" if name in ("ACCEPTED", "REJECTED") else name
