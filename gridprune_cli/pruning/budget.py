"""How many tokens each zone may keep."""

import torch
from torch import Tensor

from gridprune_cli.pruning.similarity import GRAIN

_TINY = torch.finfo(torch.float64).tiny
_LOWEST = torch.finfo(torch.float64).min


def allocate(weights: Tensor, caps: Tensor, k: int | Tensor) -> Tensor:
    """Splits k tokens over zones in proportion to `weights`, none above its cap: (..., Z) int64 that sums to k.

    What a full zone can't take goes to the others in proportion to their weights: the exact shares are
    `min(cap, level * weight)` with the level at which they sum to k. Shares are rounded down, and what is left goes one
    each to the largest remainders, ties to the lower index. Zones of weight 0 get tokens only where all others are
    full, and then equal shares.

    weights (..., Z) >= 0, caps (..., Z) integers >= 0, k (...). Each row is split by itself. Raises ValueError where
    they are not, or a k is not in 0..sum(caps).
    """
    weights = weights.double()
    low, high = weights.aminmax()
    if not bool((low >= 0) & (high < torch.inf)):
        raise ValueError("zones need finite weights and caps, none negative")
    return allocate_by_logits(weights.log(), caps, k)


def allocate_by_logits(logits: Tensor, caps: Tensor, k: int | Tensor) -> Tensor:
    """`allocate` with `softmax(logits)` as weights, logits (..., Z).

    It is computed so that zones whose softmax underflows still differ once the others are full. A logit of minus
    infinity stands for the weight 0. Raises ValueError as `allocate`, and where a logit is not a number or is infinite.
    """
    logits, caps, k = logits.double(), caps.long(), torch.as_tensor(k)
    room = caps.sum(-1)
    if bool(((k < 0) | (k > room)).any()):
        raise ValueError(f"can't place {k.tolist()} tokens in zones that hold {room.tolist()}")
    if not bool((logits < torch.inf).all() and (caps >= 0).all()):
        raise ValueError("zones need finite weights and caps, none negative")
    budgets, rest = torch.zeros_like(caps), k
    while True:
        # 1. the weights of zones that are not full, the largest of them 1; all 1 where none has weight
        free = caps - budgets
        of_free = logits.masked_fill(free == 0, -torch.inf)
        highest = of_free.amax(-1, keepdim=True)
        weights = torch.where(highest > -torch.inf, (of_free - highest.clamp(min=_LOWEST)).exp(), 1.0)
        # 2. what those take whose weight is above 1e-200, so that cap / weight can't overflow
        weighted = free * (weights > 1e-200)  # (..., Z)
        capacity = weighted.sum(-1)
        taken = torch.where(
            (rest < capacity)[..., None], _split(weights, weighted, torch.minimum(rest, capacity)), weighted
        )
        budgets, rest = budgets + taken, rest - taken.sum(-1)
        # 3. what they can't take goes to the others
        if not bool(rest.any()):
            return budgets


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
