"""Everything on a pretend accelerator: a tensor on the wrong side fails, answers are the CPU's, moves are counted."""

import functools
import inspect
import json
import shutil
import textwrap
from math import prod
from pathlib import Path

import pytest
import torch
from accelerator import MIXED, NAME, PretendTensor, counted

from gridprune_cli import generation
from gridprune_cli.errors import GridpruneError
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import METHODS, make_method
from gridprune_cli.runners import local
from gridprune_cli.runners.local import Pruned, Reply
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.vlm import FAMILIES, clip, llava, prefix, word_relevance
from gridprune_cli.vlm.compressor import Compressor, save_compressor
from gridprune_cli.vlm.family import Family
from gridprune_cli.vlm.inner import hooks

QUESTION = "what colour is the left object?"
SALIENT = Pruning(keep=0.3, method=make_method("fastervlm"))  # which looks at no question
SETTINGS = [
    Pruning(keep=1.0),
    Pruning(keep=0.3, positions="compact"),
    Pruning(keep=0.5, ilp=0.25),
    Pruning(keep=0.5, ilp="region"),
    Pruning(keep=0.3, ilp="selection"),
    Pruning(keep=0.3, plc="pool"),
]
BY_METHOD = [Pruning(keep=0.3, method=make_method(name)) for name in METHODS]


@functools.cache
def open_on(device: str, folder: Path, **settings) -> Pipeline:
    pipeline = Pipeline(str(folder), device=device, dtype="float32", **settings)
    pipeline.family.load("tower", "projector", "language")
    if pipeline.family.relevance_kind in ("clip", "both"):
        pipeline.family.relevance.load()
    return pipeline


def answer(pipeline, requests, **options):
    """(answer, kept) of each, in batches as `batch` makes them."""
    replies = list(pipeline.runner(questions=8).answer(requests, max_new_tokens=3, **options))
    for request, reply in zip(requests, replies, strict=True):
        assert isinstance(reply, Reply), (request.pruning, reply)
    return [(reply.text, reply.record["tokens"], reply.record["positions"]) for reply in replies]


@pytest.fixture
def paths(noise, tmp_path):
    pictures = [tmp_path / "wide.png", tmp_path / "small.png"]
    noise((210, 70)).image.save(pictures[0])
    noise((60, 90), seed=1).image.save(pictures[1])
    return pictures


def floats(transfers, inward):
    """How many numbers each tensor of floats had that crossed in this direction; empty and single ones are left out."""
    crossed = [t for t in transfers if t.inward == inward and t.dtype.is_floating_point]
    return sorted(prod(t.shape) for t in crossed if t.shape and prod(t.shape))


def test_the_device_refuses_what_cuda_refuses():
    here, there = torch.arange(6.0).view(2, 3), torch.arange(6.0).view(2, 3).to(NAME)
    assert isinstance(there, PretendTensor) and there.device.type == NAME and there.tolist() == here.tolist()
    for mixed in (
        lambda: here + there,
        lambda: there @ here.T,
        lambda: torch.cat([here, there]),
        lambda: torch.cat([there, torch.tensor(1.0)[None]]),
        lambda: here[torch.tensor([0], device=NAME)],
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), there),
        lambda: torch.where(torch.ones(2, 3, dtype=torch.bool), there, there),
    ):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=MIXED):
            mixed()
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()
    assert (there * torch.tensor(2.0)).tolist() == (2 * here).tolist()  # of no dimension
    with counted() as transfers:
        assert there[torch.tensor([1])].tolist() == here[[1]].tolist()
    assert [(t.inward, t.shape) for t in transfers] == [(True, (1,)), (False, (1, 3))]
    there[0] = torch.ones(3)  # a copy across, as on a GPU
    there.add_(1)[:, 1:].zero_()
    assert there.cpu().tolist() == [[2, 0, 0], [4, 0, 0]] and torch.arange(3, device=NAME).sum().item() == 3


@pytest.mark.parametrize("name", [*FAMILIES, "llava_siglip"])
def test_answers_and_what_is_kept_are_the_cpus(checkpoint, paths, name):
    """With each way of pruning, for one image and two, in batches; methods, which know no family, on the first."""
    prunings = SETTINGS + (BY_METHOD if name == "llava" else [])
    requests = [Request((paths[0],), QUESTION, pruning) for pruning in prunings]
    requests += [Request(tuple(paths), QUESTION, Pruning(keep=0.3, share_budget=share)) for share in (False, True)]
    check_answers(checkpoint(name), requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in [*FAMILIES, "llava_siglip"] if name != "llava"])
