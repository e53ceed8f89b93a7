"""The tokens of the highest scores, over all and per zone; soft non-maximum suppression; greedy DPP MAP inference.

Ties go to the lower index.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gridprune_cli.pruning.signals import View
from gridprune_cli.pruning.similarity import GRAIN, LazyCosines

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


def soft_nms(
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
    scaled = torch.where(high > low, (score - low) / (high - low), 1.0).numpy()  # (B, N)
    # 2. where each token lies, and by what the tokens around one are multiplied, itself in the middle
    places = [(number, row, col) for number, view in enumerate(views) for row, col in np.ndindex(view.rows, view.cols)]
    ends = np.cumsum([view.count for view in views])[:-1]
    factors = [_spacing_factors(view, spacing) for view in views]  # (2 * rows - 1, 2 * cols - 1) each
    # 3. one by one. numpy, since these are many operations on few numbers, which torch is slow to start
    zones_per_group = limits.shape[1] // quotas.shape[1]
    stays = np.zeros(scaled.shape, dtype=bool)
    for values, zone_of, limit, quota, taken in zip(
        scaled, zone.numpy(), limits.clone().numpy(), quotas.clone().numpy(), stays, strict=True
    ):
        group_of = zone_of // zones_per_group  # (N,)
        barred = np.where((limit[zone_of] > 0) & (quota[group_of] > 0), 0.0, -np.inf)  # (N,)
        grids = [
            grid.reshape(view.rows, view.cols) for grid, view in zip(np.split(values, ends), views, strict=True)
        ]  # of the same memory as values
        for _ in range(quota.sum()):
            best = int((values + barred).argmax())  # the first of equal ones
            taken[best], barred[best] = True, -np.inf
            limit[zone_of[best]] -= 1
            quota[group_of[best]] -= 1
            if limit[zone_of[best]] == 0:
                barred[zone_of == zone_of[best]] = -np.inf
            if quota[group_of[best]] == 0:
                barred[group_of == group_of[best]] = -np.inf
            number, row, col = places[best]
            top_row, left_col = views[number].rows - 1 - row, views[number].cols - 1 - col
            grids[number] *= factors[number][top_row:, left_col:][: views[number].rows, : views[number].cols]
    return torch.from_numpy(stays)


def _spacing_factors(view: View, spacing: float) -> np.ndarray:
    """`1 - exp(-d^2 / (2 * spacing^2))` for every offset between two tokens of a view: `(2 * rows - 1, 2 * cols - 1)`.

    Rounded, so that what libraries differ by can't decide between equal scores.
    """
    row, col = np.arange(1 - view.rows, view.rows), np.arange(1 - view.cols, view.cols)
    factors = -np.expm1(-(row[:, None] ** 2 + col**2) / (2 * spacing**2))
    return np.round(factors * GRAIN) / GRAIN


def greedy_dpp(
    weight: Tensor, similarity: LazyCosines, rest: Tensor, zone: Tensor, limits: Tensor, quotas: Tensor, k: int
) -> Tensor:
    """(N,) bool, the k tokens that stay: greedy MAP inference of a determinantal point process (DPP), within budgets.

    One by one comes the token whose weight is high and that is unlike those before it: with the kernel
    L_ij = sqrt(weight_i) * cos(i, j) * sqrt(weight_j), the next is argmax_j det(L of taken and j) / det(L of taken).
    That is `weight_j` times the squared part of unit vector j that no taken one spans, and is found by a Cholesky
    factor that grows by a row per token. Where that is 0 for all tokens, the highest of `rest` comes next.

    weight (N,) float64 >= 0, rest (N,), zone (N,) int64 in 0..H*Z-1, limits (H*Z,): how many tokens are taken of each
    zone at most, quotas (H,): and how many of each group of Z zones. Together they must leave room for k.
    """
    left = similarity.of_each_with_itself()
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
            row = similarity.of_token(token, gain) - factor[:step, token] @ factor[:step]
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
