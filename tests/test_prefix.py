"""A prompt's prefix in every family, against transformers' whole model on the whole prompt, with eager attention."""

import json
import shutil
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tiny_families import load_reference, open_pipeline
from transformers import ProcessorMixin

from gridprune_cli.pipeline import Pipeline
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.attention import watch_queries
from gridprune_cli.vlm.prefix import attend_images, compute_prefix, prefix_length

QUESTION = "what colour is the left object?"
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def whole_model(folder, name, pictures):
    """What plain transformers makes of the processor's inputs: its prompt (L,), cache, attentions, hidden states.

    Its `received` are the inputs (1, L, D) of each layer and of the last norm.
    """
    processor = open_pipeline(folder).family.processor
    tiny, images = import_module(f"tiny_families.{name}"), [picture.image for picture in pictures]
    if hasattr(tiny, "inputs"):
        inputs = tiny.inputs(processor, images, QUESTION)
    else:
        content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUESTION}]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = dict(ProcessorMixin.apply_chat_template(processor, [{"role": "user", "content": content}], **options))
    model = load_reference(folder, attn_implementation="eager")
    text, received = model.get_submodule(open_pipeline(folder).family.text_model), []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: received.append(args[0].clone()))
        for module in (*text.layers, text.norm)
    ]
    with torch.no_grad():
        out = model(**inputs, use_cache=True, output_attentions=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    if name != "qwen3_vl":  # of which transformers records the hidden states before deepstack adds to them
        assert all(map(torch.equal, received[:-1], out.hidden_states))
    out.received = received
    return inputs["input_ids"][0], out


@pytest.fixture(params=[(name, count) for name in FAMILIES for count in (1, 2)], ids=lambda pair: "{}-{}".format(*pair))
def case(request, checkpoint, noise):
    """A family with a prompt about one image or two, and what the whole model makes of that."""
    name, count = request.param
    folder = checkpoint(name)
    family = open_pipeline(folder).family
    pictures = [noise((100, 100)), noise((60, 90), 1)][:count]
    encoder = open_pipeline(folder).encoder
    images = [encoder.encode([picture], several=count > 1)[0] for picture in pictures]
    prompt, reference = whole_model(folder, name, pictures)
    assert torch.equal(prompt, family.write_prompt(QUESTION, images))
    return SimpleNamespace(family=family, images=images, prompt=prompt, reference=reference)


def attention_of(case, depth, combine):
    """What `attend_images` should give, from eager attentions: `combine` makes (keys,) of (heads, queries, keys)."""
    placeholders = case.prompt == case.family.image_token
    last = int(placeholders.nonzero()[-1])
    to_images = combine(case.reference.attentions[depth - 1][0][:, last + 1 :])[placeholders]
    expected, start = [], 0
    for image in case.images:
        of_token = {}
        for place, token in enumerate(image.placeholder_map.tolist()):
            if token >= 0:
                of_token[token] = to_images[start + place]
        expected.append(torch.stack([of_token[token] for token in range(image.count)]))
        start += len(image.placeholder_map)
    return expected


COMBINATIONS = {
    ("mean", "mean"): lambda attention: attention.mean((0, 1)),
    ("max", "max"): lambda attention: attention.amax((0, 1)),
    ("max", "mean"): lambda attention: attention.amax(0).mean(0),
    ("mean", "max"): lambda attention: attention.mean(0).amax(0),
}


@pytest.mark.parametrize("depth", [1, 3])
def test_a_prefix_and_the_attention_to_it_are_those_of_the_whole_model(case, depth):
    family, prompt = case.family, case.prompt
    length = prefix_length(family, prompt)
    prefix = None
    if not family.sees_question:
        prefix = compute_prefix(family, prompt, case.images, depth)
        assert torch.equal(prefix.ids, prompt[:length]) and prefix.depth == depth
        for layer in range(depth):
            cached = case.reference.past_key_values.layers[layer]
            torch.testing.assert_close(prefix.keys[layer], cached.keys[0, :, :length], **CLOSE)
            torch.testing.assert_close(prefix.values[layer], cached.values[0, :, :length], **CLOSE)
        torch.testing.assert_close(prefix.hidden_states, case.reference.received[depth][0, :length], **CLOSE)
    for (heads, queries), combine in COMBINATIONS.items():
        find = None if prefix is None else lambda *_, prefix=prefix: prefix
        (attention,) = attend_images(family, [prompt], [case.images], depth, find, heads=heads, queries=queries)
        for of_image, expected in zip(attention, attention_of(case, depth, combine), strict=True):
            assert of_image.dtype == torch.float32
            torch.testing.assert_close(of_image, expected, **CLOSE)


@pytest.fixture
def tiny(tiny_llava, noise):
    """The tiny LLaVA, none of its parts loaded, with a prompt about one image."""
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    images = open_pipeline(tiny_llava).encoder.encode([noise((100, 100))])
    return SimpleNamespace(family=pipeline.family, images=images, prompt=pipeline.family.write_prompt(QUESTION, images))


def attend(case, depth=2, **options):
    def find(prompt, images):
        return compute_prefix(case.family, prompt, images, depth)

    return attend_images(case.family, [case.prompt], [case.images], depth, find, **options)[0][0]


def test_only_the_first_layers_are_read_where_nothing_else_is_needed(tiny):
    family = tiny.family
    attend(tiny)
    names = {name for name, _ in family.first_layers(2).named_parameters()}
    assert {name.split(".layers.")[1][0] for name in names if ".layers." in name} == {"0", "1"}
    assert {name for name in names if ".layers." not in name} == {f"{family.text_model}.embed_tokens.weight"}
    assert set(family._loaded) == {"projector"}


def test_a_loaded_language_model_lends_its_layers_and_stays_as_it_is(tiny):
    alone = attend(tiny)
    model = tiny.family.load("language")
    assert torch.equal(attend(tiny), alone)
    text, view = (m.get_submodule(tiny.family.text_model) for m in (model, tiny.family.first_layers(2)))
    weights = [layers[0].self_attn.q_proj.weight for layers in (text.layers, view.layers)]
    assert weights[0] is weights[1] and len(text.layers) == tiny.family.depth
    model.set_attn_implementation({"text_config": "eager"})
    torch.testing.assert_close(attend(tiny), alone, **CLOSE)


def test_a_model_that_is_watched_and_hooked_elsewhere_is_asked_all_the_same(tiny):
    """As while it generates in another thread, pruning inside."""
    alone = attend(tiny)
    layer = tiny.family.load("language").get_submodule(tiny.family.text_model).layers[1]
    handle = layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the language model"))
    with watch_queries(layer.self_attn, torch.ones(1, 3)) as record:
        assert torch.equal(attend(tiny), alone) and not record
    handle.remove()


def test_a_language_model_that_is_divided_over_devices_is_asked_the_same(tiny):
    accelerate = pytest.importorskip("accelerate", reason="comes with the extra multi-gpu")
    alone = attend(tiny)
    model = tiny.family.load("language")
    modules = [tiny.family.text_model + name for name in (".embed_tokens", ".norm", ".rotary_emb")] + ["lm_head"]
    layers = [f"{tiny.family.text_model}.layers.{layer}" for layer in range(tiny.family.depth)]
    accelerate.dispatch_model(model, dict.fromkeys([*modules, *layers], "cpu"), force_hooks=True)
    assert hasattr(model, "_hf_hook") and torch.equal(attend(tiny), alone)


def test_a_single_token_behind_the_image_sees_all_of_it(tiny):
    """Its attention has no mask, and is of the last of many keys."""
    prompt = tiny.prompt[: prefix_length(tiny.family, tiny.prompt) + 1]
    model = load_reference(tiny.family.checkpoint.folder, attn_implementation="eager")
    image = tiny.images[0]
    with torch.no_grad():
        expected = model(
            input_ids=prompt[None],
            mm_encoder_outputs={"image": tiny.family.features([tiny.family.project(image.vision_features)])},
            output_attentions=True,
        ).attentions[1][0, :, -1]  # (heads, keys)
    tiny.prompt = prompt
    at_image = prompt == tiny.family.image_token
    torch.testing.assert_close(attend(tiny, heads="max"), expected.amax(0)[at_image], **CLOSE)


def test_a_sliding_window_hides_from_the_question_what_it_hides_in_the_whole_model(checkpoint, tmp_path, noise):
    folder = shutil.copytree(checkpoint("gemma3"), tmp_path / "gemma3")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["sliding_window"] = 12  # shorter than the question and the image
    (folder / "config.json").write_text(json.dumps(config))
    pipeline, picture = Pipeline(str(folder), dtype="float32"), noise((100, 100))
    images = pipeline.encoder.encode([picture])
    prompt, reference = whole_model(folder, "gemma3", [picture])
    case = SimpleNamespace(family=pipeline.family, images=images, prompt=prompt, reference=reference)
    for depth in (1, 2, 3):  # of which the second attends to everything
        (expected,) = attention_of(case, depth, COMBINATIONS["mean", "max"])
        torch.testing.assert_close(attend(case, depth, queries="max"), expected, **CLOSE)
        assert bool((expected == 0).any()) == (depth != 2)
