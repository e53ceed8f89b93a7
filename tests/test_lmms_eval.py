"""The plug-in for lmms-eval: with the package itself where it is installed, else with the little of it that is used."""

import abc
import hashlib
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import lmms
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.evaluation.data import open_data, scenes
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners.local import Reply, Runner
from gridprune_cli.scenes.scene import SIZE, draw, make_scene
from gridprune_cli.settings import Pruning

ROOT = Path(__file__).parents[1]
PYTHON = os.environ.get("LMMS_EVAL_PYTHON")


def installed() -> bool:
    """Whether lmms-eval is there, with what it needs to run a task."""
    names = ("lmms_eval", "accelerate", "datasets", "evaluate", "loguru", "sacrebleu", "pytablewriter")
    return all(importlib.util.find_spec(name) for name in names)


class FakeModel(abc.ABC):
    """What lmms-eval's base class has that the plug-in leans on."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...
    @abc.abstractmethod
    def generate_until(self, requests): ...
    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class FakeInstance:
    args: tuple


@dataclass(frozen=True)
class FakeManifest:
    model_id: str
    simple_class_path: str | None = None


@pytest.fixture
def plugin(monkeypatch):
    """The module, over lmms-eval or over its stand-in."""
    if not installed():
        parts = {"api.model": {"lmms": FakeModel}, "api.instance": {"Instance": FakeInstance}}
        parts |= {"models.registry_v2": {"ModelManifest": FakeManifest}, "": {}, "api": {}, "models": {}}
        for name, contents in parts.items():
            module = ModuleType(f"lmms_eval.{name}".rstrip("."))
            module.__dict__.update(contents)
            monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "gridprune_cli.integrations.lmms_eval", raising=False)
    yield importlib.import_module("gridprune_cli.integrations.lmms_eval")
    sys.modules.pop("gridprune_cli.integrations.lmms_eval", None)


@pytest.fixture
def documents(tmp_path):
    """Six questions about three pictures."""
    for n in range(3):
        draw(make_scene(n))[0].save(tmp_path / f"{n}.png")
    return [{"image": tmp_path / f"{n % 3}.png", "question": f"Question {n}?"} for n in range(6)]


def requests_of(model, documents, kwargs, suffix="\nAnswer the question using a single word or phrase."):
    from PIL import Image

    model.task_dict = {"task": {"test": documents}}

    @dataclass
    class Request:
        args: tuple

    def to_images(document):
        return [Image.open(document["image"])]

    return [
        Request((document["question"] + suffix, options, to_images, n, "task", "test"))
        for n, (document, options) in enumerate(zip(documents, kwargs, strict=True))
    ]


def test_answers_are_those_of_the_pipeline(plugin, documents, tiny_llava):
    model = plugin.GridpruneModel(
        pretrained=str(tiny_llava), batch_size=4, method="gridprune", keep=0.5, zone=2, region="none"
    )
    kwargs = [{"max_new_tokens": 3 if n < 4 else 2, "temperature": 0, "until": ["\n\n"]} for n in range(6)]
    answers = model.generate_until(requests_of(model, documents, kwargs))
    pipeline = Pipeline(str(tiny_llava))
    for n, document in enumerate(documents):
        pruning = Pruning(keep=0.5, method=make_method("gridprune", zone=2), region="none", query=document["question"])
        asked = f"{document['question']}\nAnswer the question using a single word or phrase."
        whole = pipeline.ask(document["image"], asked, pruning, max_new_tokens=3 if n < 4 else 2).text
        assert answers[n] == whole.partition("\n\n")[0]


def test_relevance_sees_the_first_line_or_all(plugin, documents, tiny_llava, monkeypatch):
    seen = []
    answer = Runner.answer

    def watched(self, requests, **options):
        seen.extend((request.question, request.pruning.query) for request in requests)
        return answer(self, requests, **options)

    monkeypatch.setattr(Runner, "answer", watched)
    for options, query in (
        ({}, "Question 0?"),
        ({"query_lines": "all"}, "Question 0?\nShortly."),
        ({"query": "x"}, "x"),
    ):
        model = plugin.GridpruneModel(pretrained=str(tiny_llava), keep=0.5, **options)
        (request, *_) = requests_of(model, documents, [{"max_new_tokens": 1}] * 6, "\nShortly.")
        request.args = (f"<image>\n{request.args[0]}", *request.args[1:])
        model.generate_until([request])
        assert seen[-1] == ("Question 0?\nShortly.", query)


def test_a_clip_that_is_missing_is_told_at_once_and_words_can_be_asked_for(plugin, tiny_llava, tmp_path):
    bare = shutil.copytree(tiny_llava, tmp_path / "bare", ignore=shutil.ignore_patterns("clip"))
    with pytest.raises(BadInput, match="take `relevance=attention`"):
        plugin.GridpruneModel(pretrained=str(bare))
    assert plugin.GridpruneModel(pretrained=str(bare), relevance="words").pipeline.family.relevance_kind == "words"


def test_how_a_task_generates(plugin):
    settings, stops = plugin._settings({"until": "\n", "temperature": 0, "top_p": None, "num_beams": 1})
    assert (settings, stops) == ({"max_new_tokens": 128}, ["\n"])
    settings, _ = plugin._settings({"max_new_tokens": 5, "temperature": 0.7, "top_p": 0.9, "num_beams": 3})
    assert settings == {"max_new_tokens": 5, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "num_beams": 3}
    assert "do_sample" not in plugin._settings({"temperature": 0.7, "do_sample": False})[0]
    assert plugin._until("red.\n\nBlue", ["\n\n", ""]) == "red."


def test_what_it_refuses(plugin, documents, tiny_llava):
    for options, message in (
        ({"sharpness": 3}, "sharpness: neither a setting of pruning nor an option of the method"),
        ({"model": "x"}, "model=x: name the model as pretrained"),
        ({"query_lines": "last"}, "query_lines=last"),
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"method": "sharpest"}, "unknown method"),
        ({"keep": 2}, "keep=2"),
    ):
        with pytest.raises(BadInput, match=message):
            plugin.GridpruneModel(**{"pretrained": str(tiny_llava)} | options)
    model = plugin.GridpruneModel(pretrained=str(tiny_llava))
    (request, *_) = requests_of(model, documents, [{}] * 6)
    request.args = (*request.args[:2], lambda document: ["video.mp4"], *request.args[3:])
    with pytest.raises(GridpruneError, match="task, document 0: gridprune answers about images"):
        model.generate_until([request])
    with pytest.raises(GridpruneError, match="likelihoods can't be run"):
        model.loglikelihood([request])
    with pytest.raises(GridpruneError, match="several rounds can't be run"):
        model.generate_until_multi_round([request])


def test_the_manifest_names_the_class(plugin):
    manifest = plugin.manifest()
    module, _, name = manifest.simple_class_path.rpartition(".")
    assert manifest.model_id == "gridprune"
    assert (module, name) == (plugin.GridpruneModel.__module__, plugin.GridpruneModel.__name__)


def test_a_method_with_a_seed_gets_the_images_own(plugin, documents, tiny_llava, monkeypatch):
    """The one that `gridprune eval` gives it: that of the option, and of the picture's bytes."""
    seeds = []

    def watched(self, requests, **options):
        seeds.extend(request.pruning.method.seed for request in requests)
        return iter([Reply("", {}, False, ())] * len(requests))

    monkeypatch.setattr(Runner, "answer", watched)
    model = plugin.GridpruneModel(pretrained=str(tiny_llava), method="random", seed=5, keep=0.5)
    model.generate_until(requests_of(model, documents, [{}] * 6))
    data, expected = scenes(12, 0, "scenes"), []
    for item in data.items[::4]:  # of the three pictures
        picture = hashlib.sha256(data.find(item.images[0])).digest()
        expected.append((5 + int.from_bytes(picture[:4], "big")) % 2**32)
    assert seeds == expected * 2


