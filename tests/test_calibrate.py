"""`gridprune calibrate`: what is tried, what is counted, what is taken and remembered, and what that changes."""

import json

import numpy as np
import pytest

from gridprune_cli.config import config_path, model_settings, remember_settings
from gridprune_cli.errors import BadInput
from gridprune_cli.evaluation import calibrate
from gridprune_cli.evaluation.calibrate import Choice, Measured, choose, list_choices, new_settings, sample
from gridprune_cli.evaluation.data import Data, Item, read_jsonl
from gridprune_cli.generation import generate
from gridprune_cli.opening import open_pipeline
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.scenes.scene import TUNE, draw, make_scene
from gridprune_cli.settings import Pruning
from gridprune_cli.vlm.checkpoint import model_key
from gridprune_cli.vlm.relevance import Calibration

QUESTIONS = ("What colour is the star?", "Is there a ring?", "What is left of the square?", "How many discs are there?")


def write_questions(folder, pictures, per_picture=4, **extra):
    lines = []
    for n in range(pictures):
        draw(make_scene(TUNE + n))[0].save(folder / f"{n}.png")
        lines += [{"image": f"{n}.png", "question": question} | extra for question in QUESTIONS[:per_picture]]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def questions(tmp_path):
    """A file of twelve questions about three pictures."""
    return write_questions(tmp_path, 3)


# ---- what is tried ---------------------------------------------------------------------------------------------------


def test_questions_are_drawn_the_same_for_the_same_seed():
    data = Data("q", tuple(Item(n, ("a.png",), f"{n}?", ()) for n in range(40)), str)
    drawn = sample(data, 12, 3)
    numbers = [item.id for item in drawn.items]
    assert numbers == sorted(set(numbers)) and len(numbers) == 12 and drawn == sample(data, 12, 3)
    assert drawn != sample(data, 12, 4) and sample(data, 50, 3) == data
    with pytest.raises(
        BadInput, match=r"^q: 9 questions, where no choice could be told from chance; give at least 10$"
    ):
        sample(data, 9, 3)


def test_sources_and_signs_are_tried_beside_what_is_in_force(tiny_llava, checkpoint):
    def tried(folder, *, calibration=None, **options):
        family = Pipeline(str(folder), **options).family
        family.calibrate(calibration or Calibration())
        return [[vars(choice.calibration).values() for choice in group] for group in list_choices(family, [0.3])]

    def plain(groups):
        return [[tuple(choice) for choice in group] for group in groups]

    clip, one, two = ("clip", None, None), ("attention", 1, None), ("attention", 2, None)
    signs = [("clip", None, -1), ("clip", None, 1)]
    assert plain(tried(tiny_llava)) == [[clip, one, two], signs]
    assert plain(tried(tiny_llava, relevance="attention")) == [[one, two]]
    assert plain(tried(tiny_llava, relevance="clip")) == [[clip], signs]
    assert plain(tried(checkpoint("qwen2_vl")))[0][0][0] == "attention"
    remembered = Calibration("attention", 2, 1)
    assert plain(tried(tiny_llava, calibration=remembered)) == [[two, clip, one], signs[::-1]]
    with pytest.raises(BadInput, match="the language model has no other layers to choose from than the 2 in force"):
        tried(checkpoint("gemma3"))  # of its four, two have a sliding window


# ---- what is counted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("full", "pruned", "expected"),
    [
        (("a b", (1, 2, 9)), ("a b", (1, 2, 9)), (1, 1)),
        (("a b", (1, 2, 9)), ("a c", (1, 3, 9)), (0, 1 / 3)),
        (("a b", (1, 2, 9)), ("a b c d", (1, 2, 3, 4, 9)), (0, 2 / 5)),
        (("a", (1, 9)), ("b", (2, 9)), (0, 0)),
    ],
)
def test_an_answer_is_the_same_or_alike_up_to_a_token(full, pruned, expected):
    assert calibrate._likeness(full, pruned) == expected


