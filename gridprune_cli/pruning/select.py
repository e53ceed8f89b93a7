"""The tokens with the highest scores, over all and per zone. Ties go to the lower index."""

import torch
from torch import Tensor


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
    sizes = torch.bincount(zone, minlength=len(budgets))
    if bool(((budgets < 0) | (budgets > sizes)).any()):
        raise ValueError("a zone's budget must be 0 up to its size")
    best_first = _descending(score)
    by_zone = best_first[zone[best_first].argsort(stable=True)]
    # Zone by zone, each best first: a token stays where its place in its zone is below the zone's budget.
    limits = (sizes.cumsum(0) - sizes + budgets).repeat_interleave(sizes)
    return by_zone[torch.arange(len(score)) < limits].sort().values


def _descending(score: Tensor) -> Tensor:
    """(N,) indices, highest score first; equal scores in index order."""
    if not bool(torch.isfinite(score).all()):
        raise ValueError("scores must be finite")
    return score.argsort(descending=True, stable=True)
