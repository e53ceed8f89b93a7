"""Cells and their weights against loops over tokens and anchors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.pruning.compress import cell_weights, cells, pool, ratio_budget, ratios
from gridprune_cli.pruning.signals import View

LAYOUTS = [(View(8, 8),), (View(5, 7),), (View(1, 9),), (View(3, 3), View(4, 2)), (View(1, 1), View(2, 5), View(3, 1))]


@st.composite
def pruned(draw):
    """(views, kept, within, saliency) of some layout."""
    views = draw(st.sampled_from(LAYOUTS))
    count = sum(view.count for view in views)
    kept = draw(st.sets(st.integers(0, count - 1), min_size=1))
    within = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    saliency = draw(st.lists(st.sampled_from([0.0, 0.1, 1.0, 2.5]), min_size=count, max_size=count))
    return views, torch.tensor(sorted(kept)), torch.tensor(within), torch.tensor(saliency)


def slow_cells(views, kept, within):
    """Each token's cell, from the definition."""
    places = [(v, i // view.cols, i % view.cols) for v, view in enumerate(views) for i in range(view.count)]
    out = []
    for token, (view, row, col) in enumerate(places):
        if token in kept:
            out.append(kept.index(token))
            continue
        gaps = [
            ((places[anchor][1] - row) ** 2 + (places[anchor][2] - col) ** 2, j)
            for j, anchor in enumerate(kept)
            if places[anchor][0] == view and not within[anchor]
        ]
        out.append(-1 if within[token] or not gaps else min(gaps)[1])
    return out


@given(pruned())
def test_cells_are_the_nearest_anchors_outside(case):
    views, kept, within, _ = case
    cell = cells(views, kept, within)
    assert cell.tolist() == slow_cells(views, kept.tolist(), within.tolist())
    assert cell[kept].tolist() == list(range(len(kept)))  # exactly K rows, in the order of the anchors


@given(pruned())
def test_weights_of_a_cell_sum_to_one_and_follow_saliency(case):
    views, kept, within, saliency = case
    cell = cells(views, kept, within)
    weight = cell_weights(cell, saliency, len(kept))
    assert (weight >= 0).all() and (weight[cell < 0] == 0).all()
    for j in range(len(kept)):
        members = cell == j
        assert float(weight[members].sum()) == pytest.approx(1)
        total = float(saliency[members].sum())
        expected = saliency[members] / total if total else torch.full((int(members.sum()),), 1 / int(members.sum()))
        assert weight[members].tolist() == pytest.approx(expected.tolist())


@given(pruned())
def test_rows_are_the_means_of_their_cells(case):
    views, kept, within, saliency = case
    cell = cells(views, kept, within)
    weight = cell_weights(cell, saliency, len(kept))
    vision_features = torch.randn(len(within), 3, generator=torch.Generator().manual_seed(0))
    rows = pool(vision_features, cell, weight, len(kept))
    assert rows.dtype == vision_features.dtype
    for j, anchor in enumerate(kept.tolist()):
        members = [i for i in range(len(within)) if cell[i] == j]
        expected = sum(vision_features[i].double() * float(weight[i]) for i in members)
        assert rows[j].tolist() == pytest.approx(expected.tolist(), abs=1e-6)
        if within[anchor]:
            assert torch.equal(rows[j], vision_features[anchor])  # inside, kept tokens stay as they are


def test_with_everything_kept_nothing_changes():
    vision_features, within = torch.randn(64, 5), torch.arange(64) % 3 == 0
    cell = cells((View(8, 8),), torch.arange(64), within)
    assert torch.equal(pool(vision_features, cell, cell_weights(cell, torch.rand(64), 64), 64), vision_features)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((28, 40, 256, 2.0, None), (28, 20 / 28)),  # 40 / 2 rows inside, the rest outside
        ((28, 40, 256, None, 36.0), (28, 22 / 28)),  # 216 / 36 rows outside, the rest inside
        ((28, 40, 256, 2.0, 36.0), (26, 20 / 26)),  # K is what the ratios say
        ((28, 40, 256, 1.0, None), (28, 1.0)),  # no more than there is
        ((2, 40, 256, None, 36.0), (2, 0.0)),
        ((28, 0, 256, 2.0, None), (28, 0.0)),
        ((28, 256, 256, 8.0, 16.0), (32, 1.0)),
        ((28, 3, 256, 9.0, 300.0), (2, 0.5)),  # one row at least where there are tokens
    ],
)
def test_ratios_give_the_budget(arguments, expected):
    k, share = ratio_budget(*arguments)
    assert (k, share) == (expected[0], pytest.approx(expected[1]))


@given(st.integers(0, 300), st.integers(0, 300), st.floats(1, 40), st.floats(1, 40))
def test_two_ratios_are_rounded_on_their_own_sides(within, outside, first, second):
    k, share = ratio_budget(5, within, within + outside, first, second) if within + outside else (1, 1.0)
    if within + outside:
        inner = round(share * k)
        for rows, tokens, ratio in ((inner, within, first), (k - inner, outside, second)):
            assert rows == 0 if tokens == 0 else abs(rows - max(1, tokens / ratio)) <= 0.5 + 1e-9


def test_ratios_count_tokens_per_row():
    within = torch.tensor([True] * 5 + [False] * 9)
    assert ratios(torch.tensor([0, 3, 4, 6]), within) == {"inside": 1.67, "outside": 9.0}
    assert ratios(torch.tensor([0]), within) == {"inside": 5.0, "outside": None}
