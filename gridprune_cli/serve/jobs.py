"""Requests that wait for their turn, in the order of fairness."""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic

from gridprune_cli.serve.replies import Outcome
from gridprune_cli.serve.wire import ChatRequest

MAX_BATCH = 32  # jobs that are answered together, as many questions as in `batch`

Client = tuple[str, str]
"""Who asks: the host's address, and the `user` that a request names."""


@dataclass(frozen=True)
class Started:
    """The pictures were read and the request was pruned: nothing but the answer is missing."""


@dataclass(frozen=True)
class Left:
    """The client has gone."""


Event = Started | str | Outcome | Exception | Left
"""What a job tells who waits for it: that it started, pieces of the answer; last the outcome, or what failed."""


@dataclass(eq=False)
class Job:
    """A request on its way through the queue and the worker.

    pictures  bytes of image files
    names     what the record calls them
    events    for the event loop in which the job was opened; `tell` may be called in any thread
    """

    request: ChatRequest
    pictures: tuple[bytes, ...]
    names: tuple[str, ...]
    client: Client
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: float = field(default_factory=monotonic)  # seconds
    cancelled: bool = False  # whether nobody waits for it any more
    sent: str = ""  # of the answer, as a stream
    resolved: bool = False  # whether its last event was sent

    def tell(self, event: Event) -> None:
        if isinstance(event, Outcome | Exception):
            self.resolved = True
        with suppress(RuntimeError):  # the loop is closed, with the connection
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    def group(self) -> object:
        """Jobs of equal groups may be answered in one batch. A seed gives what it gives alone."""
        request = self.request
        return (id(self) if request.sampling.seed is not None else request.sampling, request.cache)


class FairQueue:
    """Jobs of many clients: one of each client in turn, and of one client in the order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Client, deque[Job]] = OrderedDict()  # the next in turn first; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, job: Job) -> None:
        self._waiting.setdefault(job.client, deque()).append(job)

    def take(self, most: int) -> list[Job]:
        """Up to `most` jobs of one group, that of the next in turn. Those that nobody waits for are left out."""
        taken: list[Job] = []
        self.remove(lambda job: job.cancelled)
        progress = True
        while progress and len(taken) < most:
            progress = False
            for client in list(self._waiting):
                jobs = self._waiting[client]
                if len(taken) == most or (taken and jobs[0].group != taken[0].group):
                    continue
                taken.append(jobs.popleft())
                progress = True
                if jobs:
                    self._waiting.move_to_end(client)
                else:
                    del self._waiting[client]
        return taken

    def remove(self, wanted: Callable[[Job], bool]) -> list[Job]:
        """Takes out all jobs of which `wanted` is true."""
        removed = [job for jobs in self._waiting.values() for job in jobs if wanted(job)]
        for client in list(self._waiting):
            remaining = deque(job for job in self._waiting[client] if not wanted(job))
            if remaining:
                self._waiting[client] = remaining
            else:
                del self._waiting[client]
        return removed
