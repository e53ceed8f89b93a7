"""A batch of jobs to answers, which are streamed as they come.

This module imports torch: the worker imports it in its thread, once the server is up.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gridprune_cli.encoder import Encoder
from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.figure.plain import plain_figures
from gridprune_cli.generation import Generated
from gridprune_cli.pipeline import Pipeline
from gridprune_cli.runners.batches import as_error
from gridprune_cli.runners.local import Pruned, Runner
from gridprune_cli.serve.jobs import MAX_BATCH, Job, Started
from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.replies import Outcome
from gridprune_cli.settings import Pruning, Request

_log = logging.getLogger(__name__)


class Answerer:
    """Answers batches of jobs with one model, which is loaded at once, so that the first job waits for nothing more.

    defaults    options of pruning that hold where a request names none
    max_tokens  of an answer, where a request names none

    Raises GridpruneError where the model can't be loaded, BadInput for defaults that can't be.
    """

    def __init__(self, pipeline: Pipeline, metrics: Metrics, defaults: Mapping[str, Any], max_tokens: int):
        self._metrics, self._defaults, self._max_tokens = metrics, defaults, max_tokens
        self._store = pipeline.store
        pruning, encoder = Pruning.from_options(defaults), pipeline.encoder
        pipeline.family.load("tower", "projector", "language")
        if pruning.needs_relevance:
            pipeline.family.load_relevance()
        uncached = Encoder(encoder.family, None, encoder.cache_dtype, encoder.scenes_only)
        self._runners = {  # with the cache, and without
            cache: Runner(of_cache, pipeline.localizers, questions=MAX_BATCH)
            for cache, of_cache in ((True, encoder), (False, uncached))
        }

    def answer(self, jobs: Sequence[Job]) -> None:
        """Answers a batch. Whatever goes wrong is told to the jobs that it concerns."""
        requests: list[tuple[Job, Request]] = []
        for job in jobs:
            try:
                requests.append((job, self._request(job)))
            except Exception as fault:
                job.tell(as_error(fault))
        try:
            self._answer_batch(requests)
        except Exception as fault:
            unresolved = [(job, request) for job, request in requests if not job.resolved]
            if len(requests) == 1:
                if not isinstance(fault, GridpruneError):
                    _log.warning("a request failed", exc_info=fault)
                for job, _ in unresolved:
                    job.tell(as_error(fault))
            else:  # one of them is at fault: find out which
                for job, _ in unresolved:
                    self.answer([job])
        if self._store is not None:
            self._store.release()

    def _request(self, job: Job) -> Request:
        """The request as the library knows it. Raises BadInput for options that can't be."""
        chat = job.request
        pruning = Pruning.from_options({**self._defaults, **chat.pruning})
        return Request(job.pictures, chat.question, pruning, chat.system, chat.template, chat.history)

    def _answer_batch(self, requests: Sequence[tuple[Job, Request]]) -> None:
        if not requests:
            return
        runner, sampling = self._runners[requests[0][0].request.cache], requests[0][0].request.sampling
        # 1. pruned; what can't be is told at once
        start = time.monotonic()
        pruned: list[tuple[Job, Pruned]] = []
        for index, result in runner.prune([request for _, request in requests], parts=("projector", "language")):
            job = requests[index][0]
            if isinstance(result, GridpruneError):
                job.tell(result)
                continue
            self._metrics.add_images(result.hits)
            if not job.cancelled:
                job.tell(Started())
                pruned.append((job, result))
        waits = {job: start - job.arrived for job, _ in pruned}
        prune_seconds = time.monotonic() - start
        # 2. answered, each up to its own length
        answering: list[Answer] = []
        for job, result in pruned:
            answer = Answer(job, runner, result, self._max_tokens)
            if answer.limit > 0:
                answering.append(answer)
            else:
                reason = "the prompt leaves no position for an answer; ask shorter, or with fewer images"
                job.tell(BadInput(reason))
        if not answering:
            return
        if sampling.temperature:
            _seed(sampling.seed)
        for index, generated in runner.generate(
            [answer.pruned.pruned for answer in answering],
            max_new_tokens=max(answer.limit for answer in answering),
            watchers=[answer.watch for answer in answering],
            **sampling.to_options(),
        ):
            answer = answering[index]
            if isinstance(generated, GridpruneError):
                answer.job.tell(generated)
                continue
            ms = {"wait": waits[answer.job], "prune": prune_seconds}
            outcome = answer.outcome(generated, {name: 1e3 * seconds for name, seconds in ms.items()}, len(answering))
            if not answer.job.cancelled:
                self._metrics.add_outcome(outcome)
            answer.job.tell(outcome)


