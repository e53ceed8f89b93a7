"""`gridprune eval`: what may be asked, how answers are kept, what is made of them, and a run that stops and goes on."""

import importlib.util
import json
import math
import re
import shutil
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from gridprune_cli.cli.app import main
from gridprune_cli.cli.evaluate import read_cells
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput
from gridprune_cli.evaluation import report
from gridprune_cli.evaluation.data import Data, Item, open_data, read_jsonl, scenes
from gridprune_cli.evaluation.results import clustered_error, image_clusters, markdown, relevance_line, summarise
from gridprune_cli.evaluation.run import FULL, Cell, Plan, Row, answers, batches, encode, place, prune
from gridprune_cli.images import load_image
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.questions import Reader
from gridprune_cli.runners.local import Runner
from gridprune_cli.scenes.scene import HELDOUT, SIZE, draw, make_scene
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm import find
from gridprune_cli.vlm.relevance import Calibration

needs_report = pytest.mark.skipif(bool(report.lacking()), reason=report.lacking())


@pytest.fixture
def run(monkeypatch, capsys, tiny_llava):
    """Calls `gridprune` with the tiny model: (exit code, stdout, stderr)."""
    monkeypatch.setenv("GRIDPRUNE_MODEL", str(tiny_llava))
    monkeypatch.setenv("GRIDPRUNE_MAX_NEW_TOKENS", "3")

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["gridprune", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def questions(tmp_path):
    """A JSONL file of six questions about three pictures, not sorted by picture."""
    for n in range(3):
        draw(make_scene(n))[0].save(tmp_path / f"{n}.png")
    lines = [
        {"id": n, "image": f"{n % 3}.png", "question": f"Question {n}?", "answers": ["yes"], "category": "ab"[n % 2]}
        for n in range(6)
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_scenes_are_held_out_and_counted():
    data = open_data("scenes:6")
    assert [item.id for item in data.items] == [f"{HELDOUT + n // 4}-{n % 4}" for n in range(6)]
    assert len({item.category for item in data.items[:4]}) == 4
    first = load_image(data.find(data.items[0].image)).image
    assert np.array_equal(np.asarray(first), np.asarray(draw(make_scene(HELDOUT))[0]))
    boxes = [item.box for item in data.items if item.box]
    objects = [obj.box for seed in (HELDOUT, HELDOUT + 1) for obj in make_scene(seed).objects]
    assert boxes and all(tuple(round(v * SIZE) for v in box) in objects for box in boxes)


@pytest.mark.parametrize(
    "name",
    ["scenes:0", "scenes:", "scenes:x", "scenes:-3", "no-such-file.jsonl", "scenes:999999999", "scenes:" + "9" * 5000],
)
def test_data_that_is_none(name):
    with pytest.raises(BadInput, match=re.escape(name[:40])):
        open_data(name)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("3", "not an object"),
        ("[" * 1000 + "]" * 1000, "nested more than 100 deep"),
        ({"id": []}, "id is no text"),
        ({"question": " "}, "the question is empty"),
        ({"image": "elsewhere.png"}, "no image .*elsewhere.png"),
        ({"image": ["0.png", "x" * 300]}, "no image .*xxx"),
        ({"keep": 0.5}, "here all lines are asked at the shares of `keep`"),
        ({"answers": "yes"}, "answers is no list"),
        ({"answers": []}, "answers is no list"),
        ({"answers": [3]}, "answers is no list"),
        ({"category": None}, "category is no text"),
    ],
)
def test_a_bad_line_is_named(questions, line, reason):
    good = json.loads(questions.read_text().splitlines()[0]) | {"id": "new"}
    questions.write_text(questions.read_text() + (json.dumps(good | line) if isinstance(line, dict) else line))
    with pytest.raises(BadInput, match=rf"questions.jsonl:8: {reason}"):
        read_jsonl(questions)


