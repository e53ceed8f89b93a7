"""CDPruner (arXiv 2506.10967): a determinantal point process over tokens, conditioned on the question."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, check_sign, signed_relevance
from gridprune_cli.pruning.select import greedy_dpp
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import LazyCosines


@dataclass(frozen=True)
class CDPruner(Method):
    """The tokens that are relevant and unlike each other: the greedy maximum of det(L) over the tokens taken.

        q_i  = (r'_i - min r' + 1e-6) / (max r' - min r')        r' relevance times its sign
        L_ij = q_i * cos(x_i, x_j) * q_j
        argmax_j det(L of taken and j) / det(L of taken), by a Cholesky factor that grows by a row per token

    relevance_sign  1, -1, or 0 for the model's: as published -1 with CLIP's relevance, 1 with any other

    Departures: a question longer than CLIP's text tower takes is read in the pieces of our own relevance. Where all
    tokens left are combinations of taken ones, which the published code does not look at and may answer with NaN, the
    rest is filled up by relevance. Equal relevance counts as q = 1. The tokens of all views compete for one K; the
    published code gives each tile the same.
    """

    name: ClassVar[str] = "cdpruner"
    requires: ClassVar[frozenset[str]] = frozenset({"image_embeds", "relevance"})
    relevance_sign: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where the sign is not 1, -1 or 0."""
        check_sign(self.relevance_sign, allowed=(1, -1, 0))

    def select(self, signals: Signals, k: int) -> Tensor:
        relevance = signed_relevance(signals, self.relevance_sign)
        low, high = relevance.aminmax()
        quality = (relevance - low + 1e-6) / (high - low) if bool(high > low) else torch.ones_like(relevance)
        similarity = LazyCosines(signals.need("image_embeds"))
        zone = torch.zeros(len(relevance), dtype=torch.long)
        one = torch.tensor([k])
        return greedy_dpp(quality**2, similarity, relevance, zone, one, one, k).nonzero()[:, 0]
