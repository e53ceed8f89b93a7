"""PyramidDrop (arXiv 2410.17247): fewer and fewer visual tokens as the language model gets deeper."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gridprune_cli.pruning.methods.base import InnerMethod, geometric_counts, layers_at
from gridprune_cli.pruning.schedule import Rule, Stage, StageAttention

DEPTHS = (0.25, 0.5, 0.75)  # of the layers, where a stage stands: the published layers 8, 16 and 24 of 32


@dataclass(frozen=True)
class PyramidDrop(InnerMethod):
    """Three stages, at a quarter, half and three quarters of the layers; K tokens are left after the last.

    The same share stays at each of them, `(K/N)^(1/3)`: K = N/8 is the published 1/2, 1/4, 1/8. Those tokens stay
    that the prompt's last token attends to most in the layer behind the stage, mean over heads; they are numbered
    on from 0. Both are as in the published code. Layers are rounded to the nearest at which tokens can leave.
    """

    name: ClassVar[str] = "pyramiddrop"
    rules: ClassVar[tuple[type[Rule], ...]] = (StageAttention,)

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        counts_after = [geometric_counts(n, k, len(DEPTHS)) for n, k in zip(counts, budgets, strict=True)]
        stage_budgets = zip(*counts_after, strict=True)  # of all images, per stage
        return tuple(
            Stage(layer, StageAttention(), stage, "compact")
            for layer, stage in zip(layers_at(DEPTHS, layers), stage_budgets, strict=True)
        )