def test_ids_are_unique_and_a_file_is_not_empty(questions):
    line = questions.read_text().splitlines()[0]
    for text, reason in (("", "no question"), (f"{line}\n{line}\n", "two questions have the id 0")):
        questions.write_text(text)
        with pytest.raises(BadInput, match=reason):
            read_jsonl(questions)


def test_the_lines_of_batch_are_those_of_eval(run, tmp_path):
    """The questions that ship, and all that a line may hold: numbers and nothing as ids, several images, stdin."""
    samples = Path(__file__).parent.parent / "sample_images" / "questions.jsonl"
    asked = [json.loads(line) for line in samples.read_text().splitlines()]
    data = read_jsonl(samples)
    assert [(i.image, i.question, list(i.answers)) for i in data.items] == [tuple(line.values()) for line in asked]
    assert [item.id for item in data.items] == [item.id for item in Reader(str(samples))]
    several = {"image": ["scene-1.png", str(samples.parent / "scene-2.png")], "question": "Which?", "answers": ["no"]}
    lines = [several | {"id": 1.5}, asked[0] | {"id": 7, "x": [None]}, several | {"id": "7"}]
    path = tmp_path / "questions.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)))
    shutil.copy(samples.parent / "scene-1.png", tmp_path)
    out = tmp_path / "out"
    call = ("eval", path, "-o", out, "--methods", "gridprune, random", "--keep", "0.5")
    code, _, err = run(*call)
    assert code == 0, err
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {row["id"] for row in rows} == {1.5, 7, "7"} and len(rows) == 9
    (first,) = [row for row in rows if row["id"] == 1.5 and row["cell"] == "gridprune"]
    assert first["image"] == several["image"] and len(first["key"]) == len(first["region"]) == 2
    assert json.loads((out / "results.json").read_text())["images"] == 2
    whole = (out / "samples.jsonl").read_bytes()
    (out / "samples.jsonl").write_bytes(whole[:-9])
    assert run(*call)[0] == 0 and (out / "samples.jsonl").read_bytes() == whole  # it goes on from such rows
    batch = run("batch", path, "--keep", "0.5")[1].splitlines()
    answers = {row["id"]: row["answer"] for row in rows if row["cell"] == "gridprune"}
    assert answers == {line["id"]: line["answer"] for line in map(json.loads, batch)}


def test_methods_take_the_options_of_ask():
    cells = read_cells(["gridprune, gridprune --region 0,1,3,4 --zone 2,fastervlm", "random --seed=3"], "0.5,1.0,0.25")
    assert [(cell.name, cell.pruning.keep) for cell in cells[:4]] == [
        ("gridprune", 0.5),
        ("gridprune --region 0,1,3,4 --zone 2", 0.5),
        ("fastervlm", 0.5),
        ("random --seed=3", 0.5),
    ]
    assert {cell.pruning.keep for cell in cells} == {0.5, 0.25}  # all tokens are always there
    assert cells[0].pruning == Pruning(keep=0.5)
    assert cells[1].pruning == Pruning(keep=0.5, method=make_method("gridprune", zone=2), region=(0, 1, 3, 4))
    assert cells[3].pruning == Pruning(keep=0.5, method=make_method("random", seed=3), region=cells[3].pruning.region)


def test_a_keep_of_1_is_asked_for_where_it_is_not_all_tokens():
    more = [
        "gridprune --ilp 0.5",
        "vtw --layer 2",
        "gridprune --positions compact",
        "gridprune --plc pool --inside-ratio 1 --outside-ratio 4",
    ]
    same = [
        "gridprune",
        "gridprune --ilp selection",
        "vtw",
        "fastv",
        "pyramiddrop",
        "sparsevlm",
        "gridprune --plc pool --inside-ratio 2",
    ]
    assert [cell.name for cell in read_cells([*same, *more], "1")] == more


