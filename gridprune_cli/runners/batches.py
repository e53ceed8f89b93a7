"""Work in batches that shrink where memory runs out, and what else all runners share."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import RLock
from typing import TypeVar

import torch

from gridprune_cli.errors import GridpruneError

T = TypeVar("T")
R = TypeVar("R")

_log = logging.getLogger(__name__)

# Held while a model is loaded or generates: loading sets torch's default dtype for the whole process, in which another
# thread would generate. One for all runners, since a localiser has one of its own.
MODELS = RLock()


class Stopwatch:
    """Milliseconds by the name of a step, summed up over all times that the step was taken."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}

    @contextmanager
    def measure(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[step] = self.ms.get(step, 0.0) + 1e3 * (time.perf_counter() - start)


class Batches:
    """Work in batches of `size`, which is halved where memory runs out. What is done stays done.

    `items` names the things worked on, in the log.
    """

    def __init__(self, size: int, items: str):
        self.size, self.items = size, items

    def run(self, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]) -> Iterator[R | GridpruneError]:
        """A result, or an error, for each item in turn. An item is at fault where `work` fails for it alone."""
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            try:
                results: list[R | GridpruneError] = list(work(batch))
            except Exception as error:
                if len(batch) == 1:
                    results = [as_error(error)]
                elif _lacks_memory(error):
                    self.size = len(batch) // 2
                    _log.warning(
                        "memory ran out with %d %s at once; going on with %d", len(batch), self.items, self.size
                    )
                    continue
                else:  # one of them is at fault: find out which
                    results = [result for item in batch for result in self.run([item], work)]
            yield from results
            start += len(batch)


def in_order(pairs: Iterable[tuple[int, T]]) -> Iterator[T]:
    """Values with indices from 0, in any order: the values in turn, each as soon as those before it are there."""
    waiting: dict[int, T] = {}
    following = 0
    for index, value in pairs:
        waiting[index] = value
        while following in waiting:
            yield waiting.pop(following)
            following += 1


def result_or_raise(result: T | GridpruneError) -> T:
    """The result. Raises it where it is an error."""
    if isinstance(result, GridpruneError):
        raise result
    return result


def as_error(error: Exception) -> GridpruneError:
    """Any failure as one that can be reported in a line."""
    if isinstance(error, GridpruneError):
        return error
    if _lacks_memory(error):
        reason = "memory ran out for this one alone; use a smaller image, keep less, or `device=cpu`"
    else:
        reason = f"unexpected {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    reported = GridpruneError(reason)
    reported.__cause__ = error
    return reported


def _lacks_memory(error: Exception) -> bool:
    """Whether memory ran out: a GPU's, the machine's, or that of torch's allocator on the CPU, by its message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)
