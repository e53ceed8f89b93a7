"""SCOPE (arXiv 2510.24214): saliency times what a token adds to the coverage of all tokens."""

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import cosines, cover


@dataclass(frozen=True)
class Scope(Method):
    """Greedy coverage weighted by saliency; the question has no say.

        argmax_j A_j^alpha * sum_i max(0, cos(h_i, h_j) - max_{s taken} cos(h_i, h_s)), the last max 0 at first

    alpha  power of the saliency, 0 or more

    Departures: the tokens of all views compete for one K; the published code gives each tile the same. Its variant
    that adds saliency instead of multiplying is left out.
    """

    name: ClassVar[str] = "scope"
    requires: ClassVar[frozenset[str]] = frozenset({"vision_features", "saliency"})
    alpha: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError where alpha is out of its range."""
        if not (self.alpha >= 0 and isfinite(self.alpha)):
            raise ValueError(f"alpha must be 0 or more, not {self.alpha}")

    def select(self, signals: Signals, k: int) -> Tensor:
        weight = values(signals, "saliency") ** self.alpha
        return cover(cosines(signals.need("vision_features")), k, weight).sort().values
