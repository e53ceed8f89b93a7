"""Localisers: what is read of an answer, what becomes of the region, what the cache saves, and the embedded one."""

import json
import os
import random
import re
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gridprune_cli.cache.store import open_store
from gridprune_cli.errors import BadInput
from gridprune_cli.images import Picture
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.region import contextual_region
from gridprune_cli.regions import ALL_TOKENS, TEMPLATE, read_answer
from gridprune_cli.runners import local
from gridprune_cli.runners.local import Runner
from gridprune_cli.scenes import LOCALIZER
from gridprune_cli.scenes.questions import questions
from gridprune_cli.scenes.scene import HELDOUT, draw, make_scene
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.tokens import PrunedSet

QUESTION = "Where is the star?"
BARE = Pruning(localizer=str(LOCALIZER), localizer_template="{question}")  # the embedded one, as any other model

boxes = st.tuples(*[st.integers(0, 7)] * 4).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
plain = st.text(st.characters(exclude_characters="[]"), max_size=20)


@given(boxes, plain, plain, st.lists(st.sampled_from(["", " ", "\n", "\t "]), min_size=8, max_size=8))
def test_a_box_alone_in_its_brackets_is_read_whatever_is_around_it(box, before, after, space):
    inside = ",".join(f"{space[2 * i]}{n}{space[2 * i + 1]}" for i, n in enumerate(box))
    assert read_answer(f"{before}[{inside}]{after}") == box


@given(st.one_of(st.text(max_size=30), st.text("[],0123789 -.", max_size=30)))
def test_what_is_read_is_always_a_box(text):
    box = read_answer(text)
    if box is not None:
        x0, y0, x1, y1 = box
        assert 0 <= x0 <= x1 <= 7 and 0 <= y0 <= y1 <= 7
        assert re.findall(r"[0-9]", text[text.index("[") : text.index("]")]) == [str(n) for n in box]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,2,3,4",
        "[1,2,3]",
        "[1,2,3,4,5]",
        "[1,2,3,8]",
        "[3,2,1,4]",
        "[1,4,3,2]",
        "[-1,2,3,4]",
        "[1.0,2,3,4]",
        "[01,2,3,4]",
        "[\u0661,2,3,4]",  # a digit, but none of ours
        "[1 2 3 4]",
        "[1,2,3,4] or [2,3,4,5]",
        "[1,2,3,4] [1,2,3,4]",
        "[the star] is in [1,2,3,4]",
        "(1,2,3,4)",
        "[x0,y0,x1,y1]",
    ],
)
def test_what_is_no_box_or_not_the_only_one_is_refused(text):
    assert read_answer(text) is None


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    draw(make_scene(HELDOUT))[0].save(path)
    return path


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), store=open_store(), dtype="float32")


def test_a_box_becomes_the_region_and_is_told(pipeline, image):
    answer = pipeline.ask(image, QUESTION, BARE, max_new_tokens=4)
    (origin,) = answer.pruned.images
    assert origin.region == read_answer(origin.localizer["answer"]) is not None
    assert origin.localizer == {"name": str(LOCALIZER), "answer": origin.localizer["answer"], "parsed": True}
    assert answer.to_json()["localizer"] == origin.localizer and answer.to_json()["region"] == origin.region
    assert PrunedSet.from_bytes(answer.pruned.to_bytes(), "x").images == answer.pruned.images
    same = pipeline.ask(image, QUESTION, Pruning(region=origin.region), max_new_tokens=4)
    assert torch.equal(same.pruned.kept, answer.pruned.kept) and same.text == answer.text
    assert same.pruned.images[0].localizer is None
    assert answer.ms["localize"] > 0 and same.ms["localize"] == 0
    assert not answer.notes


def test_an_answer_that_is_no_box_falls_back_to_the_relevance_and_says_so(pipeline, image, tiny_llava):
    pruning = Pruning(localizer=str(tiny_llava))
    answer = pipeline.ask(image, QUESTION, pruning, max_new_tokens=4)
    (origin,) = answer.pruned.images
    assert origin.localizer["parsed"] is False
    assert origin.region == contextual_region(answer.pruned.relevance, origin.views)
    (note,) = answer.notes
    assert str(tiny_llava) in note and "no region" in note
    plain = pipeline.ask(image, QUESTION, max_new_tokens=4)
    assert torch.equal(plain.pruned.kept, answer.pruned.kept)
    assert plain.pruned.images[0].localizer == {"name": "relevance"} and not plain.notes


def test_the_second_question_runs_no_tower(pipeline, image, tiny_llava):
    first = pipeline.ask(image, QUESTION, BARE, max_new_tokens=4)
    assert len(list(pipeline.store.entries())) == 2
    later = Pipeline(str(tiny_llava), store=open_store(), dtype="float32")
    second = later.ask(image, QUESTION, BARE, max_new_tokens=4)
    assert second.hit and second.pruned.images == first.pruned.images
    localizer = later.localizers.find(BARE)
    assert set(later.family._loaded) == set(localizer.family._loaded) == {"projector", "language"}


