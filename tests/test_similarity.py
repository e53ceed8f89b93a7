"""Cosines and greedy coverage, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_methods import covering

from gridprune_cli.pruning.similarity import LazyCosines, cosines, cover, summable


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cosines(dtype):
    a, b = noise(9, 33).to(dtype), noise(4, 33, seed=1).to(dtype)
    expected = torch.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)
    assert torch.allclose(cosines(a, b), expected, atol=2**-32, rtol=0)
    assert torch.equal(cosines(a), cosines(a, a)) and torch.equal(cosines(a), cosines(a).T)
    assert torch.equal(cosines(a).diagonal(), torch.ones(9, dtype=torch.float64))


def test_equal_rows_have_equal_cosines_wherever_they_stand():
    rows = noise(577, 130)
    rows[torch.tensor([5, 320, 576])] = rows[17].clone()
    alike = cosines(rows)
    assert torch.equal(alike[5], alike[17]) and torch.equal(alike[576], alike[17])
    assert torch.equal(alike[:, 320], alike[:, 17])
    assert alike[17, 576] == 1


def test_a_row_of_zeros_is_like_nothing():
    rows = noise(4, 3)
    rows[2] = 0
    assert cosines(rows)[2].tolist() == [0, 0, 0, 0]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 150),
    st.integers(1, 5),
    st.integers(0, 99),
    st.sampled_from(["plain", "copies", "zeros"]),
    st.booleans(),
)
def test_rows_computed_when_they_are_asked_for_are_those_of_the_whole(count, width, seed, kind, all_at_once):
    vectors = noise(count, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if kind == "copies":
        vectors = vectors[torch.randint(count, (count,), generator=generator)]
    if kind == "zeros":
        vectors[::2] = 0
    whole, lazy = cosines(vectors), LazyCosines(vectors)
    lazy._all_at_once = all_at_once  # as on a GPU
    others = whole.clone().fill_diagonal_(-torch.inf).amax(1)
    assert lazy.least_similar() == int(others.argmin())
    assert torch.equal(lazy.of_each_with_itself(), whole.diagonal())
    score = torch.rand(count, generator=generator)
    score[::3] = -torch.inf
    for token in torch.randperm(count, generator=generator)[:9].tolist():
        assert torch.equal(lazy.of_token(token, score), whole[token])


def test_few_rows_are_computed_where_each_token_has_others_like_it():
    vectors = noise(20, 8).repeat_interleave(20, 0) + 0.01 * noise(400, 8, seed=1)
    vectors[77] = -vectors[77]
    lazy = LazyCosines(vectors)
    assert lazy.least_similar() == int(cosines(vectors).fill_diagonal_(-torch.inf).amax(1).argmin())
    assert len(lazy._computed) <= 200


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 99), st.sampled_from([1e-9, 1.0, 1e6]), st.data())
def test_cover(height, count, seed, scale, data):
    likeness = noise(height, count, seed=seed) * scale
    if data.draw(st.booleans()):
        likeness = likeness[:, torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))]
    weight = noise(count, seed=seed + 1).abs() if data.draw(st.booleans()) else None
    k = data.draw(st.integers(1, count))
    order = cover(summable(likeness), k, weight)
    expected = covering(likeness.tolist(), [1.0] * count if weight is None else weight.tolist(), k)
    assert order.sort().values.tolist() == expected


def test_the_first_of_equal_tokens_is_taken_first():
    assert cover(torch.ones(3, 5, dtype=torch.float64), 3).tolist() == [0, 1, 2]
    assert cover(torch.zeros(3, 5, dtype=torch.float64), 2).tolist() == [0, 1]
    assert cover(-torch.ones(3, 5, dtype=torch.float64), 2).tolist() == [0, 1]
