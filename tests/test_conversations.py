"""Conversations: prompts and answers are transformers' own, and a turn that goes on gives what it gives anew."""

import pytest
import torch
from tiny_families import load_reference, open_pipeline
from transformers import ProcessorMixin

from gridprune_cli.errors import BadInput
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.questions import MAX_CONVERSATION, Exchange
from gridprune_cli.settings import Pruning, Request, check_pin
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.conversations import Conversations

QUESTIONS = ("what colour is the left object?", "  and the right one? ", "why is it so?")
ANSWERS = ("a red square", "")
HISTORY = (Exchange(QUESTIONS[0], ANSWERS[0], 1), Exchange(QUESTIONS[1], ANSWERS[1]))


ALWAYS = ("llava", "qwen2_vl", "qwen3_vl", "idefics3", "gemma3")  # the others do nothing that none of these does
OFTEN = [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module", params=[name for name in OFTEN if "paligemma" not in str(name)])
def folder(request, checkpoint):
    return checkpoint(request.param)


def transformers_inputs(pipeline, pictures):
    """What transformers' own processor makes of the conversation: a picture with the first and with the last turn."""
    messages = []
    for question, answer, of_turn in zip(QUESTIONS, (*ANSWERS, None), (pictures[:1], [], pictures[1:]), strict=True):
        content = [{"type": "image", "image": picture.image} for picture in of_turn]
        messages.append({"role": "user", "content": [*content, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return dict(ProcessorMixin.apply_chat_template(pipeline.family.processor, messages, **options))


def test_everything_kept_is_transformers_own_conversation(folder, noise):
    pipeline, pictures = open_pipeline(folder), [noise((100, 80)), noise((60, 90), seed=1)]
    images = [pipeline.encoder.encode([picture], several=True)[0] for picture in pictures]
    pruned = pipeline.prune(images, QUESTIONS[-1], Pruning(keep=1.0), history=HISTORY)
    inputs = transformers_inputs(pipeline, pictures)
    assert torch.equal(pruned.input_ids, inputs["input_ids"][0])
    length = len(pruned.input_ids)
    expected = load_reference(folder).generate(**inputs, max_new_tokens=12, do_sample=False)[0, length:].tolist()
    assert list(pipeline.runner().generate_one(pruned, max_new_tokens=12).ids) == expected


def test_a_turn_goes_on_from_the_one_before(folder, noise, monkeypatch):
    """Token for token, and nothing that the turn before was asked with is computed again."""
    held = []  # how many tokens of each prompt
    take = Conversations.take
    monkeypatch.setattr(
        Conversations, "take", lambda *rest: held.append((cache := take(*rest)).get_seq_length()) or cache
    )
    pipeline = open_pipeline(folder)
    image, conversations, history = pipeline.encoder.encode([noise((210, 70))])[0], Conversations(0), []
    lengths = []
    for question in QUESTIONS:
        pruned = pipeline.prune(image, question, Pruning(keep=0.4, query=QUESTIONS[0]), history=history)
        lengths.append(len(pruned.input_ids))
        anew = pipeline.runner().generate_one(pruned, max_new_tokens=8)
        further = pipeline.runner().generate_one(pruned, max_new_tokens=8, conversations=conversations)
        assert further.ids == anew.ids
        history.append(Exchange(question, further.text, int(not history)))
    assert held[0] == 0 and held[1] >= lengths[0] and held[2] >= lengths[1]


def test_only_what_is_the_same_is_gone_on_from(checkpoint, noise):
    pipeline = open_pipeline(checkpoint("llava"))
    first, second = (pipeline.encoder.encode([noise((100, 80), seed)])[0] for seed in range(2))
    runner, conversations = pipeline.runner(), Conversations()

    def held(image, question, history=(), **settings):
        """How many tokens of the prompt are held; what is taken is put back by the answer."""
        pruned = pipeline.prune(image, question, Pruning(query="left", **settings), history=history)
        counts = []
        take = Conversations.take
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Conversations, "take", lambda *rest: counts.append((cache := take(*rest)).get_seq_length()) or cache
            )
            generated = runner.generate_one(pruned, max_new_tokens=4, conversations=conversations)
        assert generated.ids == runner.generate_one(pruned, max_new_tokens=4).ids
        return counts[0], generated.text

    count, answer = held(first, "which?")
    assert count == 0
    history = [Exchange("which?", answer, 1)]
    assert held(second, "and?", history)[0] == 0  # another picture
    assert held(first, "and?", history, keep=0.5)[0] == 0  # other tokens
    assert held(first, "and?", history, positions="compact")[0] == 0
    whole, _ = held(first, "and?", history)
    assert whole > 0
    assert 0 < held(first, "and?", [Exchange("which?", "no", 1)])[0] < whole  # another answer: up to there
    assert held(first, "which?")[0] > 0  # a question again: its last token is run
    latest_only = Conversations(0)
    for image in (first, second, first):
        pruned = pipeline.prune(image, "which?")
        runner.generate_one(pruned, max_new_tokens=4, conversations=latest_only)
        assert len(latest_only._turns) == 1 and torch.equal(latest_only._turns[0].embeds, pruned.image_embeds)


def test_an_image_that_sees_the_question_is_run_anew_for_another(checkpoint, noise):
    pipeline, conversations = open_pipeline(checkpoint("paligemma")), Conversations()
    image = pipeline.encoder.encode([noise((100, 80))])[0]
    for question in QUESTIONS:
        pruned = pipeline.prune(image, question, Pruning(keep=1.0))
        anew, further = (
            pipeline.runner().generate_one(pruned, max_new_tokens=4, conversations=held)
            for held in (None, conversations)
        )
        assert further.ids == anew.ids
    assert not conversations._turns


def test_beams_and_schedules_are_run_as_a_whole(checkpoint, noise):
    pipeline, conversations = open_pipeline(checkpoint("llava")), Conversations()
    image = pipeline.encoder.encode([noise((100, 80))])[0]
    whole, inner = pipeline.prune(image, "which?"), pipeline.prune(image, "which?", Pruning(ilp=0.2))
    for pruned, options in ((whole, {"num_beams": 2}), (inner, {})):
        for _ in range(2):
            anew, further = (
                pipeline.runner().generate_one(pruned, max_new_tokens=4, conversations=held, **options)
                for held in (None, conversations)
            )
            assert further.ids == anew.ids
    assert not conversations._turns
    with pytest.raises(BadInput, match="prompt goes through"):
        check_pin(Pruning(ilp=0.2))
    with pytest.raises(BadInput, match="chooses anew"):
        check_pin(Pruning(method=make_method("fastv")))


def test_a_turn_keeps_what_the_question_by_itself_keeps(checkpoint, noise):
    """Also by the language model's attention, which would see what was said before."""
    for name, folder in (("llava", checkpoint("llava")), ("qwen2_vl", checkpoint("qwen2_vl"))):
        pipeline = open_pipeline(folder)
        assert pipeline.family.relevance_kind == ("clip" if name == "llava" else "attention")
        image = pipeline.encoder.encode([noise((210, 140))])[0]
        alone = pipeline.prune(image, QUESTIONS[2], Pruning(keep=0.3))
        turn = pipeline.prune(image, QUESTIONS[2], Pruning(keep=0.3), history=HISTORY)
        assert torch.equal(turn.kept, alone.kept) and len(turn.input_ids) > len(alone.input_ids)
        batch = [Request((image,), QUESTIONS[2], Pruning(keep=0.3), history=turns) for turns in ((), HISTORY)]
        for (_, result), one in zip(sorted(pipeline.runner().prune(batch)), (alone, turn), strict=True):
            assert torch.equal(result.pruned.kept, one.kept) and torch.equal(result.pruned.input_ids, one.input_ids)


@pytest.mark.parametrize(
    "history, reason",
    [
        ([Exchange(" ", "x", 1)], "question 1 of the conversation is empty"),
        ([Exchange("q", "x", 1), Exchange("q", "\ud800")], "answer 2 of the conversation holds half a character"),
        ([Exchange("q", "x", 2)], "more images than the 1"),
        ([Exchange("q", "x", -1)], "has -1 images"),
        ([Exchange("q" * 60_000, "x" * 60_000)] * 5, f"600000 characters; at most {MAX_CONVERSATION}"),
        ([Exchange("q", "word " * 3000, 1)], "the prompt takes .* positions.*; begin a new conversation"),
        ([Exchange("q", "an <image>", 1)], "leave it out of questions, answers and `system`"),
    ],
)
def test_what_is_no_conversation_is_refused(checkpoint, noise, history, reason):
    pipeline = open_pipeline(checkpoint("llava"))
    image = pipeline.encoder.encode([noise((50, 50))])[0]
    with pytest.raises(BadInput, match=reason):
        pipeline.prune(image, "which?", history=history)


def test_models_that_hold_none(checkpoint, noise, monkeypatch):
    pipeline = open_pipeline(checkpoint("llava"))
    image = pipeline.encoder.encode([noise((50, 50))])[0]
    history = [Exchange("which?", "this", 1)]
    with pytest.raises(BadInput, match="template: holds one question"):
        pipeline.prune(image, "and?", template="{image}{question}", history=history)
    processor = pipeline.family.processor
    latest = (
        "USER: {% for part in messages[-1].content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    )
    for template, reason in (
        ("<image>" + latest, "can't hold a conversation: it leaves earlier turns out"),
        ("{{ raise_exception('one turn only') }}", r"can't hold this conversation \(one turn only\)"),
    ):
        monkeypatch.setattr(processor, "chat_template", template)
        with pytest.raises(BadInput, match=reason):
            pipeline.prune(image, "and?", history=history)
    paligemma = open_pipeline(checkpoint("paligemma"))
    image = paligemma.encoder.encode([noise((50, 50))])[0]
    with pytest.raises(BadInput, match="holds no conversation"):
        paligemma.prune(image, "and?", history=history)
