"""Budgets against exact arithmetic: fractions, round by round."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gridprune_cli.pruning.budget import allocate, allocate_by_logits


def exact_shares(weights, caps, k):
    """Proportional shares; what full zones can't take is shared out again among the rest, until nothing overflows."""
    shares = [Fraction(0)] * len(caps)
    for weighted in (True, False):
        open_ = [j for j in range(len(caps)) if (weights[j] > 0) == weighted]
        weight = {j: Fraction(weights[j]) if weighted else Fraction(1) for j in open_}
        left = min(k, sum(caps[j] for j in open_))
        k -= left
        while open_:
            total = sum(weight[j] for j in open_)
            full = [j for j in open_ if left * weight[j] / total >= caps[j]]
            if not full:
                for j in open_:
                    shares[j] = left * weight[j] / total
                break
            for j in full:
                shares[j] = Fraction(caps[j])
                left -= caps[j]
                open_.remove(j)
    return shares


def exact_budgets(weights, caps, k):
    """Largest remainder of the exact shares, and whether a near-tie decided who got the last token."""
    shares = exact_shares(weights, caps, k)
    budgets = [math.floor(share) for share in shares]
    order = sorted(range(len(caps)), key=lambda j: (budgets[j] - shares[j], j))
    left = k - sum(budgets)
    for j in order[:left]:
        budgets[j] += 1
    rest = [shares[j] - math.floor(shares[j]) for j in order]
    return budgets, 0 < left < len(order) and rest[left - 1] - rest[left] < 1e-9


weight = st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.floats(1e-90, 1e90))


@st.composite
def problems(draw):
    zones = draw(st.lists(st.tuples(weight, st.integers(0, 30)), min_size=1, max_size=40))
    weights, caps = zip(*zones, strict=True)
    return weights, caps, draw(st.integers(0, sum(caps)))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_sums_to_k_within_the_caps_like_exact_arithmetic(problem):
    weights, caps, k = problem
    budgets = allocate(torch.tensor(weights, dtype=torch.float64), torch.tensor(caps), k)
    assert budgets.dtype == torch.int64
    assert int(budgets.sum()) == k
    assert all(0 <= budget <= cap for budget, cap in zip(budgets.tolist(), caps, strict=True))
    expected, tied = exact_budgets(weights, caps, k)
    if not tied:
        assert budgets.tolist() == expected


@settings(max_examples=100, deadline=None)
@given(st.data(), st.integers(1, 8))
def test_rows_are_split_each_by_itself(data, zones):
    zone = st.tuples(weight, st.integers(0, 30))
    rows = data.draw(st.lists(st.lists(zone, min_size=zones, max_size=zones), min_size=1, max_size=6))
    weights = torch.tensor([[weight for weight, _ in row] for row in rows], dtype=torch.float64)
    caps = torch.tensor([[cap for _, cap in row] for row in rows])
    ks = torch.tensor([data.draw(st.integers(0, room)) for room in caps.sum(1).tolist()])
    alone = [allocate(*row) for row in zip(weights, caps, ks.tolist(), strict=True)]
    assert torch.equal(allocate(weights, caps, ks), torch.stack(alone))
    assert torch.equal(allocate(weights[None], caps[None], ks[None])[0], torch.stack(alone))


@pytest.mark.parametrize(
    ("weights", "caps", "k", "expected"),
    [
        ([5, 3, 2], [100, 100, 100], 10, [5, 3, 2]),
        ([1, 1, 1], [9, 9, 9], 4, [2, 1, 1]),  # a tie goes to the lower index
        ([1, 1, 1], [9, 9, 9], 5, [2, 2, 1]),
        ([8, 1, 1], [2, 9, 9], 10, [2, 4, 4]),  # a full zone's surplus goes to the others
        ([8, 3, 1], [2, 9, 9], 10, [2, 6, 2]),  # in proportion: 8 * 3/4, 8 * 1/4
        ([16, 8, 1], [2, 3, 9], 10, [2, 3, 5]),  # and on, where that fills the next one
        ([0, 0, 0], [9, 9, 9], 3, [1, 1, 1]),  # no weight at all: uniform
        ([1, 0, 0], [2, 9, 9], 6, [2, 2, 2]),  # zones without weight only where the others are full
        ([1, 1e-30, 0], [2, 9, 9], 6, [2, 4, 0]),  # any weight counts before none
        ([1, 1e16, 1e16], [9, 4, 4], 8, [0, 4, 4]),  # a share too small for the sums' precision
        ([1, 2], [3, 4], 7, [3, 4]),
        ([1, 2], [3, 4], 0, [0, 0]),
        ([7], [3], 2, [2]),
    ],
)
def test_by_hand(weights, caps, k, expected):
    for dtype in (torch.float32, torch.float64):
        assert allocate(torch.tensor(weights, dtype=dtype), torch.tensor(caps), k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_count_as_what_they_hold(dtype):
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1)).to(dtype)
    caps = torch.full((50,), 12)
    assert torch.equal(allocate(weights, caps, 333), allocate(weights.double(), caps, 333))
    assert int(allocate(weights, caps, 333).sum()) == 333


def test_many_zones_that_fill_one_after_another():
    """Each round of sharing out again would fill one zone only."""
    zones = 400
    weights = torch.tensor([0.5**j for j in range(zones)], dtype=torch.float64)
    caps = torch.full((zones,), 3)
    k = 3 * zones - 10
    assert allocate(weights, caps, k).tolist() == exact_budgets(weights.tolist(), caps.tolist(), k)[0]


@pytest.mark.parametrize(
    ("weights", "caps", "k"),
    [
        ([1.0, 1.0], [2, 2], 5),
        ([1.0, 1.0], [2, 2], -1),
        ([1.0, -1.0], [2, 2], 1),
        ([1.0, math.nan], [2, 2], 1),
        ([1.0, math.inf], [2, 2], 1),
        ([1.0, 1.0], [2, -1], 1),
    ],
)
def test_what_cannot_be_is_an_error(weights, caps, k):
    with pytest.raises(ValueError):
        allocate(torch.tensor(weights), torch.tensor(caps), k)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1, 1), st.integers(0, 3)), min_size=1, max_size=20), st.floats(0.01, 10), st.data()
)
def test_logits_are_split_like_their_softmax(zones, temperature, data):
    logits, caps = [mean / temperature for mean, _ in zones], [cap for _, cap in zones]
    k = data.draw(st.integers(0, sum(caps)))
    budgets = allocate_by_logits(torch.tensor(logits, dtype=torch.float64), torch.tensor(caps), k)
    expected, tied = exact_budgets([math.exp(logit) for logit in logits], caps, k)
    assert tied or budgets.tolist() == expected


def test_logits_too_far_apart_for_a_softmax():
    """The order of what would underflow is heeded, in each row by itself."""
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.25, 0.0], [3.0, 3.0, 3.0, 3.0, -math.inf]], dtype=torch.float64)
    caps = torch.tensor([[1, 1, 1, 1, 1], [2, 0, 2, 2, 9]])
    budgets = allocate_by_logits(logits / 1e-300, caps, torch.tensor([3, 7]))
    assert budgets.tolist() == [[0, 1, 1, 1, 0], [2, 0, 2, 2, 1]]
    with pytest.raises(ValueError, match="finite"):
        allocate_by_logits(torch.tensor([1.0, math.inf]), torch.tensor([1, 1]), 1)
