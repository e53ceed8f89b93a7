"""Random tokens: what any method should beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, check_seed
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class Random(Method):
    """K tokens drawn without replacement; the same ones for the same seed, N and K."""

    name: ClassVar[str] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where the seed is none that torch takes."""
        check_seed(self.seed)

    def select(self, signals: Signals, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randperm(signals.count, generator=generator)[:k].sort().values
