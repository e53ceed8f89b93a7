"""Answers from a prompt's prefix, in every family, against those of the same sets when the whole prompt is run."""

import json
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from test_inner import prune
from tiny_families import open_pipeline

from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate, prompts
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.inner import PrefixBatch, prune_inside
from gridprune_cli.vlm.prefix import compute_prefix

NEW = 8  # tokens of an answer: answers of fewer are not all different
CAUSAL = [name for name in FAMILIES if name != "paligemma"]  # where no image sees its question


@pytest.fixture(params=CAUSAL)
def pipeline(request, checkpoint):
    return open_pipeline(checkpoint(request.param))


def prefix_of(pipeline, pictures, depth):
    """The prefix of all prompts about these pictures."""
    images = [pipeline.encoder.encode([picture], several=len(pictures) > 1)[0] for picture in pictures]
    prompt = pipeline.family.write_prompt("?", images)
    return compute_prefix(pipeline.family, prompt, images, depth)


def run(pipeline, sets):
    """transformers' generate: new ids (B, NEW), logits (B, NEW, V), and how many columns layer 0 was given first."""
    family, (ids, mask, positions) = pipeline.family, prompts(pipeline.family, sets)
    model = family.load("language")
    prefixes = PrefixBatch(family, model, sets, ids, mask, positions) if sets[0].prefix else None
    if prefixes:
        inputs = {"past_key_values": prefixes.cache(1)}
    else:
        inputs = {"mm_encoder_outputs": {"image": family.features([pruned.image_embeds for pruned in sets])}}
        inputs |= family.extras(ids)
    columns = []
    handle = (
        model.get_submodule(family.text_model)
        .layers[0]
        .register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    )
    with torch.no_grad(), prune_inside(family, model, sets, ids, mask, prefixes):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **inputs,
            max_new_tokens=NEW,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    handle.remove()
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1), columns[0]


def check(pipeline, pruned, prefix):
    """A set with a prefix answers as it does without, and only its text goes through the first layer."""
    expected_ids, expected, whole = run(pipeline, [replace(pruned, prefix=None)])
    ids, logits, columns = run(pipeline, [replace(pruned, prefix=prefix)])
    assert (columns, whole) == (len(pruned.input_ids) - len(prefix.ids), len(pruned.input_ids))
    assert torch.equal(ids, expected_ids)
    assert (logits - expected).abs().max() <= 1e-4


def prunings(depth, last):
    """Ways to have all visual tokens below layer `depth`, and fewer of them later or not."""
    return {
        "all": Pruning(keep=1.0),
        "ilp": Pruning(keep=1.0, ilp=0.3, ilp_layer=depth),
        "compact": Pruning(keep=1.0, ilp=0.3, ilp_layer=depth, positions="compact"),
        "fastv": Pruning(keep=0.3, method=make_method("fastv", layer=depth)),
        "later": Pruning(keep=0.3, method=make_method("fastv", layer=last)),
        "dart": Pruning(keep=0.3, method=make_method("dart", layer=depth)),
        "adaptprune": Pruning(keep=0.3, method=make_method("adaptprune", layer=depth)),
    }


@contextmanager
def eager(pipeline):
    model = pipeline.family.load("language")
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    yield
    model.set_attn_implementation({"text_config": before})


@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_from_the_prefix_is_that_of_the_whole_prompt(pipeline, noise, count):
    family, pictures = pipeline.family, [noise((100, 100)), noise((60, 90), 1)][:count]
    depth = max(family.relevance_depth, family.first_inner)
    prefix = prefix_of(pipeline, pictures, depth)
    for name, pruning in prunings(depth, family.depth - 1).items():
        pruned = prune(pipeline, pictures, pruning)
        if name == "compact" and pruned.position_ids.dim() == 1 < family.axes:
            continue  # numbered on from the first layer, where the prefix has rows and columns
        check(pipeline, pruned, prefix)
        if count == 1 and name in ("all", "fastv"):
            with eager(pipeline):
                check(pipeline, pruned, prefix)


def test_a_batch_from_prefixes_answers_as_one_at_a_time(pipeline, noise):
    """Of different lengths in front and behind, some of one prefix, among sets without one."""
    family, pictures = pipeline.family, [noise((100, 100)), noise((60, 90), 1)]
    depth = max(family.relevance_depth, family.first_inner)
    sets = []
    for count, questions in ((1, ["what colour is the left object?", "is it red?"]), (2, ["is it red?", "how many?"])):
        prefix = prefix_of(pipeline, pictures[:count], depth)
        for question in questions:
            for pruning in list(prunings(depth, family.depth - 1).values())[:2]:
                images = [pipeline.encoder.encode([picture], several=count > 1)[0] for picture in pictures[:count]]
                sets.append(replace(pipeline.prune(images, question, pruning), prefix=prefix))
    without = [replace(pruned, prefix=None) for pruned in sets]
    alone = [generate(family, [pruned], NEW)[0].ids for pruned in without]
    assert len(set(alone)) > 4
    assert [answer.ids for answer in generate(family, sets, NEW)] == alone
    mixed = [replace(pruned, prefix=None) if n % 3 == 1 else pruned for n, pruned in enumerate(sets)]
    assert [answer.ids for answer in generate(family, mixed, NEW)] == alone
    beams = [generate(family, [pruned], NEW, num_beams=2)[0].ids for pruned in without[:3]]
    assert [answer.ids for answer in generate(family, sets[:3], NEW, num_beams=2)] == beams


