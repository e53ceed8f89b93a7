"""GridPrune (arXiv 2511.10081): first where to look, then what to select there."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate, allocate_by_logits
from gridprune_cli.pruning.methods.base import Method, check_sign, values
from gridprune_cli.pruning.region import inside_each
from gridprune_cli.pruning.select import best_by_zone, greedy_dpp, soft_nms
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.pruning.similarity import LazyCosines
from gridprune_cli.pruning.zones import Zones, zone_index

SALIENCY_SCALES = ("minmax", "max", "rank", "none")
FEW = ("auto", "unlike", "apart", "top")
_SPACING = 2.0  # tokens, of "apart": how far around it a token lowers the others' scores; chosen on tuning scenes

_MIN_TEMPERATURE = 1e-300  # below it quotients overflow; at it, any difference of means decides already

LITERAL: dict[str, Any] = {"temperature": 1.0, "saliency_scale": "none", "few": "top"}
"""The options under which the published formulas are taken as they stand; signals then have no region."""


@dataclass(frozen=True)
class GridPrune(Method):
    """Budgets per zone from the zones' mean relevance, and within a zone the top tokens by relevance and saliency.

    With fewer tokens to keep than there are zones, most of these budgets are 0 or 1, and tokens are taken one by one
    over all zones instead, with one above a zone's budget at most. `few` says how:

    "unlike"  for relevance above the median, and vision features unlike those of the tokens taken before: greedy MAP
              inference of a determinantal point process (DPP) within the budgets, which follow the sums of what is
              above the median. So a token of each object stays, where the most relevant are many of one, and all
              letters of a word, which are relevant and unlike each other. Neither temperature nor saliency counts, and
              the region's share is the least that it gets
    "apart"   by score, each token lowering the scores around it on the grid (`soft_nms`)
    "top"     the budgets decide alone
    "auto"    "unlike" with relevance from CLIP or SigLIP, "apart" with any other: attention is too uneven, and word
              embeddings are too noisy, to be trusted that much

    zone            side of a zone in tokens
    alpha           weight of saliency in a token's score, 0..1; relevance, mapped to 0..1, has the rest
    temperature     of the softmax over zones, above 0: lower gives relevant zones more
    saliency_scale  how saliency is scaled: "minmax", "max", "rank" or "none"
    region_share    share of K for the contextual region, 0..1, where the signals have one
    few             how tokens are taken where they are fewer than the zones
    relevance_sign  1, or -1 where low relevance marks what the question is about

    The paper's values are in nothing that was read of it; the defaults were chosen by `python -m benchmarks.sweeps`,
    see docs/results.md.
    """

    name: ClassVar[str] = "gridprune"
    requires: ClassVar[frozenset[str]] = frozenset({"relevance", "saliency"})
    takes_region: ClassVar[bool] = True
    zone: int = 4
    alpha: float = 0.2
    temperature: float = 0.3
    saliency_scale: str = "minmax"
    region_share: float = 0.5
    few: str = "auto"
    relevance_sign: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if self.zone < 1:
            raise ValueError(f"zone must be at least 1, not {self.zone}")
        for option in ("alpha", "region_share"):
            if not 0 <= getattr(self, option) <= 1:
                raise ValueError(f"{option} must be from 0 to 1, not {getattr(self, option)}")
        if not (self.temperature > 0 and isfinite(self.temperature)):
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if self.saliency_scale not in SALIENCY_SCALES:
            raise ValueError(f"saliency_scale must be one of {', '.join(SALIENCY_SCALES)}, not {self.saliency_scale}")
        if self.few not in FEW:
            raise ValueError(f"few must be one of {', '.join(FEW)}, not {self.few}")
        check_sign(self.relevance_sign)

    def zones(self, signals: Signals) -> tuple[Tensor, Zones]:
        """Each token's zone, (N,) int64, and the zones."""
        return zone_index(signals.views, self.zone)

    @property
    def needs(self) -> frozenset[str]:
        return self.requires | {"vision_features"} if self.few in ("auto", "unlike") else self.requires

    def needs_for(self, k: int, views: tuple[View, ...], relevance_kind: str) -> frozenset[str]:
        return self.needs if self._way(k, views, relevance_kind) == "unlike" else self.requires

    def unused_options(self, k: int, views: tuple[View, ...], relevance_kind: str) -> tuple[str, ...]:
        if self._way(k, views, relevance_kind) != "unlike":
            return ()
        of_scores = ("alpha", "temperature", "saliency_scale")
        return tuple(name for name in of_scores if getattr(self, name) != getattr(type(self), name))

    def _way(self, k: int, views: tuple[View, ...], relevance_kind: str) -> str:
        """How k tokens of these views are taken: "unlike", "apart" or "top"."""
        if k >= zone_index(views, self.zone)[1].count:
            return "top"
        if self.few == "auto":
            return "unlike" if relevance_kind in ("clip", "siglip") else "apart"
        return self.few

    def select(self, signals: Signals, k: int) -> Tensor:
        return self.select_alike([signals], [k])[0]

    def select_alike(self, signals: Sequence[Signals], ks: Sequence[int]) -> list[Tensor]:
        # B questions about images of the same N tokens
        first, count = signals[0], len(signals)
        # 1. scores
        relevance = torch.stack([values(each, "relevance") for each in signals]) * self.relevance_sign  # (B, N)
        saliency = scaled(torch.stack([values(each, "saliency") for each in signals]), self.saliency_scale)  # (B, N)
        score = (1 - self.alpha) * (relevance + 1) / 2 + self.alpha * saliency  # (B, N)
        # 2. each token's zone; a region cuts every zone in two, the half outside numbered behind all zones
        zone, zones = self.zones(first)  # (N,)
        zone, quotas = zone.expand(count, -1), [[k] for k in ks]  # (B, N), (B, 1)
        if first.region is not None:
            within = inside_each(first.views, [each.region for each in signals if each.region])  # (B, N)
            zone = zone + zones.count * ~within
            sizes = within.sum(1).tolist()
            quotas = [region_quotas(k, n, first.count, self.region_share) for k, n in zip(ks, sizes, strict=True)]
        # 3. budgets, inside and outside by themselves, from the zones' mean relevance; H = 1, or 2 with a region
        zeros = relevance.new_zeros(count, len(quotas[0]) * zones.count)  # (B, H * Z)
        caps = zeros.long().scatter_add(1, zone, torch.ones_like(zone))
        means = (zeros.scatter_add(1, zone, relevance) / caps.clamp(min=1)).unflatten(1, (-1, zones.count))
        caps = caps.unflatten(1, (-1, zones.count))  # (B, H, Z)
        logits = means / max(self.temperature, _MIN_TEMPERATURE)
        budgets = allocate_by_logits(logits, caps, torch.tensor(quotas))  # (B, H, Z)
        # 4. the best of each zone
        stays = best_by_zone(score, zone, budgets.flatten(1))  # (B, N)
        # 5. where they are few, tokens unlike each other or apart from each other instead
        ways = [self._way(k, each.views, each.relevance_kind) for k, each in zip(ks, signals, strict=True)]
        for n in (n for n, way in enumerate(ways) if way == "unlike"):
            features = signals[n].need("vision_features")
            stays[n] = select_dpp(relevance[n], features, zone[n], caps[n], quotas[n])
        apart = torch.tensor([way == "apart" for way in ways])  # (B,)
        if apart.any():
            limits = torch.minimum(budgets + 1, caps).flatten(1)[apart]  # (A, H * Z) of A questions
            quotas_apart = torch.tensor(quotas)[apart]
            stays[apart] = soft_nms(score[apart], zone[apart], limits, quotas_apart, first.views, _SPACING)
        return list(stays.nonzero()[:, 1].split(list(ks)))


