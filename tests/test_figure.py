import io
import random
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
from PIL import Image

from gridprune_cli.figure import Figure, coarse, draw

SIDE, LEFT, RIGHT, TOP = 568, 20, 612, 62  # panels of a square picture in a figure 1200 pixels wide
ORANGE = (200, 120, 40)


@dataclass(frozen=True)
class Grid:
    rows: int
    cols: int
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)


def flat(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, ORANGE)


def plain(**changes: Any) -> Figure:
    """A 4 x 4 grid over a picture of one colour; tokens 5 and 6 kept."""
    base = Figure(image=flat(), views=[Grid(4, 4)], kept=[5, 6], question="What is it?", answer="A square")
    return replace(base, **changes)


def at(image: Image.Image, x: float, y: float, left: int = LEFT, side: int = SIDE) -> tuple[int, int, int]:
    """The pixel at a place given in fractions of a square panel."""
    pixel = image.getpixel((left + int(x * side), TOP + int(y * side)))
    assert isinstance(pixel, tuple)
    return pixel[0], pixel[1], pixel[2]


def light(pixel: tuple[int, int, int]) -> float:
    return 0.299 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]


def centre(token: int, grid: Grid) -> tuple[float, float]:
    row, col = divmod(token, grid.cols)
    return (col + 0.5) / grid.cols, (row + 0.5) / grid.rows


def yellow(pixel: tuple[int, int, int]) -> bool:
    """The colour of the contour round kept tokens."""
    return pixel[0] > 240 and 150 < pixel[1] < 210 and pixel[2] < 80


def cyan(pixel: tuple[int, int, int]) -> bool:
    """The colour of the region's border."""
    return pixel[0] < 40 and pixel[1] > 150 and pixel[2] > 170


def test_kept_tokens_keep_their_colour_and_dropped_ones_are_dimmed() -> None:
    grid, kept = Grid(6, 6), [0, 7, 14, 30, 35]
    image = draw(plain(views=[grid], kept=kept))
    for token in range(36):
        pixel = at(image, *centre(token, grid))
        if token in kept:
            assert pixel == ORANGE
        else:
            assert light(pixel) < 0.5 * light(ORANGE)
            assert max(pixel) - min(pixel) < 0.25 * (max(ORANGE) - min(ORANGE))


def test_neighbouring_kept_tokens_share_one_contour() -> None:
    image = draw(plain())
    for x in (0.255, 0.745):  # outer sides of tokens 5 and 6
        assert any(yellow(at(image, x + dx / SIDE, 0.375)) for dx in range(-3, 3))
    assert not any(yellow(at(image, 0.5 + dx / SIDE, 0.375)) for dx in range(-8, 8))  # the side between them


def test_the_contour_runs_on_across_tiles() -> None:
    tiles = [Grid(2, 2, (0.0, 0.0, 0.5, 1.0)), Grid(2, 2, (0.5, 0.0, 1.0, 1.0))]
    image = draw(plain(views=tiles, kept=[1, 4]))
    assert not any(yellow(at(image, 0.5 + dx / SIDE, 0.25)) for dx in range(-8, 8))
    assert any(yellow(at(image, 0.25 + dx / SIDE, 0.25)) for dx in range(0, 6))


def test_heat_rises_with_relevance() -> None:
    grid = Grid(4, 4)
    order = random.Random(3).sample(range(16), 16)
    image = draw(plain(relevance=[float(order[i]) for i in range(16)]))
    lights = [light(at(image, *centre(order.index(rank), grid), left=RIGHT)) for rank in range(16)]
    assert all(low < high for low, high in pairwise(lights))


def test_equal_relevance_is_drawn_as_lowest() -> None:
    image = draw(plain(relevance=[0.3] * 16))
    lowest = draw(plain(relevance=[0.0] * 15 + [1.0]))
    assert at(image, 0.1, 0.1, RIGHT) == at(image, 0.9, 0.9, RIGHT) == at(lowest, 0.1, 0.1, RIGHT)


def test_without_relevance_the_second_panel_is_the_picture() -> None:
    image = draw(plain())
    assert {at(image, x / 10, y / 10, RIGHT) for x in range(1, 10) for y in range(1, 10)} == {ORANGE}


@pytest.mark.parametrize("left", [LEFT, RIGHT])
def test_the_region_is_outlined_where_it_lies(left: int) -> None:
    image = draw(plain(region=(1, 2, 3, 6), relevance=[0.0] * 16, kept=[]))
    sides = {(1 / 8, 0.8), (4 / 8, 0.8)}
    for x, y in sides:
        columns = [dx for dx in range(-12, 12) if cyan(at(image, x + (dx + 0.5) / SIDE, y, left))]
        assert len(columns) >= 4
        assert (max(columns) < 0) if x == 1 / 8 else (min(columns) >= 0)  # round the region, not over it
        assert max(map(abs, columns)) <= 6
    for y in (2 / 8, 7 / 8):
        assert sum(cyan(at(image, 0.4, y + (dy + 0.5) / SIDE, left)) for dy in range(-7, 7)) >= 4
    assert not cyan(at(image, 0.3, 0.5, left))
    assert not cyan(at(image, 0.7, 0.5, left))


