"""AdaptPrune (arXiv 2503.08019): attention, lowered around each token that was kept, inside the language model."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import InnerMethod
from gridprune_cli.pruning.schedule import LayerSignals, Rule, Stage
from gridprune_cli.pruning.signals import View
from gridprune_cli.pruning.similarity import GRAIN, LazyCosines

_LOG_ZERO = -1e6  # stands for the logarithm of 0; that of the smallest float64 is -745


@dataclass(frozen=True)
class Suppression(Rule):
    """Soft non-maximum suppression: again and again the token of the highest score, which lowers its neighbours'.

        s_i = attention_i * exp(-(u_i^2 + v_i^2) / (2 * centre^2))
        after t is taken, for i of its view with d_it <= radius:
        s_i *= 1 - exp(-d_it^2 / (2 * sigma^2)) * exp(-(1 - cos(k_i, k_t))^2 / (2 * likeness^2))

    u, v are a token's row and column, from -1 to 1 over its view; d distances in tokens, k keys.
    """

    name: ClassVar[str] = "suppression"
    attention: ClassVar[int | None] = -1
    keys: ClassVar[int | None] = 0
    centre: float = 1.0
    radius: float = 5.0
    sigma: float = 1.5
    likeness: float = 0.05

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if not (self.radius >= 0 and isfinite(self.radius)):
            raise ValueError(f"radius must be 0 or more, not {self.radius}")
        for option in ("centre", "sigma", "likeness"):
            if not (getattr(self, option) > 0 and isfinite(getattr(self, option))):
                raise ValueError(f"{option} must be above 0, not {getattr(self, option)}")

    def select(self, signals: LayerSignals, k: int) -> Tensor:
        assert signals.attention is not None and signals.keys is not None
        coordinates = torch.cat([_coordinates(number, view) for number, view in enumerate(signals.views)])[
            signals.tokens
        ]
        view, row, col, off_centre = coordinates.T
        similarity = LazyCosines(signals.keys)
        score = _log(signals.attention.log() - off_centre / (2 * self.centre**2))
        taken = torch.zeros_like(score)
        for _ in range(k):
            token = int((score + taken).argmax())
            taken[token] = -torch.inf
            dissimilarity = 1 - similarity.of_token(token, score + taken)
            square = (row - row[token]) ** 2 + (col - col[token]) ** 2
            exponent = square / self.sigma**2 + (dissimilarity / self.likeness) ** 2
            near = (square <= self.radius**2) & (view == view[token])
            score = (score + _log(torch.log1p(near * -torch.exp(-exponent / 2)))).clamp(min=_LOG_ZERO)
        return taken.isinf().nonzero()[:, 0]


def _log(values: Tensor) -> Tensor:
    """Logarithms as multiples of 2^-32, which add up to the same in any order: tokens that are equal must stay so."""
    return (values.clamp(min=_LOG_ZERO) * GRAIN).round() / GRAIN


def _coordinates(number: int, view: View) -> Tensor:
    """(N, 4) float64 of a view's tokens: its number, row, column, and the square of how far from the centre it is."""
    row, col = torch.meshgrid(torch.arange(view.rows), torch.arange(view.cols), indexing="ij")
    u, v = ((2 * at - (side - 1)) / max(1, side - 1) for at, side in ((row, view.rows), (col, view.cols)))
    columns = (torch.full_like(row, number), row, col, u**2 + v**2)
    return torch.stack([column.double().flatten() for column in columns], 1)


@dataclass(frozen=True)
class AdaptPrune(InnerMethod):
    """From layer `layer` on, K tokens by attention, which is lowered around each that was taken, by `Suppression`.

    What stays keeps its positions. Attention is that of the prompt's last token in the layer before, mean over heads.

    centre    width of the weight of the centre, in halves of a side: 1 is the published 12 on its 24 x 24 tokens
    radius    in tokens, as `sigma` is: what is farther off is never lowered
    sigma     how fast a neighbour's share falls with its distance
    likeness  and with how much its key differs from the taken token's; these three default to the published values

    Departures: keys are projected from normed hidden states, as the layer's own are; the published code leaves out the
    norm. Each view has its own centre, and its tokens are neighbours of no other view's. No token is taken twice, where
    all scores have become 0.
    """

    name: ClassVar[str] = "adaptprune"
    rules: ClassVar[tuple[type[Rule], ...]] = (Suppression,)
    layer: int = 2
    centre: float = 1.0
    radius: float = 5.0
    sigma: float = 1.5
    likeness: float = 0.05

    def __post_init__(self) -> None:
        """Raises ValueError where an option is out of its range."""
        if self.layer < 1:
            raise ValueError(f"layer must be at least 1, not {self.layer}")
        self._rule()

    def _rule(self) -> Suppression:
        return Suppression(self.centre, self.radius, self.sigma, self.likeness)

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        return (Stage(self.layer, self._rule(), tuple(budgets)),)
