"""A device dies at each point of the crash table (transport.md, 6.3), and what it made is counted once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults.audit import audit
from tests.faults.plant import GATEWAY, Plant, chunked_site

# The second passing of each point belongs to the training of round 1, whose update has three chunks. The first belongs to
# the evaluation of round 0.
POINTS = {
    "d1": "D1:2",
    "d2": "D2:2",
    "d3": "D3:2",
    "d4": "D4:3",  # after two of three chunks
    "d5": "D5:2",
    "d6": "D6:2",
    "d7": "D7:2",
    "d8": "D8",
    "d9": "D9",
    "d10": "D10",
}


@pytest.mark.faults
def test_each_point_of_the_table(tmp_path: Path) -> None:
    """Ten devices in one federation, each with a point of its own; all of them die and come back."""
    site = chunked_site(tmp_path, list(POINTS), chunks=3, rounds=2)
    with Plant(site) as plant:
        plant.start(GATEWAY)
        for name, point in POINTS.items():
            plant.start(name, faults=point)
        alive = dict(POINTS)
        until = time.monotonic() + 60
        while alive and time.monotonic() < until:
            for name in list(alive):
                if plant.processes[name].poll() is not None:
                    assert plant.died(name) == -9, plant.log(name)
                    del alive[name]
                    plant.start(name)
            time.sleep(0.02)
        assert not alive, f"these points were not reached: {alive}"
        plant.finish()
    books = audit(site, allowed=frozenset())
    assert books.made == books.merged == len(POINTS) * 5  # three evaluations and two updates each
    assert books.models == 2
