"""The one thread that works with the model: it opens it, then answers what waits, batch by batch.

torch is imported in this thread, when it starts.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from gridprune_cli.errors import BadInput, GridpruneError
from gridprune_cli.serve.jobs import FairQueue, Job, Started
from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.replies import Outcome
from gridprune_cli.serve.wire import Refusal

if TYPE_CHECKING:
    from gridprune_cli.generation import Generated
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.runners.local import Pruned, Runner
    from gridprune_cli.settings import Request

MAX_BATCH = 32  # questions that are answered together, as in `batch`
GATHER = 0.004  # seconds that others are waited for where the last batch had several: clients come back together
RETRY_AFTER = 2  # seconds

_log = logging.getLogger(__name__)


class Worker:
    """The model, its queue, and the thread between them.

    open_pipeline  called in the thread
    defaults     options of pruning that hold where a request names none
    max_tokens   of an answer, where a request names none
    max_waiting  requests that may wait; more are refused

    fault        why the model can't be opened, once that is known
    """

    def __init__(
        self,
        open_pipeline: Callable[[], "Pipeline"],
        metrics: Metrics,
        *,
        defaults: Mapping[str, Any] | None = None,
        max_tokens: int = 128,
        max_waiting: int = 64,
    ):
        self._open_pipeline, self._metrics = open_pipeline, metrics
        self.defaults, self._max_tokens, self._max_waiting = defaults or {}, max_tokens, max_waiting
        self._queue, self._changed = FairQueue(), Condition()
        self._stopping = False
        self._last_batch = 0
        self._runners: dict[bool, Runner] = {}  # with the cache, and without
        self._thread = Thread(target=self._run, name="gridprune-worker", daemon=True)
        self.pipeline: Pipeline | None = None  # once it is open
        self.fault: Exception | None = None

    # ---- of any thread -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def check_ready(self) -> "Pipeline":
        """The pipeline. Raises Refusal with 503 while it is not open, or not any more."""
        if self._stopping:
            raise Refusal(503, "the server is stopping", code="stopping", retry_after=RETRY_AFTER)
        if self.pipeline is None:
            raise Refusal(503, "the model is being loaded", code="loading", retry_after=RETRY_AFTER)
        return self.pipeline

    def check_room(self) -> None:
        """Raises Refusal with 429 where too many wait already."""
        if len(self._queue) >= self._max_waiting:
            raise Refusal(429, "too many requests are waiting", code="too_many_waiting", retry_after=RETRY_AFTER)

    def submit(self, job: Job) -> None:
        """Puts a job into the queue. Raises Refusal as `check_ready` and `check_room`."""
        with self._changed:
            self.check_ready()
            self.check_room()
            self._queue.put(job)
            self._changed.notify()

    @property
    def waiting(self) -> int:
        return len(self._queue)

    def stop(self) -> None:
        """Refuses what waits and what comes; the batch that is being answered is finished."""
        with self._changed:
            self._stopping = True
            refused = self._queue.remove(lambda _: True)
            self._changed.notify()
        for job in refused:
            job.tell(Refusal(503, "the server is stopping", code="stopping", retry_after=RETRY_AFTER))

    def join(self) -> None:
        """Stops, and waits until the last batch is done."""
        self.stop()
        self._thread.join()

    # ---- of its own thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._load()
        except Exception as fault:
            self.fault = fault
            self.stop()
            return
        while jobs := self._next():
            start = time.monotonic()
            self._answer(jobs)
            self._metrics.add_batch(len(jobs), time.monotonic() - start)
        if self.pipeline and self.pipeline.store:
            self.pipeline.store.finish()

    def _load(self) -> None:
        """Opens the model and loads what every request needs, so that the first one waits for nothing more."""
        pipeline = self._open_pipeline()
        from gridprune_cli.encoder import Encoder
        from gridprune_cli.runners.local import Runner
        from gridprune_cli.settings import Pruning

        pruning = Pruning.from_options(self.defaults)
        encoder = pipeline.encoder
        uncached = Encoder(encoder.family, None, encoder.cache_dtype, encoder.scenes_only)
        pipeline.family.load("tower", "projector", "language")
        if pruning.needs_relevance:
            pipeline.family.load_relevance()
        for cache, of_cache in ((True, encoder), (False, uncached)):
            self._runners[cache] = Runner(of_cache, pipeline.localizers, questions=MAX_BATCH)
        self.pipeline = pipeline

    def _next(self) -> list[Job]:
        """The next batch; nothing once the worker stops."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or len(self._queue))
            if self._last_batch > 1 and not self._stopping:
                end = time.monotonic() + GATHER
                while len(self._queue) < self._last_batch and (left := end - time.monotonic()) > 0:
                    self._changed.wait(left)
            jobs = self._queue.take(MAX_BATCH)
        self._last_batch = len(jobs)
        if not jobs and not self._stopping:  # those that waited have left
            return self._next()
        return jobs

    def _answer(self, jobs: Sequence[Job]) -> None:
        """Answers a batch. Whatever goes wrong is told to the jobs that it concerns."""
        from gridprune_cli.runners.batches import as_error

        requests: list[tuple[Job, Request]] = []
        for job in jobs:
            try:
                requests.append((job, self._request(job)))
            except GridpruneError as fault:
                job.tell(fault)
        try:
            self._answer_together(requests)
        except Exception as fault:
            unresolved = [(job, request) for job, request in requests if not job.resolved]
            if len(requests) == 1:
                if not isinstance(fault, GridpruneError):
                    _log.warning("a request failed", exc_info=fault)
                for job, _ in unresolved:
                    job.tell(as_error(fault))
            else:  # one of them is at fault: find out which
                for job, _ in unresolved:
                    self._answer([job])
        store = self.pipeline.store if self.pipeline else None
        if store is not None:
            store.release()

    def _request(self, job: Job) -> "Request":
        """The request as the library knows it. Raises BadInput for options that can't be."""
        from gridprune_cli.settings import Pruning, Request

        chat = job.request
        pruning = Pruning.from_options({**self.defaults, **chat.pruning})
        return Request(job.pictures, chat.question, pruning, chat.system, chat.template)

    def _answer_together(self, requests: Sequence[tuple[Job, "Request"]]) -> None:
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
            elif not job.cancelled:
                job.tell(Started())
                pruned.append((job, result))
        waits = {job: start - job.arrived for job, _ in pruned}
        prune_seconds = time.monotonic() - start
        # 2. answered, each up to its own length
        answers = [Answer(job, runner, result, self._max_tokens) for job, result in pruned]
        answering = [answer for answer in answers if not job_is_refused(answer)]
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
                self._metrics.add_outcome(outcome, answer.pruned.hits)
            answer.job.tell(outcome)


