"""Compression before the language model, after CROP's PLC (arXiv 2505.21233).

CROP compresses what lies inside the contextual region at one ratio and what lies outside at a higher one, and keeps
tokens of the region as anchors; a formula is in nothing that was read of it. Ours: inside, kept tokens stay as they
are. Outside, each kept token is the anchor of a cell, the tokens nearer to it than to any other, and its features
become those of the cell.
"""

from math import floor

import torch
from torch import Tensor

from gridprune_cli.pruning.signals import View


def cells(views: tuple[View, ...], kept: Tensor, within: Tensor) -> Tensor:
    """Each token's cell, (N,) int64: the place in `kept` (K,) of the anchor that it is pooled into, -1 for none.

    A token outside the region belongs to the nearest kept token of its view outside, by distance on the grid, ties to
    the lower index. Kept tokens belong to themselves, and other tokens inside to none; nor do those outside in a view
    where none outside was kept. `within` (N,) bool tells which tokens lie in the region.
    """
    out = torch.full((len(within),), -1)
    first = 0
    for view in views:
        index = torch.arange(view.count)
        place = torch.stack([index // view.cols, index % view.cols], dim=1)
        member = first + (~within[first : first + view.count]).nonzero()[:, 0]
        anchor = ((kept >= first) & (kept < first + view.count) & ~within[kept]).nonzero()[:, 0]
        if len(anchor):
            gap = place[member - first, None] - place[kept[anchor] - first]  # (members, anchors, 2)
            out[member] = anchor[(gap**2).sum(-1).argmin(1)]
        first += view.count
    out[kept] = torch.arange(len(kept))
    return out


def cell_weights(cell: Tensor, saliency: Tensor, k: int) -> Tensor:
    """Each token's weight in its cell, (N,) float64: its share of the cell's saliency, 0 where it is in no cell.

    The weights of each of the k cells sum to 1. In a cell without any saliency they are equal.
    cell (N,) in -1..k-1, saliency (N,) >= 0.
    """
    joined = cell >= 0
    index = cell.clamp(min=0)
    weight = saliency.double() * joined
    blank = torch.zeros(k, dtype=torch.float64).index_add(0, index, weight) < torch.finfo(torch.float64).tiny
    weight = torch.where(blank[index] & joined, 1.0, weight)
    return weight / torch.zeros(k, dtype=torch.float64).index_add(0, index, weight)[index]


def pool(vision_features: Tensor, cell: Tensor, weight: Tensor, k: int) -> Tensor:
    """The vision features of the k cells, (k, C): sums of their tokens' (N, C), each times its weight (N,)."""
    joined = cell >= 0
    weighted = vision_features[joined].double() * weight[joined, None]  # (joined, C)
    sums = torch.zeros(k, vision_features.shape[1], dtype=torch.float64).index_add(0, cell[joined], weighted)
    return sums.to(vision_features.dtype)


def ratio_budget(
    k: int, within: int, count: int, inside_ratio: float | None, outside_ratio: float | None
) -> tuple[int, float]:
    """K, and the share of it that is for the region, where ratios are given in visual tokens per kept token.

    A side with n of the `count` tokens keeps n / ratio, rounded to the nearest, at least one where it has tokens.
    Of one ratio, the other side gets what is left of `k`; of both, K is their sum, whatever `k` is. `within` of the
    tokens lie inside. At least one ratio is given, and both are 1 or more.
    """
    inner = None if inside_ratio is None else _budget(within, inside_ratio)
    outer = None if outside_ratio is None else _budget(count - within, outside_ratio)
    if inner is None:
        inner = k - (outer or 0)
    elif outer is not None:
        k = inner + outer
    return k, min(max(inner / k, 0.0), 1.0)


def ratios(kept: Tensor, within: Tensor) -> dict[str, float | None]:
    """Visual tokens per kept token inside and outside of the region, two decimals; None for a side that keeps none."""
    out: dict[str, float | None] = {}
    for name, side in (("inside", within), ("outside", ~within)):
        count = int(side[kept].sum())
        out[name] = round(int(side.sum()) / count, 2) if count else None
    return out


def _budget(tokens: int, ratio: float) -> int:
    return max(1, floor(tokens / ratio + 0.5)) if tokens else 0