def test_all_methods_on_all_families(checkpoint, paths, name):
    check_answers(checkpoint(name), [Request((paths[0],), QUESTION, pruning) for pruning in BY_METHOD])


@pytest.mark.parametrize("relevance", ["attention", "both", "words"])
def test_wherever_relevance_comes_from(checkpoint, paths, relevance):
    requests = [
        Request((path,), question, Pruning(keep=0.3)) for path in paths for question in (QUESTION, "and right?")
    ]
    check_answers(checkpoint("llava"), requests, relevance=relevance)


def test_localisers_and_the_trained_compressor(checkpoint, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "MAX_ANSWER", 2)
    folder = tmp_path / "compressing"
    shutil.copytree(checkpoint("llava"), folder)
    compressor = Compressor(32)
    for parameter in compressor.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_compressor(compressor, folder)
    prunings = [Pruning(keep=0.3, localizer=str(folder)), Pruning(keep=0.3, plc="trained", region=(0, 0, 3, 7))]
    check_answers(folder, [Request((path,), QUESTION, pruning) for path in paths for pruning in prunings])


def check_answers(folder, requests, **settings):
    on_cpu, on_device = (answer(open_on(device, folder, **settings), requests) for device in ("cpu", NAME))
    assert on_device == on_cpu
    assert len({text for text, _, _ in on_cpu}) > 1


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_is_needed_crosses(checkpoint, paths, name):
    pipeline = open_on(NAME, checkpoint(name))
    family = pipeline.family
    pixels = family._process(open_image(paths[0]))[0]["pixel_values"]
    # 1. encoding: pixels in, states out
    with counted() as transfers:
        image, _ = pipeline.encode(paths[0])
    features, saliency = image.vision_features, image.saliency
    check_on_cpu(image)
    entering, leaving = torch.as_tensor(pixels).numel(), len(image.placeholder_map) * features.shape[1]
    assert entering <= sum(floats(transfers, True)) <= 1.01 * entering  # Idefics3 makes its grids on the CPU
    assert (
        leaving + saliency.numel() <= sum(floats(transfers, False)) <= leaving + 4 * saliency.numel()
    )  # padding's, too
    # 2. a set: what is kept goes through the projector, where there is one
    with counted() as transfers:
        pruned = pipeline.prune(image, QUESTION, SALIENT)
    check_on_cpu(pruned)
    kept = features[pruned.kept].numel()
    assert sum(floats(transfers, True)) in (0, kept)
    assert sum(floats(transfers, False)) <= pruned.image_embeds.numel() + family.embed_width  # a separator
    # 3. an answer: kept states in, ids out
    with counted() as transfers:
        (generated,) = generate(family, [pruned], 8)
    assert floats(transfers, True) == [pruned.image_embeds.numel()]
    assert floats(transfers, False) == []
    numbers = [t for t in transfers if not t.inward]
    assert [t.shape for t in numbers if t.shape] == [(1, len(generated.ids))]
    assert len([t for t in numbers if not t.shape]) <= len(generated.ids) + 4  # whether all have ended
    inward = [t.shape for t in transfers if t.inward and t.shape[-1:] == pruned.input_ids.shape]
    assert len(inward) <= 3  # ids, mask, positions


def test_a_question_waits_for_its_relevance_and_its_embeds(checkpoint, paths):
    """The choice is made on the CPU, where it is the same whatever the device: one small vector leaves for it."""
    pipeline = open_on(NAME, checkpoint("llava"))
    image, _ = pipeline.encode(paths[0])
    with counted() as transfers:
        pruned = pipeline.prune(image, "a question of its own", Pruning(keep=0.3))
    (count, width), (kept, embed_width) = image.vision_features.shape, pruned.image_embeds.shape
    assert [t.shape for t in transfers if not t.inward] == [(count,), (kept, embed_width)]
    ids, *features = [t.shape for t in transfers if t.inward]
    assert ids[0] == 1 and features == [(count, width), (kept, width)]


def test_a_prefix_that_questions_share_crosses_once(checkpoint, paths):
    pipeline = open_on(NAME, checkpoint("llava"), relevance="attention")
    image, _ = pipeline.encode(paths[0])
    prefix = pipeline.encoder.prefixes.find(pipeline.prune(image, QUESTION, Pruning(keep=1.0)).input_ids, (image,))
    requests = [Request((image,), f"{QUESTION} {n}", Pruning(keep=0.3)) for n in range(4)]
    with counted() as transfers:
        assert all(isinstance(pruned, Pruned) for _, pruned in pipeline.runner().prune(requests))
    layers = [t for t in transfers if t.inward and t.shape == prefix.keys.shape[1:]]
    assert len(layers) == 2 * prefix.depth  # keys and values


