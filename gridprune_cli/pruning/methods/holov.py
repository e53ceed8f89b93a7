"""HoloV (arXiv 2510.02912): budgets per crop of the image from its saliency, the top of each crop."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top_by_zone
from gridprune_cli.pruning.signals import Signals, View

_SIDE = 4  # 4 x 4 crops, as many as the 16 runs of the published code
CROPS = ("grid", "runs")


@dataclass(frozen=True)
class HoloV(Method):
    """A budget per crop by its mean saliency, and the top of each crop by saliency; the question has no say.

        w_p = mean of A over crop p, divided by the sum of the means of all crops
        k_p = floor(w_p * K), and one more each for the crops of the highest w_p until they sum to K

    The published score of a crop adds 0.09 times a variance of its tokens' cosines, scaled in each crop to the mean
    saliency of that crop. So it multiplies every score by 1.09, and has no effect: it is left out.

    crops  "grid": each view is cut into 16 rectangles, 4 rows of 4. "runs": as the published code has it, 16 runs of
           tokens in the order of the rows, which are no rectangles

    Departures: what a crop can't take goes to the others by the same rule; the published code loses it, and fills up
    with rows of zeros. The crops of all views share one K; the published code gives each tile the same.
    """

    name: ClassVar[str] = "holov"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency"})
    crops: str = "grid"

    def __post_init__(self) -> None:
        """Raises ValueError where `crops` is unknown."""
        if self.crops not in CROPS:
            raise ValueError(f"crops must be one of {', '.join(CROPS)}, not {self.crops}")

    def select(self, signals: Signals, k: int) -> Tensor:
        saliency = values(signals, "saliency")
        cut = _grid if self.crops == "grid" else _runs
        crop = torch.cat([_SIDE * _SIDE * n + cut(view) for n, view in enumerate(signals.views)])
        sizes = torch.bincount(crop)
        means = torch.bincount(crop, weights=saliency) / sizes.clamp(min=1)
        # whole numbers, so that rounding noise does not decide between equal crops
        weights = (means / means.max().clamp(min=1e-300) * 2**40).round().long()
        return top_by_zone(saliency, crop, quotas(weights, sizes, k))


def quotas(weights: Tensor, caps: Tensor, k: int) -> Tensor:
    """HoloV's budgets (P,) int64, which sum to k, none above its cap. weights (P,) int64 >= 0, k <= sum(caps).

    Shares are rounded down, and the heaviest crops get one more each; what full crops leave is split again likewise.
    Where only crops of weight 0 have room, all of them count alike.
    """
    budgets = torch.zeros_like(caps)
    while left := k - int(budgets.sum()):
        room = budgets < caps
        open_weights = weights * room
        if not bool(open_weights.any()):
            open_weights = room.long()
        added = left * open_weights // open_weights.sum()
        heaviest = open_weights.argsort(descending=True, stable=True)[: left - int(added.sum())]
        added[heaviest] += 1
        budgets = torch.minimum(budgets + added, caps)
    return budgets


def _grid(view: View) -> Tensor:
    """(N,) the crop of each token: rectangles, row-major. A view of fewer than 4 rows or columns has fewer."""
    row, col = (torch.arange(side) * min(_SIDE, side) // side for side in (view.rows, view.cols))
    return (row[:, None] * _SIDE + col).flatten()


def _runs(view: View) -> Tensor:
    """(N,) the crop of each token: runs that differ by one token at most, the longer ones first."""
    each, longer = divmod(view.count, _SIDE * _SIDE)
    sizes = torch.full((_SIDE * _SIDE,), each)
    sizes[:longer] += 1
    return torch.arange(_SIDE * _SIDE).repeat_interleave(sizes)
