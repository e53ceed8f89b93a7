"""Zones partition every view into rectangles of nearly the same size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.pruning.signals import View
from gridprune_cli.pruning.zones import zone_index

sides = st.integers(1, 20)
views = st.lists(st.builds(View, sides, sides), min_size=1, max_size=3).map(tuple)


@settings(deadline=None)
@given(views, st.integers(1, 7), st.integers(1, 7))
def test_every_token_lies_in_the_rectangle_of_its_zone(views, height, width):
    index, zones = zone_index(views, (height, width))
    expected = []
    rectangles = zones.rectangles()
    for number, view in enumerate(views):
        for row in range(view.rows):
            for col in range(view.cols):
                hits = [
                    zone
                    for zone, (of, top, left, bottom, right) in enumerate(rectangles)
                    if of == number and top <= row < bottom and left <= col < right
                ]
                assert len(hits) == 1  # a partition
                expected += hits
    assert index.tolist() == expected
    assert index.dtype == torch.int64
    assert zones.count == len(rectangles) == len(set(expected))  # no zone is empty


@settings(deadline=None)
@given(views, st.integers(1, 7), st.integers(1, 7))
def test_zones_are_no_larger_than_asked_and_differ_by_one_at_most(views, height, width):
    _, zones = zone_index(views, (height, width))
    for number, (view, grid) in enumerate(zip(views, zones.grids, strict=True)):
        assert grid == (-(-view.rows // height), -(-view.cols // width))
        of_view = [rectangle[1:] for rectangle in zones.rectangles() if rectangle[0] == number]
        heights = {bottom - top for top, _, bottom, _ in of_view}
        widths = {right - left for _, left, _, right in of_view}
        assert max(heights) <= height and max(heights) - min(heights) <= 1
        assert max(widths) <= width and max(widths) - min(widths) <= 1


def test_a_grid_that_zones_divide_and_a_second_view():
    index, zones = zone_index((View(4, 4), View(1, 3)), 2)
    assert index.tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3, 2, 2, 3, 3, 4, 5, 5]
    assert zones.grids == ((2, 2), (1, 2))
    assert zones.rectangles()[3:] == [(0, 2, 2, 4, 4), (1, 0, 0, 1, 1), (1, 0, 1, 1, 3)]


@pytest.mark.parametrize("size", [0, -1, (2, 0), (0, 2)])
def test_a_zone_has_a_token_at_least(size):
    with pytest.raises(ValueError, match="zone"):
        zone_index((View(4, 4),), size)
