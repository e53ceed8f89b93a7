"""Sets that go on from a prefix, in memory and in their files, against those that run the whole prompt."""

from dataclasses import replace

import pytest
import torch

from gridprune_cli.cache import files
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
NEW = 6
INSIDE = Pruning(keep=0.3, ilp="selection")


@pytest.fixture(scope="module", params=list(FAMILIES))
def pipeline(request, checkpoint):
    pipeline = Pipeline(str(checkpoint(request.param)), dtype="float32")
    family = pipeline.family  # half of so few layers is not where Qwen3-VL's image has entered in full
    vars(family)["relevance_depth"] = max(family.relevance_depth, family.first_inner)
    return pipeline


def images_of(pipeline, noise, count):
    return [pipeline.encoder.encode([noise((100, 80), n)], several=count > 1)[0] for n in range(count)]


def ids_of(pipeline, pruned):
    return generate(pipeline.family, [pruned], NEW)[0].ids


@pytest.mark.parametrize("count", [1, 2])
def test_a_saved_prefix_answers_as_the_whole_prompt_does(pipeline, noise, count):
    images = images_of(pipeline, noise, count)
    if pipeline.family.sees_question:
        with pytest.raises(BadInput, match="with_prefix: this model's image tokens see the question"):
            pipeline.prune(images, QUESTION, INSIDE, with_prefix=True)
        return
    for pruning in (
        INSIDE,
        replace(INSIDE, positions="compact"),
        Pruning(keep=0.3, ilp="selection", share_budget=True, method=make_method("topk-relevance")),
        Pruning(keep=1.0),
        Pruning(keep=0.3, method=make_method("fastv", layer=pipeline.family.relevance_depth)),
    ):
        whole = pipeline.prune(images, QUESTION, pruning, with_prefix=False)
        saved = pipeline.prune(images, QUESTION, pruning, with_prefix=True)
        data = saved.to_bytes()
        header, tensors = files.decode(data)
        assert "image_embeds" not in tensors and len(saved.image_embeds) == 0 and header["schema"] == 5
        again = PrunedSet.from_bytes(data, "x")
        assert again.to_bytes() == data and again.to_json() == whole.to_json()
        assert all(torch.equal(getattr(again.prefix, name), getattr(saved.prefix, name)) for name in vars(saved.prefix))
        assert whole.prefix is None and ids_of(pipeline, again) == ids_of(pipeline, whole)


def test_a_selection_goes_on_from_its_prefix_and_others_where_it_is_there(pipeline, noise):
    """What `ask` and `batch` do. A first question about an image computes the prefix, where relevance has not."""
    images = images_of(pipeline, noise, 1)
    fresh = Pipeline(pipeline.family)
    share = Pruning(keep=1.0, ilp=0.3, ilp_layer=pipeline.family.depth - 1)
    by_share, selected, again = (
        fresh.runner().prune_one(Request((images[0],), QUESTION, pruning)).pruned for pruning in (share, INSIDE, share)
    )
    holds = not pipeline.family.sees_question
    by_attention = pipeline.family.relevance_kind == "attention"
    assert [pruned.prefix is not None for pruned in (by_share, selected, again)] == [
        holds and by_attention,
        holds,
        holds,
    ]
    for pruned in (selected, again):
        assert len(pruned.image_embeds) and b"prefix_ids" not in pruned.to_bytes()
        assert ids_of(pipeline, pruned) == ids_of(pipeline, replace(pruned, prefix=None))


@pytest.fixture(scope="module")
def llava(checkpoint):
    return Pipeline(str(checkpoint("llava")), dtype="float32")


@pytest.mark.parametrize(
    ("pruning", "options", "message"),
    [
        (Pruning(keep=0.5), {}, "visual tokens are left out before .*; take .ilp=selection., or leave this out"),
        (Pruning(keep=0.5, ilp=0.2), {}, "visual tokens are left out before"),
        (Pruning(keep=0.3, ilp="selection", ilp_layer=1), {}, "let them leave at layer 2 or later"),
        (Pruning(keep=0.3, method=make_method("sparsevlm")), {}, "or later"),
        (INSIDE, {"template": "{question} {image}\n"}, "the image sees the question; put that behind"),
    ],
)
def test_where_no_prefix_holds_it_is_told(llava, noise, monkeypatch, pruning, options, message):
    monkeypatch.setitem(vars(llava.family), "relevance_depth", 2)  # of 3 layers
    images = images_of(llava, noise, 1)
    with pytest.raises(BadInput, match=f"^with_prefix: .*{message}"):
        llava.prune(images, QUESTION, pruning, with_prefix=True, **options)
    assert llava.prune(images, QUESTION, pruning, **options).prefix is None


def test_generating_from_a_saved_prefix_needs_the_language_model_alone(llava, noise, tiny_llava):
    data = llava.prune(images_of(llava, noise, 1), QUESTION, INSIDE, with_prefix=True).to_bytes()
    other = Pipeline(str(tiny_llava), dtype="float32")
    assert other.generate(PrunedSet.from_bytes(data, "x"), max_new_tokens=NEW) is not None
    assert set(other.family._loaded) == {"language"}
