"""What tells language models apart, for pruned sets."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gridprune_cli.errors import GridpruneError
from gridprune_cli.vlm import find
from gridprune_cli.vlm.fit import _BLOCK, _sample, fingerprint

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def changed(tiny_llava, tmp_path):
    """Calls a function on the weights of a copy of the tiny LLaVA, and gives the copy's fingerprint."""

    def change(function, shards=1):
        folder = shutil.copytree(tiny_llava, tmp_path / "changed", dirs_exist_ok=True)
        weights = load_file(folder / "model.safetensors")
        save_file(function(weights), folder / "model.safetensors", {"format": "pt"})
        return fingerprint(find(str(folder)))

    return change


def test_an_adapter_that_was_merged_into_one_weight_shows(tiny_llava, changed):
    def merge(weights):
        (name,) = (name for name in weights if name.endswith(QUERY) and "vision" not in name)
        rows, columns = weights[name].shape
        weights[name] += 1e-3 * torch.randn(rows, 1) @ torch.randn(1, columns)
        return weights

    before = fingerprint(find(str(tiny_llava)))
    assert changed(lambda weights: weights) == before != changed(merge)


@pytest.mark.parametrize("elsewhere", ["vision_tower", "multi_modal_projector"])
def test_what_is_no_language_model_does_not_count(elsewhere, tiny_llava, changed):
    before = fingerprint(find(str(tiny_llava)))
    assert changed(lambda weights: {n: w + 1 if elsewhere in n else w for n, w in weights.items()}) == before
    assert changed(lambda weights: {n: w for n, w in weights.items() if elsewhere not in n}) == before
    assert changed(lambda weights: {n: w if elsewhere in n else w + 1 for n, w in weights.items()}) != before


def test_pickled_weights_are_told_apart_as_others(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert fingerprint(find(str(folder))) == fingerprint(find(str(tiny_llava)))


@pytest.mark.parametrize("shape", [(), (0,), (5, 7), (3 * _BLOCK, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_samples_lie_at_the_start_in_the_middle_and_at_the_end(shape, dtype):
    tensor = torch.zeros(shape, dtype=dtype)
    before = _sample(tensor)
    for place in (0, tensor.numel() // 2, -1) if tensor.numel() else ():
        changed = tensor.flatten().clone()
        changed[place] = 1
        assert _sample(changed) != before


def test_a_checkpoint_without_a_language_model(tiny_llava, changed):
    with pytest.raises(GridpruneError, match="no language model among its weights"):
        changed(lambda weights: {n: w for n, w in weights.items() if "vision_tower" in n})
