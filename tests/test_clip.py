"""The CLIP of a tower: whether it has the tower's weights. What it computes is in test_llava.py."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gridprune_cli.builder import remarks
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.clip import weights_differ


@pytest.fixture
def tuned(tiny_llava, tmp_path):
    """A copy of the tiny LLaVA whose tower's weights went through a function."""

    def build(function):
        folder = shutil.copytree(tiny_llava, tmp_path / "tuned", dirs_exist_ok=True)
        weights = load_file(tiny_llava / "model.safetensors")
        changed = {n: function(w) if "vision_tower" in n else w for n, w in weights.items()}
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        return folder

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_makes_no_difference_and_tuning_does(dtype, tuned, tiny_llava):
    torch.manual_seed(0)
    assert not weights_differ(tuned(lambda w: w.to(dtype)), tiny_llava / "clip")
    assert weights_differ(tuned(lambda w: (w + 0.01 * w.std() * torch.randn_like(w)).to(dtype)), tiny_llava / "clip")


def test_what_cannot_be_compared_is_no_difference(tuned, tiny_llava, tmp_path):
    assert not weights_differ(tuned(lambda w: w.to(torch.int8)), tiny_llava / "clip")
    assert not weights_differ(tmp_path / "nowhere", tiny_llava / "clip")


def test_a_tower_that_was_tuned_is_a_remark(tuned, tmp_path, noise):
    noise((60, 60)).image.save(tmp_path / "a.png")
    folder = tuned(lambda w: w * 1.1)
    for relevance, count in (("clip", 1), ("words", 0)):
        pipeline = Pipeline(str(folder), dtype="float32", relevance=relevance)
        pipeline.ask(tmp_path / "a.png", "What?", Pruning(), max_new_tokens=1)
        notes = remarks(pipeline.family, Pruning())
        assert len(notes) == count
        assert all(f"other weights than {folder}/clip, from which its relevance comes" in text for text in notes)
