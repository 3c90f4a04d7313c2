"""What a job file says about merging: `[merge]`, `[merge.lora]`, `[merge.robust]`, `[merge.server]` (aggregator/job.py)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraSettings:
    """`[merge.lora]` (methods/lora.md, section 3).

    `rank`: directions kept, 0 for the rank of the merged program; `energy`: above 0, the smallest rank that keeps this
    share of the squared singular values, at most `rank`.
    """

    rank: int = 0
    energy: float = 0.0
    balance: str = "even"
    mode: str = "auto"
    residual: str = "drop"
    fair_lambda: float = 0.01


@dataclass(frozen=True)
class RobustSettings:
    """`[merge.robust]`. `attackers`: the share of updates that may be hostile; 0 in `keep` and `clip`: chosen by the rule."""

    attackers: float = 0.2
    keep: int = 0
    clip: float = 0.0


@dataclass(frozen=True)
class ServerSettings:
    """`[merge.server]`: the optimizer that takes the merged change for a gradient (Reddi et al., arXiv 2003.00295)."""

    optimizer: str = "none"
    learning_rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3


@dataclass(frozen=True)
class MergeSettings:
    """`[merge]`. `rule` None: `product_svd` where the program has LoRA pairs, else `mean`."""

    rule: str | None = None
    weights: str = "examples"
    lora: LoraSettings = field(default_factory=LoraSettings)
    robust: RobustSettings = field(default_factory=RobustSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
