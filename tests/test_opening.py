"""A model with its cache, from options by name."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from gridprune_cli.config import config_path, remember_settings
from gridprune_cli.errors import BadInput
from gridprune_cli.evaluation.data import Data, Item
from gridprune_cli.evaluation.run import Cell, Plan
from gridprune_cli.opening import open_pipeline
from gridprune_cli.prefixes import Prefixes
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.checkpoint import model_key


def test_options_reach_the_pipeline_and_its_cache(tiny_llava, tmp_path, monkeypatch):
    options = {"model": str(tiny_llava), "cache_dir": str(tmp_path / "there"), "cache_limit": "2K", "device": "cpu"}
    pipeline = open_pipeline(options | {"cache_dtype": "int8", "relevance": "words", "dtype": "bfloat16"})
    assert pipeline.model == str(tiny_llava) and pipeline.encoder.cache_dtype == "int8"
    assert (pipeline.store.root, pipeline.store.limit) == (tmp_path / "there", 2048)
    assert pipeline.family.relevance_kind == "words" and str(pipeline.family.dtype) == "torch.bfloat16"
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(tiny_llava))
    pipeline = open_pipeline({"model": None, "no_cache": True, "cache_limit": "2K"})
    assert pipeline.model == str(tiny_llava) and pipeline.store is None
    assert open_pipeline({}).store.root == tmp_path / "cache"  # as the variable says


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"storage": "int8"}, "storage: no setting of a model; there are model, clip, "),
        ({"cache_dtype": "float4"}, "cache_dtype=float4: not one of full, float8, int8"),
        ({"dtype": "float8"}, "dtype.*float8: not one of auto, "),
    ],
)
def test_what_can_not_be_names_its_option(options, line):
    with pytest.raises(BadInput, match=line):
        open_pipeline(options)


# ---- what is remembered for a model ----------------------------------------------------------------------------------


def opened(folder, **options):
    return open_pipeline({"model": str(folder), "dtype": "float32"} | options)


def test_a_tower_without_a_language_model_encodes(tiny_llava, tmp_path, noise):
    """Where nothing is remembered for the model, nobody asks what weights it has."""
    folder = tmp_path / "tower"
    shutil.copytree(tiny_llava, folder)
    (path,) = folder.glob("*.safetensors")
    save_file({name: tensor for name, tensor in load_file(path).items() if "vision" in name}, path, {"format": "pt"})
    noise((50, 50)).image.save(tmp_path / "a.png")
    image, hit = opened(folder).encode(tmp_path / "a.png")
    assert image.count and not hit


def test_settings_by_hand_are_in_force_whatever_calls_the_folder(tiny_llava, tmp_path, monkeypatch):
    remember_settings(model_key(str(tiny_llava)), {"relevance": "attention", "relevance_depth": 2, "relevance_sign": 1})
    monkeypatch.chdir(tiny_llava.parent)
    (tmp_path / "link").symlink_to(tiny_llava)
    for name in (tiny_llava, tiny_llava.name, tmp_path / "link"):
        family = opened(name).family
        assert family.relevance_source == {"source": "attention", "model": None, "depth": 2}
        assert family.relevance_sign == 1
    # what is named goes before it
    family = opened(tiny_llava, relevance="clip").family
    assert (family.relevance_kind, family.relevance_sign) == ("clip", 1)
    assert opened(tiny_llava, clip=str(tiny_llava / "clip")).family.relevance_kind == "clip"


def test_settings_of_other_weights_are_told_and_not_taken(tiny_llava, caplog):
    key, weights = model_key(str(tiny_llava)), opened(tiny_llava).family.fingerprint
    remember_settings(key, {"fingerprint": weights, "relevance_depth": 2})
    assert opened(tiny_llava, relevance="attention").family.relevance_depth == 2 and not caplog.records
    remember_settings(key, {"fingerprint": "0" * 64, "relevance_depth": 2})
    assert opened(tiny_llava, relevance="attention").family.relevance_depth == 1
    assert f"{config_path()}: what it holds for {key} was chosen for other weights" in caplog.text


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"relevance_depth": 4}, "relevance_depth = 4: the language model has 3 layers; .* from 1 to that; mend it"),
        ({"relevance_depth": 0}, "relevance_depth = 0: "),
        ({"relevance_depth": True}, "relevance_depth = True: "),
        ({"relevance_depth": "2"}, "relevance_depth = 2: "),
        ({"relevance_sign": 2}, "relevance_sign = 2: must be 1 or -1; mend it"),
        ({"relevance": "saliency"}, "relevance = saliency: not one of auto, clip, "),
        ({"depth": 2}, "depth: no setting of a model here; there are relevance, relevance_depth, relevance_sign"),
    ],
)
def test_settings_of_no_use_name_the_file_and_what_takes_them_out(settings, line, tiny_llava):
    key = model_key(str(tiny_llava))
    remember_settings(key, settings)
    with pytest.raises(BadInput, match=rf"^{config_path()}: {key}: {line}"):
        opened(tiny_llava)


def test_runs_at_other_depths_and_signs_are_told_apart(tiny_llava):
    key = model_key(str(tiny_llava))
    item = Item("a", ("a.png",), "What?", ("yes",))
    plan = Plan(
        Data("x", (item,), str), tuple(Cell(name, Pruning(method=make_method(name))) for name in ("gridprune", "trim"))
    )
    settings, identities = [], []
    for calibration in (
        None,
        {"relevance_sign": 1},
        {"relevance": "attention"},
        {"relevance": "attention", "relevance_depth": 2},
    ):
        remember_settings(key, calibration)
        pipeline = opened(tiny_llava)
        settings.append(plan.settings(pipeline))
        identities.append(Prefixes(pipeline.family).identity)
    assert all(settings.count(one) == 1 for one in settings)  # so `eval` goes on with none of the others
    assert identities[2] != identities[3] and identities[3]["depth"] == 2
