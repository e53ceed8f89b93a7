"""The commands, called as a user calls them: what goes to stdout, what to stderr, and the exit code."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from fuzz.files import changed, swap
from PIL import Image

from gridprune_cli.cache.store import open_store
from gridprune_cli.scenes.scene import draw, make_scene
from gridprune_cli.vlm import FAMILIES

QUESTION = "What colour is the star?"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "scene.png"
    draw(make_scene(5))[0].save(path)
    return path


def test_ask_prints_the_answer_alone(run, image):
    code, out, err = run("ask", image, QUESTION)
    assert code == 0
    assert out.count("\n") == 1 and out.strip()
    assert "2 of 16 visual tokens, image encoded" in err
    again = run("ask", image, QUESTION)
    assert again[1] == out and "image cached" in again[2]


def test_ask_json_has_what_the_contract_names(run, image):
    code, out, _ = run("ask", image, QUESTION, "--json", "--keep", "0.5", "--method-option", "zone=2")
    record = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    names = ["image", "question", "answer", "model", "method", "keep", "tokens", "grid"]
    names += ["region", "localizer", "zones", "cache", "key", "positions", "ms"]
    assert set(names) <= set(record)
    assert record["relevance"] == {"source": "clip", "model": f"{record['model']}/clip"}
    assert record["tokens"] == {"full": 16, "kept": 8, "separators": 0} and record["grid"] == [4, 4]
    assert record["zones"]["rows"] == record["zones"]["cols"] == 2 and sum(record["zones"]["budgets"]) == 8
    assert set(record["ms"]) == {"load", "localize", "encode", "select", "prefill", "decode", "total"}
    assert (record["image"], record["question"], record["cache"]) == (str(image), QUESTION, "miss")
    assert len(record["region"]) == 4 and record["positions"] == "original"


def test_quiet_says_nothing(run, image):
    assert run("ask", image, QUESTION, "-q")[2] == ""


def test_ask_reads_the_image_from_stdin(run, image):
    code, out, _ = run("ask", "-", QUESTION, stdin=image.read_bytes())
    assert (code, out) == (0, run("ask", image, QUESTION)[1])
    code, _, err = run("ask", "-", QUESTION, stdin=b"")
    assert code == 2 and "-: empty" in err


def test_prune_then_generate_equals_ask(run, image, tmp_path):
    answer = run("ask", image, QUESTION, "--keep", "0.3")[1]
    saved = tmp_path / "p.safetensors"
    code, out, err = run("prune", image, QUESTION, "--keep", "0.3", "-o", saved)
    assert (code, out) == (0, "") and "5 of 16 visual tokens" in err
    assert run("generate", saved)[1] == answer
    record = json.loads(run("generate", saved, "--json")[1])
    assert record["answer"] == answer.strip() and record["file"] == str(saved)
    options = ("--generation", "repetition_penalty=50.0", "--max-new-tokens", "24")
    changed = run("ask", image, QUESTION, "--keep", "0.3", *options)[1]
    assert run("generate", saved, *options)[1] == changed != run("generate", saved, *options[2:])[1]
    code, out, err = run("generate", saved, "--generation", "warmth=2")
    assert (code, out) == (2, "") and "--generation warmth=2: no option that" in err
    also = tmp_path / "q.safetensors"
    run("ask", image, QUESTION, "--keep", "0.3", "--save", also)
    assert also.read_bytes() == saved.read_bytes()


def test_what_leaves_inside_is_said_everywhere(run, image, tmp_path):
    options = ("--keep", "0.5", "--region", "0,0,3,7", "--ilp", "0.2", "--ilp-layer", "1")
    saved, figure = tmp_path / "p.safetensors", tmp_path / "p.png"
    code, out, err = run("ask", image, QUESTION, *options, "--json", "--save", saved, "--show", figure)
    record = json.loads(out)
    assert (code, record["tokens"]["kept"]) == (0, 8) and "8 of 16 visual tokens, 3 from layer 1 on" in err
    rule = {"name": "region-attention"}
    stage = {"layer": 1, "rule": rule, "keep": [3], "positions": "original"}
    assert record["inside"] == {"stages": [stage], "tokens": [8, 3, 3], "mean": 4.67}
    assert figure.stat().st_size > 0
    again = json.loads(run("generate", saved, "--json")[1])
    assert (again["answer"], again["inside"]) == (record["answer"], record["inside"])
    other = tmp_path / "q.safetensors"
    assert "3 from layer 1 on" in run("prune", image, QUESTION, *options, "-o", other)[2]
    assert other.read_bytes() == saved.read_bytes()
    assert "3 from layer 1 on" in run("show", image, QUESTION, *options, "-o", figure)[2]
    assert json.loads(run("ask", image, QUESTION, "--json")[1])["inside"] is None


def test_a_selection_inside_is_told_and_drawn_as_what_stays(run, image, tmp_path):
    """Zones and picture are those of pruning before the language model; what enters it is everything."""
    from gridprune_cli.tokens import load_pruned

    options = ("--keep", "0.25", "--ilp", "selection")
    before = json.loads(run("ask", image, QUESTION, "--keep", "0.25", "--json")[1])
    saved = tmp_path / "p.safetensors"
    code, out, err = run("prune", image, QUESTION, *options, "-o", saved, "--json")
    record = json.loads(out)
    assert code == 0 and "16 of 16 visual tokens, 4 from layer 1 on" in err
    assert (record["zones"], record["region"], record["key"]) == (before["zones"], before["region"], before["key"])
    assert record["tokens"]["kept"] == 16 and record["inside"]["tokens"] == [16, 4, 4]
    stays = record["inside"]["stages"][0]["rule"]["tokens"]
    assert stays == load_pruned(saved).selected.tolist() and len(stays) == 4
    drawn = run("show", image, QUESTION, *options)[1]
    assert drawn == run("show", image, QUESTION, "--keep", "0.25")[1] and "#" in drawn
    answers = {run("ask", image, QUESTION, *options)[1], run("generate", saved)[1]}
    line = tmp_path / "q.jsonl"
    line.write_text(json.dumps({"id": 1, "image": str(image), "question": QUESTION}))
    answers.add(json.loads(run("batch", line, *options)[1])["answer"] + "\n")
    assert len(answers) == 1


def test_prune_with_prefix_then_generate_equals_ask(run, image, tmp_path, monkeypatch):
    from gridprune_cli.tokens import load_pruned

    options = ("--keep", "0.25", "--ilp", "selection")
    saved, pruned = tmp_path / "p.safetensors", tmp_path / "q.safetensors"
    code, out, err = run("prune", image, QUESTION, *options, "--with-prefix", "-o", saved)
    assert (code, out) == (0, "") and "16 of 16 visual tokens, 4 from layer 1 on, with the prefix" in err
    assert load_pruned(saved).prefix.depth == 1
    answer = run("ask", image, QUESTION, *options, "--save", pruned)[1]
    assert load_pruned(pruned).prefix is None  # the same file, whatever the cache holds
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"id": 1, "image": str(image), "question": QUESTION}))
    assert run("prune", "--batch", lines, *options, "--with-prefix", "-o", tmp_path)[0] == 0
    assert (tmp_path / "1.safetensors").read_bytes() == saved.read_bytes()
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(tmp_path / "empty"))
    image.unlink()
    assert run("generate", saved, pruned)[1] == answer * 2


def test_where_no_prefix_holds_none_is_saved(run, image, tmp_path):
    saved = tmp_path / "p.safetensors"
    code, out, err = run("prune", image, QUESTION, "--keep", "0.25", "--with-prefix", "-o", saved)
    assert (code, out) == (2, "") and not saved.exists() and err.count("\n") == 1
    assert "--with-prefix: visual tokens are left out before the language model; take --ilp selection, or leave" in err


def test_methods_inside_the_language_model(run, image):
    fastv = ("--method", "fastv", "--method-option", "layer=1")
    record = json.loads(run("ask", image, QUESTION, *fastv, "--keep", "0.25", "--json")[1])
    assert record["tokens"]["kept"] == 16 and record["inside"]["tokens"] == [16, 4, 4]
    record = json.loads(run("ask", image, QUESTION, "--method", "pyramiddrop", "--keep", "0.125", "--json")[1])
    assert record["inside"]["tokens"] == [16, 8, 2]
    for method, share, tokens in (
        (("dart", "--method-option", "layer=1", "--method-option", "text_pivots=0"), "0.25", [16, 4, 4]),
        (("adaptprune", "--method-option", "layer=1"), "0.25", [16, 4, 4]),
        (("sparsevlm",), "0.125", [16, 4, 2]),  # of the three stages the first two are at layer 1
        (("sparsevlm", "--method-option", "count=mean"), "0.5", [16, 5, 3]),  # a mean of 8
        (("vtw",), "0.6", [16, 16, 0]),
        (("vtw", "--method-option", "layer=1"), "0.6", [16, 0, 0]),
    ):
        record = json.loads(run("ask", image, QUESTION, "--method", *method, "--keep", share, "--json")[1])
        assert record["inside"]["tokens"] == tokens
    assert json.loads(run("ask", image, QUESTION, "--method", "vtw", "--keep", "1", "--json")[1])["inside"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ilp", "0"), "--ilp 0: must be above 0"),
        (("--ilp", "half"), "--ilp half: neither selection, nor region, nor a share"),
        (("--ilp", "nan"), "--ilp nan: must be above 0"),
        (("--ilp-layer", "1"), "--ilp-layer: only with --ilp"),
        (("--ilp", "0.1", "--ilp-layer", "3"), "--ilp-layer 3: in this model tokens can leave at the layers 1 to 2"),
        (("--ilp", "region", "--region", "none"), "--ilp region: there is no region"),
        (("--ilp", "region", "--method", "fastervlm"), "--ilp region: there is no region"),
        (("--ilp", "0.1", "--method", "fastv"), "--ilp: not with --method fastv"),
        (("--ilp", "selection", "--plc", "pool"), "--ilp selection: not with --plc, since all tokens enter"),
        (("--ilp", "selection", "--method", "visionzip"), "--ilp selection: not with --method visionzip, which merges"),
        (("--plc", "pool", "--method", "fastv", "--method-option", "layer=1"), "--plc: not with --method fastv"),
        (("--method", "fastv", "--method-option", "layer=0"), "--method fastv: layer must be at least 1"),
        (("--method", "fastv", "--method-option", "layer=5"), "--method-option layer=5: in this model"),
        (("--method", "vtw", "--method-option", "layer=3"), "--method-option layer=3: in this model"),
        (
            ("--method", "sparsevlm", "--method-option", "count=all"),
            "--method sparsevlm: count must be one of last, mean",
        ),
        (("--method-option", "layer=1"), "--method gridprune: method gridprune has no option 'layer'"),
    ],
)
def test_settings_inside_that_make_no_sense(run, image, options, says):
    code, out, err = run("ask", image, QUESTION, *options)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_generate_needs_neither_image_nor_cache_nor_tower(run, image, tmp_path, tiny_llava, monkeypatch):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(tiny_llava, tmp_path / "model")
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(model))
    saved = tmp_path / "p.safetensors"
    answer = run("ask", image, QUESTION, "--save", saved)[1]
    image.unlink()
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(model / "clip")
    weights = load_file(model / "model.safetensors")
    rest = {k: v for k, v in weights.items() if "vision_tower" not in k and "projector" not in k}
    save_file(rest, model / "model.safetensors", {"format": "pt"})
    assert run("generate", saved)[:2] == (0, answer)
    assert not (tmp_path / "cache").exists()


def test_a_clip_that_can_neither_be_known_nor_fetched_ends_the_command(run, image, tmp_path, tiny_llava, monkeypatch):
    from huggingface_hub import constants

    from gridprune_cli.vlm import checkpoint

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    tower = {"model_type": "clip_vision_model", "hidden_size": 32}
    monkeypatch.setattr(checkpoint, "_KNOWN_TOWERS", {"known/clip": tower})
    bare = shutil.copytree(tiny_llava, tmp_path / "bare", ignore=shutil.ignore_patterns("clip"))
    for command in (
        ("ask", image, QUESTION),
        ("show", image, QUESTION),
        ("prune", image, QUESTION, "-o", tmp_path / "p"),
    ):
        code, out, err = run(*command, "--model", bare, "-q")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "known/clip" in err and "name a copy as --clip FOLDER, or take --relevance attention" in err
    assert not (tmp_path / "cache").exists()  # before the image was encoded
    code, out, err = run("ask", image, QUESTION, "--model", bare, "--relevance", "words", "--json")
    assert code == 0 and json.loads(out)["relevance"] == {"source": "words", "model": None}


def test_a_sign_that_is_turned_round_is_said_once(run, image, tmp_path):
    lines = "".join(
        json.dumps({"image": str(image), "question": f"{QUESTION} {n}", "id": str(n)}) + "\n" for n in range(3)
    )
    (tmp_path / "q.jsonl").write_text(lines)
    for command in (("ask", image, QUESTION), ("batch", tmp_path / "q.jsonl"), ("show", image, QUESTION)):
        assert run(*command, "--method", "trim")[2].count("trim turns CLIP's relevance round, as published") == 1
    (tmp_path / "e.jsonl").write_text(lines.replace("}", ', "answers": ["x"]}'))
    call = ("eval", tmp_path / "e.jsonl", "-o", tmp_path / "run", "--methods", "trim, uniform", "--keep", "0.5,0.2")
    err = run(*call)[2]
    assert err.count("trim turns CLIP's relevance round, as published") == 1


def test_several_pruned_sets(run, image, tmp_path):
    paths = []
    for i, question in enumerate((QUESTION, "Where is the star?")):
        paths.append(tmp_path / f"{i}.safetensors")
        run("prune", image, question, "-o", paths[-1])
    lines = run("generate", *paths, "--json")[1].splitlines()
    assert [json.loads(line)["question"] for line in lines] == [QUESTION, "Where is the star?"]


def test_encode_counts_and_goes_on(run, image, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for seed in (1, 2):
        draw(make_scene(seed))[0].save(folder / f"{seed}.png")
    (folder / "broken.png").write_bytes(b"x")
    run("ask", image, QUESTION)
    code, out, err = run("encode", image, folder, "--json")
    records = {record["image"]: record for record in map(json.loads, out.splitlines())}
    assert code == 3 and len(records) == 4
    assert records[str(image)]["cache"] == "hit" and records[str(folder / "1.png")]["cache"] == "miss"
    assert "not an image" in records[str(folder / "broken.png")]["error"]
    assert "3 images, 1 of them cached already" in err and "1 of 4 could not be encoded" in err
    (folder / "broken.png").unlink()
    code, out, err = run("encode", "-", stdin=f"{image}\n{folder / '2.png'}\n".encode())
    assert (code, out) == (0, "") and "2 images, 2 of them cached already" in err


def test_an_image_whose_place_in_the_cache_is_taken_is_a_failure_of_encode(run, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for seed in (1, 2):
        draw(make_scene(seed))[0].save(folder / f"{seed}.png")
    (folder / "again.png").write_bytes((folder / "1.png").read_bytes())
    listed = map(json.loads, run("encode", folder, "--json")[1].splitlines())
    key = next(record["key"] for record in listed if record["image"] == str(folder / "1.png"))
    (entry,) = (path for path in open_store().root.rglob("*") if key in path.name)
    entry.unlink()
    entry.mkdir()
    (entry / "thesis.tex").write_text("x")
    code, out, err = run("encode", folder, "--json")
    records = {record["image"]: record for record in map(json.loads, out.splitlines())}
    assert code == 3 and f"{entry}: not cached, since this is no file" in err and "2 of 3 could not be encoded" in err
    for name in ("1.png", "again.png"):
        assert records[str(folder / name)]["error"] == f"{folder / name}: encoded, but not cached"
    assert records[str(folder / "2.png")]["cache"] == "hit"
    assert run("ask", folder / "1.png", QUESTION)[0] == 0  # which needs no cache


def test_show_draws_a_png_and_a_coarse_picture(run, image, tmp_path):
    figure = tmp_path / "f.png"
    code, out, _ = run("show", image, QUESTION, "-o", figure)
    assert (code, out) == (0, "")
    with Image.open(figure) as drawn:
        assert drawn.format == "PNG" and drawn.width == 1200
    code, out, _ = run("show", image, QUESTION)
    assert code == 0 and "#" in out and "\x1b" not in out
    second = tmp_path / "g.png"
    assert run("ask", image, QUESTION, "--show", second)[0] == 0 and second.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--keep", "0"], "--keep 0.0"),
        (["--keep", "1.5"], "--keep 1.5"),
        (["--tokens", "99"], "--tokens 99"),
        (["--method", "magic"], "'magic' is not one of 'gridprune', "),
        (["--method", "fastervlm", "--method-option", "zone=2"], "method fastervlm has no option 'zone'"),
        (["--method", "fastervlm", "--region", "0,0,1,1"], "--region: only for --method gridprune"),
        (["--method", "fastervlm", "--literal"], "--literal: only for --method gridprune"),
        (["--method", "vispruner", "--method-option", "step=2.5"], "--method vispruner: step must be a whole number"),
        (["--method", "vispruner", "--method-option", "pace=2"], "method vispruner has no option 'pace'"),
        (["--method", "hired", "--method-option", "base_share"], "--method-option base_share: not NAME=VALUE"),
        (["--literal", "--region", "auto"], "not with --literal"),
        (["--method", "random", "--method-option", f"seed={2**63}"], "--method random: seed must be from -2^63 to"),
        (["--query", ""], "--query: is empty"),
        (["--method", "mmtok", "--query", " "], "--query: is empty"),
        (["--region", "7,0,1,1"], "--region"),
        (["--save", "no/folder/p.safetensors"], "--save no/folder/p.safetensors"),
        (["--show", "."], "--show ."),
        (["--limit", "2"], "--limit"),
        (["--tokens", "many"], "--tokens"),
        (["--method-option", "alpha=2"], "--method gridprune: alpha must be from 0 to 1"),
        (["--positions", "x"], "'x' is not one of 'original', 'compact'"),
        (["--model", "nowhere"], "--model nowhere"),
        (["--device", "abacus"], "--device abacus"),
        (["--cache-limit", "lots"], "--cache-limit"),
    ],
)
def test_bad_settings_are_told_in_one_line(run, image, arguments, message):
    code, out, err = run("ask", image, QUESTION, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gridprune: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("data", [None, b"", b"text", b"\x89PNG\r\n\x1a\n"])
def test_bad_images_are_named_and_nothing_is_cached(run, tmp_path, data):
    path = tmp_path / "bad.png"
    if data is not None:
        path.write_bytes(data)
    code, out, err = run("ask", path, QUESTION)
    assert (code, out) == (2, "") and str(path) in err and err.count("\n") == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_debug_shows_where_it_came_from(run, tmp_path, monkeypatch):
    from gridprune_cli.errors import BadInput

    monkeypatch.setenv("GRIDPRUNE_DEBUG", "1")
    with pytest.raises(BadInput, match=r"gone\.png"):
        run("ask", tmp_path / "gone.png", QUESTION)


def test_literal_is_the_published_form(run, image):
    record = json.loads(run("ask", image, QUESTION, "--json", "--literal")[1])
    assert record["region"] is None
    assert record["options"]["temperature"] == 1.0 and record["options"]["saliency_scale"] == "none"


def test_no_cache_leaves_nothing(run, image, tmp_path):
    assert run("ask", image, QUESTION, "--no-cache")[0] == 0
    assert not (tmp_path / "cache").exists()
    code, _, err = run("encode", image, "--no-cache")
    assert code == 2 and "--no-cache" in err


def test_an_unwritable_cache_is_a_warning(run, image, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    monkeypatch.setenv("GRIDPRUNE_CACHE_DIR", str(blocked / "below"))
    code, out, err = run("ask", image, QUESTION)
    assert code == 0 and out.strip() and "can't be written" in err


def test_models_and_env(run, tmp_path):
    assert "scenes" in run("models")[1]
    listed = [json.loads(line)["family"] for line in run("models", "--json")[1].splitlines()]
    assert listed == ["scenes", *FAMILIES]
    settings = json.loads(run("env", "--json")[1])
    assert settings["model"]["from"] == "GRIDPRUNE_MODEL" and settings["keep"]["from"] == "default"
    assert settings["cache-dir"]["value"] == str(tmp_path / "cache")
    assert settings["device"]["value"] and settings["dtype"]["from"]
    assert settings["relevance"] == {"value": "auto", "from": "default"}
    assert settings["server"] == settings["api-key"] == {"value": "none", "from": "default"}


def test_env_says_which_server_is_sent_the_pictures_and_never_its_key(run, monkeypatch, tmp_path):
    folder = tmp_path / "runtime/gridprune"
    monkeypatch.chdir(tmp_path)
    folder.mkdir(mode=0o700, parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("runtime/gridprune/server.sock")  # as a whole path it may be too long
        monkeypatch.setenv("GRIDPRUNE_API_KEY", "secret")
        settings = json.loads(run("env", "--json")[1])
        assert settings["server"] == {"value": f"unix:{folder}/server.sock", "from": "its socket"}
        assert settings["api-key"] == {"value": "set", "from": "GRIDPRUNE_API_KEY"}
        monkeypatch.setenv("GRIDPRUNE_SERVER", "http://elsewhere")
        settings = json.loads(run("env", "--json")[1])
        assert settings["server"] == {"value": "http://elsewhere", "from": "GRIDPRUNE_SERVER"}


LIGHT = """
import sys
from gridprune_cli.cli.app import main

