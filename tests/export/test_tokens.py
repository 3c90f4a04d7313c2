"""Text: samples of int64 tokens, an embedding in the frozen part, adapters behind it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.bundle import Bundle
from edge_sdk.errors import SampleError
from edge_sdk.runtime import Predictor, Stepper
from export import ProgramSpec, build_bundle

TOKENS, WORDS = 6, 50


class Bag(nn.Module):
    """The mean over the embeddings of the tokens that are not 0, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(WORDS, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        there = (tokens != 0).to(torch.float32)
        x = (self.words(tokens) * there[:, :, None]).sum(1) / there.sum(1)[:, None]
        return self.head(torch.tanh(self.hidden(x)))


def texts(count: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, count)
    x = 1 + (y[:, None] * 16 + draw.integers(0, 16, (count, TOKENS)))
    x[:, TOKENS - 2 :] *= draw.integers(0, 2, (count, 2))
    return x.astype(np.int64), y.astype(np.int64)


@pytest.mark.parametrize("precision", ["float", "int8"])
def test_adapters_behind_an_embedding_learn(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    spec = ProgramSpec("lora", {"rank": 2, "targets": ["hidden", "head"]}, precision, "adamw")
    path = tmp_path / "text.bundle"
    build_bundle(Bag(), texts(32), path, name="text", loss="cross_entropy", programs=[spec])
    x, y = texts(60)
    with Bundle.open(path) as bundle:
        program = next(program for program in bundle.programs.values() if not program.accumulates)
        stepper = Stepper(bundle, program, bundle.initial(program))
        losses = [stepper.step({"d.x": x, "d.y": y}, {"lr": 0.05}).loss for _ in range(60)]
        predictor = Predictor(bundle, program, {**bundle.initial(program), **stepper.tensors()})
        assert losses[-1] < 0.3 * losses[0]
        assert (np.asarray(predictor.predict(x)).argmax(1) == y).mean() > 0.9
        with pytest.raises(SampleError, match="dtype float32, expected int64"):
            predictor.predict(x.astype(np.float32))
        stepper.close()
