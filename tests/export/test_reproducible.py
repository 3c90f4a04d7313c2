"""Same model, same settings: the same bytes, in another process and under another hash seed (step-graphs.md, SG12)."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

BUILD = textwrap.dedent("""
    import sys
    from pathlib import Path
    from benchmarks.step_models import STEP_MODELS
    from export import ProgramSpec, build_bundle
    folder = Path(sys.argv[1])
    for name in sys.argv[2:]:
        model = STEP_MODELS[name]
        programs = [ProgramSpec("full", precision="float", optimizer="sgd"), ProgramSpec("lora", {"rank": 2})]
        path = folder / f"{name}.bundle"
        build_bundle(model.make(0.125), model.example(6), path, name="net", loss=model.loss, programs=programs)
""")


NETS = ("cnn_all", "gru", "encoder", "autoencoder")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What each of two processes wrote of every net."""
    made = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (1, 2)]
    for seed, folder in zip((1, 2), made, strict=True):
        environment = {"PYTHONHASHSEED": str(seed), "PATH": ""}
        subprocess.run([sys.executable, "-c", BUILD, str(folder), *NETS], check=True, env=environment)
    return made


@pytest.mark.parametrize("name", NETS)
def test_two_processes_write_the_same_bytes(folders: list[Path], name: str) -> None:
    first, second = ((folder / f"{name}.bundle").read_bytes() for folder in folders)
    assert first == second
