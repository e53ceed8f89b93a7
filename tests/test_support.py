"""What config.json alone tells: checkpoints that can't be used, and quantised ones, which answer as in transformers."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_families import QUESTION, inputs, logits
from tiny_families import write_checkpoint
from tiny_families.quantised import KINDS, quantise

from gridprune_cli.errors import BadInput
from gridprune_cli.generation import generate
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import FAMILIES, family_class, find_supported, hub, support
from gridprune_cli.vlm.support import FORMATS, Format, quantization, unsupported

CLIP, SIGLIP = {"model_type": "clip_vision_model"}, {"model_type": "siglip_vision_model"}
LLAVA_1_5, LLAVA_NEXT = "llava-hf/llava-1.5-7b-hf", "llava-hf/llava-v1.6-vicuna-7b-hf"
ONEVISION = "llava-hf/llava-onevision-qwen2-7b-ov-hf"

# config.json, what is said of it, what would work
REFUSED = {
    "pixtral": (
        {"model_type": "llava", "vision_config": {"model_type": "pixtral"}},
        "vision tower 'pixtral'",
        LLAVA_1_5,
    ),
    "original": ({"model_type": "llava", "mm_vision_tower": "openai/x"}, "original layout 'llava'", LLAVA_1_5),
    "original anyres": (
        {"model_type": "llava", "mm_vision_tower": "openai/x", "image_aspect_ratio": "anyres"},
        "original layout 'llava'",
        LLAVA_NEXT,
    ),
    "original llama": ({"model_type": "llava_llama", "mm_hidden_size": 1024}, "original layout", LLAVA_1_5),
    "original mistral": (
        {"model_type": "llava_mistral", "mm_hidden_size": 1024, "image_aspect_ratio": "anyres"},
        "original layout",
        "llava-hf/llava-v1.6-mistral-7b-hf",
    ),
    "original qwen": ({"model_type": "llava_qwen", "mm_hidden_size": 1152}, "original layout", ONEVISION),
    "internvl_chat": ({"model_type": "internvl_chat"}, "'internvl_chat'", "OpenGVLab/InternVL3-8B-hf"),
    "layers": ({"model_type": "llava", "vision_feature_layer": [-2, -5]}, r"several layers.*\[-2, -5\]", LLAVA_1_5),
    "layers of next": ({"model_type": "llava_next", "vision_feature_layer": [-2, 7]}, "several layers", LLAVA_NEXT),
    "layers of internvl": (
        {"model_type": "internvl", "vision_feature_layer": [-1, -2]},
        "several layers",
        "OpenGVLab/InternVL3-8B-hf",
    ),
    "siglip without its first patch": (
        {"model_type": "llava", "vision_config": SIGLIP},  # the strategy is transformers' default
        "vision_feature_select_strategy 'default'",
        LLAVA_1_5,
    ),
    "clip with its cls": (
        {"model_type": "llava", "vision_config": CLIP, "vision_feature_select_strategy": "full"},
        "vision_feature_select_strategy 'full'",
        LLAVA_1_5,
    ),
    "siglip2": ({"model_type": "llava_onevision", "vision_config": {"model_type": "siglip2"}}, "'siglip2'", ONEVISION),
    "text": ({"model_type": "gemma3_text"}, "model type 'gemma3_text'", "gemma3"),
    "quantised": ({"model_type": "llava", "quantization_config": {"quant_method": "hqq"}}, "quantised as 'hqq'", "awq"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_before_its_weights_are_fetched(case, tmp_path, monkeypatch, command):
    config, reason, works = REFUSED[case]
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: str(tmp_path / "config.json"))
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("fetched"))
    picture = tmp_path / "a.png"
    for arguments in (("ask", picture, QUESTION), ("encode", picture)):
        code, out, err = command(*arguments, "--model", "some/model")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("gridprune: --model some/model: ") and works in err
        assert re.search(reason, err)


def test_what_families_have_is_supported():
    for family in FAMILIES:
        strategy = {"vision_feature_select_strategy": "full"} if family == "llava_onevision" else {}
        assert unsupported({"model_type": family} | strategy) == ""
    assert unsupported({"model_type": "llava", "vision_config": SIGLIP, "vision_feature_select_strategy": "full"}) == ""
    assert unsupported({"model_type": "gemma3", "mm_tokens_per_image": 256}) == ""


def test_a_family_is_an_entry_and_a_class_that_fit():
    for kind, entry in FAMILIES.items():
        adapter = family_class(kind)
        assert entry.model_type == kind == adapter.model_class.config_class.model_type
        assert ("CLIP" in entry.needs) == ("clip_vision_model" in entry.towers)
        assert ("attention" in entry.needs) != ("CLIP" in entry.needs)


def test_what_is_known_of_families_needs_no_torch():
    imports = "import sys, gridprune_cli.vlm.support, gridprune_cli.vlm.cached"
    code = f"{imports}; print({{'torch', 'transformers'}} & {{*sys.modules}})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


# ---- quantised -------------------------------------------------------------------------------------------------------


def test_the_format_of_a_checkpoint():
    for method in FORMATS:
        assert quantization({"quantization_config": {"quant_method": method}}) is FORMATS[method]
    assert quantization({"quantization_config": {"load_in_4bit": True}}) is FORMATS["bitsandbytes"]
    assert quantization({"text_config": {"quantization_config": {"quant_method": "awq"}}}) is FORMATS["awq"]
    assert quantization({"model_type": "llava", "text_config": {}}) is None
    assert unsupported({"model_type": "llava", "quantization_config": {"bits": 4}}).startswith("quantised as 'unknown'")


def test_what_a_format_lacks():
    lacking = Format("X", {"typer": "typer", "no-such-package": "no_such_package"}, cpu=False)
    assert "on GPUs alone" in lacking.lacks("cpu")
    assert lacking.lacks("cuda") == (
        "quantised as X, which needs no-such-package; install with `pip install no-such-package`"
    )
    assert Format("X", {"typer": "typer"}).lacks("cpu") == ""


@pytest.mark.parametrize(("method", "reason"), [("awq", "on GPUs alone"), ("bitsandbytes", "pip install bitsandbytes")])
def test_what_is_lacking_is_told_before_weights_are_fetched(method, reason, tmp_path, monkeypatch, command):
    config = {"model_type": "llava", "dtype": "float16", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(support, "find_spec", lambda name: None if name == method else object())
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: str(tmp_path / "config.json"))
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("fetched"))
    code, out, err = command("ask", tmp_path / "a.png", QUESTION, "--model", "some/model", "--device", "cpu")
    assert (code, out, err.count("\n")) == (2, "", 1) and reason in err and "quantised as" in err


def quantised_checkpoint(family, kind, tmp_path, dtype=torch.float32):
    """A quantised tiny checkpoint: (folder, whole model of plain transformers, its processor)."""
    for package in FORMATS[kind.partition(" ")[0]].packages.values():
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = write_checkpoint(family, tmp_path / "plain")
    opened = Pipeline(str(folder)).family
    folder = quantise(folder, tmp_path / "quantised", kind, opened.model_class, dtype)
    whole = opened.model_class.from_pretrained(folder, dtype=dtype).eval()
    return folder, whole, opened.processor


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_answers_as_in_transformers(family, kind, tmp_path, noise):
    tiny, picture = quantised_checkpoint(family, kind, tmp_path), noise((100, 80))
    model_inputs = inputs(tiny, [picture])
    expected = (
        tiny[1]
        .generate(**model_inputs, max_new_tokens=12, do_sample=False)[0, model_inputs["input_ids"].shape[1] :]
        .tolist()
    )
    plain = type(tiny[1]).from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()
    pipeline = Pipeline(str(tiny[0]))
    assert pipeline.family.dtype == torch.float32
    pruned = pipeline.prune(pipeline.encoder.encode([picture])[0], QUESTION, Pruning(keep=1.0))
    assert list(generate(pipeline.family, [pruned], 12)[0].ids) == expected
    with torch.no_grad():
        exact, actual = plain(**model_inputs).logits[0, -1], logits(pipeline, pruned)
    assert not torch.allclose(actual, exact, atol=1e-3)  # it is quantised
    assert torch.cosine_similarity(actual, exact, dim=0) > 0.8  # and yet the same model


def test_a_quantised_checkpoint_computes_as_it_is_stored(tmp_path, noise, command):
    tiny, picture = quantised_checkpoint("llava", "fp8", tmp_path, torch.bfloat16), noise((100, 80))
    with torch.no_grad():
        expected = tiny[1](**inputs(tiny, [picture])).logits[0, -1].float()
    pipeline = Pipeline(str(tiny[0]))
    assert pipeline.family.dtype == torch.bfloat16
    actual = logits(
        pipeline, pipeline.prune(pipeline.encoder.encode([picture])[0], QUESTION, Pruning(keep=1.0))
    ).float()
    assert (actual - expected).abs().max() < 2**-5 * expected.abs().max()
    picture.image.save(tmp_path / "a.png")
    code, out, err = command("ask", tmp_path / "a.png", QUESTION, "--model", tiny[0], "--dtype", "float32")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("gridprune: --dtype float32: ") and "computes in bfloat16" in err


@pytest.mark.parametrize("name", ["vision_config", "text_config", "quantization_config"])
def test_settings_of_the_wrong_kind_are_bad_input(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", name: "text"}))
    with pytest.raises(BadInput, match=r"config\.json holds a value of the wrong kind"):
        find_supported(str(tmp_path))
