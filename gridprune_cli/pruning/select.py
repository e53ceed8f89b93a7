"""The tokens with the highest scores, over all and per zone, and those unlike each other. Ties: the lower index."""

import torch
from torch import Tensor

from gridprune_cli.pruning.similarity import LazyCosines

_INDEPENDENT = 1e-8  # squared part of a unit row outside of what was taken: below it, the rest is rounding noise


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


def best_diverse(
    weight: Tensor, likeness: LazyCosines, rest: Tensor, zone: Tensor, limits: Tensor, quotas: Tensor, k: int
) -> Tensor:
    """(N,) bool, the k tokens that stay: one by one the one whose weight is high and that is unlike those before it.

    With L_ij = sqrt(weight_i) * cos(i, j) * sqrt(weight_j), the next is argmax_j det(L of taken and j) / det(L of
    taken). That is `weight_j` times the squared part of unit vector j that no taken one spans, and is found by a
    Cholesky factor that grows by a row per token. Where that is 0 for all tokens, the highest of `rest` comes next.

    weight (N,) float64 >= 0, rest (N,), zone (N,) int64 in 0..H*Z-1, limits (H*Z,): how many tokens are taken of each
    zone at most, quotas (H,): and how many of each group of Z zones. Together they must leave room for k.
    """
    left = likeness.of_each_with_itself()
    factor = torch.empty(k, len(left), dtype=torch.float64)
    taken = torch.zeros(len(left), dtype=torch.bool)
    group = zone // (len(limits) // len(quotas))  # (N,)
    limits, quotas = limits.clone(), quotas.clone()
    barred = (limits[zone] == 0) | (quotas[group] == 0)  # (N,)
    for step in range(k):
        gain = torch.where(left > _INDEPENDENT, weight * left, 0.0).masked_fill_(barred, 0.0)
        best = float(gain.max())
        if best > 0:
            # rounding noise must not decide between equal tokens
            token = int((gain >= best * (1 - 1e-9)).int().argmax())
            row = likeness.of_token(token, gain) - factor[:step, token] @ factor[:step]
            factor[step] = row / left[token].sqrt()
            left -= factor[step] ** 2
        else:  # from here on for good, since gains only fall: the factor is complete
            token = int(rest.masked_fill(barred, -torch.inf).argmax())
        taken[token] = barred[token] = True
        limits[zone[token]] -= 1
        quotas[group[token]] -= 1
        if limits[zone[token]] == 0:
            barred |= zone == zone[token]
        if quotas[group[token]] == 0:
            barred |= group == group[token]
    return taken


def _descending(score: Tensor) -> Tensor:
    """(..., N) indices, highest score first; equal scores in index order."""
    if not bool(torch.isfinite(score).all()):
        raise ValueError("scores must be finite")
    return score.argsort(dim=-1, descending=True, stable=True)