@pytest.fixture(params=["gemma3", "qwen2_vl"])
def sliding(request, checkpoint, tmp_path):
    """A model some of whose layers look back over fewer tokens than a prefix has."""
    folder = shutil.copytree(checkpoint(request.param), tmp_path / "sliding")
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    text |= {"sliding_window": 12, "use_sliding_window": True}
    if request.param != "gemma3":  # whose layers slide already, but for one
        text["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    pipeline = Pipeline(str(folder), dtype="float32")
    assert "sliding_attention" in pipeline.family.config.get_text_config().layer_types
    return pipeline


def test_a_sliding_window_hides_what_it_hides_in_the_whole_prompt(sliding, noise):
    family, pictures = sliding.family, [noise((100, 100))]
    images = [sliding.encoder.encode(pictures)[0]]
    sets = []
    for depth in range(1, family.depth):
        prefix = prefix_of(sliding, pictures, depth)
        assert len(prefix.ids) > 12
        for name in ("all", "ilp", "fastv", "dart"):
            pruned = prune(sliding, pictures, prunings(depth, family.depth - 1)[name])
            check(sliding, pruned, prefix)
            sets.append(replace(pruned, prefix=prefix))
        sets.append(replace(sliding.prune(images, "is it red?", Pruning(keep=1.0)), prefix=prefix))
    alone = [generate(family, [replace(pruned, prefix=None)], NEW)[0].ids for pruned in sets]
    assert [answer.ids for answer in generate(family, sets, NEW)] == alone


@pytest.fixture
def tiny(tiny_llava, noise):
    """A tiny LLaVA, and a set of all its tokens with a prefix of two layers."""
    pipeline = open_pipeline(tiny_llava)
    pruned = prune(pipeline, [noise((100, 100))], Pruning(keep=0.3, method=make_method("fastv", layer=2)))
    return pipeline, replace(pruned, prefix=prefix_of(pipeline, [noise((100, 100))], 2))


def test_a_set_with_a_prefix_needs_the_language_model_alone(tiny, tiny_llava):
    pipeline, pruned = tiny
    fresh = Pipeline(str(tiny_llava), dtype="float32")
    assert fresh.generate(replace(pruned, image_embeds=pruned.image_embeds * 0), max_new_tokens=NEW) == (
        pipeline.generate(replace(pruned, prefix=None), max_new_tokens=NEW)
    )
    assert set(fresh.family._loaded) == {"language"}


def test_a_prefix_that_does_not_fit_is_refused(tiny):
    pipeline, pruned = tiny
    prefix = pruned.prefix
    (stage,) = pruned.schedule.stages
    rated = replace(stage, rule=make_method("sparsevlm").stages([pruned.count], [2], range(1, 6))[0].rule)
    assert rated.rule.rated
    for reason, misfit in {
        "another prompt": replace(pruned, prefix=replace(prefix, ids=prefix.ids + 1)),
        "before the last image": replace(
            pruned,
            prefix=replace(
                prefix,
                ids=prefix.ids[:-1],
                keys=prefix.keys[:, :, :-1],
                values=prefix.values[:, :, :-1],
                hidden_states=prefix.hidden_states[:-1],
            ),
        ),
        "keys of": replace(pruned, prefix=replace(prefix, keys=prefix.keys[:, :, :-1])),
        "values of": replace(pruned, prefix=replace(prefix, values=prefix.values[..., :-1])),
        "hidden states of": replace(pruned, prefix=replace(prefix, hidden_states=prefix.hidden_states[:, 1:])),
        "of 2 layers": replace(pruned, schedule=replace(pruned.schedule, stages=(replace(stage, layer=1),))),
        "rated": replace(pruned, schedule=replace(pruned.schedule, stages=(rated,))),
    }.items():
        with pytest.raises(BadInput, match=reason):
            pipeline.generate(misfit)


def test_a_prefix_is_run_in_one_piece(tiny):
    pipeline, pruned = tiny
    with pytest.raises(BadInput, match="in one piece"):
        pipeline.generate(pruned, max_new_tokens=2, prefill_chunk_size=4)