def test_a_model_is_asked_for_a_box_with_all_tokens(pipeline, image, tiny_llava, monkeypatch):
    prompts = []
    build = local.build_pruned_sets

    def spy(family, requests, *rest, **options):
        sets = build(family, requests, *rest, **options)
        prompts.extend((pruned.question, len(pruned.kept) == pruned.count) for pruned in sets)
        return sets

    monkeypatch.setattr(local, "build_pruned_sets", spy)
    for pruning in (
        Pruning(localizer=str(tiny_llava)),
        Pruning(localizer=str(tiny_llava), localizer_template="{question} Box?"),
        Pruning(localizer=str(tiny_llava), localizer_template="{question} Box?", query="the star"),
    ):
        pipeline.prune(image, QUESTION, pruning)
    answered, prompts = prompts[1::2], prompts[::2]  # a localiser is asked first
    assert answered == [(QUESTION, False)] * 3
    assert prompts.pop() == ("the star Box?", True)
    assert prompts == [(TEMPLATE.replace("{question}", QUESTION), True), (f"{QUESTION} Box?", True)]
    assert "[x0,y0,x1,y1]" in TEMPLATE and QUESTION in prompts[0][0]


def test_each_image_has_its_own_region_unless_they_share_a_budget(pipeline, image, tmp_path):
    other = tmp_path / "other.png"
    draw(make_scene(HELDOUT + 1))[0].save(other)
    both = answers(pipeline, [image, other], QUESTION, BARE)
    assert both == answers(pipeline, [image], QUESTION, BARE) + answers(pipeline, [other], QUESTION, BARE)
    assert both[0] != both[1] and all(localizer["parsed"] for localizer, _ in both)
    shared = Pruning(localizer=BARE.localizer, share_budget=True)
    assert answers(pipeline, [image, other], QUESTION, shared) == [(None, None)] * 2


def test_many_questions_are_localised_as_each_is_alone(pipeline, image, tmp_path):
    other = tmp_path / "other.png"
    draw(make_scene(HELDOUT + 1))[0].save(other)
    images = [[image], [image, other], [other]]
    questions = [QUESTION, "Where is the red circle?", "How many stars are there?"]
    shared = replace(BARE, share_budget=True)
    for prunings in ([BARE] * 3, [BARE, shared, shared]):
        requests = [Request(tuple(paths), *rest) for paths, *rest in zip(images, questions, prunings, strict=True)]
        together = dict(pipeline.runner().prune(requests))
        for n, request in enumerate(requests):
            alone = answers(pipeline, list(request.images), request.question, request.pruning)
            assert [(i.localizer, i.region) for i in together[n].pruned.images] == alone
            assert (alone[0][0] is None) == (prunings[n] is shared and len(images[n]) > 1)


def answers(pipeline, images, question, pruning):
    """What a localiser answered for each image, and the region."""
    return [(origin.localizer, origin.region) for origin in pipeline.prune(images, question, pruning).images]


def test_a_localiser_sees_the_picture_that_was_encoded(pipeline, image, tmp_path, noise):
    """That of a pipe, which can be read only once, too; a file that changed in between is refused."""
    expected = answers(pipeline, image, QUESTION, BARE)
    data, pipe = image.read_bytes(), tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(data,))
    writer.start()
    assert answers(pipeline, pipe, QUESTION, BARE) == expected
    writer.join()
    encoded, _ = pipeline.encode(image)
    assert answers(pipeline, encoded, QUESTION, BARE) == expected
    noise((50, 50)).image.save(image)
    with pytest.raises(BadInput, match="changed while it was in use"):
        pipeline.prune(encoded, QUESTION, BARE)


def test_nobody_is_asked_where_no_region_is_to_be_found(pipeline, image):
    assert pipeline.localizers.find(Pruning()) is None
    assert pipeline.localizers.find(Pruning(localizer="vlm", share_budget=True), images=2) is None


def test_settings_that_cannot_be(pipeline, image):
    encoded, _ = pipeline.encode(image)
    with pytest.raises(BadInput, match="localizer_template: needs"):
        Pruning(localizer="vlm", localizer_template="Where?")
    with pytest.raises(BadInput, match="give the file of"):
        pipeline.prune(replace(encoded, source=None), QUESTION, BARE)
    with pytest.raises(BadInput, match=r"localizer=vlm: .*FOLDER"):
        pipeline.ask(image, QUESTION, Pruning(localizer="vlm"))
    with pytest.raises(BadInput, match="localizer=no/such/model: no folder"):
        pipeline.ask(image, QUESTION, Pruning(localizer="no/such/model"))


# ---- the embedded one ------------------------------------------------------------------------------------------------


def test_plain_transformers_loads_it_and_answers_the_same():
    model, info = LlavaForConditionalGeneration.from_pretrained(
        LOCALIZER, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    processor = AutoProcessor.from_pretrained(LOCALIZER)
    main = Pipeline()
    pruning = Pruning(localizer="vlm")
    localizer = main.localizers.find(pruning)
    runner = Runner(localizer, main.localizers)
    for seed in range(HELDOUT, HELDOUT + 10):
        picture = draw(make_scene(seed))[0]
        (question,) = questions(make_scene(seed), 1, random.Random(seed))
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[picture], text=text, return_tensors="pt")
        generated = model.eval().generate(**inputs, max_new_tokens=32, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
        (image,) = localizer.encode([Picture(picture, f"{seed:064x}", str(seed))])
        (reply,) = runner.answer([Request((image,), question.text, ALL_TOKENS)])
        assert reply.text == processor.tokenizer.decode(generated, skip_special_tokens=True)
        assert len(generated) == 3 and reply.text == "[{},{},{},{}]".format(*read_answer(reply.text))


def test_it_is_small():
    files = [path for path in LOCALIZER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 7_000_000
    assert json.loads((LOCALIZER / "config.json").read_text())["dtype"] == "bfloat16"
