"""The tokens with the highest scores, over all, per zone, and apart from each other. Ties go to the lower index."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gridprune_cli.pruning.signals import View
from gridprune_cli.pruning.similarity import GRAIN


def top(score: Tensor, k: int) -> Tensor:
    """Sorted indices, (k,) int64, of the k highest of `score` (N,). ValueError: not finite, or k is not in 0..N."""
    if not 0 <= k <= len(score):
        raise ValueError(f"can't keep {k} of {len(score)} tokens")
    return _descending(score)[:k].sort().values


def top_by_zone(score: Tensor, zone: Tensor, budgets: Tensor) -> Tensor:
    """Sorted indices, (K,) int64: from each zone j the `budgets[j]` tokens of the highest score.

    score (N,), zone (N,) int64 in 0..Z-1, budgets (Z,) int64 with K as its sum. Raises ValueError where a score is not
    finite, or a budget is negative or above its zone's size.
    """
    return best_by_zone(score, zone, budgets).nonzero()[:, 0]


def best_by_zone(score: Tensor, zone: Tensor, budgets: Tensor) -> Tensor:
    """`top_by_zone` of each row of score (..., N), zone (..., N) and budgets (..., Z): (..., N) bool, what stays."""
    sizes = torch.zeros_like(budgets).scatter_add(-1, zone, torch.ones_like(zone))
    if bool(((budgets < 0) | (budgets > sizes)).any()):
        raise ValueError("a zone's budget must be 0 up to its size")
    best_first = _descending(score)
    by_zone = best_first.gather(-1, zone.gather(-1, best_first).argsort(dim=-1, stable=True))
    # Zone by zone, each best first: a token stays where its place in its zone is below the zone's budget.
    limits = (sizes.cumsum(-1) - sizes + budgets).gather(-1, zone.gather(-1, by_zone))
    places = torch.arange(score.shape[-1])
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, by_zone, places < limits)


def best_spaced(
    score: Tensor, zone: Tensor, limits: Tensor, quotas: Tensor, views: Sequence[View], spacing: float
) -> Tensor:
    """(B, N) bool, what stays: the best tokens one by one, each lowering the scores around it.

    Scores are brought to 0..1. Once a token is taken, those of its view at a distance of d tokens on the grid are
    multiplied by `1 - exp(-d^2 / (2 * spacing^2))`. That is soft non-maximum suppression (arXiv 1704.04503), by
    distance instead of overlap.

    score (B, N) float64, zone (B, N) int64 in 0..H*Z-1, quotas (B, H): how many tokens are taken of each of H groups of
    Z zones, limits (B, H*Z): and how many at most of each zone, which must leave room for the quotas.
    """
    # 1. scores in 0..1; all are 1 where they are equal
    low, high = score.aminmax(dim=-1, keepdim=True)
    lowered = torch.where(high > low, (score - low) / (high - low), 1.0)  # (B, N)
    # 2. each token's view and place on its grid, and by what a token at a squared distance is multiplied
    row = torch.cat([torch.arange(view.rows).repeat_interleave(view.cols) for view in views])  # (N,)
    col = torch.cat([torch.arange(view.cols).repeat(view.rows) for view in views])
    number = torch.repeat_interleave(torch.arange(len(views)), torch.tensor([view.count for view in views]))
    furthest = max((view.rows - 1) ** 2 + (view.cols - 1) ** 2 for view in views)
    factors = -torch.expm1(-torch.arange(furthest + 1).double() / (2 * spacing**2))
    factors = (factors * GRAIN).round() / GRAIN  # so that what libraries differ by can't decide between equal scores
    # 3. one by one; a question that has its tokens is left as it is
    group, everyone = zone // (limits.shape[1] // quotas.shape[1]), torch.arange(len(score))
    limits, quotas = limits.clone(), quotas.clone()
    stays = torch.zeros_like(score, dtype=torch.bool)
    for _ in range(int(quotas.sum(1).max())):
        free = ~stays & (limits.gather(1, zone) > 0) & (quotas.gather(1, group) > 0)  # (B, N)
        best = lowered.masked_fill(~free, -1.0).argmax(1)  # (B,), the first of equal ones
        taken = free[everyone, best]  # (B,) false where nothing is free
        stays[everyone, best] |= taken
        limits[everyone, zone[everyone, best]] -= taken.long()
        quotas[everyone, group[everyone, best]] -= taken.long()
        squares = (row - row[best, None]) ** 2 + (col - col[best, None]) ** 2  # (B, N)
        squares.clamp_(max=furthest)  # of tokens of other views, which are left as they are
        lowered = torch.where(number == number[best, None], lowered * factors[squares], lowered)
    return stays


def _descending(score: Tensor) -> Tensor:
    """(..., N) indices, highest score first; equal scores in index order."""
    if not bool(torch.isfinite(score).all()):
        raise ValueError("scores must be finite")
    return score.argsort(dim=-1, descending=True, stable=True)
