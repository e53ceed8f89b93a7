"""The pipeline: what is computed when, what the cache saves, what the options do."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from gridprune_cli.builder import remarks
from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import METHODS, make_method
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.pruning.signals import OPTIONAL_SIGNALS, Signals
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet

QUESTION = "What colour is the star?"
# fields of `Signals` that are computed where a method needs them
PER_QUESTION = ("relevance", "vision_features", "image_embeds", "question_embeds", "importance", "patch_lengths")


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), store=open_store(), dtype="float32")


@pytest.fixture
def image(tmp_path, noise):
    path = tmp_path / "a.png"
    noise((224, 224)).image.save(path)
    return path


def test_the_second_question_loads_no_tower(pipeline, image, tiny_llava):
    first = pipeline.ask(image, QUESTION, max_new_tokens=4)
    later = Pipeline(str(tiny_llava), store=open_store(), dtype="float32")
    second = later.ask(image, QUESTION, max_new_tokens=4)
    assert (first.hit, second.hit) == (False, True)
    assert first.text == second.text
    assert set(later.family._loaded) == {"projector", "language"}
    names = [name for name, _ in later.family.load("language").named_parameters()]
    assert names and not any("vision_tower" in name for name in names)


@pytest.mark.parametrize("setting", [{"use_cache": False}, {"return_dict_in_generate": True}])
def test_settings_that_training_leaves_in_a_checkpoint_change_no_answer(pipeline, image, setting):
    expected = pipeline.ask(image, QUESTION, max_new_tokens=8).text
    pipeline.family.load("language").generation_config.update(**setting)
    assert pipeline.ask(image, QUESTION, max_new_tokens=8).text == expected


def test_nobody_is_warned_of_texts_that_are_read_in_pieces_or_pruned(pipeline, image, monkeypatch):
    from transformers.tokenization_utils_base import logger

    warnings = []
    monkeypatch.setattr(logger, "warning", lambda text, *_: warnings.append(text))
    pipeline.family.processor.tokenizer.model_max_length = 8
    assert pipeline.ask(image, QUESTION * 25, max_new_tokens=4).text and not warnings


def test_encoding_loads_the_tower_alone(pipeline, image):
    pipeline.encode(image)
    assert set(pipeline.family._loaded) == {"tower"}


def test_equal_bytes_are_one_entry_and_new_bytes_a_miss(pipeline, image, tmp_path, noise):
    _, hit = pipeline.encode(image)
    copy = tmp_path / "b.png"
    copy.write_bytes(image.read_bytes())
    encoded, again = pipeline.encode(copy)
    assert (hit, again, encoded.name) == (False, True, str(copy))
    noise((224, 224), seed=1).image.save(image)
    changed, hit = pipeline.encode(image)
    assert not hit and changed.key != encoded.key
    assert len(list(pipeline.store.entries())) == 2


@pytest.mark.parametrize("change", ["dtype", "processor", "weights"])
def test_what_an_encoding_depends_on_is_in_its_key(pipeline, tiny_llava, tmp_path, change):
    import json

    folder = shutil.copytree(tiny_llava, tmp_path / "other")
    moved = Pipeline(str(folder), dtype="float32")
    assert moved.encoder.key("0" * 64) == pipeline.encoder.key("0" * 64)  # where it lies does not matter
    dtype = "float32"
    if change == "dtype":
        dtype = "bfloat16"
    elif change == "processor":
        path = folder / "processor_config.json"
        settings = json.loads(path.read_text())
        settings["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
        path.write_text(json.dumps(settings))
    else:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    assert Pipeline(str(folder), dtype=dtype).encoder.key("0" * 64) != pipeline.encoder.key("0" * 64)


def test_optional_signals_are_an_entry_of_their_own(pipeline, image):
    """Who needs none meets the entry of ever; who needs some encodes once more, and finds that from then on."""
    plain = Pruning(keep=0.4, method=make_method("fastervlm"))
    middle = Pruning(keep=0.4, method=make_method("hivtp"))
    both = Pruning(keep=0.4, method=make_method("hiprune"))
    runs = [pipeline.ask(image, QUESTION, pruning, max_new_tokens=2) for pruning in (plain, middle, plain, middle)]
    assert [run.hit for run in runs] == [False, False, True, True]
    keys = {run.pruned.images[0].key for run in runs}
    assert len(keys) == 2 and pipeline.encoder.key(runs[0].pruned.images[0].image) in keys
    assert len(list(pipeline.store.entries())) == 2
    encoded, hit = pipeline.encode(image, optional=["middle_attention"])
    assert hit and list(encoded.optional) == ["middle_attention"]
    requests = [
        Request((image,), QUESTION, pruning) for pruning in (both, plain, middle)
    ]  # of one run, each as it needs
    results = dict(pipeline.runner().prune(requests))
    assert [results[n].hits for n in range(3)] == [(False,), (True,), (True,)]
    with pytest.raises(BadInput, match=r"encoded without received_attention, .*optional=received_attention,middle"):
        pipeline.prune(encoded, QUESTION, both)
    with pytest.raises(BadInput, match="keys: no optional signal; there are received_attention"):
        pipeline.encode(image, optional=["keys"])


def test_a_broken_entry_is_encoded_again(pipeline, image):
    first = pipeline.ask(image, QUESTION, max_new_tokens=4)
    (entry,) = pipeline.store.entries()
    path = Path(entry.path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = pipeline.ask(image, QUESTION, max_new_tokens=4)
    assert (second.hit, second.text) == (False, first.text)
    assert pipeline.ask(image, QUESTION, max_new_tokens=4).hit


@pytest.mark.parametrize(
    ("method", "positions"),
    [(name, "original") for name in METHODS] + [(name, "compact") for name in METHODS if not METHODS[name].inner],
)
def test_a_pruned_set_from_disk_answers_the_same(pipeline, image, method, positions):
    pruning = Pruning(keep=0.4, method=make_method(method), positions=positions)
    encoded, _ = pipeline.encode(image, optional=pruning.optional)
    pruned = pipeline.prune(encoded, QUESTION, pruning)
    again = PrunedSet.from_bytes(pruned.to_bytes(), "x")
    inner = pruned.schedule is not None
    assert len(pruned.kept) == len(pruned.image_embeds) == (16 if inner else 6)
    assert not inner or pruned.schedule.tokens[-1] == (0 if method == "vtw" else 6)
    assert generate(pipeline.family, [again], 6)[0].ids == generate(pipeline.family, [pruned], 6)[0].ids
    assert (pruned.images[0].zones is not None) == (method == "gridprune")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("share", [False, True])
def test_merged_rows_are_projected_means_of_states(pipeline, noise, count, share):
    images = [pipeline.encoder.encode([noise((224, 224), seed)])[0] for seed in range(count)]
    method = make_method("visionzip", contextual_share=0.5)
    pruned = pipeline.prune(images, QUESTION, Pruning(tokens=6, method=method, share_budget=share))
    groups = [images] if share else [[image] for image in images]
    expected, first = [], 0
    for group in groups:
        vision_features = torch.cat([image.vision_features for image in group])
        views = tuple(view for image in group for view in image.views)
        signals = Signals(
            views, saliency=torch.cat([image.saliency for image in group]), vision_features=vision_features
        )
        kept = method.select_batch([signals], [6])[0]
        weights = method.merge(signals, kept).to_dense()
        assert (weights > 0).sum(1).max() > 1
        assert torch.equal(pruned.kept[first // len(vision_features) * 6 :][:6], kept + first)
        expected.append(pipeline.family.project(weights @ vision_features))
        first += len(vision_features)
    assert torch.allclose(pruned.image_embeds, torch.cat(expected), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_signals_that_a_method_needs_are_computed(pipeline, image, method, monkeypatch):
    encoded, _ = pipeline.encode(image, optional=make_method(method).needs & set(OPTIONAL_SIGNALS))
    computed = []
    method = make_method(method)
    monkeypatch.setattr(
        type(method),
        "select_alike",
        lambda self, signals, ks: computed.extend(signals) or [torch.arange(k) for k in ks],
    )
    monkeypatch.setattr(type(method), "merge_weights", lambda self, signals, kept: None)
    pipeline.prune(encoded, QUESTION, Pruning(tokens=3, method=method))
    (signals,) = computed
    known = {name for name in PER_QUESTION + OPTIONAL_SIGNALS if getattr(signals, name) is not None}
    assert known == method.needs_for(3, encoded.views, "clip") - {"saliency"} and signals.relevance_sign == -1
    assert ("language" in pipeline.family._loaded, "projector" in pipeline.family._loaded) == (False, True)


def test_one_budget_for_several_images_is_nothing_that_hired_could_split():
    with pytest.raises(BadInput, match="share_budget: not with `method=hired`"):
        Pruning(method=make_method("hired"), share_budget=True)


def test_positions(pipeline, image):
    encoded, _ = pipeline.encode(image)
    original = pipeline.prune(encoded, QUESTION, Pruning(tokens=3))
    compact = pipeline.prune(encoded, QUESTION, Pruning(tokens=3, positions="compact"))
    image_places = original.position_ids[original.input_ids == pipeline.family.image_token]
    assert (image_places - original.kept).unique().numel() == 1  # the prompt's first words come before the image
    assert original.position_ids[-1] - compact.position_ids[-1] == encoded.count - 3
    assert compact.position_ids.tolist() == list(range(len(compact.input_ids)))
    assert torch.equal(original.input_ids, compact.input_ids)


def test_zone_budgets_add_up(pipeline, image):
    encoded, _ = pipeline.encode(image)
    zones = (
        pipeline.prune(encoded, QUESTION, Pruning(tokens=7, method=make_method("gridprune", zone=2))).images[0].zones
    )
    assert (zones["rows"], zones["cols"], len(zones["budgets"]), sum(zones["budgets"])) == (2, 2, 4, 7)


@pytest.mark.parametrize("region", ["none", (0, 0, 3, 3), "auto"])
def test_regions(pipeline, image, region):
    encoded, _ = pipeline.encode(image)
    pruned = pipeline.prune(encoded, QUESTION, Pruning(tokens=4, region=region))
    relevance = pipeline.family.relevance(encoded.vision_features, QUESTION)
    expected = {"none": None, "auto": contextual_region(relevance, encoded.views)}.get(region, region)
    assert pruned.images[0].region == expected


@pytest.mark.parametrize(("keep", "kept"), [(1.0, 16), (0.5, 8), (0.11, 2), (0.01, 1), (0.34, 5)])
def test_keep_is_rounded_to_the_nearest_and_at_least_one(pipeline, image, keep, kept):
    encoded, _ = pipeline.encode(image)
    assert len(pipeline.prune(encoded, QUESTION, Pruning(keep=keep)).kept) == kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep=0.0: must be above 0"),
        ({"keep": 1.01}, "keep=1.01: must be above 0"),
        ({"keep": float("nan")}, "keep=nan: must be above 0"),
        ({"tokens": 0}, "tokens=0: must be at least 1"),
        ({"positions": "middle"}, "positions=middle: not one of"),
    ],
)
def test_values_out_of_range(settings, message):
    with pytest.raises(BadInput, match=message):
        Pruning(**settings)


def test_more_tokens_than_there_are(pipeline, image):
    encoded, _ = pipeline.encode(image)
    with pytest.raises(BadInput, match="the image has 16 visual tokens"):
        pipeline.prune(encoded, QUESTION, Pruning(tokens=17))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("", "the question is empty"),
        ("  ", "the question is empty"),
        ("What is <image> there?", "the prompt holds <image>, which stands for an image, 2 times for 1 images"),
    ],
)
def test_questions_that_cannot_be_asked(pipeline, image, question, message):
    encoded, _ = pipeline.encode(image)
    with pytest.raises(BadInput, match=message):
        pipeline.prune(encoded, question)


def test_models_that_cannot_be_used(tmp_path):
    with pytest.raises(BadInput, match="no folder with a config"):
        Pipeline(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInput, match="model type 'bert' is not supported"):
        Pipeline(str(tmp_path))
    with pytest.raises(BadInput, match="dtype=int8"):
        Pipeline(dtype="int8")
    with pytest.raises(BadInput, match="device=abacus"):
        Pipeline(device="abacus")


def test_a_set_says_what_its_relevance_came_from(pipeline, image, tiny_llava):
    encoded, _ = pipeline.encode(image)
    clip = {"source": "clip", "model": f"{tiny_llava}/clip"}
    by_words, by_attention = (
        Pipeline(str(tiny_llava), dtype="float32", relevance=relevance) for relevance in ("words", "attention")
    )
    for asking, pruning, expected in (
        (pipeline, Pruning(), clip),
        (pipeline, Pruning(plc="pool"), clip),
        (by_words, Pruning(), {"source": "words", "model": None}),
        (by_attention, Pruning(), {"source": "attention", "model": None, "depth": 1}),
        (pipeline, Pruning(method=make_method("trim")), clip | {"sign": -1}),
        (pipeline, Pruning(method=make_method("uniform")), None),
    ):
        pruned = asking.prune(encoded, QUESTION, pruning)
        assert pruned.to_json()["relevance"] == expected
        assert PrunedSet.from_bytes(pruned.to_bytes(), "set").relevance_source == expected


@pytest.mark.parametrize(
    ("method", "options", "relevance", "turned"),
    [
        ("cdpruner", {}, "clip", True),
        ("trim", {}, "clip", True),
        ("trim", {}, "words", False),
        ("trim", {}, "attention", False),
        ("trim", {"relevance_sign": -1}, "clip", False),
        ("gridprune", {}, "clip", False),
    ],
)
def test_a_sign_that_turns_relevance_round_as_published_is_a_remark(
    method, options, relevance, turned, tiny_llava, image
):
    pipeline = Pipeline(str(tiny_llava), dtype="float32", relevance=relevance)
    pruning = Pruning(method=make_method(method, **options))
    assert remarks(pipeline.family, pruning) == ()  # nothing was pruned
    pruned = pipeline.ask(image, QUESTION, pruning, max_new_tokens=1).pruned
    expected = (f"{method} turns CLIP's relevance round, as published; its option relevance_sign=1 takes it as it is",)
    assert remarks(pipeline.family, pruning) == pruned.notes == (expected if turned else ())
    assert PrunedSet.from_bytes(pruned.to_bytes(), "x").to_json()["notes"] == list(pruned.notes)


def test_options_that_few_tokens_do_not_heed_are_a_remark(pipeline, image):
    remark = "with fewer tokens than zones alpha, temperature had no part; `few=top` goes by budgets alone"
    options = {"zone": 1, "alpha": 0.5, "temperature": 1.0}
    for pruning, notes in (
        (Pruning(tokens=2, method=make_method("gridprune", **options)), (remark,)),
        (Pruning(tokens=2, method=make_method("gridprune", zone=1)), ()),
        (Pruning(tokens=2, method=make_method("gridprune", **options, few="top")), ()),
        (Pruning(keep=1.0, method=make_method("gridprune", **options)), ()),
    ):
        assert pipeline.prune(image, QUESTION, pruning).notes == notes
    shared = Pruning(tokens=2, share_budget=True, method=make_method("gridprune", **options))
    assert pipeline.prune([image, image], QUESTION, shared).notes == (remark,)


@pytest.mark.parametrize("relevance", ["attention", "both", "words"])
def test_dot_products_with_patches_need_a_clip(relevance, tiny_llava, image):
    pipeline = Pipeline(str(tiny_llava), dtype="float32", relevance=relevance)
    with pytest.raises(BadInput, match=f"method=trim: cosine=false only with .* it comes from {relevance}; leave it"):
        pipeline.ask(image, QUESTION, Pruning(method=make_method("trim", cosine=False)), max_new_tokens=1)
    assert not pipeline.family._loaded  # it was told before anything was loaded


@pytest.mark.parametrize(
    ("method", "options", "measured", "differs"),
    [
        ("gridprune", {}, -1, True),
        ("gridprune", {}, 1, False),
        ("gridprune", {"relevance_sign": -1}, -1, False),
        ("cdpruner", {"relevance_sign": -1}, 1, True),
        ("cdpruner", {}, 1, False),  # it takes the model's
        ("divprune", {}, -1, False),  # looks at no relevance
    ],
)
def test_a_sign_other_than_the_measured_one_is_a_remark(method, options, measured, differs, tiny_llava, image):
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    pipeline.family.calibrate(replace(pipeline.family.calibration, relevance_sign=measured))
    notes = pipeline.ask(image, QUESTION, Pruning(method=make_method(method, **options)), max_new_tokens=1).pruned.notes
    assert [note for note in notes if f"`gridprune calibrate` measured {measured:+d}" in note] == [*notes]
    assert bool(notes) == differs


def test_a_clip_that_is_not_there_is_told_before_anything_is_loaded(tiny_llava, tmp_path, image):
    folder = shutil.copytree(tiny_llava, tmp_path / "alone", ignore=shutil.ignore_patterns("clip"))
    pipeline = Pipeline(str(folder), dtype="float32")
    with pytest.raises(BadInput, match="relevance=attention"):
        pipeline.ask(image, QUESTION)
    with pytest.raises(BadInput, match="relevance=attention"):
        list(pipeline.runner().answer([Request((image,), QUESTION, Pruning())]))
    assert pipeline.family._loaded == {}
    whole = Pruning(keep=1.0, method=make_method("uniform"))
    assert len(pipeline.ask(image, QUESTION, whole, max_new_tokens=1).pruned.kept) == 16


def test_a_model_without_a_text_tower_uses_its_own_words(tiny_llava, tmp_path, image):
    folder = shutil.copytree(tiny_llava, tmp_path / "alone", ignore=shutil.ignore_patterns("clip"))
    pipeline = Pipeline(str(folder), dtype="float32", relevance="words")
    encoded, _ = pipeline.encode(image)
    pruned = pipeline.prune(encoded, QUESTION)
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        rows = whole.model.multi_modal_projector(encoded.vision_features)
        by_words = whole.get_input_embeddings()(
            pipeline.family.processor.tokenizer(QUESTION, add_special_tokens=False, return_tensors="pt").input_ids[0]
        )
    expected = torch.cosine_similarity(rows[:, None], by_words[None], dim=-1).mean(1)
    assert torch.allclose(pruned.relevance, expected, atol=1e-5)
    # so relevance is not turned round
    pruned = pipeline.prune(encoded, QUESTION, Pruning(tokens=3, method=make_method("trim")))
    assert pruned.kept.tolist() == sorted(expected.topk(3).indices.tolist())


def test_many_questions_are_pruned_for_as_each_is_alone(pipeline, image, tmp_path, noise):
    """Images, methods, budgets, regions and prompts all differ; what is compared is all that a set says."""
    other = tmp_path / "b.png"
    noise((60, 224), 1).image.save(other)
    a, b = (pipeline.encode(path)[0] for path in (image, other))
    asked = [
        Request((a,), QUESTION, Pruning(keep=0.4)),
        Request((b,), QUESTION, Pruning(keep=0.4)),
        Request((a,), "Where?", Pruning(tokens=3, region="none")),
        Request((a, b), "Which is larger?", Pruning(keep=0.3)),
        Request((a, b), "Which is larger?", Pruning(tokens=9, share_budget=True, positions="compact")),
        Request((b,), "Where?", Pruning(tokens=5, region=(0, 0, 3, 3), query="star", ilp=0.1)),
        Request((a,), QUESTION, Pruning(tokens=5, method=make_method("visionzip"))),
        Request((a,), QUESTION, Pruning(plc="pool", inside_ratio=2, outside_ratio=4)),
        Request((a,), QUESTION, Pruning(keep=1.0, method=make_method("uniform"))),
    ]
    for system, template in ((None, None), ("red", None), (None, "{image} {question} ")):
        prompt = {"system": system, "template": template}
        together = dict(pipeline.runner().prune([replace(request, **prompt) for request in asked]))
        for n, one in enumerate(asked):
            in_batch = together[n].pruned
            alone = pipeline.prune(one.images, one.question, one.pruning, **prompt)
            assert in_batch.to_json() == alone.to_json()
            for name in ("kept", "input_ids", "position_ids", "saliency"):
                assert torch.equal(getattr(in_batch, name), getattr(alone, name))
            assert torch.allclose(in_batch.image_embeds, alone.image_embeds, atol=1e-5)


def test_a_question_that_cannot_be_asked_fails_alone(pipeline, image):
    encoded, _ = pipeline.encode(image)
    results = dict(pipeline.runner().prune([Request((encoded,), question) for question in (QUESTION, " ")]))
    assert isinstance(results[1], BadInput) and "empty" in str(results[1])
    assert results[0].pruned.question == QUESTION and results[0].hits == (True,)


def test_a_prompt_that_begins_itself_does_not_change_its_neighbours(pipeline, image):
    encoded, _ = pipeline.encode(image)
    first = pipeline.family.processor.tokenizer.bos_token
    asked = [(question, (encoded,)) for question in (QUESTION, f"{first} {QUESTION}")]
    prompts = pipeline.family.write_prompts(asked, template="{question}{image}")
    for (question, images), ids in zip(asked, prompts, strict=True):
        assert torch.equal(ids, pipeline.family.write_prompt(question, images, template="{question}{image}"))
    assert [int((ids == ids[0]).sum()) for ids in prompts] == [1, 1]


def test_encode_all_goes_on_after_a_bad_image(pipeline, image, tmp_path, noise):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    others = []
    for seed in range(1, 4):
        others.append(tmp_path / f"{seed}.png")
        noise((50, 40), seed).image.save(others[-1])
    pipeline.encode(image)
    results = {name: (result, hit) for name, result, hit in pipeline.encode_all([image, bad, *others], batch=2)}
    assert results[str(image)][1] is True
    assert isinstance(results[str(bad)][0], BadInput)
    assert [results[str(path)][0].count for path in others] == [16, 16, 16]
    single = Pipeline(pipeline.model, dtype="float32").encode(others[0])[0]
    assert torch.allclose(results[str(others[0])][0].vision_features, single.vision_features, atol=1e-5)
