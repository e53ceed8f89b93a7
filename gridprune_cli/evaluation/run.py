"""Asks every question under every cell, and keeps each answer on disk as it comes, so that a stopped run goes on."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gridprune_cli.cache.files import write_atomic
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.evaluation.data import Data, Item, one_or_all
from gridprune_cli.evaluation.metrics import METRICS
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.pruning.methods import make_method, with_image_seed
from gridprune_cli.runners.batches import in_order, result_or_raise
from gridprune_cli.runners.local import Runner
from gridprune_cli.settings import Pruning, Request
from gridprune_cli.text import to_json
from gridprune_cli.tokens import EncodedImage, PrunedSet
from gridprune_cli.vlm.compressor import FILE as COMPRESSOR
from gridprune_cli.vlm.pruning_module import FILE as PRUNING_MODULE

SETTINGS, SAMPLES = "settings.json", "samples.jsonl"


@dataclass(frozen=True)
class Cell:
    """One row of the results: a pruning, under the name that it was asked for by."""

    name: str
    pruning: Pruning

    def options(self) -> dict[str, Any]:
        """Everything that the pruning has beside the method's name and K: the method's options, and its settings."""
        names = [field.name for field in fields(Pruning) if field.name not in ("keep", "tokens", "method")]
        return asdict(self.pruning.method) | _plain({name: getattr(self.pruning, name) for name in names})

    def for_image(self, sha256: str) -> "Cell":
        """This cell for one image: a method with a seed gets the image's own."""
        method = with_image_seed(self.pruning.method, sha256)
        return replace(self, pruning=replace(self.pruning, method=method))


FULL = Cell("all tokens", Pruning(keep=1.0, method=make_method("uniform"), region="none"))
"""What all cells are compared with; part of every evaluation."""


