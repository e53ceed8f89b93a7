"""What a model's name means: folders, the hub's models without a network, the CLIP of a tower, identities."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import are_progress_bars_disabled, filter_repo_objects
from safetensors.torch import load_file

from gridprune_cli.cache.root import MOST_REMEMBERED, REMEMBERED
from gridprune_cli.cache.store import Store, open_store
from gridprune_cli.cli import options
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.selector import find_relevance
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import checkpoint, find, hub, identity, open_model
from gridprune_cli.vlm.checkpoint import Checkpoint, find_clip
from gridprune_cli.vlm.clip import ClipRelevance
from gridprune_cli.vlm.shapes import SHAPES
from gridprune_cli.vlm.word_relevance import WordRelevance

SHA, OTHER = "a" * 40, "b" * 40
PHOTO = "0" * 64  # a picture's sha256


def put(cache: Path, name: str, source: Path | None, sha: str = SHA, ref: str = "main") -> Path:
    """A snapshot in the hub's cache, laid out as its client does."""
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True, exist_ok=True)
    (root / "refs" / ref).write_text(sha)
    snapshot = root / "snapshots" / sha
    if source is None:
        snapshot.mkdir(parents=True)
    else:
        shutil.copytree(source, snapshot, ignore=shutil.ignore_patterns("clip"))
    return snapshot


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_hub_name_answers_like_its_folder(hub_cache, tiny_llava, noise):
    put(hub_cache, "some/tiny-llava", tiny_llava)
    pipeline = Pipeline("some/tiny-llava", dtype="float32", clip=str(tiny_llava / "clip"))
    local = Pipeline(str(tiny_llava), dtype="float32")
    picture = noise((100, 80))
    pruned, expected = (p.prune(p.encoder.encode([picture])[0], "What colour is the star?") for p in (pipeline, local))
    assert pruned.kept.tolist() == expected.kept.tolist() and pruned.model == "some/tiny-llava"
    assert pipeline.generate(pruned, max_new_tokens=4) == local.generate(expected, max_new_tokens=4)


def test_a_folder_comes_before_a_hub_name(hub_cache, tiny_llava, tmp_path, monkeypatch):
    put(hub_cache, "some/tiny-llava", tiny_llava)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llava, tmp_path / "some" / "tiny-llava")
    checkpoint = find("some/tiny-llava")
    assert checkpoint.commit is None and checkpoint.folder == Path("some/tiny-llava")


def test_revisions(hub_cache, tiny_llava):
    put(hub_cache, "some/llava", tiny_llava)
    put(hub_cache, "some/llava", tiny_llava, OTHER, "v2")
    assert [find("some/llava").commit, find("some/llava", "v2").commit] == [SHA, OTHER]
    assert find("some/llava", "v2") == find("some/llava@v2") == find("some/llava@v2", "v2")
    assert find("some/llava", "v2").name == "some/llava@v2"  # what a pruned set is generated with later
    assert find("some/llava", OTHER).commit == OTHER
    with pytest.raises(BadInput, match=r"revision=v1: `model=some/llava@v2` names another"):
        find("some/llava@v2", "v1")
    for model in ("scenes", str(tiny_llava)):
        with pytest.raises(BadInput, match="only models from the hub have revisions"):
            find(model, "v2")


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "./a/b", "/a/b", "a b/c", "a/b@", "ä/b"])
def test_what_is_no_hub_name_is_not_asked_of_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: asked.append(args) or str(tmp_path / "x"))
    with pytest.raises(BadInput, match="no folder with a config"):
        find(name)
    assert asked == ([("a/b", "config.json")] if name == "a/b@" else [])  # an empty revision is none


def test_an_unknown_family_is_refused_before_its_weights_are_fetched(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.setattr(hub, "hf_hub_download", lambda *args, **options: str(tmp_path / "config.json"))
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: pytest.fail("fetched"))
    with pytest.raises(BadInput, match="model type 'bert' is not supported"):
        open_model("some/bert", "auto", "cpu")


