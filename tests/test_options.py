"""Options: what help and completion say of them, and values that can't be, which end with one line."""

import re
from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from gridprune_cli import choices
from gridprune_cli.cli.app import app
from gridprune_cli.cli.options import REGIONS
from gridprune_cli.errors import BadInput
from gridprune_cli.opening import open_pipeline

PICTURE = Path(__file__).parent.parent / "sample_images" / "scene-1.png"
LONG = "9" * 5000
ASK = ("ask", PICTURE, "What?")


@pytest.mark.parametrize(
    "arguments",
    [
        (*ASK, "--query", "\udcff"),
        (*ASK, "--system", "a\udcff"),
        (*ASK, "--prompt-template", "{image}{question}\udcff"),
        (*ASK, "--generation", "num_beams=2147483648"),
        (*ASK, "--generation", f"num_beams={LONG}"),
        (*ASK, "--generation", "num_beams=" + "[" * 5000),
        (*ASK, "--cache-limit", LONG),
        (*ASK, "--tokens", LONG),
        ("cache", "gc", "--older-than", "9" * 400 + "d"),
        ("cache", "gc", "--older-than", LONG + "d"),
        ("cache", "gc", "--max-size", LONG),
        ("encode", PICTURE, "--shard", f"0/{LONG}"),
        ("eval", f"scenes:{LONG}", "-o", "run"),
        ("eval", "scenes:999999999", "-o", "run"),
        (*ASK[:2], "word " * 14_000),
    ],
)
def test_options_that_cannot_be_are_bad_input(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and "unexpected" not in err, err


def test_a_prompt_that_the_model_has_no_positions_for_is_told_with_both_numbers(command, tmp_path):
    code, out, err = command("ask", PICTURE, "star " * 6000)
    assert (code, out) == (2, "") and "takes 6000 positions, and scenes has 1024; ask shorter" in err
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").rglob("*.safetensors"))
    code, out, err = command("ask", *[PICTURE] * 5, "What is it?")
    assert (code, out) == (2, "") and "and scenes has 1024; ask shorter, of fewer images, or take --positions" in err
    assert command("ask", *[PICTURE] * 5, "What is it?", "--positions", "compact")[0] == 0
    lines = tmp_path / "q.jsonl"
    lines.write_text(
        "".join(
            f'{{"id": {i}, "image": "{PICTURE}", "question": "{q}"}}\n' for i, q in enumerate(["What?", "a " * 2000])
        )
    )
    code, out, err = command("batch", lines)
    assert code == 3 and '"answer"' in out.splitlines()[0] and "scenes has 1024" in out.splitlines()[1]


# ---- help and completion ---------------------------------------------------------------------------------------------


def help_of(command, *names, width=80):
    import typer.rich_utils as look

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "MAX_WIDTH", width)
        code, out, err = command(*names, "--help")
    assert (code, err) == (0, "")
    return out


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_help_of_ask_is_twenty_options_in_sixty_lines(command, width):
    lines = help_of(command, "ask", width=width).splitlines()
    assert len(lines) <= 60
    panels = [line.strip("╭╮─ ") for line in lines if line.startswith("╭")]
    assert panels == ["Arguments", *["Model and cache", "Pruning", "Prompt and answer", "Output"], REGIONS]
    assert sum(line.startswith(("│ --", "│ *  --")) for line in lines) == 20


def test_what_the_help_of_ask_leaves_out_is_taken_and_told_by_batch(command):
    (ask, batch) = (get_command(app).commands[name] for name in ("ask", "batch"))
    hidden = {option.opts[0] for option in ask.params if getattr(option, "hidden", False)} - {"--stream"}
    listed = set(re.findall(r"--[a-z-]+", help_of(command, "batch")))
    assert hidden and hidden <= listed and not hidden & set(re.findall(r"--[a-z-]+", help_of(command, "ask")))
    assert not [option.opts for option in batch.params if getattr(option, "hidden", False)]


def test_examples_are_lines_to_copy(command):
    for name in ("ask", "batch", "encode", "prune", "generate", "export", "show", "bench", "eval"):
        lines = help_of(command, name).split(" Examples:\n\n")[1].rstrip().splitlines()
        assert all(line.startswith("   ") and "gridprune " in line for line in lines), name


def test_choices_are_those_of_the_code():
    from gridprune_cli.cache.quantize import STORAGES
    from gridprune_cli.evaluation.metrics import METRICS
    from gridprune_cli.pruning.methods import METHODS
    from gridprune_cli.vlm.placement import DTYPES
    from gridprune_cli.vlm.shapes import SHAPES

    assert set(choices.list_methods()) == set(METHODS) and choices.list_methods()[0] == choices.DEFAULT_METHOD
    assert get_args(choices.Dtype) == ("auto", *DTYPES)
    assert get_args(choices.CacheDtype) == tuple(STORAGES)
    with pytest.raises(BadInput, match=f"not one of {', '.join(get_args(choices.Relevance))}$"):
        open_pipeline({"relevance": "neither"})
    assert get_args(choices.Metric) == tuple(METRICS)
    assert get_args(choices.Shape) == tuple(SHAPES)


@pytest.mark.parametrize(
    ("option", "choice"),
    [
        ("--method", "topk-relevance"),
        ("--dtype", "bfloat16"),
        ("--plc", "trained"),
        ("--positions", "compact"),
        ("--cache-dtype", "int8"),
        ("--relevance", "words"),
        ("--region", "none"),
        ("--ilp", "region"),
        ("--localizer", "vlm"),
        ("--device", "cuda"),
    ],
)
def test_completion_knows_the_choices(option, choice):
    ask = get_command(app).commands["ask"]
    (parameter,) = [one for one in ask.params if option in one.opts]
    context = ask.make_context("ask", ["a.png", "What?"], resilient_parsing=True)
    assert choice in [item.value for item in parameter.shell_complete(context, choice[:1])]
    assert parameter.shell_complete(context, "zz") == []


@pytest.mark.parametrize(
    "arguments",
    [
        (*ASK, "--method", "magic"),
        (*ASK, "--dtype", "float8"),
        (*ASK, "--cache-dtype", "float4"),
        (*ASK, "--relevance", "neither"),
        ("batch", "-", "--engine", "spark"),
        ("eval", "scenes", "-o", "run", "--metric", "bleu"),
        ("export", "a.safetensors", "-o", ".", "--to", "tgi"),
        ("bench", "--shape", "gpt-2"),
        (*ASK, "--zone", "2"),
        (*ASK, "--revision", "main"),
    ],
)
def test_unknown_choices_and_options_are_one_line(command, arguments):
    code, out, err = command(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert arguments[-2] in err and f"see `gridprune {arguments[0]} --help`" in err and "Value error" not in err
