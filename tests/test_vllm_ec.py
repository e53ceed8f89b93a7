"""Export to vLLM's encoder cache: the whole encoding under the image's key, and what has none."""

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import open_pipeline

from gridprune_cli.errors import BadInput
from gridprune_cli.integrations.vllm_ec import to_encoder_cache
from gridprune_cli.settings import Pruning

QUESTION = "what colour is the left object?"


@pytest.mark.parametrize("name", ["llava_next", "qwen3_vl"])
def test_the_whole_encoding_under_its_key(checkpoint, noise, name):
    pipeline = open_pipeline(checkpoint(name))
    (image,) = pipeline.encoder.encode([noise((210, 70))])
    entries = [
        to_encoder_cache(pipeline.family, pipeline.prune(image, question, Pruning(keep=1.0)))
        for question in (QUESTION, "why?")
    ]
    entry = entries[0]
    assert entry.uuid == entries[1].uuid == image.key and torch.equal(entry.image_embeds, entries[1].image_embeds)
    tokens = image.placeholder_map >= 0  # the rest are newlines
    assert len(entry.image_embeds) == len(tokens)
    projected = pipeline.family.project(image.vision_features)
    assert torch.allclose(entry.image_embeds[tokens], projected, atol=1e-5)
    if not tokens.all():
        assert torch.allclose(entry.image_embeds[~tokens], pipeline.family.separator(), atol=1e-5)


def test_what_has_no_whole_encoding(checkpoint, noise):
    pipeline = open_pipeline(checkpoint("llava"))
    images = pipeline.encoder.encode([noise((100, 80)), noise((60, 90), seed=1)])
    with pytest.raises(BadInput, match=r"keeps 6 of 16 visual tokens.*prune with `keep=1.0`"):
        to_encoder_cache(pipeline.family, pipeline.prune(images[0], QUESTION, Pruning(keep=0.4)))
    with pytest.raises(BadInput, match="of 2 images, and vLLM caches each by itself"):
        to_encoder_cache(pipeline.family, pipeline.prune(images, QUESTION, Pruning(keep=1.0)))
    gemma = open_pipeline(checkpoint("gemma3"))
    (image,) = gemma.encoder.encode([noise((100, 80))])
    with pytest.raises(BadInput, match="model type gemma3 was not tried with vLLM's encoder cache"):
        to_encoder_cache(gemma.family, gemma.prune(image, QUESTION, Pruning(keep=1.0)))


def test_the_file_is_where_vllm_looks(run, noise, tmp_path):
    noise((100, 80)).image.save(tmp_path / "p.png")
    saved, folder = tmp_path / "whole.safetensors", tmp_path / "encodings"
    folder.mkdir()
    assert run("prune", tmp_path / "p.png", QUESTION, "--keep", 1.0, "-o", saved)[0] == 0
    for _ in range(2):  # a file that is there is written again
        code, out, err = run("export", saved, "--to", "vllm-ec", "-o", folder, "--json")
        line = json.loads(out)
        assert (code, line["shape"], "all 16 image embeds" in err) == (0, [16, 48], True)
        (uuid,) = line["uuids"]
        target = folder / uuid / "encoder_cache.safetensors"
        assert line["file"] == str(target) and [*folder.iterdir()] == [target.parent]
    (tensor,) = load_file(target).values()
    assert load_file(target).keys() == {"ec_cache"} and torch.equal(tensor, load_file(saved)["image_embeds"])
    (folder / "file").write_text("")
    target.unlink()
    target.parent.rmdir()
    target.parent.write_text("")  # where the folder should be
    code, out, err = run("export", saved, "--to", "vllm-ec", "-o", folder)
    assert (code, out, err.count("\n")) == (1, "", 1) and f"{target.parent}: can't be made" in err
