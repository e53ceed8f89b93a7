"""Export to SGLang: the tensors that its processor takes, both kinds of positions, refusals, the loader of the page."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from tiny_families import load_reference, open_pipeline

from gridprune_cli.errors import BadInput
from gridprune_cli.integrations.sglang import to_sglang
from gridprune_cli.settings import Pruning

QUESTION = "what colour is the left object?"
PAGE = Path(__file__).parents[1] / "docs" / "vllm.md"


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_positions_of_kept_tokens_are_those_of_the_whole_prompt(checkpoint, noise, name):
    folder = checkpoint(name)
    pipeline, whole = open_pipeline(folder), load_reference(folder)
    (image,) = pipeline.encoder.encode([noise((210, 70))])
    everything = pipeline.prune(image, QUESTION, Pruning(keep=1.0))
    pruned = pipeline.prune(image, QUESTION, Pruning(keep=0.4))
    request = to_sglang(pipeline.family, pruned)
    # transformers' own positions of the whole prompt
    ids = everything.input_ids[None]
    is_image = ids == pipeline.family.image_token
    positions, delta = whole.model.get_rope_index(
        ids, mm_token_type_ids=is_image.int(), image_grid_thw=request.image_grid_thw
    )
    stays = torch.ones_like(ids[0], dtype=torch.bool)
    stays[is_image[0]] = torch.isin(torch.arange(image.count), pruned.kept)
    assert torch.equal(request.mrope_positions, positions[:, 0, stays])
    # the first token of the answer has the position that it has behind the whole prompt
    assert len(request.input_ids) + request.mrope_position_delta == ids.shape[1] + delta
    assert torch.equal(request.precomputed_embeddings, pruned.image_embeds)
    assert request.input_ids.tolist().count(pipeline.family.image_token) == len(pruned.kept)
    compact = to_sglang(pipeline.family, pipeline.prune(image, QUESTION, Pruning(keep=0.4, positions="compact")))
    assert torch.equal(compact.mrope_positions, torch.arange(len(compact.input_ids)).expand(3, -1))
    assert compact.mrope_position_delta.tolist() == [[0]]


def test_refusals(checkpoint, noise):
    qwen, llava = open_pipeline(checkpoint("qwen2_vl")), open_pipeline(checkpoint("llava"))
    images = qwen.encoder.encode([noise((100, 80)), noise((60, 90), seed=1)])
    with pytest.raises(BadInput, match="of 2 images, and SGLang divides embeddings between images by their grids"):
        to_sglang(qwen.family, qwen.prune(images, QUESTION, Pruning(keep=0.4)))
    with pytest.raises(BadInput, match="which SGLang can't do; prune without `ilp`"):
        to_sglang(qwen.family, qwen.prune(images[0], QUESTION, Pruning(keep=0.4, ilp=0.2, ilp_layer=1)))
    (image,) = llava.encoder.encode([noise((100, 80))])
    with pytest.raises(BadInput, match="model type llava can't go to SGLang, which takes positions"):
        to_sglang(llava.family, llava.prune(image, QUESTION, Pruning(keep=0.4)))


def test_the_loader_of_the_page(run, noise, tmp_path, checkpoint, monkeypatch):
    """The page's Python, with a stand-in for SGLang, gives its engine what was exported."""
    noise((100, 100)).image.save(tmp_path / "p.png")
    saved, model = tmp_path / "it.safetensors", checkpoint("qwen2_5_vl")
    assert run("prune", tmp_path / "p.png", QUESTION, "--model", model, "--tokens", 3, "-o", saved)[0] == 0
    code, out, err = run("export", saved, "--to", "sglang", "-o", tmp_path, "--json")
    line = json.loads(out)
    assert (code, line["shape"], line["file"]) == (0, [3, 64], str(tmp_path / "it.sglang.safetensors"))
    assert "3 image embeds" in err
    calls = []

    class Engine:
        def __init__(self, **options):
            calls.append(options)

        def generate(self, **request):
            calls.append(request)
            return {"text": "red"}

    sglang = ModuleType("sglang")
    sglang.Engine = Engine
    monkeypatch.setitem(sys.modules, "sglang", sglang)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n([^`]*?sglang[^`]*?)^```", PAGE.read_text("utf-8"), re.M)
    exec(compile(code, "vllm.md", "exec"), {})
    request = calls[1]
    (image,) = request["image_data"]
    with safe_open(tmp_path / "it.sglang.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert json.loads(file.metadata()["sglang"]) == {"model": str(model), "question": QUESTION}
    assert request["input_ids"] == tensors.pop("input_ids").tolist()
    assert image.pop("format") == "processor_output" and image.keys() == tensors.keys()
    assert all(torch.equal(image[name], tensors[name]) for name in tensors)
