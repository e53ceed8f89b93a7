"""Evenly spaced tokens, whatever the picture and the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate
from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class Uniform(Method):
    """K tokens split over the views by their size, and within a view laid out in rows about as far apart as columns."""

    name: ClassVar[str] = "uniform"

    def select(self, signals: Signals, k: int) -> Tensor:
        counts = torch.tensor([view.count for view in signals.views])
        kept, first = [], 0
        for view, budget in zip(signals.views, allocate(counts, counts, k).tolist(), strict=True):
            kept.append(first + lattice(view.rows, view.cols, budget))
            first += view.count
        return torch.cat(kept)


def lattice(height: int, width: int, k: int) -> Tensor:
    """Sorted indices, (k,) int64, of k evenly spaced tokens of a height x width grid. 0 <= k <= height * width."""
    if k == 0:
        return torch.arange(0)
    lines = min(range(-(-k // width), min(height, k) + 1), key=lambda m: (height / m) ** 2 + (width / (k // m)) ** 2)
    t = torch.arange(k)
    line = ((t + 1) * lines - 1) // k  # lines hold k // lines tokens or one more, the longer ones evenly among them
    start, end = line * k // lines, (line + 1) * k // lines
    row = (2 * line + 1) * height // (2 * lines)
    col = (2 * (t - start) + 1) * width // (2 * (end - start))
    return row * width + col
