"""IVC-Prune (arXiv 2602.03060): implicit coordinates of the positions, and what the question's values are like."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.similarity import GRAIN, precise


@dataclass(frozen=True)
class Coordinates(Rule):
    """Tokens at positions that serve as coordinates, and the foreground.

    C = floor(coordinate_share * k + 1/2) tokens are coordinates: ceil(C / 2) of the highest mean cosine of their
    position embeddings, where the rotation is nearest to none, then of those left the highest mean sine, where it is
    nearest to a right angle. The foreground are k - C others. Its seeds are floor(seed_share * n + 1/2) of them, at
    least 1, of the highest mean over the text t behind the last image of

        softmax_i( v_t . v_i / sqrt(C_v) )

    v being values, C_v their length; then come those of the highest mean of the same over the seeds in the place of t.
    Without text, all visual tokens are in its place.
    """

    name: ClassVar[str] = "coordinates"
    values: ClassVar[bool] = True
    rotary: ClassVar[bool] = True
    coordinate_share: float = 1 / 3
    seed_share: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        for option in ("coordinate_share", "seed_share"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be from 0 to 1, not {getattr(self, option)}")

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.rotary is not None and signals.values is not None and signals.text_values is not None
        # 1. coordinates
        coordinates = floor(self.coordinate_share * k + 0.5)
        stays = torch.zeros(len(signals.tokens), dtype=torch.bool)
        for column, count in enumerate((coordinates - coordinates // 2, coordinates // 2)):
            nearest = signals.rotary[:, column].cpu().double()
            stays[top(nearest.masked_fill(stays, -2.0), count)] = True
        # 2. seeds of the foreground, and what is like them
        foreground = k - coordinates
        if foreground:
            values, text = precise(signals.values).cpu(), precise(signals.text_values).cpu()
            seed_count = min(foreground, max(1, floor(self.seed_share * len(values) + 0.5)))
            of_text = _mean_attention(text if len(text) else values, values)
            seeds = top(of_text.masked_fill(stays, -1.0), seed_count)
            of_seeds = _mean_attention(values[seeds], values).masked_fill(stays, -1.0)
            of_seeds[seeds] = 2.0  # more than attention can be
            stays[top(of_seeds, foreground)] = True
        return stays.nonzero()[:, 0]


def _mean_attention(queries: Tensor, values: Tensor) -> Tensor:
    """(n,) the mean over queries (q, C) of softmax over the values (n, C); rounded, as `cosines` are."""
    attention = (queries @ values.T / values.shape[1] ** 0.5).softmax(1).mean(0)
    return (attention * GRAIN).round() / GRAIN


@dataclass(frozen=True)
class IVCPrune(InnerMethod):
    """From half of the layers on, the K tokens of `Coordinates`, with their positions.

    layer             that layer; 0 for half of them, as the published 16 of 32, or the nearest possible one
    coordinate_share  0 to 1, the share of K that are coordinates; 1/3 is the published 10 % of N beside a foreground of
                      20 %
    seed_share        0 to 1, how many of the tokens that are there are seeds; published 0.01

    Departures: layers before keep what they hold of the tokens that leave; the published code drops it from their
    cache, too. Where positions have three axes, the mean is over the numbers of all of them.
    """

    name: ClassVar[str] = "ivc-prune"
    rules: ClassVar[tuple[type[Rule], ...]] = (Coordinates,)
    layer: int = 0
    coordinate_share: float = 1 / 3
    seed_share: float = 0.01

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if self.layer < 0:
            raise ValueError(f"layer must be at least 0, not {self.layer}")
        self._rule()

    def _rule(self) -> Coordinates:
        return Coordinates(self.coordinate_share, self.seed_share)

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        half = min(max(layers.start, layers.stop // 2), layers.stop - 1)
        return (Stage(self.layer or half, self._rule(), tuple(budgets)),)