for line in sys.argv[1:]:
    sys.argv = ["gridprune", *line.split()]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (line, stop.code)
    imported = {"torch", "transformers", "numpy", "PIL"} & set(sys.modules)
    assert not imported, (line, imported)
"""


def test_light_commands_import_no_torch():
    commands = ("--help", "--version", "ask --help", "models", "models default", "cache ls", "cache info")
    done = subprocess.run([sys.executable, "-c", LIGHT, *commands], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_module_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gridprune_cli", "models"], check=True, capture_output=True, text=True)
    assert "scenes" in done.stdout


def test_a_missing_argument_is_told_in_one_line(run, image):
    code, out, err = run("ask", image)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "Missing argument" in err and "gridprune ask --help" in err


@pytest.mark.parametrize("arguments", [[], ["cache"]])
def test_nothing_to_do_is_help(run, arguments):
    code, out, err = run(*arguments)
    assert code == 2 and "Usage" in out and err == ""


def test_what_nobody_foresaw_is_one_line_too(run, image, monkeypatch):
    from gridprune_cli.pipeline import Pipeline

    def fail(*_, **__):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(Pipeline, "ask", fail)
    code, out, err = run("ask", image, QUESTION)
    assert (code, out) == (1, "")
    assert err == "gridprune: unexpected RuntimeError: first; GRIDPRUNE_DEBUG=1 shows where\n"


def test_interrupted_is_130(run, image, monkeypatch):
    from gridprune_cli.pipeline import Pipeline

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "ask", stop)
    assert run("ask", image, QUESTION)[:2] == (130, "")


def test_a_reader_that_leaves_is_no_error():
    script = f"{sys.executable} -m gridprune_cli ask --help | head -1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_json_reaches_a_file_while_a_terminal_shows_the_bar(image, tmp_path, tiny_llava, server):
    """stderr is a terminal and stdout is not: the progress bar must not take what is printed."""
    import os
    import pty

    ours, theirs = pty.openpty()
    out = tmp_path / "out.jsonl"
    with out.open("wb") as file:
        streams = (None, file.fileno(), theirs)
        process = server.start("encode", image, "--json", "--model", tiny_llava, streams=streams)
        os.close(theirs)
        shown = b""
        try:
            while data := os.read(ours, 4096):
                shown += data
        except OSError:  # the other end is closed
            pass
        assert process.wait() == 0
    os.close(ours)
    assert json.loads(out.read_text())["image"] == str(image) and b"1 images" in shown


def test_questions_come_from_stdin_too(run, image):
    assert run("ask", image, "-", stdin=QUESTION.encode())[:2] == run("ask", image, QUESTION)[:2]
    code, _, err = run("ask", "-", "-", stdin=b"x")
    assert code == 2 and "only one of images and question" in err


def test_generate_reads_a_pruned_set_from_stdin(run, image, tmp_path):
    saved = tmp_path / "p.safetensors"
    run("prune", image, QUESTION, "-o", saved)
    assert run("generate", "-", stdin=saved.read_bytes()) == run("generate", saved)


def test_a_set_of_another_model_is_refused(run, image, tmp_path):
    from tiny_families.llava import write

    saved = tmp_path / "p.safetensors"
    run("prune", image, QUESTION, "-o", saved)
    other = write(tmp_path / "other", seed=5)
    code, out, err = run("generate", saved, "--model", other)
    assert (code, out) == (2, "") and "made for another model" in err


def test_notes_are_told_on_a_hit_too(run, tmp_path):
    animated = tmp_path / "a.gif"
    frames = [Image.new("RGB", (60, 60), colour) for colour in ("red", "blue")]
    frames[0].save(animated, save_all=True, append_images=frames[1:])
    for _ in range(2):
        assert "the first frame is taken" in run("ask", animated, QUESTION)[2]
    assert "the first frame is taken" in run("encode", animated)[2]


def test_encode_into_a_cache_that_cannot_be_written_fails(run, image, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    code, _, err = run("encode", image, "--cache-dir", blocked / "below")
    assert code == 1 and "can't be written" in err


def test_what_stands_in_an_entry_s_place_changes_no_answer(run, image, tmp_path):
    answer = run("ask", image, QUESTION)[1]
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    entry.unlink()
    os.mkfifo(entry)
    code, out, err = run("ask", image, QUESTION)
    assert (code, out) == (0, answer) and "image encoded" in err and entry.is_file()
    entry.unlink()
    entry.mkdir()
    (entry / "thesis.tex").touch()
    for command, exit_code in ((("ask", image, QUESTION), 0), (("encode", image), 3)):
        code, out, err = run(*command)
        assert code == exit_code and out in ("", answer)
        assert "warning: " in err and str(entry) in err and "unexpected" not in err
    assert (entry / "thesis.tex").exists()


LONG = "a" * 300  # a name may have 255 bytes


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "IMAGE", QUESTION, "--model", LONG),
        ("ask", "IMAGE", QUESTION, "--model", f"owner/{LONG}"),
        ("ask", "IMAGE", QUESTION, "--model", "~nobody/model"),
        ("ask", "IMAGE", QUESTION, "--clip", LONG),
        ("ask", "IMAGE", QUESTION, "--save", LONG),
        ("ask", "IMAGE", QUESTION, "--save", f"{LONG}/x"),
        ("ask", "IMAGE", QUESTION, "--show", LONG),
        ("ask", "IMAGE", QUESTION, "--localizer", LONG),
        ("ask", LONG, QUESTION),
        ("prune", "IMAGE", QUESTION, "-o", LONG),
        ("prune", "--batch", "LINES", "-o", LONG),
        ("batch", "LINES", "-o", LONG),
        ("batch", "LINES", "--resume", LONG),
        ("batch", LONG),
        ("eval", "--data", LONG, "-o", "results"),
        ("eval", "--data", "LINES", "-o", "results"),
        ("eval", "--data", "scenes:1", "-o", LONG),
        ("generate", LONG),
        ("generate", "SAVED", "--model", LONG),
        ("export", LONG, "--to", "vllm", "-o", "."),
        ("export", "SAVED", "--to", "vllm", "-o", LONG),
    ],
    ids=lambda arguments: " ".join(argument[:10] for argument in arguments),
)
def test_a_name_too_long_is_bad_input(run, image, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    lines, saved = tmp_path / "lines.jsonl", tmp_path / "saved.safetensors"
    lines.write_text(json.dumps({"id": 1, "image": LONG, "question": QUESTION, "answers": ["red"]}) + "\n")
    if "SAVED" in arguments:
        run("prune", image, QUESTION, "-o", saved)
    files = {"IMAGE": image, "LINES": lines, "SAVED": saved}
    code, out, err = run(*(files.get(argument, argument) for argument in arguments))
    assert (code, out) == (2, "") and "unexpected" not in err and err.count("\n") == 1, err


def test_an_image_of_a_name_too_long_is_left_out_alone(run, image):
    code, out, err = run("encode", LONG, image, "--json")
    assert code == 3 and "unexpected" not in err
    assert [("error" in record, record["image"]) for record in map(json.loads, out.splitlines())] == [
        (True, LONG),
        (False, str(image)),
    ]
    code, out, err = run("encode", LONG, image, "--dry-run", "--json")
    assert code == 0 and json.loads(out)["unreadable"] == 1 and json.loads(out)["hits"] == 1
    assert run("encode", image, "--cache-dir", LONG)[0] == 1  # nothing can be written there
    assert run("cache", "ls", "--cache-dir", LONG)[0] == 0


MISFITS = {
    "a token that the model lacks": swap("input_ids", lambda ids: torch.where(ids == ids[0], 1 << 40, ids)),
    "an image token more": swap(
        "input_ids", lambda ids: ids[ids != ids[0]].new_full(ids.shape, int(ids.mode().values))
    ),
    "wider image_embeds": swap("image_embeds", lambda embeds: torch.cat([embeds, embeds], 1)),
    "positions in three axes": swap("position_ids", lambda places: places.expand(3, -1)),
    "a schedule for more layers": lambda header, _: header["schedule"]["tokens"].append(
        header["schedule"]["tokens"][-1]
    ),
    "out of range": swap("kept", lambda kept: kept + 1000),
}


def test_a_set_of_no_sense_ends_itself_alone(run, image, tmp_path):
    """Among several it is named and the others are answered; by itself it is bad input."""
    good, answer = tmp_path / "good.safetensors", None
    run("prune", image, QUESTION, "--keep", "0.5", "--ilp", "0.2", "--ilp-layer", "1", "-o", good)
    bad = []
    for what, fault in MISFITS.items():
        bad.append(tmp_path / f"{what}.safetensors")
        bad[-1].write_bytes(changed(good.read_bytes(), fault))
        code, out, err = run("generate", bad[-1], "--quiet")
        assert (code, out) == (2, "") and "unexpected" not in err and err.count("\n") == 1, what
    answer = run("generate", good)[1]
    code, out, err = run("generate", good, *bad, good, "--quiet")
    assert code == 3 and out == answer * 2
    assert all(f"{path}: " in err for path in bad) and err.count("\n") == len(bad) + 1 and "unexpected" not in err


@pytest.fixture
def other(tmp_path):
    path = tmp_path / "other.png"
    draw(make_scene(6))[0].save(path)
    return path


def test_several_images_in_one_question(run, image, other, tmp_path):
    saved = tmp_path / "p.safetensors"
    code, out, _ = run("ask", image, other, QUESTION, "--keep", "0.25", "--json", "--save", saved)
    record = json.loads(out)
    assert code == 0 and record["image"] == [str(image), str(other)] and record["cache"] == ["miss", "miss"]
    assert record["tokens"]["kept"] == 8 and len(record["zones"]) == len(record["region"]) == 2
    assert [sum(zones["budgets"]) for zones in record["zones"]] == [4, 4]
    assert json.loads(run("generate", saved, "--json")[1])["answer"] == record["answer"]
    shared = json.loads(run("ask", image, other, QUESTION, "--keep", "0.25", "--json", "--share-budget")[1])
    assert shared["cache"] == ["hit", "hit"] and shared["tokens"]["kept"] == 8
    assert sum(sum(zones["budgets"]) for zones in shared["zones"]) == 8
    assert run("ask", image, other, QUESTION, "--show", tmp_path / "f.png")[0] == 2
    code, _, err = run("ask", image, other, QUESTION, "--share-budget", "--ilp", "region", "--region", "0,0,3,3")
    assert code == 2 and "--ilp region: there is no region" in err and "without" in err and "--share-budget" in err


def test_query_and_prompt_options_do_what_they_say(run, image, tmp_path):
    from gridprune_cli.tokens import load_pruned

    def pruned(*arguments):
        run("prune", image, *arguments, "-o", tmp_path / "p.safetensors", "--keep", "0.25")
        return load_pruned(tmp_path / "p.safetensors")

    plain = pruned(QUESTION)
    asked = pruned("Where is the star?", "--query", QUESTION)
    assert asked.relevance.equal(plain.relevance) and asked.kept.equal(plain.kept)
    assert not pruned("Where is the star?").relevance.equal(plain.relevance)
    instructed = pruned(QUESTION, "--system", "red red red")
    assert len(instructed.input_ids) > len(plain.input_ids) and instructed.relevance.equal(plain.relevance)
    filled = pruned(QUESTION, "--prompt-template", "USER: {image} {question} ASSISTANT:")
    assert filled.input_ids.equal(plain.input_ids)
    code, _, err = run("ask", image, QUESTION, "--prompt-template", "no place for anything")
    assert code == 2 and "{question}" in err


def test_method_options_reach_the_method(run, image):
    options = ("--method-option", "step=3", "--method-option", "important_share=0.25")
    code, out, _ = run("ask", image, QUESTION, "--method", "vispruner", *options, "--json")
    assert code == 0 and json.loads(out)["options"] == {"important_share": 0.25, "step": 3}
    code, out, _ = run("ask", image, QUESTION, "--method", "holov", "--method-option", "crops=runs", "--json")
    assert code == 0 and json.loads(out)["options"] == {"crops": "runs"}
    code, out, _ = run("ask", image, QUESTION, "--method", "mmtok", "--method-option", "alpha=2", "--json")
    assert code == 0 and json.loads(out)["options"]["alpha"] == 2


def test_generation_options_reach_transformers(run, image):
    long = ("--max-new-tokens", 24)
    greedy = run("ask", image, QUESTION, *long)[1]
    assert run("ask", image, QUESTION, *long, "--generation", "num_beams=1")[1] == greedy
    assert run("ask", image, QUESTION, *long, "--generation", "repetition_penalty=50.0")[1] != greedy
    assert run("ask", image, QUESTION, *long, "--generation", "use_cache=true")[1] == greedy


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("warmth=2",), "--generation warmth=2: no option that"),
        (("to_dict=1",), "--generation to_dict=1: no option that"),
        (("max_new_tokens=2",), "--generation max_new_tokens: has an option of its own, --max-new-tokens"),
        (("use_cache=false",), "--generation use_cache=False: without the cache"),
        (("return_dict_in_generate=true",), "--generation return_dict_in_generate=True: a question has one answer"),
        (("do_sample=true", "temperature=-1"), "--generation do_sample, temperature: transformers can't use it"),
        (("do_sample=true", "top_p=much"), "--generation do_sample, top_p: transformers can't use it"),
        (("num_beams=2", "num_return_sequences=2"), "--generation num_return_sequences=2: a question has one answer"),
    ],
)
def test_generation_options_that_cannot_be_followed(run, image, options, reason):
    named = [argument for option in options for argument in ("--generation", option)]
    code, out, err = run("ask", image, QUESTION, *named)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_beams_are_not_streamed_unless_asked(run, image, monkeypatch):
    beams = ("--generation", "num_beams=2")
    answer = run("ask", image, QUESTION, *beams, "--no-stream")[1]
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
    assert run("ask", image, QUESTION, *beams)[:2] == (0, answer)
    code, out, err = run("ask", image, QUESTION, *beams, "--stream")
    assert (code, out) == (2, "") and "--generation num_beams: transformers can't use it" in err


def test_a_streamed_answer_is_the_answer(run, image):
    code, out, _ = run("ask", image, QUESTION, "--stream")
    assert code == 0 and out.split() == run("ask", image, QUESTION, "--no-stream")[1].split()


def test_bench_prints_a_table(run, image):
    code, out, err = run("bench", image, QUESTION, "--keep", "0.25", "--repeat", "1", "--new-tokens", "2")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert "float32" in lines[0] and str(image) in lines[0]
    cells = {line.split("  ")[0]: line.split() for line in lines[2:-3]}
    assert cells["visual tokens"][2:] == ["16", "4", "4.00"]
    assert {"load", "encode", "select", "prefill", "decode, a token", "keys and values"} <= set(cells)
    assert re.search(r"The prefill is [\d.]+ times faster with [\d.]+ times fewer operations", lines[-3])
    assert re.search(r"At [\d.]+ GFLOP/s and [\d.]+ GB/s, as measured here, .* limit it to [\d.]+", lines[-2])


def test_bench_sets_a_selection_inside_against_pruning_before(run, image):
    options = ("--keep", "0.25", "--ilp", "selection", "--repeat", "1", "--new-tokens", "2")
    code, out, _ = run("bench", image, QUESTION, *options)
    assert code == 0 and "BEFORE THE MODEL  INSIDE FROM SCRATCH  PRUNED" in re.sub("  +", "  ", out)
    assert re.search(r"Inside, from the cached prefix, the prefill takes [\d.]+ of the time and [\d.]+ of the ", out)


def test_bench_json_names_what_was_measured(run, image):
    code, out, _ = run("bench", image, QUESTION, "--json", "--repeat", "2", "--new-tokens", "3", "--tokens", "2")
    record = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    assert (record["image"], record["question"], record["method"]) == (str(image), QUESTION, "gridprune")
    assert (record["dtype"], record["repeat"], record["new_tokens"]) == ("float32", 2, 3)
    assert (record["full"]["tokens"], record["pruned"]["tokens"]) == (16, 2)


def test_bench_measures_shapes_and_needs_no_picture(run, monkeypatch):
    from test_shapes import shrunk

    from gridprune_cli.vlm import shapes

    monkeypatch.setitem(shapes.SHAPES, "llava-1.5-7b", shrunk("llava-1.5-7b"))
    shape = ("bench", "--shape", "llava-1.5-7b", "--layers", "1", "--repeat", "1", "--new-tokens", "2")
    code, out, _ = run(*shape)
    assert code == 0 and "random weights, 1 of 3 layers" in out and "a scene of 672 x 672 pixels" in out
    assert re.search(r"visual tokens +576 +63 ", out) and "\nload" not in out
    monkeypatch.setenv("GRIDPRUNE_RELEVANCE", "words")
    assert json.loads(run(*shape, "--json")[1])["relevance"] == {"source": "words", "model": None}


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--layers", "2"), "--layers: only with --shape"),
        (("--shape", "llava"), "'llava' is not one of"),
        (("--shape", "llava-1.5-7b", "--device", "map"), "--device map: not with --shape"),
        (("--shape", "qwen2.5-vl-7b", "--layers", "29"), "--layers 29"),
        (("--new-tokens", "1"), "--new-tokens"),
        (("--repeat", "0"), "--repeat"),
        (("no-such-file.png",), "no-such-file.png"),
        (("--keep", "0"), "--keep"),
    ],
)
def test_bench_refuses(run, arguments, reason):
    code, out, err = run("bench", *arguments)
    assert (code, out) == (2, "") and reason in err and err.count("\n") == 1


def test_files_are_held_together_up_to_a_number_of_bytes(tmp_path, monkeypatch):
    from gridprune_cli.cli import generate

    paths = [tmp_path / str(number) for number in range(5)]
    for path, size in zip(paths, (40, 60, 1, 500, 0), strict=True):
        path.write_bytes(bytes(size))
    monkeypatch.setattr(generate, "MAX_BYTES", 100)
    gone = tmp_path / "gone"
    assert list(generate._windows([*paths, gone])) == [paths[:2], paths[2:3], paths[3:4], [paths[4], gone]]
    monkeypatch.setattr(generate, "WINDOW", 1)
    assert list(generate._windows(paths[:2])) == [paths[:1], paths[1:2]]


def test_a_second_interrupt_ends_the_process_without_a_word():
    """Also where an exception can't be raised, as in a weak reference's callback: Python prints a traceback there."""
    code = (
        "import time, weakref; from gridprune_cli.cli import app as module\n"
        "class Held: pass\n"
        "def work(**_):\n"
        "    held = Held()\n"
        "    ref = weakref.ref(held, lambda _: (print('ending', flush=True), time.sleep(60)))\n"
        "    try:\n"
        "        print('working', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        del held\n"
        "module.app = work; module.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for state in ("working", "ending"):
        assert process.stdout.readline() == f"{state}\n"
        process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130 and process.stderr.read() == ""
    process.stdout.close()
    process.stderr.close()


NOISY = """
import os, subprocess
from gridprune_cli.cli.app import main
from gridprune_cli.pipeline import Pipeline