def test_commas_in_quotes_divide_no_methods():
    ask = "Where, as [x0,y0,x1,y1], is it? {question}"
    cells = read_cells(
        [f"gridprune --query 'a, b', gridprune --localizer m --localizer-template '{ask}', uniform"], "1e-1"
    )
    assert [cell.pruning.query for cell in cells] == ["a, b", None, None]
    assert cells[1].pruning.localizer_template == ask and cells[2].name == "uniform"


@pytest.mark.parametrize(
    ("methods", "keep", "reason"),
    [
        ("gridprune --query 'what", "0.5", "--methods gridprune --query 'what: can't be read.*No closing quotation"),
        ("gridprune --literal --region auto", "0.5", "--methods gridprune --literal --region auto: --region"),
        ("fastv --layer", "0.5", "--methods fastv --layer: --layer needs a value"),
        ("fastv 2", "0.5", "--methods fastv 2: '2' is no option; give those of a method as --NAME VALUE"),
        ("sharpest", "0.5", "--methods sharpest: .*unknown method"),
        ("fastervlm --keep 0.3", "0.5", "--methods fastervlm --keep 0.3: shares go to eval's own --keep"),
        ("", "0.5", "--methods: names none"),
        ("fastervlm", "half", "'half' is no number"),
        ("fastervlm", "0", "--keep 0.0: must be above 0"),
        ("fastervlm", "nan", "--keep nan"),
        ("fastervlm", "0.5,0.5", "fastervlm at 0.5 is named twice"),
    ],
)
def test_cells_that_are_none(run, tmp_path, methods, keep, reason):
    code, out, err = run("eval", "scenes:1", "-o", tmp_path / "out", "--methods", methods, "--keep", keep)
    assert (code, out) == (2, "") and re.search(reason, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_of_a_method_is_a_usage_error(run, tmp_path):
    code, _, err = run("eval", "scenes:1", "-o", tmp_path / "out", "--methods", "fastervlm --sharp 3")
    assert code == 2 and "--sharp" in err and err.count("\n") == 1


def test_a_metric_that_cannot_score_is_told_before_any_answer(run, questions, tmp_path):
    code, _, err = run("eval", questions, "-o", tmp_path / "out", "--metric", "vqa")
    assert code == 2 and "--metric vqa: question 0: vqa needs the answers of 10 annotators" in err
    assert run("eval", questions, "-o", tmp_path / "out", "--metric", "bleu")[0] == 2


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tiny_llava):
    return Pipeline(str(tiny_llava))


def lines_of(pipeline, plan):
    return [line for lines in answers(pipeline, plan, {}) for line in lines]


def test_each_image_is_encoded_once_and_every_answer_can_be_made_again(tiny, questions, monkeypatch):
    encoded = []
    run_tower = Encoder.run_tower

    def watched(self, pictures, several, optional):
        encoded.extend(pictures)
        return run_tower(self, pictures, several, optional)

    monkeypatch.setattr(Encoder, "run_tower", watched)
    cells = read_cells(["gridprune --zone 2, gridprune --region 0,0,3,3, random"], "0.5,0.2")
    plan = Plan(read_jsonl(questions), cells, max_new_tokens=3, batch=4, suffix="Answer with a word.")
    lines = lines_of(tiny, plan)
    assert [Path(picture.name).name for picture in encoded] == ["0.png", "1.png", "2.png"]
    assert len(lines) == plan.count == 6 * 7
    assert len({(line["cell"], line["keep"], line["id"]) for line in lines}) == plan.count
    monkeypatch.undo()
    for line in lines:
        options = dict(line["options"])
        assert options.pop("query") is None
        settings = {name: options.pop(name) for name in [f.name for f in fields(Pruning)] if name in options}
        method = make_method(line["method"], **options)
        pruning = Pruning(keep=line["keep"], method=method, query=line["question"], **settings)
        asked = f"{line['question']}\nAnswer with a word."
        answer = tiny.ask(questions.parent / line["image"], asked, pruning, max_new_tokens=3)
        assert answer.text == line["answer"], line
        assert (len(answer.pruned.kept), answer.pruned.count) == (line["kept"], line["tokens"])
        assert line["score"] == float(line["answer"].lower() == "yes")
    seeds = {line["image"]: line["options"]["seed"] for line in lines if line["method"] == "random"}
    assert len(set(seeds.values())) == 3  # one draw for all images would be luck


