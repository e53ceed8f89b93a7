"""VFlowOpt (arXiv 2508.05211): tokens by attention and entropy; the others are recycled, cell by cell."""

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate
from gridprune_cli.pruning.methods.base import Method, merge_matrix, min_max, values
from gridprune_cli.pruning.select import top, top_by_zone
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.zones import zone_index


@dataclass(frozen=True)
class VFlowOpt(Method):
    """K - R tokens by importance, and R recycled ones: means of the others, cell by cell of the grid.

        I_i = (1 - beta) * a_i + beta * e_i

    a is the attention that a token receives in the layer of the vision features, e the entropy of the picture's grey
    levels in its rectangle, each brought to 0..1 over the image. R = floor(recycled_share * K + 1/2). The grid is cut
    into cells, which share R in proportion to the tokens that they have left, give their most important ones, and merge
    the rest of these tokens into them in turn, as means weighted by importance.

    beta            0 to 1, how much entropy counts
    recycled_share  0 to 1, the share of K that is recycled
    cell            the side of a cell, in tokens

    Guessed: the two weights, the cells, and how they share R. Left out: pruning in three stages, of which this is the
    one before the language model, and the search of all options by Bayesian optimisation. Written from the abstract's
    formula: the published code is for non-commercial use, and was not read.
    """

    name: ClassVar[str] = "vflowopt"
    requires: ClassVar[frozenset[str]] = frozenset({"received_attention", "entropy"})
    beta: float = 0.5
    recycled_share: float = 0.1
    cell: int = 4

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        for option in ("beta", "recycled_share"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be from 0 to 1, not {getattr(self, option)}")
        if self.cell < 1:
            raise ValueError(f"cell must be at least 1, not {self.cell}")

    def importance(self, signals: Signals) -> Tensor:
        """(N,) float64, in 0..1."""
        attention, entropy = (min_max(values(signals, name)) for name in ("received_attention", "entropy"))
        return (1 - self.beta) * attention + self.beta * entropy

    def _split(self, signals: Signals, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Importance (N,), each token's cell (N,), and the indices of the important tokens and of the recycled ones."""
        importance = self.importance(signals)
        important = top(importance, k - floor(self.recycled_share * k + 0.5))
        cell, _ = zone_index(signals.views, self.cell)
        free = torch.ones(signals.count, dtype=torch.bool)
        free[important] = False
        others = free.nonzero()[:, 0]
        left = torch.bincount(cell[others], minlength=int(cell.max()) + 1)
        quotas = allocate(left, left, k - len(important))
        return importance, cell, important, others[top_by_zone(importance[others], cell[others], quotas)]

    def select(self, signals: Signals, k: int) -> Tensor:
        _, _, important, recycled = self._split(signals, k)
        return torch.cat([important, recycled]).sort().values

    def merge_weights(self, signals: Signals, kept: Tensor) -> Tensor | None:
        importance, cell, important, recycled = self._split(signals, len(kept))
        if not len(recycled):
            return None
        # 1. the tokens left over in the cells of recycled ones, each with one of these, in turn
        free = torch.ones(signals.count, dtype=torch.bool)
        free[important] = free[recycled] = False
        counts = torch.bincount(cell[recycled], minlength=int(cell.max()) + 1)
        rest = (free & (counts[cell] > 0)).nonzero()[:, 0]
        by_cell = recycled[cell[recycled].argsort(stable=True)]  # recycled tokens, cell by cell
        first = counts.cumsum(0) - counts
        rank = _rank_within(cell[rest])
        target = by_cell[first[cell[rest]] + rank % counts[cell[rest]]]
        # 2. means, weighted by importance; alike where all of a mean are of none
        weight = importance + 1e-6
        total = weight.clone().index_add_(0, target, weight[rest])
        kept_weight = torch.ones(len(kept), dtype=torch.float64)
        place = torch.searchsorted(kept, recycled)
        kept_weight[place] = weight[recycled] / total[recycled]
        return merge_matrix(
            kept, kept_weight, rest, torch.searchsorted(kept, target), weight[rest] / total[target], signals.count
        )


def _rank_within(cell: Tensor) -> Tensor:
    """(n,) how many tokens before it have its cell."""
    order = cell.argsort(stable=True)
    sizes = torch.bincount(cell)
    starts = sizes.cumsum(0) - sizes
    rank = torch.empty_like(cell)
    rank[order] = torch.arange(len(cell)) - starts[cell[order]]
    return rank