ask = Pipeline.ask

def noisy(*args, **options):
    print("a library")
    os.write(1, b"its C code\\n")
    subprocess.run(["echo", "its child"], check=True)
    return ask(*args, **options)

Pipeline.ask = noisy
main()
"""


def test_what_libraries_print_stays_off_stdout(server, image, tmp_path):
    script, (out, err) = tmp_path / "noisy.py", (tmp_path / "out", tmp_path / "err")
    script.write_text(NOISY)
    with open(out, "wb") as stdout, open(err, "wb") as stderr:
        arguments = ("ask", image, QUESTION, "--model", "scenes", "--json", "-q")
        process = server.start(*arguments, script=script, streams=(None, stdout.fileno(), stderr.fileno()))
    assert process.wait(200) == 0 and json.loads(out.read_text())["answer"]
    assert err.read_text().split("\n")[:3] == ["a library", "its C code", "its child"]


def test_data_goes_to_stdout_and_prints_to_stderr_in_one_process_too(run, image, monkeypatch):
    from gridprune_cli.pipeline import Pipeline

    ask = Pipeline.ask
    monkeypatch.setattr(Pipeline, "ask", lambda *args, **options: print("a library") or ask(*args, **options))
    for options in (("--no-stream",), ("--stream",), ("--json",)):
        code, out, err = run("ask", image, QUESTION, "-q", *options)
        assert (code, err) == (0, "a library\n") and "library" not in out and out.strip()
