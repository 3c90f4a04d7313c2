"""The shell around the conversation: what its threads tell each other."""

from __future__ import annotations

from pathlib import Path

from edge_sdk import EdgeDevice
from edge_sdk import conversation as talk
from tests.system.site import Site


def test_an_update_that_ends_while_the_next_one_is_reported_is_not_offered_for_ever(tmp_path: Path) -> None:
    site = Site(tmp_path, ["a"])
    with EdgeDevice.open(site.config("a")) as device:
        entries = [
            device._outbox.commit(task=task, number=1, program="p", body=b"x", feedback={}, sign=lambda draft: b"offer")
            for task in ("aa", "bb")
        ]
        device._report(talk.TaskDone(0.0, "bb"))  # from the thread that trains
        device._outbox.delete(entries[0].upload, "accepted")  # meanwhile, on the thread of the conversation
        while not device._events.empty():
            device._handle(device._events.get())
        assert [head.upload for head in device._state.queue] == [entries[1].upload]
