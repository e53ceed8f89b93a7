"""The parity matrix: every family against transformers itself, on tiny random checkpoints in their published layout."""

import json
import shutil
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_slots import slowly
from tiny_families import make
from transformers import ProcessorMixin

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline, Pruning
from gridprune_cli.pruning.methods import METHODS
from gridprune_cli.pruning.methods import make as make_method
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
SIZES = {"square": (100, 100), "wide": (210, 70), "tall": (60, 200), "tiny": (31, 29)}


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    """A family's tiny checkpoint: (folder, whole model of plain transformers, its processor)."""
    folder = make(request.param, tmp_path_factory.mktemp(request.param))
    pipeline = Pipeline(str(folder), dtype="float32")
    kind = type(pipeline.family)
    whole = kind.model_class.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, whole, pipeline.family.processor


def inputs(family, pictures):
    """What transformers' own processor makes of a question about pictures."""
    folder, _, processor = family
    tiny = import_module(f"tiny_families.{json.loads((folder / 'config.json').read_text())['model_type']}")
    images = [picture.image for picture in pictures]
    if hasattr(tiny, "inputs"):  # families without a chat template
        return tiny.inputs(processor, images, QUESTION)
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": QUESTION}]
    messages = [{"role": "user", "content": content}]
    text = ProcessorMixin.apply_chat_template(processor, messages, add_generation_prompt=True, tokenize=False)
    return dict(processor(images=images, text=[text], return_tensors="pt"))


def pruned_set(folder, pictures, pruning):
    pipeline = Pipeline(str(folder), dtype="float32")
    images = [pipeline.encode([picture])[0] for picture in pictures]
    return pipeline, images, pipeline.prune(images, QUESTION, pruning)


@pytest.mark.parametrize("size", SIZES)
def test_keep_everything_is_generate(family, noise, size):
    folder, whole, _ = family
    picture = noise(SIZES[size])
    given = inputs(family, [picture])
    expected = whole.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
    pipeline, _, pruned = pruned_set(folder, [picture], Pruning(keep=1.0))
    assert torch.equal(pruned.input_ids, given["input_ids"][0])
    assert generate(pipeline.family, [pruned], 24)[0].ids == tuple(expected.tolist())


def test_two_images_are_generate(family, noise):
    folder, whole, _ = family
    pictures = [noise((100, 80)), noise((60, 90), seed=1)]
    given = inputs(family, pictures)
    expected = whole.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
    pipeline, _, pruned = pruned_set(folder, pictures, Pruning(keep=1.0))
    assert generate(pipeline.family, [pruned], 24)[0].ids == tuple(expected.tolist())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_pruned_equals_masked(family, noise, positions, count, share):
    """Dropping tokens gives the logits of a model that holds them all and may not look at them."""
    folder, whole, _ = family
    pictures = [noise((100, 80)), noise((210, 70), seed=1)][-count:]
    given = inputs(family, pictures)
    pruning = Pruning(keep=0.3, positions=positions, share_budget=share)
    pipeline, images, pruned = pruned_set(folder, pictures, pruning)
    stays, first = [], 0
    for image in images:
        mine = {int(i) - first for i in pruned.kept if first <= i < first + image.count}
        stays += slowly(image.slots.tolist(), mine)
        first += image.count
    ids = given["input_ids"]
    mask = torch.ones_like(ids)
    mask[ids == pipeline.family.image_token] = torch.tensor(stays).long()
    assert 0 < int(mask.sum()) < ids.shape[1]
    if positions == "compact":
        places = (mask.cumsum(-1) - 1).clamp(min=0)
    elif hasattr(whole.model, "get_rope_index"):
        kinds = (ids == pipeline.family.image_token).int()
        places = whole.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=given["image_grid_thw"])[0]
    else:
        places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        expected = whole(**(given | {"attention_mask": mask, "position_ids": places})).logits[0, -1]
        pids = pruned.input_ids[None]
        logits = pipeline.family.load("language")(
            input_ids=pids,
            attention_mask=torch.ones_like(pids),
            position_ids=pruned.position_ids[..., None, :],
            mm_encoder_outputs={"image": pipeline.family.features([pruned])},
            **pipeline.family.extras(pids),
        ).logits[0, -1]
    assert torch.allclose(logits, expected, atol=1e-4)
    full = whole(**given).logits[0, -1]
    assert not torch.allclose(logits, full, atol=1e-3)  # the dropped tokens did matter