@dataclass(frozen=True)
class Plan:
    """All that decides an evaluation's answers and scores, beside the model.

    suffix  follows the question in the prompt, on a line of its own; relevance is measured against the bare question
    prompt  `system` and `template`, as `Pipeline.prune` takes them
    batch   questions that are answered at once
    """

    data: Data
    cells: tuple[Cell, ...]
    metric: str = "exact"
    suffix: str = ""
    prompt: dict[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 16
    batch: int = 16

    def __post_init__(self) -> None:
        """Puts `FULL` first. Raises BadInput for two cells that are one, or answers that the metric can't score."""
        if FULL not in self.cells:
            object.__setattr__(self, "cells", (FULL, *self.cells))
        named = [(cell.name, cell.pruning.keep) for cell in self.cells]
        for name, keep in named:
            if named.count((name, keep)) > 1:
                raise BadInput(f"--methods: {name} at {keep:g} is named twice")
        for item in self.data.items:
            try:
                METRICS[self.metric]("", item.answers)
            except ValueError as fault:
                raise BadInput(f"--metric {self.metric}: question {item.id}: {fault}") from fault

    @property
    def count(self) -> int:
        """Answers in all."""
        return len(self.cells) * len(self.data.items)

    @property
    def optional(self) -> tuple[str, ...]:
        """The optional signals of encoded images that some cell's method needs."""
        return tuple(dict.fromkeys(name for cell in self.cells for name in cell.pruning.optional))

    def settings(self, pipeline: Pipeline) -> dict[str, Any]:
        """What must be the same for a stopped run to go on."""
        family = pipeline.family
        relevance = any(cell.pruning.needs_relevance for cell in self.cells)
        by_model = any(cell.pruning.method.relevance_sign == 0 for cell in self.cells)
        return {
            "data": self.data.name,
            "questions": len(self.data.items),
            "data_digest": self.data.digest,
            "model": pipeline.model,
            "model_digest": family.checkpoint.identity,
            "relevance": family.relevance_source if relevance else None,
            "relevance_sign": family.relevance_sign if by_model else None,
            "relevance_digest": family.clip.identity if relevance and family.clip else None,
            "device": str(family.device),
            "dtype": str(family.dtype).removeprefix("torch."),
            "quantize": family.quantize,
            "storage": pipeline.encoder.cache_dtype,
            "metric": self.metric,
            "suffix": self.suffix,
            "prompt": self.prompt,
            "max_new_tokens": self.max_new_tokens,
            "batch": self.batch,
            "cells": [
                {"name": cell.name, "method": cell.pruning.method.name, "keep": cell.pruning.keep}
                | {"options": cell.options()}
                for cell in self.cells
            ],
            "versions": {name: version(name) for name in ("gridprune", "torch", "transformers")},
        } | self._settings_of_some(pipeline)

    def _settings_of_some(self, pipeline: Pipeline) -> dict[str, Any]:
        """What else decides answers, each where some cell uses it: trained modules, localisers, a selection's layer."""
        family, prunings = pipeline.family, [cell.pruning for cell in self.cells]
        counts = {len(item.images) for item in self.data.items}
        localizers = [pipeline.localizers.find(pruning, count) for pruning in prunings for count in counts]
        settings: dict[str, Any] = {}
        if any(pruning.plc == "trained" for pruning in prunings):
            settings["compressor_digest"] = _file_digest(family.checkpoint.folder / COMPRESSOR)
        if any("importance" in pruning.method.needs for pruning in prunings):
            settings["covipal_digest"] = _file_digest(family.checkpoint.folder / PRUNING_MODULE)
        if digests := sorted({localizer.family.checkpoint.identity for localizer in localizers if localizer}):
            settings["localizer_digests"] = digests
        if any(pruning.ilp == "selection" for pruning in prunings):
            settings["relevance_depth"] = family.relevance_depth
        return settings


@dataclass(frozen=True, slots=True)
class Row:
    """An answer, as far as the results need it. `key` is the encoded image's, of several all of them with spaces
    between; it tells images apart."""

    answer: str
    score: float
    kept: int
    key: str
    region: tuple[int, int, int, int] | None


Rows = dict[tuple[str, float, Any], Row]
"""By the cell's name, its keep, and the question's id."""


def resume(pipeline: Pipeline, plan: Plan, folder: Path) -> Rows:
    """The answers that the folder of an earlier, stopped run holds; of a new one none. Makes the folder.

    Raises BadInput where it holds a run with other settings, or is damaged, GridpruneError where it can't be used.
    """
    _agree(folder, json.loads(json.dumps(plan.settings(pipeline))))
    return _read_samples(folder / SAMPLES, plan)


def fill(pipeline: Pipeline, plan: Plan, folder: Path, rows: Rows, step: Callable[[], None]) -> None:
    """Answers what is not in `rows` yet, there and as lines of `folder/samples.jsonl`; calls `step` after each.

    Raises GridpruneError where the file can't be written.
    """
    try:
        with open(folder / SAMPLES, "ab") as file:
            for lines in answers(pipeline, plan, rows):
                file.write(b"".join(to_json(line).encode(*_UTF8) + b"\n" for line in lines))
                file.flush()
                for _ in lines:
                    step()
    except OSError as fault:
        raise GridpruneError(f"{folder / SAMPLES}: can't be written ({fault.strerror}); check the disk") from fault


_UTF8 = ("utf-8", "backslashreplace")  # half a surrogate pair becomes its JSON escape


def answers(pipeline: Pipeline, plan: Plan, rows: Rows) -> Iterator[list[dict[str, Any]]]:
    """Answers what is not in `rows` yet, puts it there, and gives it as lines, a batch of one cell at a time.

    Questions about one image follow each other, so that it is encoded once. A batch that was answered in part is
    answered again whole: its answers must not depend on where a run stopped.
    """
    runner = pipeline.runner(questions=plan.batch)
    encoded: Encoded = {}
    for batch in batches(plan):
        todo = [cell for cell in plan.cells if any(place(cell, item) not in rows for item in batch)]
        if todo:
            encoded = encode(runner, plan.data, batch, encoded, plan.optional)
        for cell in todo:
            sets = prune(runner, plan, cell, batch, encoded)
            generated = in_order(runner.generate(sets, max_new_tokens=plan.max_new_tokens))
            lines = []
            for item, pruned, answer in zip(batch, sets, generated, strict=True):
                text = result_or_raise(answer).text
                if place(cell, item) not in rows:
                    seeded = cell.for_image(encoded[_image_variants(item)[0]].image)
                    lines.append(_line(plan, item, seeded, pruned, text))
                    rows[place(cell, item)] = _row(lines[-1])
            yield lines


def prune(runner: Runner, plan: Plan, cell: Cell, batch: list[Item], encoded: "Encoded") -> list[PrunedSet]:
    """The pruned sets of a batch of questions under a cell. Raises the error of the first that fails.

    None goes on from a prefix that may be in the cache or not: answers are the same to their last bit wherever a run
    stopped. A selection always does.
    """
    requests = []
    for item in batch:
        images = tuple(encoded[variant] for variant in _image_variants(item))
        pruning = cell.for_image(images[0].image).pruning
        question = f"{item.question}\n{plan.suffix}" if plan.suffix else item.question
        requests.append(
            Request(images, question, replace(pruning, query=pruning.query or item.question), **plan.prompt)
        )
    with_prefix = None if cell.pruning.ilp == "selection" else False
    return [result_or_raise(result).pruned for result in in_order(runner.prune(requests, with_prefix=with_prefix))]


def batches(plan: Plan) -> list[list[Item]]:
    """The questions in batches of `plan.batch`, those about one image one after the other."""
    by_images: dict[tuple[str, ...], list[Item]] = {}
    for item in plan.data.items:
        by_images.setdefault(item.images, []).append(item)
    items = [item for group in by_images.values() for item in group]
    return [items[start : start + plan.batch] for start in range(0, len(items), plan.batch)]


Encoded = dict[tuple[str, bool], EncodedImage]  # by image, and whether it is one of several in its question


def _image_variants(item: Item) -> list[tuple[str, bool]]:
    """Each image of a question, and whether it is one of several: some families encode it in another way then."""
    return [(image, len(item.images) > 1) for image in item.images]


def encode(runner: Runner, data: Data, batch: list[Item], before: Encoded, optional: Collection[str] = ()) -> Encoded:
    """The encoded images of a batch: from the batch before, from the cache, and the rest through the tower together.

    `optional` are names of the optional signals that they are to have.

    Raises BadInput for an image that can't be read.
    """
    variants = dict.fromkeys(variant for item in batch for variant in _image_variants(item))
    encoded = {variant: before[variant] for variant in variants if variant in before}
    for several in (False, True):
        new = [variant for variant in variants if variant not in before and variant[1] == several]
        results = runner.encode([data.find(image) for image, _ in new], several=several, optional=optional)
        for variant, (_, result, _) in zip(new, results, strict=True):
            encoded[variant] = replace(result_or_raise(result), name=variant[0])
    return encoded


def place(cell: Cell, item: Item) -> tuple[str, float, Any]:
    """Where an answer lies in `Rows`."""
    return cell.name, cell.pruning.keep, item.id


def _line(plan: Plan, item: Item, cell: Cell, pruned: PrunedSet, answer: str) -> dict[str, Any]:
    """All that it takes to make this answer again, and to see how it came to be."""
    return {
        "id": item.id,
        "image": item.image,
        "key": one_or_all([origin.key for origin in pruned.images]),
        "question": item.question,
        "category": item.category,
        "cell": cell.name,
        "method": cell.pruning.method.name,
        "options": cell.options(),
        "keep": cell.pruning.keep,
        "kept": len(pruned.kept),
        "tokens": pruned.count,
        "region": one_or_all([origin.region for origin in pruned.images]),
        "relevance": pruned.relevance_source,
        "notes": list(pruned.notes),
        "answer": answer,
        "answers": list(item.answers),
        "score": METRICS[plan.metric](answer, item.answers),
    }


def _row(line: dict[str, Any]) -> Row:
    if isinstance(line["image"], list):
        return Row(line["answer"], line["score"], line["kept"], " ".join(line["key"]), None)
    region = tuple(line["region"]) if line["region"] else None
    return Row(line["answer"], line["score"], line["kept"], line["key"], region)


def _file_digest(path: Path) -> str | None:
    """sha256 of a file; None where there is none, which pruning will tell."""
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(value: Any) -> Any:
    """A value as JSON has it; of a dataclass, its fields."""
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple, set, frozenset)) else value


