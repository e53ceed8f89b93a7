"""Requests that wait for their turn, in the order of fairness."""

import asyncio
import json
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from gridprune_cli.image_files import NamedImage
from gridprune_cli.questions import Exchange
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


@dataclass(frozen=True)
class Finished:
    """A command of `gridprune` is done, and this is what goes back to it.

    files  that belong to the result, by their fields there, which hold them in base64
    """

    result: dict[str, Any]
    files: Mapping[str, bytes]


Event = Started | str | Outcome | Finished | Exception | Left
"""What a job tells who waits for it: that it started, pieces of the answer; last what came of it, or what failed."""


@dataclass(eq=False, kw_only=True)
class Turn(ABC):
    """What goes through the queue and the worker, whatever is asked.

    events  for the event loop in which it was opened; `tell` may be called in any thread
    """

    client: Client
    events: "asyncio.Queue[Event]" = field(default_factory=asyncio.Queue)
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    arrived: float = field(default_factory=monotonic)  # seconds
    cancelled: bool = False  # whether nobody waits for it any more
    sent: str = ""  # of the answer, as a stream
    resolved: bool = False  # whether its last event was sent

    def tell(self, event: Event) -> None:
        if isinstance(event, Outcome | Finished | Exception):
            self.resolved = True
        with suppress(RuntimeError):  # the loop is closed, with the connection
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    @property
    @abstractmethod
    def group(self) -> object:
        """Jobs of equal groups may be answered in one batch."""


@dataclass(eq=False)
class Job(Turn):
    """A request for a completion.

    pictures  bytes of image files
    names     what the record calls them
    """

    request: ChatRequest
    pictures: tuple[bytes, ...]
    names: tuple[str, ...]

    @property
    def group(self) -> object:
        """A seed gives what it gives alone."""
        request = self.request
        return (id(self) if request.sampling.seed is not None else request.sampling, request.cache)


@dataclass(frozen=True)
class Command:
    """What a command of `gridprune` has the server do.

    images       to prune, and `question` about them
    pruning      options by name, as `Pruning.from_options` takes them
    pruned       a pruned set's name and file, to answer from, in place of all these
    generation   options of transformers' `generate`; None: no answer is wanted
    scenes_only  whether a picture is refused that is no scene, since no model was chosen
    file         whether the pruned set's file goes back
    with_prefix  as of `Runner.prune`
    figure       which of `client.protocol.FIGURES` goes back, if any
    history      earlier turns of the conversation
    pin          whether the answer goes on from the keys and values that are held of its prompt, and leaves its own
    """

    images: tuple[NamedImage, ...]
    question: str
    pruning: Mapping[str, Any]
    system: str | None
    template: str | None
    pruned: tuple[str, bytes] | None
    generation: Mapping[str, Any] | None
    stream: bool
    cache: bool
    scenes_only: bool
    file: bool
    with_prefix: bool | None
    figure: str | None
    history: tuple[Exchange, ...] = ()
    pin: bool = False


@dataclass(eq=False)
class CommandJob(Turn):
    """A command's request."""

    command: Command

    @property
    def group(self) -> object:
        """A streamed answer is written as it comes, and a pinned one goes on from what is held: each is alone."""
        command = self.command
        options = None if command.generation is None else json.dumps(command.generation, sort_keys=True)
        alone = command.stream or command.pin
        kind = command.pruned is None, command.cache, command.scenes_only, command.with_prefix
        return ("command", id(self) if alone else None, options, *kind)


class FairQueue:
    """Jobs of many clients: one of each client in turn, and of one client in the order of arrival."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Client, deque[Turn]] = OrderedDict()  # the next in turn first; none is empty

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, job: Turn) -> None:
        self._waiting.setdefault(job.client, deque()).append(job)

    def take(self, most: int) -> list[Turn]:
        """Up to `most` jobs of one group, that of the next in turn. Those that nobody waits for are left out."""
        taken: list[Turn] = []
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

    def remove(self, wanted: Callable[[Turn], bool]) -> list[Turn]:
        """Takes out all jobs of which `wanted` is true."""
        removed = [job for jobs in self._waiting.values() for job in jobs if wanted(job)]
        for client in list(self._waiting):
            remaining = deque(job for job in self._waiting[client] if not wanted(job))
            if remaining:
                self._waiting[client] = remaining
            else:
                del self._waiting[client]
        return removed
