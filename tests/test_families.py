"""The parity matrix: every family against transformers itself, on tiny random checkpoints in their published layout."""

import json
import shutil
from dataclasses import replace
from importlib import import_module
from itertools import combinations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_placeholders import slowly
from tiny_families import load_reference, open_pipeline
from transformers import ProcessorMixin

from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import METHODS, make_method
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, TOWER_SIGNALS
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm import FAMILIES

QUESTION = "what colour is the left object?"
LENGTH = 12  # tokens of an answer
SIZES = {"square": (100, 100), "wide": (210, 70), "tall": (60, 200), "tiny": (31, 29)}


@pytest.fixture(scope="module", params=[*FAMILIES, "llava_siglip"])
def family(request, checkpoint):
    """A family's tiny checkpoint: (folder, whole model of plain transformers, its processor)."""
    folder = checkpoint(request.param)
    return folder, load_reference(folder), open_pipeline(folder).family.processor


def inputs(family, pictures):
    """What transformers' own processor makes of a question about pictures."""
    folder, _, processor = family
    tiny = import_module(f"tiny_families.{json.loads((folder / 'config.json').read_text())['model_type']}")
    images = [picture.image for picture in pictures]
    if hasattr(tiny, "inputs"):  # families without a chat template
        return tiny.inputs(processor, images, QUESTION)
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": QUESTION}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(ProcessorMixin.apply_chat_template(processor, [{"role": "user", "content": content}], **options))


def pruned_set(folder, pictures, pruning):
    pipeline = open_pipeline(folder)
    images = [pipeline.encoder.encode([picture], several=len(pictures) > 1)[0] for picture in pictures]
    return pipeline, images, pipeline.prune(images, QUESTION, pruning)


def transformers_answer(family, pictures):
    """Ids of the tokens that transformers' own `generate` answers."""
    model_inputs = inputs(family, pictures)
    return (
        family[1]
        .generate(**model_inputs, max_new_tokens=LENGTH, do_sample=False)[0, model_inputs["input_ids"].shape[1] :]
        .tolist()
    )


def logits(pipeline, pruned):
    """The logits of the answer's first token from a pruned set."""
    ids = pruned.input_ids[None]
    with torch.no_grad():
        return pipeline.family.load("language")(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=pruned.position_ids[..., None, :],
            mm_encoder_outputs={"image": pipeline.family.features([pruned.image_embeds])},
            **pipeline.family.extras(ids),
        ).logits[0, -1]


@pytest.mark.parametrize("size", SIZES)
def test_keep_everything_is_generate(family, noise, size):
    picture = noise(SIZES[size])
    pipeline, _, pruned = pruned_set(family[0], [picture], Pruning(keep=1.0))
    assert torch.equal(pruned.input_ids, inputs(family, [picture])["input_ids"][0])
    assert list(generate(pipeline.family, [pruned], LENGTH)[0].ids) == transformers_answer(family, [picture])


def test_two_images_are_generate(family, noise):
    pictures = [noise((100, 80)), noise((60, 90), seed=1)]
    pipeline, _, pruned = pruned_set(family[0], pictures, Pruning(keep=1.0))
    assert torch.equal(pruned.input_ids, inputs(family, pictures)["input_ids"][0])
    assert list(generate(pipeline.family, [pruned], LENGTH)[0].ids) == transformers_answer(family, pictures)


