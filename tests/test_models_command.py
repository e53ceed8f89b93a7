"""`gridprune models`: families, what is in the hub's cache, and the default; and `gridprune --version`."""

import json
import shutil
from importlib.metadata import version

import pytest
from huggingface_hub import constants
from test_checkpoint import OTHER, put

from gridprune_cli.config import choose_model, config_path
from gridprune_cli.vlm.cached import list_cached


def configured(folder, **config):
    """A folder with a config.json of these settings alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def listed(command):
    code, out, err = command("models", "--json")
    assert code == 0
    return {line["cached"]: line for line in map(json.loads, out.splitlines()) if "cached" in line}, err


# ---- the hub's cache -------------------------------------------------------------------------------------------------


def test_what_is_in_the_hubs_cache_is_listed(command, hub_cache, tiny_llava, tmp_path):
    whole = put(hub_cache, "some/llava", tiny_llava)
    put(hub_cache, "some/llava", tiny_llava, OTHER, "v2")
    put(hub_cache, "some/clip", tiny_llava / "clip")
    put(hub_cache, "some/siglip", configured(tmp_path / "siglip", model_type="siglip"))
    put(hub_cache, "some/bert", configured(tmp_path / "bert", model_type="bert"))
    put(hub_cache, "some/pickled", configured(tmp_path / "pickled", model_type="llava"))
    put(hub_cache, "some/nameless", configured(tmp_path / "nameless", hidden_size=4))
    (configured(tmp_path / "sharded", model_type="qwen2_vl") / "model-1.safetensors").write_bytes(b"1234")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    put(hub_cache, "some/sharded", tmp_path / "sharded")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "a.gguf").write_bytes(b"12")
    put(hub_cache, "some/gguf", tmp_path / "gguf")
    data = put(hub_cache, "some/data", tmp_path / "gguf").parents[1]
    data.rename(data.with_name("datasets--some--data"))

    models, err = listed(command)
    assert err == ""
    names = ("bert", "clip", "gguf", "llava", "llava@v2", "nameless", "pickled", "sharded", "siglip")
    assert list(models) == [f"some/{name}" for name in names]
    assert models["some/llava"] == models["some/llava@v2"] | {"cached": "some/llava"}
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    assert models["some/llava"]["bytes"] == size and models["some/gguf"]["bytes"] == 2
    families = {name.removeprefix("some/"): line["family"] for name, line in models.items()}
    assert [families[name] for name in ("llava", "clip", "bert", "gguf")] == ["llava", "clip", "bert", None]
    assert [name for name, line in models.items() if line["usable"]] == ["some/llava", "some/llava@v2"]
    assert models["some/llava"]["reason"] is None
    reasons = {
        "clip": "a CLIP, for relevance alone",
        "siglip": "a SigLIP, for relevance alone",
        "bert": "model type 'bert' is not supported",
        "pickled": "no weights",
        "nameless": "names no model_type",
        "sharded": "1 of 2 files of weights missing (first: model-2.safetensors)",
        "gguf": "no config.json",
    }
    for name, reason in reasons.items():
        assert reason in models[f"some/{name}"]["reason"], name

    code, out, _ = command("models")
    lines = [line.split() for line in out.split("\n\n")[1].splitlines()[1:]]
    assert code == 0 and [row[0] for row in lines] == list(models)
    assert [row[4].strip(":") for row in lines] == ["yes" if line["usable"] else "no" for line in models.values()]


def test_a_snapshot_without_a_branch_goes_by_its_commit(hub_cache, tiny_llava, command):
    root = put(hub_cache, "some/llava", tiny_llava, OTHER).parents[1]
    shutil.rmtree(root / "refs")
    assert [model.name for model in list_cached()[0]] == [f"some/llava@{OTHER}"]
    put(hub_cache, "some/llava", tiny_llava)
    assert [model.name for model in list_cached()[0]] == ["some/llava"]


def test_a_cache_that_is_missing_or_damaged_is_survived(command, hub_cache, tiny_llava, tmp_path, monkeypatch):
    put(hub_cache, "some/llava", tiny_llava)
    (put(hub_cache, "some/torn", tiny_llava) / "config.json").write_bytes(b"{\xff")
    (hub_cache / "models--some--empty").mkdir()
    models, err = listed(command)
    assert list(models) == ["some/llava", "some/torn"] and "can't be read" in models["some/torn"]["reason"]
    assert err.startswith("warning: ") and err.count("\n") == 1 and "models--some--empty" in err
    (tmp_path / "file").write_text("")
    for other in (tmp_path / "gone", tmp_path / "file"):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(other))
        assert listed(command) == ({}, "")
        assert "\n\n" not in command("models")[1]


# ---- the default -----------------------------------------------------------------------------------------------------


def test_a_default_is_remembered_and_forgotten(command, hub_cache, tiny_llava, noise, tmp_path, monkeypatch):
    noise((60, 60)).image.save(tmp_path / "noise.png")
    ask = ("ask", tmp_path / "noise.png", "What is it?", "--json", "-q", "--max-new-tokens", 2)
    ask += ("--relevance", "words")  # the hub's cache holds no CLIP
    code, out, _ = command("models", "default")
    assert code == 0 and out.splitlines()[1].split() == ["scenes", "default"]
    shutil.copytree(tiny_llava, tmp_path / "my" / "model")
    monkeypatch.chdir(tmp_path / "my")
    code, out, err = command("models", "default", "model")  # from any folder
    assert (code, out) == (0, "") and str(config_path()) in err and "of family llava" in err
    monkeypatch.chdir(tmp_path)
    assert json.loads(command(*ask)[1])["model"] == str(tmp_path / "my" / "model")
    put(hub_cache, "some/llava", tiny_llava)
    assert command("models", "default", "some/llava", "-q") == (0, "", "")
    assert json.loads(command(*ask)[1])["model"] == "some/llava"
    assert json.loads(command("models", "default", "--json")[1]) == {"model": "some/llava", "from": str(config_path())}
    monkeypatch.setenv("GRIDPRUNE_MODEL", "scenes")
    code, _, err = command("models", "default", "some/llava@main")
    assert code == 0 and "GRIDPRUNE_MODEL is set, and goes before it: scenes" in err
    assert json.loads(command("models", "default", "--json")[1]) == {"model": "scenes", "from": "GRIDPRUNE_MODEL"}
    monkeypatch.delenv("GRIDPRUNE_MODEL")
    assert choose_model().model == "some/llava@main"
    code, out, err = command("models", "default", "scenes")
    assert (code, out) == (0, "") and "names no model any more" in err
    assert choose_model().origin == "default" and command(*ask)[0] == 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "models default nowhere: no folder with a config.json"),
        ("bert", "models default bert: model type 'bert' is not supported"),
        ("weightless", "models default weightless: no weights"),
        ("not/here", "models default not/here: no such folder, not whole in the hub's cache, and HF_HUB_OFFLINE"),
        ("some/bert", "models default some/bert: model type 'bert' is not supported"),
        ("some/awq", "models default some/awq: quantised as AWQ, which is supported on GPUs alone"),
    ],
)
def test_what_can_not_be_used_is_not_remembered(command, hub_cache, tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    put(hub_cache, "some/bert", configured(tmp_path / "bert", model_type="bert"))
    configured(tmp_path / "weightless", model_type="llava")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = {"quantization_config": {"quant_method": "awq"}}
    put(hub_cache, "some/awq", configured(tmp_path / "awq", model_type="llava", **settings))
    code, out, err = command("models", "default", name)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1
    assert not config_path().exists()


def test_weights_are_not_fetched_for_it(command, hub_cache, tmp_path):
    put(hub_cache, "some/llava", configured(tmp_path / "llava", model_type="llava"))
    assert command("models", "default", "some/llava")[0] == 0
    assert choose_model().model == "some/llava"


# ---- the version -----------------------------------------------------------------------------------------------------


def test_the_version_is_printed_alone(command):
    assert command("--version") == (0, f"gridprune {version('gridprune')}\n", "")
