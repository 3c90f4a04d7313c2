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
    name, path = sys.argv[1], Path(sys.argv[2])
    model = STEP_MODELS[name]
    programs = [ProgramSpec("full", precision="float", optimizer="sgd"), ProgramSpec("lora", {"rank": 2})]
    build_bundle(model.make(0.125), model.example(6), path, name="net", loss=model.loss, programs=programs)
""")


@pytest.mark.parametrize("name", ["cnn_all", "gru", "encoder", "autoencoder"])
def test_two_processes_write_the_same_bytes(tmp_path: Path, name: str) -> None:
    paths = [tmp_path / f"{seed}.bundle" for seed in (1, 2)]
    for seed, path in zip((1, 2), paths, strict=True):
        subprocess.run(
            [sys.executable, "-c", BUILD, name, str(path)], check=True, env={"PYTHONHASHSEED": str(seed), "PATH": ""}
        )
    assert paths[0].read_bytes() == paths[1].read_bytes()
