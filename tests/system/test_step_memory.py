"""Prefix and step share their memory, which does not grow with the frozen part, with time, or stay when a task is over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export import ProgramSpec, build_bundle
from tests.environments import CHECKOUT
from tests.export.models import example, net

pytestmark = pytest.mark.slow
MEGABYTE = 1_000_000


class Deep(nn.Module):
    """`depth` frozen convolutions of equal size, then one that trains."""

    def __init__(self, depth: int, width: int = 32) -> None:
        super().__init__()
        self.frozen = nn.ModuleList([nn.Conv2d(width if i else 3, width, 3, padding=1) for i in range(depth)])
        self.conv, self.head = nn.Conv2d(width, 16, 3, padding=1), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.frozen:
            x = torch.relu(layer(x))
        return self.head(torch.relu(self.conv(torch.max_pool2d(x, 2))).mean((2, 3)))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("memory")
    x = np.random.default_rng(0).normal(size=(16, 3, 64, 64)).astype(np.float32)
    programs = [ProgramSpec("layer", {"modules": ["conv", "head"]}, "float", "sgd")]
    paths = {}
    for depth in (2, 6):
        torch.manual_seed(0)
        paths[depth] = folder / f"{depth}.bundle"
        build_bundle(
            Deep(depth).eval(),
            (x, np.arange(16) % 4),
            paths[depth],
            name="deep",
            loss="cross_entropy",
            programs=programs,
        )
    return paths


def measured(path: Path, mode: str, steps: int = 6) -> dict[str, int]:
    """In a process that has imported what a device imports."""
    command = [sys.executable, "-m", "tests.system.step_memory", str(path), mode, str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_prefix_and_step_take_no_more_than_the_larger_of_them(deep: dict[int, Path]) -> None:
    floor, prefix, step, both = (measured(deep[2], mode)["peak"] for mode in ("floor", "prefix", "step", "both"))
    assert min(prefix, step) > floor + 20 * MEGABYTE, "too small a network to tell anything"
    assert both - floor <= 1.1 * (max(prefix, step) - floor)


def test_memory_does_not_grow_with_the_depth_of_the_frozen_part(deep: dict[int, Path]) -> None:
    floor = measured(deep[2], "floor")["peak"]
    shallow, deeper = (measured(path, "both")["peak"] - floor - path.stat().st_size for path in (deep[2], deep[6]))
    assert deeper <= 1.1 * shallow


def test_what_a_task_took_goes_back_to_the_system_when_it_is_over(deep: dict[int, Path]) -> None:
    floor, found = measured(deep[2], "floor"), measured(deep[2], "both")
    assert found["anonymous"] > floor["anonymous"] + 20 * MEGABYTE
    assert found["after"] <= floor["anonymous"] + 3 * MEGABYTE


def test_two_thousand_steps_take_no_more_memory_than_two_hundred(tmp_path: Path) -> None:
    programs = [ProgramSpec("layer", {"modules": ["conv2", "head"]}, "float", "adamw")]
    build_bundle(
        net("conv1d"), example("conv1d"), tmp_path / "n.bundle", name="n", loss="cross_entropy", programs=programs
    )
    found = measured(tmp_path / "n.bundle", "both", 2000)
    assert found["anonymous"] - found["before"] <= MEGABYTE