def test_only_what_holds_no_code_is_fetched(monkeypatch, hub_cache, tiny_llava):
    snapshot = put(hub_cache, "some/llava", tiny_llava)
    asked = {}

    def download(name, **options):
        asked.update(options, name=name, quiet=are_progress_bars_disabled())

    monkeypatch.setattr(hub, "snapshot_download", download)
    was = are_progress_bars_disabled()
    find("some/llava").complete()
    assert (asked["name"], asked["revision"], asked["quiet"]) == ("some/llava", SHA, True)  # all of it is here
    assert are_progress_bars_disabled() == was
    (snapshot / "model.safetensors").rename(hub_cache / "aside")
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda *a, **o: download(*a, **o) or shutil.move(hub_cache / "aside", snapshot / "model.safetensors"),
    )
    find("some/llava").complete()
    assert asked["quiet"] == was
    files = ["config.json", "tokenizer.model", "chat_template.jinja", "merges.txt", "model-00001-of-00002.safetensors"]
    code = ["pytorch_model.bin", "model.pt", "model.pth", "modeling.py", "tf_model.h5", "weights.pkl", "model.ckpt"]
    assert list(filter_repo_objects(files + code, allow_patterns=asked["allow_patterns"])) == files


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16", "text_config": {"dtype": "float32"}}, "float16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_the_dtype_of_a_checkpoint(settings, stored, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"} | settings))
    assert find(str(tmp_path)).stored == stored


def test_the_options_of_the_commands_reach_the_model(hub_cache, tiny_llava):
    put(hub_cache, "some/llava", tiny_llava, OTHER, "v2")
    pipeline = options.pipeline("some/llava@v2", clip=str(tiny_llava / "clip"))
    assert (pipeline.model, pipeline.family.checkpoint.commit) == ("some/llava@v2", OTHER)
    assert pipeline.family.clip and pipeline.family.clip.folder == tiny_llava / "clip"
    assert pipeline.family.checkpoint.store is pipeline.store
    assert Pipeline(pipeline.model).family.checkpoint.commit == OTHER  # as `generate` opens it


# ---- failures --------------------------------------------------------------------------------------------------------


class Response:
    """What the hub's errors want to see of the server's answer."""

    headers: ClassVar = {}
    request = None
    status_code = 404


FAILURES = {
    "gated": (errors.GatedRepoError("403\nx", response=Response()), 2, r"licence.*huggingface.co/some/llava.*log in"),
    "none": (errors.RepositoryNotFoundError("404", response=Response()), 2, "no such folder, and no such model"),
    "revision": (errors.RevisionNotFoundError("404", response=Response()), 2, "no branch, tag or commit v9"),
    "entry": (errors.RemoteEntryNotFoundError("404", response=Response()), 2, "has no config.json"),
    "network": (errors.LocalEntryNotFoundError("long\ntext"), 1, "the hub can't be reached; check the network"),
    "server": (errors.HfHubHTTPError("504 Time-out\nmore", response=Response()), 1, r"\(504 Time-out\); try again"),
    "disk": (OSError(28, "No space left on device"), 1, "No space left on device"),
}


@pytest.mark.parametrize("call", ["hf_hub_download", "snapshot_download"])
@pytest.mark.parametrize("case", FAILURES)
def test_failures_are_one_line_that_says_what_to_do(case, call, monkeypatch, hub_cache, tiny_llava):
    fault, code, reason = FAILURES[case]
    put(hub_cache, "some/llava", tiny_llava, ref="v9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", case not in ("network",))
    if call == "snapshot_download":
        monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: str(find_snapshot(hub_cache) / "config.json"))

    def fail(*args, **options):
        raise fault

    monkeypatch.setattr(hub, call, fail)
    reason = reason.replace("v9", SHA) if call == "snapshot_download" else reason
    with pytest.raises(GridpruneError, match=rf"^model=some/llava: .*{reason}") as caught:
        open_model("some/llava", "auto", "cpu", revision="v9")
    assert caught.value.exit_code == code and "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(signal, "SIGPIPE"), reason="this system has no SIGPIPE")
def test_a_connection_that_breaks_is_told_where_a_closed_pipe_ends_the_process(monkeypatch, hub_cache):
    def download(*args, **options):
        ours, theirs = socket.socketpair()
        theirs.close()
        ours.send(b"GET")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as the command line sets it
    try:
        with pytest.raises(GridpruneError, match=r"can't be fetched from the hub \(.*Broken pipe"):
            find("some/llava")
        assert signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGPIPE, before)


def find_snapshot(cache: Path) -> Path:
    return cache / "models--some--llava" / "snapshots" / SHA


def test_offline_and_not_in_the_cache(hub_cache):
    with pytest.raises(BadInput, match=r"model=some/llava: no such folder, .*HF_HUB_OFFLINE"):
        find("some/llava")
    with pytest.raises(BadInput, match="no name that the hub could have"):
        find("some/..llava")