def test_figures_are_paired_and_errors_know_that_one_image_is_one():
    choices = [Choice(Calibration("attention", depth), ()) for depth in (3, 1, 2)]
    first = np.array([1.0, 0, 0, 0, 0, 0, 0, 0])
    second = np.array([0.0, 1, 1, 0, 0, 0, 0, 0])
    scores = [np.stack([row, row]) for row in (first, second, np.ones(8))]
    in_force, other, best = calibrate._figures(choices, scores, np.array(list("abcdefgh")))
    assert (in_force.agreement, in_force.difference, in_force.difference_error) == (1 / 8, 0, 0)
    assert (other.difference, best.difference) == (1 / 8, 7 / 8) and not other.better and best.better
    residuals = second - first - 1 / 8
    assert other.difference_error == pytest.approx(np.sqrt((residuals**2).sum()) / 8)
    # questions about one image stand or fall together; yet all about one image are not without error
    pairs = calibrate._figures(choices, scores, np.array(list("axxbcdef")))[1]
    together = np.array([residuals[0], residuals[1] + residuals[2], *residuals[3:]])
    assert pairs.difference_error == pytest.approx(np.sqrt((together**2).sum()) / 8)
    assert calibrate._figures(choices, scores, np.array(["a"] * 8))[1].difference_error == other.difference_error


def test_the_best_of_what_is_better_is_taken_and_ties_go_to_fewer_layers(tiny_llava):
    def of(depth, agreement, better, tokens=0.5):
        return Measured(Calibration("attention", depth), agreement, 0.1, tokens, better=better)

    first = of(8, 0.7, False)
    assert choose([first, of(4, 0.9, False), of(2, 0.7, False)]) is first
    group = [first, of(12, 0.9, True), of(4, 0.9, True), of(2, 0.8, True), of(6, 0.9, True)]
    assert choose(group).calibration.relevance_depth == 4
    assert choose([*group, of(16, 0.9, True, tokens=0.6)]).calibration.relevance_depth == 16
    # and what differs from what is in force is what is set
    family = Pipeline(str(tiny_llava)).family
    sign = Measured(Calibration("clip", None, 1), 0.9, 0.1, 0.9, better=True)
    assert new_settings(family, [first, of(1, 0.7, False)]) == Calibration()
    assert new_settings(family, [of(2, 0.9, True), sign]) == Calibration("attention", 2, 1)
    assert new_settings(Pipeline(str(tiny_llava), relevance="attention").family, [of(2, 0.9, True)]) == Calibration(
        relevance_depth=2
    )


def test_each_choice_is_counted_as_a_user_would_meet_it(tiny_llava, questions, monkeypatch, run):
    """What the table says is what `ask` says with each depth set by hand, against all tokens."""
    batches = []

    def counted(family, batch, *rest, **options):
        batches.append(len(batch))
        return generate(family, batch, *rest, **options)

    monkeypatch.setattr("gridprune_cli.runners.local.generate", counted)
    options = ("--relevance", "attention", "--dtype", "float32", "--max-new-tokens", 3, "--keep", "0.8,0.4")
    code, out, err = run("calibrate", questions, *options, "--dry-run", "--json", "--batch-size", 5)
    assert code == 0 and "attention, 1 layers" in err
    record = json.loads(out)
    (measured,) = record["choices"]
    assert (record["questions"], record["images"], record["keep"]) == (12, 3, [0.8, 0.4])
    assert sum(batches) == 12 * (1 + 2 * 2) and len(batches) == 3 * (1 + 2 * 2)  # all tokens once
    data = read_jsonl(questions, scored=False)
    pictures = [data.find(item.images[0]) for item in data.items]
    full = None
    for choice in measured:
        remember_settings(model_key(str(tiny_llava)), {"relevance_depth": choice["relevance_depth"]})
        pipeline = open_pipeline({"model": str(tiny_llava), "dtype": "float32", "relevance": "attention"})

        def ask(keep, pipeline=pipeline):
            pairs = zip(pictures, data.items, strict=True)
            return [pipeline.ask(image, item.question, Pruning(keep=keep), max_new_tokens=3) for image, item in pairs]

        full = full or [answer.text for answer in ask(1.0)]
        pruned = [(answer, text) for keep in (0.8, 0.4) for answer, text in zip(ask(keep), full, strict=True)]
        assert {answer.pruned.relevance_source["depth"] for answer, _ in pruned} == {choice["relevance_depth"]}
        same = [answer.text == text for answer, text in pruned]
        assert choice["agreement"] == pytest.approx(sum(same) / len(same), abs=1e-6)
    assert len({choice["agreement"] for choice in measured}) == len(measured) == 2