FAULTY = [Pruning(keep=0.3), Pruning(keep=0.6, method=make_method("fastv")), Pruning(keep=0.3, ilp="selection")]
FAULTS = [  # (whose, its function, what is there, what is planted)
    (Family, "to_device", "tensor.to(self.device, self.dtype if tensor.is_floating_point() else None)", "tensor"),
    (llava.Llava, "encode", "values.cpu()", "values"),
    (llava.Llava, "project", "vision_features.to(self.device, self.dtype)", "vision_features"),
    (clip.ClipRelevance, "__call__", ".cpu()", ""),
    (clip.ClipRelevance, "_patches", "vision_features.to(self.device, self.dtype)", "vision_features"),
    (clip.ClipRelevance, "read", ", device=self.device", ""),
    (generation, "prompts", ".to(family.device)", ""),
    (prefix, "_run", "ids.to(family.device)", "ids"),
    (prefix, "_run", "positions.to(family.device)", "positions"),
    (prefix, "_attend_batch", "weight.to(family.device)", "weight"),
    (prefix, "_attend_batch", "record[0].cpu()", "record[0]"),
    (word_relevance.WordRelevance, "__call__", ".cpu()", ""),
    (word_relevance.WordRelevance, "vectors", "ids.to(self.parts.device)", "ids"),
    (hooks._Run, "_query_weights", ".to(hidden.device)", ""),
    (hooks._Run, "_drop", ".to(hidden.device)", ""),
    (hooks, "_measure", ".cpu()", ""),
    (hooks._Run, "_decode", ", device=hidden.device", ""),
    (hooks, "decode_mask", ", device=hidden.device", ""),
]


_worked: set[str] = set()  # where relevance came from when all went well


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{name}-{there}" for _, name, there, _ in FAULTS])
def test_a_planted_fault_is_found(checkpoint, paths, monkeypatch, fault):
    """A move that is left out fails what worked before."""
    owner, name, there, planted = fault
    function = inspect.unwrap(getattr(owner, name))
    relevance = {prefix.__name__: "attention", word_relevance.__name__: "words"}.get(function.__module__, "clip")
    pipeline = open_on(NAME, checkpoint("llava"), relevance=relevance)

    def work(question):
        images = [pipeline.encode(path)[0] for path in paths]
        sets = [pipeline.prune(images[n % 2], question, pruning) for n, pruning in enumerate(FAULTY)]
        for value in (*images, *sets):
            check_on_cpu(value)
        with counted() as transfers:
            generate(pipeline.family, sets, 2)
        assert max(floats(transfers, inward=False), default=0) < 100, "logits left the device"  # 192 of them; a rule's
        # attention has as many numbers as the prompt has tokens

    if relevance not in _worked:
        work("before")
        _worked.add(relevance)
    source = textwrap.dedent(inspect.getsource(function))
    assert there in source
    namespace = dict(function.__globals__)
    exec(source.replace(there, planted), namespace)  # the function anew, in place of what the module has
    monkeypatch.setattr(owner, name, namespace[name])
    with pytest.raises((RuntimeError, GridpruneError, AssertionError), match=f"{MIXED}|the device"):
        work(f"after {name} {there}")


def test_the_commands_take_the_device(run, paths, tmp_path):
    """`ask` and `batch` answer as on the CPU, and `bench` measures."""
    lines = tmp_path / "questions.jsonl"
    lines.write_text("".join(json.dumps({"image": str(path), "question": QUESTION}) + "\n" for path in paths))
    for arguments in (("ask", paths[0], QUESTION), ("batch", lines)):
        answers = []
        for device in ("cpu", NAME):
            code, out, _ = run(*arguments, "--dtype", "float32", "--device", device, "--no-cache", "-q")
            assert code == 0
            answers.append(out)
        assert answers[0] == answers[1] and answers[0].strip()
    sizes = ("--repeat", 1, "--new-tokens", 2, "--json", "-q")
    code, out, err = run("bench", paths[0], QUESTION, "--dtype", "float32", "--device", NAME, *sizes)
    assert code == 0, err
    report = json.loads(out)
    assert report["pruned"]["tokens"] < report["full"]["tokens"]


def check_on_cpu(value):
    """What goes into files and between processes is on the CPU."""
    for name, tensor in vars(value).items():
        assert not isinstance(tensor, PretendTensor), f"{name} stayed on the device"


def open_image(path):
    from PIL import Image

    return Image.open(path).convert("RGB")
