"""How many tokens each zone may keep."""

import torch
from torch import Tensor

from gridprune_cli.pruning.similarity import GRAIN

_TINY = torch.finfo(torch.float64).tiny


def softmax_shares(means: Tensor, caps: Tensor, temperature: float) -> Tensor:
    """Each zone's share of the budget, (..., Z) float64: softmax of `means / temperature` over zones that have tokens.

    GridPrune (arXiv 2511.10081) has temperature 1. Zones of cap 0 get no share while any zone has tokens.
    """
    means = means.double().masked_fill(caps == 0, torch.finfo(torch.float64).min)
    return torch.softmax((means - means.amax(-1, keepdim=True)) / temperature, dim=-1)


def allocate(weights: Tensor, caps: Tensor, k: int | Tensor) -> Tensor:
    """Splits k tokens over zones in proportion to `weights`, none above its cap: (..., Z) int64 that sums to k.

    What a full zone can't take goes to the others in proportion to their weights: the exact shares are
    `min(cap, level * weight)` with the level at which they sum to k. Shares are rounded down, and what is left goes one
    each to the largest remainders, ties to the lower index. Zones of weight 0 (or below 1e-200 of the largest) get
    tokens only where all others are full, and then equal shares.

    weights (..., Z) >= 0, caps (..., Z) integers >= 0, k (...). Each row is split by itself. Raises ValueError where
    they are not, or a k is not in 0..sum(caps).
    """
    weights, caps, k = weights.double(), caps.long(), torch.as_tensor(k)
    room = caps.sum(-1)
    if bool(((k < 0) | (k > room)).any()):
        raise ValueError(f"can't place {k.tolist()} tokens in zones that hold {room.tolist()}")
    low, high = weights.aminmax(dim=-1, keepdim=True)
    if not bool(((low >= 0) & (high < torch.inf)).all() and (caps >= 0).all()):
        raise ValueError("zones need finite weights and caps, none negative")
    weights = weights / high.clamp(min=_TINY)
    # 1. zones that have weight; above 1e-200, so that cap / weight can't overflow
    weighted_caps = caps * (weights > 1e-200)  # (..., Z)
    capacity = weighted_caps.sum(-1)
    first = torch.minimum(k, capacity)
    budgets = torch.where((k < capacity)[..., None], _split(weights, weighted_caps, first), weighted_caps)
    # 2. what they can't take goes to the others, all of them alike
    rest = k - first
    return budgets + _split(torch.ones_like(weights), caps - weighted_caps, rest) if bool(rest.any()) else budgets


def _split(weights: Tensor, caps: Tensor, k: Tensor) -> Tensor:
    """`allocate` where every zone with a cap has weight, and the zones hold k or more."""
    weights = weights * (caps > 0)
    shares = weights * (k / weights.sum(-1).clamp(min=_TINY))[..., None]
    over = (shares > caps).any(-1, keepdim=True)
    if bool(over.any()):
        shares = torch.where(over, torch.minimum(weights * _level(weights, caps, k), caps), shares)
    budgets = shares.long()
    # rounding noise must not decide between equal remainders, of which the first gets one more
    remainders = ((shares - budgets) * GRAIN).round().masked_fill(budgets >= caps, -1.0)
    one_more = torch.arange(caps.shape[-1]) < (k - budgets.sum(-1))[..., None]  # for the largest remainders
    return budgets.scatter_add(-1, remainders.argsort(descending=True, stable=True), one_more.long())


def _level(weights: Tensor, caps: Tensor, k: Tensor) -> Tensor:
    """(..., 1) the level at which `min(cap, level * weight)` sums to k: zones fill up in the order of cap / weight."""
    k = k[..., None]
    full_at, order = torch.where(caps > 0, caps / weights, 0.0).sort(stable=True)
    taken = caps.gather(-1, order).cumsum(-1)
    weight_from = weights.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    full = (taken[..., :-1] + full_at[..., :-1] * weight_from[..., 1:] <= k).sum(-1, keepdim=True)
    last = (full - 1).clamp(min=0)
    # Where the other zones weigh next to nothing, what is left for them rounds to 0; full zones stay full all the same.
    beyond = torch.maximum((k - taken.gather(-1, last)) / weight_from.gather(-1, full), full_at.gather(-1, last))
    return torch.where(full == 0, k / weight_from[..., :1], beyond)