def test_batched_answers_equal_single_ones(family, noise):
    folder, _, _ = family
    pipeline = Pipeline(str(folder), dtype="float32")
    images = [pipeline.encode([noise(size, seed)])[0] for seed, size in enumerate(SIZES.values())]
    keeps = (0.2, 1.0, 0.5, 0.3)
    sets = [pipeline.prune(image, QUESTION, Pruning(keep=keep)) for image, keep in zip(images, keeps, strict=True)]
    sets.append(pipeline.prune(images[:2], QUESTION, Pruning(keep=0.4)))
    together = generate(pipeline.family, sets, 8)
    assert [made.ids for made in together] == [generate(pipeline.family, [one], 8)[0].ids for one in sets]


@pytest.mark.parametrize("size", SIZES)
def test_encoded_images_make_sense(family, noise, size):
    """Shapes agree, views lie on the picture, saliency is a share of attention, and the disk changes nothing."""
    from gridprune_cli import files

    folder, _, _ = family
    image = Pipeline(str(folder), dtype="float32").encode([noise(SIZES[size])])[0]
    assert len(image.states) == len(image.saliency) == image.count == int((image.slots >= 0).sum())
    assert torch.isfinite(image.states).all() and (image.saliency >= 0).all() and image.saliency.std() > 0
    for view in image.views:
        left, top, right, bottom = view.box
        assert -1 <= left < right <= 2 and -1 <= top < bottom <= 2
        assert max(0, left) < min(1, right) and max(0, top) < min(1, bottom)
    again = EncodedImage.from_parts(*files.decode(image.to_bytes()))
    assert torch.equal(again.states, image.states) and torch.equal(again.slots, image.slots)


@pytest.mark.parametrize("method", ["gridprune", "uniform"])
def test_parts_need_no_weights_but_their_own(family, noise, tmp_path, method):
    """encode reads no language model, generate no vision tower: neither is there."""
    folder, _, _ = family
    picture = noise((100, 80))
    pruning = Pruning(keep=0.5, method=make_method(method))
    pipeline, _, pruned = pruned_set(folder, [picture], pruning)
    expected = generate(pipeline.family, [pruned], 6)[0].ids
    vision = ("vision_tower", "visual", "vision_model", "multi_modal_projector", "connector", "image_newline")
    halves = {}
    for name, wanted in (("vision", True), ("language", False)):
        halves[name] = shutil.copytree(folder, tmp_path / name)
        for path in halves[name].glob("*.safetensors"):
            weights = load_file(path)
            keep = {k: v for k, v in weights.items() if any(part in k for part in vision) == wanted or "newline" in k}
            assert 0 < len(keep) < len(weights)
            save_file(keep, path, {"format": "pt"})
    encoded = Pipeline(str(halves["vision"]), dtype="float32").encode([picture])[0]
    whole = pipeline.encode([picture])[0]
    assert torch.equal(encoded.states, whole.states) and torch.equal(encoded.saliency, whole.saliency)
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert generate(Pipeline(str(halves["language"]), dtype="float32").family, [again], 6)[0].ids == expected


def test_every_method_runs(family, noise):
    """Exactly K rows, whatever the views, and finite ones; the same again from disk."""
    folder, _, _ = family
    pipeline = Pipeline(str(folder), dtype="float32")
    images = [pipeline.encode([noise(size)])[0] for size in ((210, 70), (31, 29))]
    for name in METHODS:
        for image in images:
            pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.4, method=make_method(name)))
            assert len(pruned.kept) == int(0.4 * image.count + 0.5) and bool((pruned.kept.diff() > 0).all())
            assert torch.isfinite(pruned.rows).all()
        again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
        assert torch.equal(again.rows, pruned.rows)


def test_bfloat16_runs(family, noise):
    folder, _, _ = family
    pipeline = Pipeline(str(folder), dtype="bfloat16")
    encoded = pipeline.encode([noise((100, 80))])[0]
    assert encoded.states.dtype == torch.bfloat16
    assert len(generate(pipeline.family, [pipeline.prune(encoded, QUESTION, Pruning(keep=0.5))], 4)[0].ids) == 4