def test_missing_weights_are_told_at_once(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    with pytest.raises(BadInput, match=r"no weights as model.safetensors or pytorch_model.bin, or their shards"):
        Pipeline(str(folder))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(BadInput, match=r"1 of 2 files of weights missing \(first: model-2.safetensors\)"):
        Pipeline(str(folder))
    index.write_text("[1")
    with pytest.raises(BadInput, match=r"index.json: can't be read"):
        Pipeline(str(folder))


def test_an_adapter_is_not_left_out_in_silence(tiny_llava, tmp_path):
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"model=.*llava: has an adapter .* merge it into the weights"):
        Pipeline(str(folder))


@pytest.mark.parametrize("weights", ["safetensors", "bin", "shards"])
def test_pickled_weights_are_fetched_where_a_repository_has_no_others(weights, monkeypatch, hub_cache, tiny_llava):
    files = ["config.json", "training_args.bin", "optimizer.bin", "model.pt", "pytorch_model_fsdp.bin"]
    files += {
        "safetensors": ["model.safetensors", "pytorch_model.bin"],
        "bin": ["pytorch_model.bin"],
        "shards": [*(shards := ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"])],
    }[weights]
    if weights == "shards":
        files.append("pytorch_model.bin.index.json")
    snapshot = put(hub_cache, "some/llava", tiny_llava)
    (snapshot / "model.safetensors").unlink()

    def download(name, *, allow_patterns, **options):
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            if file not in os.listdir(snapshot):
                content = {"weight_map": dict(enumerate(shards))} if file.endswith("index.json") else {}
                (snapshot / file).write_text(json.dumps(content))

    monkeypatch.setattr(hub, "snapshot_download", download)
    checkpoint = find("some/llava").complete()
    there = {path.name for path in snapshot.iterdir() if path.name in files}
    assert there == set(files) - {"training_args.bin", "optimizer.bin", "model.pt", "pytorch_model_fsdp.bin"} - (
        {"pytorch_model.bin"} if weights == "safetensors" else set()
    )
    assert checkpoint.folder == snapshot


# ---- the CLIP of a tower ---------------------------------------------------------------------------------------------


TOWER = {"model_type": "clip_vision_model", "hidden_size": 32, "patch_size": 14, "image_size": 56}
KNOWN = "known/clip"


@pytest.fixture
def alone(tiny_llava, tmp_path):
    """A LLaVA without its CLIP."""
    return shutil.copytree(tiny_llava, tmp_path / "alone", ignore=shutil.ignore_patterns("clip"))


@pytest.fixture
def known(hub_cache, monkeypatch):
    """The tower of the tiny LLaVA is known to be that of a CLIP on the hub."""
    monkeypatch.setattr(checkpoint, "_KNOWN_TOWERS", {KNOWN: TOWER})
    return hub_cache


def edit(folder: Path, **changes: object) -> Path:
    """Changes the vision_config of a checkpoint."""
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_clip_is_found_in_its_sub_folder_or_named(hub_cache, tiny_llava, alone, noise):
    put(hub_cache, "some/clip", tiny_llava / "clip")
    vision_features = Pipeline(str(alone), dtype="float32").encoder.encode([noise((60, 60))])[0].vision_features
    relevance = []
    for model, clip in ((tiny_llava, None), (alone, str(tiny_llava / "clip")), (alone, "some/clip")):
        family = Pipeline(str(model), clip=clip, dtype="float32").family
        assert isinstance(family.relevance, ClipRelevance)
        assert family.relevance_source == {"source": "clip", "model": clip or f"{tiny_llava}/clip"}
        relevance.append(family.relevance(vision_features, "What colour is the star?").tolist())
    assert relevance[0] == relevance[1] == relevance[2]


def test_words_are_taken_by_name_alone_and_attention_where_the_tower_is_no_clip(tiny_llava, alone, checkpoint):
    other = checkpoint("qwen2_vl")
    for model in (tiny_llava, alone, other):
        family = Pipeline(str(model), relevance="words").family
        assert isinstance(family.relevance, WordRelevance)
        assert family.relevance_source == {"source": "words", "model": None}
    for model, relevance in ((other, "auto"), (other, "attention"), (alone, "attention")):
        family = Pipeline(str(model), relevance=relevance).family
        expected = {"source": "attention", "model": None, "depth": family.relevance_depth}
        assert family.relevance_source == expected and family.clip is None
        with pytest.raises(TypeError, match="of a prompt"):
            _ = family.relevance
    with pytest.raises(
        BadInput, match=r"^relevance=clip: the tower of .* is no CLIP or SigLIP; use `relevance=attention`"
    ):
        Pipeline(str(other), relevance="clip")
    for relevance in ("attention", "words"):
        with pytest.raises(BadInput, match=rf"^clip=.*: not with `relevance={relevance}`"):
            Pipeline(str(alone), clip=str(tiny_llava / "clip"), relevance=relevance)
    with pytest.raises(BadInput, match=r"^relevance=neither: not one of auto, clip, attention, both, words"):
        Pipeline(str(alone), relevance="neither")


def test_a_clip_that_nobody_knows_is_not_swapped_for_attention(alone):
    remedies = r"which CLIP .* is not known; name it as `clip`, or take `relevance=attention`"
    for relevance in ("auto", "clip"):
        pipeline = Pipeline(str(alone), relevance=relevance)
        find_relevance(pipeline.family, Pruning(keep=1.0, method=make_method("uniform")))  # needs none
        with pytest.raises(BadInput, match=remedies):
            find_relevance(pipeline.family, Pruning())
    config = json.loads((alone / "config.json").read_text())
    del config["vision_config"]  # then it is a CLIP's, as transformers reads it
    (alone / "config.json").write_text(json.dumps(config))
    assert find(str(alone)).clip_tower.image_size == 336


def test_states_do_not_depend_on_the_clip(tiny_llava, alone):
    keys = {Pipeline(str(alone), clip=clip).encoder.key(PHOTO) for clip in (None, str(tiny_llava / "clip"))}
    assert keys == {Pipeline(str(tiny_llava)).encoder.key(PHOTO)}


def test_what_is_no_clip_of_this_tower(tiny_llava, alone, tmp_path, noise):
    with pytest.raises(BadInput, match="no CLIP with a text tower"):
        Pipeline(str(tiny_llava), clip=str(tiny_llava))
    with pytest.raises(BadInput, match=r"^clip=.*nowhere: no folder"):
        Pipeline(str(tiny_llava), clip=str(tmp_path / "nowhere"))
    pipeline = Pipeline(str(tiny_llava), dtype="float32")
    vision_features = pipeline.encoder.encode([noise((60, 60))])[0].vision_features
    with pytest.raises(BadInput, match=r"gives 32 numbers per patch, the model's 31; name the CLIP"):
        pipeline.family.relevance(vision_features[:, 1:], "What?")
    edit(alone, model_type="pixtral")
    with pytest.raises(BadInput, match=r"the tower of .* is no CLIP or SigLIP; leave `clip` out"):
        find_clip(find(str(alone)), str(tiny_llava / "clip"))


@pytest.mark.parametrize(
    "size", ["image_size", "patch_size", "num_hidden_layers", "intermediate_size", "projection_dim"]
)
@pytest.mark.parametrize("where", ["named", "sub-folder"])
def test_a_clip_of_other_sizes_than_the_tower_is_refused_before_its_weights_are_read(size, where, tiny_llava, alone):
    clip = shutil.copytree(tiny_llava / "clip", alone / "clip" if where == "sub-folder" else alone / "other")
    (clip / "model.safetensors").unlink()
    before = json.loads((clip / "config.json").read_text())["vision_config"][size]
    edit(alone, **{size: 2 * before})
    with pytest.raises(BadInput, match=rf"can't be the CLIP .*: its {size} is {before}, that of .* {2 * before}; name"):
        find_clip(find(str(alone)), str(clip) if where == "named" else None)


@pytest.mark.parametrize("cached", ["nothing", "pickled", "whole"])
def test_the_known_clip_is_taken_from_the_hubs_cache_unless_it_is_not_whole(cached, known, tiny_llava, alone):
    if cached != "nothing":
        snapshot = put(known, KNOWN, tiny_llava / "clip")
        if cached == "pickled":
            weights = load_file(snapshot / "model.safetensors")
            torch.save(weights, snapshot / "pytorch_model.bin")
            (snapshot / "model.safetensors").unlink()
    if cached in ("pickled", "whole"):
        assert find_clip(find(str(alone))).identity == f"hub:{KNOWN}@{SHA}"
    else:
        remedies = (
            r"HF_HUB_OFFLINE forbids to fetch it; .* name a copy as `clip=FOLDER`, or take `relevance=attention`$"
        )
        with pytest.raises(BadInput, match=rf"^the CLIP {KNOWN}: .*{remedies}"):
            find_clip(find(str(alone)))


def test_the_known_clip_is_fetched_where_relevance_is_needed(known, tiny_llava, alone, monkeypatch):
    calls = []

    def locate(name, revision, flag, *, cached=False):
        calls.append((name, cached))
        if cached:
            raise BadInput("not here")
        return put(known, name, tiny_llava / "clip")

    monkeypatch.setattr(hub, "locate", locate)
    monkeypatch.setattr(hub, "fetch", lambda name, *_, **__: calls.append(name))
    pipeline = Pipeline(str(alone), dtype="float32")
    find_relevance(pipeline.family, Pruning(keep=1.0, method=make_method("uniform")))
    assert calls == []
    find_relevance(pipeline.family, Pruning())
    assert calls == [(KNOWN, True), (KNOWN, False), KNOWN]
    find_relevance(pipeline.family, Pruning())
    assert len(calls) == 3 and pipeline.family.relevance_source == {"source": "clip", "model": KNOWN}


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-next-7b"])
def test_the_clip_of_the_published_models_is_known(name, tmp_path, hub_cache):
    """Their configs are written as old ones are, without defaults, and with the sizes of the CLIP's halves twice."""
    shape = SHAPES[name]
    (tmp_path / "config.json").write_text(json.dumps(shape.config))
    snapshot = put(hub_cache, "openai/clip-vit-large-patch14-336", None)
    twice = {f"{half}_config_dict": shape.clip[f"{half}_config"] for half in ("vision", "text")}
    (snapshot / "config.json").write_text(json.dumps(shape.clip | twice))
    for file in ("pytorch_model.bin", "vocab.json"):
        (snapshot / file).write_text("{}")
    model = find(str(tmp_path))
    assert find_clip(model).folder == find_clip(model, "openai/clip-vit-large-patch14-336").folder == snapshot


@pytest.mark.parametrize(("fault", "code"), [("network", 2), ("server", 1), ("disk", 1)])
def test_a_known_clip_that_cannot_be_fetched_is_told_with_both_remedies(fault, code, known, alone, monkeypatch):
    def fail(*args, local_files_only, **options):
        raise errors.LocalEntryNotFoundError("none") if local_files_only else FAILURES[fault][0]

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "hf_hub_download", fail)
    with pytest.raises(GridpruneError, match=r"`clip=FOLDER`, or take `relevance=attention`$") as caught:
        find_clip(find(str(alone)))
    assert caught.value.exit_code == code and "\n" not in str(caught.value)


# ---- identities ------------------------------------------------------------------------------------------------------


def test_a_hub_models_identity_is_its_commit(hub_cache, tiny_llava, monkeypatch):
    put(hub_cache, "some/llava", tiny_llava, ref="main")
    put(hub_cache, "some/llava", None, OTHER, "v2")
    (find_snapshot(hub_cache).parent / OTHER / "config.json").write_text('{"model_type": "llava"}')
    monkeypatch.setattr("gridprune_cli.vlm.checkpoint.identify_folder", lambda *_: pytest.fail("hashed"))
    assert find("some/llava").identity == find("some/llava@main").identity == find(f"some/llava@{SHA}").identity
    assert find("some/llava").identity == f"hub:some/llava@{SHA}" != find("some/llava@v2").identity


@pytest.fixture
def counted(monkeypatch):
    """How many files were hashed; times count as settled at once."""
    monkeypatch.setattr(identity, "SETTLED", 0)
    hashed = []
    digest = identity.hashlib.file_digest

    def count(file, name):
        hashed.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(identity.hashlib, "file_digest", count)
    return hashed


def settle() -> None:
    time.sleep(0.03)  # a few ticks of the clock that file systems go by


def test_an_unchanged_folder_is_hashed_once(tiny_llava, tmp_path, counted):
    store = open_store()
    settle()
    first = find(str(tiny_llava), store=store).identity
    assert "model.safetensors" in counted
    del counted[:]
    assert find(str(tiny_llava), store=open_store()).identity == first and counted == []
    elsewhere = shutil.copytree(tiny_llava, tmp_path / "elsewhere")
    assert find(str(elsewhere)).identity == first  # where it lies does not matter, and without a store it is read
    assert counted
    assert (store.root / "CACHEDIR.TAG").exists()


@pytest.mark.parametrize("change", ["byte", "replaced", "added", "removed", "renamed"])
def test_a_changed_folder_has_another_identity(change, tiny_llava, tmp_path, counted):
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    settle()
    store = open_store()
    first = find(str(folder), store=store).identity
    assert store.recall(identity.files.digest(identity.list_files(folder))) == first
    weights = folder / "model.safetensors"
    was = weights.stat()
    if change == "byte":  # in place, and the time of the last write set back
        with weights.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
        now = weights.stat()
        assert (now.st_ino, now.st_size, now.st_mtime_ns) == (was.st_ino, was.st_size, was.st_mtime_ns)
    elif change == "replaced":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        (tmp_path / "new").write_bytes(data)
        os.utime(tmp_path / "new", ns=(was.st_atime_ns, was.st_mtime_ns))
        os.replace(tmp_path / "new", weights)
    elif change == "added":
        (folder / "added.json").write_text("{}")
    elif change == "removed":
        (folder / "generation_config.json").unlink()
    else:
        weights.rename(folder / "weights.safetensors")
    assert find(str(folder), store=store).identity != first


def test_a_fresh_change_is_not_remembered(tiny_llava, tmp_path, counted, monkeypatch):
    """Another one could come within the same tick of the clock."""
    monkeypatch.setattr(identity, "SETTLED", 10**12)
    store = open_store()
    first = find(str(shutil.copytree(tiny_llava, tmp_path / "llava")), store=store).identity
    del counted[:]
    assert find(str(tmp_path / "llava"), store=store).identity == first and counted
    assert not (store.root / REMEMBERED).exists()


def test_a_change_while_hashing_is_not_remembered(tiny_llava, tmp_path, counted, monkeypatch):
    folder = shutil.copytree(tiny_llava, tmp_path / "llava")
    settle()
    digest = identity.hashlib.file_digest

    def meddle(file, name):
        (folder / "config.json").touch()
        return digest(file, name)

    monkeypatch.setattr(identity.hashlib, "file_digest", meddle)
    assert find(str(folder), store=open_store()).identity
    assert not (open_store().root / REMEMBERED).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"KEY": 5}', b'{"KEY": "short"}'])
