"""The contextual region against loops over tokens, cells and boxes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.pruning.region import contextual_region, contextual_regions, inside, inside_each, parse_box
from gridprune_cli.pruning.signals import View

TILES = tuple(View(6, 6, (x, y, x + 0.5, y + 0.5)) for y in (0.0, 0.5) for x in (0.0, 0.5))
LAYOUTS = [
    (View(24, 24),),
    (View(8, 8),),
    (View(7, 11),),
    (View(1, 13),),
    (View(3, 2),),
    (View(6, 6), *TILES),
    (View(9, 9, (0.2, 0.0, 0.8, 1.0)),),  # the middle of a wide picture
    (View(10, 10, (0.0, -0.4, 1.0, 1.4)),),  # a wide picture padded to a square
]


def token_boxes(views):
    """Left, top, right, bottom of every token, in fractions of the picture."""
    for view in views:
        left, top, right, bottom = view.box
        width, height = (right - left) / view.cols, (bottom - top) / view.rows
        for row in range(view.rows):
            for col in range(view.cols):
                x, y = left + col * width, top + row * height
                yield x, y, x + width, y + height


def slow_scores(relevance, views, floor, area_price):
    """Every box with its score, from the definition."""
    least, most = min(relevance), max(relevance)
    excess = [max(0.0, (value - least) / (most - least) - floor) ** 2 for value in relevance]
    powers = {}
    for row in range(8):
        for col in range(8):
            total = area = 0.0
            for value, (left, top, right, bottom) in zip(excess, token_boxes(views), strict=True):
                wide = min(right, (col + 1) / 8) - max(left, col / 8)
                high = min(bottom, (row + 1) / 8) - max(top, row / 8)
                if wide > 0 and high > 0:
                    total, area = total + value * wide * high, area + wide * high
            if area > 1e-8:
                powers[row, col] = total / area
    whole = sum(powers.values())
    scores = {}
    for y0 in range(8):
        for y1 in range(y0, 8):
            for x0 in range(8):
                for x1 in range(x0, 8):
                    cells = [(y, x) for y in range(y0, y1 + 1) for x in range(x0, x1 + 1)]
                    mass = sum(powers.get(cell, 0.0) for cell in cells) / whole
                    scores[x0, y0, x1, y1] = mass - area_price * len(cells)
    return scores


def first_of_the_best(scores):
    best = max(scores.values())
    tied = [box for box, score in scores.items() if score >= best - 1e-9]
    return min(tied, key=lambda b: ((b[2] - b[0] + 1) * (b[3] - b[1] + 1), b[1], b[0], b[3]))


@pytest.mark.parametrize("views", LAYOUTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_box_of_all(views, seed):
    generator = torch.Generator().manual_seed(seed)
    relevance = torch.rand(sum(view.count for view in views), generator=generator, dtype=torch.float64)
    floor, price = ((0.3, 1 / 128), (0.6, 0.02))[seed]
    box = contextual_region(relevance, views, floor=floor, area_price=price)
    assert box == first_of_the_best(slow_scores(relevance.tolist(), views, floor, price))


@pytest.mark.parametrize("views", LAYOUTS)
def test_maps_are_searched_each_by_itself(views):
    count = sum(view.count for view in views)
    maps = torch.rand(9, count, generator=torch.Generator().manual_seed(3))
    maps[4] = 0.1  # a flat one among them
    maps[5] = (maps[5] > 0.9).float()
    regions = contextual_regions(maps, views)
    assert regions == [contextual_region(relevance, views) for relevance in maps]
    assert torch.equal(inside_each(views, regions), torch.stack([inside(views, box) for box in regions]))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_it_finds_what_stands_out(data):
    x0, y0 = data.draw(st.integers(0, 7)), data.draw(st.integers(0, 7))
    x1, y1 = data.draw(st.integers(x0, min(x0 + 3, 7))), data.draw(st.integers(y0, min(y0 + 3, 7)))
    view = data.draw(st.sampled_from([View(24, 24), View(8, 8), View(16, 32)]))
    noise = torch.rand(view.count, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9)))) * 0.02
    relevance = 0.1 + noise + 0.2 * inside((view,), (x0, y0, x1, y1))
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert contextual_region(relevance.to(dtype), (view,)) == (x0, y0, x1, y1)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.0])
def test_a_flat_map_gives_the_whole_picture(value):
    views = (View(24, 24), *TILES)
    relevance = torch.full((sum(view.count for view in views),), value)
    assert contextual_region(relevance, views) == (0, 0, 7, 7)


def test_ties_go_to_the_top_left_then():
    """At a price of 1/64, all boxes of a flat map score 0."""
    assert contextual_region(torch.zeros(64), (View(8, 8),), area_price=1 / 64) == (0, 0, 0, 0)


def test_scale_and_shift_of_relevance_do_not_matter():
    relevance = torch.rand(576, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    views = (View(24, 24),)
    assert contextual_region(relevance, views) == contextual_region(relevance * 0.01 - 0.3, views)


def test_what_no_view_covers_is_never_worth_its_price():
    views = (View(8, 8, (0.25, 0.0, 0.75, 1.0)),)  # cells 2 to 5
    relevance = torch.rand(64, generator=torch.Generator().manual_seed(2))
    x0, _, x1, _ = contextual_region(relevance, views, floor=0.0)
    assert x0 >= 2 and x1 <= 5
    assert contextual_region(torch.zeros(64), views) == (2, 0, 5, 7)


def test_relevance_that_cannot_be_used_is_an_error():
    views = (View(2, 2),)
    for relevance in ([0.0, math.nan, 0.0, 0.0], [math.inf] * 4, [0.0] * 3):
        with pytest.raises(ValueError, match="relevance"):
            contextual_region(torch.tensor(relevance), views)
    for floor in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="floor"):
            contextual_region(torch.zeros(4), views, floor=floor)
    with pytest.raises(ValueError, match="no view"):
        contextual_region(torch.zeros(4), (View(2, 2, (1.5, 0.0, 2.0, 1.0)),))


@pytest.mark.parametrize("views", LAYOUTS)
@pytest.mark.parametrize("box", [(0, 0, 7, 7), (3, 2, 5, 6), (0, 7, 0, 7), (4, 4, 4, 4)])
def test_inside_means_the_centre(views, box):
    x0, y0, x1, y1 = box
    expected = [
        x0 <= (left + right) * 4 + 1e-9 < x1 + 1 and y0 <= (top + bottom) * 4 + 1e-9 < y1 + 1
        for left, top, right, bottom in token_boxes(views)
    ]
    assert inside(views, box).tolist() == expected


def test_a_column_of_boxes_has_every_token_once():
    """Centres that lie on a border of cells belong to one of the two."""
    for cols in range(1, 40):
        views = (View(1, cols, (0.1, 0.0, 0.9, 1.0)),)
        assert sum(inside(views, (x, 0, x, 7)).long() for x in range(8)).tolist() == [1] * cols


def test_parse_box():
    assert parse_box("1,2,3,7") == (1, 2, 3, 7)
    assert parse_box("0,0,0,0") == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "text",
    ["", "1,2,3", "1,2,3,4,5", "1,2,3,8", "3,2,1,4", "1,4,3,2", "-1,2,3,4", "1,2,3,4.0", "1,2,x,4", "1,2,3,4,",
     "1,2,3,4\n", " 1,2,3,4", "01,2,3,4", "1,2,3,٤", "1;2;3;4"],
)  # fmt: skip
def test_what_is_no_box_is_one_clear_line(text):
    with pytest.raises(ValueError, match="x0,y0,x1,y1") as caught:
        parse_box(text)
    assert "\n" not in str(caught.value)


def test_inside_needs_a_box():
    with pytest.raises(ValueError, match="region"):
        inside((View(2, 2),), (5, 0, 3, 7))
