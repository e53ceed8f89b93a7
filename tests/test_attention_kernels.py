"""Kept tokens at their original places leave gaps, which no attention kernel may take for several packed sequences.

transformers looks at positions in two places. Where there is neither a mask nor a cache, `find_packed_sequence_indices`
makes of each gap a border between sequences that don't see each other; and FlashAttention, which gets no mask where
nothing is padding, splits a batch of one at each token that has the lowest position. FlashAttention itself needs a GPU:
here transformers' own functions decide, and plain attention is computed for what they decide.
"""

import pytest
import torch
from tiny_families import open_pipeline
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, flash_attention_mask
from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

from gridprune_cli.generation import generate
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
SPARSE = Pruning(keep=0.3, method=make_method("fastervlm"))
CAUSAL = sorted(set(FAMILIES) - {"gemma3", "paligemma"})  # whose image tokens see ahead, as FlashAttention can't


def as_flash(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """What FlashAttention would compute: `_flash_attention_forward` of transformers, by a dense mask."""
    length, keys = query.shape[2], key.shape[2]
    sees = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    if attention_mask is not None:
        sees = sees & attention_mask[:, None, None].bool()
        sees = sees | torch.eye(keys, dtype=torch.bool)[-length:]  # padding is left out; its results don't matter
    elif _is_packed_sequence(position_ids, len(query)):
        (borders, _), _ = prepare_fa_kwargs_from_position_ids(position_ids)
        sequence = torch.bucketize(torch.arange(length), borders[1:], right=True)
        sees = sees & (sequence[:, None] == sequence)
        splits.append(len(borders) - 2)
    return sdpa_attention_forward(module, query, key, value, sees.expand(len(query), 1, -1, -1), **kwargs)


splits: list[int] = []  # of each call that FlashAttention takes for packed: into how many more than one
AttentionInterface.register("as_flash", as_flash)
AttentionMaskInterface.register("as_flash", flash_attention_mask)


@pytest.fixture
def gapped(checkpoint, noise):
    """The pruned set of a family with gaps between its positions: (pipeline, set)."""

    def prune(name, pruning=SPARSE, with_prefix=False):
        pipeline = open_pipeline(checkpoint(name))
        (image,) = pipeline.encoder.encode([noise((210, 70))])
        return pipeline, pipeline.prune(image, QUESTION, pruning, with_prefix=with_prefix)

    return prune


def test_gaps_look_like_borders_to_transformers(gapped):
    """Without a mask and without a cache they are: the trap is there."""
    pipeline, pruned = gapped("llava")
    positions = pruned.position_ids[None]
    assert (positions.diff() > 1).any() and masking_utils.find_packed_sequence_indices(positions)[0, -1] > 0
    embeds = torch.zeros(1, positions.shape[1], 4)
    config = pipeline.family.load("language").config.get_text_config()
    ones, arguments = torch.ones_like(positions), {"config": config, "inputs_embeds": embeds, "past_key_values": None}
    assert create_causal_mask(attention_mask=ones, position_ids=positions, **arguments) is None  # causal, as it should
    assert create_causal_mask(attention_mask=None, position_ids=positions, **arguments) is not None


@pytest.mark.parametrize("name", FAMILIES)
def test_no_prompt_is_taken_for_packed(gapped, monkeypatch, name):
    """Alone, in a batch, with a prefix, or rated inside the language model: positions are never looked at."""
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: pytest.fail("looked for"))
    pipeline, pruned = gapped(name)
    assert (pruned.position_ids.diff() > 1).any()
    generate(pipeline.family, [pruned], 2)
    generate(pipeline.family, [pruned, gapped(name, Pruning(keep=1.0))[1]], 2)
    generate(pipeline.family, [gapped(name, Pruning(keep=0.5, method=make_method("fastv")))[1]], 2)
    generate(pipeline.family, [gapped(name, Pruning(keep=0.3, ilp="selection"), None)[1]], 2)


@pytest.mark.parametrize("name", CAUSAL)
def test_flash_attention_takes_gaps_for_one_sequence(gapped, monkeypatch, name):
    pipeline, pruned = gapped(name)
    model = pipeline.family.load("language")
    kind = model.config.get_text_config()._attn_implementation
    both = [pruned, gapped(name, Pruning(keep=1.0))[1]]
    expected = [[answer.ids for answer in generate(pipeline.family, batch, 8)] for batch in ([pruned], both)]
    splits.clear()
    try:
        model.set_attn_implementation({"text_config": "as_flash"})
        answers = [[answer.ids for answer in generate(pipeline.family, batch, 8)] for batch in ([pruned], both)]
    finally:
        model.set_attn_implementation({"text_config": kind})
    assert answers == expected
    assert set(splits) <= {0}
    if name == "llava":  # whose layers get positions: these do look packed, and are one sequence
        assert splits


def test_flash_attention_splits_where_the_lowest_position_is_repeated(gapped):
    """Else the test above would hold whatever is computed."""
    _, pruned = gapped("llava")
    _, whole = gapped("llava", Pruning(keep=1.0))
    positions = torch.cat([pruned.position_ids, whole.position_ids])[None]
    assert _is_packed_sequence(positions, 1)
    (borders, _), _ = prepare_fa_kwargs_from_position_ids(positions)
    assert borders.tolist() == [0, len(pruned.input_ids), positions.shape[1]]


def test_flex_attention_gets_a_causal_mask(gapped, monkeypatch):
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda mask_mod, **_: mask_mod)  # which compiles for long
    pipeline, pruned = gapped("llava")
    config = type(pipeline.family.load("language").config.get_text_config())()
    config._attn_implementation = "flex_attention"
    positions, length = pruned.position_ids[None], len(pruned.input_ids)
    arguments = {"config": config, "inputs_embeds": torch.zeros(1, length, 4), "past_key_values": None}
    at, zero = torch.arange(length), torch.tensor(0)

    def sees(attention_mask):
        mask = create_causal_mask(attention_mask=attention_mask, position_ids=positions, **arguments)
        return mask(zero, zero, at[:, None], at)

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(sees(torch.ones_like(positions)), causal)
    assert not torch.equal(sees(None), causal)