def test_what_was_remembered_may_be_damaged(content, tiny_llava, counted):
    store = open_store()
    settle()
    first = find(str(tiny_llava), store=store).identity
    key = identity.files.digest(identity.list_files(tiny_llava))
    (store.root / REMEMBERED).write_bytes(content.replace(b"KEY", key.encode()))
    del counted[:]
    assert find(str(tiny_llava), store=store).identity == first and counted
    assert store.recall(key) == first


def test_little_is_remembered_and_clearing_forgets_it(tmp_path):
    store = Store(tmp_path / "cache", None)
    keys = [f"{n:064x}" for n in range(MOST_REMEMBERED + 3)]
    for key in keys:
        store.remember(key, key)
    assert [store.recall(key) for key in keys] == [None] * 3 + keys[3:]
    store.clear()
    assert store.recall(keys[-1]) is None and not (store.root / REMEMBERED).exists()


def test_a_cache_that_cannot_be_written_does_not_matter(tiny_llava, tmp_path, counted):
    (tmp_path / "file").write_text("")
    settle()
    store = Store(tmp_path / "file", None)
    assert find(str(tiny_llava), store=store).identity == Checkpoint("x", tiny_llava).identity


@pytest.mark.parametrize("text", ["[]", '"llava"', "7", "[" * 100_000, '{"model_type": ["llava"]}', '{"a": "\\'])
def test_a_config_that_is_none_is_bad_input(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match=r"config\.json names no model_type"):
        find(str(tmp_path))


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 7, None])
def test_an_index_names_files_of_its_folder_alone(tmp_path, name):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    why = "which is no file of this folder" if isinstance(name, str) else "index.json: can't be read"
    with pytest.raises(BadInput, match=why):
        find(str(tmp_path)).complete()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "processor_config.json"])
def test_damaged_settings_are_bad_input(tiny_llava, tmp_path, name):
    copy = shutil.copytree(tiny_llava, tmp_path / "copy")
    (copy / name).write_text("[")
    with pytest.raises(BadInput, match="can't be read"):
        _ = open_model(str(copy), "float32", "cpu").processor


def test_an_attention_that_a_config_names_is_not_fetched(tiny_llava, tmp_path):
    copy = shutil.copytree(tiny_llava, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for section in (config, config["text_config"], config["vision_config"]):
        section["attn_implementation"] = section["_attn_implementation"] = "someone/kernel"
    (copy / "config.json").write_text(json.dumps(config))
    model = open_model(str(copy), "float32", "cpu").load("language")
    assert "kernel" not in str(model.config.get_text_config()._attn_implementation)
