"""The plug-in for lmms-eval: with the package itself where it is installed, else with the little of it that is used."""

import abc
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method
from gridprune_cli.runners.local import Runner
from gridprune_cli.scenes.scene import draw, make_scene
from gridprune_cli.settings import Pruning


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


@pytest.mark.skipif(not installed(), reason="lmms-eval is not installed; see docs/evaluation.md")
def test_lmms_eval_itself_runs_a_local_task(documents, tmp_path, tiny_llava):
    lines = [{"image": str(d["image"]), "question": d["question"], "answer": "yes"} for d in documents]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "local.yaml").write_text(
        f"""
task: local
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "data.jsonl"}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.to_images
doc_to_text: !function utils.to_text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 3, temperature: 0, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
    )
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n\n"
        "def to_images(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n\n"
        "def to_text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question'] + '\\nShortly.'\n"
    )
    command = [sys.executable, "-m", "lmms_eval", "--model", "gridprune", "--tasks", "local"]
    command += ["--model_args", f"pretrained={tiny_llava},method=gridprune,keep=0.5", "--batch_size", "4"]
    command += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / "out"), "--log_samples"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (samples,) = (tmp_path / "out").rglob("*_samples_local.jsonl")
    logged = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples.read_text().splitlines())}
    pipeline = Pipeline(str(tiny_llava))
    for n, document in enumerate(documents):
        pruning = Pruning(keep=0.5, query=document["question"])
        answer = pipeline.ask(document["image"], f"{document['question']}\nShortly.", pruning, max_new_tokens=3)
        assert logged[n] in (answer.text, [answer.text])  # 0.7.3 logs the text, others a list
