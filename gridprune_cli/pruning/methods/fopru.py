"""FoPru (arXiv 2411.14164): the tokens, or the rows of tokens, that the vision tower attends to most."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import GRAIN

STRATEGIES = ("rank", "row")


@dataclass(frozen=True)
class FoPru(Method):
    """Top tokens, or top rows, by significance: attention received in the layer of the vision features.

    Significance is the mean attention of all of the tower's tokens to a token, where FasterVLM has that of CLS.

    strategy  "rank": the K most significant tokens. "row": the most significant rows of the grid, by the mean over a
              row; of the last row for which there is no room, its most significant tokens

    Guessed: that significance is a mean over all tokens and heads, rows count by their mean, and the last row is kept
    in part. The rows of all views compete for one K.
    """

    name: ClassVar[str] = "fopru"
    requires: ClassVar[frozenset[str]] = frozenset({"received_attention"})
    strategy: str = "rank"

    def __post_init__(self) -> None:
        """Raises ValueError where the strategy is none of `STRATEGIES`."""
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {self.strategy}")

    def select(self, signals: Signals, k: int) -> Tensor:
        significance = values(signals, "received_attention")
        if self.strategy == "rank":
            return top(significance, k)
        # 1. the rows, best first; rounded, so that rounding noise does not decide between equal rows
        lengths = torch.tensor([view.cols for view in signals.views for _ in range(view.rows)])
        row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)  # (N,)
        means = torch.stack([tokens.mean() for tokens in significance.split(lengths.tolist())])
        order = (means * GRAIN).round().argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        # 2. tokens row by row, the best of a row first
        by_significance = significance.argsort(descending=True, stable=True)
        by_row = by_significance[place[row[by_significance]].argsort(stable=True)]
        return by_row[:k].sort().values
