"""PTP, Pyramid Token Pruning (arXiv 2509.15704): saliency of views and tokens, and the attention of the instruction."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate
from gridprune_cli.pruning.methods.base import InnerMethod, min_max
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.pruning.select import top_by_zone


@dataclass(frozen=True)
class Pyramid(Rule):
    """A budget per view by its mean saliency; in a view the tokens of the highest

        (1 - alpha) * a_i + alpha * c_i

    a is saliency, c the largest attention of a text token behind the last image, mean over heads, in the stage's own
    layer; both are scaled to 0..1 over what is there.

    alpha  0 to 1, how much the instruction counts
    """

    name: ClassVar[str] = "pyramid"
    attention: ClassVar[int | None] = 0
    rated: ClassVar[bool] = True
    queries: ClassVar = "max"
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError where alpha is out of its range."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha}")

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        """All of the text."""
        return torch.ones(len(text), dtype=torch.bool)

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.attention is not None and signals.saliency is not None
        if not len(signals.tokens):
            return torch.arange(0)
        saliency = signals.saliency.cpu().double()
        score = (1 - self.alpha) * min_max(saliency) + self.alpha * min_max(signals.attention)
        view_of = torch.repeat_interleave(
            torch.arange(len(signals.views)), torch.tensor([view.count for view in signals.views])
        )  # (N,)
        _, view = view_of[signals.tokens].unique(return_inverse=True)  # (n,) counted among the views that are there
        caps = torch.bincount(view)
        means = torch.stack([saliency[view == number].mean() for number in range(len(caps))])
        return top_by_zone(score, view, allocate(means, caps, k))


@dataclass(frozen=True)
class PTP(InnerMethod):
    """From layer `layer` on, K tokens by `Pyramid`: more in salient views, and of these what the question attends to.

    alpha  0 to 1, how much the instruction counts beside saliency; published 0.5

    Departures and guesses: regions are the views, so that with one view there is no budget to split; the share of a
    view is that of its mean saliency. All is done in one step inside the language model, at layer 2, where attention
    is measured; what stays keeps its positions.
    """

    name: ClassVar[str] = "ptp"
    rules: ClassVar[tuple[type[Rule], ...]] = (Pyramid,)
    layer: int = 2
    alpha: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}")
        Pyramid(self.alpha)

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        return (Stage(self.layer, Pyramid(self.alpha), tuple(budgets)),)
