"""DivPrune (arXiv 2503.02175): tokens as far from each other as can be, by max-min distance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import LazyCosines


@dataclass(frozen=True)
class DivPrune(Method):
    """Greedy max-min diversity of image embeds; the question has no say.

        d_ij = 1 - cos(x_i, x_j)
        first argmax_i min_{j != i} d_ij, then again and again argmax_i min_{s taken} d_is

    Departures: a taken token can't be taken again. The published code masks none, so that equal tokens, as in padding,
    can give one index twice. On LLaVA-NeXT the newlines behind rows of tiles are no candidates, and stay by the rule
    for all methods; the published code chooses among them, too.
    """

    name: ClassVar[str] = "divprune"
    requires: ClassVar[frozenset[str]] = frozenset({"image_embeds"})

    def select(self, signals: Signals, k: int) -> Tensor:
        similarity = LazyCosines(signals.need("image_embeds"))
        token = similarity.least_similar()
        kept = [token]
        nearest = torch.full((signals.count,), torch.inf, dtype=torch.float64)  # distance to the nearest taken token
        while len(kept) < k:
            torch.minimum(nearest, 1 - similarity.of_token(token, nearest), out=nearest)
            nearest[kept] = -torch.inf
            token = int(nearest.argmax())
            kept.append(token)
        return torch.tensor(kept).sort().values
