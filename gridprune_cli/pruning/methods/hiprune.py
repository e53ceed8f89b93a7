"""HiPrune (arXiv 2508.00553): tokens by what the tower attends to in a middle layer, and in its last."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals, View


@dataclass(frozen=True)
class HiPrune(Method):
    """Anchors by the middle layer, the tokens beside them, and registers by the layer of the vision features.

    Anchors are the floor(alpha * K / 5 + 1/2) tokens that a middle layer of the tower attends to most, mean over all of
    its tokens. Their neighbours above, below, left and right in the same view stay with them. Registers fill up to K:
    the tokens, of those left, that the layer of the vision features attends to most, in the same mean.

    alpha  0 to 1, about the share of K that anchors and their neighbours get; published 0.1

    Departures: the published code finds neighbours in the flat sequence, so that the left one of a row's first token is
    the last of the row above. Where anchors and neighbours are more than K, those neighbours stay that the middle layer
    attends to most. The tokens of all views compete for one K; the published code gives each tile the same.
    """

    name: ClassVar[str] = "hiprune"
    requires: ClassVar[frozenset[str]] = frozenset({"middle_attention", "received_attention"})
    alpha: float = 0.1

    def __post_init__(self) -> None:
        """Raises ValueError where alpha is out of its range."""
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be from 0 to 1, not {self.alpha}")

    def select(self, signals: Signals, k: int) -> Tensor:
        middle, received = values(signals, "middle_attention"), values(signals, "received_attention")
        anchors = top(middle, min(k, floor(self.alpha * k / 5 + 0.5)))
        stays = torch.zeros(signals.count, dtype=torch.bool)
        stays[anchors] = True
        buffers = _neighbours(signals.views, stays) & ~stays
        best = top(middle.masked_fill(~buffers, -1.0), min(k - len(anchors), int(buffers.sum())))
        stays[best] = True
        registers = top(received.masked_fill(stays, -1.0), k - int(stays.sum()))
        stays[registers] = True
        return stays.nonzero()[:, 0]


def _neighbours(views: Sequence[View], chosen: Tensor) -> Tensor:
    """(N,) bool: the tokens above, below, left and right of the chosen ones (N,) in their view."""
    beside = []
    for grid, view in zip(chosen.split([view.count for view in views]), views, strict=True):
        field = torch.zeros(view.rows + 2, view.cols + 2, dtype=torch.bool)
        field[1:-1, 1:-1] = grid.view(view.rows, view.cols)
        beside.append((field[:-2, 1:-1] | field[2:, 1:-1] | field[1:-1, :-2] | field[1:-1, 2:]).flatten())
    return torch.cat(beside)