class Answer:
    """The answer to a job as it comes: it is streamed, ended at a stop text or its length, or where nobody waits.

    limit  tokens that it may have: as many as were asked for, and as the model's positions leave. At most 0: none
    """

    def __init__(self, job: Job, runner: "Runner", pruned: "Pruned", max_tokens: int):
        self.job, self.pruned = job, pruned
        self._tokenizer = runner.family.processor.tokenizer
        most = getattr(runner.family.config.get_text_config(), "max_position_embeddings", None)
        self.limit = job.request.max_tokens or max_tokens
        if most is not None:
            self.limit = min(self.limit, most - int(pruned.pruned.position_ids.max()) - 1)
        self._sent = ""
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

    def outcome(self, generated: "Generated", ms: dict[str, float], batch: int) -> Outcome:
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
            figures = pruned.figures()
            record["figure"] = figures if len(figures) > 1 else figures[0]
        return Outcome(
            text,
            prompt_tokens=len(pruned.input_ids),
            image_tokens=len(pruned.image_embeds),
            completion_tokens=len(generated.ids),
            reason="stop" if generated.ended or self._stopped is not None else "length",
            record=record,
        )

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent) and text.startswith(self._sent):
            self.job.tell(text[len(self._sent) :])
            self._sent = text


def job_is_refused(answer: Answer) -> bool:
    """Whether there is no room for an answer behind the prompt; the job is told."""
    if answer.limit > 0:
        return False
    answer.job.tell(BadInput("the prompt leaves no position for an answer; ask shorter, or with fewer images"))
    return True


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
    import torch

    if seed is None:
        torch.seed()  # else an earlier request's seed would decide
    else:
        torch.manual_seed(seed)
