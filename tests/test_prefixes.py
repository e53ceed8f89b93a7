"""Prefixes in the cache: found again by what they were computed from, and otherwise computed anew."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gridprune_cli.cache import files
from gridprune_cli.cache.files import RawTensor
from gridprune_cli.cache.store import Store
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.prefixes import Prefixes
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners import local
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.vlm import FAMILIES
from gridprune_cli.vlm.prefix import compute_prefix

QUESTION = "what colour is the left object?"
TOP = Pruning(keep=0.3, method=make_method("topk-relevance"))
LATER = Pruning(keep=0.3, method=make_method("fastv", layer=2))


@pytest.fixture
def computed(monkeypatch):
    """How many prefixes were computed, in a list of its own."""
    counts = []

    def count(*arguments):
        counts.append(1)
        return compute_prefix(*arguments)

    monkeypatch.setattr("gridprune_cli.prefixes.compute_prefix", count)
    return counts


@pytest.fixture
def picture_files(tmp_path, noise):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        noise((100, 80), seed).image.save(path)
    return paths


def open_cached(folder, tmp_path, **options):
    """A pipeline as another process would open it: nothing is loaded, the cache is there."""
    options = {"dtype": "float32", "relevance": "attention", "store": Store(tmp_path / "cache", None)} | options
    return Pipeline(str(folder), **options)


def prefix_entries(tmp_path):
    entries = list(Store(tmp_path / "cache", None).entries())
    return [entry for entry in entries if entry.header()["kind"] == "prefix"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_question_about_cached_images_runs_neither_the_tower_nor_their_prefix(
    name, checkpoint, tmp_path, picture_files, computed
):
    folder = checkpoint(name)
    first = open_cached(folder, tmp_path).prune(picture_files, QUESTION, TOP)
    again = open_cached(folder, tmp_path)
    second = again.prune(picture_files, QUESTION, TOP)
    assert second.to_bytes() == first.to_bytes() and "tower" not in again.family._loaded
    stored = not again.family.sees_question
    assert len(computed) == len(prefix_entries(tmp_path)) == stored
    other = open_cached(folder, tmp_path).prune(picture_files, "is it red?", TOP)
    assert len(computed) == stored and not torch.equal(other.relevance, first.relevance)


def test_what_a_prefix_depends_on_is_in_its_key(tiny_llava, tmp_path, picture_files, computed):
    pipeline = open_cached(tiny_llava, tmp_path)
    pipeline.prune(picture_files, QUESTION, TOP)
    for n, (images, options, opened) in enumerate(
        (
            (picture_files[::-1], {}, {}),
            (picture_files[:1], {}, {}),
            (picture_files, {"system": "Be brief."}, {}),
            (picture_files, {"template": "{image} {question}"}, {}),
            (picture_files, {}, {"dtype": "bfloat16"}),
            (picture_files, {}, {"cache_dtype": "int8"}),
        )
    ):
        for _ in range(2):
            open_cached(tiny_llava, tmp_path, **opened).prune(images, QUESTION, TOP, **options)
            assert len(computed) == n + 2
    # and the language model, and the depth
    images = [pipeline.encode(path)[0] for path in picture_files]
    prompt = pipeline.family.write_prompt(QUESTION, images)
    for attribute, value in (("fingerprint", "0" * 64), ("relevance_depth", 3)):
        other = open_cached(tiny_llava, tmp_path).family
        setattr(other, attribute, value)
        before = len(computed)
        Prefixes(other, pipeline.store).find(prompt, images)
        assert len(computed) == before + 1


def changed(name, **fields):
    """A spoilt entry with other bytes or another shape or dtype of one tensor."""

    def spoil(header, tensors):
        return header, tensors | {name: replace(tensors[name], **fields)}

    return spoil


def not_finite(name):
    def spoil(header, tensors):
        return header, tensors | {name: replace(tensors[name], data=b"\xff" * len(tensors[name].data))}

    return spoil


SPOILT = {
    "not finite": not_finite("keys"),
    "hidden states that are not finite": not_finite("hidden_states"),
    "without hidden states": lambda header, tensors: (
        header,
        {name: tensor for name, tensor in tensors.items() if name != "hidden_states"},
    ),
    "another kind": lambda header, tensors: (header | {"kind": "encoded"}, tensors),
    "another schema": lambda header, tensors: (header | {"schema": 1}, tensors),
    "no text": lambda header, tensors: (header | {"name": 1}, tensors),
    "another count": lambda header, tensors: (header | {"tokens": 1}, tensors),
    "without values": lambda header, tensors: (header, {k: v for k, v in tensors.items() if k != "values"}),
    "another dtype": changed("keys", dtype="I32"),
    "other token ids": lambda header, tensors: (
        header,
        tensors | {"ids": replace(tensors["ids"], data=bytes(len(tensors["ids"].data)))},
    ),
    "another shape": lambda header, tensors: (
        header,
        tensors | {name: replace(tensors[name], shape=_swapped(tensors[name])) for name in ("keys", "values")},
    ),
    "narrower hidden states": lambda header, tensors: (
        header,
        tensors | {"hidden_states": _without_half(tensors["hidden_states"])},
    ),
}


def _swapped(tensor: RawTensor) -> tuple[int, ...]:
    """Half the width and twice the heads, in as many bytes."""
    depth, heads, length, width = tensor.shape
    return depth, 2 * heads, length, width // 2


def _without_half(tensor: RawTensor) -> RawTensor:
    """Half as many numbers for each token."""
    length, width = tensor.shape
    return replace(tensor, shape=(length, width // 2), data=tensor.data[: len(tensor.data) // 2])


@pytest.mark.parametrize("how", [*SPOILT, "cut off", "empty"])
def test_an_entry_that_is_spoilt_is_a_miss_with_the_same_answer(how, tiny_llava, tmp_path, picture_files, computed):
    pipeline = open_cached(tiny_llava, tmp_path)
    expected = pipeline.prune(picture_files[0], QUESTION, TOP)
    (entry,) = prefix_entries(tmp_path)
    whole = Path(entry.path).read_bytes()
    if how in SPOILT:
        header, tensors = files.read_path(entry.path)
        header = {name: value for name, value in header.items() if name not in ("tensors", "digest")}
        spoilt = files.encode(*reversed(SPOILT[how](header, tensors)))
    else:
        spoilt = whole[:-100] if how == "cut off" else b""
    assert spoilt != whole
    Path(entry.path).write_bytes(spoilt)
    again = open_cached(tiny_llava, tmp_path).prune(picture_files[0], QUESTION, LATER)  # which does not compute one
    assert again.prefix is None and len(computed) == 1
    expected_answer = pipeline.generate(pipeline.prune(picture_files[0], QUESTION, LATER), max_new_tokens=4)
    assert pipeline.generate(again, max_new_tokens=4) == expected_answer
    Path(entry.path).write_bytes(spoilt)
    pruned = open_cached(tiny_llava, tmp_path).prune(picture_files[0], QUESTION, TOP)
    assert pruned.to_bytes() == expected.to_bytes() and len(computed) == 2
    assert Path(entry.path).read_bytes() == whole  # written again


def test_the_commands_of_the_cache_know_prefixes(run, tmp_path, picture_files):
    ask = ("ask", picture_files[0], QUESTION, "--relevance", "attention")
    assert run(*ask)[0] == 0
    lines = [json.loads(line) for line in run("cache", "ls", "--json", "--sort", "size")[1].splitlines()]
    assert [line["image"] for line in lines] == [str(picture_files[0]), f"prefix of {picture_files[0]}"]
    assert lines[0]["sha256"] == lines[1]["sha256"] and lines[1]["tokens"] > lines[0]["tokens"] > 0
    assert run("cache", "ls")[1].count("prefix of") == 1
    assert json.loads(run("cache", "info", "--json")[1])["entries"] == 2
    assert run("cache", "verify")[0] == 0
    (entry,) = prefix_entries(tmp_path)
    with open(entry.path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    assert run("cache", "verify")[0] == 1
    assert run("cache", "gc", "--max-size", "1")[0] == 0 and not prefix_entries(tmp_path)
    assert run(*ask, "--no-cache")[0] == 0 and not prefix_entries(tmp_path)


def test_many_prefixes_make_room_for_one_another(tiny_llava, tmp_path, picture_files):
    """Unlike encoded images, which a run keeps: each prefix is much larger, and is needed for its own images alone."""
    open_cached(tiny_llava, tmp_path).prune(picture_files[0], QUESTION, TOP)
    (entry,) = prefix_entries(tmp_path)
    limited = open_cached(tiny_llava, tmp_path)
    limited.store.limit = 4 * entry.bytes
    for n in range(9):
        limited.prune(picture_files[0], QUESTION, TOP, system=f"{n}")
        assert sum(e.bytes for e in limited.store.entries()) <= limited.store.limit + entry.bytes
    assert limited.encode(picture_files[0])[1]


@pytest.mark.parametrize("storage", ["float8", "int8"])
def test_a_prefix_in_eight_bits_gives_the_same_answer_new_old_and_uncached(
    storage, tiny_llava, tmp_path, picture_files
):
    options = {"cache_dtype": storage, "dtype": "bfloat16"}
    new = open_cached(tiny_llava, tmp_path, **options).prune(picture_files, QUESTION, TOP)
    (entry,) = prefix_entries(tmp_path)
    old = open_cached(tiny_llava, tmp_path, **options).prune(picture_files, QUESTION, TOP)
    uncached = open_cached(tiny_llava, tmp_path, **options, store=None).prune(picture_files, QUESTION, TOP)
    assert new.to_bytes() == old.to_bytes() == uncached.to_bytes()
    # whether it is there changes no answer but those that always go on from it
    whole = open_cached(tiny_llava, tmp_path, **options).prune(picture_files, QUESTION, Pruning(keep=1.0))
    assert whole.prefix is None and new.prefix is None
    inside = Pruning(keep=0.3, method=TOP.method, ilp="selection")
    assert open_cached(tiny_llava, tmp_path, **options).prune(picture_files, QUESTION, inside).prefix is not None
    header, tensors = files.read_path(entry.path)
    assert header["encoder"]["storage"] == storage
    kind = {"float8": "F8_E4M3", "int8": "I8"}[storage]
    for name in ("keys", "values", "hidden_states"):
        assert tensors[name].dtype == kind and tensors[f"{name}_scales"].dtype == "F32"
        assert tensors[f"{name}_scales"].shape == tensors[name].shape[:-1]
    # as exact as eight bits are
    pipeline = open_cached(tiny_llava, tmp_path, **options)
    images = [pipeline.encode(path)[0] for path in picture_files]
    prompt = pipeline.family.write_prompt(QUESTION, images)
    cached = pipeline.encoder.prefixes.find(prompt, images)
    exact = compute_prefix(pipeline.family, prompt, images, pipeline.family.relevance_depth)
    for name in ("keys", "values", "hidden_states"):
        stored, computed = getattr(cached, name).float(), getattr(exact, name).float()
        assert not torch.equal(stored, computed)
        assert bool(((stored - computed).abs() <= computed.abs().amax(-1, keepdim=True) / 14).all())
    # codes, scales and their dtypes must fit one another
    for name, fields in (
        ("keys_scales", {"shape": (1,), "data": bytes(4)}),
        ("keys", {"dtype": "U8"}),
        ("values_scales", {"data": b"\xff" * len(tensors["values_scales"].data)}),  # not finite
    ):
        spoilt = tensors | {name: replace(tensors[name], **fields)}
        Path(entry.path).write_bytes(files.encode(spoilt, {k: v for k, v in header.items() if k != "tensors"}))
        again = open_cached(tiny_llava, tmp_path, **options)
        assert again.encoder.prefixes.find(prompt, images, compute=False) is None
        assert again.prune(picture_files, QUESTION, TOP).to_bytes() == new.to_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_that_was_made_ahead_is_the_one_that_questions_look_for(
    name, checkpoint, tmp_path, picture_files, computed
):
    folder = checkpoint(name)
    encoding = open_cached(folder, tmp_path)
    if encoding.family.sees_question:
        with pytest.raises(BadInput, match=r"^with_prefix: in .* the image sees the question"):
            list(encoding.encode_all(picture_files, with_prefix=True))
        return
    assert [hit for _, _, hit in encoding.encode_all(picture_files, with_prefix=True)] == [False, False]
    assert len(computed) == len(prefix_entries(tmp_path)) == 2
    expected = open_cached(folder, tmp_path, store=None).prune(picture_files[0], QUESTION, TOP)
    del computed[:]
    assert open_cached(folder, tmp_path).prune(picture_files[0], QUESTION, TOP).to_bytes() == expected.to_bytes()
    assert not computed
    # made where it lacks, and made again where all is
    Path(prefix_entries(tmp_path)[0].path).unlink()
    assert [hit for _, _, hit in open_cached(folder, tmp_path).encode_all(picture_files, with_prefix=True)] == [
        True
    ] * 2
    assert len(computed) == 1
    list(open_cached(folder, tmp_path).encode_all(picture_files, with_prefix=True, refresh=True))
    assert len(computed) == 3 and len(prefix_entries(tmp_path)) == 2


def test_a_prefix_that_fails_fails_its_image_alone(tiny_llava, tmp_path, picture_files, monkeypatch):
    def fail(family, prompt, images, depth):
        if images[0].name == str(picture_files[0]):
            raise RuntimeError("broken")
        return compute_prefix(family, prompt, images, depth)

    monkeypatch.setattr("gridprune_cli.prefixes.compute_prefix", fail)
    (_, first, _), (_, second, _) = open_cached(tiny_llava, tmp_path).encode_all(picture_files, with_prefix=True)
    assert isinstance(first, GridpruneError) and str(first).startswith(f"{picture_files[0]}: unexpected RuntimeError")
    assert second.count and len(prefix_entries(tmp_path)) == 1


def test_the_command_makes_prefixes_where_it_is_told_to(command, tmp_path, picture_files):
    options = (*picture_files, "--model", "scenes", "--relevance", "attention")
    assert command("encode", *options)[0] == 0 and not prefix_entries(tmp_path)
    code, _, err = command("encode", *options, "--with-prefix")
    assert code == 0 and "2 images, 2 of them cached already, 0 B new beside prefixes" in err
    assert len(prefix_entries(tmp_path)) == 2
    ask = ("ask", picture_files[0], QUESTION, "--model", "scenes", "--relevance", "attention")
    assert command(*ask)[0] == 0 and len(prefix_entries(tmp_path)) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_cached_is_used_where_all_tokens_enter_and_else_nothing_is_computed(
    name, checkpoint, tmp_path, picture_files, computed
):
    first, again = (open_cached(checkpoint(name), tmp_path) for _ in range(2))

    def answer(pipeline, pruning):
        pruned = pipeline.prune(picture_files, QUESTION, pruning)
        return prefix_depth(pruned), pipeline.generate(pruned, max_new_tokens=4)

    def prefix_depth(pruned):
        return pruned.prefix.depth if pruned.prefix else None

    def depth_of(pruning, **options):
        return prefix_depth(again.prune(picture_files, QUESTION, pruning, **options))

    family = again.family
    depth, blind = family.relevance_depth, make_method("uniform")
    later = [
        Pruning(keep=1.0, method=blind),
        Pruning(keep=1.0, method=blind, ilp=0.3, ilp_layer=family.depth - 1),
        Pruning(keep=0.3, method=make_method("fastv", layer=family.depth - 1)),
    ]
    before = [answer(first, pruning) for pruning in later]
    assert not computed and [depth for depth, _ in before] == [None] * 3  # there is none yet
    first.prune(picture_files, QUESTION, TOP)
    stored = not family.sees_question
    assert len(computed) == len(prefix_entries(tmp_path)) == stored
    fits = stored and family.first_inner <= depth
    assert [answer(again, pruning) for pruning in later] == [(depth if fits else None, text) for _, text in before]
    # fewer tokens, other features or positions, tokens that leave before or by words, another prompt: not from it
    assert depth_of(Pruning(keep=0.3, method=blind)) is None
    assert depth_of(later[0], system=None if name == "paligemma" else "Be brief.") is None
    assert depth_of(later[0], template="{question} {image} Answer:") is None
    assert depth_of(Pruning(keep=0.5, method=make_method("sparsevlm"))) is None
    if family.axes > 1:
        assert depth_of(Pruning(keep=1.0, method=blind, positions="compact")) is None
    if depth > family.first_inner:
        assert depth_of(Pruning(keep=0.3, method=make_method("fastv", layer=family.first_inner))) is None
    assert len(computed) == stored


def test_a_prefix_is_looked_up_and_held_without_being_computed(tiny_llava, tmp_path, picture_files, computed):
    pipeline = open_cached(tiny_llava, tmp_path)
    images = [pipeline.encode(path)[0] for path in picture_files]
    prompt = pipeline.family.write_prompt(QUESTION, images)
    prefixes = Prefixes(pipeline.family, pipeline.store)
    assert prefixes.find(prompt, images, compute=False) is None and not computed
    prefix = prefixes.find(prompt, images)
    assert prefixes.find(prompt, images, compute=False) is prefix and len(computed) == 1
    stored = Prefixes(pipeline.family, pipeline.store).find(prompt, images, compute=False)
    for name in ("ids", "keys", "values", "hidden_states"):
        assert torch.equal(getattr(stored, name), getattr(prefix, name))


def test_a_batch_of_questions_about_one_image_shares_its_prefix(tiny_llava, tmp_path, picture_files, monkeypatch):
    """And the bytes that wait count it once."""
    pipeline = open_cached(tiny_llava, tmp_path)
    pipeline.prune(picture_files[0], QUESTION, TOP)
    requests = [Request((picture_files[0],), f"is it {n}?", LATER) for n in range(4)]
    results = [result.pruned for _, result in pipeline.runner().prune(requests)]
    prefix = results[0].prefix
    assert prefix is not None and all(pruned.prefix is prefix for pruned in results)
    batches = []
    monkeypatch.setattr(local, "MAX_BYTES", 4 * results[0].image_embeds.nbytes + prefix.nbytes)
    monkeypatch.setattr(local, "generate", lambda *a, **k: batches.append(len(a[1])) or generate(*a, **k))
    answers = [reply.text for reply in pipeline.runner().answer(requests, max_new_tokens=4)]
    assert batches == [4] and answers == [pipeline.generate(pruned, max_new_tokens=4) for pruned in results]
    monkeypatch.setattr(local, "MAX_BYTES", 4 * results[0].image_embeds.nbytes)
    batches.clear()
    assert len(list(pipeline.runner().answer(requests, max_new_tokens=4))) == sum(batches) == 4 > max(batches)
