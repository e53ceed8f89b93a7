"""Only what is asked for is read, and nothing is made up."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm.loading import load_part

TOWER, PROJECTOR, LANGUAGE = (
    ("model.vision_tower",),
    ("model.multi_modal_projector",),
    ("model.language_model", "lm_head"),
)


def load(folder, without):
    return load_part(LlavaForConditionalGeneration, folder, without, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("without", "there", "gone"),
    [
        (PROJECTOR + LANGUAGE, "vision_tower", "language_model"),
        (TOWER + LANGUAGE, "multi_modal_projector", "vision_tower"),
        (TOWER + PROJECTOR, "language_model", "vision_tower"),
    ],
)
def test_a_part_has_the_weights_of_the_whole(tiny_llava, without, there, gone):
    whole = LlavaForConditionalGeneration.from_pretrained(tiny_llava, dtype=torch.float32).state_dict()
    loaded = load(tiny_llava, without).state_dict()
    assert loaded and all(torch.equal(value, whole[name]) for name, value in loaded.items())
    assert any(there in name for name in loaded)
    assert not any(gone in name for name in loaded)


def test_parts_need_no_weights_but_their_own(tiny_llava, tmp_path):
    """A checkpoint without the tower's weights still generates, and one with the tower's alone still encodes."""
    for name, without, wanted in (
        ("decoder", TOWER + PROJECTOR, lambda key: "vision_tower" not in key and "projector" not in key),
        ("encoder", PROJECTOR + LANGUAGE, lambda key: "vision_tower" in key),
    ):
        folder = shutil.copytree(tiny_llava, tmp_path / name)
        weights = load_file(folder / "model.safetensors")
        save_file({k: v for k, v in weights.items() if wanted(k)}, folder / "model.safetensors", {"format": "pt"})
        load(folder, without)
        with pytest.raises(GridpruneError, match=r"weights that LlavaForConditionalGeneration needs"):
            load(folder, ())


def test_sharded_checkpoints(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "sharded")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for shard, tower in enumerate((True, False)):
        name = f"model-{shard + 1:05}-of-00002.safetensors"
        loaded = {k: v for k, v in weights.items() if ("vision_tower" in k) == tower}
        save_file(loaded, folder / name, {"format": "pt"})
        index |= dict.fromkeys(loaded, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    loaded = load(folder, TOWER).state_dict()
    assert any("language_model" in name for name in loaded)
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as file:
        assert all("vision_tower" in key for key in file.keys())  # noqa: SIM118  (it is no dict)
