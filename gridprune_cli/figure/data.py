"""A figure's contents, checked, and where they lie on a canvas: what both drawings start from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageOps

Zone = tuple[int, int, int, int, int, int]  # view, row0, col0, row1, col1 (exclusive ends, in tokens), budget
Rect = tuple[int, int, int, int]  # left, top, right, bottom in pixels, exclusive ends
Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the picture

REGION_GRID = 8  # the contextual region counts cells of an 8 x 8 grid over the picture
REGION = (0, 190, 214)  # the colour of its border


class View(Protocol):
    """The grid of one view and the part of the picture that it covers, as in `pruning.signals.View`."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def box(self) -> Box: ...


@dataclass(frozen=True)
class Figure:
    """What a figure shows. N visual tokens: the views in turn, each row-major.

    kept       indices in 0..N-1
    relevance  N finite values, or None where the method used none
    zones      rectangles of tokens, with the budget of each; empty for methods without zones
    region     the contextual region, inclusive x0, y0, x1, y1 on the 8 x 8 grid over the picture
    details    a line such as "28 of 256 tokens · gridprune"
    """

    image: Image.Image
    views: Sequence[View]
    kept: Sequence[int]
    question: str
    answer: str | None = None
    details: str = ""
    relevance: Sequence[float] | None = None
    zones: Sequence[Zone] = ()
    region: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where a view is empty, something lies outside its grid, or relevance doesn't fit."""
        count = sum(view.rows * view.cols for view in self.views)
        if not count:
            raise ValueError("there are no views to draw")
        for n, view in enumerate(self.views):
            left, top, right, bottom = view.box
            if view.rows < 1 or view.cols < 1 or not (left < right and top < bottom):
                raise ValueError(f"view {n} is empty")
        if any(not 0 <= token < count for token in self.kept):
            raise ValueError(f"kept has indices outside 0..{count - 1}")
        if self.relevance is not None and len(self.relevance) != count:
            raise ValueError(f"relevance has {len(self.relevance)} values, the views have {count} tokens")
        if self.relevance is not None and not all(map(math.isfinite, self.relevance)):
            raise ValueError("relevance has values that are not finite")
        for n, row0, col0, row1, col1, _ in self.zones:
            if not (0 <= n < len(self.views)):
                raise ValueError(f"a zone is in view {n}, there are {len(self.views)} views")
            if not (0 <= row0 < row1 <= self.views[n].rows and 0 <= col0 < col1 <= self.views[n].cols):
                raise ValueError(f"a zone of view {n} leaves its grid")
        if self.region is not None:
            x0, y0, x1, y1 = self.region
            if not (0 <= x0 <= x1 < REGION_GRID and 0 <= y0 <= y1 < REGION_GRID):
                raise ValueError(f"region {self.region} is no box on the {REGION_GRID} x {REGION_GRID} grid")


@dataclass(frozen=True)
class Panel:
    """Where the picture lies on a canvas. `extent` is what the canvas shows, in fractions of the picture.

    left, top, width, height are pixels of the canvas.
    """

    left: int
    top: int
    width: int
    height: int
    extent: Box

    def place(self, box: Box) -> Rect:
        """A box in fractions of the picture, in pixels, at least one pixel each way."""
        x0, y0, x1, y1 = self.extent
        left = self.left + round((box[0] - x0) / (x1 - x0) * self.width)
        top = self.top + round((box[1] - y0) / (y1 - y0) * self.height)
        right = self.left + round((box[2] - x0) / (x1 - x0) * self.width)
        bottom = self.top + round((box[3] - y0) / (y1 - y0) * self.height)
        return left, top, max(right, left + 1), max(bottom, top + 1)

    def cells(self, view: View, row0: int, col0: int, row1: int, col1: int) -> Rect:
        """A rectangle of a view's tokens (exclusive ends), in pixels."""
        left, top, right, bottom = view.box
        dx, dy = (right - left) / view.cols, (bottom - top) / view.rows
        return self.place((left + col0 * dx, top + row0 * dy, left + col1 * dx, top + row1 * dy))

    def region(self, region: tuple[int, int, int, int]) -> Rect:
        """The contextual region, in pixels."""
        x0, y0, x1, y1 = region
        return self.place((x0 / REGION_GRID, y0 / REGION_GRID, (x1 + 1) / REGION_GRID, (y1 + 1) / REGION_GRID))


def starts(views: Sequence[View]) -> list[int]:
    """Index of each view's first token, then N: one more than there are views."""
    first = [0]
    for view in views:
        first.append(first[-1] + view.rows * view.cols)
    return first


def kept_mask(figure: Figure, layer: Sequence[int], panel: Panel) -> Image.Image:
    """An "L" image of the panel's size, 255 where a view of the layer keeps a token."""
    mask = Image.new("L", (panel.width, panel.height))
    first = starts(figure.views)
    for n in layer:
        view = figure.views[n]
        for token in figure.kept:
            if first[n] <= token < first[n + 1]:
                row, col = divmod(token - first[n], view.cols)
                x0, y0, x1, y1 = panel.cells(view, row, col, row + 1, col + 1)
                mask.paste(255, (x0 - panel.left, y0 - panel.top, x1 - panel.left, y1 - panel.top))
    return mask


def dimmed(picture: Image.Image) -> Image.Image:
    """Darker, and nearly gray: how dropped tokens are drawn."""
    muted = Image.blend(picture, ImageOps.grayscale(picture).convert("RGB"), 0.75)
    return muted.point(lambda value: round(value * 0.42))
