"""A plug-in for lmms-eval, 0.7 or later: its tasks, answered from pruned images.

    lmms-eval --model gridprune --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=gridprune,keep=0.11 --tasks ...

lmms-eval finds it by the entry point `lmms_eval.models`. The options are those of `gridprune ask` for the model and
the pruning, with `_` for `-`; `pretrained` is `--model`.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from gridprune_cli.cache.files import canonical
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.opening import CACHE_OPTIONS, MODEL_OPTIONS, open_pipeline
from gridprune_cli.pruning.methods import with_image_seed
from gridprune_cli.runners.batches import result_or_raise
from gridprune_cli.selector import find_relevance
from gridprune_cli.settings import Pruning, Request

_PLACEHOLDER = "<image>"
_AS_PNG = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # modes that PNG holds as they are
_MAX_NEW_TOKENS = 128  # where a task sets none


def manifest() -> ModelManifest:
    """How lmms-eval finds the model."""
    return ModelManifest("gridprune", simple_class_path="gridprune_cli.integrations.lmms_eval.GridpruneModel")


class GridpruneModel(lmms):
    """A model of any supported family, whose images are pruned for each question.

    Images come before the text, as in most of lmms-eval's own models. Relevance is measured against the first line of
    the text, which is the bare question in most tasks; `query_lines=all` takes all of it, with the instructions on how
    to answer. Raises BadInput for options that `gridprune ask` would refuse, too.
    """

    is_simple = True

    def __init__(
        self, pretrained: str | None = None, batch_size: int | str = 1, query_lines: str = "first", **options: Any
    ) -> None:
        super().__init__()
        options.pop("max_batch_size", None)  # lmms-eval passes it where its command line has it
        if query_lines not in ("first", "all"):
            raise BadInput("not first or all", field="query_lines", value=query_lines)
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise BadInput("must be a number, 1 or more", field="batch_size", value=batch_size)
        if "model" in options:
            raise BadInput("name the model as pretrained", field="model", value=options["model"])
        of_model = {name: options.pop(name) for name in (*MODEL_OPTIONS, *CACHE_OPTIONS) if name in options}
        self.pruning = Pruning.from_options(options)
        self.pipeline = open_pipeline(of_model | {"model": pretrained})
        find_relevance(self.pipeline.family, self.pruning)
        self.batch = int(batch_size)
        self.runner = self.pipeline.runner(images=self.batch, questions=self.batch)
        self.first_line = query_lines == "first"

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests, in batches of neighbours that are generated alike."""
        answers: list[str] = []
        with self.pipeline:
            for _, alike in groupby(requests, key=lambda request: canonical(request.args[1])):
                group = list(alike)
                for start in range(0, len(group), self.batch):
                    batch = group[start : start + self.batch]
                    settings, stops = _settings(batch[0].args[1])
                    replies = self.runner.answer([self._request(instance) for instance in batch], **settings)
                    answers += [_until(result_or_raise(reply).text, stops) for reply in replies]
        return answers

    def _request(self, instance: Instance) -> Request:
        context, _, to_images, document, task, split = instance.args
        images = to_images(self.task_dict[task][split][document])
        if not images or not all(isinstance(image, Image.Image) for image in images):
            raise GridpruneError(f"{task}, document {document}: gridprune answers about images, and about nothing else")
        text = context.replace(f"{_PLACEHOLDER}\n", "").replace(_PLACEHOLDER, "").strip()
        query = self.pruning.query or (text.partition("\n")[0] if self.first_line else text)
        pictures = tuple(_bytes(image) for image in images)
        method = with_image_seed(self.pruning.method, hashlib.sha256(pictures[0]).hexdigest())
        return Request(pictures, text, replace(self.pruning, method=method, query=query))

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        raise GridpruneError("the model gridprune generates; tasks that compare likelihoods can't be run with it")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise GridpruneError("the model gridprune answers one question at a time; tasks of several rounds can't be run")


def _settings(kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's `generation_kwargs` as `generation.generate` takes them, and the texts at which an answer ends."""
    stops = kwargs.get("until") or []
    settings: dict[str, Any] = {"max_new_tokens": kwargs.get("max_new_tokens") or _MAX_NEW_TOKENS}
    if (kwargs.get("temperature") or 0) > 0 and kwargs.get("do_sample", True):
        settings |= {"do_sample": True, "temperature": kwargs["temperature"]}
        settings |= {"top_p": kwargs["top_p"]} if kwargs.get("top_p") is not None else {}
    if (kwargs.get("num_beams") or 1) > 1:
        settings["num_beams"] = kwargs["num_beams"]
    return settings, [stops] if isinstance(stops, str) else list(stops)


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def _bytes(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file, which is what encoded images are known by."""
    png = io.BytesIO()
    (image if image.mode in _AS_PNG else image.convert("RGB")).save(png, "PNG", compress_level=1)
    return png.getvalue()
