"""The formulas against torch's own counter and the cache that transformers really keeps, over every family."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import open_pipeline, write_checkpoint
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gridprune_cli.bench.cost import Decoder, Rates, Roofline, Step, kv_bytes, prefill_flops, prefill_steps
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.placeholders import staying
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
LLAVA = Decoder(4096, 32, 32, 128, 11008, 32064, (None,) * 32)


@pytest.fixture(scope="module", params=list(FAMILIES))
def pipeline(request, checkpoint):
    return open_pipeline(checkpoint(request.param))


@pytest.mark.parametrize("keep", [1.0, 0.4])
def test_the_formulas_are_what_is_counted(pipeline, noise, keep):
    image = pipeline.encoder.encode([noise((100, 80))])[0]
    pruned = pipeline.prune(image, "what colour is the left object?", Pruning(keep=keep))
    family, ids = pipeline.family, pruned.input_ids[None]
    model = family.load("language")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=pruned.position_ids[..., None, :],
            mm_encoder_outputs={"image": family.features([pruned.image_embeds])},
            **family.extras(ids),
            use_cache=True,
            logits_to_keep=1,
        )
    decoder = Decoder.of(model.config)
    tokens = [ids.shape[1]] * decoder.layers
    # the counter also sees the products that give the rotary angles, which are next to nothing
    assert prefill_flops(decoder, tokens) == pytest.approx(counter.get_total_flops(), rel=5e-3)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert kv_bytes(decoder, tokens, 4) == held


def test_what_a_prefix_saves_is_what_is_not_counted(pipeline, noise, monkeypatch):
    """The whole of generate's first step: text alone in the first layers, and what was selected in the others."""
    family = pipeline.family
    depth = max(family.relevance_depth, family.first_inner)
    # as deep as Qwen3-VL's image needs, of which the tiny one has few layers
    monkeypatch.setitem(vars(family), "relevance_depth", depth)
    (image,) = pipeline.encoder.encode([noise((100, 80))])
    pruned = pipeline.runner().prune_one(Request((image,), QUESTION, Pruning(keep=0.3, ilp="selection"))).pruned
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        generate(family, [pruned], 1)
    decoder = Decoder.of(family.load("language").config)
    prompt = len(pruned.input_ids)
    gone = int((~staying(pruned.placeholder_map, pruned.selected, pruned.count)).sum())
    tokens = [prompt] * depth + [prompt - gone] * (decoder.layers - depth)
    run = [prompt - len(pruned.prefix.ids)] * depth + tokens[depth:] if pruned.prefix else None
    assert (pruned.prefix is None) == family.sees_question
    assert prefill_flops(decoder, tokens, run) == pytest.approx(counter.get_total_flops(), rel=2e-2)


def test_published_figures():
    """LLaVA-1.5-7B keeps 512 KiB a token in 16 bit; its 13e9 operations a token are twice its 6.5e9 weights."""
    assert kv_bytes(LLAVA, [1] * 32, 2) == 512 << 10
    linear = prefill_flops(LLAVA, [1000] * 32) - 32 * 4 * 1000**2 * 4096 - 2 * 4096 * 32064
    assert linear == 1000 * 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)


@given(st.lists(st.integers(1, 3000), min_size=32, max_size=32), st.integers(1, 4000))
def test_layers_add_up(tokens, window):
    """Each layer costs what it would cost alone, whatever the others hold."""
    decoder = replace(LLAVA, windows=(None, window) * 16)
    head = 2 * LLAVA.width * LLAVA.vocabulary
    alone = [replace(decoder, windows=(w,)) for w in decoder.windows]
    flops = [prefill_flops(one, [n]) - head for one, n in zip(alone, tokens, strict=True)]
    assert prefill_flops(decoder, tokens) == sum(flops) + head
    held = [kv_bytes(one, [n], 2) for one, n in zip(alone, tokens, strict=True)]
    assert kv_bytes(decoder, tokens, 2) == sum(held)
    assert held[1::2] == [min(n, window - 1) * (16 << 10) for n in tokens[1::2]]


def test_a_count_for_each_layer_is_asked_for():
    for formula in (lambda: prefill_flops(LLAVA, [5] * 31), lambda: kv_bytes(LLAVA, [5], 2)):
        with pytest.raises(ValueError, match="for 32 layers"):
            formula()


def test_what_a_window_holds(tmp_path, noise):
    """Gemma 3 with a window shorter than the prompt: the cache that transformers keeps is that of the formula."""
    folder = write_checkpoint("gemma3", tmp_path / "gemma3")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["sliding_window"] = 12
    path.write_text(json.dumps(config))
    pipeline = Pipeline(str(folder), dtype="float32")
    pruned = pipeline.prune(pipeline.encoder.encode([noise((100, 80))])[0], "what colour is it?", Pruning(keep=1.0))
    model = pipeline.family.load("language")
    with torch.no_grad():
        out = model.generate(
            input_ids=pruned.input_ids[None],
            mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
            **pipeline.family.extras(pruned.input_ids[None]),
            max_new_tokens=1,
            return_dict_in_generate=True,
        )
    decoder = Decoder.of(model.config)
    assert {None, 12} == set(decoder.windows) and len(pruned.input_ids) > 12
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in out.past_key_values.layers)
    assert kv_bytes(decoder, [len(pruned.input_ids)] * decoder.layers, 4) == held


# ---- roofline --------------------------------------------------------------------------------------------------------

# two layers of width 4 with two heads of 2, one of which has keys and values, an MLP of 8 and 10 words:
# 4 * (2 * 4 + 2 * 2 + 3 * 8) = 144 weights a layer
SMALL = Decoder(width=4, heads=2, kv_heads=1, head_width=2, mlp_width=8, vocabulary=10, windows=(None, None))


def test_steps_by_hand():
    steps = prefill_steps(SMALL, [5, 3], itemsize=2)
    assert steps == [
        Step(2 * 5 * 144, 2 * 144),
        Step(4 * 5 * 5 * 4, 5 * 8),  # a token's key and value are 2 * 2 numbers of two bytes
        Step(2 * 3 * 144, 2 * 144),
        Step(4 * 3 * 3 * 4, 3 * 8),
        Step(2 * 40, 2 * 40),
    ]
    assert sum(step.flops for step in steps) == prefill_flops(SMALL, [5, 3])
    low, *_ = prefill_steps(SMALL, [5, 5], [2, 2], itemsize=4, weight_bytes=0.5)
    assert low == Step(2 * 2 * 144, 72)


def test_the_roofline_by_hand():
    """At 10 operations and 2 bytes a second: computing takes 6 and 1 s, reading 2 and 4 s."""
    roofline = Roofline.of([Step(60, 4), Step(10, 8)], Rates(10, 2))
    assert roofline == Roofline(overlapped=6 + 4, apart=6 + 1 + 2 + 4, reading=2 + 4)


def test_a_prompt_of_one_token_waits_for_its_weights():
    roofline = Roofline.of(prefill_steps(SMALL, [1, 1]), Rates(1e12, 1e9))
    assert roofline.overlapped == pytest.approx(roofline.reading)
