"""TRIM (arXiv 2409.10994): the top by CLIP's relevance, and the mean of the others as one more token."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, check_sign, merge_matrix, signed_relevance, values
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals


@dataclass(frozen=True)
class Trim(Method):
    """The top K - 1 by relevance, and the mean of all others, which takes the place of the K-th.

    relevance_sign  1, -1, or 0 for the model's: as the published code -1 with CLIP's relevance, 1 with any other
    cosine          False scores a token by the dot product with the question's unit vector, as the published code does:
                    relevance times the length of the token's patch in the common space of image and text. Only with
                    relevance from CLIP or SigLIP
    mean_token      False leaves the mean out, and the K-th token stays itself; so it does where K is 1

    Departures: relevance is a cosine, as in the paper, unless `cosine` is False. K is given, where the paper also finds
    it from the outliers of the scores. The mean token is one of the K, and stands where the K-th token stood, not
    behind all others. The tokens of all views compete for one K.
    """

    name: ClassVar[str] = "trim"
    requires: ClassVar[frozenset[str]] = frozenset({"relevance"})
    relevance_sign: int = 0
    cosine: bool = True
    mean_token: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError where the sign is not 1, -1 or 0."""
        check_sign(self.relevance_sign, allowed=(1, -1, 0))

    @property
    def needs(self) -> frozenset[str]:
        return self.requires if self.cosine else self.requires | {"patch_lengths"}

    @property
    def merges(self) -> bool:
        return self.mean_token

    def score(self, signals: Signals) -> Tensor:
        relevance = signed_relevance(signals, self.relevance_sign)
        return relevance if self.cosine else relevance * values(signals, "patch_lengths")

    def merge_weights(self, signals: Signals, kept: Tensor) -> Tensor | None:
        if not self.mean_token or len(kept) == 1:
            return None
        alone = top(self.score(signals), len(kept) - 1)
        place = (~torch.isin(kept, alone)).nonzero()[0]
        dropped = torch.ones(signals.count, dtype=torch.bool)
        dropped[kept] = False
        rest = dropped.nonzero()[:, 0]
        rest_weight = torch.full(rest.shape, 1 / (len(rest) + 1))
        kept_weight = torch.ones(len(kept))
        kept_weight[place] = 1 / (len(rest) + 1)
        return merge_matrix(kept, kept_weight, rest, place.expand(len(rest)), rest_weight, signals.count)
