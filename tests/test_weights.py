"""Weights on disk: pickled ones are read as tensors alone, where there are no others, and nothing in them is run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file

from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import find
from gridprune_cli.vlm.weights import check_pickles, tensors, weight_files

QUESTION = "What colour is the star?"


class Code:
    """A pickle of this runs a command when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(folder, shards=0, **options):
    """Puts the weights of a folder into pytorch_model.bin, or into shards and an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if not shards:
        torch.save(weights, folder / "pytorch_model.bin", **options)
        return
    names = {name: f"pytorch_model-0000{n % shards}-of-0000{shards}.bin" for n, name in enumerate(sorted(weights))}
    for file in set(names.values()):
        torch.save({name: weights[name] for name in names if names[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


@pytest.mark.parametrize("kind", [{"shards": 0}, {"shards": 2}, {"_use_new_zipfile_serialization": False}])
def test_pickled_weights_answer_as_safetensors_do(kind, tiny_llava, tmp_path, noise):
    folder = shutil.copytree(tiny_llava, tmp_path / "pickled")
    pickled(folder, **kind)
    pickled(folder / "clip", **kind)
    noise((90, 70)).image.save(tmp_path / "a.png")
    answers = [
        Pipeline(str(model), dtype="float32").ask(tmp_path / "a.png", QUESTION, Pruning(keep=0.5), max_new_tokens=8)
        for model in (tiny_llava, folder)
    ]
    assert answers[0].text == answers[1].text
    assert torch.equal(answers[0].pruned.image_embeds, answers[1].pruned.image_embeds)
    assert torch.equal(answers[0].pruned.relevance, answers[1].pruned.relevance)


@pytest.mark.parametrize("place", [".", "clip"])
@pytest.mark.parametrize("unrestricted", ["", "1"])
def test_a_pickle_with_code_in_it_runs_nothing(
    place, unrestricted, run, tiny_llava, tmp_path, noise, monkeypatch, recwarn
):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", unrestricted)
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    (folder / place / "model.safetensors").unlink()
    noise((90, 70)).image.save(tmp_path / "a.png")
    ran = tmp_path / "ran"
    for write in (
        lambda path: torch.save({"w": Code(ran)}, path),
        lambda path: path.write_bytes(pickle.dumps(Code(ran))),
    ):
        write(folder / place / "pytorch_model.bin")
        code, out, err = run("ask", tmp_path / "a.png", QUESTION, "--model", folder)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert (
            "pytorch_model.bin: can't be read as pickled tensors alone" in err and "name a copy with safetensors" in err
        )
        with pytest.raises(BadInput, match="can't be read as pickled tensors alone"):
            list(tensors(folder / place))
        assert not ran.exists()
    assert not any("pickle" in str(warning.message) for warning in recwarn)
    pickle.loads((folder / place / "pytorch_model.bin").read_bytes())
    assert ran.exists()  # it would have


def test_a_damaged_file_is_refused_in_the_same_line(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    pickled(folder)
    whole = (folder / "pytorch_model.bin").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"garbage"):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(BadInput, match=r"pytorch_model.bin: can't be read as pickled tensors alone: it is damaged"):
            check_pickles(folder)


def test_pickled_weights_count_where_they_are_read(tiny_llava, tmp_path):
    """A model's digest covers them then, and they are not looked at beside safetensors."""
    folder = shutil.copytree(tiny_llava, tmp_path / "model")
    first = find(str(folder)).identity
    (folder / "pytorch_model.bin").write_bytes(b"a")
    assert find(str(folder)).identity == first
    assert weight_files(folder) == [folder / "model.safetensors"]
    check_pickles(folder)
    (folder / "model.safetensors").unlink()
    (folder / "training_args.bin").write_bytes(b"b")
    second = find(str(folder)).identity
    (folder / "training_args.bin").write_bytes(b"c")
    assert find(str(folder)).identity == second
    (folder / "pytorch_model.bin").write_bytes(b"b")
    assert find(str(folder)).identity not in (first, second)
