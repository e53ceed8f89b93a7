"""Images are read and decoded ahead of the vision tower, by threads, within bounds of memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import Condition

from gridprune_cli.decoding import BYTES_PER_PIXEL, MAX_TOGETHER
from gridprune_cli.errors import GridpruneError
from gridprune_cli.images import Picture, Source, memory_of
from gridprune_cli.tokens import EncodedImage

MAX_MEMORY = MAX_TOGETHER  # bytes that reading ahead takes
MAX_THREADS = 16  # more would wait for one another


@dataclass(frozen=True)
class Reading:
    """A source that was read: its name, and the encoded image from the cache, a decoded picture, or what failed."""

    source: Source
    name: str
    result: EncodedImage | Picture | GridpruneError

    @property
    def pixels(self) -> int:
        """Pixels of a decoded picture, else 0."""
        return self.result.image.width * self.result.image.height if isinstance(self.result, Picture) else 0


class Room:
    """Bytes of memory that threads may take, granted in the order of tickets 0, 1, ...; each is to `enter`, in turn.

    What is more than all of it gets in alone. Since no one waits for a later one, none waits for ever.
    """

    def __init__(self, size: int):
        self.size, self.closed = size, False
        self.blocked = False  # whether the next in turn waits
        self._taken: dict[int, int] = {}
        self._turn, self._changed = 0, Condition()

    def enter(self, ticket: int, size: int) -> None:
        """Waits until `size` bytes are there. Raises GridpruneError once the room is closed."""

        def fits() -> bool:
            if self._turn != ticket:
                return False
            self.blocked = bool(self._taken) and sum(self._taken.values()) + size > self.size
            return not self.blocked

        with self._changed:
            self._changed.wait_for(lambda: self.closed or fits())
            if self.closed:
                raise GridpruneError("interrupted")
            self._taken[ticket] = size
            self._turn += 1
            self._changed.notify_all()

    def leave(self, ticket: int) -> None:
        """Gives back what `enter` took."""
        with self._changed:
            self._taken.pop(ticket, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Lets everyone go who waits, and those who read stop."""
        with self._changed:
            self.closed = True
            self._changed.notify_all()


def read_ahead(
    threads: ThreadPoolExecutor,
    read: Callable[[Source], Reading],
    sources: Iterable[Source],
    most: int,
    room: Room,
    *,
    beside: bool,
) -> Iterator[Reading]:
    """What `read` gives for each source, in turn, up to `most` of them ahead; fewer where pictures are large.

    beside  whether reading goes on while the caller does other things; else only while it waits for the next
    """

    def enter(ticket: int, source: Source) -> Reading:
        room.enter(ticket, memory_of(source))
        return read(source)

    tickets = enumerate(sources)
    in_flight: deque[tuple[int, Future[Reading]]] = deque()
    recent = deque([room.size // 4], maxlen=8)  # bytes; how large the first ones are is not known
    while True:
        if beside or not in_flight:
            ahead = min(most, max(1, room.size // max(1, *recent)))
            while len(in_flight) < ahead and (pair := next(tickets, None)) is not None:
                in_flight.append((pair[0], threads.submit(enter, *pair)))
            if not beside:
                # one that waits for room gets it only when others have been handed on
                while wait([future for _, future in in_flight], timeout=0.05).not_done and not room.blocked:
                    pass
        if not in_flight:
            return
        ticket, future = in_flight.popleft()
        reading = future.result()
        recent.append(BYTES_PER_PIXEL * reading.pixels)
        yield reading
        del reading, future  # a picture that is done with is not held while the next is read
        room.leave(ticket)


def count_threads() -> int:
    """How many threads read images."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MAX_THREADS, cores or 1)
