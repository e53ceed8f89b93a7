"""Random tokens: what any method should beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class Random(Method):
    """K tokens drawn without replacement; the same ones for the same seed, N and K."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where the seed is none that torch takes."""
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be from -2^63 to 2^63 - 1, not {self.seed}")

    def select(self, signals: Signals, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(signals.count, generator=generator)[:k].sort().values