def test_no_answer_goes_on_from_a_prefix_that_may_be_there_or_not(tiny_llava, questions):
    pipeline = Pipeline(str(tiny_llava), relevance="attention", dtype="float32")
    inside = Cell("inside", Pruning(keep=0.5, ilp="selection"))
    plan, runner = Plan(read_jsonl(questions), (inside,)), pipeline.runner()
    encoded = encode(runner, plan.data, batches(plan)[0], {})
    for cell, holds in ((inside, True), (FULL, False)):
        sets = prune(runner, plan, cell, batches(plan)[0], encoded)
        assert {pruned.prefix is not None for pruned in sets} == {holds}


def test_questions_about_an_image_that_is_split_over_batches_share_its_encoding(tiny, questions):
    one, by_one = (lines_of(tiny, Plan(read_jsonl(questions), (), max_new_tokens=3, batch=n)) for n in (6, 1))
    assert [line["answer"] for line in one] == [line["answer"] for line in by_one]


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(run, questions, tmp_path):
    """A run from start to end, and how it was called."""
    call = ["eval", questions, "--methods", "gridprune, random", "--keep", "0.5,0.2", "--batch-size", "4"]
    code, out, err = run(*call, "-o", tmp_path / "whole")
    assert code == 0, err
    assert out == (tmp_path / "whole" / "results.md").read_text()
    return tmp_path / "whole", call