# ---- the command -----------------------------------------------------------------------------------------------------


def test_what_is_better_is_remembered_for_the_model_and_forgotten_again(command, tmp_path):
    """The embedded model's CLIP is not to be turned round, and twelve questions are enough to see it."""
    path = write_questions(tmp_path, 3)
    arguments = ("calibrate", path, "--model", "scenes", "--relevance", "clip", "--device", "cpu")
    code, out, err = command(*arguments, "--dry-run", "-q")
    lines = [line.split() for line in out.splitlines()]
    assert code == 0 and not err and not config_path().exists()
    assert lines[0][0] == "RELEVANCE" and [line[0] for line in lines[1:]] == ["clip", "clip,", "clip,"]
    assert lines[1][-2:] == ["in", "force"] and lines[3][:3] == ["clip,", "sign", "+1"] and lines[3][-1] == "better"
    code, _, err = command(*arguments)
    assert code == 0 and "clip, sign +1: taken, since it is better than clip, sign -1 beyond the error" in err
    assert f"{config_path()}: remembered for scenes; `gridprune models forget scenes` takes it back" in err
    fingerprint = Pipeline("scenes").family.fingerprint
    assert model_settings("scenes") == {"fingerprint": fingerprint, "relevance_sign": 1}
    ask = ("ask", tmp_path / "0.png", QUESTIONS[0], "--model", "scenes", "--method", "trim", "--json")
    assert json.loads(command(*ask)[1])["relevance"]["sign"] == 1
    settings = json.loads(command("env", "--json")[1])
    assert settings["relevance-sign"] == {"value": "1", "from": str(config_path())}
    assert settings["relevance-depth"]["from"] == "default"
    code, out, err = command("models", "forget", "scenes")
    assert (code, out) == (0, "") and "holds nothing for scenes any more" in err and model_settings("scenes") == {}
    assert "holds nothing for scenes\n" in command("models", "forget")[2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--keep", "1"), "--keep 1: must be above 0 and below 1"),
        (("--keep", "half"), "--keep half: 'half' is no number"),
        (("--relevance", "words"), "--relevance words: there is nothing to choose for relevance from words"),
        (("--limit", "5"), "5 questions, where no choice could be told from chance; give at least 10"),
    ],
)
def test_what_can_not_be_chosen_is_told_before_anything_is_answered(run, questions, options, line):
    code, out, err = run("calibrate", questions, *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and line in err
    assert not config_path().exists()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "no question in it"),
        ('{"image": "gone.png", "question": "What?"}\n', ":1: no image "),
        (
            '{"image": "0.png", "question": "What?", "keep": 0.5}\n',
            ":1: here all lines are asked at the shares of --keep",
        ),
    ],
)
def test_questions_that_can_not_be_asked_name_their_line(run, questions, text, line):
    questions.write_text(text)
    code, out, err = run("calibrate", questions)
    assert (code, out) == (2, "") and err.startswith(f"gridprune: {questions}") and line in err


def test_an_interrupt_leaves_nothing_behind(run, questions, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "_figures", interrupted)
    code, out, _ = run("calibrate", questions, "--relevance", "attention")
    assert (code, out) == (130, "") and not config_path().exists()
