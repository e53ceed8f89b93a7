"""How many tokens each zone may keep."""

import torch
from torch import Tensor


def softmax_shares(means: Tensor, caps: Tensor, temperature: float) -> Tensor:
    """Each zone's share of the budget, (Z,) float64: softmax of `means / temperature` over the zones that have tokens.

    GridPrune (arXiv 2511.10081) has temperature 1. Zones of cap 0 get no share while any zone has tokens.
    """
    means = means.double().masked_fill(caps == 0, torch.finfo(torch.float64).min)
    return torch.softmax((means - means.max()) / temperature, dim=0)


def allocate(weights: Tensor, caps: Tensor, k: int) -> Tensor:
    """Splits k tokens over zones in proportion to `weights`, none above its cap: (Z,) int64 that sums to k.

    What a full zone can't take goes to the others in proportion to their weights: the exact shares are
    `min(cap, level * weight)` with the level at which they sum to k. Shares are rounded down, and what is left goes one
    each to the largest remainders, ties to the lower index. Zones of weight 0 (or below 1e-200 of the largest) get
    tokens only where all others are full, and then equal shares.

    weights (Z,) >= 0, caps (Z,) integers >= 0. Raises ValueError where they are not, or k is not in 0..sum(caps).
    """
    weights, caps = weights.double(), caps.long()
    room = int(caps.sum())
    if not 0 <= k <= room:
        raise ValueError(f"can't place {k} tokens in zones that hold {room}")
    low, high = (float(bound) for bound in weights.aminmax())
    if not (low >= 0 and high < torch.inf and int(caps.min()) >= 0):
        raise ValueError("zones need finite weights and caps, none negative")
    weights = weights / max(high, torch.finfo(torch.float64).tiny)
    weighty = weights > 1e-200  # so that cap / weight can't overflow
    heavy = caps * weighty
    held = int(heavy.sum())
    if k < held:
        return _split(weights, heavy, k)
    return heavy if k == held else heavy + _split(torch.ones_like(weights), caps - heavy, k - held)


def _split(weights: Tensor, caps: Tensor, k: int) -> Tensor:
    """`allocate` where every zone with a cap has weight, and the zones hold k or more."""
    weights = weights * (caps > 0)
    shares = weights * (k / weights.sum())
    if bool((shares > caps).any()):
        shares = torch.minimum(weights * _level(weights, caps, k), caps)
    budgets = shares.long()
    remainders = (shares - budgets).masked_fill(budgets >= caps, -1.0)
    lucky = remainders.argsort(descending=True, stable=True)[: k - int(budgets.sum())]
    return budgets.index_add(0, lucky, torch.ones_like(lucky))


def _level(weights: Tensor, caps: Tensor, k: int) -> float:
    """The level at which `min(cap, level * weight)` sums to k; one sort tells which zones are full by then."""
    full_at, order = torch.where(caps > 0, caps / weights, 0.0).sort(stable=True)
    held = caps[order].cumsum(0)
    weight_from = weights[order].flip(0).cumsum(0).flip(0)
    full = int((held[:-1] + full_at[:-1] * weight_from[1:] <= k).sum())
    if full == 0:
        return k / float(weight_from[0])
    # Where the other zones weigh next to nothing, what is left for them rounds to 0; full zones stay full all the same.
    return max((k - int(held[full - 1])) / float(weight_from[full]), float(full_at[full - 1]))
