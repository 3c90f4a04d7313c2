"""all-MiniLM-L6-v2 as a module of our own: six transformer layers (Wang et al., arXiv 2002.10957) under a linear classifier.

It reads tokens int64 `[n, 32]`, 0 where a text has ended, and takes the mean over the others.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from examples.datasets import minilm_files

TOKENS: Final = 32
LAYERS, SIZE, HEADS = 6, 384, 12
WORDS: Final = 30522


class Layer(nn.Module):
    """Attention and two linear layers, each with a residual and a norm behind it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(size, size) for _ in range(4))
        self.up, self.down = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size, 1e-12), nn.LayerNorm(size, 1e-12)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        batch, _, size = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.reshape(batch, TOKENS, HEADS, size // HEADS).transpose(1, 2)

        scores = split(self.q(x)) @ split(self.k(x)).transpose(2, 3) / (size // HEADS) ** 0.5 + hidden
        mixed = (scores.softmax(-1) @ split(self.v(x))).transpose(1, 2).reshape(batch, TOKENS, size)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class MiniLm(nn.Module):
    """The encoder and a classifier; `size` is that of a token's embedding, a multiple of 12."""

    def __init__(self, classes: int, size: int = SIZE) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, size), nn.Parameter(torch.zeros(TOKENS, size))
        self.norm = nn.LayerNorm(size, 1e-12)
        self.layers = nn.ModuleList(Layer(size) for _ in range(LAYERS))
        self.head = nn.Linear(size, classes)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings of texts, float32 `[n, 384]`."""
        there = (tokens != 0).to(self.places.dtype)
        hidden = (1.0 - there)[:, None, None, :] * -1e4
        x = self.norm(self.words(tokens) + self.places)
        for layer in self.layers:
            x = layer(x, hidden)
        return (x * there[:, :, None]).sum(1) / there.sum(1)[:, None]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def minilm(classes: int, seed: int = 0) -> MiniLm:
    """The published weights under a fresh classifier. Raises as `examples.datasets.minilm_files`."""
    torch.manual_seed(seed)
    model = MiniLm(classes)
    held = load_file(minilm_files()[0])
    # Each text is one segment: the embedding of segment 0 is added to every place.
    places = held["embeddings.position_embeddings.weight"][:TOKENS] + held["embeddings.token_type_embeddings.weight"][0]
    state = {
        "words.weight": held["embeddings.word_embeddings.weight"],
        "places": places,
        "norm.weight": held["embeddings.LayerNorm.weight"],
        "norm.bias": held["embeddings.LayerNorm.bias"],
        "head.weight": model.head.weight.detach(),
        "head.bias": model.head.bias.detach(),
    }
    for number in range(LAYERS):
        for ours, theirs in _PARTS.items():
            for kind in ("weight", "bias"):
                state[f"layers.{number}.{ours}.{kind}"] = held[f"encoder.layer.{number}.{theirs}.{kind}"]
    model.load_state_dict(state)
    return model.eval()


_PARTS: Final = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm2": "output.LayerNorm",
}


def tokens_of(texts: list[str]) -> np.ndarray:
    """int64 `[n, 32]`: cut after 32 tokens, filled with 0."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_files()[1]))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=0)
    return np.array([found.ids for found in tokenizer.encode_batch(texts)], np.int64)
