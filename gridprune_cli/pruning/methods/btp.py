"""BTP, Balanced Token Pruning (arXiv 2505.22038): first tokens far apart, then, deeper, what is attended to."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod, geometric_counts, layers_at
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import View

STAGES = 3
_CANDIDATES = 2  # tokens that compete by attention, for each that is kept by it


@dataclass(frozen=True)
class Balanced(Rule):
    """A = floor(attention_share * k + 1/2) tokens by attention, and k - A that are far from these and from each other.

    By attention: of the 2 A tokens of the highest attention of the prompt's last token, in the layer before, those in
    the first half of what is there, then those behind; each half the highest first. Positions favour what comes late,
    which this balances. Far apart: again and again the token whose nearest token that stays is farthest, in rows plus
    columns of its view; of equal ones the one with more attention.
    """

    name: ClassVar[str] = "balanced"
    attention: ClassVar[int | None] = -1
    attention_share: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError where attention_share is out of its range."""
        if not 0 <= self.attention_share <= 1:
            raise ValueError(f"attention_share must be from 0 to 1, not {self.attention_share}")

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.attention is not None
        attention, count = signals.attention, len(signals.tokens)
        by_attention = floor(self.attention_share * k + 0.5)
        stays = torch.zeros(count, dtype=torch.bool)
        candidates = top(attention, min(count, _CANDIDATES * by_attention))
        balanced = attention[candidates] + 2.0 * (candidates < count // 2)  # attention is at most 1
        stays[candidates[top(balanced, by_attention)]] = True
        if by_attention < k:
            places = _places(signals.views)[signals.tokens]  # (n, 3)
            distance = torch.full((count,), torch.inf, dtype=torch.float64)
            for token in stays.nonzero()[:, 0].tolist():
                distance = torch.minimum(distance, _distance(places, token))
            for _ in range(k - by_attention):
                farthest = distance.masked_fill(stays, -1.0)
                ties = farthest == farthest.max()
                token = int(torch.where(ties, attention, -1.0).argmax())
                stays[token] = True
                distance = torch.minimum(distance, _distance(places, token))
        return stays.nonzero()[:, 0]


def _places(views: Sequence[View]) -> Tensor:
    """(N, 3) view, row and column of every token."""
    places = []
    for number, view in enumerate(views):
        index = torch.arange(view.count)
        places.append(torch.stack([torch.full_like(index, number), index // view.cols, index % view.cols], 1))
    return torch.cat(places)


def _distance(places: Tensor, token: int) -> Tensor:
    """(n,) rows plus columns from a token to each; infinite in other views."""
    steps = (places[:, 1:] - places[token, 1:]).abs().sum(1).double()
    return steps.masked_fill(places[:, 0] != places[token, 0], torch.inf)


@dataclass(frozen=True)
class BTP(InnerMethod):
    """Three stages by `Balanced`: the deeper, the more attention counts, a third, two thirds and all of it.

    The same share of tokens stays at each, K after the last, with their positions.

    layers  the stages' layers with commas between, as `gridprune calibrate --schedule btp` finds them on samples: those
            ahead of which the hidden states of image tokens change most. "": a quarter, half and three quarters of the
            layers, as PyramidDrop's

    Guessed: the shares of attention and of tokens, and how many candidates compete. The published code also looks at
    some hidden states for what is far apart, of which only its beginning, distances on the grid, is here.
    """

    name: ClassVar[str] = "btp"
    rules: ClassVar[tuple[type[Rule], ...]] = (Balanced,)
    layers: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError where layers are not whole numbers that ascend from 1 on."""
        self._stage_layers()

    def _stage_layers(self) -> list[int]:
        """The layers that the option names."""
        texts = self.layers.split(",") if self.layers else []
        if not all(text.strip().isascii() and text.strip().isdecimal() for text in texts):
            raise ValueError(f"layers must be whole numbers with commas between, not {self.layers!r}")
        stage_layers = [int(text) for text in texts]
        if any(a >= b for a, b in zip([0, *stage_layers], stage_layers, strict=False)):
            raise ValueError(f"layers must ascend from 1 on, not {self.layers!r}")
        return stage_layers

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        stage_layers = self._stage_layers()
        if not stage_layers:
            stage_layers = sorted(set(layers_at([stage / (STAGES + 1) for stage in range(1, STAGES + 1)], layers)))
        number = len(stage_layers)
        counts_after = [geometric_counts(n, k, number) for n, k in zip(counts, budgets, strict=True)]
        return tuple(
            Stage(layer, Balanced((stage + 1) / number), tuple(of_images))
            for stage, (layer, of_images) in enumerate(zip(stage_layers, zip(*counts_after, strict=True), strict=True))
        )
