"""Runs cases of damaged and hostile input; whatever ends otherwise than by a result or a one-line error is a finding.

    python -m tests.fuzz                        60 s
    python -m tests.fuzz --cases 1000000
    python -m tests.fuzz --only images --case 4711      one case again, in this process, with its traceback

A case is a target and a number: both together decide all of its input. Each is watched for its time, the memory that
it adds, what it writes to stderr, and whether the process survives. Exits with 1 where there is a finding.
"""

import argparse
import json
import multiprocessing as mp
import os
import sys
import time
from collections import Counter
from queue import Empty
from typing import Any

from .targets import TARGETS
from .worker import Finding, choose, run_case, work

SECONDS = 10.0  # that a case may take: the bound of docs/limits.md
GRACE = 5.0  # for a machine that is busy
EVERY = 30.0  # seconds between two lines on how it is going
START = 120.0  # seconds in which a process must have imported what it tests


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Tries damaged and hostile input.")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to run (default 60)")
    parser.add_argument("--cases", type=int, help="how many cases to run, instead of --seconds")
    parser.add_argument("--first", type=int, default=0, help="number of the first case; another one tries other input")
    parser.add_argument("--only", choices=list(TARGETS), help="one target alone")
    parser.add_argument("--case", type=int, help="run this one case in this process")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one per CPU)")
    options = parser.parse_args()
    if options.case is not None:
        print(run_case(options.only or choose(options.case, None), options.case))
        return 0
    return watch(options)


def watch(options: argparse.Namespace) -> int:
    """Keeps the processes at work, and ends one whose case takes too long."""
    context = mp.get_context("spawn")
    news: Any = context.Queue()
    state = context.Array("d", 2 * options.jobs)  # of each process: its case's number, and when that began
    stop = context.Event()
    limit = options.first + options.cases if options.cases else None
    processes: list[Any] = [None] * options.jobs

    def start(job: int, first: int) -> None:
        state[2 * job], state[2 * job + 1] = first, time.monotonic() + START
        arguments = (job, first, options.jobs, limit, options.only, state, stop, news)
        processes[job] = context.Process(target=work, args=arguments, daemon=True)
        processes[job].start()

    for job in range(options.jobs):
        start(job, options.first + job)
    began = spoken = time.monotonic()
    findings: list[Finding] = []
    outcomes: Counter[str] = Counter()
    while any(processes):
        try:
            message = news.get(timeout=0.2)
            if isinstance(message, Finding):
                findings.append(message)
                print(json.dumps(message._asdict()), flush=True)
            else:
                outcomes.update(message)
        except Empty:
            pass
        if options.cases is None and time.monotonic() - began > options.seconds:
            stop.set()
        if time.monotonic() > spoken + EVERY:
            spoken = time.monotonic()
            print(f"{outcomes.total()} cases, {len(findings)} findings so far", file=sys.stderr, flush=True)
        for job, process in enumerate(processes):
            if process is None:
                continue
            number, due = int(state[2 * job]), state[2 * job + 1] + SECONDS + GRACE
            ended, late = not process.is_alive(), time.monotonic() > due
            if late and not ended:
                process.kill()
                process.join()
            if not ended and not late:
                continue
            processes[job] = None
            if late or process.exitcode:
                kind, detail = ("time", f"over {SECONDS:.0f} s") if late else ("died", f"exit {process.exitcode}")
                findings.append(Finding(choose(number, options.only), number, kind, detail))
                print(json.dumps(findings[-1]._asdict()), flush=True)
                if not stop.is_set():
                    start(job, number + options.jobs)
    while not news.empty():
        message = news.get()
        if not isinstance(message, Finding):
            outcomes.update(message)
    for outcome, count in sorted(outcomes.items()):
        print(f"{outcome}: {count}", file=sys.stderr)
    seconds = time.monotonic() - began
    print(f"{outcomes.total()} cases in {seconds:.0f} s, {len(findings)} findings", file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