# ---- going on --------------------------------------------------------------------------------------------------------


def _agree(folder: Path, settings: dict[str, Any]) -> None:
    """Notes the settings of a new run. Raises BadInput where the folder holds a run with others."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        raise BadInput(f"-o {folder}: can't be made ({fault.strerror}); name another folder") from fault
    path = folder / SETTINGS
    if not path.exists():
        if (folder / SAMPLES).exists():
            raise BadInput(f"-o {folder}: answers without {SETTINGS}; name another folder")
        write_atomic(path, json.dumps(settings, indent=1, ensure_ascii=False).encode(*_UTF8) + b"\n", sync=True)
        return
    try:
        before = json.loads(path.read_text("utf-8"))
        differing = [name for name in settings if before.get(name) != settings[name]]
    except (OSError, ValueError, AttributeError, RecursionError) as fault:
        raise BadInput(f"{path}: can't be read ({fault}); name another folder") from fault
    if differing:
        raise BadInput(
            f"-o {folder}: holds a run with other settings ({', '.join(differing)}); name another folder, or remove it"
        )


def _read_samples(path: Path, plan: Plan) -> Rows:
    """The answers of an earlier run; a last line that was torn is dropped, from the file too."""
    rows: Rows = {}
    if not path.exists():
        return rows
    places = {place(cell, item) for cell in plan.cells for item in plan.data.items}
    whole = 0
    try:
        with open(path, "rb") as file:
            for number, text in enumerate(file, 1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                    where = (line["cell"], line["keep"], line["id"])
                    if where not in places:
                        raise ValueError(f"no answer of this run: {where}")
                    rows[where] = _row(line)
                except (ValueError, KeyError, TypeError, RecursionError) as fault:
                    raise BadInput(f"{path}:{number}: damaged ({fault}); remove the folder and start again") from fault
                whole += len(text)
        if path.stat().st_size > whole:
            with open(path, "rb+") as file:
                file.truncate(whole)
    except OSError as fault:
        raise GridpruneError(f"{path}: can't be read or mended ({fault.strerror}); check its permissions") from fault
    return rows