def test_answers_by_command(family, noise, command, tmp_path):
    """`ask` prints what transformers answers, and `prune` with `generate` what `ask` prints.

    Tiny models answer in single letters and digits, so that equal texts are equal tokens.
    """
    folder, _, processor = family
    pictures = [noise((210, 70)), noise((60, 90), seed=1)]
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for picture, path in zip(pictures, paths, strict=True):
        picture.image.save(path)
    options = ("--model", folder, "--dtype", "float32", "-q")
    length = ("--max-new-tokens", LENGTH)

    def ask(*images, keep):
        code, out, err = command("ask", *images, QUESTION, "--keep", keep, "--json", *length, *options)
        assert (code, err) == (0, "")
        return json.loads(out)

    for count in (1, 2):
        answer = ask(*paths[:count], keep=1.0)
        expected = transformers_answer(family, pictures[:count])
        assert answer["answer"] == processor.tokenizer.decode(expected) and len(expected) == LENGTH
        assert len(answer["answer"].replace(" ", "")) == LENGTH
        assert answer["tokens"]["kept"] == answer["tokens"]["full"]
        again = (
            "miss" if Pipeline(str(folder)).family.encodes_multi_image else "hit"
        )  # the first picture, now one of two
        assert answer["cache"] == ("miss" if count == 1 else [again, "miss"])
    saved, less = tmp_path / "set.safetensors", ask(*paths, keep=0.3)
    assert 0 < less["tokens"]["kept"] < less["tokens"]["full"]
    assert command("prune", *paths, QUESTION, "--keep", 0.3, "-o", saved, *options)[0] == 0
    code, out, _ = command("generate", saved, "--dtype", "float32", *length)
    assert (code, out) == (0, less["answer"] + "\n")


def test_answers_depend_on_picture_place_and_question(family, noise):
    """Else that they are those of transformers would mean little."""
    folder, _, _ = family
    half = Pruning(keep=0.5, method=make_method("fastervlm"))  # which keeps the same for every question
    pictures = [noise(SIZES["wide"], seed) for seed in range(2)]
    pipeline, images, both = pruned_set(folder, pictures, half)
    image, other = (pipeline.encoder.encode([picture])[0] for picture in pictures)
    pruned = pipeline.prune(image, QUESTION, half)
    assert len(pruned.image_embeds) > 3
    placeholder_map = torch.nonzero(pruned.input_ids == pipeline.family.image_token)[:, 0]
    moved = pruned.position_ids.clone()
    moved[..., placeholder_map] = moved[..., placeholder_map.roll(1)]
    sets = {
        "as it is": pruned,
        "another picture": pipeline.prune(other, QUESTION, half),
        "rows in another order": replace(pruned, image_embeds=pruned.image_embeds.flip(0)),
        "positions in another order": replace(pruned, position_ids=moved),
        "another question": pipeline.prune(image, QUESTION.replace("left", "right"), half),
        "two pictures": both,
        "two pictures the other way round": pipeline.prune(images[::-1], QUESTION, half),
    }
    if pruned.position_ids.dim() == 2:
        sets["rows as columns"] = replace(pruned, position_ids=pruned.position_ids[[0, 2, 1]])
    logits_of = {name: logits(pipeline, pruned) for name, pruned in sets.items()}
    for one, two in combinations(logits_of, 2):
        assert not torch.allclose(logits_of[one], logits_of[two], atol=1e-2), (one, two)
    answers = {name: generate(pipeline.family, [pruned], 2 * LENGTH)[0].ids for name, pruned in sets.items()}
    swapped = answers.pop("two pictures the other way round")
    assert answers.pop("two pictures") != swapped
    whole = answers.pop("as it is")
    assert not [name for name, ids in answers.items() if ids == whole]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_pruned_equals_masked(family, noise, positions, count, share):
    """Dropping tokens gives the logits of a model that holds them all and may not look at them."""
    folder, whole, _ = family
    pictures = [noise((100, 80)), noise((210, 70), seed=1)][-count:]
    model_inputs = inputs(family, pictures)
    pruning = Pruning(keep=0.3, positions=positions, share_budget=share)
    pipeline, images, pruned = pruned_set(folder, pictures, pruning)
    stays, first = [], 0
    for image in images:
        kept = {int(i) - first for i in pruned.kept if first <= i < first + image.count}
        stays += slowly(image.placeholder_map.tolist(), kept)
        first += image.count
    ids = model_inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[ids == pipeline.family.image_token] = torch.tensor(stays).long()
    assert 0 < int(mask.sum()) < ids.shape[1]
    if positions == "compact":
        places = (mask.cumsum(-1) - 1).clamp(min=0)
    elif hasattr(whole.model, "get_rope_index"):
        kinds = (ids == pipeline.family.image_token).int()
        places = whole.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=model_inputs["image_grid_thw"]
        )[0]
    else:
        places = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        expected = whole(**(model_inputs | {"attention_mask": mask, "position_ids": places})).logits[0, -1]
        full = whole(**model_inputs).logits[0, -1]
    actual = logits(pipeline, pruned)
    assert torch.allclose(actual, expected, atol=1e-4)
    assert not torch.allclose(actual, full, atol=1e-3)  # the dropped tokens did matter


