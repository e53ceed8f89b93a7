"""HIVTP (arXiv 2509.23663): tokens of the middle layer's attention, globally per region, then locally per window."""

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate
from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top, top_by_zone
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.zones import zone_along, zone_index


@dataclass(frozen=True)
class HIVTP(Method):
    """Of each region the most important tokens, then of each small window the most important one that is left.

    Importance is the attention received in a middle layer of the tower. In the global stage floor(global_share * K)
    tokens, at least 1, are shared evenly by the regions, each of which keeps its most important ones. In the local
    stage each window gives its most important token that is not kept; where these are more than the rest of K, the most
    important ones stay, and where they are fewer, windows give their next.

    global_share  0 to 1, the share of K of the global stage
    regions       how many regions a view has along each side, or as many as there are tokens along it
    window        the side of a window, in tokens

    Guessed: all three, and what happens where windows and the rest of K do not fit each other. The layer is that of
    HiPrune. Regions and windows of all views compete alike.
    """

    name: ClassVar[str] = "hivtp"
    requires: ClassVar[frozenset[str]] = frozenset({"middle_attention"})
    global_share: float = 0.5
    regions: int = 2
    window: int = 2

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if not 0 <= self.global_share <= 1:
            raise ValueError(f"global_share must be from 0 to 1, not {self.global_share}")
        for option in ("regions", "window"):
            if getattr(self, option) < 1:
                raise ValueError(f"{option} must be at least 1, not {getattr(self, option)}")

    def select(self, signals: Signals, k: int) -> Tensor:
        importance = values(signals, "middle_attention")
        # 1. global: evenly over the regions
        regions: list[Tensor] = []
        for view in signals.views:
            down, across = min(self.regions, view.rows), min(self.regions, view.cols)
            index = zone_along(view.rows, down)[:, None] * across + zone_along(view.cols, across)
            regions.append(index.flatten() + (int(regions[-1].max()) + 1 if regions else 0))
        region = torch.cat(regions)  # (N,)
        caps = torch.bincount(region)
        kept = top_by_zone(
            importance, region, allocate(torch.ones(len(caps)), caps, max(1, floor(self.global_share * k)))
        )
        # 2. local: window by window, the best first
        window, _ = zone_index(signals.views, self.window)
        stays = torch.zeros(signals.count, dtype=torch.bool)
        stays[kept] = True
        while left := k - int(stays.sum()):
            free = (~stays).nonzero()[:, 0]
            best_first = free[importance[free].argsort(descending=True, stable=True)]
            by_window = best_first[window[best_first].argsort(stable=True)]
            first = torch.ones(len(by_window), dtype=torch.bool)
            first[1:] = window[by_window].diff() != 0
            best = by_window[first].sort().values  # of each window that has a token left, its best
            stays[best[top(importance[best], min(left, len(best)))]] = True
        return stays.nonzero()[:, 0]