def select_dpp(relevance: Tensor, features: Tensor, zone: Tensor, caps: Tensor, quotas: Sequence[int]) -> Tensor:
    """(N,) bool, what stays of fewer tokens than zones: greedy DPP MAP inference within the zones' budgets.

    The DPP's quality is the square of how far relevance is above its median, its similarity that of vision features.
    relevance (N,), features (N, C), zone (N,) in 0..H*Z-1, caps (H, Z) the sizes of zones, quotas: K inside and outside
    of the region, or K alone.
    """
    excess = above_median(relevance)  # (N,)
    weights = torch.zeros(caps.numel(), dtype=excess.dtype).scatter_add(0, zone, excess**2).view_as(caps)  # (H, Z)
    budgets, most = least_share_budgets(weights, caps, quotas)
    limits = torch.minimum(budgets + 1, caps).flatten()
    return greedy_dpp(excess**4, LazyCosines(features), relevance, zone, limits, most, sum(quotas))


def above_median(relevance: Tensor) -> Tensor:
    """(N,) how far relevance is above its median, 1 for the highest and 0 from the median down.

    The median is the lower one of two. Where it is the highest relevance, all that have that are 1.
    """
    median, high = relevance.median(), relevance.max()
    return ((relevance - median) / (high - median)).clamp(min=0) if high > median else (relevance == high).double()


def least_share_budgets(weights: Tensor, caps: Tensor, quotas: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Budgets in proportion to weights, and how many tokens the inside and the outside of the region give at most.

    The inside gets its quota at least, and more where its weights have more; one at least stays outside, where the
    outside has a quota. weights and caps (H, Z) -> (H, Z) int64 that sums to K, and (H,) int64 that sum to K or more.
    """
    k = sum(quotas)
    if len(quotas) == 1:
        return allocate(weights, caps, torch.tensor(quotas)), torch.tensor(quotas)
    inner, outer = quotas
    by_weight = int(allocate(weights.flatten(), caps.flatten(), k).view_as(caps)[0].sum())
    most_inside = k - min(outer, 1)
    inner = min(max(inner, by_weight), most_inside)
    return allocate(weights, caps, torch.tensor([inner, k - inner])), torch.tensor([most_inside, outer])


def region_quotas(k: int, within: int, count: int, share: float) -> list[int]:
    """How many of k tokens come from inside the region and from outside, where it has `within` of `count` tokens.

    `share * k`, rounded to the nearest, comes from inside as far as the region has it, and the rest from outside as far
    as that has it. A region that covers more than `share` of the tokens gets its part of k, not less. One at least
    stays outside, where there is any and k is above 1: never blind outside.
    """
    inner = min(floor(max(share, within / count) * k + 0.5), within)
    if k > 1 and within < count:
        inner = min(inner, k - 1)
    inner = max(inner, k - (count - within))
    return [inner, k - inner]


def scaled(saliency: Tensor, scale: str) -> Tensor:
    """Saliency (..., N), each row in 0..1; "none" leaves it. Constant saliency becomes 0 by "minmax" and "rank"."""
    tiny = torch.finfo(torch.float64).tiny
    match scale:
        case "minmax":
            low, high = saliency.aminmax(dim=-1, keepdim=True)
            return (saliency - low) / (high - low).clamp(min=tiny)
        case "max":
            return saliency / saliency.amax(-1, keepdim=True).clamp(min=tiny)
        case "rank":  # how many tokens are below, so that equal saliency stays equal
            return torch.searchsorted(saliency.sort().values, saliency).double() / max(saliency.shape[-1] - 1, 1)
        case _:
            return saliency