def same(one, other):
    for name in ("samples.jsonl", "results.json", "results.md", "settings.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_a_killed_run_goes_on_and_ends_the_same(run, finished, tmp_path):
    """Cut anywhere: inside a line, at its end, inside a batch, at the very start, and not at all."""
    whole, call = finished
    samples = (whole / "samples.jsonl").read_bytes()
    ends = [match.end() for match in re.finditer(rb"\n", samples)]
    for cut in (0, 7, ends[0], ends[4] - 1, ends[4] + 1, ends[9], len(samples) - 1, len(samples)):
        folder = tmp_path / f"cut {cut}"
        folder.mkdir()
        shutil.copy(whole / "settings.json", folder)
        (folder / "samples.jsonl").write_bytes(samples[:cut])
        code, _, err = run(*call, "-o", folder)
        assert code == 0
        left = sum(end <= cut for end in ends)
        assert (f"going on after {left} of 30 answers" in err) == (left > 0)
        same(whole, folder)


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(run, finished, tmp_path, monkeypatch):
    whole, call = finished
    generate, calls = Runner.generate, []

    def interrupted(self, sets, **options):
        calls.append(sets)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(self, sets, **options)

    monkeypatch.setattr(Runner, "generate", interrupted)
    code, out, err = run(*call, "-o", tmp_path / "stopped")
    assert (code, out) == (130, "")
    assert "stopped after 12 of 30 answers; the same command goes on from there" in err
    lines = (tmp_path / "stopped" / "samples.jsonl").read_text()
    assert lines.endswith("\n") and len([json.loads(line) for line in lines.splitlines()]) == 12
    assert not (tmp_path / "stopped" / "results.json").exists()
    monkeypatch.setattr(Runner, "generate", generate)
    assert run(*call, "-o", tmp_path / "stopped")[0] == 0
    same(whole, tmp_path / "stopped")


def test_other_settings_are_refused_in_one_line(run, finished, questions):
    whole, call = finished
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    for extra, named in (
        (["--keep", "0.5"], "cells"),
        (["--metric", "anls"], "metric"),
        (["--suffix", "Shortly."], "suffix"),
        (["--batch-size", "5"], "batch"),
        (["--system", "Be brief."], "prompt"),
    ):
        code, out, err = run(*call, *extra, "-o", whole)
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert f"holds a run with other settings ({named})" in err
    questions.write_text(questions.read_text().replace("Question 3?", "Question three?"))
    assert "(data_digest)" in run(*call, "-o", whole)[2]
    assert before == {path.name: path.read_bytes() for path in whole.iterdir()}


def test_what_decides_some_cells_alone_must_be_the_same_too(tiny_llava, tmp_path):
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    other = shutil.copytree(tiny_llava, tmp_path / "other")
    data = Data("made up", (Item("1", ("a.png",), "Which?", ("no",)),), lambda image: b"")

    def settings(*prunings, depth=None):
        pipeline = Pipeline(str(model))
        pipeline.family.calibrate(Calibration(relevance_depth=depth))
        return Plan(data, tuple(Cell(f"{n}", pruning) for n, pruning in enumerate(prunings))).settings(pipeline)

    plain = Pruning(keep=0.5)
    for name, pruning, path in (
        ("compressor_digest", replace(plain, plc="trained"), model / "compressor" / "model.safetensors"),
        ("covipal_digest", Pruning(keep=0.5, method=make_method("covipal")), model / "covipal" / "model.safetensors"),
        ("localizer_digests", replace(plain, localizer=str(other)), other / "notes.txt"),
    ):
        path.parent.mkdir(exist_ok=True)
        written = []
        for text in ("one", "two"):
            path.write_text(text)
            written.append(settings(plain, pruning))
            assert settings(plain).keys() == written[-1].keys() - {name}
        assert [key for key in written[0] if written[0][key] != written[1][key]] == [name]
    inside = replace(plain, ilp="selection")
    one, two = settings(inside, depth=1), settings(inside, depth=2)
    assert [key for key in one if one[key] != two[key]] == ["relevance_depth"]


def test_a_report_says_what_relevance_came_from():
    for source, model, name in (
        ("clip", "openai/clip", "openai/clip"),
        ("attention", None, "the language model's attention"),
        ("words", None, "the language model's word embeddings"),
    ):
        assert relevance_line({"relevance": {"source": source, "model": model}}) == f"Relevance comes from {name}."
    assert relevance_line({"relevance": None}) == ""


def test_a_run_goes_on_with_the_same_clip_alone_and_says_which(run, finished, tiny_llava, tmp_path):
    whole, call = finished
    results = json.loads((whole / "results.json").read_text())
    assert results["relevance"] == {"source": "clip", "model": f"{tiny_llava}/clip"}
    assert results["relevance_digest"] == find(str(tiny_llava / "clip")).identity
    assert f"Relevance comes from {tiny_llava}/clip." in (whole / "results.md").read_text()
    lines = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [line["relevance"] for line in lines] == [
        results["relevance"] if line["method"] == "gridprune" else None for line in lines
    ]
    assert "(relevance, relevance_digest)" in run(*call, "--relevance", "words", "-o", whole)[2]
    model = shutil.copytree(tiny_llava, tmp_path / "model")
    call += ["--model", model, "-o", tmp_path / "out"]
    assert run(*call)[0] == 0
    for folder, tensor, named in (
        (model / "clip", "logit_scale", "relevance_digest"),
        (model, "q_proj", "model_digest"),
    ):
        path = folder / "model.safetensors"
        before, weights = path.read_bytes(), load_file(path)
        name = next(name for name in weights if tensor in name)
        weights[name].view(-1)[0] += 1
        save_file(weights, path, {"format": "pt"})
        code, _, err = run(*call)
        assert code == 2 and f"holds a run with other settings ({named})" in err
        path.write_bytes(before)
    assert run(*call)[0] == 0


def test_damage_inside_the_answers_is_named(run, finished):
    whole, call = finished
    samples = whole / "samples.jsonl"
    lines = samples.read_text().splitlines(keepends=True)
    for bad in ("{\n", "3\n", lines[1].replace('"id": ', '"id": 9')):
        samples.write_text("".join([lines[0], bad, *lines[2:]]))
        code, _, err = run(*call, "-o", whole)
        assert code == 2 and "samples.jsonl:2: damaged" in err


# ---- figures ---------------------------------------------------------------------------------------------------------

HALF = Cell("half", Pruning(keep=0.5))


def made_up(metric="exact"):
    """Six questions about three images under two cells: a plan that no model answers, and rows."""
    truths = ["yes", "no", "yes", "yes", "no", "yes"]
    items = [
        Item(str(n), (f"{n // 2}.png",), f"Is it {n}?", (truth,), "first" if n < 2 else "rest", (0.0, 0.0, 0.5, 0.25))
        for n, truth in enumerate(truths)
    ]
    plan = Plan(Data("made up", tuple(items), lambda image: b""), (HALF,), metric)
    answers = {FULL: ["yes", "no", "yes", "no", "no", "yes"], HALF: ["yes", "yes", "no", "no", "no", "Yes."]}
    samples = {}
    for cell, column in answers.items():
        for n, (item, answer) in enumerate(zip(items, column, strict=True)):
            score = float(answer.lower().strip(".") == item.answers[0])
            region = (0, 0, 3 if n else 2, 3) if cell is HALF else None
            samples[place(cell, item)] = Row(answer, score, 4 if cell is HALF else 8, f"key-{n // 2}", region)
    return plan, samples


def test_the_figures_of_a_cell():
    """By hand: full right on 5 of 6, half on 3; per image full scores 2, 1, 2, half 1, 0, 2; differences -1, -1, 0."""
    plan, samples = made_up()
    results = summarise(plan, samples)
    full, half = results["cells"]
    assert results["images"] == 3 and (full["name"], half["name"]) == ("all tokens", "half")
    assert (full["score"], half["score"]) == (pytest.approx(5 / 6, abs=1e-6), 0.5)
    assert half["of_full"] == pytest.approx(0.6) and full["of_full"] == 1 and half["kept"] == 4
    # sums of residuals per image: half 1 - 1, 0 - 1, 2 - 1; differences -1 + 2/3, -1 + 2/3, 0 + 2/3
    assert half["error"] == pytest.approx(math.sqrt(0 + 1 + 1) / 6, abs=1e-6)
    assert half["difference"] == pytest.approx(-1 / 3, abs=1e-6)
    error = math.sqrt(1 / 9 + 1 / 9 + 4 / 9) / 6
    assert half["difference_error"] == pytest.approx(error, abs=1e-6)
    assert half["difference_interval"] == pytest.approx([-1 / 3 - 1.96 * error, -1 / 3 + 1.96 * error], abs=1e-4)
    assert half["agreement"] == pytest.approx(3 / 6)  # "Yes." is not "yes" to the letter
    assert [(name, category["questions"], category["score"]) for name, category in half["categories"].items()] == [
        ("first", 2, 0.5),
        ("rest", 4, 0.5),
    ]
    # the box is the top left half by a quarter; three of four columns of cells have 3/4 of it, four have all
    assert half["region"] == {
        "questions": 6,
        "contains": pytest.approx(5 / 6, abs=1e-6),
        "area": pytest.approx((5 * 16 + 12) / 6 / 64, abs=1e-6),
    }
    assert "region" not in full and "pope" not in half


def test_the_difference_to_the_method_named_first():
    """By hand: half is right where it was, `other` on all 6; per image half has 1, 0, 2 of 2: differences 1, 2, 0."""
    plan, samples = made_up()
    other = Cell("a|b", replace(HALF.pruning, region="none"))
    alone = Cell("a|b", replace(HALF.pruning, region="none", keep=0.25))  # where the first method was not asked
    for item in plan.data.items:
        for cell in (other, alone):
            samples[place(cell, item)] = replace(samples[place(FULL, item)], score=1.0)
    results = summarise(replace(plan, cells=(HALF, other, alone)), samples)
    assert [cell["to_first"] for cell in results["cells"] if cell["name"] != "a|b" or cell["keep"] != 0.5] == [None] * 3
    (paired,) = (cell["to_first"] for cell in results["cells"] if cell["to_first"])
    error = math.sqrt(0 + 1 + 1) / 6  # sums of residuals per image: 1 - 1, 2 - 1, 0 - 1
    assert paired["first"] == "half" and paired["difference"] == 0.5
    assert paired["difference_error"] == pytest.approx(error, abs=1e-6)
    assert paired["difference_interval"] == pytest.approx([0.5 - 1.96 * error, 0.5 + 1.96 * error], abs=1e-4)
    lines = markdown(results).splitlines()
    assert "| difference to full | difference to half | same answer |" in lines[0]
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines[2:6])
    (line,) = (line for line in lines if "+50.0 [+3.8, +96.2]" in line)
    assert line.startswith("| a\\|b | 0.5 ")


