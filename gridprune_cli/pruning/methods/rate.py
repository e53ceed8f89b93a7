"""RATE: the pivots of random projections of the tokens, in time that grows linearly with their number."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, check_seed
from gridprune_cli.pruning.signals import Signals
from gridprune_cli.pruning.similarity import precise

_SPANNED = 1e-9  # share of a token's squared length: what taken ones leave of it below that is rounding noise


@dataclass(frozen=True)
class RATE(Method):
    """The K pivots of a QR factorisation with column pivoting, of vision features projected to a few random axes.

    Features h (N, C) are projected to S = K + oversampling axes, drawn from a normal distribution; the projections keep
    lengths and angles about as they are. Then again and again the token is taken of whose projection most is left:

        argmax_i || y_i - (its part in the span of the taken y) ||,    y = h G,  G (C, S)

    Where all that is left is spanned by what was taken, the longest are taken. Where S would be C or more, y is h.

    oversampling  how many axes more than K
    seed          of the axes, which are the same for every image

    Guessed: all but the idea. No copy of the paper was at hand; it is known for pivots of random projections, at a cost
    about linear in N. This one costs N * S * (C + K).
    """

    name: ClassVar[str] = "rate"
    requires: ClassVar[frozenset[str]] = frozenset({"vision_features"})
    oversampling: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError where oversampling is negative, or the seed none that torch takes."""
        if self.oversampling < 0:
            raise ValueError(f"oversampling must be at least 0, not {self.oversampling}")
        check_seed(self.seed)

    def select(self, signals: Signals, k: int) -> Tensor:
        projected = self._project(precise(signals.need("vision_features")).cpu(), k + self.oversampling)  # (N, S)
        lengths = (projected**2).sum(1)  # (N,)
        left = lengths.clone()
        basis = torch.empty(k, projected.shape[1], dtype=torch.float64)
        free = torch.ones(len(projected), dtype=torch.bool)
        for step in range(k):
            score = torch.where(free & (left > _SPANNED * lengths), left, 0.0)
            best = score.max()
            if not bool(best > 0):
                rest = torch.where(free, lengths, -1.0).argsort(descending=True, stable=True)
                free[rest[: k - step]] = False
                break
            token = int((score >= best * (1 - 1e-9)).int().argmax())  # noise must not decide between equal tokens
            axis = projected[token]
            for _ in range(2):  # once more, since the first pass leaves rounding errors of the size of the token
                axis = axis - basis[:step].T @ (basis[:step] @ axis)
            basis[step] = axis / axis.norm()
            left = (left - (projected @ basis[step]) ** 2).clamp(min=0)
            free[token] = False
        return (~free).nonzero()[:, 0]

    def _project(self, vision_features: Tensor, axes: int) -> Tensor:
        """Vision features (N, C) on random axes, (N, axes); as they are where there are no more of these than C."""
        width = vision_features.shape[1]
        if axes >= width:
            return vision_features
        generator = torch.Generator().manual_seed(self.seed)
        return vision_features @ torch.randn(width, axes, generator=generator, dtype=torch.float64) / axes**0.5
