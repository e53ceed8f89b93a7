"""FastV (arXiv 2403.06764): the language model's own attention, in an early layer of it, says what is needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import Attention, Rule, Stage


@dataclass(frozen=True)
class FastV(InnerMethod):
    """From layer `layer` on, the K tokens that the prompt's last token attends to most in the layer before.

    The attention is averaged over the heads; what stays keeps its positions (section 4.1 of the paper, its K being the
    layer and its R the share that leaves).
    """

    name: ClassVar[str] = "fastv"
    rules: ClassVar[tuple[type[Rule], ...]] = (Attention,)
    layer: int = 2

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}")

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        return (Stage(self.layer, Attention(), tuple(budgets)),)