def test_clustered_errors():
    """Against the formula written out: sums of residuals per cluster, squared, over n squared."""
    right, cluster = np.array([1.0, 1, 0, 1, 0, 0]), np.array([7, 7, 7, 3, 3, 9])
    mean = right.mean()
    expected = sum(sum(right[i] - mean for i in range(6) if cluster[i] == c) ** 2 for c in (3, 7, 9)) ** 0.5 / 6
    assert clustered_error(right, cluster) == pytest.approx(expected)
    alone = np.arange(6)  # no cluster: the plain standard error
    assert clustered_error(right, alone) == pytest.approx(right.std() / math.sqrt(6))


def test_questions_that_share_an_image_by_way_of_others_are_one_cluster():
    images_of = [["b"], ["a"], ["c", "d"], ["d", "a"], ["e"], ["f", "e"], ["b"], ["g", "h"]]
    assert image_clusters(images_of).tolist() == ["b", "a", "a", "a", "e", "e", "b", "g"]
    chain = image_clusters([[f"{n:05}", f"{n + 1:05}"] for n in range(5000, 0, -1)])
    assert set(chain.tolist()) == {"00001"}


def test_errors_know_questions_about_several_images():
    """A picture alone, as one of two in another encoding, and beside another one: one cluster."""
    plan, samples = made_up()
    before = summarise(plan, samples)["cells"][1]["error"]
    items = list(plan.data.items)
    items[1] = replace(items[1], images=("0.png", "1.png"))
    items[4] = replace(items[4], images=("2.png", "1.png"))
    plan = replace(plan, data=replace(plan.data, items=tuple(items)))
    rows = {n: {0: "key-0-of-two key-1-of-two", 1: "key-2-of-two key-1-of-two"}[n // 4] for n in (1, 4)}
    for (name, keep, id), row in list(samples.items()):
        samples[name, keep, id] = replace(row, key=rows.get(int(id), row.key))
    results = summarise(plan, samples)
    # all hang together by 1.png: the sum of all residuals is 0
    assert results["cells"][1]["error"] == 0 < before and results["images"] == 3


def test_nothing_right_has_no_share_of_full():
    plan, samples = made_up()
    results = summarise(plan, {where: replace(row, score=0.0) for where, row in samples.items()})
    assert [cell["of_full"] for cell in results["cells"]] == [None, None]
    assert "| half | 0.5 | 4 | 0.0 ± 0.0 |  | +0.0 [+0.0, +0.0] |" in markdown(results)


def test_the_table():
    text = markdown(summarise(*made_up()))
    assert text.splitlines()[0].startswith("| method | keep | tokens | score | of full | difference to full |")
    assert "| all tokens | 1 | 8 | 83.3 ± " in text and "| half | 0.5 | 4 | 50.0 ± 23.6 | 60.0 | -33.3 [-" in text
    assert "6 questions about 3 images, scored by `exact`" in text
    assert "Contextual region of half on 6 questions" in text and "83.3 %, mean area 24.0 %" in text
    pope = markdown(summarise(*made_up("pope")))
    assert "| F1 | yes | first | rest |" in pope
    # half says yes 3 times, 2 of 4 true ones hit: F1 4/7
    assert "| 57.1 | 50.0 |" in pope


# ---- the report ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]


def losing_plan():
    plan, samples = made_up()
    plan = replace(plan, cells=(Cell("<b>half</b>", HALF.pruning),))
    samples |= {("<b>half</b>", *where[1:]): row for where, row in samples.items() if where[0] == "half"}
    return plan, samples


def test_the_worst_losses_come_first():
    plan, samples = made_up()
    cells, worst = report.losses(plan, samples)
    assert cells == [HALF] and [item.id for item in worst] == ["1", "2"]  # both cells miss 3, and 5 is right


@needs_report
def test_the_report_is_one_file_with_curves_bars_and_pictures():
    plan, samples = losing_plan()
    results = plan_results(plan, samples)
    drawn = []

    def picture(cell, item, answer):
        drawn.append((cell.name, item.id, answer))
        return Image.new("RGB", (900, 500), "red")

    text = report.html(plan, results, samples, picture)
    page = Page(text)
    assert drawn == [("<b>half</b>", "1", "yes"), ("<b>half</b>", "2", "no")]
    assert page.tags.count("svg") == 2 and page.tags.count("img") == 2  # curves, and bars at one keep
    assert all(source.startswith(("data:image/jpeg;base64,", "#")) for source in page.sources)
    assert "<b>half</b>" not in text and "&lt;b&gt;half&lt;/b&gt;" in text
    assert "Is it 1?" in text and "True: no." in text
    assert text == report.html(plan, results, samples, picture)  # nothing in it depends on the time


@needs_report
def test_categories_and_options_are_text_in_the_report_and_the_table():
    """Dollars are no mathematics, bars divide no cells, and a terminal that shows a file obeys nothing in it."""
    plan, samples = made_up()
    odd = "$x$ $\\frac{ | `a` \x1b[31m\nb\u202ec\ud800"
    items = tuple(replace(item, category=odd) for item in plan.data.items)
    plan = replace(plan, data=replace(plan.data, items=items), cells=(Cell(odd, HALF.pruning),))
    samples |= {(odd, *where[1:]): row for where, row in samples.items() if where[0] == "half"}
    results = plan_results(plan, samples)
    text = report.html(plan, results, samples, lambda *_: Image.new("RGB", (9, 5)))
    shown = r"$x$ $\frac{ | `a` \x1b[31m\nb\u202ec\ud800"
    assert text.count(shown) == 3  # in both legends, and below the bars
    table = markdown(results)
    assert table.splitlines()[3].startswith(r"| $x$ $\\frac{ \| \`a\` \x1b[31m\nb\u202ec\ud800 | 0.5 |")
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()[:4]}) == 1
    assert not re.search("[\x1b\u202e\ud800]", text + table)


def plan_results(plan, samples):
    settings = {"model": "tiny", "data": "made up", "device": "cpu", "dtype": "float32", "versions": {"gridprune": "0"}}
    return settings | summarise(plan, samples)


@needs_report
def test_eval_writes_the_report_with_the_pictures_of_show(finished):
    whole, _ = finished
    page = (whole / "report.html").read_text()
    assert page.count("<svg") == 3  # curves, and bars at two keeps


def test_without_the_extra_all_but_the_report_is_written(run, questions, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    code, out, err = run("eval", questions, "-o", tmp_path / "out", "--methods", "fastervlm", "--keep", "0.5")
    assert code == 0 and out.startswith("| method |")
    assert "no report.html: matplotlib missing; pip install 'gridprune[report]'" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "settings.json",
        "samples.jsonl",
        "results.json",
        "results.md",
    }


def test_the_sweep_is_told_in_the_same_table():
    from benchmarks.sweeps import swept

    cells = swept()
    assert len(cells) == len({cell.name for cell in cells}) == 72
    assert {cell.pruning.keep for cell in cells} == {0.11}
    assert Plan(scenes(4, 0, "few"), cells).count == 4 * 73
