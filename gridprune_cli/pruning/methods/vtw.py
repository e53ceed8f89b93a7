"""VTW (arXiv 2405.05803): visual tokens withdraw from the deep layers of the language model, all of them at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage


@dataclass(frozen=True)
class Withdrawal(Rule):
    """Nothing stays. k must be 0."""

    name: ClassVar[str] = "withdrawal"

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        return torch.arange(0)


@dataclass(frozen=True)
class VTW(InnerMethod):
    """From one layer on, no visual token is left; what stays of the prompt keeps its positions.

    layer  that layer, as the published 15 of 32; K has no say then. 0: the layer that K asks for, by its mean

    With `layer` 0, K is how many visual tokens a layer has in the mean: they leave at layer L * K / N of L, rounded, or
    the nearest at which tokens can leave; images with budgets of their own leave together. Where K is N, none leaves.

    Departure: the published code looks for the earliest layer that hardly changes what the model says about some sample
    prompts; this one looks at no samples.
    """

    name: ClassVar[str] = "vtw"
    rules: ClassVar[tuple[type[Rule], ...]] = (Withdrawal,)
    layer: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where layer is negative."""
        if self.layer < 0:
            raise ValueError(f"layer must be at least 0, not {self.layer}")

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        if not self.layer and sum(budgets) == sum(counts):
            return ()
        nearest = floor(layers.stop * sum(budgets) / sum(counts) + 0.5)
        layer = self.layer or min(max(nearest, layers.start), layers.stop - 1)
        return (Stage(layer, Withdrawal(), (0,) * len(counts)),)
