"""HiRED (arXiv 2408.10945): a budget per view and tile, the top of each by saliency."""

from dataclasses import dataclass
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from gridprune_cli.pruning.budget import allocate
from gridprune_cli.pruning.methods.base import Method, values
from gridprune_cli.pruning.select import top, top_by_zone
from gridprune_cli.pruning.signals import Signals, View
from gridprune_cli.pruning.zones import zone_index

_WHOLE = (0.0, 0.0, 1.0, 1.0)  # the box of a view of the whole picture


@dataclass(frozen=True)
class HiRED(Method):
    """Splits K over the views of one picture; each view or tile keeps its top by saliency. The question has no say.

    The base view, which shows the whole picture, gets floor(`base_share` * K), and the tiles the rest in proportion to
    how many of the base view's top floor((1 - base_share) * N_base) tokens by saliency lie in them. A mosaic, which has
    all tiles in one view, is cut into tiles of about the base view's size. Where no view is the base, or it is the only
    one, K is not split, and what stays is FasterVLM's.

    base_share  0 to 1; the published alpha

    Departures: the published split looks at the attention of CLS in the tower's first layer, which is not stored; this
    one takes the saliency that is also used to select. Tiles are cut out of the picture, where the published code cuts
    runs out of the flat sequence of the base view's tokens. Budgets sum to K, by largest remainders, and what a tile
    can't take goes to the others. Newlines stay by the rule for all methods; the published code drops them.
    """

    name: ClassVar[str] = "hired"
    requires: ClassVar[frozenset[str]] = frozenset({"saliency"})
    single_image: ClassVar[bool] = True
    base_share: float = 0.5

    def __post_init__(self) -> None:
        """Raises ValueError where base_share is out of its range."""
        if not 0 <= self.base_share <= 1:
            raise ValueError(f"base_share must be from 0 to 1, not {self.base_share}")

    def select(self, signals: Signals, k: int) -> Tensor:
        saliency, views = values(signals, "saliency"), signals.views
        whole = [n for n, view in enumerate(views) if view.box == _WHOLE]
        if len(views) == 1 or not whole:
            return top(saliency, k)
        base = views[whole[0]]
        indices: list[Tensor] = []  # of each view's tokens: 0 for the base view, then tiles from 1 on
        boxes: list[tuple[float, float, float, float]] = []
        for n, view in enumerate(views):
            if n == whole[0]:
                indices.append(torch.zeros(view.count, dtype=torch.long))
                continue
            tile, zones = zone_index((view,), (base.rows, base.cols))
            indices.append(1 + len(boxes) + tile)
            boxes += [_box(view, *sides) for _, *sides in zones.rectangles()]
        tile_of = torch.cat(indices)  # (N,)
        caps = torch.bincount(tile_of)
        leading = top(saliency[tile_of == 0], int((1 - self.base_share) * base.count))
        counts = _count_in_boxes(base, leading, torch.tensor(boxes, dtype=torch.float64))
        base_budget = min(floor(self.base_share * k), base.count)
        base_budget = max(base_budget, k - int(caps[1:].sum()))
        budgets = torch.cat([torch.tensor([base_budget]), allocate(counts, caps[1:], k - base_budget)])
        return top_by_zone(saliency, tile_of, budgets)


def _box(view: View, above: int, left: int, below: int, right: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a rectangle of a view's tokens, in fractions of the picture."""
    x, y, end_x, end_y = view.box
    across, down = (end_x - x) / view.cols, (end_y - y) / view.rows
    return x + left * across, y + above * down, x + right * across, y + below * down


def _count_in_boxes(base: View, tokens: Tensor, boxes: Tensor) -> Tensor:
    """(T,) how many of a base view's tokens have their centre in each of the boxes (T, 4)."""
    x = (tokens % base.cols + 0.5) / base.cols + 1e-9  # a centre on a border belongs to the tile behind it
    y = (tokens // base.cols + 0.5) / base.rows + 1e-9
    left, above, right, below = boxes.T[:, :, None]
    return ((x >= left) & (x < right) & (y >= above) & (y < below)).sum(1)
