"""Values of options that are too long, too large or no text: exit code 2 in one line."""

from pathlib import Path

import pytest

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
