"""Relevance from the SigLIP of a tower, against transformers' own SiglipModel."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import open_family
from tiny_families.siglip import LENGTH, write_siglip
from transformers import AutoTokenizer, SiglipModel

from gridprune_cli.builder import remarks
from gridprune_cli.errors import BadInput
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.selector import find_relevance
from gridprune_cli.settings import Pruning
from gridprune_cli.tokens import load_pruned
from gridprune_cli.vlm.checkpoint import Checkpoint
from gridprune_cli.vlm.siglip import SiglipRelevance

QUESTION = "What Colour?"  # in capitals, which SigLIP does not know, and as short as the text tower takes
OF_SIGLIP = ["llava_siglip", "gemma3", "paligemma", "idefics3", "smolvlm"]


@pytest.fixture(scope="module")
def siglip(checkpoint, tmp_path_factory):
    """`siglip("gemma3")`: the SigLIP of a tiny checkpoint's tower; never changed."""
    folders: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in folders:
            folders[name] = write_siglip(tmp_path_factory.mktemp("siglip") / name, checkpoint(name))
        return folders[name]

    return write


def text_embeds(folder: Path, question: str) -> torch.Tensor:
    """What transformers makes of a question, called as SigLIP's model cards say."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(question, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
    assert ids.shape == (1, LENGTH)
    with torch.no_grad():
        return SiglipModel.from_pretrained(folder).eval().get_text_features(ids).pooler_output


# ---- the formula -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("normed", [True, False])
def test_a_token_is_scored_as_an_image_of_its_patches_alone(side, normed, checkpoint, tmp_path):
    """SiglipModel's own embeddings of images of `side` x `side` patches are the reference, one visual token each."""
    folder = write_siglip(tmp_path / "siglip", checkpoint("gemma3"), image_size=14 * side)
    model = SiglipModel.from_pretrained(folder).eval()
    pixels = torch.randn(5, 3, 14 * side, 14 * side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.get_image_features(pixels).pooler_output  # (5, D)
        out = model.vision_model(pixels, output_hidden_states=True)
    hidden = out.last_hidden_state if normed else out.hidden_states[-1]  # (5, side**2, C)
    relevance = SiglipRelevance(Checkpoint("s", folder), torch.float32, "cpu", normed)(hidden.flatten(1), QUESTION)
    assert torch.allclose(relevance, torch.cosine_similarity(expected, text_embeds(folder, QUESTION)), atol=1e-5)
    assert relevance.std() > 0.05  # images are told apart
    other = SiglipRelevance(Checkpoint("s", folder), torch.float32, "cpu", not normed)(hidden.flatten(1), QUESTION)
    assert not torch.allclose(relevance, other, atol=1e-3)


def test_a_mean_of_patches_is_scored_as_the_head_with_equal_attention_scores_them(siglip):
    folder = siglip("gemma3")
    model = SiglipModel.from_pretrained(folder).eval()
    patches = torch.randn(3, 16, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        attention = model.vision_model.head.attention
        attention.in_proj_weight[:32] = 0  # of the query, and so all scores are 0
        attention.in_proj_bias[:32] = 0
        expected = torch.cosine_similarity(model.vision_model.head(patches), text_embeds(folder, QUESTION))
    relevance = SiglipRelevance(Checkpoint("s", folder), torch.float32, "cpu", True)(patches.mean(1), QUESTION)
    assert torch.allclose(relevance, expected, atol=1e-5)


@pytest.mark.parametrize("name", OF_SIGLIP)
def test_every_familys_stored_tokens_are_scored_by_the_whole_siglip(name, checkpoint, siglip, noise):
    """From a picture on: the patches of transformers' own SiglipModel, through its own head."""
    folder = siglip(name)
    family = open_family(checkpoint(name))
    family = type(family)(family.checkpoint, torch.float32, "cpu")
    family.take_clip(str(folder))
    assert family.relevance_source == {"source": "siglip", "model": str(folder)}
    picture = noise((56, 56))
    inputs, _ = family.process(picture.image)
    encoding = family.encode([picture.image])[0]
    tower = SiglipModel.from_pretrained(folder).eval().vision_model
    with torch.no_grad():
        pixels = inputs["pixel_values"].flatten(0, -4)  # (T, 3, H, W)
        patches = tower(pixels).last_hidden_state  # (T, P, C)
        if name == "gemma3":
            tokens = family.pool(patches).flatten(0, 1)[:, None]
        else:
            per_token = patches.shape[0] * patches.shape[1] // len(encoding.vision_features)
            side, across = round(per_token**0.5), round(patches.shape[1] ** 0.5)
            grid = patches.unflatten(1, (across, across)).unfold(1, side, side).unfold(2, side, side)
            tokens = grid.permute(0, 1, 2, 4, 5, 3).reshape(-1, per_token, patches.shape[2])  # (N, side**2, C)
        expected = torch.cosine_similarity(tower.head(tokens), text_embeds(folder, QUESTION))
    relevance = family.relevance(encoding.vision_features, QUESTION)
    assert torch.allclose(relevance, expected, atol=1e-5) and relevance.std() > 0.01
    lengths = family.patch_lengths(encoding.vision_features)  # which the dot product has and the cosine has not
    assert torch.allclose(lengths, tower.head(tokens).detach().norm(dim=-1), atol=1e-4)


def test_a_long_question_is_read_to_its_end(siglip):
    relevance = SiglipRelevance(Checkpoint("s", siglip("gemma3")), torch.float32, "cpu", True)
    vision_features = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    first, second = "aaaaaaaaaaa", "bbbb"
    ids = relevance.tokenizer(first + second, add_special_tokens=False).input_ids
    text = relevance.tokenizer
    pieces = [text.decode(ids[: LENGTH - 1]), text.decode(ids[LENGTH - 1 :])]
    assert [text(p, add_special_tokens=False).input_ids for p in pieces] == [ids[: LENGTH - 1], ids[LENGTH - 1 :]]
    expected = torch.stack([relevance(vision_features, piece) for piece in pieces]).mean(0)
    assert torch.allclose(relevance(vision_features, first + second), expected, atol=1e-6)


# ---- when it is taken ------------------------------------------------------------------------------------------------


def test_it_is_taken_by_name_alone(checkpoint, siglip, tmp_path):
    folder = checkpoint("gemma3")
    assert Pipeline(str(folder)).family.relevance_kind == "attention"
    for relevance in ("auto", "clip"):
        family = Pipeline(str(folder), clip=str(siglip("gemma3")), relevance=relevance).family
        assert isinstance(family.relevance, SiglipRelevance) and family.relevance_kind == "siglip"
    with pytest.raises(
        BadInput, match=r"which SigLIP .* is not known; name it as `clip`, or take `relevance=attention`"
    ):
        find_relevance(Pipeline(str(folder), relevance="clip").family, Pruning())
    both = shutil.copytree(folder, tmp_path / "both")
    shutil.copytree(siglip("gemma3"), both / "clip")
    assert Pipeline(str(both)).family.relevance_kind == "attention"
    assert Pipeline(str(both), relevance="clip").family.relevance_source == {
        "source": "siglip",
        "model": f"{both}/clip",
    }
    with pytest.raises(BadInput, match=r"^clip=.*: not with `relevance=attention`"):
        Pipeline(str(folder), clip=str(siglip("gemma3")), relevance="attention")


def test_methods_that_turn_clips_relevance_round_take_it_as_it_is(checkpoint, siglip, picture_file):
    pipeline = Pipeline(str(checkpoint("gemma3")), clip=str(siglip("gemma3")), dtype="float32")
    pruning = Pruning(keep=0.25, method=make_method("trim"))
    kept = pipeline.prune(pipeline.encode(picture_file)[0], QUESTION, pruning).kept
    upright = Pruning(keep=0.25, method=make_method("trim", relevance_sign=1))
    assert torch.equal(kept, pipeline.prune(pipeline.encode(picture_file)[0], QUESTION, upright).kept)
    assert not [note for note in remarks(pipeline.family, pruning) if "turns" in note]


@pytest.fixture
def picture_file(noise, tmp_path):
    noise((112, 112)).image.save(tmp_path / "a.png")
    return tmp_path / "a.png"


# ---- what is refused, and what is remarked ---------------------------------------------------------------------------


def test_what_can_have_no_siglip_says_so(checkpoint, siglip, tiny_llava):
    named = str(siglip("gemma3"))
    onevision = r"mixes its tower's patches behind the projector, so no SigLIP can score them"
    for name, reason in (("llava_onevision", onevision), ("qwen2_vl", "no CLIP or SigLIP"), ("internvl", "no CLIP")):
        with pytest.raises(BadInput, match=rf"^clip=.*{reason}.*; leave `clip` out$"):
            Pipeline(str(checkpoint(name)), clip=named)
        with pytest.raises(BadInput, match=rf"^relevance=clip: .*{reason}.*; use `relevance=attention`$"):
            Pipeline(str(checkpoint(name)), relevance="clip")
    with pytest.raises(BadInput, match="'siglip' is no CLIP with a text tower; name another"):
        Pipeline(str(tiny_llava), clip=named)
    with pytest.raises(BadInput, match="'clip' is no SigLIP with a text tower; name another"):
        Pipeline(str(checkpoint("gemma3")), clip=str(tiny_llava / "clip"))


@pytest.mark.parametrize(
    "size, factor, refused",
    [
        ("intermediate_size", 2, True),
        ("num_attention_heads", 2, True),
        ("patch_size", 2, True),
        ("num_hidden_layers", 1 / 3, True),  # fewer than the tower's
        ("num_hidden_layers", 2, False),  # the tower is without the last
        ("image_size", 2, False),  # the tower's position embeddings were fitted to its own
    ],
)
def test_a_siglip_of_other_sizes_is_refused_before_its_weights_are_read(
    size, factor, refused, checkpoint, siglip, tmp_path
):
    folder = shutil.copytree(siglip("gemma3"), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    before = config["vision_config"][size]
    config["vision_config"][size] = int(before * factor)
    (folder / "config.json").write_text(json.dumps(config))
    if not refused:
        assert Pipeline(str(checkpoint("gemma3")), clip=str(folder)).family.relevance_kind == "siglip"
        return
    (folder / "model.safetensors").unlink()
    expected = (
        rf"can't be the SigLIP of this tower: its {size} is {int(before * factor)}, that of .* {before}; name the S"
    )
    with pytest.raises(BadInput, match=expected):
        Pipeline(str(checkpoint("gemma3")), clip=str(folder))


def test_a_siglip_without_its_head_is_refused(checkpoint, siglip, tmp_path):
    folder = shutil.copytree(siglip("gemma3"), tmp_path / "headless")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["vision_use_head"] = False
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="no pooling head"):
        Pipeline(str(checkpoint("gemma3")), clip=str(folder))


@pytest.mark.parametrize("name", ["gemma3", "idefics3"])
def test_a_tower_that_was_tuned_is_a_remark(name, checkpoint, siglip, tmp_path):
    clip = shutil.copytree(siglip(name), tmp_path / "clip")
    weights = load_file(clip / "model.safetensors")
    for factor, count in ((1.0, 0), (1.1, 1)):
        tuned = {key: w * factor if key.startswith("vision_model.encoder") else w for key, w in weights.items()}
        save_file(tuned, clip / "model.safetensors", {"format": "pt"})
        pipeline = Pipeline(str(checkpoint(name)), clip=str(clip))
        notes = remarks(pipeline.family, Pruning())
        assert len(notes) == count and all("other weights than" in note for note in notes)


def test_a_tokenizer_that_needs_a_package_says_which(siglip, tmp_path):
    folder = shutil.copytree(siglip("gemma3"), tmp_path / "siglip")
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "SiglipTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        BadInput, match=r"^clip=.*needs sentencepiece; install with `pip install sentencepiece protobuf`"
    ):
        SiglipRelevance(Checkpoint(str(folder), folder), torch.float32, "cpu", True).load()


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_option_reaches_the_answer_and_the_record(command, checkpoint, siglip, picture_file, tmp_path):
    clip, model = siglip("gemma3"), checkpoint("gemma3")
    options = (
        "--model",
        model,
        "--max-new-tokens",
        2,
        "--tokens",
        4,
        "--method",
        "topk-relevance",
        "--dtype",
        "float32",
    )
    code, out, err = command("ask", picture_file, QUESTION, "--clip", clip, "--json", *options)
    assert code == 0, err
    assert json.loads(out)["relevance"] == {"source": "siglip", "model": str(clip)}
    pruned = tmp_path / "pruned.safetensors"
    code, _, err = command("prune", picture_file, QUESTION, "--clip", clip, "-o", pruned, *options[:2], *options[4:])
    assert code == 0, err
    code, answer, err = command("generate", pruned, "--max-new-tokens", 2)
    assert code == 0 and answer.strip() == json.loads(out)["answer"]
    # the four tokens that the whole SigLIP scores highest
    family = open_family(model)
    vision_features = Pipeline(family).encode(picture_file)[0].vision_features
    with torch.no_grad():
        head = SiglipModel.from_pretrained(clip).eval().vision_model.head(vision_features[:, None])
    scores = torch.cosine_similarity(head, text_embeds(clip, QUESTION))
    assert load_pruned(pruned).kept.tolist() == scores.topk(4).indices.sort().values.tolist()
    code, _, err = command("ask", picture_file, QUESTION, "--clip", clip, "--model", checkpoint("llava_onevision"))
    assert code == 2 and f"--clip {clip}: " in err and "leave --clip out" in err and err.count("\n") == 1
