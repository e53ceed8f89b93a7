"""Zones: rectangles of about the same size that partition the grid of every view."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from gridprune_cli.pruning.signals import View

Rectangle = tuple[int, int, int, int, int]  # view, top, left, bottom, right in tokens; bottom and right are exclusive


@dataclass(frozen=True)
class Zones:
    """How the views are cut. Zones are numbered row-major within a view, and on from one view to the next."""

    views: tuple[View, ...]
    grids: tuple[tuple[int, int], ...]  # how many rows and columns of zones each view has

    @property
    def count(self) -> int:
        """Z, over all views."""
        return sum(rows * cols for rows, cols in self.grids)

    def rectangles(self) -> list[Rectangle]:
        """Every zone's rectangle, in the order of the zones' numbers; for figures and reports."""
        return [
            (number, top, left, bottom, right)
            for number, (view, (rows, cols)) in enumerate(zip(self.views, self.grids, strict=True))
            for top, bottom in _borders(view.rows, rows)
            for left, right in _borders(view.cols, cols)
        ]


@lru_cache(maxsize=64)  # of one model, most images have the same views
def zone_index(views: tuple[View, ...], size: int | tuple[int, int]) -> tuple[Tensor, Zones]:
    """Each token's zone, (N,) int64, and the zones. `size` is a zone's height and width in tokens, or its side.

    A side of R tokens is cut into ceil(R / height) zones with borders at floor(i * R / zones): no zone is larger than
    `size`, and heights (and widths) differ by one at most. The tensor is shared by all who ask; don't write to it.
    Raises ValueError where `size` is below 1.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise ValueError(f"a zone is at least 1 token high and wide, not {height} x {width}")
    grids = tuple((-(-view.rows // height), -(-view.cols // width)) for view in views)
    zones = Zones(tuple(views), grids)
    numbers, first = [], 0
    for view, (rows, cols) in zip(views, grids, strict=True):
        row, col = zone_along(view.rows, rows), zone_along(view.cols, cols)
        numbers.append((first + row[:, None] * cols + col).flatten())
        first += rows * cols
    return torch.cat(numbers), zones


def _borders(length: int, zones: int) -> list[tuple[int, int]]:
    """Start and end of each zone along one side."""
    return [(i * length // zones, (i + 1) * length // zones) for i in range(zones)]


def zone_along(length: int, zones: int) -> Tensor:
    """(length,) the zone of each position along one side: `_borders` solved for i."""
    return (torch.arange(1, length + 1) * zones - 1) // length
