"""Selection against sorting in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.pruning.select import best_by_zone, greedy_dpp, soft_nms, top, top_by_zone
from gridprune_cli.pruning.signals import View
from gridprune_cli.pruning.similarity import LazyCosines

scores = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5])  # few values: many ties


@st.composite
def problems(draw):
    tokens = draw(st.lists(st.tuples(scores, st.integers(0, 6)), min_size=1, max_size=40))
    score, zone = zip(*tokens, strict=True)
    return score, zone, [draw(st.integers(0, zone.count(j))) for j in range(7)]


@settings(deadline=None)
@given(problems(), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_each_zone_keeps_its_best(problem, dtype):
    score, zone, budgets = problem
    expected = []
    for j, budget in enumerate(budgets):
        members = [i for i in range(len(score)) if zone[i] == j]
        expected += sorted(members, key=lambda i: (-score[i], i))[:budget]
    kept = top_by_zone(torch.tensor(score, dtype=dtype), torch.tensor(zone), torch.tensor(budgets))
    assert kept.tolist() == sorted(expected)
    assert kept.dtype == torch.int64


@settings(deadline=None)
@given(st.lists(problems(), min_size=1, max_size=5))
def test_rows_keep_their_best_each_by_itself(cases):
    count = min(len(score) for score, _, _ in cases)
    score, zone = (torch.tensor([row[i][:count] for row in cases]) for i in (0, 1))
    sizes = torch.stack([torch.bincount(row_zones, minlength=7) for row_zones in zone])
    budgets = torch.minimum(sizes, torch.tensor([row[2] for row in cases]))
    for stays, *row in zip(best_by_zone(score, zone, budgets), score, zone, budgets, strict=True):
        assert torch.equal(stays.nonzero()[:, 0], top_by_zone(*row))


@settings(deadline=None)
@given(st.lists(scores, min_size=1, max_size=40), st.data())
def test_top_keeps_the_best(score, data):
    k = data.draw(st.integers(0, len(score)))
    expected = sorted(sorted(range(len(score)), key=lambda i: (-score[i], i))[:k])
    assert top(torch.tensor(score), k).tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_not_finite_are_an_error(bad):
    score = torch.tensor([0.0, bad])
    with pytest.raises(ValueError, match="finite"):
        top(score, 1)
    with pytest.raises(ValueError, match="finite"):
        top_by_zone(score, torch.tensor([0, 0]), torch.tensor([1]))


def test_budgets_that_zones_cannot_fill_are_an_error():
    score, zone = torch.zeros(3), torch.tensor([0, 1, 1])
    for budgets in ([2, 0], [0, 3], [-1, 1]):
        with pytest.raises(ValueError, match="budget"):
            top_by_zone(score, zone, torch.tensor(budgets))
    for k in (-1, 4):
        with pytest.raises(ValueError):
            top(score, k)


def test_a_token_lowers_those_near_it_in_its_own_view():
    views = (View(1, 4), View(1, 2))
    score = torch.tensor([[9.0, 8.0, 1.0, 4.0, 7.0, 0.0], [9.0, 8.0, 1.0, 4.0, 7.0, 0.0]], dtype=torch.float64)
    zone, limits = torch.zeros(2, 6, dtype=torch.long), torch.tensor([[6], [6]])
    stays = soft_nms(score, zone, limits, torch.tensor([[1], [3]]), views, 1.0)
    # beside the first token 8/9 becomes 0.35, below the 4/9 three tokens away; the other view's 7/9 stays
    assert [of_question.nonzero()[:, 0].tolist() for of_question in stays] == [[0], [0, 3, 4]]


def test_spaced_tokens_are_limited_by_zone_and_by_group():
    score = torch.tensor([[9.0, 8.0, 7.0, 6.0, 5.0, 4.0]], dtype=torch.float64)
    zone = torch.tensor([[0, 0, 1, 2, 2, 3]])  # zones 0 and 1 are the first group, 2 and 3 the second
    stays = soft_nms(score, zone, torch.tensor([[1, 1, 2, 1]]), torch.tensor([[2, 1]]), (View(1, 6),), 0.1)
    assert stays.nonzero()[:, 1].tolist() == [0, 2, 3]


def test_where_all_scores_are_equal_spaced_tokens_are_apart():
    score, zone = torch.zeros(1, 9, dtype=torch.float64), torch.zeros(1, 9, dtype=torch.long)
    stays = soft_nms(score, zone, torch.tensor([[9]]), torch.tensor([[3]]), (View(1, 9),), 2.0)
    assert stays.nonzero()[:, 1].tolist() == [0, 4, 8]


def greedy_dpp_of(weight, vectors, rest=(0.0,) * 4, zone=(0,) * 4, limits=(4,), quotas=(4,), *, k):
    likeness = LazyCosines(torch.tensor(vectors))
    limited = [torch.tensor(values) for values in (rest, zone, limits, quotas)]
    return greedy_dpp(torch.tensor(weight, dtype=torch.float64), likeness, *limited, k).nonzero()[:, 0].tolist()


VECTORS = [[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]]  # the first, the second and the last span nearly the same


def test_a_token_that_is_like_a_taken_one_adds_little():
    assert greedy_dpp_of([1.0, 0.9, 0.1, 0.9], VECTORS, k=2) == [0, 2]
    assert greedy_dpp_of([1.0, 0.9, 0.0001, 0.9], VECTORS, k=2) == [0, 1]


def test_where_no_token_adds_anything_the_rest_decides():
    assert greedy_dpp_of([1.0, 0.0, 0.0, 0.9], VECTORS, (0.0, 2.0, 3.0, 1.0), k=2) == [0, 2]
    assert greedy_dpp_of([1.0, 0.0, 0.0, 0.9], VECTORS, (0.0, 2.0, 3.0, 1.0), k=3) == [0, 1, 2]


def test_unlike_tokens_are_limited_by_zone_and_by_group():
    zone, limits = (0, 0, 1, 3), (1, 1, 2, 1)  # zones 0 and 1 are the first group, 2 and 3 the second
    assert greedy_dpp_of([1.0, 0.9, 0.1, 0.2], VECTORS, zone=zone, limits=limits, quotas=(2, 1), k=3) == [0, 2, 3]
    assert greedy_dpp_of([0.5, 0.9, 0.6, 0.2], VECTORS, zone=zone, limits=limits, quotas=(1, 1), k=2) == [1, 3]
