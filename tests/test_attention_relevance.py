"""Relevance from attention, against transformers' eager attentions of the whole prompt."""

from itertools import groupby

import pytest
import torch
from test_prefix import attention_of, whole_model
from tiny_families import load_reference, open_family, open_pipeline

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm import prefix as prefix_module
from gridprune_cli.vlm.attention_relevance import scale_attention
from gridprune_cli.vlm.prefix import attend_images, compute_prefix
from gridprune_cli.vlm.relevance import candidate_depths

QUESTION = "what colour is the left object?"
TOP = Pruning(keep=0.3, method=make_method("topk-relevance"))
SIZES = (100, 100), (60, 90)


def slow_scale(attention):
    """The formula, value by value: 0 for the least, 1 for what a hundredth of the tokens reach."""
    values = sorted(attention.tolist())
    low, high = values[0], values[-(-99 * (len(values) - 1) // 100)]
    high = high if high > low else values[-1]
    return [min(1, (value - low) / (high - low)) if high > low else 0 for value in attention.tolist()]


@pytest.mark.parametrize("count", [1, 2, 16, 99, 101, 256, 1000])
def test_attention_is_brought_to_0_and_1_but_for_the_highest(count):
    attention = torch.rand(count, generator=torch.Generator().manual_seed(count)) ** 8
    attention[count // 2] = 1000  # a sink
    scaled = scale_attention(attention)
    torch.testing.assert_close(scaled, torch.tensor(slow_scale(attention), dtype=torch.float32))
    if count > 101:  # the sink does not set the scale of the others
        assert 0.001 < scaled.mean() < 1 and int((scaled == 1).sum()) in range(2, count // 50)
    assert torch.equal(scale_attention(torch.full((count,), 0.3)), torch.zeros(count))


@pytest.mark.parametrize("name", FAMILIES)
def test_relevance_is_the_attention_of_the_whole_model(name, checkpoint, noise):
    folder = checkpoint(name)
    pipeline = Pipeline(str(folder), dtype="float32", relevance="attention")
    pictures = [noise((100, 100)), noise((60, 90), 1)]
    images = [pipeline.encoder.encode([picture], several=True)[0] for picture in pictures]
    pruned = pipeline.prune(images, QUESTION, TOP)
    case = type("Case", (), {"family": pipeline.family, "images": images})
    case.prompt, case.reference = whole_model(folder, name, pictures)
    expected = attention_of(case, pipeline.family.relevance_depth, lambda attention: attention.amax((0, 1)))
    scaled = torch.cat([torch.tensor(slow_scale(of_image)) for of_image in expected])
    torch.testing.assert_close(pruned.relevance, scaled, rtol=1e-4, atol=1e-4)
    assert set(pipeline.family._loaded) <= {"tower", "projector"}  # the language model's first layers alone
    # images that share a budget share a scale
    together = pipeline.prune(images, QUESTION, Pruning(keep=0.3, method=TOP.method, share_budget=True))
    one_scale = torch.tensor(slow_scale(torch.cat(expected)))
    torch.testing.assert_close(together.relevance, one_scale, rtol=1e-4, atol=1e-4)


@pytest.fixture
def pipeline(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32", relevance="attention")


@pytest.fixture
def encoded(tiny_llava, noise):
    return open_pipeline(tiny_llava).encoder.encode([noise((100, 100))])[0]


def relevance_of_whole(family, prompt, image):
    """Relevance from eager attentions of transformers' whole model on the token ids of a prompt about one image."""
    model = load_reference(family.checkpoint.folder, attn_implementation="eager")
    with torch.no_grad():
        features = {"image": family.features([family.project(image.vision_features)])}
        attentions = model(input_ids=prompt[None], mm_encoder_outputs=features, output_attentions=True).attentions
    at_image = prompt == family.image_token
    behind = int(at_image.nonzero()[-1]) + 1
    attention = attentions[family.relevance_depth - 1][0, :, behind:].amax((0, 1))[at_image]
    return torch.tensor(slow_scale(attention))


def test_a_query_a_system_text_and_a_template_are_what_the_model_reads(pipeline, encoded):
    family = pipeline.family
    query, system, template = "the red star", "Answer in one word.", "Look: {image} Say: {question} Now:"
    for pruning, options, text in (
        (TOP, {}, QUESTION),
        (Pruning(keep=0.3, method=TOP.method, query=query), {}, query),
        (TOP, {"system": system}, QUESTION),
        (TOP, {"template": template}, QUESTION),
    ):
        pruned = pipeline.prune(encoded, QUESTION, pruning, **options)
        prompt = family.write_prompt(text, [encoded], **options)
        torch.testing.assert_close(pruned.relevance, relevance_of_whole(family, prompt, encoded), rtol=1e-4, atol=1e-4)
        assert pruned.question == QUESTION


def test_a_question_ahead_of_the_image_is_seen_by_it(pipeline, encoded):
    options = {"template": "{question} {image} Answer:"}
    for question in (QUESTION, "is it red?"):
        pruned = pipeline.prune(encoded, question, TOP, **options)
        prompt = pipeline.family.write_prompt(question, [encoded], **options)
        expected = relevance_of_whole(pipeline.family, prompt, encoded)
        torch.testing.assert_close(pruned.relevance, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadInput, match=r"^template: .*there is none; put the question behind it"):
        pipeline.prune(encoded, QUESTION, TOP, template="{question} {image}")


def test_questions_about_one_image_share_its_prefix(pipeline, encoded, monkeypatch):
    from gridprune_cli import prefixes

    computed = []
    compute = prefixes.compute_prefix
    monkeypatch.setattr(prefixes, "compute_prefix", lambda *args: computed.append(1) or compute(*args))
    first = [pipeline.prune(encoded, question, TOP).relevance for question in (QUESTION, "is it red?", QUESTION)]
    assert len(computed) == 1 and torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    pipeline.prune(encoded, QUESTION, TOP, system="Be brief.")  # stands ahead of the image
    assert len(computed) == 2


def test_attention_that_is_not_finite_ends_with_a_line(tiny_llava, encoded):
    pipeline = Pipeline(str(tiny_llava), dtype="float32", relevance="attention")
    layer = pipeline.family.load("language").get_submodule(pipeline.family.text_model).layers[0]
    weight = layer.self_attn.k_proj.weight
    layer.self_attn.k_proj.weight = torch.nn.Parameter(torch.full_like(weight, torch.nan))
    with pytest.raises(GridpruneError, match="not finite; try `dtype=float32`"):
        pipeline.prune(encoded, QUESTION, TOP)


def test_the_layer_of_relevance_attends_to_everything(checkpoint, monkeypatch):
    family = open_family(checkpoint("gemma3"))
    text = family.config.get_text_config()
    sliding, full = "sliding_attention", "full_attention"
    for kinds, depth in (
        ([sliding] * 5 + [full] + [sliding] * 4, 6),  # as published: each sixth
        ([full] * 6, 3),
        ([sliding, full, sliding, full], 2),
        ([sliding] * 4, 2),  # nothing does
        ([full], 1),
    ):
        monkeypatch.setattr(text, "layer_types", kinds)
        monkeypatch.setattr(text, "num_hidden_layers", len(kinds))
        family.__dict__.pop("relevance_depth", None)
        assert family.relevance_depth == depth
    family.__dict__.pop("relevance_depth")
    assert candidate_depths([full] * 28) == (3, 7, 10, 14, 17, 21)
    assert candidate_depths([full] * 6) == (1, 2, 3, 4) and candidate_depths([full]) == ()
    assert candidate_depths(([sliding] * 5 + [full]) * 3) == (6, 12)


def test_many_questions_at_once_are_answered_as_one_at_a_time(tiny_llava, tmp_path, noise):
    """While the language model generates, and prunes inside, its first layers are asked what to keep next."""
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        noise((100, 80), n).image.save(path)
    pruning = Pruning(keep=0.5, ilp=0.25, ilp_layer=1)
    requests = [Request((path,), f"is the {n}th red?", pruning) for path in paths for n in range(8)]
    many = Pipeline(str(tiny_llava), dtype="float32", relevance="attention")
    replies = list(many.runner(images=1, questions=2).answer(requests, max_new_tokens=6))
    single = Pipeline(str(tiny_llava), dtype="float32", relevance="attention")
    for request, reply in zip(requests, replies, strict=True):
        answer = single.ask(request.images, request.question, pruning, max_new_tokens=6)
        assert (reply.text, reply.record) == (answer.text, answer.pruned.to_json())


@pytest.mark.parametrize("name", FAMILIES)
def test_questions_of_all_lengths_about_all_images_keep_what_single_ones_keep(name, checkpoint, noise, monkeypatch):
    """About one image, another one of another size, and both, with texts of three lengths; also in little memory."""
    folder = checkpoint(name)
    pipeline = Pipeline(str(folder), dtype="float32", relevance="attention")
    several = [pipeline.encoder.encode([noise(size, seed)], several=True)[0] for seed, size in enumerate(SIZES)]
    single = [pipeline.encoder.encode([noise(size, seed)])[0] for seed, size in enumerate(SIZES)]
    questions = ("is it red?", QUESTION, "which of them all is the larger one, the square or the circle?")
    about = [single[:1], single[1:], single[:1], several, single[1:], single[:1], several]
    requests = [Request(tuple(images), questions[n % 3], TOP) for n, images in enumerate(about)]
    alone = [pipeline.prune(request.images, request.question, TOP) for request in requests]
    batches = []
    monkeypatch.setattr(prefix_module, "_run", lambda *a, run=prefix_module._run: batches.append(len(a[1])) or run(*a))
    for most in (1 << 30, 1):
        monkeypatch.setattr(prefix_module, "MAX_BYTES", most)
        batches.clear()
        for n, result in pipeline.runner().prune(requests):
            torch.testing.assert_close(result.pruned.relevance, alone[n].relevance, rtol=1e-5, atol=1e-5)
            assert torch.equal(result.pruned.kept, alone[n].kept)
        assert (max(batches) == 1) == (most == 1)
        if most > 1 and name != "llava_onevision":  # which encodes several images in another way, so apart
            slides = name == "gemma3"  # whose texts must be of one length
            assert max(batches) == (3 if slides else len(requests))


def test_prefixes_are_held_while_a_batch_needs_them(pipeline, noise, monkeypatch):
    """Each is asked for once where all of its questions are in one batch, and batches are within bounds."""
    images = [pipeline.encoder.encode([noise((100, 100), seed)])[0] for seed in range(4)]
    prompts = [pipeline.family.write_prompt(f"is it {n}?", [images[n % 4]]) for n in range(12)]
    of_prompts = [[images[n % 4]] for n in range(12)]
    depth = pipeline.family.relevance_depth
    calls, computed = [], {}

    def find(prompt, of_prompt):
        calls.append(of_prompt[0].key)
        if of_prompt[0].key not in computed:
            computed[of_prompt[0].key] = compute_prefix(pipeline.family, prompt, of_prompt, depth)
        return computed[of_prompt[0].key]

    whole = attend_images(pipeline.family, prompts, of_prompts, depth, find)
    assert [len(list(group)) for _, group in groupby(calls)] == [3] * 4
    sizes = []
    attend_batch = prefix_module._attend_batch
    monkeypatch.setattr(prefix_module, "_attend_batch", lambda f, b, *a: sizes.append(len(b)) or attend_batch(f, b, *a))
    monkeypatch.setattr(prefix_module, "MAX_BYTES", 1 << 17)
    in_batches = attend_images(pipeline.family, prompts, of_prompts, depth, find)
    assert sum(sizes) == 12 and 1 < max(sizes) < 12
    for (expected,), (attention,) in zip(whole, in_batches, strict=True):
        torch.testing.assert_close(attention, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True])
def test_both_is_half_of_clip_and_half_of_attention(shared, tiny_llava, tmp_path, noise):
    paths = [tmp_path / f"{n}.png" for n in range(2)]
    for n, path in enumerate(paths):
        noise((100, 80), n).image.save(path)
    pruning = Pruning(keep=0.3, method=TOP.method, share_budget=shared)

    def relevance(source):
        pipeline = Pipeline(str(tiny_llava), dtype="float32", relevance=source)
        pruned = pipeline.prune(paths, QUESTION, pruning)
        return pruned.relevance, [image.count for image in pruned.images], pruned.relevance_source

    by_clip, counts, source = relevance("clip")
    by_attention = relevance("attention")[0]
    images = [by_clip] if shared else by_clip.split(counts)
    scaled = torch.cat([(cosine - cosine.min()) / (cosine.max() - cosine.min()) for cosine in images])
    joined, _, source_of_both = relevance("both")
    torch.testing.assert_close(joined, (scaled + by_attention) / 2)
    assert source_of_both == {"source": "both", "model": source["model"], "depth": 1}


@pytest.mark.parametrize("source", ["attention", "both"])
def test_an_answer_reads_the_language_model_once(source, tiny_llava, tmp_path, noise, monkeypatch):
    noise((100, 80)).image.save(tmp_path / "a.png")
    pipeline, reads = Pipeline(str(tiny_llava), dtype="float32", relevance=source), []
    read = pipeline.family._read
    monkeypatch.setattr(pipeline.family, "_read", lambda *rest, **more: reads.append(1) or read(*rest, **more))
    pipeline.ask(tmp_path / "a.png", QUESTION, TOP, max_new_tokens=1)
    assert len(reads) == 1


def test_both_needs_a_clip(checkpoint):
    with pytest.raises(BadInput, match=r"^relevance=both: the tower of .* is no CLIP or SigLIP; use `relevance=att"):
        Pipeline(str(checkpoint("qwen2_vl")), relevance="both")
