"""VisionZip (arXiv 2412.04467): dominant tokens by saliency, and contextual ones that the rest is merged into."""

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, merge_matrix, values
from gridprune_cli.pruning.select import top
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import cosines

MERGES = ("mean", "sum")


@dataclass(frozen=True)
class VisionZip(Method):
    """The dominant K - C by saliency, and C contextual tokens evenly spaced among the M others.

    Contextual tokens are every max(1, floor(M / C))-th of the others, in their order. Each of what is left joins the
    contextual token that it is most like, and is merged into it.

    contextual_share  C = floor(share * K + 1/2); 5/32 gives the published 10 of 64, 20 of 128 and 30 of 192
    merge_by          "mean": of the contextual token and what joins it, all alike. "sum": as the published code has
                      it, the contextual token plus the mean of what joins it, which about doubles its length

    Departures: similarity is the cosine of vision features, where the published one is that of the attention keys of
    their layer, which are not stored. CLS is no visual token here; the published code counts it as one dominant token.
    Contextual tokens stay in their places, not behind all others. The tokens of all views compete for one K; the
    published code gives each tile the same.
    """

    name: ClassVar[str] = "visionzip"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency", "vision_features"})
    contextual_share: float = 5 / 32
    merge_by: str = "mean"

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if not 0 <= self.contextual_share <= 1:
            raise ValueError(f"contextual_share must be from 0 to 1, not {self.contextual_share}")
        if self.merge_by not in MERGES:
            raise ValueError(f"merge_by must be one of {', '.join(MERGES)}, not {self.merge_by}")

    def _split(self, signals: Signals, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the dominant tokens, the contextual ones, and what is left, each sorted."""
        contextual = floor(self.contextual_share * k + 0.5)
        dominant = top(values(signals, "saliency"), k - contextual)
        others = torch.ones(signals.count, dtype=torch.bool)
        others[dominant] = False
        rest = others.nonzero()[:, 0]
        targets = rest[:: max(1, len(rest) // max(1, contextual))][:contextual].clone()
        others[targets] = False
        return dominant, targets, others.nonzero()[:, 0]

    def select(self, signals: Signals, k: int) -> Tensor:
        signals.need("vision_features")  # that it is missing shows here, not when merging
        dominant, targets, _ = self._split(signals, k)
        return torch.cat([dominant, targets]).sort().values

    def merge_weights(self, signals: Signals, kept: Tensor) -> Tensor | None:
        _, targets, rest = self._split(signals, len(kept))
        if not len(targets):
            return None
        vision_features = signals.need("vision_features")
        nearest = cosines(vision_features[rest], vision_features[targets]).argmax(1)
        joined = torch.bincount(nearest, minlength=len(targets))
        share = 1 / (joined + 1) if self.merge_by == "mean" else 1 / joined.clamp(min=1)
        place = torch.searchsorted(kept, targets)
        kept_weight = torch.ones(len(kept))
        if self.merge_by == "mean":
            kept_weight[place] = share
        return merge_matrix(kept, kept_weight, rest, place[nearest], share[nearest], signals.count)
