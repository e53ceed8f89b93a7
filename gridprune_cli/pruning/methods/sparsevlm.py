"""SparseVLM (arXiv 2410.04417): attention of the text tokens that the image is most like, inside the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod, geometric_counts
from gridprune_cli.pruning.schedule import Attention, Rule, Stage
from gridprune_cli.pruning.similarity import precise

DEPTHS = (3 / 32, 7 / 32, 16 / 32)  # of the layers: the published stages behind the layers 2, 6 and 15 of 32
COUNTS = ("last", "mean", "published")
# (K, what is left after each stage) of 576 tokens in the published code, none and all of them at the ends
PUBLISHED = (
    (0, (0, 0, 0)),
    (64, (66, 30, 17)),
    (96, (238, 48, 26)),
    (128, (303, 110, 36)),
    (192, (300, 200, 110)),
    (576, (576, 576, 576)),
)


@dataclass(frozen=True)
class RatedAttention(Attention):
    """The highest mean attention of the raters, in the layer before.

    Raters are the text tokens t that the visual tokens v are most like, before the first layer:

        mean_v softmax_t( v . t ) > mean over t of the same, which is 1 / m

    and all m of them where none is above it.
    """

    name: ClassVar[str] = "rated-attention"
    rated: ClassVar[bool] = True

    def raters(self, visual: Tensor, text: Tensor) -> Tensor:
        similarity = (precise(visual) @ precise(text).T).softmax(1).mean(0).cpu()
        rates = similarity > similarity.mean() + 1e-9  # rounding noise must not decide between equal tokens
        return rates if bool(rates.any()) else torch.ones_like(rates)


@dataclass(frozen=True)
class SparseVLM(InnerMethod):
    """Three stages, at 3, 7 and 16 of 32 layers; what stays is what the raters attend to most, mean over heads.

    The text that may rate is what stands behind the last image, chosen once. Layers are rounded to the nearest. What
    stays is numbered on from 0, as in the published code for the paper (v1.5).

    count  "last": K tokens are left after the last stage, and the same share stays at each. "mean": the same share, but
           as the paper counts, K visual tokens in a layer in the mean, as near as whole tokens come to it.
           "published": the published counts, which are about K in the mean

    Departures: the published code has counts for K = 64, 96, 128 and 192 of 576 tokens, of no stated rule; here they
    are taken as shares of N, for other shares in proportion between the nearest two. The paper also finds counts from
    the rank of the raters' attention, which is left out: a pruned set tells how many tokens each layer has before the
    model runs. So is recycling, which adds means of what leaves; inside the language model nothing is merged here.
    """

    name: ClassVar[str] = "sparsevlm"
    rules: ClassVar[tuple[type[Rule], ...]] = (RatedAttention,)
    count: str = "last"

    def __post_init__(self) -> None:
        """Raises ValueError where count is none of `COUNTS`."""
        if self.count not in COUNTS:
            raise ValueError(f"count must be one of {', '.join(COUNTS)}, not {self.count}")

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        stage_layers = [max(layers.start, floor(share * layers.stop + 0.5)) for share in DEPTHS]
        counts_after = []
        for n, k in zip(counts, budgets, strict=True):
            if self.count == "published":
                counts_after.append(published_counts(n, k))
                continue
            last = k if self.count == "last" else _last(n, k, [*stage_layers, layers.stop])
            counts_after.append(geometric_counts(n, last, len(DEPTHS)))
        stage_budgets = zip(*counts_after, strict=True)  # of all images, per stage
        return tuple(
            Stage(layer, RatedAttention(), stage, "compact")
            for layer, stage in zip(stage_layers, stage_budgets, strict=True)
        )


def published_counts(count: int, k: int) -> tuple[int, ...]:
    """How many of `count` tokens are there after each stage for a budget `k`, by `PUBLISHED`; one at least."""
    share = k / count * 576
    (low, counts_low), (high, counts_high) = next(
        pair for pair in pairwise(PUBLISHED) if share <= pair[1][0] or pair[1] is PUBLISHED[-1]
    )
    weight = (share - low) / (high - low)
    after = (a + weight * (b - a) for a, b in zip(counts_low, counts_high, strict=True))
    return tuple(max(1, floor(tokens / 576 * count + 1e-9)) for tokens in after)


def _last(count: int, k: int, ends: Sequence[int]) -> int:
    """How many of `count` tokens to leave in the end, so that the mean over layers is nearest to `k`.

    `ends` are the layers at which a stage stands, and the number of layers.
    """
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]

    def distance(last: int) -> float:
        tokens = (count, *geometric_counts(count, last, len(lengths) - 1))
        return abs(sum(n * layers for n, layers in zip(tokens, lengths, strict=True)) / ends[-1] - k)

    return min(range(1, k + 1), key=distance)
