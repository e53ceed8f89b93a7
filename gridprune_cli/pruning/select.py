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


def _descending(score: Tensor) -> Tensor:
    """(..., N) indices, highest score first; equal scores in index order."""
    if not bool(torch.isfinite(score).all()):
        raise ValueError("scores must be finite")
    return score.argsort(dim=-1, descending=True, stable=True)