# ---- benchmarks.lmms -------------------------------------------------------------------------------------------------


def test_the_task_of_the_benchmark_is_what_eval_asks(tmp_path):
    lmms.write_task(tmp_path / "task", 6)
    lines = [json.loads(line) for line in (tmp_path / "task/questions.jsonl").read_text().splitlines()]
    data = open_data("scenes:6")
    assert [(n["id"], n["question"], (n["answer"],)) for n in lines] == [
        (item.id, item.question, item.answers) for item in data.items
    ]
    assert [Path(line["image"]).read_bytes() for line in lines] == [data.find(item.image) for item in data.items]
    functions = runpy.run_path(str(tmp_path / "task/functions.py"))
    assert functions["to_text"](lines[0]) == data.items[0].question
    assert [image.size for image in functions["to_images"](lines[0])] == [(SIZE, SIZE)]


def test_the_benchmark_lists_what_differs():
    red, blue, late = lmms.Scored("red", 1.0), lmms.Scored("blue", 0.0), lmms.Scored("red", 0.0)
    by_eval = {"1": red, "2": blue, "3": red}
    alike = lmms.Comparison("gridprune", 0.11, 2 / 3, dict(by_eval), by_eval)
    assert alike.equal and alike.different == []
    assert not replace(alike, reported=0.5).equal, "the mean that lmms-eval reports counts, too"
    for by_lmms, different in (
        (by_eval | {"2": red}, ["2"]),
        (by_eval | {"3": late}, ["3"]),
        ({"1": red, "3": red}, ["2"]),
        (by_eval | {"4": red}, ["4"]),
    ):
        other = replace(alike, by_lmms=by_lmms)
        assert other.different == different and not other.equal
    lines = list(lmms.report([alike, replace(alike, by_lmms=by_eval | {"2": red})]))
    assert lines[2:4] == ["| gridprune | 0.11 | 66.7 | 66.7 | 3 | 3 |", "| gridprune | 0.11 | 66.7 | 66.7 | 3 | 2 |"]
    assert len(lines) == 5 and lines[4].startswith("gridprune at 0.11, 2: ")


def test_a_run_without_results_ends_the_benchmark(tmp_path, monkeypatch):
    """lmms-eval ends with 0 where a model raises."""
    monkeypatch.setattr(lmms, "_run", lambda command: "Error during evaluation: keep=2.0: must be above 0")
    with pytest.raises(SystemExit, match="no results for gridprune at 2:\nError during evaluation"):
        lmms.run_lmms(tmp_path, tmp_path / "out", "gridprune", 2.0)


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LMMS_EVAL_PYTHON does not name a Python with lmms-eval; see docs/evaluation.md")
def test_lmms_eval_itself_scores_as_eval_does(tmp_path):
    """The embedded model, 100 held-out questions, two methods at two shares: equal question by question."""
    command = [PYTHON, "-m", "benchmarks.lmms", "--output", str(tmp_path / "run"), "--questions", "100"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert process.returncode == 0, process.stdout + process.stderr[-3000:]
    lines = process.stdout.splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| gridprune"] * 2 + ["| random"] * 2
    assert all(line.endswith(" | 100 | 100 |") for line in lines)
