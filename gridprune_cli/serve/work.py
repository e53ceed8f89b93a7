"""The one thread that works with the model: it opens it, then answers what waits, batch by batch.

torch is imported in this thread, when it starts.
"""

import time
from collections.abc import Callable, Mapping
from threading import Condition, Thread
from typing import TYPE_CHECKING, Any

from gridprune_cli.serve.jobs import MAX_BATCH, FairQueue, Job, Turn
from gridprune_cli.serve.metrics import Metrics
from gridprune_cli.serve.wire import Refusal

if TYPE_CHECKING:
    from gridprune_cli.pipeline import Pipeline
    from gridprune_cli.serve.command_work import CommandRunner

GATHER = 0.004  # seconds that others are waited for where the last batch had several: clients come back together
RETRY_AFTER = 2  # seconds


class Worker:
    """The model, its queue, and the thread between them.

    open_pipeline  gives the model with its cache; called in the thread
    defaults       options of pruning that hold where a request names none
    max_tokens     of an answer, where a request names none
    max_waiting    requests that may wait; more are refused

    fault  why the thread has ended, where that was not wanted: above all, that the model can't be opened
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
        self._thread = Thread(target=self._run, name="gridprune-worker", daemon=True)
        self.commands: CommandRunner | None = None
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
        if self.waiting >= self._max_waiting:
            raise Refusal(429, "too many requests are waiting", code="too_many_waiting", retry_after=RETRY_AFTER)

    def submit(self, job: Turn) -> None:
        """Puts a job into the queue. Raises Refusal as `check_ready` and `check_room`."""
        with self._changed:
            self.check_ready()
            self.check_room()
            self._queue.put(job)
            self._changed.notify()

    def withdraw(self, job: Turn) -> None:
        """Takes a job that nobody waits for any more out of the queue, if it is there."""
        job.cancelled = True
        with self._changed:
            self._queue.remove(lambda other: other is job)

    @property
    def waiting(self) -> int:
        """How many jobs are in the queue."""
        with self._changed:
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
        jobs: list[Turn] = []
        try:
            from gridprune_cli.serve.answering import Answerer
            from gridprune_cli.serve.command_work import CommandRunner

            pipeline = self._open_pipeline()
            self.commands = CommandRunner(pipeline, self._metrics)
            answerer = Answerer(pipeline, self._metrics, self.defaults, self._max_tokens)
            self.pipeline = pipeline
            while jobs := self._next():
                start = time.monotonic()
                if chats := [job for job in jobs if isinstance(job, Job)]:
                    answerer.answer(chats)
                else:
                    self.commands.work_on(jobs)
                self._metrics.add_batch(time.monotonic() - start)
            if pipeline.store is not None:
                pipeline.store.finish()
        except Exception as fault:  # the server ends with it: without this thread nobody would be answered
            self.fault = fault
            self.stop()
            for job in jobs:
                job.tell(fault)

    def _next(self) -> list[Turn]:
        """The next batch; nothing once the worker stops."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._stopping or len(self._queue))
                if self._last_batch > 1 and not self._stopping:
                    end = time.monotonic() + GATHER
                    while len(self._queue) < self._last_batch and (left := end - time.monotonic()) > 0:
                        self._changed.wait(left)
                jobs = self._queue.take(MAX_BATCH)
                self._last_batch = len(jobs)
                if jobs or self._stopping:  # else those that waited have left
                    return jobs
