"""GridPrune (arXiv 2511.10081): first where to look, then what to select there."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate_by_logits
from gridprune_cli.pruning.methods.base import Method, check_sign, values
from gridprune_cli.pruning.region import inside_each
from gridprune_cli.pruning.select import best_by_zone, best_spaced
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.zones import Zones, zone_index

SALIENCY_SCALES = ("minmax", "max", "rank", "none")

_COLDEST = 1e-300  # a temperature below which quotients overflow; at it, any difference of means decides already

LITERAL: dict[str, Any] = {"temperature": 1.0, "saliency_scale": "none", "spacing": 0.0}
"""The options under which the published formulas are taken as they stand; signals then have no region."""


@dataclass(frozen=True)
class GridPrune(Method):
    """Budgets per zone from the zones' mean relevance, and within a zone the top tokens by relevance and saliency.

    With fewer tokens to keep than there are zones, most budgets are 0 or 1 by the rounding. With a spacing, tokens are
    then taken one by one over all zones, each lowering the scores of the tokens around it, and a zone's budget may be
    exceeded by one. So tokens of several objects stay, where the highest scores are all of one.

    zone            side of a zone in tokens
    alpha           weight of saliency in a token's score, 0..1; relevance, mapped to 0..1, has the rest
    temperature     of the softmax over zones, above 0: lower gives relevant zones more
    saliency_scale  how saliency is brought to 0..1: "minmax", "max", "rank" or "none"
    region_share    share of K for the contextual region, 0..1, where the signals have one
    spacing         how far around it a token lowers the others' scores, where fewer are kept than there are zones: a
                    standard deviation in tokens, 0 or more
    relevance_sign  1, or -1 where low relevance marks what the question is about

    The paper publishes no values; the defaults were chosen by `python -m benchmarks.sweeps`, see docs/results.md.
    """

    name: ClassVar[str] = "gridprune"
    requires: ClassVar[frozenset[str]] = frozenset({"relevance", "saliency"})
    takes_region: ClassVar[bool] = True
    zone: int = 4
    alpha: float = 0.2
    temperature: float = 0.3
    saliency_scale: str = "minmax"
    region_share: float = 0.5
    spacing: float = 2.0
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
        if not (self.spacing >= 0 and isfinite(self.spacing)):
            raise ValueError(f"spacing must be 0 or more, not {self.spacing}")
        if self.saliency_scale not in SALIENCY_SCALES:
            raise ValueError(f"saliency_scale must be one of {', '.join(SALIENCY_SCALES)}, not {self.saliency_scale}")
        check_sign(self.relevance_sign)

    def zones(self, signals: Signals) -> tuple[Tensor, Zones]:
        """Each token's zone, (N,) int64, and the zones."""
        return zone_index(signals.views, self.zone)

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
        logits = means / max(self.temperature, _COLDEST)
        budgets = allocate_by_logits(logits, caps, torch.tensor(quotas))  # (B, H, Z)
        # 4. the best of each zone
        stays = best_by_zone(score, zone, budgets.flatten(1))  # (B, N)
        # 5. where they are few, the best of all, apart from each other, one more than its budget from a zone
        few = torch.tensor([self.spacing > 0 and k < zones.count for k in ks])  # (B,)
        if few.any():
            limits = torch.minimum(budgets + 1, caps).flatten(1)[few]  # (F, H * Z) of F questions
            quotas_of_few = torch.tensor(quotas)[few]
            stays[few] = best_spaced(score[few], zone[few], limits, quotas_of_few, first.views, self.spacing)
        return list(stays.nonzero()[:, 1].split(list(ks)))


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
