"""Which slots of a prompt stay."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gridprune_cli.pruning.placeholders import SEPARATOR, staying


def slowly(placeholder_map, kept):
    """Run by run, a run being what lies between two separators: one stays behind a kept token, or behind no token."""
    out, run = [], []
    for slot in placeholder_map:
        if slot == SEPARATOR:
            out += [*(token in kept for token in run), not run or any(token in kept for token in run)]
            run = []
        else:
            run.append(slot)
    return out + [token in kept for token in run]


@given(st.data())
def test_staying_is_what_it_says(data):
    tokens = data.draw(st.permutations(range(data.draw(st.integers(1, 12)))))
    placeholder_map = list(tokens)
    for place in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5)), reverse=True):
        placeholder_map.insert(place, SEPARATOR)
    kept = data.draw(st.lists(st.sampled_from(tokens), unique=True, min_size=1))
    stays = staying(torch.tensor(placeholder_map), torch.tensor(sorted(kept)), len(tokens))
    assert stays.tolist() == slowly(placeholder_map, set(kept))
    assert int(stays[torch.tensor(placeholder_map) != SEPARATOR].sum()) == len(kept)