def test_batched_answers_equal_single_ones(family, noise):
    folder, _, _ = family
    pipeline = open_pipeline(folder)
    images = [pipeline.encoder.encode([noise(size, seed)])[0] for seed, size in enumerate(SIZES.values())]
    keeps = (0.2, 1.0, 0.5, 0.3)
    sets = [pipeline.prune(image, QUESTION, Pruning(keep=keep)) for image, keep in zip(images, keeps, strict=True)]
    pair = [pipeline.encoder.encode([noise(size)], several=True)[0] for size in list(SIZES.values())[:2]]
    sets.append(pipeline.prune(pair, QUESTION, Pruning(keep=0.4)))
    together = generate(pipeline.family, sets, 8)
    assert [generated.ids for generated in together] == [generate(pipeline.family, [one], 8)[0].ids for one in sets]


@pytest.mark.parametrize("size", SIZES)
def test_encoded_images_make_sense(family, noise, size):
    """Shapes agree, views lie on the picture, saliency is a share of attention, and the disk changes nothing."""
    from gridprune_cli.cache import files

    folder, _, _ = family
    pipeline = open_pipeline(folder)
    image = pipeline.encoder.encode([noise(SIZES[size])])[0]
    pipeline.family.check(image)  # raises nothing
    assert len(image.vision_features) == len(image.saliency) == image.count == int((image.placeholder_map >= 0).sum())
    assert torch.isfinite(image.vision_features).all() and (image.saliency >= 0).all() and image.saliency.std() > 0
    for view in image.views:
        left, top, right, bottom = view.box
        assert -1 <= left < right <= 2 and -1 <= top < bottom <= 2
        assert max(0, left) < min(1, right) and max(0, top) < min(1, bottom)
    again = EncodedImage.from_parts(*files.decode(image.to_bytes()))
    assert torch.equal(again.vision_features, image.vision_features) and torch.equal(
        again.placeholder_map, image.placeholder_map
    )


def test_optional_signals(family, noise, monkeypatch):
    """What else is encoded does not depend on them, and a middle layer that is the last gives what the last does."""
    from gridprune_cli.cache import files

    pipeline = open_pipeline(family[0])
    for several, size in ((False, "wide"), (True, "tiny")):
        plain = pipeline.encoder.run_tower([noise(SIZES[size])], several)[0]
        wide = pipeline.encoder.run_tower([noise(SIZES[size])], several, OPTIONAL_SIGNALS)[0]
        assert plain.optional == {} and set(wide.optional) == set(OPTIONAL_SIGNALS) and wide.key != plain.key
        for name in ("vision_features", "saliency", "placeholder_map"):
            assert torch.equal(getattr(plain, name), getattr(wide, name))
        again = EncodedImage.from_parts(*files.decode(wide.to_bytes()))
        for name, signal in wide.optional.items():
            assert signal.shape == plain.saliency.shape and (signal >= 0).all() and signal.std() > 0
            assert torch.equal(again.optional[name], signal)
        received, middle = (wide.optional[name] for name in TOWER_SIGNALS)
        assert not torch.equal(received, middle)
        monkeypatch.setattr("gridprune_cli.vlm.attention.MIDDLE", 1.0)
        last = pipeline.encoder.run_tower([noise(SIZES[size])], several, TOWER_SIGNALS)[0].optional
        assert torch.equal(last["middle_attention"], received) and torch.equal(last["received_attention"], received)
        monkeypatch.undo()


