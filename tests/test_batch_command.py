"""`batch`, `prune --batch`, `generate` of several files and `--shard`, as a user calls them."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gridprune_cli.cli.batch import work
from gridprune_cli.errors import GridpruneError
from gridprune_cli.questions import Reader
from gridprune_cli.settings import Pruning

QUESTIONS = ("What colour is the star?", "Where is it?", "How many circles are there?")


@pytest.fixture
def folder(tmp_path, noise):
    """Five pictures and questions.jsonl: questions in a muddle, with and without ids and keeps."""
    lines = []
    for seed in range(5):
        noise((50 + 10 * seed, 60), seed).image.save(tmp_path / f"{seed}.png")
    for number, question in enumerate(QUESTIONS):
        for seed in range(5):
            line = {"image": f"{seed}.png", "question": question}
            if seed % 2:
                line |= {"id": f"{number}/{seed}", "answers": ["red"], "n": seed}
            if seed == 3:
                line |= {"keep": 0.5}
            lines.append(line)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def test_answers_come_in_order_and_are_those_of_ask(run, folder):
    code, out, err = run("batch", folder / "questions.jsonl", "--keep", "0.25", "--batch-size", "4")
    results, questions = records(out), records((folder / "questions.jsonl").read_text())
    assert code == 0 and len(results) == 15 and "15 questions, 10 of images encoded already" in err
    for line, asked in zip(results, questions, strict=True):
        assert (line["image"], line["question"]) == (asked["image"], asked["question"])
        assert line["id"] == asked.get("id", line["id"]) and line["id"]
        assert line.get("extra") == ({"answers": ["red"], "n": asked["n"]} if "id" in asked else None)
        assert line["tokens"]["kept"] == (8 if "keep" in asked else 4)
    for line, asked in list(zip(results, questions, strict=True))[2:10]:
        share = str(asked.get("keep", 0.25))
        single = json.loads(run("ask", folder / asked["image"], asked["question"], "--keep", share, "--json")[1])
        for name in set(single) - {"image", "cache", "ms"}:
            assert line[name] == single[name], name


def test_lines_say_nothing_of_when_they_were_made(run, folder):
    first = run("batch", folder / "questions.jsonl", "--batch-size", "2")
    assert run("batch", folder / "questions.jsonl", "--batch-size", "7")[1] == first[1]
    assert run("batch", folder / "questions.jsonl", "--no-cache")[1] == first[1]


def test_paths_start_at_the_file_or_where_one_is(run, folder, monkeypatch):
    expected = run("batch", folder / "questions.jsonl")[1]
    text = (folder / "questions.jsonl").read_bytes()
    monkeypatch.chdir(folder)
    assert run("batch", "-", stdin=text)[:2] == (0, expected)
    monkeypatch.chdir(folder.parent)
    assert run("batch", "-", stdin=text)[0] == 3


def test_a_list_of_images_is_one_question(run, folder):
    (folder / "q.jsonl").write_text(json.dumps({"image": ["0.png", "1.png"], "question": QUESTIONS[0]}) + "\n")
    (line,) = records(run("batch", folder / "q.jsonl", "--keep", "0.25")[1])
    single = json.loads(run("ask", folder / "0.png", folder / "1.png", QUESTIONS[0], "--keep", "0.25", "--json")[1])
    assert line["image"] == ["0.png", "1.png"] and line["answer"] == single["answer"]
    assert line["tokens"] == single["tokens"] and line["key"] == single["key"]


@pytest.fixture
def faulty(folder):
    lines = (folder / "questions.jsonl").read_text().splitlines()
    (folder / "bad.png").write_bytes(b"no image")
    bad = [
        "no line",
        json.dumps({"id": "b", "image": "bad.png", "question": QUESTIONS[0], "n": 1}),
        json.dumps({"image": "gone.png", "question": QUESTIONS[0]}),
        json.dumps({"image": "0.png", "question": " "}),
        json.dumps({"image": "0.png", "question": "What?", "keep": 7}),
    ]
    mixed = [lines[0], "", bad[0], bad[1], *lines[1:6], *bad[2:], *lines[6:]]
    (folder / "faulty.jsonl").write_text("\n".join(mixed))  # no newline at the end
    return folder / "faulty.jsonl"


def test_what_fails_is_a_line_and_the_rest_goes_on(run, folder, faulty):
    code, out, err = run("batch", faulty)
    results = records(out)
    failed = [line for line in results if "error" in line]
    assert code == 3 and len(results) == 20 and len(failed) == 5
    assert [results.index(line) for line in failed] == [1, 2, 8, 9, 10]
    assert all(line["error_type"] == "BadInput" and line["id"] and "answer" not in line for line in failed)
    assert f"{faulty}:3: not JSON" in failed[0]["error"]  # the second line is blank
    assert failed[1] | {"error": ""} == {
        "id": "b",
        "image": "bad.png",
        "question": QUESTIONS[0],
        "extra": {"n": 1},
        "error": "",
        "error_type": "BadInput",
    }
    assert "bad.png" in failed[1]["error"] and "gone.png" in failed[2]["error"]
    assert err.count("warning: ") == 6 and "5 lines failed" in err
    for number in (3, 4, 10, 11, 12):  # whatever is wrong with it, a line is named
        assert err.count(f"warning: {faulty}:{number}: ") == 1
    good = [line for line in results if "answer" in line]
    assert good == records(run("batch", folder / "questions.jsonl")[1])


def test_errors_in_results_name_options_as_on_stderr(run, folder):
    code, out, err = run("batch", folder / "questions.jsonl", "--tokens", "99")
    errors = [line["error"] for line in records(out) if "error" in line]  # a line's own share goes before
    assert code == 3 and set(errors) == {"--tokens 99: the image has 16 visual tokens"}
    assert f"warning: {folder / 'questions.jsonl'}:1: {errors[0]}\n" in err


def test_fail_fast_ends_at_the_first_and_resume_goes_on_there(run, folder, faulty):
    out = folder / "out.jsonl"
    code, _, err = run("batch", faulty, "-o", out, "--fail-fast")
    assert code == 2 and err.splitlines()[-1].startswith("gridprune: ") and "faulty.jsonl:3: not JSON" in err
    assert len(records(out.read_text())) == 1
    (folder / "empty.jsonl").write_text(json.dumps({"image": "0.png", "question": " "}))
    assert "empty.jsonl:1: the question is empty" in run("batch", folder / "empty.jsonl", "--fail-fast")[2]
    expected = run("batch", faulty)[1]
    assert run("batch", faulty, "--resume", out)[0] == 3
    assert out.read_text() == expected


@pytest.mark.parametrize("cut", [0, 1, 2, 40, 0.5, -1, -200])
def test_resuming_gives_what_an_undisturbed_run_gives(run, folder, faulty, cut):
    whole, out = folder / "whole.jsonl", folder / "out.jsonl"
    assert run("batch", faulty, "-o", whole)[0] == 3
    data = whole.read_bytes()
    out.write_bytes(data[: int(cut * len(data)) if isinstance(cut, float) else cut])
    code, printed, _ = run("batch", faulty, "--resume", out)
    assert (code, printed) == (3, "")
    assert out.read_bytes() == data
    code, _, err = run("batch", faulty, "--resume", out)  # nothing is left, and the failures are not forgotten
    assert code == 3 and "0 questions, 20 done before" in err and out.read_bytes() == data


def test_failed_lines_can_be_done_again(run, folder, faulty):
    out = folder / "out.jsonl"
    run("batch", faulty, "-o", out)
    good = [line for line in out.read_text().splitlines() if '"error"' not in line]
    out.write_text("\n".join(good) + "\n")
    (folder / "bad.png").write_bytes((folder / "4.png").read_bytes())
    assert run("batch", faulty, "--resume", out)[0] == 3
    written = out.read_text().splitlines()
    assert written[:15] == good and len(written) == 20
    assert [json.loads(line)["id"] for line in written[15:] if '"answer"' in line] == ["b"]


def test_results_are_not_written_over(run, folder):
    out = folder / "out.jsonl"
    questions = folder / "questions.jsonl"
    assert run("batch", questions, "-o", out)[:2] == (0, "")
    for arguments, message in [
        (["-o", out], f"go on with it as --resume {out}"),
        (["-o", out, "--resume", folder / "b.jsonl"], "--output"),
        (["--resume", questions], "holds the questions"),
        (["-o", questions], "holds the questions"),
        (["-o", folder], "a folder"),
        (["-o", folder / "no" / "out.jsonl"], "make it first"),
        (["--resume", folder / "0.png"], "line 1 is no result"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--keep", "0"], "--keep"),
    ]:
        code, printed, err = run("batch", questions, *arguments)
        assert (code, printed) == (2, "") and message in err and err.count("\n") == 1
    assert run("batch", folder / "none.jsonl")[0] == 2
    assert run("batch", questions, "-o", "/dev/null")[0] == 0


def test_a_full_disk_is_told(run, folder):
    code, _, err = run("batch", folder / "questions.jsonl", "-o", "/dev/full")
    assert code == 1 and "/dev/full: can't be written" in err


def test_shards_share_the_work(run, folder):
    whole = run("batch", folder / "questions.jsonl")[1].splitlines()
    parts = [run("batch", folder / "questions.jsonl", "--shard", f"{i}/3")[1].splitlines() for i in range(3)]
    assert sorted(line for shard in parts for line in shard) == sorted(whole)
    images = [{json.loads(line)["image"] for line in shard} for shard in parts]
    assert sum(map(len, images)) == 5  # the questions about an image stay together
    encoded = [run("encode", folder, "--shard", f"{i}/3", "--json")[1] for i in range(3)]
    names = [record["image"] for text in encoded for record in records(text)]
    assert sorted(names) == sorted(str(folder / f"{seed}.png") for seed in range(5))


def test_encode_takes_a_list_from_find(run, folder):
    names = "".join(f"{folder / f'{seed}.png'}\n" for seed in range(5))
    code, out, err = run("encode", "-", "--batch-size", "2", stdin=names.encode())
    assert (code, out) == (0, "") and "5 images, 0 of them cached already" in err
    listed = records(run("encode", "-", "--json", stdin=names.encode())[1])
    assert [record["image"] for record in listed] == names.split()


def test_pruned_sets_in_bulk_answer_as_batch_does(run, folder, faulty):
    out = folder / "pruned"
    assert run("prune", "--batch", faulty, "-o", out)[0] == 2
    out.mkdir()
    code, printed, err = run("prune", "--batch", faulty, "-o", out, "--json")
    results = records(printed)
    assert code == 3 and len(results) == 20 and "5 lines failed" in err
    files = [Path(line["file"]) for line in results if "file" in line]
    assert len(set(files)) == 15 and out / "1%2F3.safetensors" in files
    assert all(line["bytes"] == Path(line["file"]).stat().st_size for line in results if "file" in line)
    code, printed, _ = run("generate", *files, "--json", "--batch-size", "4")
    answers = {record["file"]: record["answer"] for record in records(printed)}
    assert code == 0 and list(answers) == list(map(str, files))
    expected = [line["answer"] for line in records(run("batch", folder / "questions.jsonl")[1])]
    assert list(answers.values()) == expected
    assert run("generate", *files)[1].splitlines() == expected


def test_two_lines_of_one_id_do_not_share_a_file(run, folder):
    line = json.dumps({"id": 7, "image": "0.png", "question": QUESTIONS[0]}) + "\n"
    (folder / "q.jsonl").write_text(line + line)
    code, printed, err = run("prune", "--batch", folder / "q.jsonl", "-o", folder, "--json")
    assert code == 3 and "two lines have this id" in err
    assert ["file" in record for record in records(printed)] == [True, False]
    code, _, err = run("prune", "--batch", folder / "q.jsonl", "-o", folder, "--fail-fast")
    assert code == 2 and "q.jsonl:2: " in err and "two lines have this id" in err


def test_a_model_without_its_clip_is_refused_in_bulk_too_and_words_are_named_in_each_line(run, folder, tiny_llava):
    bare = shutil.copytree(tiny_llava, folder / "bare", ignore=shutil.ignore_patterns("clip"))
    for arguments in (["batch"], ["prune", "-o", folder, "--json", "--batch"]):
        code, out, err = run(*arguments, folder / "questions.jsonl", "--model", bare, "-q")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert "name it as --clip, or take --relevance attention" in err
        code, out, _ = run(*arguments, folder / "questions.jsonl", "--model", bare, "--relevance", "words")
        assert code == 0
        assert all(record["relevance"] == {"source": "words", "model": None} for record in records(out))


def test_ids_that_make_bad_names_of_files_fail_alone_and_none_is_hidden(run, folder):
    ids = ["./0.png", "x" * 300, "", "\ud800", ".x", "%2Ex", "y" * 243]
    lines = [{"id": ident, "image": "0.png", "question": QUESTIONS[0]} for ident in ids]
    (folder / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "out"
    out.mkdir()
    code, printed, err = run("prune", "--batch", folder / "q.jsonl", "-o", out, "--json")
    results = records(printed)
    assert code == 3 and ["file" in record for record in results] == [True, False, False, True, True, True, True]
    assert "q.jsonl:2: id takes 300 characters" in err and "q.jsonl:3: id takes 0" in err
    assert sorted(out.glob("[!.]*.safetensors")) == sorted(Path(line["file"]) for line in results if "file" in line)
    assert (out / "%2E%2F0.png.safetensors").exists() and (out / "%2Ex.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x.png", "What?", "--batch", "questions.jsonl", "-o", "."], "--batch"),
        (["x.png", "What?", "-o", "a.safetensors", "--shard", "0/2"], "--shard"),
        (["x.png", "What?", "-o", "a.safetensors", "--fail-fast"], "--fail-fast"),
        (["x.png", "-o", "a.safetensors"], "name an image and a question"),
        (["-o", "a.safetensors"], "name an image and a question"),
    ],
)
def test_prune_takes_one_question_or_a_file_of_them(run, folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    code, _, err = run("prune", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_generate_goes_on_after_a_file_that_is_none(run, folder):
    good, bad = folder / "good.safetensors", folder / "bad.safetensors"
    run("prune", folder / "0.png", QUESTIONS[0], "-o", good)
    bad.write_bytes(b"x")
    answer = run("generate", good)[1]
    code, out, err = run("generate", bad, good)
    assert (code, out) == (3, answer) and str(bad) in err and "1 of 2" in err
    assert ["error" in record for record in records(run("generate", bad, good, "--json")[1])] == [True, False]
    code, out, err = run("generate", bad)
    assert (code, out) == (2, "") and err.count("\n") == 1


def test_sets_of_several_models(run, folder, tmp_path):
    from tiny_families.llava import write

    other = write(tmp_path / "other", seed=5)
    paths = []
    for number, model in enumerate((None, other, None)):
        paths.append(folder / f"{number}.safetensors")
        run("prune", folder / "0.png", QUESTIONS[0], "-o", paths[-1], *(["--model", model] if model else []))
    expected = [run("generate", path)[1] for path in paths]
    assert run("generate", *paths)[1] == "".join(expected) and expected[0] != expected[1]
    code, out, err = run("generate", *paths, "--model", other)
    assert (code, out) == (3, expected[1]) and err.count("made for another model") == 2


def test_memory_that_runs_out_is_a_notice(run, folder, monkeypatch):
    import torch
    from transformers import LlavaForConditionalGeneration

    expected = run("batch", folder / "questions.jsonl")[1]
    generate = LlavaForConditionalGeneration.generate

    def small(self, **inputs):
        if len(inputs["input_ids"]) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(self, **inputs)

    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", small)
    code, out, err = run("batch", folder / "questions.jsonl", "--batch-size", "8")
    assert (code, out) == (0, expected) and "memory ran out with 8 questions at once; going on with 4" in err


def test_progress_is_told_now_and_then(run, folder, monkeypatch):
    from gridprune_cli.cli import output

    monkeypatch.setattr(output, "_EVERY", 0.0)
    err = run("batch", folder / "questions.jsonl")[2]
    progress = [line for line in err.splitlines() if line.startswith("answering: ")]
    assert len(progress) == 15
    pattern = r"answering: 7 of 15, [\d.]+ questions/s, [\d.]+ images/s, \d hits, \d+ s left"
    assert re.fullmatch(pattern, progress[6])
    err = run("encode", folder)[2]
    assert re.search(r"^encoding: 5 of 5, [\d.]+ images/s, 5 hits, 0 s left$", err, re.MULTILINE)
    assert "answering" not in run("batch", folder / "questions.jsonl", "-q")[2]


# ---- as processes ----------------------------------------------------------------------------------------------------


def test_an_interrupted_batch_leaves_whole_lines_and_says_how_to_go_on(folder, run, server):
    """The questions come slowly, so that there is a moment at which some are answered and others are not."""
    expected = run("batch", folder / "questions.jsonl")[1]
    out = folder / "out.jsonl"
    lines = (folder / "questions.jsonl").read_text().splitlines(keepends=True)
    theirs, ours = os.pipe()
    with (folder / "err").open("wb") as file:
        process = server.start("batch", "-", "-o", out, cwd=folder, streams=(theirs, 1, file.fileno()))
    os.write(ours, "".join(lines[:5]).encode())
    while process.poll() is None and (not out.exists() or out.read_text().count("\n") < 5):  # results do not wait
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    os.close(ours)
    os.close(theirs)
    err = (folder / "err").read_text()
    assert f"interrupted after 5 lines; to go on, give the same command with --resume {out}" in err
    assert out.read_text() == "".join(expected.splitlines(keepends=True)[:5])
    assert run("batch", folder / "questions.jsonl", "--resume", out)[0] == 0
    assert out.read_text() == expected


def test_a_reader_that_leaves_ends_batch_quietly(folder, run, server):
    command = f"{server.program} batch questions.jsonl -q --batch-size 1 | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 1


def test_the_first_line_that_fails_ends_the_work_on_the_others(tmp_path):
    """At once, and not when nobody holds the failure any more."""
    (tmp_path / "q.jsonl").write_text('{"image": "a.png", "question": "What?"}\n' * 2)
    ended = []

    def results(requests):
        try:
            yield from (GridpruneError("failed") for _ in requests)
        finally:
            ended.append(len(requests))

    with pytest.raises(GridpruneError, match="failed") as failure:
        list(work(Reader(str(tmp_path / "q.jsonl")), Pruning(), {}, results, 9, fail_fast=True))
    assert ended and failure
