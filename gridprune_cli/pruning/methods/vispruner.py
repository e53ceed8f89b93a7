"""VisPruner (arXiv 2412.01818v2): important tokens by saliency, and diverse ones by removing duplicates."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import cosines

_OTHERS = 32  # of a token's most similar ones that are tried first: one in two stands at an odd place at first


@dataclass(frozen=True)
class VisPruner(Method):
    """The important floor(important_share * K) by saliency, and the rest of K diverse; the question has no say.

    The other tokens, by falling saliency, are thinned until enough are left: of the list's even places (counted from
    0), `step` tokens go at a time, those whose highest cosine with a token at an odd place is the highest. The list
    goes on with what stays of the even places, by falling highest cosine, then the odd places.

    important_share  0 to 1
    step             how many go at a time, 1 or more

    Departures: a list of odd length has one even place more than odd ones, where the published code fails. No more
    than all even places go at a time. The tokens of all views compete for one K; the published code gives each tile
    the same.
    """

    name: ClassVar[str] = "vispruner"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency", "vision_features"})
    important_share: float = 0.5
    step: int = 8

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if not 0 <= self.important_share <= 1:
            raise ValueError(f"important_share must be from 0 to 1, not {self.important_share}")
        if self.step < 1:
            raise ValueError(f"step must be at least 1, not {self.step}")

    def select(self, signals: Signals, k: int) -> Tensor:
        by_saliency = values(signals, "saliency").argsort(descending=True, stable=True)
        important = int(self.important_share * k)
        similarity = cosines(signals.need("vision_features")).fill_diagonal_(-torch.inf)
        most_similar, others = similarity.topk(min(_OTHERS, len(similarity)))  # (N, _OTHERS)
        rest = by_saliency[important:]
        while (surplus := len(rest) - (k - important)) > 0 and len(rest) > 1:
            even, odd = rest[::2], rest[1::2]
            banned = torch.ones(signals.count, dtype=torch.bool)
            banned[odd] = False
            # the highest cosine with one of its most similar ones at an odd place; where none is there, try all
            closest = most_similar[even].masked_fill_(banned[others[even]], -torch.inf).amax(1)
            unknown = closest.isinf().nonzero()[:, 0]
            closest[unknown] = similarity[even[unknown]].masked_fill_(banned, -torch.inf).amax(1)
            most_similar_first = closest.argsort(descending=True, stable=True)
            rest = torch.cat([even[most_similar_first[min(self.step, surplus) :]], odd])
        return torch.cat([by_saliency[:important], rest[: k - important]]).sort().values