class Answer:
    """The answer to a job as it comes: it is streamed, ended at a stop text or its length, or where nobody waits.

    limit  tokens that it may have: as many as were asked for, and as the model's positions leave. At most 0: none
    """

    def __init__(self, job: Job, runner: Runner, pruned: Pruned, max_tokens: int):
        self.job, self.pruned = job, pruned
        self._tokenizer = runner.family.processor.tokenizer
        most = getattr(runner.family.text_config, "max_position_embeddings", None)
        self.limit = job.request.max_tokens or max_tokens
        if most is not None:
            self.limit = min(self.limit, most - int(pruned.pruned.position_ids.max()) - 1)
        self._stopped: str | None = None  # the answer up to a stop text

    def watch(self, ids: Sequence[int]) -> bool:
        """Streams what is new of the answer, and says whether it ends here. A `Watcher`."""
        if self.job.cancelled:
            return True
        request = self.job.request
        if request.stream or request.stop:
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
            places = [place for stop in request.stop if (place := text.find(stop)) >= 0]
            if places:
                self._stopped = text[: min(places)].strip()
            elif request.stream:
                self._send(_settled(text, request.stop))
        return self._stopped is not None or len(ids) >= self.limit

    def outcome(self, generated: Generated, ms: dict[str, float], batch: int) -> Outcome:
        """What became of the job, after the rest of the text was streamed."""
        text = generated.text if self._stopped is None else self._stopped
        if self.job.request.stream:
            self._send(text)
        pruned = self.pruned.pruned
        ms |= {"prefill": generated.prefill, "decode": generated.decode}
        ms["total"] = 1e3 * (time.monotonic() - self.job.arrived)
        hits, names = ["hit" if hit else "miss" for hit in self.pruned.hits], list(self.job.names)
        record = {
            **pruned.to_json(),
            "image": names if len(names) > 1 else names[0],
            "cache": hits if len(hits) > 1 else hits[0],
            "batch": batch,
            "ms": {name: round(value, 2) for name, value in ms.items()},
        }
        if self.job.request.figure:
            figures = plain_figures(pruned)
            record["figure"] = figures if len(figures) > 1 else figures[0]
        return Outcome(
            text,
            prompt_tokens=len(pruned.input_ids),
            image_tokens=pruned.placeholders,
            completion_tokens=len(generated.ids),
            reason="stop" if generated.ended or self._stopped is not None else "length",
            record=record,
        )

    def _send(self, text: str) -> None:
        sent = self.job.sent
        if len(text) > len(sent) and text.startswith(sent):
            self.job.tell(text[len(sent) :])
            self.job.sent = text


def _settled(text: str, stops: Sequence[str]) -> str:
    """The beginning of an answer so far that no further token changes: answers are stripped, and end at stop texts."""
    text = text.lstrip()
    end = len(text.rstrip("\ufffd \t\r\n"))  # half a character, or white space that may be the last
    for stop in stops:
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                end = min(end, len(text) - length)
                break
    return text[:end].rstrip()


def _seed(seed: int | None) -> None:
    if seed is None:
        torch.seed()  # else an earlier request's seed would decide
    else:
        torch.manual_seed(seed)
