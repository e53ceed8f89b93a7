"""Cosines of tokens, and greedy choices by them. All in float64, with sums that do not depend on their order."""

from math import ceil, log2

import torch
from torch import Tensor
from torch.nn.functional import normalize

GRAIN = 2.0**32  # values are rounded to multiples of its inverse: far above float64's noise of a sum, far below a tie
_ROWS = 32  # computed together on a CPU, where 32 rows of a product take 6 times as long as one
_SHORTEST = 1e-12  # a shorter vector is not brought to length 1, as with torch's `normalize`
_STRIP = 64  # rows that are summed at a time, in the processor's cache


def cosines(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Cosines of vectors `a` (A, C) with vectors `b` (B, C), or with each other: (A, B) float64 on the CPU.

    A vector of zeros has cosine 0 with every vector. Values are rounded to multiples of 2^-32: the rounding noise of a
    matrix product depends on where a vector stands in the matrix, and must not decide between equal tokens.
    """
    product = _gram(_unit(a)) if b is None else _unit(a) @ _unit(b).T
    return _grained(product)


class LazyCosines:
    """Cosines of vectors (N, C) with each other, as `cosines` gives them, of which a method looks at a few rows only.

    A row is computed when it is first asked for, on a CPU with others that are likely to be asked for next. Elsewhere
    all are computed at once: one transfer for all of them.
    """

    def __init__(self, vectors: Tensor) -> None:
        self._vectors = precise(vectors)  # (N, C)
        length = torch.linalg.vector_norm(self._vectors, dim=1)
        self._inverse = 1 / length.clamp(min=_SHORTEST)  # (N,)
        self._length = length * self._inverse  # 1, but 0 for a vector of zeros
        self._computed: dict[int, Tensor] = {}  # rows (N,) by token
        self._missing = torch.ones(len(vectors), dtype=torch.bool)
        self._all_at_once = vectors.device.type != "cpu"

    def of_token(self, token: int, score: Tensor) -> Tensor:
        """(N,) float64 on the CPU: cosines of a token with all tokens.

        score  (N,) the higher, the sooner the row of a token is likely to be asked for; -inf: never
        """
        if token not in self._computed:
            likely = score.masked_fill(~self._missing, -torch.inf)
            likely[token] = torch.inf
            highest, tokens = likely.topk(min(_ROWS, len(likely)))
            self.of_tokens(tokens[highest > -torch.inf])
        return self._computed[token]

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """(n, N) float64 on the CPU: cosines of `tokens` (n,) with all tokens."""
        missing = tokens[self._missing[tokens]]
        if len(missing):
            batch = torch.arange(len(self._missing)) if self._all_at_once else missing
            on_device = batch.to(self._vectors.device)
            product = self._vectors[on_device] @ self._vectors.T
            computed = _grained(product.mul_(self._inverse[on_device, None]).mul_(self._inverse))
            self._missing[batch] = False
            self._computed.update(zip(batch.tolist(), computed, strict=True))
        return torch.stack([self._computed[token] for token in tokens.tolist()])

    def of_each_with_itself(self) -> Tensor:
        """(N,) float64 on the CPU: 1, but 0 for a vector of zeros."""
        return _grained(self._length**2)

    def least_similar(self) -> int:
        """The token whose highest cosine with another token is the lowest, the first of equal ones.

        What a row says of one token bounds the highest cosine of all others, so that few rows are needed where tokens
        have others that are like them.
        """
        count = len(self._missing)
        highest = torch.full((count,), -torch.inf, dtype=torch.float64)  # (N,) with the tokens looked at so far
        complete = torch.zeros(count, dtype=torch.bool)
        tokens = torch.arange(0, count, -(-count // (2 * _ROWS)))  # from all over the image
        while len(tokens):
            similarity = self.of_tokens(tokens)  # (n, N)
            similarity[torch.arange(len(tokens)), tokens] = -torch.inf  # each is similar to itself
            highest = torch.maximum(highest, similarity.amax(0))
            highest[tokens] = similarity.amax(1)
            complete[tokens] = True
            lowest = highest[complete].min()
            bound, tokens = highest.masked_fill(complete, torch.inf).topk(min(2 * _ROWS, count), largest=False)
            tokens = tokens[(bound <= lowest) & (bound < torch.inf)]
        return int(highest.masked_fill(~complete, torch.inf).argmin())


def _grained(product: Tensor) -> Tensor:
    """`product`, changed in place to multiples of 2^-32, and brought to the CPU."""
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


def cover(similarity: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Tokens that cover the rows of `similarity` (R, N) greedily: (k,) int64, in the order in which they are taken.

    Next comes, among tokens not yet taken, the j with the highest `weight_j * sum_r max(0, similarity_rj - best_r)`,
    ties to the lower index: for equal weights, greedy facility location. `best_r` is the highest similarity of a taken
    token to r, and 0 at first. weight (N,) >= 0.

    After a choice only the rows that it covers better matter, since a gain is the sum of max(similarity_rj, best_r)
    less that of best_r. The values must be such that float64 sums them exactly, as cosines and what `summable` gives,
    so that the gains are the same as if they were summed anew each time.
    """
    best = torch.zeros(len(similarity), dtype=torch.float64)
    gain = torch.stack([strip.clamp(min=0).sum(0) for strip in similarity.split(_STRIP)]).sum(0)
    weight = torch.ones_like(gain) if weight is None else weight
    taken = torch.zeros_like(gain)
    order = torch.empty(k, dtype=torch.long)
    for step in range(k):
        token = (gain * weight + taken).argmax()
        taken[token] = -torch.inf
        order[step] = token
        column = similarity[:, token]
        better = (column > best).nonzero()[:, 0]
        old, new = best[better], column[better]
        lost = similarity.index_select(0, better)  # what the other tokens no longer add
        torch.maximum(lost, old[:, None], out=lost)
        torch.minimum(lost, new[:, None], out=lost)
        gain -= lost.sum(0) - old.sum()
        best[better] = new
    return order


def summable(values: Tensor) -> Tensor:
    """`values` (R, N), scaled by a power of two and rounded: whole numbers that float64 sums along R exactly."""
    low, high = values.aminmax()
    largest_sum = max(-float(low), float(high)) * len(values)
    return (values * 2.0 ** (51 - ceil(log2(largest_sum)))).round_() if largest_sum > 0 else values
