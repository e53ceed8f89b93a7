"""How alike tokens are, and greedy choices by it. All in float64, with sums that do not depend on their order."""

from math import ceil, log2

import torch
from torch import Tensor
from torch.nn.functional import normalize

GRAIN = 2.0**32  # values are rounded to multiples of its inverse: far above float64's noise of a sum, far below a tie


def cosines(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosines of vectors `a` (A, C) with vectors `b` (B, C), or with each other: (A, B) float64 on the CPU.

    A vector of zeros has cosine 0 with every vector. Values are rounded to multiples of 2^-32: the rounding noise of a
    matrix product depends on where a vector stands in the matrix, and must not decide between equal tokens.
    """
    product = _gram(_unit(a)) if b is None else _unit(a) @ _unit(b).T
    return product.mul_(GRAIN).round_().div_(GRAIN).cpu()


def _unit(vectors: Tensor) -> Tensor:
    """Vectors (n, C) brought to length 1, in float64."""
    return normalize(precise(vectors), dim=-1)


def precise(vectors: Tensor) -> Tensor:
    """Vectors in float64, on their own device; on the CPU where that has no float64."""
    return (vectors.cpu() if vectors.device.type == "mps" else vectors).double()


def _gram(vectors: Tensor) -> Tensor:
    """`vectors @ vectors.T` (n, n), computed in strips up to the diagonal, since the rest mirrors them."""
    count = len(vectors)
    product = vectors.new_empty(count, count)
    height = max(128, -(-count // 4))
    for start in range(0, count, height):
        end = min(start + height, count)
        strip = vectors[start:end] @ vectors[:end].T
        product[start:end, :end] = strip
        product[:end, start:end] = strip.T
    return product


def cover(likeness: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Tokens that cover the rows of `likeness` (R, N) greedily: (k,) int64, in the order in which they are taken.

    Next comes, among tokens not yet taken, the j with the highest `weight_j * sum_r max(0, likeness_rj - best_r)`, ties
    to the lower index. `best_r` is the highest likeness of a taken token to r, and 0 at first. weight (N,) >= 0.

    After a choice only the rows that it covers better matter, since a gain is the sum of max(likeness_rj, best_r) less
    that of best_r. All are whole numbers, so that the gains are the same as if they were summed anew each time.
    """
    likeness = _whole(likeness)
    best = torch.zeros(len(likeness), dtype=torch.float64)
    gain = likeness.clamp(min=0).sum(0)
    weight = torch.ones_like(gain) if weight is None else weight
    taken = torch.zeros_like(gain)
    order = torch.empty(k, dtype=torch.long)
    for step in range(k):
        token = (gain * weight + taken).argmax()
        taken[token] = -torch.inf
        order[step] = token
        column = likeness[:, token]
        better = (column > best).nonzero()[:, 0]
        old, new = best[better], column[better]
        lost = likeness.index_select(0, better)  # what the other tokens no longer add
        torch.maximum(lost, old[:, None], out=lost)
        torch.minimum(lost, new[:, None], out=lost)
        gain -= lost.sum(0) - old.sum()
        best[better] = new
    return order


def _whole(values: Tensor) -> Tensor:
    """`values` (R, N), scaled by a power of two and rounded: whole numbers that float64 sums along R exactly."""
    high = float(values.abs().max()) * len(values)
    return (values * 2.0 ** (51 - ceil(log2(high)))).round_() if high > 0 else values
