"""Top K by relevance: GridPrune's relevance without zones, saliency and region."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, check_sign, values
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class TopKRelevance(Method):
    """The K tokens of the highest relevance, or with `relevance_sign=-1` of the lowest."""

    name: ClassVar[str] = "topk-relevance"
    requires: ClassVar[frozenset[str]] = frozenset({"relevance"})
    relevance_sign: int = 1

    def __post_init__(self) -> None:
        check_sign(self.relevance_sign)

    def score(self, signals: Signals) -> Tensor:
        return values(signals, "relevance") * self.relevance_sign