@pytest.mark.parametrize("method", ["gridprune", pytest.param("uniform", marks=pytest.mark.slow)])
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
            keep = {
                k: v
                for k, v in weights.items()
                if any(name_part in k for name_part in vision) == wanted or "newline" in k
            }
            assert 0 < len(keep) < len(weights)
            save_file(keep, path, {"format": "pt"})
    encoded = Pipeline(str(halves["vision"]), dtype="float32").encoder.encode([picture])[0]
    whole = pipeline.encoder.encode([picture])[0]
    assert torch.equal(encoded.vision_features, whole.vision_features) and torch.equal(encoded.saliency, whole.saliency)
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    assert generate(Pipeline(str(halves["language"]), dtype="float32").family, [again], 6)[0].ids == expected


def test_every_method_runs(family, noise):
    """Exactly K rows, whatever the views, and finite ones; the same again from disk."""
    folder, _, _ = family
    pipeline = open_pipeline(folder)
    images = [pipeline.encoder.encode([noise(size)], False, OPTIONAL_SIGNALS)[0] for size in ((210, 70), (31, 29))]
    for name in (name for name, kind in METHODS.items() if not kind.inner):
        for image in images:
            pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.4, method=make_method(name)))
            assert len(pruned.kept) == int(0.4 * image.count + 0.5) and bool((pruned.kept.diff() > 0).all())
            assert torch.isfinite(pruned.image_embeds).all()
        again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
        assert torch.equal(again.image_embeds, pruned.image_embeds)


def test_bfloat16(family, noise):
    """The logits of transformers in the same precision, up to its rounding."""
    folder, _, _ = family
    pipeline, picture = Pipeline(str(folder), dtype="bfloat16"), noise((100, 80))
    encoded = pipeline.encoder.encode([picture])[0]
    assert encoded.vision_features.dtype == torch.bfloat16
    whole = load_reference(folder, torch.bfloat16)
    with torch.no_grad():
        expected = whole(**inputs(family, [picture])).logits[0, -1].float()
    actual = logits(pipeline, pipeline.prune(encoded, QUESTION, Pruning(keep=1.0))).float()
    assert (actual - expected).abs().max() < 2**-5 * expected.abs().max()  # bfloat16 has 8 bits
    assert len(generate(pipeline.family, [pipeline.prune(encoded, QUESTION, Pruning(keep=0.5))], 4)[0].ids) == 4


@pytest.mark.parametrize("share", [0.6, pytest.param(2.0, marks=pytest.mark.slow)])
def test_a_language_model_over_several_places(family, noise, monkeypatch, share):
    """Spread by accelerate it answers as on one device. Without GPUs, memory and disk are the places."""
    pytest.importorskip("accelerate", reason="comes with the extra multi-gpu")
    folder, _, _ = family
    pictures, pruning = [noise((100, 80)), noise((60, 90), seed=1)], Pruning(keep=0.5)
    alone, _, expected = pruned_set(folder, pictures, pruning)
    answer = generate(alone.family, [expected], 12)[0].ids
    size = sum(weight.nbytes for weight in alone.family.load("language").parameters())
    room = int(share * size)
    places = {"cpu": room, "disk": 1 << 40}
    monkeypatch.setattr("transformers.integrations.accelerate.get_balanced_memory", lambda *_, p=places, **__: p)
    pipeline = Pipeline(str(folder), dtype="float32", device="map")
    pipeline.family.load("tower", "projector", "language")
    pruned = pipeline.prune([pipeline.encoder.encode([p], several=True)[0] for p in pictures], QUESTION, pruning)
    assert torch.equal(pruned.image_embeds, expected.image_embeds) and torch.equal(pruned.kept, expected.kept)
    assert generate(pipeline.family, [pruned], 12)[0].ids == answer
    used = set(getattr(pipeline.family.load("language"), "hf_device_map", {"": "cpu"}).values())
    assert used == ({"cpu"} if room > size else {"cpu", "disk"})
    assert not hasattr(pipeline.family.load("tower"), "hf_device_map")
