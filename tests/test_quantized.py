"""`quantize`: which weights are quantised, what does not change by it, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch

from gridprune_cli.bench.measure import sample_scene
from gridprune_cli.bench.rates import count_bytes, measure_rates, weight_bytes
from gridprune_cli.cache.store import Store
from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import quantized
from gridprune_cli.vlm.placement import Placement
from gridprune_cli.vlm.quantized import check_quantize, check_quantized, group_size, linear_layers, quantized_bytes
from gridprune_cli.vlm.shapes import build

QUESTION = "What is left of the star?"
WAYS = ("int8", "int4")


def placed(device="cpu", dtype=torch.bfloat16, sharded=False):
    return Placement(device, "", dtype, "", sharded)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized") / "scene.png"
    path.write_bytes(sample_scene("scenes"))
    return path


@pytest.fixture(scope="module")
def pipelines():
    """The embedded model in bfloat16, as it is and quantised."""
    pytest.importorskip("torchao")
    return {way: Pipeline("scenes", dtype="bfloat16", quantize=way) for way in (None, *WAYS)}


# ---- what is quantised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_the_language_models_linear_layers_alone_are_quantised(way, pipelines):
    from torchao.utils import TorchAOBaseTensor

    whole, model = (pipelines[name].family.load("language", "tower", "projector") for name in (None, way))
    layers = linear_layers(model, "model.language_model")
    assert len(layers) == 6 * 7  # of six layers: four of attention, three of the MLP
    of_layers = {f"{path}.weight" for path in layers}
    plain = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, TorchAOBaseTensor) == (name in of_layers), name
        if name not in of_layers:
            assert torch.equal(parameter, plain[name]), name
    for path, layer in layers.items():  # each row of the identity gives a column of the weights
        actual = layer(torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
        exact = plain[f"{path}.weight"].float()
        assert (actual - exact).norm() / exact.norm() < {"int8": 0.01, "int4": 0.15}[way], path


@pytest.mark.parametrize("way", WAYS)
def test_bytes_are_those_of_the_formula(way, pipelines):
    for layer in linear_layers(pipelines[way].family.load("language"), "model.language_model").values():
        expected = quantized_bytes(layer.in_features * layer.out_features, way, 2, 64)
        assert (
            expected <= count_bytes(layer.weight) <= expected + 8 * layer.out_features
        )  # and a scale a row, in 8 bits


def test_a_layer_that_was_left_is_told(pipelines):
    with pytest.raises(Exception, match=r"torchao does not quantise its model\.language_model\.layers\.0\.\S+ of 192"):
        check_quantized(pipelines[None].family.load("language"), "model.language_model")


# ---- what does not change --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_sets_and_entries_are_for_any_weights(way, pipelines, image_file, tmp_path):
    whole, low = pipelines[None], pipelines[way]
    assert whole.family.encoder == low.family.encoder
    assert whole.family.fingerprint == low.family.fingerprint  # of the checkpoint
    image, _ = Pipeline(whole.family, store=Store(tmp_path, None)).encode(image_file)
    again, hit = Pipeline(low.family, store=Store(tmp_path, None)).encode(image_file)
    assert hit and again.key == image.key
    pruned = whole.prune(image, QUESTION, Pruning())
    assert low.generate(pruned, max_new_tokens=4) == whole.generate(pruned, max_new_tokens=4) != ""


def test_prefixes_are_entries_of_their_own(pipelines):
    identities = [pipelines[way].encoder.prefixes.identity for way in (None, *WAYS)]
    assert "quantize" not in identities[0]
    assert [identity.pop("quantize", None) for identity in identities] == [None, "int8", "int4"]
    assert identities[0] == identities[1] == identities[2]


@pytest.mark.parametrize("way", WAYS)
def test_the_first_layers_alone_are_quantised_alike(way, pipelines):
    """What a prefix comes from, with and without the rest of the language model in memory."""
    alone = Pipeline("scenes", dtype="bfloat16", quantize=way).family.first_layers(2)
    loaded = pipelines[way].family
    loaded.load("language")
    of_whole = loaded.first_layers(2)
    embeds = torch.randn(1, 5, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        first, second = (m.model.language_model(inputs_embeds=embeds).last_hidden_state for m in (alone, of_whole))
    assert len(linear_layers(alone, "model.language_model")) == 2 * 7
    assert torch.equal(first, second)


# ---- commands --------------------------------------------------------------------------------------------------------


def test_commands_take_it(pipelines, image_file, tmp_path, command):
    options = ("--quantize", "int8", "--dtype", "bfloat16")
    code, out, err = command("ask", image_file, QUESTION, *options, "--json", "--save", tmp_path / "set.safetensors")
    answer = json.loads(out)["answer"]
    assert code == 0 and answer and err.count("\n") <= 1
    code, out, _ = command("generate", tmp_path / "set.safetensors", *options)
    assert (code, out.strip()) == (0, answer)
    line = json.dumps({"image": str(image_file), "question": QUESTION})
    (tmp_path / "questions.jsonl").write_text(line + "\n")
    code, out, _ = command("batch", tmp_path / "questions.jsonl", *options)
    assert code == 0 and json.loads(out)["answer"] == answer


def test_the_server_says_which_weights_it_has(pipelines):
    from gridprune_cli.client.session import Mismatch, _check_settings

    session = {"settings": {name: [None, None] for name in ("clip", "relevance", "device", "dtype")}}
    session["settings"]["quantize"] = ["int8", "int8"]
    _check_settings(session, {"quantize": "int8"}, named=False)
    _check_settings(session, {"quantize": None}, named=True)
    for value, named in ((None, False), ("int4", True)):
        with pytest.raises(Mismatch, match="the server has int8"):
            _check_settings(session, {"quantize": value}, named=named)


def test_a_shape_is_quantised(pipelines):
    from test_shapes import shrunk

    shape = shrunk("llava-1.5-7b")
    family = build(shape, torch.bfloat16, "cpu", 2, quantize="int8")
    check_quantized(family.load("language"), family.text_model)
    layers = list(linear_layers(family.load("language"), family.text_model).values())
    rates = measure_rates(layers, torch.bfloat16)
    assert rates.flops > 0 and rates.nbytes > 0
    assert 1 < weight_bytes(layers) < 1.5  # with a scale a row, of rows that are short


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_without_the_library_one_line_names_the_extra(image_file, command, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: None if name == "torchao" else object())
    code, out, err = command("ask", image_file, QUESTION, "--quantize", "int8", "--no-server")
    assert (code, out) == (2, "")
    assert err == "gridprune: --quantize int8: torchao missing; pip install 'gridprune[quantize]'\n"


@pytest.mark.parametrize(
    ("way", "place", "reason"),
    [
        ("int2", placed(), "not one of int8, int4"),
        ("int4", placed(dtype=torch.float32), "bfloat16 alone, and the dtype is float32; add `dtype=bfloat16`"),
        ("int8", placed(sharded=True), "not with `device=map`"),
        ("int8", placed("mps"), "not on mps"),
    ],
)
def test_what_is_refused(way, place, reason, monkeypatch):
    monkeypatch.setattr(quantized, "find_spec", lambda name: object())
    with pytest.raises(BadInput, match="quantize") as caught:
        check_quantize(way, place)
    assert reason in caught.value.reason
    check_quantize(None, place)


def test_a_checkpoint_that_is_quantised_already(tmp_path, monkeypatch):
    from gridprune_cli.vlm import support

    for module in (quantized, support):
        monkeypatch.setattr(module, "find_spec", lambda name: object())
    config = {"model_type": "llava", "dtype": "bfloat16", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="is quantised already, as bitsandbytes; leave it out"):
        Pipeline(str(tmp_path), quantize="int8", device="cpu")


def test_groups_divide_every_width():
    def config(**sizes):
        text = SimpleNamespace(**{"num_attention_heads": 4, "head_dim": 32, **sizes})
        return SimpleNamespace(get_text_config=lambda: text)

    assert group_size(config(hidden_size=4096, intermediate_size=11008)) == 128
    assert group_size(config(hidden_size=192, intermediate_size=512)) == 64
    assert group_size(config(hidden_size=96, intermediate_size=512)) == 32
    with pytest.raises(BadInput, match="no multiples of 32; take `quantize=int8`"):
        group_size(config(hidden_size=48, intermediate_size=512))


def test_bytes_of_a_published_size():
    """LLaVA-1.5-7B's language model has 6.476e9 weights in linear layers."""
    assert quantized_bytes(1000, None, 2, 128) == 2000
    assert quantized_bytes(128_000, "int8", 2, 128) == 128_000
    assert quantized_bytes(128_000, "int4", 2, 128) == 64_000 + 4 * 1000