def test_no_region_draws_no_border() -> None:
    image = draw(plain(relevance=[0.0] * 16))
    assert not any(
        cyan(at(image, x / 200, y / 200, left)) for left in (LEFT, RIGHT) for x in range(200) for y in range(200)
    )


def test_the_region_label_stays_off_kept_tokens() -> None:
    def label(image: Image.Image, x: float, y: float) -> bool:
        return any(cyan(at(image, x + dx / SIDE, y)) for dx in range(100))

    free = plain(kept=[], region=(1, 1, 3, 4))
    assert label(draw(free), 0.15, 0.1)  # above the region
    gap = [token for token in range(256) if not (token // 16 in (8, 9) and token % 16 >= 8)]
    crowded = draw(replace(free, views=[Grid(16, 16)], kept=gap))  # tokens are dropped right of the region's foot only
    assert not label(crowded, 0.15, 0.1)
    assert label(crowded, 0.52, 0.61)


def test_zones_are_marked_and_carry_their_budgets() -> None:
    zones = [(0, 0, 0, 2, 2, 1), (0, 0, 2, 2, 4, 1), (0, 2, 0, 4, 2, 0), (0, 2, 2, 4, 4, 0)]
    bare, zoned = draw(plain(kept=[])), draw(plain(kept=[], zones=zones))
    dropped = at(bare, 0.1, 0.3)
    line = [at(zoned, 0.5 + dx / SIDE, y / 200) for y in range(10, 80) for dx in (-1, 0)]
    assert sum(light(p) > light(dropped) + 40 for p in line) > 20  # the dashes
    assert sum(light(p) <= light(dropped) + 10 for p in line) > 20  # and the gaps
    corner = (LEFT + SIDE // 2 - 40, TOP + SIDE // 2 - 30, LEFT + SIDE // 2 - 4, TOP + SIDE // 2 - 4)
    assert max(zoned.crop(corner).convert("L").tobytes()) > 200  # a light figure on
    assert min(zoned.crop(corner).convert("L").tobytes()) < light(dropped) - 5  # a dark plate
    assert zoned.tobytes() != draw(plain(kept=[], zones=[(*zone[:5], 7) for zone in zones])).tobytes()


def test_tiny_zones_go_without_budgets() -> None:
    grid = Grid(48, 48)
    cells = [(0, r, c, r + 1, c + 1) for r in range(48) for c in range(48)]
    one, two = (draw(plain(views=[grid], kept=[], zones=[(*cell, n) for cell in cells])) for n in (1, 2))
    assert one.tobytes() == two.tobytes()


def test_overlapping_views_get_rows_of_their_own() -> None:
    quarters = [Grid(4, 4, (x, y, x + 0.5, y + 0.5)) for y in (0.0, 0.5) for x in (0.0, 0.5)]
    views = [Grid(4, 4), *quarters]
    one = draw(plain(views=views[:1], kept=[]))
    two = draw(plain(views=views, kept=[16 + 16 + 5, 5]))  # the base view's token 5, and that of the top right tile
    row = two.height - one.height
    assert row >= SIDE
    assert at(two, 0.375, 0.375) == ORANGE
    x, y = 0.5 + 0.5 * 0.375, 0.5 * 0.375
    assert at(two, x, y) != ORANGE
    assert two.getpixel((LEFT + int(x * SIDE), TOP + row + int(y * SIDE))) == ORANGE
    assert two.getpixel((LEFT + int(0.375 * SIDE), TOP + row + int(0.375 * SIDE))) != ORANGE


def test_padding_is_shown_where_a_view_has_it() -> None:
    padded = Grid(4, 4, (0.0, -0.5, 1.0, 1.5))  # a 2:1 picture, padded to a square
    image = draw(plain(image=flat((128, 64)), views=[padded], kept=[5]))
    assert at(image, 0.375, 0.375) == ORANGE
    assert min(at(image, 0.375, 0.1)) > 220
    assert max(at(image, 0.9, 0.6)) < 110


@pytest.mark.parametrize("width", [200, 600, 1200, 1501])
def test_the_figure_has_the_asked_width(width: int) -> None:
    assert draw(plain(), width).width == width


def test_wide_pictures_stack_their_panels() -> None:
    image = draw(plain(image=flat((800, 200)), views=[Grid(4, 4)]))
    assert image.getpixel((20 + 1160 * 3 // 8, 62 + 290 * 3 // 8)) == ORANGE
    assert image.getpixel((1150, 62 + 290 + 12 + 42 + 145)) == ORANGE  # the picture, under the first panel


def test_tall_pictures_grow_until_tokens_are_legible() -> None:
    image = draw(plain(image=flat((20, 100)), views=[Grid(24, 24)], kept=range(576)))
    wide = sum(image.getpixel((x, 700)) == ORANGE for x in range(600))
    assert 24 * 12 - 8 <= wide <= 24 * 12


def test_the_same_figure_gives_the_same_bytes() -> None:
    def png() -> bytes:
        file = io.BytesIO()
        draw(plain(region=(0, 0, 3, 3), zones=[(0, 0, 0, 4, 4, 2)], relevance=[i / 9 for i in range(16)])).save(
            file, "PNG"
        )
        return file.getvalue()

    assert png() == png()


def test_long_texts_wrap_inside_the_figure() -> None:
    short, long = draw(plain(), 600), draw(plain(answer="word " * 100, question="x" * 400), 600)
    assert long.height > short.height + 60
    margin = long.crop((592, short.height - 60, 600, long.height))
    assert margin.getcolors() == [(margin.width * margin.height, (255, 255, 255))]


@pytest.mark.parametrize(
    "changes",
    [
        {"views": [Grid(1, 9)], "kept": [0, 8]},
        {"views": [Grid(9, 1)], "kept": [4], "region": (0, 0, 0, 0)},
        {"kept": range(16), "region": (0, 0, 7, 7), "relevance": [0.0] * 16},
        {"kept": []},
        {"image": flat((1, 1)), "region": (3, 3, 4, 4), "zones": [(0, 0, 0, 4, 4, 2)]},
        {"image": flat((3000, 3)), "region": (3, 3, 4, 4), "zones": [(0, 0, 0, 4, 4, 2)]},
        {"image": flat((3, 3000)), "region": (3, 3, 4, 4), "zones": [(0, 0, 0, 4, 4, 2)]},
        {"image": Image.new("L", (30, 30), 90), "relevance": [-1e30] * 15 + [1e30]},
        {"question": "ما هذا؟ 这是什么 नमस्ते", "answer": "图" * 300, "details": "naïve \u2013 “é” \ud800\x00\n\t🙂"},
        {"question": "", "answer": None},
    ],
)
def test_odd_figures_are_drawn(changes: dict[str, Any]) -> None:
    figure = plain(**changes)
    assert draw(figure, 400).width == 400
    assert coarse(figure, colour=True) and coarse(figure, colour=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"views": []},
        {"views": [Grid(4, 4), Grid(0, 4)]},
        {"views": [Grid(4, 4, (0.5, 0.0, 0.5, 1.0))]},
        {"kept": [16]},
        {"kept": [-1]},
        {"relevance": [0.0] * 15},
        {"relevance": [0.0] * 15 + [float("nan")]},
        {"zones": [(1, 0, 0, 2, 2, 1)]},
        {"zones": [(0, 0, 0, 5, 2, 1)]},
        {"region": (0, 0, 8, 7)},
        {"region": (3, 0, 2, 7)},
    ],
)
def test_what_does_not_fit_the_grids_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        plain(**changes)


def test_sizes_too_small_to_draw_are_refused() -> None:
    with pytest.raises(ValueError):
        draw(plain(), 199)
    with pytest.raises(ValueError):
        coarse(plain(), colour=False, columns=0)


# ---- the terminal ----------------------------------------------------------------------------------------------------


def test_coarse_marks_kept_and_dropped() -> None:
    assert coarse(plain(), colour=False, columns=8).split("\n") == ["........", "..####..", "........", "........"]


def test_coarse_marks_the_region() -> None:
    text = coarse(plain(region=(0, 0, 3, 7)), colour=False, columns=8)
    assert text.split("\n") == ["+--+....", "|.#|##..", "|..|....", "+--+...."]


@pytest.mark.parametrize(
    ("size", "columns", "lines"), [((64, 64), 48, 24), ((400, 100), 48, 6), ((100, 100), 10, 5), ((50, 400), 48, 48)]
)
def test_coarse_has_the_shape_of_the_picture(size: tuple[int, int], columns: int, lines: int) -> None:
    figure = plain(image=flat(size))
    text = coarse(figure, colour=False, columns=columns).split("\n")
    assert len(text) == lines
    assert {len(line) for line in text} == {min(columns, round(2 * lines * size[0] / size[1]))}
    assert "\x1b" not in "".join(text)
    coloured = coarse(figure, colour=True, columns=columns).split("\n")
    assert [line.count("▀") for line in coloured] == [len(text[0])] * lines
    assert all(line.endswith("\x1b[0m") for line in coloured)


def test_coarse_colours_kept_tokens_as_they_are() -> None:
    line = coarse(plain(views=[Grid(1, 2)], kept=[1]), colour=True, columns=2)
    dropped, kept, _ = line.split("▀")
    colour = "200;120;40"
    assert kept == f"\x1b[38;2;{colour};48;2;{colour}m"
    assert colour not in dropped
