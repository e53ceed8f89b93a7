"""What commands ask of the server, done in the worker's thread by the same runners that the commands have."""

import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gridprune_cli.builder import remarks
from gridprune_cli.config import model_settings
from gridprune_cli.drawing import figure_of, to_png
from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.figure import coarse
from gridprune_cli.generation import Generated, check_generation, parse_generation
from gridprune_cli.pipeline import STEPS, Pipeline
from gridprune_cli.pruning.methods import METHODS
from gridprune_cli.runners.batches import as_error
from gridprune_cli.runners.local import Pruned, Runner
from gridprune_cli.selector import find_relevance
from gridprune_cli.serve.jobs import MAX_BATCH, Command, CommandJob, Finished, Turn
from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.replies import Outcome
from gridprune_cli.settings import Pruning, Request, check_pin
from gridprune_cli.tokens import PrunedSet
from gridprune_cli.vlm.checkpoint import EMBEDDED, model_key
from gridprune_cli.vlm.conversations import Conversations
from gridprune_cli.vlm.identity import list_files

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Done:
    """A job whose set is there: pruned now, or sent."""

    job: CommandJob
    pruned: PrunedSet
    hits: tuple[bool, ...] = ()
    image_notes: tuple[tuple[str, str], ...] = ()


class CommandRunner:
    """Does what `Command`s say, with the model of a pipeline. To be made before anything of the model is loaded."""

    def __init__(self, pipeline: Pipeline, metrics: Metrics):
        self._pipeline, self._metrics = pipeline, metrics
        self._runners: dict[tuple[bool, bool], Runner] = {}
        self._conversations = Conversations()
        self._files = self._list_files()
        self._key = model_key(pipeline.model)
        self._remembered = model_settings(self._key)

    # ---- of any thread -----------------------------------------------------------------------------------------------

    def check_options(self, pruning: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
        """Options for `generate`, from those of a command. Raises what would fail for every request with these."""
        options = parse_generation(generation.get("generation"), generation.get("max_new_tokens", 128))
        self._pruning(pruning)
        return options

    def _pruning(self, options: Mapping[str, Any]) -> Pruning:
        pruning = Pruning.from_options(options)
        if pruning.localizer not in ("relevance", "vlm"):
            reason = "the server loads no other model; take `no_server`"
            raise BadInput(reason, field="localizer", value=pruning.localizer)
        find_relevance(self._pipeline.family, pruning)
        if pruning.plc == "trained":
            _ = self._pipeline.family.compressor
        if "importance" in pruning.method.needs:
            _ = self._pipeline.family.pruning_module
        return pruning

    @property
    def fingerprint(self) -> str:
        return self._pipeline.family.fingerprint

    def describe(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the server is. `settings` are those that the pipeline was opened with."""
        family, encoder, store = self._pipeline.family, self._pipeline.encoder, self._pipeline.store
        checkpoint = family.checkpoint
        clip = family.clip.name if "clip" in vars(family) and family.clip else None
        in_force = {
            "clip": clip,
            "relevance": family.relevance_kind,
            "device": str(family.device),
            "dtype": str(family.dtype).removeprefix("torch."),
            "quantize": family.quantize,
        }
        plain = checkpoint.commit is None and checkpoint.name != EMBEDDED
        return {
            "model": checkpoint.name,
            "folder": os.path.realpath(checkpoint.folder) if plain else None,
            "chosen": not encoder.scenes_only,
            "key": self._key,
            "remembered": self._remembered,
            "changed": self._files != self._list_files(),
            "settings": {name: [settings.get(name), value] for name, value in in_force.items()},
            "cache_dtype": encoder.cache_dtype,
            "cache_dir": None if store is None else os.path.realpath(store.root),
            "method_options": sorted({name for method in METHODS.values() for name in method.__dataclass_fields__}),
        }

    def _list_files(self) -> list[tuple[Any, ...]]:
        try:
            return [*list_files(self._pipeline.family.checkpoint.folder)]
        except OSError:
            return []

    # ---- of the worker's thread --------------------------------------------------------------------------------------

    def work_on(self, jobs: Sequence[Turn]) -> None:
        """Does a batch of commands of one group. Whatever goes wrong is told to those that it concerns."""
        try:
            self._work_on(jobs)  # type: ignore[arg-type]
        except Exception as fault:
            unresolved = [job for job in jobs if not job.resolved]
            if len(jobs) == 1:
                if not isinstance(fault, GridpruneError):
                    _log.warning("a command failed", exc_info=fault)
                for job in unresolved:
                    job.tell(as_error(fault))
            else:  # one of them is at fault: find out which
                for job in unresolved:
                    self.work_on([job])
        if self._pipeline.store is not None:
            self._pipeline.store.release()

    def _work_on(self, jobs: Sequence[CommandJob]) -> None:
        first = jobs[0].command
        runner = self._runner(first.cache, first.scenes_only)
        stopwatch = runner.stopwatch
        stopwatch.ms.clear()
        with stopwatch.measure("total"):
            done = [self._load(job) for job in jobs] if first.pruned else self._prune(runner, jobs)
            results = self._generate(runner, [one for one in done if one]) if first.generation is not None else []
        ms = {step: stopwatch.ms.get(step, 0.0) for step in STEPS}
        if first.generation is None:
            results = [(one, None) for one in done if one]
        for one, generated in results:
            try:
                one.job.tell(self._finish(one, generated, ms))
            except GridpruneError as fault:
                one.job.tell(fault)

    def _runner(self, cache: bool, scenes_only: bool) -> Runner:
        if (cache, scenes_only) not in self._runners:
            encoder = self._pipeline.encoder
            store = encoder.store if cache else None
            of_cache = Encoder(encoder.family, store, encoder.cache_dtype, scenes_only)
            self._runners[cache, scenes_only] = Runner(of_cache, self._pipeline.localizers, questions=MAX_BATCH)
        return self._runners[cache, scenes_only]

    def _load(self, job: CommandJob) -> _Done | None:
        """The set that a command sent. One that is none is told to it."""
        assert job.command.pruned is not None
        name, data = job.command.pruned
        try:
            return _Done(job, PrunedSet.from_bytes(data, name))
        except GridpruneError as fault:
            job.tell(fault)
            return None

    def _prune(self, runner: Runner, jobs: Sequence[CommandJob]) -> list[_Done | None]:
        requests: list[Request] = []
        asking: list[CommandJob] = []
        for job in jobs:
            command = job.command
            try:
                pruning = self._pruning(command.pruning)
                if command.pin:
                    check_pin(pruning)
            except GridpruneError as fault:
                job.tell(fault)
                continue
            prompt = command.system, command.template, command.history
            requests.append(Request(command.images, command.question, pruning, *prompt))
            asking.append(job)
        parts = ("projector",) if jobs[0].command.generation is None else ("projector", "language")
        done: list[_Done | None] = []
        for index, result in runner.prune(requests, parts=parts, with_prefix=jobs[0].command.with_prefix):
            if isinstance(result, Pruned):
                self._metrics.add_images(result.hits)
                done.append(_Done(asking[index], result.pruned, result.hits, result.image_notes))
            else:
                asking[index].tell(result)
        return done

    def _generate(self, runner: Runner, done: Sequence[_Done]) -> list[tuple[_Done, Generated | None]]:
        """The answers; what fails is told to who asked."""
        done = [one for one in done if not one.job.cancelled]
        if not done:
            return []
        command = done[0].job.command
        options = check_generation(command.generation or {})
        if command.pin:
            options["conversations"] = self._conversations
        if command.stream:
            options["stream"] = _JobStream(done[0].job)
        if options.get("num_beams") in (None, 1):
            options["watchers"] = [lambda _, job=one.job: job.cancelled for one in done]
        results: list[tuple[_Done, Generated | None]] = []
        for index, generated in runner.generate([one.pruned for one in done], **options):
            if isinstance(generated, Generated):
                results.append((done[index], generated))
            else:
                done[index].job.tell(generated)
        return results

    def _finish(self, done: _Done, generated: Generated | None, ms: Mapping[str, float]) -> Finished:
        """What goes back to a command. Raises GridpruneError where a file or figure can't be made."""
        pruned, command = done.pruned, done.job.command
        ms = dict(ms)
        if generated is not None:
            ms |= {"prefill": generated.prefill, "decode": generated.decode}
        record = pruned.to_json()
        if generated is not None:
            counts = len(pruned.input_ids), pruned.placeholders, len(generated.ids)
            reason = "stop" if generated.ended else "length"
            outcome = Outcome(generated.text, *counts, reason, record | {"ms": ms})
            self._metrics.add_outcome(outcome)
        answer = None if generated is None else generated.text
        result = {
            "record": record,
            "counts": pruned.counts,
            "notes": list(pruned.notes),
            "image_notes": [list(pair) for pair in done.image_notes],
            "remarks": list(remarks(self._pipeline.family, self._pruning(command.pruning))) if done.hits else [],
            "hits": list(done.hits),
            "answer": answer,
            "ms": {step: round(value, 2) for step, value in ms.items()},
        }
        files = {}
        if command.file:
            files["file"] = pruned.to_bytes()
        if command.figure:
            files["figure"] = _draw(command, pruned, answer)
        return Finished(result, files)


def _draw(command: Command, pruned: PrunedSet, answer: str | None) -> bytes:
    figure = figure_of(command.images[0], pruned, answer)
    if command.figure == "png":
        return to_png(figure)
    return coarse(figure, colour=command.figure == "colour").encode()


class _JobStream(io.TextIOBase):
    """Has what is written told to who asked."""

    def __init__(self, job: Turn):
        self._job = job

    def write(self, text: str) -> int:
        if text:
            self._job.tell(text)
        return len(text)
