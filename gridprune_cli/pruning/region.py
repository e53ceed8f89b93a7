"""The contextual region: where in the picture to look, as a box on CROP's 8 x 8 grid (arXiv 2505.21233).

CROP fine-tunes a model to answer the box. Without training, ours is the best rectangle of the relevance map.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from gridprune_cli.pruning.signals import Box, View

GRID = 8  # cells along a side: CROP's grid
FLOOR, AREA_PRICE = 0.25, 0.0105  # ours, chosen on the scenes of the embedded model

# All 1296 boxes, x0, y0, x1, y1, in the order in which ties are resolved: smaller area, then top-left, then wider.
_BOXES: list[Box] = sorted(
    ((x0, y0, x1, y1) for y0 in range(GRID) for y1 in range(y0, GRID) for x0 in range(GRID) for x1 in range(x0, GRID)),
    key=lambda box: ((box[2] - box[0] + 1) * (box[3] - box[1] + 1), box[1], box[0], box[3]),
)
_X0, _Y0, _X1, _Y1 = torch.tensor(_BOXES).T[:, :, None]
_CELLS = torch.arange(GRID)
_WITHIN = (
    (((_CELLS >= _Y0) & (_CELLS <= _Y1))[:, :, None] & ((_CELLS >= _X0) & (_CELLS <= _X1))[:, None, :])
    .flatten(1)
    .double()
)  # (1296, 64): 1 where the box has the cell
_AREA = _WITHIN.sum(1)
_TINY = torch.finfo(torch.float64).tiny


def contextual_region(
    relevance: Tensor, views: tuple[View, ...], *, floor: float = FLOOR, area_price: float = AREA_PRICE
) -> Box:
    """The box with the highest `mass inside - area_price * cells`. Ties: smaller area, then top, then left.

    A token's excess is `max(0, r' - floor) ** 2`, r' being its relevance brought linearly to 0..1 over the tokens; so
    neither shifting nor scaling `relevance` (N,) moves the region. A cell's mass is its mean excess, tokens weighted by
    the area they share with it; masses sum to 1. `area_price` is mass per cell: a box grows over cells that hold more.
    A flat map gives all that the views cover, as long as the price is below 1/64. Raises ValueError where relevance is
    not finite or not one per token, no view covers the picture, or floor is not in 0..1, 1 left out.
    """
    return contextual_regions(relevance[None], views, floor=floor, area_price=area_price)[0]


def contextual_regions(
    relevance: Tensor, views: tuple[View, ...], *, floor: float = FLOOR, area_price: float = AREA_PRICE
) -> list[Box]:
    """`contextual_region` of each row of relevance `(B, N)`."""
    if relevance.dim() != 2 or relevance.shape[1] != sum(view.count for view in views):
        raise ValueError(f"relevance has shape {tuple(relevance.shape[1:])}, which is not one value per token")
    if not bool(torch.isfinite(relevance).all()):
        raise ValueError("relevance has values that are not finite")
    if not 0 <= floor < 1:
        raise ValueError(f"floor must be from 0 to below 1, not {floor}")
    mass = _mass(_excess(relevance.cpu().double(), floor), views)
    score = mass @ _WITHIN.T - area_price * _AREA
    # The sums carry rounding noise, which must not decide between boxes that are equal.
    best = (score >= score.amax(1, keepdim=True) - 1e-9).byte().argmax(1)  # the first of them
    return [_BOXES[index] for index in best.tolist()]


def inside(views: tuple[View, ...], box: Box) -> Tensor:
    """(N,) bool: the tokens whose centre lies in the box. May be none. Raises ValueError where it is no box."""
    return inside_each(views, [box])[0]


def inside_each(views: tuple[View, ...], boxes: Sequence[Box]) -> Tensor:
    """`inside` of each box: (B, N) bool."""
    x0, y0, x1, y1 = torch.tensor([_checked(box, str(box)) for box in boxes]).T[:, :, None]
    masks = []
    for view in views:
        left, top, right, bottom = view.box
        row, col = _cell_along(top, bottom, view.rows), _cell_along(left, right, view.cols)
        masks.append((((row >= y0) & (row <= y1))[:, :, None] & ((col >= x0) & (col <= x1))[:, None]).flatten(1))
    return torch.cat(masks, 1)


def parse_box(text: str) -> Box:
    """Reads "x0,y0,x1,y1". Raises ValueError, with one line to show, where it is no box on the 8 x 8 grid."""
    match = re.fullmatch(",".join(["([0-9])"] * 4), text)
    if match is None:
        raise ValueError(_not_a_box(text))
    x0, y0, x1, y1 = map(int, match.groups())
    return _checked((x0, y0, x1, y1), text)


def _checked(box: Box, text: str) -> Box:
    x0, y0, x1, y1 = box
    if not (0 <= x0 <= x1 < GRID and 0 <= y0 <= y1 < GRID):
        raise ValueError(_not_a_box(text))
    return box


def _not_a_box(text: str) -> str:
    return f"{text!r} is no region: give x0,y0,x1,y1 with x0 <= x1 and y0 <= y1, whole numbers from 0 to {GRID - 1}"


def _excess(relevance: Tensor, floor: float) -> Tensor:
    """(B, N) squared excess over the floor, a row's lowest counted as 0 and its highest as 1; 1 for a flat map."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    # The values of a flat map differ by rounding, which is no sign of where to look.
    flat = high - low <= 1e-9 * relevance.abs().amax(1, keepdim=True)
    excess = ((relevance - low) / (high - low).masked_fill(flat, 1.0) - floor).clamp(min=0) ** 2
    return excess.masked_fill(flat, 1.0)


def _mass(excess: Tensor, views: tuple[View, ...]) -> Tensor:
    """(B, 64) mass per cell, row-major, which sums to 1; 0 where no view covers a cell."""
    total = torch.zeros(len(excess), GRID, GRID, dtype=torch.float64)
    area = torch.zeros(GRID, GRID, dtype=torch.float64)
    for view, values in zip(views, excess.split([view.count for view in views], 1), strict=True):
        left, top, right, bottom = view.box
        down, across = _overlap(top, bottom, view.rows), _overlap(left, right, view.cols)
        total += down @ values.unflatten(1, (view.rows, view.cols)) @ across.T
        area += torch.outer(down.sum(1), across.sum(1))
    covered = area > 1e-6  # of a cell; what rounding leaves at a view's border is less
    if not bool(covered.any()):
        raise ValueError("no view covers the picture")
    mean = torch.where(covered, total / area.clamp(min=1e-6), 0.0).flatten(1)
    sums = mean.sum(1, keepdim=True)
    # What stands out may lie where the processor has cut the picture off; then one place is as good as another.
    return torch.where(sums > 0, mean / sums.clamp(min=_TINY), covered.flatten().double() / covered.sum())


def _overlap(low: float, high: float, count: int) -> Tensor:
    """(8, count) length, in cells, that each of `count` tokens from `low` to `high` shares with each cell."""
    edges = torch.linspace(low * GRID, high * GRID, count + 1, dtype=torch.float64)
    return (edges - torch.arange(GRID)[:, None]).clamp(0, 1).diff(dim=1)


def _cell_along(low: float, high: float, count: int) -> Tensor:
    """(count,) the cell of each token's centre; below 0 or above 7 where it lies outside the picture."""
    centres = low + (torch.arange(count, dtype=torch.float64) + 0.5) * ((high - low) / count)
    return (centres * GRID + 1e-9).floor()  # a centre on a border belongs to the cell after it, despite rounding
