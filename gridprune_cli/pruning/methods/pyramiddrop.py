"""PyramidDrop (arXiv 2410.17247): fewer and fewer visual tokens as the language model gets deeper."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar

from gridprune_cli.pruning.methods.base import InnerMethod, dwindling
from gridprune_cli.pruning.schedule import OwnAttention, Stage

DEPTHS = (0.25, 0.5, 0.75)  # layers 8, 16 and 24 of 32


@dataclass(frozen=True)
class PyramidDrop(InnerMethod):
    """Three stages, at a quarter, half and three quarters of the layers; K tokens are left after the last.

    The same share stays at each of them, `(K/N)^(1/3)`: K = N/8 is the published 1/2, 1/4, 1/8. Those stay that the
    prompt's last token attends to most in the layer that comes next, mean over heads, and what stays is numbered on
    from 0, both as in the published code. Layers are rounded to the nearest at which tokens can leave.
    """

    name: ClassVar[str] = "pyramiddrop"

    def stages(self, counts: Sequence[int], budgets: Sequence[int], layers: range) -> tuple[Stage, ...]:
        left = [dwindling(n, k, len(DEPTHS)) for n, k in zip(counts, budgets, strict=True)]
        at = [min(max(layers.start, floor(share * layers.stop + 0.5)), layers.stop - 1) for share in DEPTHS]
        keeps = zip(*left, strict=True)
        return tuple(Stage(layer, OwnAttention(), keep, "compact") for layer, keep in zip(at, keeps, strict=True))
