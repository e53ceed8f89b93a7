"""A process that runs one case after another, and reports what is not as it should be."""

import io
import os
import random
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from .targets import TARGETS

MEMORY = 1_500_000_000  # bytes that a case may add: the bound of docs/limits.md
EVERY = 2.0  # seconds between reports


class Finding(NamedTuple):
    """What a case did that it should not: `kind` is unexpected, time, memory, stderr or died."""

    target: str
    number: int
    kind: str
    detail: str


def choose(number: int, only: str | None) -> str:
    """The target of a case."""
    if only:
        return only
    names, shares = zip(*((name, target.share) for name, target in TARGETS.items()), strict=True)
    return random.Random(number).choices(names, shares)[0]


def run_case(target: str, number: int) -> str:
    """What came of a case, in a word or two. Raises what the package should not have raised."""
    from gridprune_cli.errors import GridpruneError

    try:
        return TARGETS[target].run(random.Random(f"{target} {number}"))
    except GridpruneError as fault:
        if len(str(fault).splitlines()) != 1:
            raise AssertionError(f"an error of several lines: {str(fault)!r}") from fault
        return "refused"


def work(
    job: int, first: int, step: int, limit: int | None, only: str | None, state: Any, stop: Any, news: Any
) -> None:
    """Runs every `step`-th case from `first` on, below `limit`, until `stop` is set."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")  # as the commands set it
    import torch

    torch.set_num_threads(1)
    captured = tempfile.TemporaryFile()  # noqa: SIM115 - for the whole process
    os.dup2(captured.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the commands keep what libraries print there off their stdout
    for target in TARGETS.values():
        target.prepare()
    outcomes: Counter[str] = Counter()
    peak, reported, number = _peak(), time.monotonic(), first
    parent = os.getppid()  # another one, where it was killed
    while not stop.is_set() and os.getppid() == parent and (limit is None or number < limit):
        state[2 * job], state[2 * job + 1] = number, time.monotonic()
        name = choose(number, only)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(sys.__stderr__):
                outcomes[f"{name} {run_case(name, number)}"] += 1
        except BaseException:
            outcomes[f"{name} unexpected"] += 1
            news.put(Finding(name, number, "unexpected", traceback.format_exc(limit=-4)))
        if (after := _peak()) > peak + MEMORY:
            news.put(Finding(name, number, "memory", f"{(after - peak) >> 20} MiB"))
        peak = max(peak, after)
        sys.__stderr__.flush()
        if size := os.fstat(2).st_size:
            captured.seek(0)
            news.put(Finding(name, number, "stderr", captured.read(min(size, 2000)).decode("utf-8", "replace")))
            os.ftruncate(2, 0)
            os.lseek(2, 0, os.SEEK_SET)
        if time.monotonic() - reported > EVERY:
            news.put(outcomes)
            outcomes, reported = Counter(), time.monotonic()
        number += step
    news.put(outcomes)
    news.close()
    news.join_thread()


def _peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
