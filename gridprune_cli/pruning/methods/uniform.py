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

    def _pick(self, signals: Signals, k: int) -> Tensor:
        counts = torch.tensor([view.count for view in signals.views])
        parts, first = [], 0
        for view, budget in zip(signals.views, allocate(counts, counts, k).tolist(), strict=True):
            parts.append(first + lattice(view.rows, view.cols, budget))
            first += view.count
        return torch.cat(parts)


def lattice(rows: int, cols: int, k: int) -> Tensor:
    """Sorted indices, (k,) int64, of k tokens spread over a rows x cols grid. 0 <= k <= rows * cols."""
    if k == 0:
        return torch.arange(0)
    lines = min(range(-(-k // cols), min(rows, k) + 1), key=lambda m: (rows / m) ** 2 + (cols / (k // m)) ** 2)
    t = torch.arange(k)
    line = ((t + 1) * lines - 1) // k  # lines hold k // lines tokens or one more, the longer ones evenly among them
    start, end = line * k // lines, (line + 1) * k // lines
    row = (2 * line + 1) * rows // (2 * lines)
    col = (2 * (t - start) + 1) * cols // (2 * (end - start))
    return row * cols + col
