"""Export to vLLM: the exact embeds, prompts that come out whole again, ids that follow them, refusals, the page."""

import base64
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from test_families import inputs
from test_placeholders import slowly
from tiny_families import load_reference, open_pipeline

from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.integrations.vllm import to_vllm
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES, family_class

QUESTION = "what colour is the left object?"
SIZES = [(100, 100), (210, 70)]
COMPACT = Pruning(keep=0.4, positions="compact")
PAGE = Path(__file__).parents[1] / "docs" / "vllm.md"


LLAVA = ("llava", "llava_next", "llava_onevision")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="module", params=LLAVA)
def family(request, checkpoint):
    """A tiny checkpoint: (folder, whole model of plain transformers, its processor)."""
    folder = checkpoint(request.param)
    return folder, load_reference(folder), open_pipeline(folder).family.processor


@pytest.fixture
def llava(tiny_llava):
    return Pipeline(str(tiny_llava), dtype="float32")


def given_to(language_model, call):
    """The input embeddings `(B, L, H)` of the first call of a language model while `call` runs."""
    seen = []
    hook = language_model.register_forward_pre_hook(
        lambda _, args, options: seen.append(options["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        call()
    hook.remove()
    return seen[0]


def written_out(request, token):
    """The prompt as vLLM makes it: each image token becomes as many as its image has embeds."""
    sizes = iter([len(embeds) for embeds in request.image_embeds])
    return [
        id
        for token_id in request.prompt_token_ids.tolist()
        for id in [token_id] * (next(sizes) if token_id == token else 1)
    ]


@pytest.mark.parametrize("size", SIZES)
def test_image_embeds_are_what_the_language_model_is_given(family, noise, size):
    folder, whole, _ = family
    picture = noise(size)
    pipeline = open_pipeline(folder)
    (image,) = pipeline.encoder.encode([picture])
    pruned = pipeline.prune(image, QUESTION, COMPACT)
    request = to_vllm(pipeline.family, pruned)
    token = pipeline.family.image_token
    assert 0 < len(pruned.kept) < image.count
    assert request.image_embeds.shape == (1, len(pruned.image_embeds), whole.config.text_config.hidden_size)

    # of our own generate, to the last bit
    model = pipeline.family.load("language")
    ours = given_to(model.model.language_model, lambda: generate(pipeline.family, [pruned], 1))
    assert torch.equal(request.image_embeds[0], ours[0, pruned.input_ids == token])

    # of transformers with all tokens, where the kept ones are
    model_inputs = inputs(family, [picture])
    all_embeds = given_to(whole.model.language_model, lambda: whole(**model_inputs))[
        0, model_inputs["input_ids"][0] == token
    ]
    stays = torch.tensor(slowly(image.placeholder_map.tolist(), set(pruned.kept.tolist())))
    assert torch.allclose(request.image_embeds[0], all_embeds[stays], atol=1e-5)
    assert not torch.allclose(request.image_embeds[0], all_embeds[stays.roll(1)], atol=1e-2)


@pytest.mark.parametrize("size", SIZES)
def test_image_embeds_and_prompt_alone_give_the_answer(family, noise, size):
    """As vLLM goes about it: the prompt written out, embeds in the image tokens' place, positions from 0 on."""
    folder, whole, _ = family
    pipeline = open_pipeline(folder)
    (image,) = pipeline.encoder.encode([noise(size)])
    pruned = pipeline.prune(image, QUESTION, COMPACT)
    request, token = to_vllm(pipeline.family, pruned), pipeline.family.image_token
    assert request.prompt_token_ids.tolist().count(token) == 1
    ids = torch.tensor(written_out(request, token))
    assert torch.equal(ids, pruned.input_ids)
    embeds = whole.get_input_embeddings()(ids).detach()
    embeds[ids == token] = request.image_embeds[0]
    answer = whole.generate(
        inputs_embeds=embeds[None], attention_mask=torch.ones_like(ids)[None], max_new_tokens=12, do_sample=False
    )
    assert answer[0].tolist() == list(generate(pipeline.family, [pruned], 12)[0].ids)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_file_holds_the_request(run, noise, tmp_path, tiny_llava, dtype):
    picture = tmp_path / "p.png"
    noise((100, 80)).image.save(picture)
    saved, options = tmp_path / "star.safetensors", ("--tokens", 5, "--positions", "compact", "--dtype", dtype)
    assert run("prune", picture, QUESTION, *options, "-o", saved)[0] == 0
    code, out, err = run("export", saved, "--to", "vllm", "-o", tmp_path, "--json")
    target = tmp_path / "star.vllm.safetensors"
    record = json.loads(out)
    assert (code, out.count("\n"), record["file"], record["shape"]) == (0, 1, str(target), [1, 5, 48])
    assert (record["pruned"], record["question"], record["model"]) == (str(saved), QUESTION, str(tiny_llava))
    assert (record["dtype"], record["bytes"]) == (dtype, target.stat().st_size)
    assert f"{target}: 5 image embeds for each image" in err
    with safe_open(saved, "pt") as before, safe_open(target, "pt") as after:
        assert set(after.keys()) == {"prompt_token_ids", "image_embeds"}
        assert torch.equal(after.get_tensor("image_embeds")[0], before.get_tensor("image_embeds"))
        assert after.get_tensor("image_embeds").dtype == getattr(torch, dtype)
        assert len(after.get_tensor("prompt_token_ids")) == record["prompt"] == len(before.get_tensor("input_ids")) - 4
        about = json.loads(after.metadata()["vllm"])
    assert about == {"uuids": record["uuids"], "model": str(tiny_llava), "question": QUESTION}
    code, out, err = run("export", saved, "--to", "vllm", "-o", tmp_path, "-q")
    assert (code, out, err) == (0, "", "")


def test_ids_follow_the_image_embeds(llava, noise):
    picture, other = noise((100, 80)), noise((100, 80), seed=1)
    image, second = llava.encoder.encode([picture, other])

    def ids(pruned):
        return to_vllm(llava.family, pruned).uuids

    first = llava.prune(image, QUESTION, COMPACT)
    (first_id,) = ids(first)
    assert ids(llava.prune(image, QUESTION, COMPACT)) == (first_id,)
    assert first_id not in (image.image, image.key)
    uniform = replace(COMPACT, method=make_method("uniform"))  # keeps the same for every question
    assert ids(llava.prune(image, QUESTION, uniform)) == ids(llava.prune(image, "why?", uniform)) != (first_id,)
    others = {
        "another question": llava.prune(image, "Is there a blue circle on the right?", COMPACT),
        "more": llava.prune(image, QUESTION, replace(COMPACT, keep=0.8)),
        "another picture": llava.prune(second, QUESTION, COMPACT),
        "another dtype": replace(first, image_embeds=first.image_embeds.bfloat16()),
    }
    assert first.kept.tolist() != others["another question"].kept.tolist()
    uuids = [first_id, *(ids(changed)[0] for changed in others.values())]
    assert len(set(uuids)) == len(uuids)


def test_several_images(llava, noise):
    images = llava.encoder.encode([noise((100, 80)), noise((60, 90), seed=1)])
    three, apart = replace(COMPACT, tokens=3), {"template": "USER: {image} and {image} {question} ASSISTANT:"}
    pruned = llava.prune(images, QUESTION, three, **apart)
    request = to_vllm(llava.family, pruned)
    assert request.image_embeds.shape == (2, 3, 48) and torch.equal(
        request.image_embeds.flatten(0, 1), pruned.image_embeds
    )
    assert written_out(request, llava.family.image_token) == pruned.input_ids.tolist()
    assert len(set(request.uuids)) == 2
    alone = to_vllm(llava.family, llava.prune(images[0], QUESTION, three))  # equal but for rounding, so by another id
    assert torch.allclose(request.image_embeds[0], alone.image_embeds[0], atol=1e-5)
    shared = replace(COMPACT, tokens=5, share_budget=True, method=make_method("fastervlm"))
    with pytest.raises(BadInput, match="equally many image embeds for each of the 2 images, and text between them"):
        to_vllm(llava.family, llava.prune(images, QUESTION, shared, **apart))
    with pytest.raises(BadInput, match=r"runs of \[6\]"):  # side by side
        to_vllm(llava.family, llava.prune(images, QUESTION, three))


def test_internvl_goes_without_the_tokens_that_vllm_writes(checkpoint, noise):
    pipeline = open_pipeline(checkpoint("internvl"))
    images = pipeline.encoder.encode([noise((100, 100)), noise((60, 90), seed=1)])
    pruned = pipeline.prune(images, QUESTION, replace(COMPACT, tokens=3))
    request, context = to_vllm(pipeline.family, pruned), pipeline.family.image_token
    start, end = pipeline.family.processor.tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
    ids = request.prompt_token_ids.tolist()
    assert ids.count(context) == 2 and start not in ids and end not in ids
    assert torch.equal(request.image_embeds.flatten(0, 1), pruned.image_embeds)
    # as vLLM writes each image token out
    replaced = [[start, *[context] * 3, end] if token == context else [token] for token in ids]
    assert [token for tokens in replaced for token in tokens] == pruned.input_ids.tolist()


@pytest.mark.parametrize("name", QWEN)
def test_qwen_goes_as_items_of_one_token(checkpoint, noise, name):
    pipeline = open_pipeline(checkpoint(name))
    images = pipeline.encoder.encode([noise((100, 100)), noise((210, 70), seed=1)])
    pruned = pipeline.prune(images, QUESTION, COMPACT)
    request = to_vllm(pipeline.family, pruned)
    kept = len(pruned.kept)
    assert torch.equal(request.prompt_token_ids, pruned.input_ids) and request.embeds_per_image is None
    assert request.prompt_token_ids.tolist().count(pipeline.family.image_token) == kept
    assert torch.equal(request.image_embeds, pruned.image_embeds)
    assert request.image_grid_thw.tolist() == [[1, 2, 2]] * kept  # which the model merges into one token
    assert len(set(request.uuids)) == kept
    # vLLM numbers on behind each item by the longest side of its grid, in tokens: here by one
    assert torch.equal(pruned.position_ids, torch.arange(len(pruned.input_ids)))
    with pytest.raises(BadInput, match=r"original positions.*prune with `positions=compact`"):
        to_vllm(pipeline.family, pipeline.prune(images, QUESTION, replace(COMPACT, positions="original")))


def test_positions_with_gaps_are_refused(llava, noise):
    (image,) = llava.encoder.encode([noise((100, 80))])
    original = replace(COMPACT, positions="original")
    with pytest.raises(BadInput, match=r"original positions.*prune with `positions=compact`"):
        to_vllm(llava.family, llava.prune(image, QUESTION, original))
    everything = replace(original, keep=1.0)
    whole = to_vllm(llava.family, llava.prune(image, QUESTION, everything))  # there are no gaps
    with pytest.raises(BadInput, match=r"a prefix in place of its image embeds; prune without .with_prefix."):
        to_vllm(llava.family, llava.prune(image, QUESTION, everything, with_prefix=True))
    assert whole.image_embeds.shape == (1, 16, 48)


@pytest.mark.parametrize("pruning", [replace(COMPACT, ilp=0.2, ilp_layer=1), Pruning(method=make_method("fastv"))])
def test_inner_pruning_is_refused(llava, noise, pruning):
    (image,) = llava.encoder.encode([noise((100, 80))])
    with pytest.raises(BadInput, match="inside the language model, which vLLM can't do"):
        to_vllm(llava.family, llava.prune(image, QUESTION, pruning))


def test_every_family_goes_or_is_refused_with_a_reason(llava, noise):
    reasons = {kind: family_class(kind).vllm for kind in FAMILIES}
    assert [kind for kind, reason in reasons.items() if not reason] == [*LLAVA, *QWEN, "internvl"]
    (image,) = llava.encoder.encode([noise((100, 80))])
    pruned = llava.prune(image, QUESTION, COMPACT)
    for kind in [kind for kind, reason in reasons.items() if reason]:
        stranger = SimpleNamespace(checkpoint=SimpleNamespace(family=kind), vllm=reasons[kind])
        with pytest.raises(BadInput, match=re.escape(f"model type {kind} can't go to vLLM: {reasons[kind]}; use `gri")):
            to_vllm(stranger, pruned)


@pytest.fixture
def good(run, noise, tmp_path):
    """A pruned set that can be exported."""
    picture, saved = tmp_path / "p.png", tmp_path / "good.safetensors"
    noise((100, 80)).image.save(picture)
    assert run("prune", picture, QUESTION, "--tokens", 5, "--positions", "compact", "-o", saved)[0] == 0
    return saved


def test_bad_inputs(run, good, tmp_path):
    def fails(*arguments):
        code, out, err = run("export", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        return err

    there = ("--to", "vllm", "-o", tmp_path)
    assert "'tgi' is not one of 'vllm'" in fails(good, "--to", "tgi", "-o", tmp_path)
    assert "--output" in fails(good, "--to", "vllm") and "--to" in fails(good, "-o", tmp_path)
    assert "no folder; make it first" in fails(good, "--to", "vllm", "-o", tmp_path / "none")
    assert "none.safetensors: can't be read" in fails(tmp_path / "none.safetensors", *there)
    assert "p.png: not a pruned set" in fails(tmp_path / "p.png", *there)
    assert "made for another model" in fails(good, *there, "--model", "scenes")
    assert "no folder with a config.json" in fails(good, *there, "--model", tmp_path)
    (tmp_path / "other").mkdir()
    twin = shutil.copy(good, tmp_path / "other" / good.name)
    assert "another set has this name" in fails(good, twin, *there)
    run("prune", tmp_path / "p.png", QUESTION, "--tokens", 5, "-o", tmp_path / "gaps.safetensors")
    assert "gaps.safetensors: its tokens keep their original positions" in fails(tmp_path / "gaps.safetensors", *there)
    assert not list(tmp_path.glob("*.vllm.safetensors"))


def test_one_that_fails_does_not_stop_the_rest(run, good, tmp_path):
    more = tmp_path / "more.safetensors"
    run("prune", tmp_path / "p.png", QUESTION, "--tokens", 7, "--positions", "compact", "-o", more)
    sets = (good, tmp_path / "p.png", more)
    code, out, err = run("export", *sets, "--to", "vllm", "-o", tmp_path, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 3 and [line.get("error_type") for line in lines] == [None, "BadInput", None]
    assert lines[1]["pruned"] == str(tmp_path / "p.png") and "1 of 3 could not be exported" in err
    assert len(list(tmp_path.glob("*.vllm.safetensors"))) == 2
    assert "warning: these sets have from 5 to 7 image embeds" in err
    assert "warning" not in run("export", good, "--to", "vllm", "-o", tmp_path)[2]


def test_files_of_items_of_one_token(run, noise, tmp_path, checkpoint):
    """Qwen's sets may have any number of tokens each."""
    noise((100, 100)).image.save(tmp_path / "p.png")
    sets = [tmp_path / f"{count}.safetensors" for count in (2, 3)]
    for saved in sets:
        options = ("--model", checkpoint("qwen2_vl"), "--tokens", saved.stem, "--positions", "compact")
        assert run("prune", tmp_path / "p.png", QUESTION, *options, "-o", saved)[0] == 0
    code, out, err = run("export", *sets, "--to", "vllm", "-o", tmp_path, "--json")
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, [line["shape"] for line in lines], [len(line["uuids"]) for line in lines]) == (
        0,
        [[2, 64], [3, 64]],
        [2, 3],
    )
    assert "3 image embeds, each by itself" in err and "warning" not in err
    with safe_open(tmp_path / "3.vllm.safetensors", "pt") as file:
        assert file.get_tensor("image_grid_thw").tolist() == [[1, 2, 2]] * 3
        embeds = file.get_tensor("image_embeds")
    # the page's function gives vLLM the same
    (page,) = re.findall(r"^```python\n(def qwen_request.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    scope = {"json": json, "safe_open": safe_open, "LLM": lambda **options: options}
    exec(compile(page, "vllm.md", "exec"), scope)
    request = scope["qwen_request"](tmp_path / "3.vllm.safetensors")
    assert request["multi_modal_data"]["image"].keys() == {"image_embeds", "image_grid_thw"}
    assert torch.equal(request["multi_modal_data"]["image"]["image_embeds"], embeds)
    assert request["multi_modal_uuids"] == {"image": lines[1]["uuids"]}
    assert len(request["prompt_token_ids"]) == lines[1]["prompt"]


def test_the_requests_of_the_page(run, good, tmp_path, monkeypatch, capsys):
    """The page's Python runs, with stand-ins for vLLM and for the client, and sends what was exported."""
    offline, server, *_ = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    (tmp_path / "requests").mkdir()
    assert run("export", good, "--to", "vllm", "-o", tmp_path / "requests")[0] == 0
    with safe_open(tmp_path / "requests" / "good.vllm.safetensors", "pt") as file:
        prompt, embeds = file.get_tensor("prompt_token_ids"), file.get_tensor("image_embeds")
        about = json.loads(file.metadata()["vllm"])
    (tmp_path / "requests" / "good.vllm.safetensors").rename(tmp_path / "requests" / "it.vllm.safetensors")
    sent = {}

    class LLM:
        def __init__(self, **options):
            sent["engine"] = options

        def generate(self, requests, settings):
            sent["requests"] = requests
            return [SimpleNamespace(outputs=[SimpleNamespace(text="red")]) for _ in requests]

    def create(**call):
        sent["call"] = call
        return SimpleNamespace(choices=[SimpleNamespace(message=SimpleNamespace(content="red"))])

    vllm, client = ModuleType("vllm"), ModuleType("openai")
    vllm.LLM, vllm.SamplingParams = LLM, SimpleNamespace
    completions = SimpleNamespace(completions=SimpleNamespace(create=create))
    client.OpenAI = lambda **_: SimpleNamespace(chat=completions)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "openai", client)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {}
    exec(compile(offline, "vllm.md", "exec"), scope)
    (request,) = sent["requests"]
    assert request["prompt_token_ids"] == prompt.tolist()
    assert torch.equal(request["multi_modal_data"]["image"], embeds)
    assert request["multi_modal_uuids"] == {"image": about["uuids"]}
    assert sent["engine"]["enable_mm_embeds"] is True and sent["engine"]["model"] == "llava-hf/llava-1.5-7b-hf"
    exec(compile(server, "vllm.md", "exec"), scope)
    (message,) = sent["call"]["messages"]
    picture, text = message["content"]
    assert picture["type"] == "image_embeds" and picture["uuid"] == about["uuids"][0]
    loaded = torch.load(io.BytesIO(base64.b64decode(picture["image_embeds"])), weights_only=True)
    assert torch.equal(loaded, embeds[0]) and text == {"type": "text", "text": QUESTION}
    assert capsys.readouterr().out.splitlines()[-2:] == ["red", "red"]
